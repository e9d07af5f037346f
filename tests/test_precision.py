"""Half precision: gated MLPs, repeated forward passes, the scaler, run.precision, unusable GPUs."""

import copy
import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from timm.layers.mlp import GluMlp, SwiGLU, SwiGLUPacked
from timm.models import register_model
from torch import nn

from nbs_lib import backbones, deadline, runtime, settings, siglip, stages, train_dinov3, trainer
from nbs_lib.backbones import Backbone, guard_glu, run_autocast
from nbs_lib.biomass_net import ModelConfig, build_model
from nbs_lib.prediction import ImageBatches
from nbs_lib.runtime import InputError, pick_device, pick_dtype
from nbs_lib.settings import load_settings
from nbs_lib.stages import open_run
from nbs_lib.trainer import TrainConfig, train

CPU = torch.device("cpu")
NARROW = "vit_narrow_swiglu_patch16_dinov3"
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"


@register_model
def vit_narrow_swiglu_patch16_dinov3(pretrained=False, **kwargs):
    "DINOv3 as its larger models are, with SwiGLU, in miniature."
    return timm.create_model("vit_small_plus_patch16_dinov3", embed_dim=48, depth=3, num_heads=3, **kwargs)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    "run.precision = auto, and no accelerator of another precision left over."
    torch.manual_seed(0)
    monkeypatch.setenv("NBS_PRECISION", "auto")
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def half(monkeypatch):
    monkeypatch.setenv("NBS_PRECISION", "float16")


KINDS = {
    "SwiGLU": lambda **k: SwiGLU(32, 64, **k),
    "SwiGLUPacked": lambda **k: SwiGLUPacked(32, 64, **k),
    "GluMlp": lambda **k: GluMlp(32, 64, act_layer=nn.Identity, **k),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "more", [{}, {"norm_layer": nn.LayerNorm}, {"bias": False}], ids=["plain", "norm", "no bias"]
)
def test_a_guarded_mlp_is_the_plain_one_in_float32(kind, more):
    plain = KINDS[kind](**more)
    guarded, x = guard_glu(copy.deepcopy(plain)), torch.randn(2, 7, 32)
    assert isinstance(guarded, backbones.GuardedGlu) and list(guarded.state_dict()) == list(
        plain.state_dict()
    )
    torch.testing.assert_close(guarded(x), plain(x), atol=1e-6, rtol=1e-6)
    again = copy.deepcopy(guarded)  # each fold copies its network
    nn.init.zeros_(again.fc2.weight)
    assert type(again) is type(guarded) and not torch.equal(again(x), guarded(x))


@pytest.mark.parametrize("kind", KINDS)
def test_two_activations_of_300_do_not_overflow(kind):
    plain = KINDS[kind]()
    for name, p in plain.named_parameters():
        if name.startswith("fc1") and name.endswith("bias"):
            nn.init.constant_(p, 300.0)
    nn.init.constant_(plain.fc2.bias, 40.0)  # the bias must not be scaled with the product
    guarded, x = guard_glu(copy.deepcopy(plain)), torch.randn(2, 7, 32, requires_grad=True)
    exact = plain(x)
    with torch.autocast("cpu", torch.float16):
        assert not plain(x).isfinite().all()
        out = guarded(x)
    assert out.dtype == torch.float32 and out.isfinite().all()
    assert float((out - exact).detach().norm() / exact.detach().norm()) < 0.01
    (wanted,) = torch.autograd.grad(exact.pow(2).mean().sqrt(), x, retain_graph=True)
    (given,) = torch.autograd.grad(out.pow(2).mean().sqrt(), x)
    assert float((given - wanted).norm() / wanted.norm()) < 0.02


def test_ordinary_activations_are_as_exact_as_before():
    plain = SwiGLU(32, 64)
    guarded, x = guard_glu(copy.deepcopy(plain)), torch.randn(4, 50, 32)
    exact = plain(x)
    with torch.autocast("cpu", torch.float16):
        errors = [float((mlp(x).float() - exact).abs().mean()) for mlp in (guarded, plain)]
    assert errors[0] <= errors[1]
    with torch.autocast("cpu", torch.bfloat16):  # has float32's range: left alone
        assert torch.equal(guarded(x), plain(x))


