"""A training at its limits: float16 overflow, time and disk that run out, files of other settings."""

import dataclasses
import gc
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_train import CNN, SMALL, VIT, eight, net_on, opened, settings, trained

from nbs_lib import backbones, fold_training, prediction, train_dinov3, trainer
from nbs_lib.biomass_net import ModelConfig, build_model
from nbs_lib.prediction import CachedFeatures, predict
from nbs_lib.runtime import InputError, seed_everything
from nbs_lib.settings import load_settings
from nbs_lib.trainer import TrainConfig, read_checkpoint, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def half_precision(monkeypatch):
    "Compute in float16 on the CPU, as on a T4."
    for module in (trainer, backbones):
        monkeypatch.setattr(module, "pick_dtype", lambda device: torch.float16)


def make_overflowing():
    "Return a network whose patch embedding exceeds float16's 65504, and two photographs."
    net = net_on(VIT, head="pooled")
    trainer.unfreeze(net, 2)
    with torch.no_grad():
        net.backbone.net.patch_embed.proj.weight *= 1e6
    for part in net.head.parts:
        torch.nn.init.normal_(part[-1].weight)
    return net, np.random.default_rng(0).integers(0, 255, (2, 2, 64, 64, 3), dtype=np.uint8)


def test_predictions_that_overflow_float16_are_repeated_in_float32(half_precision, monkeypatch):
    net, pairs = make_overflowing()
    trainer.cast_frozen_layers(net, torch.float16)
    kinds = {n: p.dtype for n, p in net.named_parameters()}
    numbers = {n: p.detach().clone() for n, p in net.named_parameters()}
    predicted = predict(net, pairs)
    assert (
        np.isfinite(predicted).all()
        and {n: p.dtype for n, p in net.named_parameters()} == kinds
        and torch.float16 in kinds.values()
    )
    assert all(torch.equal(p, numbers[n]) for n, p in net.named_parameters())
    assert np.isfinite(prediction.predict_maps(net_on(VIT, head="density"), pairs, [0])).all()
    monkeypatch.undo()
    net.backbone.float()
    np.testing.assert_allclose(
        predicted, predict(net, pairs), rtol=0.02
    )  # maps are handed on in half precision


def test_a_finite_prediction_is_not_repeated(half_precision, monkeypatch):
    net, calls = net_on(VIT, head="pooled"), []
    real = net.backbone.encode
    monkeypatch.setattr(net.backbone, "encode", lambda x: (calls.append(1), real(x))[1])
    assert np.isfinite(predict(net, np.zeros((1, 2, 64, 64, 3), dtype=np.uint8))).all() and len(calls) == 1


def failing_on(monkeypatch, bad: int, calls=()):
    "Make `predict` return NaN for photograph `bad`, in all calls or in `calls`, counted from 0."
    real, count = prediction.predict, iter(range(10**6))

    def broken(net, store, *args, **kw):
        y = real(net, store, *args, **kw)
        index = kw.get("index", args[3] if len(args) > 3 else None)
        if not calls or next(count) in calls:
            y[np.asarray(index) == bad] = np.nan
        return y

    for module in (fold_training, train_dinov3):
        monkeypatch.setattr(module, "predict", broken)


def test_an_epoch_with_nan_predictions_is_not_selected(tmp_path, monkeypatch):
    run = opened(tmp_path, "train_dinov3.select=outer", "train_dinov3.epochs=3")
    m, ids, schemes = train_dinov3.load_fold_data(run)
    out, index = np.flatnonzero(schemes["grouped"] == 0), np.flatnonzero(schemes["grouped"] != 0)
    failing_on(monkeypatch, out[0], calls=(0, 2))
    warnings = []
    _, notes = fold_training.fit_fold(m, run.settings.train_dinov3, index, out, 0, warn=warnings.append)
    assert [h["score"] is None for h in notes["history"]] == [True, False, True]
    assert (
        len(warnings) == 2
        and "after epoch 0 " in warnings[0]
        and "after epoch 2 " in warnings[1]
        and json.loads(json.dumps(notes["history"], allow_nan=False))
    )


