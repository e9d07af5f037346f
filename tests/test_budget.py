"""Forecasts against what happens on a CPU: PyTorch's allocator, resident memory, files, and closed forms."""
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from unittest import mock

import pandas as pd
import pytest
import torch
from conftest import ROOT
from torch.profiler import ProfilerActivity, profile

from nbs_lib import budget, fusion
from nbs_lib.biomass_net import build_model, load_model, save_model
from nbs_lib.kaggle import KAGGLE_KERNELS
from nbs_lib.run import STAGES
from nbs_lib.runtime import InputError
from nbs_lib.settings import load_settings
from nbs_lib.store import half_shape
from nbs_lib.train_dinov3 import model_config
from nbs_lib.trainer import (
    EMA,
    TrainConfig,
    TrainerState,
    biomass_loss,
    cast_frozen_layers,
    make_accelerator,
    parameter_groups,
    read_checkpoint,
    save_final_weights,
    unfreeze,
    write_checkpoint,
)

TWIN = ("train_dinov3.weights=random", "train_dinov3.size=128", "train_dinov3.unfreeze=-1",
        "train_dinov3.accumulate=2")
VIT = "backbone=vit_twin_patch16_dinov3"
CNN = "backbone=tf_efficientnet_lite0"
TWINS = {  # settings of a network, and whether it computes in half precision
    "ViT, all trained": ([VIT, "checkpointing=no"], False),
    "ViT, recomputed": ([VIT, "checkpointing=yes"], False),
    "ViT, four blocks, one forward a step": ([VIT, "unfreeze=4", "accumulate=1", "checkpointing=no"], False),
    "ViT, adapters": ([VIT, "lora=8", "checkpointing=no"], False),
    "ViT, half precision": ([VIT, "checkpointing=no", "batch=4"], True),
    "CNN, all trained": ([CNN, "checkpointing=no"], False),
    "CNN, head alone, mamba": ([CNN, "unfreeze=0", "fusion=mamba", "dim=32"], False),
}


def twin(words: list[str]):
    "Settings of a small network, and the shape of a half."
    s = load_settings("kaggle", overrides=[*TWIN, *(f"train_dinov3.{w}" for w in words)]).train_dinov3
    return s, half_shape(s.size, s.squeeze)


def predict_gb(s, shape, half: bool) -> float:
    with budget.fake_tensors():
        net = budget.build_fake(lambda: build_model(model_config(s)))
        return sum(budget.simulate_step(net, s, shape, half).gb.values())


@mock.patch.object(fusion, "chunked_scan", fusion.blocked_scan)
def train(s, shape, half: bool = False, steps: int = 2) -> None:
    "Take real optimiser steps on black photos, with the scan of a GPU."
    net = build_model(model_config(s))
    unfreeze(net, s.unfreeze)
    net.train().backbone.net.set_grad_checkpointing(s.checkpointing and s.unfreeze != 0)
    optimiser, ema = torch.optim.AdamW(parameter_groups(net, s), foreach=True), EMA(net, s.ema)
    best = {n: t.clone() for n, t in ema.mean.items()}
    for _ in range(steps):
        for _ in range(s.accumulate):
            with torch.autocast("cpu", torch.float16, enabled=half):
                parts, _ = net(torch.zeros(s.batch, 2, 3, *shape), torch.zeros(s.batch, 3), full=True)
            y = torch.zeros(s.batch, 5)
            biomass_loss(parts.float().sum(1), y, s.loss_weights, s.beta).sum().backward()
            del parts
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        ema.update(net)
    assert best.keys() == ema.mean.keys()


def measure_gb(work: Callable[[], None]) -> float:
    "Measure the peak of PyTorch's CPU allocator during `work()`."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return pd.Series(sizes).cumsum().max() / 1e9


QUICK = "ViT, four blocks, one forward a step"
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in TWINS if name != QUICK]