@pytest.mark.parametrize("name", [NARROW, "vit_small_plus_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_backbones_are_guarded_when_they_are_built(name):
    net, plain = Backbone(name).net, timm.create_model(name, num_classes=0, global_pool="")
    gated = [m for m in net.modules() if isinstance(m, SwiGLU | GluMlp)]
    assert gated and all(isinstance(m, backbones.GuardedGlu) for m in gated)
    assert list(net.state_dict()) == list(plain.state_dict())
    net.load_state_dict(plain.state_dict())


def test_a_gated_mlp_of_convolutions_stays_as_it_is():
    assert type(guard_glu(GluMlp(8, 16, use_conv=True))) is GluMlp


# Training


def photos(n=16, size=32):
    rng = np.random.default_rng(0)
    share = rng.uniform(0.1, 0.9, n)
    pairs = rng.integers(90, 130, (n, 2, size, size, 3), dtype=np.uint8)
    pairs[rng.random(pairs.shape[:-1]) < share[:, None, None, None]] = (60, 140, 40)
    green, clover, dead = 50 * share, 5 * share, 20 * (1 - share)
    return pairs, np.stack([green, dead, clover, green + clover, green + clover + dead], 1)


def make_large_activations(mlp, args, on):
    "Biases of the first layer for activations of some 300 in the steps where `on`; as a hook before `mlp`."
    with torch.no_grad():
        for layer in (mlp.fc1_g, mlp.fc1_x):
            layer.bias.fill_(300.0 if on() else 0.0)


def small_training(epochs=10, every=20, guard=True, seed=0):
    "Return a network and its training, in which the middle MLP overflows float16 in each `every`-th step."
    pairs, y = photos()
    torch.manual_seed(1)
    config = ModelConfig(
        NARROW,
        size=32,
        squeeze=True,
        probe=False,
        head="pooled",
        fusion="none",
        dim=16,
        dropout=0,
        head_dropout=0.0,
    )
    net = build_model(config)
    net.init_output_from_labels(y)
    mlp = net.backbone.net.blocks[1].mlp
    if not guard:
        for block in net.backbone.net.blocks:
            block.mlp.__class__ = SwiGLU
    for layer in (mlp.fc1_g, mlp.fc1_x):
        layer.bias.requires_grad_(False)
    nn.init.normal_(mlp.fc2.weight, std=1e-5)  # the product is large; what it adds to the sum is not
    s = dataclasses.replace(
        load_settings("demo").train_dinov3,
        unfreeze=1,
        epochs=epochs,
        warmup=1,
        freeze_epochs=0,
        batch=1,
        accumulate=1,
        lr=2e-3,
        lr_backbone=1e-4,
        patience=99,
        checkpointing=False,
        budget_minutes=0,
    )
    step = [0]

    class Data(ImageBatches):
        def to_input(self, x, device):
            step[0] += 1
            return super().to_input(x, device)

    mlp.register_forward_pre_hook(
        lambda m, args: make_large_activations(m, args, lambda: every and step[0] % every == every - 1)
    )
    return net, TrainConfig(
        Data(pairs, config),
        y,
        np.arange(len(y)),
        s,
        seed,
        epochs,
        names=[f"ID{i:03d}" for i in range(len(y))],
    )


def train_in(precision, monkeypatch, scales=None, warn=print, **more):
    "Run `small_training` in `precision`; return its losses by epoch, put the final loss scale into `scales`."
    monkeypatch.setenv("NBS_PRECISION", precision)
    real = trainer.make_accelerator

    def noted(device):
        acc = real(device)
        scales.append(acc.scaler)
        return acc

    with monkeypatch.context() as m:
        if scales is not None:
            m.setattr(trainer, "make_accelerator", noted)
        history = train(*small_training(**more), warn)
    if scales is not None:
        scales[:] = [scales[-1].get_scale()]
    return [h["loss"] for h in history]


@pytest.fixture(scope="module")
def without_overflow():
    "Losses of the last three epochs where nothing overflows: in float16, and in float32 with three seeds."
    with pytest.MonkeyPatch.context() as m:
        half = np.mean(train_in("float16", m, every=0)[-3:])
        return half, [np.mean(train_in("float32", m, seed=seed)[-3:]) for seed in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "repeated in float32"])
def test_overflow_in_one_step_of_twenty_costs_nothing(guard, without_overflow, monkeypatch):
    "Either is enough: the loss equals that of float32 within the spread of seeds; no step is skipped."
    (without, exact), scales, warnings = without_overflow, [], []
    losses = train_in("float16", monkeypatch, scales, warnings.append, guard=guard)
    loss = np.mean(losses[-3:])
    assert np.isfinite(losses).all() and loss < 0.4 * losses[1]
    assert abs(loss / without - 1) < 0.02 and abs(loss - np.mean(exact)) < max(
        np.ptp(exact), 0.1 * np.mean(exact)
    )
    assert scales[0] >= 256  # from 65536 down to where the gradients fit
    if guard:
        assert not warnings
    else:
        assert (
            len(warnings) == 1
            and "of 16 photos overflowed fp16; 8 forward passes were repeated in float32: ID0" in warnings[0]
        )


@pytest.mark.slow
def test_without_either_the_scale_falls_below_one(monkeypatch):
    "Without them the scaler takes an overflow of the network for too large a scale; the training stops."
    scales, real = [], trainer.forward_loss
    blind = lambda *args, **kwargs: (real(*args, **kwargs)[0], torch.ones(1, dtype=torch.bool))  # noqa: E731
    monkeypatch.setattr(trainer, "forward_loss", blind)
    monkeypatch.setattr(trainer, "GROWTH_STEPS", 2000)  # as PyTorch has it
    with pytest.raises(
        InputError, match=r"run\.precision: float16 .* below 1 for 20 steps .*set run\.precision = float32"
    ):
        train_in("float16", monkeypatch, scales, guard=False, epochs=20)
    assert scales[-1].get_scale() < 1


def test_a_repeat_counts_frozen_half_precision_layers_in_float32(half, monkeypatch):
    "Gradients of a repeated pass are those of float32; frozen layers are in half precision again afterwards."
    net, fit = small_training(every=1, guard=False)
    trainer.unfreeze(net, 1)
    for layer in net.backbone.net.blocks[2].mlp.children():
        layer.requires_grad_(False)  # behind what is trained, so that gradients pass through it
    exact = copy.deepcopy(net)
    trainer.cast_frozen_layers(net, torch.float16)
    exact.load_state_dict(net.state_dict())  # in float32, the rounded numbers
    grads, kinds = [], {n: p.dtype for n, p in net.named_parameters()}
    for model, precision in ((net, "float16"), (exact, "float32")):
        monkeypatch.setenv("NBS_PRECISION", precision)
        acc = trainer.make_accelerator(CPU)
        acc.scaler = None  # plain gradients
        trainer.train_step(model, fit, [np.array([3])], (0, 0), acc)
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert fit.repeated == {3: 1} and torch.float16 in kinds.values()
    assert {n: p.dtype for n, p in net.named_parameters()} == kinds
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_scale_below_one_ends_the_training(half, monkeypatch):
    net, fit = small_training(epochs=20, every=0)
    real = trainer.train_step

    def overflowing(model, fit, micro, draw, acc):
        loss = real(model, fit, micro, draw, acc)
        if acc.scaler.get_scale() >= 1 / 4:  # gradients that only fit when they are made small
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.inf)
        return loss

    monkeypatch.setattr(trainer, "train_step", overflowing)
    with pytest.raises(
        InputError, match=r"run\.precision: float16 .* below 1 for 20 steps .*set run\.precision = float32"
    ):
        train(net, fit)