def test_inner_epochs_that_overflow_are_not_compared(tmp_path, monkeypatch):
    run = opened(tmp_path, "train_dinov3.epochs=3")
    m, ids, schemes = train_dinov3.load_fold_data(run)
    out, index = np.flatnonzero(schemes["grouped"] == 0), np.flatnonzero(schemes["grouped"] != 0)
    failing_on(
        monkeypatch, index[0], calls=(2, 6)
    )  # of each inner fold's calls: the probe, then three epochs
    warnings = []
    _, notes = fold_training.fit_fold(m, run.settings.train_dinov3, index, out, 0, warn=warnings.append)
    assert (
        len(notes["gate"]["scores"]) == 2
        and np.isfinite(notes["gate"]["gain"])
        and "after epoch 1 " in warnings[0]
    )


def test_a_fold_with_nan_predictions_is_not_finished(tmp_path, monkeypatch):
    run = opened(tmp_path, "train_dinov3.select=last")
    ids, numbers = train_dinov3.load_fold_data(run)[1:]
    bad = np.flatnonzero(numbers["grouped"] == 0)[1]
    with monkeypatch.context() as patched:
        failing_on(patched, bad)
        with pytest.raises(
            InputError, match=rf"fold 0 \(grouped\): no finite prediction for {ids[bad]}; check"
        ):
            train_dinov3.run_train_dinov3(run)
    assert not list((run.artefacts / "dinov3").glob("fold0.*"))
    assert train_dinov3.run_train_dinov3(run)["grouped"]["folds"] == 2


def test_a_teacher_with_nan_predictions_stops_the_fold(tmp_path, monkeypatch):
    run = opened(
        tmp_path,
        "train_dinov3.select=last",
        "train_dinov3.pseudo_rounds=1",
        "train_dinov3.pseudo_from=held_out",
    )
    m, ids, schemes = train_dinov3.load_fold_data(run)
    out, index = np.flatnonzero(schemes["grouped"] == 0), np.flatnonzero(schemes["grouped"] != 0)
    failing_on(monkeypatch, out[0])
    with pytest.raises(
        InputError, match=f"teacher of pseudo-labels: no finite prediction for {ids[out[0]]};"
    ):
        fold_training.fit_fold(m, run.settings.train_dinov3, index, out, 0)


@pytest.fixture
def scaled(monkeypatch):
    "Trainings with a scaler of gradients, as float16 on a GPU has one."
    real, made = trainer.make_accelerator, []

    def with_scaler(device):
        acc = real(device)
        acc.scaler = torch.amp.GradScaler("cpu")
        made.append(acc.scaler)
        return acc

    monkeypatch.setattr(trainer, "make_accelerator", with_scaler)
    return made


class Overflowing(CachedFeatures):
    "Photographs whose first `times` batches are too large for any gradient."

    def __init__(self, encoded, times):
        super().__init__(encoded)
        self.times = times

    def batch(self, index, draw):
        self.times -= 1
        encoded = super().batch(index, draw)
        return encoded._replace(grid=encoded.grid * math.inf) if self.times >= 0 else encoded


def make_training(times: int, epochs: int = 4, **more):
    encoded, y = eight(CNN, 1280)
    net = net_on(CNN, head="pooled")
    net.init_output_from_labels(y)
    return net, TrainConfig(
        Overflowing(encoded, times),
        y,
        np.arange(8),
        settings(batch=1, accumulate=1),
        0,
        epochs,
        names=[f"ID{i:03d}" for i in range(8)],
        **more,
    )


def test_a_scaler_that_skips_every_step_stops_the_training(scaled):
    message = (
        r"not finite 20 steps in a row, last on ID00\d \(epoch 2\); check these photos and labels, or lower"
    )
    with pytest.raises(InputError, match=message):
        train(*make_training(10**6))
    assert scaled[-1].get_scale() == 65536 / 2**20


def test_what_a_scaler_skips_is_neither_averaged_nor_counted(scaled, monkeypatch):
    updates, real = [], trainer.EMA.update
    monkeypatch.setattr(trainer.EMA, "update", lambda self, net: (updates.append(1), real(self, net))[1])
    history = train(*make_training(19))
    assert len(updates) == 4 * 8 - 19
    assert [h["loss"] is None for h in history] == [True, True, False, False] and all(
        np.isfinite(h["loss"]) for h in history[2:]
    )


