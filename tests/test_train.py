"""Model 1: kills, broken checkpoints, bad labels, several processes; and every kind of network learns."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from nbs_lib import fold_training, prediction, train_dinov3, trainer
from nbs_lib.backbones import VIEWS, BackboneFeatures
from nbs_lib.biomass_net import ModelConfig, build_model
from nbs_lib.prediction import CachedFeatures, predict
from nbs_lib.runtime import InputError, seed_everything
from nbs_lib.settings import load_settings
from nbs_lib.targets import weighted_r2_score
from nbs_lib.train_dinov3 import load_fold
from nbs_lib.trainer import TrainConfig, draw_batches, read_checkpoint, train, write_checkpoint

VIT, CNN = "vit_twin_patch16_dinov3", "tf_efficientnet_lite0"


pytestmark = pytest.mark.usefixtures("one_thread")


def settings(**changes):
    base = dict(
        epochs=8,
        warmup=1,
        lr=3e-3,
        batch=2,
        accumulate=2,
        patience=99,
        checkpointing=False,
        dropout=0.0,
        head_dropout=0.0,
        dim=16,
    )
    return dataclasses.replace(load_settings("demo").train_dinov3, **{**base, **changes})


def eight(backbone: str, channels: int = 24, seed: int = 0):
    "Return random features of eight photographs, as of a frozen backbone, and unrelated labels."
    rng = np.random.default_rng(seed)
    prefix = 5 if backbone == VIT else 0
    grid = torch.tensor(rng.normal(size=(8, 2, channels, 2, 2)), dtype=torch.float32)
    parts = np.abs(rng.normal(20, 12, (8, 3)))
    y = np.stack([parts[:, 0], parts[:, 2], parts[:, 1], parts[:, :2].sum(1), parts.sum(1)], 1)
    return BackboneFeatures(
        torch.zeros(8, 0), grid, torch.tensor(rng.normal(size=(8, 2, prefix, channels)), dtype=torch.float32)
    ), y


def net_on(backbone: str, **changes):
    torch.manual_seed(0)
    net = build_model(
        ModelConfig(
            backbone,
            **{
                "size": 64,
                "squeeze": True,
                "probe": False,
                "dim": 16,
                "dropout": 0.0,
                "head_dropout": 0.0,
                **changes,
            },
        )
    )
    return net


@pytest.mark.parametrize("fusion, head", [
    ("gated_conv", "density"), ("mamba", "density"), ("mamba", "pooled"), ("film", "pooled"),
    ("attention", "density"), ("none", "pooled")])
def test_every_network_can_memorise_eight_photos(fusion, head):
    encoded, y = eight(VIT, 192)
    net = net_on(VIT, fusion=fusion, head=head, prefix=True, layers=1)
    net.init_output_from_labels(y)
    before = weighted_r2_score(y, predict(net, range(8), features={"id": encoded}))
    s = settings(batch=8, accumulate=1, lr=1e-2)
    train(net, TrainConfig(CachedFeatures(encoded), y, np.arange(8), s, 0, epochs=80))
    after = weighted_r2_score(y, predict(net, range(8), features={"id": encoded}))
    assert after > 0.9 > before, (before, after)


def trained(net) -> dict:
    return {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}


def test_accumulation_changes_nothing_but_rounding():
    encoded, y = eight(CNN, 1280)
    ends = []
    for batch, accumulate in ((8, 1), (3, 3), (1, 8)):
        net = net_on(CNN)
        net.init_output_from_labels(y)
        train(
            net,
            TrainConfig(
                CachedFeatures(encoded),
                y,
                np.arange(8),
                settings(batch=batch, accumulate=accumulate),
                0,
                epochs=4,
            ),
        )
        ends.append(trained(net))
    for other in ends[1:]:
        for n in ends[0]:
            torch.testing.assert_close(other[n], ends[0][n], rtol=1e-3, atol=1e-4)


def test_only_unfrozen_blocks_and_adapters_change():
    pairs = np.random.default_rng(0).integers(0, 255, (4, 2, 64, 64, 3), dtype=np.uint8)
    _, y = eight(VIT)
    for blocks, lora, changed in (
        (0, 0, set()),
        (2, 0, {10, 11}),
        (-1, 0, set(range(12))),
        (-1, 2, set(range(12))),
    ):
        net = net_on(VIT, head="pooled", lora=lora)
        net.init_output_from_labels(y[:4])
        before = {n: p.detach().clone() for n, p in net.backbone.named_parameters()}
        s = settings(unfreeze=blocks, lora=lora, freeze_epochs=1, lr_backbone=1e-3, select="last")
        train(
            net, TrainConfig(prediction.ImageBatches(pairs, net.config), y[:4], np.arange(4), s, 0, epochs=3)
        )
        moved = {n for n, p in net.backbone.named_parameters() if not torch.equal(p, before[n])}
        assert {int(n.split("blocks.")[1].split(".")[0]) for n in moved if "blocks." in n} == changed
        assert all("lora_" in n for n in moved) or not lora


def test_freeze_epochs_leave_the_backbone_unchanged():
    pairs = np.random.default_rng(0).integers(0, 255, (2, 2, 64, 64, 3), dtype=np.uint8)
    _, y = eight(VIT)
    net = net_on(VIT, head="pooled")
    net.init_output_from_labels(y[:2])
    before = {n: p.detach().clone() for n, p in net.backbone.named_parameters()}
    train(
        net,
        TrainConfig(
            prediction.ImageBatches(pairs, net.config),
            y[:2],
            np.arange(2),
            settings(unfreeze=-1, freeze_epochs=2),
            0,
            epochs=4,
            stop=2,
        ),
    )
    assert all(torch.equal(p, before[n]) for n, p in net.backbone.named_parameters())


CHILD = """
import io, os, sys, torch, numpy as np
sys.path.insert(0, {tests!r})
import test_train as t
from pathlib import Path
from nbs_lib import trainer
torch.set_num_threads(1)
encoded, y = t.eight(t.CNN, 1280)
net = t.net_on(t.CNN, fusion="gated_conv", dropout=0.2)
net.init_output_from_labels(y)
s = t.settings(save_minutes=0.0, dropout=0.2, batch=1, accumulate=2)
data, state = t.CachedFeatures(encoded), Path({state!r})
t.kill_at(trainer, {where!r}, {count})
t.train(net, t.TrainConfig(data, y, np.arange(8), s, 0, epochs=12, state=state, key="k"))
torch.save(t.trained(net), {out!r})
"""


def kill_at(module, where: str, count: int) -> None:
    "Make this process kill itself in the `count`-th optimiser step, or amid the `count`-th checkpoint."
    name = "train_step" if where == "step" else "atomic_write"
    done, real = [], getattr(module, name)

    def step(*args):
        loss = real(*args)  # gradients are there, weights not yet changed
        done.append(1)
        if len(done) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    @contextlib.contextmanager
    def write(path):
        with real(path) as temporary:
            yield temporary
            done.append(1)
            if len(done) == count:  # half of the file is on the disk
                os.truncate(temporary, os.path.getsize(temporary) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    if where:
        setattr(module, name, step if where == "step" else write)


def run_child(state: Path, out: Path, where: str = "", count: int = 0) -> int:
    "Train in a new process, killed at a step or a checkpoint; return its exit code."
    code = CHILD.format(tests=str(Path(__file__).parent), state=str(state), out=str(out), where=where,
                        count=count)
    return subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode


@pytest.mark.slow
def test_training_survives_kill_9_in_a_step_and_in_a_write(tmp_path):
    assert run_child(tmp_path / "whole.pt", tmp_path / "whole.out") == 0
    state, out = tmp_path / "killed.pt", tmp_path / "killed.out"
    for where, count in (("step", 6), ("checkpoint", 9), ("step", 3)):
        assert run_child(state, out, where, count) == -signal.SIGKILL
    assert run_child(state, out) == 0
    whole, killed = (torch.load(tmp_path / f"{name}.out", weights_only=True) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[n], killed[n]) for n in whole)


PAIR = """
import sys, json, torch, numpy as np
sys.path.insert(0, {tests!r})
import test_train as t
torch.set_num_threads(1)
encoded, y = t.eight(t.CNN, 1280)
net = t.net_on(t.CNN)
net.init_output_from_labels(y)
data, s = t.CachedFeatures(encoded), t.settings(batch=3, accumulate=2, lr=1e-2)
history = t.train(net, t.TrainConfig(data, y, np.arange(7), s, 0, epochs=8))
import os
if os.environ.get("RANK", "0") == "0":
    json.dump([h["loss"] for h in history], open({out!r}, "w"))