def test_the_scale_recovers_within_a_fold(half, monkeypatch):
    scaler = trainer.make_accelerator(CPU).scaler
    assert scaler.get_growth_interval() == trainer.GROWTH_STEPS <= 300 and scaler.get_scale() == 65536


# One function runs every backbone


def test_siglip_is_repeated_in_float32(half, tmp_path):
    folder = siglip.write_tiny_siglip(tmp_path / "siglip", ["white clover", "bare soil"], 0)
    model = siglip.load_siglip(folder, CPU)
    with torch.no_grad():
        model.model.vision_model.embeddings.patch_embedding.weight *= 1e7
    pixels = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    out = model.embed_images(pixels)
    assert out.dtype == torch.float32 and out.isfinite().all()
    assert model.embed_texts(["white clover"]).isfinite().all()


def test_half_precision_siglip_files_compute_in_float32_on_a_cpu(tmp_path):
    from transformers import SiglipModel

    folder = siglip.write_tiny_siglip(tmp_path / "siglip", ["white clover", "bare soil"], 0)
    SiglipModel.from_pretrained(folder).half().save_pretrained(folder)
    model = siglip.load_siglip(folder, CPU)
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
    assert model.embed_images(np.zeros((1, 64, 64, 3), np.uint8)).isfinite().all()