def test_gradients_that_overflow_under_a_finite_loss_are_not_averaged(scaled, monkeypatch):
    "The scale alone may overflow them, with nothing wrong in the loss."
    updates, real = [], trainer.EMA.update
    monkeypatch.setattr(trainer.EMA, "update", lambda self, net: (updates.append(1), real(self, net))[1])
    step = trainer.train_step

    def overflowing(model, fit, micro, draw, acc):
        loss = step(model, fit, micro, draw, acc)
        if len(updates) == 0 and acc.scaler.get_scale() > 16384:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(trainer, "train_step", overflowing)
    train(*make_training(0, epochs=1))
    assert len(updates) == 8 - 2 and scaled[-1].get_scale() == 16384


@pytest.mark.parametrize("first", [False, True])
def test_a_checkpoint_resumes_with_or_without_a_scaler(first, tmp_path, monkeypatch):
    "A training that began on a CPU may resume on a GPU, and the other way round."
    real, with_scaler = trainer.make_accelerator, [first]

    def either(device):
        acc = real(device)
        acc.scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if with_scaler[0] else None
        return acc

    monkeypatch.setattr(trainer, "make_accelerator", either)
    state = {"state": tmp_path / "s.pt", "key": "k"}
    killed = make_training(0, **state)
    killed[1].evaluate = lambda epoch, net: (
        (_ for _ in ()).throw(KeyboardInterrupt) if epoch == 2 else 0.1 * epoch
    )
    with pytest.raises(KeyboardInterrupt):
        train(*killed)
    assert bool(read_checkpoint(state["state"], "k")["scaler"]) == first
    with_scaler[0] = not first
    net, fit = make_training(0, **state)
    assert [h["epoch"] for h in train(net, fit)] == [0, 1, 2, 3] and all(
        torch.isfinite(p).all() for p in trained(net).values()
    )


def names(run, folder: str = "dinov3") -> set[str]:
    return {p.name for p in (run.artefacts / folder).iterdir() if p.is_file()}


QUICK = ("train_dinov3.select=last", "train_dinov3.epochs=1")


@pytest.mark.slow
def test_files_that_no_fold_refers_to_are_removed(tmp_path):
    before = opened(tmp_path, *QUICK, "run.folds=3", "train_dinov3.schemes=grouped, stratified")
    train_dinov3.run_train_dinov3(before)
    assert {"fold2.safetensors", "fold2.json", "stratified_fold2.json"} <= names(before) and {
        "dinov3_stratified.parquet",
        "dinov3_stratified.json",
    } <= names(before, "oof")
    (before.artefacts / "dinov3/state").mkdir(exist_ok=True)
    (before.artefacts / "dinov3/state/fold2.pt").write_bytes(b"of a fold that is no more")
    (before.artefacts / "dinov3/backbone_0123456789ab.safetensors").write_bytes(
        b"of a backbone that is no more"
    )
    (before.artefacts / "folds.csv").unlink()  # as stage eda makes them anew
    fewer = opened(tmp_path, *QUICK, "run.folds=2", "train_dinov3.schemes=grouped, stratified")
    train_dinov3.run_train_dinov3(fewer)
    forms = {
        f"{scheme}fold{k}.{ending}"
        for scheme in ("", "stratified_")
        for k in (0, 1)
        for ending in ("json", "safetensors")
    }
    backbones = {name for name in names(fewer) if name.startswith("backbone_")}
    assert (
        len(backbones) == 1
        and names(fewer) - {"density.npz", "density.json"} == forms | backbones
        and not list((fewer.artefacts / "dinov3/state").iterdir())
    )
    grouped = opened(tmp_path, *QUICK, "run.folds=2", "train_dinov3.schemes=grouped")
    train_dinov3.run_train_dinov3(grouped)
    assert not [name for name in names(grouped) | names(grouped, "oof") if "stratified" in name]
    assert {"dinov3.parquet", "dinov3.json"} <= names(grouped, "oof") and {
        "fold0.safetensors",
        "fold1.safetensors",
        *backbones,
    } <= names(grouped)


def test_a_backbone_that_is_gone_makes_the_stage_stale(tmp_path):
    from nbs_lib.stages import is_fresh

    run = opened(tmp_path, *QUICK)
    for _ in range(2):  # the first one finds no folds.csv, and makes it
        train_dinov3.run_train_dinov3(run)
    assert is_fresh(run, "train_dinov3")
    next((run.artefacts / "dinov3").glob("backbone_*")).unlink()
    assert not is_fresh(run, "train_dinov3")