@pytest.mark.parametrize("name", [QUICK, *SLOW])
def test_memory_matches_the_allocator(name):
    words, half = TWINS[name]
    s, shape = twin(words)
    predicted, real = predict_gb(s, shape, half), measure_gb(lambda: train(s, shape, half))
    print(f"{name}: predicted {predicted:.3f} GB, allocator {real:.3f} GB, ratio {predicted / real:.3f}")
    assert 0.85 < predicted / real < 1.15


@pytest.mark.slow
def test_memory_matches_the_system():
    """Resident memory of a larger network, in a process of its own whose C library returns freed memory."""
    words = ["backbone=vit_small_patch16_dinov3", "size=256", "checkpointing=no", "fusion=none"]
    code = f"""
import json, sys
import psutil, torch
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_budget import train, twin
from nbs_lib.runtime import peak_memory
torch.set_num_threads(1)
train(*twin(["backbone=vit_twin_patch16_dinov3", "size=32"]), steps=1)  # loads libraries
before = psutil.Process().memory_info().rss
s, shape = twin({words!r})
train(s, shape)
print(json.dumps((peak_memory() - before) / 1e9))
"""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    predicted, real = predict_gb(*twin(words), False), json.loads(done.stdout.splitlines()[-1])
    print(f"predicted {predicted:.3f} GB, resident {real:.3f} GB, ratio {predicted / real:.3f}")
    assert 0.85 < predicted / real < 1.15


def test_operations_match_the_formulas():
    """A linear layer costs 2 operations a weight and token, attention 4·N²·D a layer.

    The backward pass costs twice as much, and recomputing once more."""
    s, (h, w) = twin([VIT, "checkpointing=yes", "head=pooled", "fusion=none", "dim=16"])
    with budget.fake_tensors():
        net = budget.build_fake(lambda: build_model(model_config(s)))
        inference = budget.simulate_inference(net, lambda n: n(torch.zeros(3, 2, 3, h, w)), 3)
        step = budget.simulate_step(net, s, (h, w))
    tokens, body = h * w // 256 + 5, net.backbone.net
    layers = [m for b in body.blocks for m in b.modules() if isinstance(m, torch.nn.Linear)]
    linear = 2 * tokens * sum(m.weight.numel() for m in layers)
    attention = len(body.blocks) * 4 * tokens**2 * body.embed_dim
    stem = 2 * (tokens - 5) * body.patch_embed.proj.weight.numel()
    assert inference.tflop * 1e12 == pytest.approx(2 * (linear + attention + stem), rel=0.02)
    assert step.tflop / inference.tflop == pytest.approx(4, rel=0.06)


def test_tensors_are_ordinary_after_a_simulation():
    with budget.fake_tensors():
        budget.build_fake(lambda: torch.nn.Linear(100_000, 100_000))
    assert torch.ones(2).sum() == 2 and fusion.chunked_scan is not fusion.blocked_scan


def simulations(**more) -> budget.Simulations:
    "Simulations with round numbers."
    one = budget.Simulation({"weights": 3.4, "activations": 1.0}, 8.0)
    fields = {"inference": one, "step": dataclasses.replace(one, tflop=16.0), "frozen": [one, one],
              "siglip": None, "total": 850_000_000, "trained": 110_000_000}
    return budget.Simulations(**(fields | more))


def forecast(*overrides: str, gpus: str = "T4x2", **more) -> budget.Forecast:
    settings = load_settings("kaggle", overrides=[f"train_dinov3.{o}" for o in overrides])
    return budget.forecast(settings, gpus, simulations=simulations(**more))


def test_forecast_counts_folds_views_and_cards():
    def hours(stage, *overrides, gpus="T4x2"):
        return forecast(*overrides, gpus=gpus).stages.loc[stage, "gpu_hours"]

    one = hours("submit", "views=id")
    assert hours("submit", "views=id", gpus="T4") == pytest.approx(2 * one)
    models = 805 * 8.0 * (5 + 2)  # five folds, two widths of frozen features
    assert one == pytest.approx(models / (2 * 65 * 0.3) / 3600)
    assert hours("submit", "views=id, H, V, HV") == pytest.approx(one * (4 * 5 + 2) / 7)
    both, single = (hours("train_dinov3", f"parallel_folds={n}") for n in (2, 1))
    assert single == pytest.approx(5 / 3 * both), "five folds on two cards take three rounds"
    assert hours("train_dinov3", "parallel_folds=2", gpus="T4") == pytest.approx(single)
    ten = [hours("train_dinov3", "schemes=grouped, stratified", f"parallel_folds={n}") for n in (1, 2)]
    assert ten == pytest.approx([2 * single, single])