def test_memory_that_runs_out_in_siglip_names_its_own_setting():
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(InputError, match=r"siglip\.batch"):
        siglip.Siglip(nn.Linear(1, 1), None, None, CPU).run(full)


def test_nobody_else_opens_an_autocast_for_inference():
    package = settings.package_folder()
    found = [
        p.name
        for p in package.glob("*.py")
        for line in p.read_text().splitlines()
        if "torch.autocast(" in line and "enabled=False" not in line
    ]
    assert set(found) == {"backbones.py", "budget.py"}, found  # budget.py only simulates


# run.precision


@pytest.mark.parametrize(
    ("word", "dtype"),
    [
        ("auto", torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("float32", torch.float32),
    ],
)
def test_run_precision_reaches_pick_dtype_and_later_processes(word, dtype, tmp_path):
    (tmp_path / "in").mkdir()
    open_run(tmp_path / "in", tmp_path / "out", overrides=[f"run.precision={word}"])
    assert pick_dtype(CPU) == dtype
    assert os.environ["NBS_PRECISION"] == word  # what a later process reads
    seen = []
    run_autocast(
        nn.Linear(2, 2),
        CPU,
        lambda: (
            seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")),
            torch.zeros(1),
        )[1:],
    )
    assert seen == [False if dtype == torch.float32 else dtype]


def test_a_stage_exports_the_precision_of_its_own_run(tmp_path):
    (tmp_path / "in").mkdir()
    first = open_run(tmp_path / "in", tmp_path / "out", overrides=["run.precision=bfloat16"])
    open_run(tmp_path / "in", tmp_path / "out")
    seen = []
    stages.stage("core")(lambda run: seen.append(os.environ["NBS_PRECISION"]))(first, force=True)
    assert seen == ["bfloat16"]


def test_an_impossible_precision_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    choices = "auto, float16, bfloat16, float32"
    with pytest.raises(InputError, match=f"^run.precision: unknown .half.; choose from {choices}$"):
        open_run(tmp_path / "in", tmp_path / "out", overrides=["run.precision=half"])
    monkeypatch.setenv("NBS_PRECISION", "bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(
        InputError,
        match=r"^run.precision: bfloat16 needs compute capability 8.0 \(this GPU has 7.5\); set auto",
    ):
        pick_dtype(torch.device("cuda"))


def test_precision_may_change_between_two_trainings_of_a_process(monkeypatch):
    made = []
    for word in ("float32", "float16", "bfloat16"):
        monkeypatch.setenv("NBS_PRECISION", word)
        made.append(trainer.make_accelerator(CPU).mixed_precision)
    assert made == ["no", "fp16", "bf16"]


# GPUs that are there and cannot run


@pytest.fixture
def cards(monkeypatch):
    "Simulate one GPU per argument, the reason why it cannot run; return the list of those tried."

    def make(*words):
        tried = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(words))
        monkeypatch.setattr(runtime, "try_gpu", lambda i: (tried.append(i), words[i])[1])
        return tried

    runtime.warn_once.cache_clear()
    return make