def test_the_key_of_a_fold_knows_what_changes_its_weights(tmp_path):
    run = opened(tmp_path)
    m, ids, schemes = train_dinov3.load_fold_data(run)

    def key(*overrides):
        settings = load_settings("demo", "", [*SMALL, *overrides])
        return train_dinov3.fold_key(
            dataclasses.replace(run, settings=settings), m, ids, schemes["grouped"], 0
        )

    rounds, same = ("train_dinov3.pseudo_rounds=1", "train_dinov3.select=last"), key()
    for nothing in (
        "parallel_folds=2",
        "maps=3",
        "patience=1",
        "views=id, H",
        "save_minutes=1",
        "schemes=grouped, stratified",
        "checkpointing=yes",
    ):
        assert key(f"train_dinov3.{nothing}") == same, nothing
    assert key("photos.workers=3") == same == key("run.workers=3", "run.draws=7", "frozen.widths=64")
    for something in (
        "size=96",
        "epochs=3",
        "select=last",
        "lr=1e-2",
        "weights=random",
        "probe_sizes=96",
        "poolings=mean",
        "budget_minutes=1",
        "refit=no",
    ):
        assert key(f"train_dinov3.{something}") != same, something
    assert key("run.seed=1") != same != key("photos.jitter=0.3")
    assert key(*rounds, "train_dinov3.views=id, H") != key(*rounds), "a teacher averages its views"