def test_forecast_counts_the_seconds_of_saving():
    def hours(*overrides):
        words = ("epochs=10", "schemes=grouped", "parallel_folds=1", "save_minutes=1e9", "refit=no")
        row = forecast(*words, *overrides).stages.loc["train_dinov3"]
        return row["hours"] - row["gpu_hours"] - 60 / 3600

    # five folds of ten epochs, 20 bytes a trained parameter
    once = 5 * 10 * 20 * 110e6 / 1e9 / budget.WRITE_GB_S / 3600
    assert hours() == pytest.approx(once) and hours("parallel_folds=2") == pytest.approx(3 / 5 * once)
    assert hours("refit=yes") == pytest.approx(2 * once)
    assert hours("refit=yes", "select=last") == pytest.approx(once)
    assert hours("pseudo_rounds=2") == hours("pseudo_rounds=2", "refit=yes") == pytest.approx(3 * once)
    assert hours("unfreeze=0") == pytest.approx(0, abs=1e-9) == hours("epochs=0")
    training = forecast("epochs=10", "refit=no", gpus="T4").stages.loc["train_dinov3", "gpu_hours"]
    minutes = 60 * training / 50  # of an epoch
    assert hours(f"save_minutes={minutes / 2}") == pytest.approx(3 * once)  # two within an epoch


@pytest.mark.parametrize("card, rounds, refit", [
    ("T4", 2, "yes"), pytest.param("L4", 0, "yes", marks=pytest.mark.slow),
    pytest.param("T4", 0, "no", marks=pytest.mark.slow)])
def test_disk_matches_the_files(card, rounds, refit, tmp_path, monkeypatch):
    """Fold weights and checkpoints as a training writes them, at their peak; weights load unchanged."""
    words = (VIT, "unfreeze=4", "schemes=grouped", "parallel_folds=1", f"pseudo_rounds={rounds}")
    overrides = [f"train_dinov3.{w}" for w in (*words, f"refit={refit}")]
    settings = load_settings("kaggle", overrides=[*TWIN, "run.folds=2", *overrides])
    s, most = settings.train_dinov3, 0
    net = build_model(model_config(s))
    unfreeze(net, s.unfreeze)
    if card == "T4":  # computes in float16
        cast_frozen_layers(net, torch.float16)
        net.backbone.float()
    optimiser = torch.optim.AdamW(parameter_groups(net, s))
    for p in (q for g in optimiser.param_groups for q in g["params"]):
        p.grad = torch.ones_like(p)
    optimiser.step()
    for k in range(2):
        save_model(net, tmp_path / f"fold{k}.safetensors", tmp_path / "backbone.safetensors")
    progress, write = TrainerState(net, optimiser, make_accelerator(torch.device("cpu")), s), torch.save
    progress.best["weights"] = {n: t.clone() for n, t in progress.ema.mean.items()}

    def size():
        return sum(p.stat().st_size for p in tmp_path.iterdir()) / 1e9

    def save(state, path):
        nonlocal most
        write(state, path)
        most = max(most, size())

    monkeypatch.setattr(torch, "save", save)
    names = ["state", *(f"state_round{k}" for k in range(1, rounds + 1))]
    if refit == "yes" and not rounds:
        names.append("state_refit")
    for name in names:
        fit = TrainConfig(None, [], None, s, 0, 1, state=tmp_path / f"{name}.pt", key="k")
        for _ in range(4):
            write_checkpoint(fit.state, key="k", **progress.plain())
        if name != names[-1]:
            save_final_weights({"ended": progress.ema.mean, "history": []}, fit)
    total = sum(p.numel() for p in net.parameters())
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    predicted = budget.estimate_disk_gb(settings, total, trained, 0, budget.GPUS[card].half)
    assert predicted["photos"] == 0 and 0.95 < sum(predicted.values()) / most < 1.05
    again = load_model(tmp_path / "fold1.safetensors").state_dict()
    assert all(torch.equal(v, again[k]) and v.dtype == again[k].dtype for k, v in net.state_dict().items())