def test_a_card_without_kernels_gives_way_to_another(cards, capsys, monkeypatch):
    cards(NO_KERNEL, "", "")
    assert pick_device() == torch.device("cuda", 1) and pick_device() == torch.device("cuda", 1)
    assert capsys.readouterr().out.splitlines() == [
        f"warning: GPU 0 is there but cannot run this PyTorch ({NO_KERNEL}); going on with GPU 1, 2"
    ]
    assert [d.device for d in deadline.find_devices(4)] == [torch.device("cuda", 1), torch.device("cuda", 2)]
    s = dataclasses.replace(load_settings("demo").train_dinov3, parallel_folds=3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert train_dinov3.assign_gpus(s) == ["1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-abc,7")
    assert train_dinov3.assign_gpus(s) == ["GPU-abc", "7"]


def test_without_a_usable_gpu_the_cpu_is_used(cards, capsys):
    cards(NO_KERNEL)
    assert pick_device() == CPU and [d.device for d in deadline.find_devices(4)] == [CPU]
    assert train_dinov3.assign_gpus(
        dataclasses.replace(load_settings("demo").train_dinov3, parallel_folds=2)
    ) == ["", ""]
    assert capsys.readouterr().out.count("going on with the CPU") == 1


def test_usable_gpus_cause_no_warning(cards, capsys):
    cards("", "")
    assert (
        pick_device() == torch.device("cuda")
        and len(deadline.find_devices(4)) == 2
        and not capsys.readouterr().out
    )


def test_the_trial_runs_an_operation_once_and_gives_the_reason(monkeypatch):
    calls = []

    def dead(*shape, device):
        calls.append(device)
        raise RuntimeError(NO_KERNEL + "\nCompile with `TORCH_USE_CUDA_DSA`")

    runtime.try_gpu.cache_clear()
    monkeypatch.setattr(torch, "ones", dead)
    assert [runtime.try_gpu(3), runtime.try_gpu(3)] == [NO_KERNEL] * 2 and calls == ["cuda:3"]
    runtime.try_gpu.cache_clear()
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(*shape))
    assert runtime.try_gpu(3) == ""
    runtime.try_gpu.cache_clear()


# Several processes


PAIR = """
import sys, json, os
sys.path.insert(0, {tests!r})
import numpy as np, torch
import test_precision as t
torch.set_num_threads(1)
net, fit = t.small_training(epochs=2, every=int(os.environ["EVERY"]), guard=False)
fit.settings = t.dataclasses.replace(fit.settings, batch=2)
warnings = []
losses = [h["loss"] for h in t.train(net, fit, warnings.append)]
json.dump([losses, warnings], open(os.environ["OUT"], "w"))
"""


@pytest.mark.slow
def test_one_process_of_two_repeats_its_forward_pass_alone(tmp_path):
    "The other one neither waits for a second forward pass nor learns from other gradients."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    code, env = (
        PAIR.format(tests=str(ROOT / "tests")),
        {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
    )
    env |= {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true",
        "NBS_PRECISION": "float16",
        "OMP_NUM_THREADS": "1",
    }
    each = [
        {"RANK": str(r), "LOCAL_RANK": str(r), "EVERY": "4" if r else "0", "OUT": str(tmp_path / f"{r}.json")}
        for r in range(2)
    ]
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env | own) for own in each]
    try:
        assert [p.wait(timeout=120) for p in both] == [0, 0]
    finally:
        for p in both:
            p.kill()
    (first, no_warnings), (second, warnings) = (json.loads(Path(own["OUT"]).read_text()) for own in each)
    assert first == second and np.isfinite(first).all()
    assert not no_warnings and "were repeated in float32" in warnings[0]