def oof_matches_weights(run) -> bool:
    "Return whether the OOF file holds the predictions of the saved weights."
    from nbs_lib.tables import read_oof

    m, ids, schemes = train_dinov3.load_fold_data(run)
    oof = read_oof(run.artefacts / "oof/dinov3.parquet", ids)
    predicted = np.zeros_like(oof)
    for k in (0, 1):
        out = np.flatnonzero(schemes["grouped"] == k)
        predicted[out] = predict(train_dinov3.load_fold(run.artefacts, k), m.store, index=out)
    return np.allclose(predicted, oof, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("unfreeze", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_weights_that_are_replaced_under_their_name_leave_no_fold_behind(unfreeze, tmp_path):
    from safetensors.torch import save_file

    weights, runs = tmp_path / "weights.safetensors", []
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_file(build_model(ModelConfig(VIT, dim=16)).backbone.net.state_dict(), weights)
        runs.append(
            opened(
                tmp_path,
                *QUICK,
                f"train_dinov3.backbone={VIT}",
                f"train_dinov3.weights={weights}",
                f"train_dinov3.unfreeze={unfreeze}",
            )
        )
        train_dinov3.run_train_dinov3(runs[-1])
        assert oof_matches_weights(runs[-1])
    assert sum(name.startswith("backbone_") for name in names(runs[-1])) == 1


@pytest.mark.slow
def test_adapters_that_are_switched_on_bring_their_own_backbone(tmp_path):
    for lora in (0, 2, 0):
        run = opened(
            tmp_path,
            *QUICK,
            f"train_dinov3.backbone={VIT}",
            "train_dinov3.weights=random",
            "train_dinov3.unfreeze=2",
            f"train_dinov3.lora={lora}",
        )
        train_dinov3.run_train_dinov3(run)
        assert oof_matches_weights(run) and sum(name.startswith("backbone_") for name in names(run)) == 1


@pytest.mark.parametrize(
    "more", [("train_dinov3.maps=3",), ("train_dinov3.pseudo_rounds=1", "train_dinov3.pseudo_from=test")]
)
def test_a_test_without_a_readable_photo_stops_no_training(tmp_path, more):
    import tiny

    for photo in (tiny.competition(tmp_path / "in", n_train=12, n_test=2) / "test").iterdir():
        photo.write_bytes(b"not a photo")
    run = opened(tmp_path, *QUICK, "train_dinov3.head=density", *more)
    assert not list((run.artefacts / "photos").glob("test_*/store.json"))
    assert train_dinov3.run_train_dinov3(run)["grouped"]["folds"] == 2
    if "maps" in more[0]:
        assert len(np.load(run.artefacts / "dinov3/density.npz")["image_id"]) == 3


def fail_or_sleep(run, jobs, threads):
    "Replace `train_fold_jobs`: fold 0 fails once the other fold has begun, which takes three minutes."
    Path(run.output, f"began{jobs[0][1]}").touch()
    start = time.monotonic()
    while time.monotonic() < start + 180 and (jobs[0][1] or not Path(run.output, "began1").exists()):
        time.sleep(0.05)
    raise InputError("fold 0 cannot be trained")


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
def test_a_fold_that_fails_ends_the_others_at_once(first, tmp_path, monkeypatch):
    run = opened(tmp_path, *QUICK)
    m, _, _ = train_dinov3.load_fold_data(run)
    monkeypatch.setattr(train_dinov3, "train_fold_jobs", fail_or_sleep)
    before, start = set(multiprocessing.active_children()), time.monotonic()  # joblib keeps its own for later
    with pytest.raises(InputError, match="fold 0 cannot be trained"):
        train_dinov3.train_folds_parallel(run, m, [("grouped", first), ("grouped", 1 - first)], ["", ""])
    assert time.monotonic() - start < 100 and Path(run.output, "began1").exists()
    assert not [p for p in multiprocessing.active_children() if p.is_alive() and p not in before]


class Clock:
    "A clock that moves only where a test moves it."

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(trainer, "time", self)

    def monotonic(self) -> float:
        return self.now

    def taking(self, seconds: float, work):
        "Return `work` made to take `seconds`."

        def slow(*args, **kw):
            result = work(*args, **kw)
            self.now += seconds
            return result

        return slow


def test_the_time_budget_counts_evaluation_and_checkpoints(tmp_path, monkeypatch):
    clock, warnings = Clock(monkeypatch), []
    net, fit = make_training(0, epochs=50)
    fit.clock.minutes, fit.evaluate = 3, clock.taking(60, lambda epoch, net: -epoch)
    assert (
        len(train(net, fit, warnings.append)) == 4
        and "budget of" in warnings[0]
        and "after 4 of 50 epochs" in warnings[0]
    )
    monkeypatch.setattr(trainer, "write_checkpoint", clock.taking(60, trainer.write_checkpoint))
    net, fit = make_training(0, epochs=50, state=tmp_path / "s.pt", key="k")
    fit.clock.minutes = 3
    history = train(net, fit, warnings.append)
    assert (
        len(history) == 5 and history[-1]["stopped"] == "budget"
    )  # four checkpoints of a minute each end the fifth epoch after its first step


def test_part_of_an_epoch_is_not_evaluated_when_a_best_one_exists(monkeypatch):
    clock, seen = Clock(monkeypatch), []
    monkeypatch.setattr(trainer, "take_step", clock.taking(1, trainer.take_step))
    net, fit = make_training(0, epochs=50)
    fit.clock.minutes, fit.evaluate = (
        0.25,
        lambda epoch, net: seen.append(trained(net)) or 0.5,
    )  # 15 s: an epoch of 8, and 8 of the next
    assert [h["score"] for h in train(net, fit)] == [0.5, 0.5]
    net, fit = make_training(0, epochs=50)
    fit.clock.minutes, fit.evaluate = 0.2, lambda epoch, net: seen.append(trained(net)) or 0.5
    assert [h["score"] for h in train(net, fit)] == [0.5, None] and len(seen) == 3
    assert all(torch.equal(p, seen[-1][n]) for n, p in trained(net).items())


def test_an_end_on_time_is_not_cut_short(monkeypatch):
    clock, warnings = Clock(monkeypatch), []
    net, fit = make_training(0, epochs=3)
    fit.clock.minutes, fit.evaluate = 2.5, clock.taking(60, lambda epoch, net: epoch)
    assert "stopped" not in train(net, fit, warnings.append)[-1] and not warnings


POOL = [
    *QUICK,
    f"train_dinov3.backbone={VIT}",
    "train_dinov3.weights=random",
    "train_dinov3.unfreeze=1",
    "train_dinov3.probe=no",
    "train_dinov3.batch=4",
    "train_dinov3.accumulate=1",
    "train_dinov3.pseudo_rounds=2",
    "train_dinov3.pseudo_from=held_out",
    "train_dinov3.lr=3e-3",
]


def fit_first_fold(run, **kw):
    "Fit fold 0 of a run; return its network and notes."
    seed_everything(3)
    m, ids, schemes = train_dinov3.load_fold_data(run)
    out, index = np.flatnonzero(schemes["grouped"] == 0), np.flatnonzero(schemes["grouped"] != 0)
    return fold_training.fit_fold(m, run.settings.train_dinov3, index, out, 0, **kw)


def record_steps(monkeypatch, before=lambda done: None) -> list[str]:
    "Record the key of the training at each step; call `before(done)` ahead of each."
    done, real = [], trainer.take_step

    def step(model, p, fit, micro):
        before(done)
        real(model, p, fit, micro)
        done.append(fit.key)

    monkeypatch.setattr(trainer, "take_step", step)
    return done


def equal(a, b) -> bool:
    return all(torch.equal(p, trained(b)[n]) for n, p in trained(a).items())


@pytest.mark.parametrize("steps_of_two", [*(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2)), 1])
def test_a_kill_in_the_second_round_repeats_no_step(steps_of_two, tmp_path, monkeypatch):
    "With and without a checkpoint of the second round; heads are initialised anew for each training."
    run = opened(tmp_path, *POOL, "train_dinov3.label_scale=no", "train_dinov3.save_minutes=0")
    with monkeypatch.context() as patched:
        all_steps = record_steps(patched)
        whole, _ = fit_first_fold(run, state=tmp_path / "whole.pt", key="k")
    at_two = all_steps.index("k round 2") + steps_of_two
    assert at_two < len(all_steps)

    def kill(done):
        if len(done) == at_two:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        record_steps(patched, kill)
        with pytest.raises(KeyboardInterrupt):
            fit_first_fold(run, state=tmp_path / "killed.pt", key="k")
    there = {p.name: p.stat().st_size for p in tmp_path.glob("killed*.pt")}
    one, two = {"killed.pt", "killed_round1.pt"}, {"killed_round2.pt"} if steps_of_two else set()
    assert one | two == {name for name in there if "before" not in name} and not any(
        f"{Path(name).stem}.before.pt" in there for name in one
    )
    assert all(
        there[name] < 0.4 * there[other] for name in one for other in two
    )  # no moments, no average, no second copy of the weights
    with monkeypatch.context() as patched:
        again_steps = record_steps(patched)
        again, notes = fit_first_fold(run, state=tmp_path / "killed.pt", key="k")
    assert (
        again_steps == ["k round 2"] * (len(all_steps) - at_two)
        and len(notes["rounds"]) == 2
        and equal(whole, again)
    )
    with monkeypatch.context() as patched:
        assert (
            not record_steps(patched)
            and equal(whole, fit_first_fold(run, state=tmp_path / "killed.pt", key="k")[0])
            and not record_steps(patched)
        )


@pytest.mark.slow
def test_one_time_budget_for_a_fold_and_its_rounds(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(trainer, "take_step", clock.taking(60, trainer.take_step))
    plain, _ = fit_first_fold(opened(tmp_path, *POOL, "train_dinov3.pseudo_rounds=0"))
    steps_of_base, clock.now = round(clock.now / 60), 0.0
    first, _ = fit_first_fold(opened(tmp_path, *POOL, "train_dinov3.pseudo_rounds=1"))
    steps_of_both = round(clock.now / 60)

    def within(minutes: float, **kw):
        clock.now, warnings = 0.0, []
        net, notes = fit_first_fold(
            opened(tmp_path, *POOL, f"train_dinov3.budget_minutes={minutes}"), warn=warnings.append, **kw
        )
        return net, notes, warnings

    net, notes, warnings = within(steps_of_base - 0.5)  # all steps, and a little too long
    assert equal(net, plain) and notes["rounds"] == []
    assert len(warnings) == 1 and "before round 1" in warnings[0]
    net, notes, warnings = within(steps_of_base + 0.5)
    assert (
        equal(net, plain)
        and len(notes["rounds"]) == 1
        and "minutes spent after" in warnings[0]
        and "round 1 of pseudo-labels did not finish in time" in warnings[1]
    )
    net, notes, warnings = within(steps_of_both + 0.5)
    assert (
        equal(net, first)
        and len(notes["rounds"]) == 2
        and "round 2 of pseudo-labels did not finish in time" in warnings[1]
    )


def test_time_spent_before_a_kill_counts(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    run = opened(
        tmp_path,
        *POOL,
        "train_dinov3.save_minutes=0",
        "train_dinov3.budget_minutes=100",
        "train_dinov3.epochs=9",
    )
    state = {"state": tmp_path / "s.pt", "key": "k"}

    def kill(done):
        clock.now += 60 * 15
        if len(done) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        record_steps(patched, kill)
        with pytest.raises(KeyboardInterrupt):
            fit_first_fold(run, **state)
    clock.now, warnings = 0.0, []
    done = record_steps(monkeypatch, lambda done: setattr(clock, "now", clock.now + 60 * 15))
    _, notes = fit_first_fold(run, **state, warn=warnings.append)
    assert (
        len(done) == 2 and notes["history"][-1]["stopped"] == "budget" and notes["rounds"] == []
    )  # 75 minutes, then two steps of 15
    assert len(warnings) == 2 and "before round 1" in warnings[1]
    assert "budget of 100 minutes spent after" in warnings[0]
    assert json.loads((tmp_path / "s.clock.json").read_text()) == {"key": "k", "seconds": 60 * 105}
    assert trainer.Stopwatch(100, tmp_path / "s.clock.json", "other settings").seconds() == 0


def test_a_finished_round_counts_after_the_time_budget(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    run, state = (
        opened(tmp_path, *POOL, "train_dinov3.budget_minutes=100"),
        {"state": tmp_path / "s.pt", "key": "k"},
    )
    whole, _ = fit_first_fold(run, **state)
    (tmp_path / "s.clock.json").write_text(json.dumps({"key": "k", "seconds": 60 * 101}))
    done = record_steps(monkeypatch)
    again, notes = fit_first_fold(run, **state)
    assert equal(whole, again) and len(notes["rounds"]) == 2 and not done and clock.now == 0


REFIT = [
    *POOL,
    "train_dinov3.select=holdout",
    "train_dinov3.pseudo_rounds=0",
    "train_dinov3.pseudo_from=test",
    "train_dinov3.refit=yes",
    "train_dinov3.epochs=3",
    "train_dinov3.save_minutes=0",
]


def test_the_holdout_selects_the_epochs_of_the_refit(tmp_path, monkeypatch):
    run, used, real = opened(tmp_path, *REFIT), {}, trainer.train_step

    def watched(model, fit, micro, draw, acc):
        used.setdefault(fit.key, set()).update(int(i) for m in micro for i in m)
        return real(model, fit, micro, draw, acc)

    monkeypatch.setattr(trainer, "train_step", watched)
    scores = iter([0.1, 0.5, 0.2])
    monkeypatch.setattr(fold_training, "score_epoch", lambda *args: next(scores))
    net, notes = fit_first_fold(run, key="k")
    m, ids, schemes = train_dinov3.load_fold_data(run)
    index = set(np.flatnonzero(schemes["grouped"] != 0))
    assert [len(notes[name]) for name in ("history", "refit")] == [3, 2], (
        "two epochs, as the second was the best"
    )
    assert used["k"] < used["k refit"] == index and not any(
        "score" in h and h["score"] for h in notes["refit"]
    )
    with monkeypatch.context() as patched:
        patched.setattr(fold_training, "score_epoch", lambda *args, after=iter([0.1, 0.5, 0.2]): next(after))
        without, notes = fit_first_fold(opened(tmp_path, *REFIT, "train_dinov3.refit=no"), key="k")
    assert "refit" not in notes and not equal(net, without)


@pytest.mark.parametrize("steps_of_refit", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_kill_in_the_refit_repeats_no_step(steps_of_refit, tmp_path, monkeypatch):
    run, state = opened(tmp_path, *REFIT), {"state": tmp_path / "killed.pt", "key": "k"}
    with monkeypatch.context() as patched:
        all_steps = record_steps(patched)
        whole, _ = fit_first_fold(run, key="k")
    at = all_steps.index("k refit") + steps_of_refit

    def kill(done):
        if len(done) == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        record_steps(patched, kill)
        with pytest.raises(KeyboardInterrupt):
            fit_first_fold(run, **state)
    with monkeypatch.context() as patched:
        again_steps = record_steps(patched)
        again, notes = fit_first_fold(run, **state)
    assert again_steps == ["k refit"] * (len(all_steps) - at) and notes["refit"] and equal(whole, again)


def test_a_refit_needs_time_unless_it_finished_before(tmp_path, monkeypatch):
    clock, state = Clock(monkeypatch), {"state": tmp_path / "s.pt", "key": "k"}
    run = opened(tmp_path, *REFIT, "train_dinov3.budget_minutes=100")
    with monkeypatch.context() as patched:
        first = record_steps(patched)
        whole, _ = fit_first_fold(run, **state)
    each = 60 * 90 / first.count("k")  # the first training takes 90 minutes of 100
    with monkeypatch.context() as patched:
        done, warnings = record_steps(patched, lambda done: setattr(clock, "now", clock.now + each)), []
        net, notes = fit_first_fold(run, key="k", warn=warnings.append)
    assert notes["refit"] == [] and set(done) == {"k"} and not equal(net, whole)
    assert (
        len(warnings) == 1
        and "budget_minutes: no time to refit with the " in warnings[0]
        and warnings[0].endswith("photos that selected the epoch; they are left out")
    )
    (tmp_path / "s.clock.json").write_text(json.dumps({"key": "k", "seconds": 60 * 101}))
    with monkeypatch.context() as patched:
        done = record_steps(patched)
        again, notes = fit_first_fold(run, **state)
    assert equal(whole, again) and notes["refit"] and not done


def test_a_budget_spent_on_inner_folds_leaves_the_probe(tmp_path, monkeypatch):
    clock, warnings = Clock(monkeypatch), []
    monkeypatch.setattr(trainer, "take_step", clock.taking(60, trainer.take_step))
    net, notes = fit_first_fold(opened(tmp_path, "train_dinov3.budget_minutes=1.5"), warn=warnings.append)
    assert net.config.head == "none" and not notes["gate"]["keep"] and "history" not in notes
    assert "spent on inner folds; the probe is used alone" in warnings[-1] and clock.now <= 180


def test_the_optimiser_is_freed_after_a_training(scaled, monkeypatch):
    "At once, without a garbage collection: the next training needs the GPU memory."
    references, real = [], trainer.TrainerState.__init__

    def init(self, net, optimiser, acc, s):
        real(self, net, optimiser, acc, s)
        references.extend(weakref.ref(thing) for thing in (self, optimiser, optimiser.optimizer))

    monkeypatch.setattr(trainer.TrainerState, "__init__", init)
    gc.disable()
    try:
        train(*make_training(0, epochs=1))
        assert len(references) == 3 and not any(ref() for ref in references)
    finally:
        gc.enable()


def test_adapters_of_all_blocks_have_the_backbones_rate():
    s = settings(layer_decay=0.5, lr_backbone=1e-4)
    rates = {}
    for lora in (0, 2):
        net = net_on(VIT, head="pooled", lora=lora)
        trainer.unfreeze(net, -1)
        names = {id(p): n for n, p in net.named_parameters()}
        rates[lora] = {
            names[id(p)]: g["lr"]
            for g in trainer.parameter_groups(net, s)
            if g["name"] == "backbone"
            for p in g["params"]
        }
    assert len(rates[2]) == 96 and all("lora_" in n for n in rates[2]) and set(rates[2].values()) == {1e-4}
    assert min(rates[0].values()) < 1e-7 < max(rates[0].values()) == 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0, 0.02])
def test_two_processes_under_accelerate_run_the_whole_stage(budget, tmp_path):
    "From the command line, with rounds and maps; the first process removes stale artefacts."
    words = [
        *SMALL,
        *POOL,
        "train_dinov3.head=density",
        "train_dinov3.maps=2",
        f"train_dinov3.budget_minutes={budget}",
        "train_dinov3.epochs=2",
    ]
    run = opened(tmp_path, *words)
    run.artefact_path("dinov3", "fold7.safetensors").write_bytes(b"of a fold that is no more")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "nbs_lib.train_dinov3",
        "--train",
        str(run.input),
        str(run.output),
        "--profile",
        "demo",
        *(w for word in words for w in ("--set", word)),
    ]
    env = {
        **os.environ,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    both = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    outputs = [p.communicate(timeout=300)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0] and '"r2w"' in outputs[0] and '"r2w"' not in outputs[1]
    assert (
        ("time budget of 0.02 minutes" in outputs[0])
        == ("time budget of 0.02 minutes" in outputs[1])
        == (budget > 0)
    )
    folds = {f"fold{k}.{ending}" for k in (0, 1) for ending in ("json", "safetensors")}
    assert {name for name in names(run) if not name.startswith("backbone_")} == folds | {
        "density.npz",
        "density.json",
    } and not list((run.artefacts / "dinov3/state").iterdir())