"""


@pytest.mark.slow
def test_two_gloo_processes_train_as_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    code = {
        n: PAIR.format(tests=str(Path(__file__).parent), out=str(tmp_path / f"{n}.json"))
        for n in ("one", "two")
    }
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    here = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code["one"]], env=alone, cwd=here, check=True)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code["two"]],
            cwd=here,
            env={
                **alone,
                "RANK": str(r),
                "LOCAL_RANK": str(r),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "ACCELERATE_USE_CPU": "true",
            },
        )
        for r in range(2)
    ]
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert one[-1] < one[0]
    np.testing.assert_allclose(two, one, rtol=1e-4)


def test_the_mean_gradient_of_two_processes_is_that_of_one():
    "Each process takes every second photograph of a micro-batch, and none of one that is too small."
    encoded, y = eight(CNN, 1280)
    micro, grads = [np.arange(3), np.arange(3, 6), np.array([6])], []
    for world in (1, 2):
        for rank in range(world):
            net = net_on(CNN)
            net.init_output_from_labels(y)
            trainer.unfreeze(net, 0)
            acc = trainer.make_accelerator(torch.device("cpu"))
            process = types.SimpleNamespace(
                process_index=rank, num_processes=world, device=acc.device, mixed_precision="no",
                autocast=acc.autocast, backward=lambda loss: loss.backward(), reduce=lambda t, how: t,
                no_sync=lambda model: contextlib.nullcontext())
            fit = TrainConfig(CachedFeatures(encoded), y, np.arange(8), settings(), 0, epochs=1)
            trainer.train_step(net, fit, micro, (0, 0), process)
            grads.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    alone, *both = grads
    for n, grad in alone.items():
        torch.testing.assert_close((both[0][n] + both[1][n]) / 2, grad, rtol=1e-4, atol=1e-5)


def test_a_broken_checkpoint_falls_back_to_the_previous_one(tmp_path):
    path, warnings = tmp_path / "s.pt", []
    for step in (1, 2):
        write_checkpoint(path, key="k", step=step)
    path.write_bytes(path.read_bytes()[:-40])
    assert read_checkpoint(path, "k", warnings.append)["step"] == 1 and "broken" in warnings[0]
    path.write_text("not a state")
    assert read_checkpoint(path, "k", warnings.append)["step"] == 1
    path.with_suffix(".before.pt").write_bytes(b"")
    assert read_checkpoint(path, "k", warnings.append) is None


def test_a_checkpoint_of_other_settings_is_ignored(tmp_path):
    write_checkpoint(tmp_path / "s.pt", key="old", step=7)
    warnings = []
    assert read_checkpoint(tmp_path / "s.pt", "new", warnings.append) is None
    assert "other settings" in warnings[0]


def test_one_batch_with_a_nan_label_is_skipped():
    encoded, y = eight(CNN, 1280)
    y[3] = np.nan
    net = net_on(CNN, head="pooled")
    net.init_output_from_labels(np.nan_to_num(y))
    history = train(
        net,
        TrainConfig(CachedFeatures(encoded), y, np.arange(8), settings(batch=1, accumulate=1), 0, epochs=3),
    )
    assert len(history) == 3 and all(np.isfinite(h["loss"]) for h in history)
    assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_names_the_settings_to_change(error):
    class Full(CachedFeatures):
        def batch(self, index, draw):
            raise error

    encoded, y = eight(CNN, 1280)
    with pytest.raises(InputError, match="halve batch"):
        train(net_on(CNN), TrainConfig(Full(encoded), y, np.arange(8), settings(), 0, epochs=1))


def test_a_time_budget_ends_a_training_cleanly():
    encoded, y = eight(CNN, 1280)
    net, warnings = net_on(CNN, head="pooled"), []
    net.init_output_from_labels(y)
    scores = iter([0.5, 0.1])
    fit = TrainConfig(
        CachedFeatures(encoded),
        y,
        np.arange(8),
        settings(budget_minutes=1e-9),
        0,
        epochs=50,
        evaluate=lambda epoch, net: next(scores),
    )
    assert len(train(net, fit, warnings.append)) == 1 and "time budget" in warnings[0]
    assert np.isfinite(predict(net, range(8), features={"id": encoded})).all()


def test_patience_keeps_the_best_epoch():
    encoded, y = eight(CNN, 1280)
    net, seen = net_on(CNN, head="pooled"), []

    def evaluate(epoch, net):
        seen.append(trained(net))
        return [0.1, 0.9, 0.3, 0.2, 0.2, 0.2][epoch]

    history = train(
        net,
        TrainConfig(
            CachedFeatures(encoded), y, np.arange(8), settings(patience=2), 0, epochs=6, evaluate=evaluate
        ),
    )
    assert len(history) == 4
    assert all(torch.equal(p, seen[1][n]) for n, p in trained(net).items())


def test_views_are_averaged_and_an_index_is_a_subset():
    pairs = np.random.default_rng(0).integers(0, 255, (3, 2, 64, 64, 3), dtype=np.uint8)
    net = net_on(CNN, head="density").eval()
    for part in net.head.parts:
        torch.nn.init.normal_(part[-1].weight)
    each = [predict(net, pairs, (v,)) for v in VIEWS]
    np.testing.assert_allclose(predict(net, pairs, VIEWS), np.mean(each, 0), rtol=1e-5)
    assert max(np.abs(each[0] - e).max() for e in each[1:]) > 1e-3
    np.testing.assert_allclose(predict(net, pairs, index=[2, 0], batch=1), each[0][[2, 0]], rtol=1e-5)
    with pytest.raises(InputError, match="choose from id"):
        predict(net, pairs, ("sideways",))


def test_augmentation_does_not_depend_on_the_batch():
    pairs = np.random.default_rng(0).integers(0, 255, (4, 2, 64, 64, 3), dtype=np.uint8)
    pixels = prediction.ImageBatches(pairs, net_on(CNN).config, load_settings("demo").photos)
    together, alone = pixels.batch(np.array([3, 1, 2]), (0, 5)), pixels.batch(np.array([1]), (0, 5))
    assert torch.equal(together[1:2], alone) and not torch.equal(alone, pixels.batch(np.array([1]), (0, 6)))


def test_every_photo_once_an_epoch():
    for n, batch, accumulate in ((1, 2, 4), (9, 2, 4), (17, 3, 1)):
        plan = draw_batches(np.arange(n), batch, accumulate, np.random.default_rng(0))
        assert sorted(i for s in plan for m in s for i in m) == list(range(n)) and all(
            len(m) <= batch for s in plan for m in s
        )


def test_five_bad_steps_in_a_row_name_the_photos_and_spoil_nothing():
    encoded, y = eight(CNN, 1280)
    y[4:] = np.nan
    net = net_on(CNN, head="pooled")
    net.init_output_from_labels(np.nan_to_num(y))
    names = [f"ID{i:03d}" for i in range(8)]
    fit = TrainConfig(
        CachedFeatures(encoded), y, np.arange(4, 8), settings(batch=1, accumulate=1), 0, epochs=3, names=names
    )
    with pytest.raises(InputError, match=r"not finite 5 steps in a row, last on ID00[4-7] \(epoch 1\)"):
        train(net, fit)
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_what_asks_for_no_decay_gets_none_in_every_copy():
    import copy

    net = copy.deepcopy(copy.deepcopy(net_on(VIT, fusion="mamba", head="pooled")))
    trainer.unfreeze(net, -1)
    groups = trainer.parameter_groups(net, settings(weight_decay=0.1))
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert len(decay) == sum(p.requires_grad for p in net.parameters())
    decays = {n: decay[id(p)] for n, p in net.fusion.named_parameters()}
    assert {n.rsplit(".", 1)[1] for n, d in decays.items() if d == 0} >= {"A_log", "D", "bias"}
    assert (
        all(d == 0.1 for n, d in decays.items() if n.endswith("in_proj.weight"))
        and sum(n.endswith("A_log") for n in decays) == 4
    )


def test_weights_of_one_change_nothing_and_a_weight_of_zero_leaves_a_photo_out():
    encoded, y = eight(CNN, 1280)
    changed_label = y.copy()
    changed_label[7] = 500

    def end(y, weights):
        net = net_on(CNN, head="density")
        net.init_output_from_labels(y[:7])
        train(
            net,
            TrainConfig(
                CachedFeatures(encoded),
                y,
                np.arange(8),
                settings(batch=8, accumulate=1),
                0,
                epochs=3,
                sample_weights=weights,
            ),
        )
        return trained(net)

    plain, ones = end(y, None), end(y, np.ones(8))
    assert all(torch.equal(plain[n], ones[n]) for n in plain)
    without = np.r_[np.ones(7), 0]
    a, b = end(y, without), end(changed_label, without)
    assert all(torch.equal(a[n], b[n]) for n in a) and any(not torch.equal(a[n], plain[n]) for n in a)


def test_the_epoch_of_a_part_is_selected_on_the_other_parts():
    rng = np.random.default_rng(0)
    y = rng.gamma(2, 10, (60, 5))
    parts = np.array_split(np.arange(60), 3)
    better = np.stack(
        [y + rng.normal(0, 9, y.shape), y + rng.normal(0, 5, y.shape), y + rng.normal(0, 7, y.shape)]
    )
    np.testing.assert_array_equal(fold_training.cross_selected_predictions(better, y, parts), better[1])
    spoilt = better.copy()  # an epoch that is perfect on one part only must not be selected for it
    spoilt[2][parts[0]] = y[parts[0]]
    np.testing.assert_array_equal(
        fold_training.cross_selected_predictions(spoilt, y, parts)[parts[0]], better[1][parts[0]]
    )


@pytest.mark.parametrize("blocks, lora", [(2, 0), (-1, 2)])
def test_half_precision_frozen_layers_give_the_same_outputs_under_autocast(blocks, lora):
    net = net_on(VIT, head="pooled", lora=lora).eval()
    trainer.unfreeze(net, blocks)
    for part in net.head.parts:
        torch.nn.init.normal_(part[-1].weight)
    x = torch.randn(1, 2, 3, 64, 64)
    outputs = []
    for halved in (False, True):
        if halved:
            trainer.cast_frozen_layers(net, torch.bfloat16)
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
        out.sum().backward()
        outputs.append(
            (out.detach(), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
        )
    kinds = {p.dtype for n, p in net.backbone.named_parameters() if not p.requires_grad}
    assert torch.bfloat16 in kinds and all(
        p.dtype == torch.float32 for p in net.parameters() if p.requires_grad
    )
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert all(torch.equal(g, outputs[1][1][n]) for n, g in outputs[0][1].items())


def test_only_what_is_trained_has_a_mean_and_moments():
    net, s = net_on(VIT, head="pooled"), settings(unfreeze=2)
    trainer.unfreeze(net, 2)
    progress = trainer.TrainerState(
        net,
        torch.optim.AdamW(trainer.parameter_groups(net, s)),
        trainer.make_accelerator(torch.device("cpu")),
        s,
    )
    names = {n for n, p in net.named_parameters() if p.requires_grad}
    assert progress.ema.mean.keys() == names == progress.plain()["net"].keys()
    assert (
        sum(len(g["params"]) for g in progress.optimiser.param_groups)
        == len(names)
        < len(list(net.parameters())) / 3
    )


def test_a_missing_fold_is_named(tmp_path):
    with pytest.raises(InputError, match="fold3.json"):
        load_fold(tmp_path, 3)


SMALL = [
    "train_dinov3.size=64",
    "train_dinov3.probe_sizes=",
    "train_dinov3.epochs=2",
    "train_dinov3.inner_folds=2",
    "run.folds=2",
    "train_dinov3.schemes=grouped",
]


def opened(tmp_path, *more, preset=""):
    "Open a run on a tiny competition whose store of photographs is filled."
    import tiny

    from nbs_lib.inpaint import run_inpaint
    from nbs_lib.stages import open_run

    if not (tmp_path / "in").exists():
        tiny.competition(tmp_path / "in", n_train=12, n_test=2)
    run = open_run(tmp_path / "in", tmp_path / "out", "demo", preset, [*SMALL, *more])
    run_inpaint(run)
    return run


def test_a_finished_fold_is_kept_and_a_missing_one_is_trained_again(tmp_path):
    from nbs_lib.inference import load_fold_group
    from nbs_lib.tables import read_competition, read_oof
    from nbs_lib.validation import read_folds

    run = opened(tmp_path)
    train_dinov3.run_train_dinov3(run)
    train_table = read_competition(run.input).train
    ids, numbers = train_table["image_id"], read_folds(run, train_table)["fold_grouped"].to_numpy()
    oof = read_oof(run.artefacts / "oof/dinov3.parquet", ids)
    folder = run.artefacts / "dinov3"
    store = train_dinov3.open_stores(run)["train"]
    for k in (0, 1):  # the OOF file holds the predictions of the saved weights
        out = np.flatnonzero(numbers == k)
        np.testing.assert_allclose(
            predict(load_fold(run.artefacts, k), store, index=out), oof[out], rtol=1e-5, atol=1e-5
        )
    both = load_fold_group(run.artefacts, (0, 1)).predict_view(
        store, range(len(ids)), "id", torch.device("cpu")
    )  # as submit predicts
    np.testing.assert_allclose(
        both, [predict(load_fold(run.artefacts, k), store) for k in (0, 1)], rtol=1e-5, atol=1e-5
    )
    before = {k: (folder / f"fold{k}.safetensors").stat().st_mtime_ns for k in (0, 1)}
    (folder / "fold1.safetensors").unlink()
    train_dinov3.run_train_dinov3(run)
    after = {k: (folder / f"fold{k}.safetensors").stat().st_mtime_ns for k in (0, 1)}
    assert after[0] == before[0] and after[1] != before[1]
    np.testing.assert_array_equal(read_oof(run.artefacts / "oof/dinov3.parquet", ids), oof)


@pytest.mark.parametrize(
    "more", [(), ("train_dinov3.select=last", "train_dinov3.head=density", "train_dinov3.views=id, H")]
)
def test_maps_come_from_the_fold_that_has_not_seen_the_photo(tmp_path, more):
    from nbs_lib.tables import read_competition, read_oof
    from nbs_lib.targets import QUADRAT_M2

    run = opened(tmp_path, "train_dinov3.maps=5", *more)
    train_dinov3.run_train_dinov3(run)
    comp = read_competition(run.input)
    oof = read_oof(run.artefacts / "oof/dinov3.parquet", comp.train["image_id"])
    with np.load(run.artefacts / "dinov3/density.npz") as file:
        ids, maps = file["image_id"], file["density"].astype(float)
    at = {name: i for i, name in enumerate(comp.train["image_id"])}
    assert len(ids) == 6 and maps.shape[1:] == (3, 2, 4) and ids[-1] not in at
    mine = oof[[at[i] for i in ids[:-1]]]
    assert mine[-1, 2] >= np.sort(oof[:, 2])[-5]  # those with most clover
    if "views" not in str(more):
        np.testing.assert_allclose(
            maps[:-1].mean((2, 3)) * QUADRAT_M2, mine[:, [0, 2, 1]], rtol=5e-3, atol=5e-3
        )
        test = np.mean(
            [
                predict(load_fold(run.artefacts, k), train_dinov3.open_stores(run)["test"], index=[0])[0]
                for k in (0, 1)
            ],
            0,
        )
        np.testing.assert_allclose(maps[-1].mean((1, 2)) * QUADRAT_M2, test[[0, 2, 1]], rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(train_dinov3.density_maps(run, ids[1:3]), maps[1:3], rtol=2e-3, atol=1e-3)
    with pytest.raises(InputError, match="no photo ID0"):
        train_dinov3.density_maps(run, ["ID0"])


def test_the_stage_runs_with_a_trained_backbone(tmp_path):
    run = opened(
        tmp_path,
        "train_dinov3.unfreeze=2",
        "train_dinov3.select=holdout",
        "train_dinov3.views=id, H",
        "train_dinov3.aux=intervals",
        "train_dinov3.probe=no",
        "train_dinov3.halves=yes",
    )
    summary = train_dinov3.run_train_dinov3(run)["grouped"]
    assert summary["heads kept"] == 2 and np.isfinite(summary["r2w"])
    meta = json.loads((run.artefacts / "dinov3/fold0.json").read_text())
    assert meta["frozen"] and not meta["shared"] and (run.artefacts / "dinov3" / meta["frozen"]).is_file()
    assert not list((run.artefacts / "dinov3/state").glob("*.pt"))


POOL = [
    "train_dinov3.backbone=" + VIT,
    "train_dinov3.weights=random",
    "train_dinov3.unfreeze=1",
    "train_dinov3.probe=no",
    "train_dinov3.select=holdout",
    "train_dinov3.batch=4",
    "train_dinov3.pseudo_rounds=2",
    "train_dinov3.pseudo_from=test, held_out",
    "train_dinov3.aux=intervals",
    "train_dinov3.lr=3e-3",
]


def one_fold(run, poison=None, **kw):
    "Train fold 0, with `poison` in its held-out labels; return its trained parameters and notes."
    seed_everything(3)
    m, ids, schemes = train_dinov3.load_fold_data(run)
    numbers = schemes["grouped"]
    out, index = np.flatnonzero(numbers == 0), np.flatnonzero(numbers != 0)
    if poison is not None:
        m.y[out] = poison
    assert len(m.y) == len(ids) + 2 == len(m.store) and np.isnan(m.y[-2:]).all()
    net, notes = fold_training.fit_fold(m, run.settings.train_dinov3, index, out, 0, **kw)
    return trained(net), notes


@pytest.mark.slow
def test_pseudo_labels_do_not_leak_the_held_out_fold(tmp_path):
    run = opened(tmp_path, *POOL)
    clean, notes = one_fold(run)
    assert len(notes["rounds"]) == 2
    poisoned, _ = one_fold(run, poison=1e4)
    assert all(torch.equal(clean[n], poisoned[n]) for n in clean)
    less, _ = one_fold(opened(tmp_path, *POOL, "train_dinov3.pseudo_from=test"))
    assert any(not torch.equal(clean[n], less[n]) for n in clean)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("pseudo_rounds=1, select=outer", "select = outer would leak"),
        ("pseudo_rounds=1, head=none", "needs a trained head"),
        ("pseudo_from=", "choose from test, held_out"),
        ("pseudo_weight=0", "pseudo_weight: not positive"),
        ("parallel_folds=0", "set 1 or more"),
        ("views=", "choose from id"),
    ],
)
def test_contradicting_settings_are_refused(wrong, message):
    s = load_settings(
        "demo", "", [f"train_dinov3.{pair}" for pair in ("probe=no", "select=last", *wrong.split(", "))]
    ).train_dinov3
    with pytest.raises(InputError, match=message):
        fold_training.check_train_settings(s)


@pytest.mark.slow
def test_parallel_folds_equal_sequential_folds(tmp_path):
    import shutil

    from nbs_lib.biomass_net import load_file
    from nbs_lib.stages import open_run

    alone = opened(tmp_path, "train_dinov3.select=last", "train_dinov3.dropout=0.2")
    train_dinov3.run_train_dinov3(alone)
    shutil.copytree(alone.artefacts / "photos", tmp_path / "two" / "artefacts" / "photos")
    two = open_run(
        tmp_path / "in",
        tmp_path / "two",
        "demo",
        "",
        [*SMALL, "train_dinov3.select=last", "train_dinov3.dropout=0.2", "train_dinov3.parallel_folds=2"],
    )
    train_dinov3.run_train_dinov3(two)
    one, other = (
        {p.name: load_file(p) for p in sorted((r.artefacts / "dinov3").glob("*.safetensors"))}
        for r in (alone, two)
    )
    assert one.keys() == other.keys() and {"fold0.safetensors", "fold1.safetensors"} <= one.keys()
    assert all(torch.equal(one[f][n], other[f][n]) for f in one for n in one[f])
    assert (alone.artefacts / "oof/dinov3.parquet").read_bytes() == (
        two.artefacts / "oof/dinov3.parquet"
    ).read_bytes()
    assert not list((two.artefacts / "dinov3/state").glob("*"))
    first, second = (two.artefacts / f"dinov3/fold{k}.safetensors" for k in (0, 1))
    before = first.stat().st_mtime_ns
    second.unlink()
    train_dinov3.run_train_dinov3(two)
    assert first.stat().st_mtime_ns == before and torch.equal(
        load_file(second)["head.unit"], one["fold1.safetensors"]["head.unit"]
    )


def test_a_photograph_of_weight_zero_has_no_effect(tmp_path):
    run = opened(tmp_path, "photos.weights=exposure>0.44:0", "train_dinov3.select=last")
    m, ids, schemes = train_dinov3.load_fold_data(run)
    out_of_it, numbers = np.flatnonzero(m.sample_weights == 0), schemes["grouped"]
    k = numbers[out_of_it[0]]
    index, out = (
        np.flatnonzero(numbers != numbers[numbers != k][0]),
        np.flatnonzero(numbers == numbers[numbers != k][0]),
    )
    assert 0 < len(out_of_it) < len(ids) and out_of_it[0] in index

    def predict_with(grams: float) -> np.ndarray:
        y = m.y.copy()
        y[out_of_it] = grams
        net, _ = fold_training.fit_fold(
            dataclasses.replace(m, y=y), run.settings.train_dinov3, index, out, seed=0
        )
        return prediction.predict(net, m.store, ("id",), 4, torch.device("cpu"), out, m.features)

    assert (predict_with(10.0) == predict_with(1000.0)).all()
    assert not np.isin(
        out_of_it,
        fold_training.choose_unlabelled(m, run.settings.train_dinov3, index[~np.isin(index, out_of_it)], out),
    ).any()


def test_an_error_in_a_parallel_fold_is_raised(tmp_path):
    run = opened(tmp_path, "train_dinov3.select=last", "train_dinov3.lr=1e38", "train_dinov3.batch=1")
    m, _, _ = train_dinov3.load_fold_data(run)
    with pytest.raises(InputError, match="not finite 5 steps in a row"):
        train_dinov3.train_folds_parallel(run, m, [("grouped", 0)], [""])


def test_the_recipe_runs_on_a_tiny_version_of_its_backbone(tmp_path, monkeypatch):
    backbone_moved, real = [], trainer.run_epoch

    def watched(model, p, fit, rates):
        before = [q.detach().clone() for q in p.net.backbone.parameters()]
        real(model, p, fit, rates)
        backbone_moved.append(
            any(not torch.equal(a, b) for a, b in zip(before, p.net.backbone.parameters(), strict=True))
        )

    monkeypatch.setattr(trainer, "run_epoch", watched)
    run = opened(
        tmp_path,
        "train_dinov3.epochs=3",
        "train_dinov3.warmup=1",
        f"train_dinov3.backbone={VIT}",
        "train_dinov3.weights=random",
        preset="recipe",
    )
    summary = train_dinov3.run_train_dinov3(run)["grouped"]
    assert summary["heads kept"] == 2 and backbone_moved == [False, False, True] * 2
    net = load_fold(run.artefacts, 0)
    x = torch.rand(1, 2, 3, 64, 64)
    with torch.inference_mode():
        encoded = net.encode(x)
        tokens, parts = net.mix_tokens(encoded), net(x)
        raw = torch.cat([part(net.head.norm(tokens.mean(1))) for part in net.head.parts], -1)
    assert (
        tokens.shape == (1, 2 * (5 + 4 * 4), 192)
        and [type(b).__name__ for b in net.fusion] == ["BiMambaMixer"] * 2
    )
    torch.testing.assert_close(parts, torch.nn.functional.softplus(raw), rtol=1e-5, atol=1e-5)
    meta = json.loads((run.artefacts / "dinov3/fold0.json").read_text())
    assert (
        meta["views"] == ["id", "H", "V", "HV"]
        and meta["config"]["order"] == "left_right"
        and not meta["config"]["probe"]
    )