def test_a_kill_while_a_state_is_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "state.pt"
    write_checkpoint(path, key="k", step=1)

    def killed(state, place):
        place.write_bytes(b"half")
        os._exit(9)

    child = os.fork()
    if child == 0:
        torch.save = killed
        write_checkpoint(path, key="k", step=2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not path.exists() and len(list(tmp_path.iterdir())) == 2
    assert read_checkpoint(path, "k")["step"] == 1
    write_checkpoint(path, key="k", step=3)
    assert read_checkpoint(path, "k")["step"] == 3
    assert {p.name for p in tmp_path.iterdir()} == {"state.pt", "state.before.pt"}


@pytest.mark.parametrize("gpus, fits", [("T4", False), ("H100", True)])
def test_a_network_that_is_too_large_does_not_fit(gpus, fits):
    limits = forecast(gpus=gpus, step=budget.Simulation({"weights": 15.5}, 8.0)).check_limits()
    assert [v["fits"] for v in limits if v["what"] == "memory of one GPU"] == [fits]


def test_the_verdict_names_the_kernels_that_fit_and_those_that_do_not(capsys):
    f = forecast(step=dataclasses.replace(simulations().step, tflop=12.0))
    budget.print_forecast(f)
    first = capsys.readouterr().out.splitlines()[0]
    hours = f.stages["cautious_hours"].sum()
    assert first == f"kernels on T4 x2: train, features, submit fit; suite does not ({hours:.1f} of 9 h)"
    faults = budget.judge_kernels(forecast(step=budget.Simulation({"weights": 15.5}, 8.0)))
    assert [kernel for kernel, fault in faults.items() if fault] == ["train", "suite"]
    assert "of 15.8 GB of GPU memory" in faults["train"][0]


def test_kernels_have_the_stages_of_those_on_kaggle():
    for kernel, names in budget.KERNEL_STAGES.items():
        expected = tuple(STAGES.values()) if kernel == "suite" else KAGGLE_KERNELS[kernel].notebooks
        assert tuple(STAGES[name] for name in names) == expected


@pytest.mark.parametrize("name", ["", "T5", "T4x", "T4x0", "x2", "T4xtwo"])
def test_unknown_cards_are_refused(name):
    if name == "T4x":
        assert budget.parse_gpus(name)[1] == 1
    else:
        with pytest.raises(InputError, match="gpu"):
            budget.parse_gpus(name)


def test_command_line(tmp_path, capsys):
    """A forecast of small networks, its file, and calls that are refused."""
    overrides = (f"train_dinov3.{VIT}", f"frozen.{CNN}", "frozen.widths=256", "siglip.weights=",
                 "train_dinov3.size=256")
    small = [f"--set={o}" for o in overrides]
    assert budget.main([*small, "--gpu", "L4", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("gpu_hours", "fits", "TFLOP/s"))
    record = json.loads((tmp_path / "out/budget.json").read_text())
    assert record["gpu"]["name"] == "L4" and record["stages"]["train_dinov3"]["tflop"] > 0
    for argv in (["--gpu", "T5"], ["--profile", "moon"], ["--set", "train_dinov3.backbone=grass"]):
        assert budget.main([*argv, "--output", str(tmp_path / "no")]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_folds_end_before_the_session_does():
    "Whatever the card: Kaggle keeps nothing of a session that it ends."
    s = load_settings("kaggle")
    rounds = s.run.folds * len(s.train_dinov3.schemes) / s.train_dinov3.parallel_folds
    assert 0 < rounds * s.train_dinov3.budget_minutes / 60 < budget.SESSION_HOURS - 1
