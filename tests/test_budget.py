"""Predictions against what really happens on a CPU: the allocator's word, resident memory, and closed forms."""
import dataclasses
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT

from nbs_lib import budget
from nbs_lib.biomass_net import build_model, load_model, save_model
from nbs_lib.runtime import InputError
from nbs_lib.settings import load_settings
from nbs_lib.store import half_shape
from nbs_lib.train_dinov3 import model_config
from nbs_lib.trainer import (
    TrainConfig,
    TrainerState,
    make_accelerator,
    cast_frozen_layers,
    save_final_weights,
    read_checkpoint,
    parameter_groups,
    write_checkpoint,
    unfreeze,
)

TWIN = ("train_dinov3.weights=random", "train_dinov3.size=128", "train_dinov3.unfreeze=-1", "train_dinov3.accumulate=2")
TWINS = {  # settings of a network, and whether it computes in half precision
    "ViT, all trained": (["backbone=vit_twin_patch16_dinov3", "checkpointing=no"], False),
    "ViT, recomputed": (["backbone=vit_twin_patch16_dinov3", "checkpointing=yes"], False),
    "ViT, four blocks, one forward a step": (["backbone=vit_twin_patch16_dinov3", "unfreeze=4", "accumulate=1", "checkpointing=no"], False),
    "ViT, adapters": (["backbone=vit_twin_patch16_dinov3", "lora=8", "checkpointing=no"], False),
    "ViT, half precision": (["backbone=vit_twin_patch16_dinov3", "checkpointing=no", "batch=4"], True),
    "CNN, all trained": (["backbone=tf_efficientnet_lite0", "checkpointing=no"], False),
    "CNN, head alone, mamba": (["backbone=tf_efficientnet_lite0", "unfreeze=0", "fusion=mamba", "dim=32"], False),
}


def twin(words: list[str]):
    s = load_settings("kaggle", overrides=[*TWIN, *(f"train_dinov3.{w}" for w in words)]).train_dinov3
    return s, half_shape(s.size, s.squeeze)


def predicted_gb(s, shape, half: bool) -> float:
    with budget.ghosts():
        return budget.rehearse_step(budget.ghost(lambda: build_model(model_config(s, 4))), s, shape, half).peak_gb


@pytest.mark.parametrize("name", TWINS)
def test_memory_is_what_the_allocator_says(name):
    words, half = TWINS[name]
    s, shape = twin(words)
    said, real = predicted_gb(s, shape, half), budget.allocated_gb(lambda: budget.train_really(s, shape, half))
    print(f"{name}: predicted {said:.3f} GB, allocator {real:.3f} GB, ratio {said / real:.3f}")
    assert 0.85 < said / real < 1.15


def test_memory_is_what_the_system_says():
    """A twin big enough for resident memory to mean something, in a process of its own, whose C library gives back what is freed."""
    words = ["backbone=vit_small_patch16_dinov3", "size=256", "checkpointing=no"]
    code = f"""
import json, sys
import psutil, torch
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_budget import twin
from nbs_lib.budget import train_really
from nbs_lib.runtime import peak_memory
torch.set_num_threads(1)
train_really(*twin(["backbone=vit_twin_patch16_dinov3", "size=32"]), steps=1)  # what libraries load at their first use
before = psutil.Process().memory_info().rss
s, shape = twin({words!r})
train_really(s, shape)
print(json.dumps((peak_memory() - before) / 1e9))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    assert done.returncode == 0, done.stderr[-2000:]
    said, real = predicted_gb(*twin(words), False), json.loads(done.stdout.splitlines()[-1])
    print(f"predicted {said:.3f} GB, resident {real:.3f} GB, ratio {said / real:.3f}")
    assert 0.85 < said / real < 1.15


def test_work_is_what_the_formulas_say():
    """Linear layers cost 2 flops a weight and place, attention 4·N²·D a layer; back costs twice as much, recomputing once more."""
    s, (h, w) = twin(["backbone=vit_twin_patch16_dinov3", "checkpointing=yes", "head=pooled", "fusion=none", "dim=16"])
    with budget.ghosts():
        net = budget.ghost(lambda: build_model(model_config(s, 4)))
        look = budget.rehearse_look(net, lambda n: n(torch.zeros(3, 2, 3, h, w)), 3)
        step = budget.rehearse_step(net, s, (h, w))
    places, body = h * w // 256 + 5, net.backbone.net
    linear = sum(m.weight.numel() for b in body.blocks for m in b.modules() if isinstance(m, torch.nn.Linear))
    stem = 2 * (places - 5) * body.patch_embed.proj.weight.numel()
    expected = 2 * (2 * places * linear + len(body.blocks) * 4 * places**2 * body.embed_dim + stem)
    assert look.tflop * 1e12 == pytest.approx(expected, rel=0.02)
    assert step.tflop / look.tflop == pytest.approx(4, rel=0.06)


def test_ghosts_leave_no_trace():
    with budget.ghosts():
        budget.ghost(lambda: torch.nn.Linear(100_000, 100_000))
    assert torch.ones(2).sum() == 2  # ordinary tensors again


def fake_rehearsals(**more) -> dict:
    r = budget.Rehearsal({"weights": 3.4, "activations": 1.0}, 8.0, 2)
    return {"look": r, "step": dataclasses.replace(r, tflop=16.0), "frozen": [r, r], "siglip": None, "cached": False, "total": 850_000_000, "trained": 110_000_000, **more}


def test_forecast_counts_folds_views_and_cards():
    def hours(stage, *overrides, gpus="T4x2"):
        return budget.forecast(load_settings("kaggle", overrides=overrides), gpus, rehearsed=fake_rehearsals()).stages.loc[stage, "gpu_hours"]

    one = hours("submit", "train_dinov3.views=id")
    assert hours("submit", "train_dinov3.views=id", gpus="T4") == pytest.approx(2 * one)
    models = 805 * 8.0 * (5 + 2)  # five folds, two widths of frozen features
    assert one == pytest.approx(models / (2 * 65 * 0.3) / 3600)
    assert hours("submit", "train_dinov3.views=id, H, V, HV") == pytest.approx(one * (4 * 5 + 2) / 7)
    both, single = (hours("train_dinov3", f"train_dinov3.parallel_folds={n}") for n in (2, 1))
    assert single == pytest.approx(5 / 3 * both), "five folds on two cards take three rounds"
    assert hours("train_dinov3", "train_dinov3.parallel_folds=2", gpus="T4") == pytest.approx(single)
    ten = [hours("train_dinov3", "train_dinov3.schemes=grouped, stratified", f"train_dinov3.parallel_folds={n}") for n in (1, 2)]
    assert ten == pytest.approx([2 * single, single])


@pytest.mark.parametrize("profile, overrides, cached", [
    ("kaggle", [], False), ("demo", [], True), ("laptop", [], True), ("vit", [], True), ("laptop", ["frozen.widths=768"], True), ("laptop", ["frozen.widths=512"], False),
    ("laptop", ["frozen.depths=3"], False), ("laptop", ["frozen.backbone=resnet18"], False), ("laptop", ["frozen.weights=random"], False), ("laptop", ["frozen.poolings=mean"], True),
    ("laptop", ["train_dinov3.probe_sizes="], False), ("laptop", ["train_dinov3.squeeze=yes"], False), ("laptop", ["train_dinov3.unfreeze=1", "train_dinov3.probe_sizes="], False)])
def test_features_that_model_1_has_computed_cost_model_2_nothing(profile, overrides, cached):
    settings = load_settings(profile, overrides=overrides)
    assert budget.is_cached(settings) == cached
    hours = {c: budget.forecast(settings, rehearsed=fake_rehearsals(cached=c)).stages["gpu_hours"] for c in (True, False)}
    assert hours[True]["frozen"] == 0 < hours[False]["frozen"] and hours[True]["submit"] < hours[False]["submit"]
    assert hours[True]["train_dinov3"] == hours[False]["train_dinov3"]


def test_forecast_counts_the_seconds_of_saving():
    def hours(*overrides):
        words = ("epochs=10", "schemes=grouped", "parallel_folds=1", "save_minutes=1e9", "refit=no", *overrides)
        row = budget.forecast(load_settings("kaggle", overrides=[f"train_dinov3.{w}" for w in words]), rehearsed=fake_rehearsals()).stages.loc["train_dinov3"]
        return row["hours"] - row["gpu_hours"] - 60 / 3600

    once = 5 * 10 * 20 * 110e6 / 1e9 / budget.WRITE_GB_S / 3600  # five folds of ten epochs, 20 bytes a trained number
    assert hours() == pytest.approx(once) and hours("parallel_folds=2") == pytest.approx(3 / 5 * once)
    assert hours("refit=yes") == pytest.approx(2 * once) and hours("refit=yes", "select=last") == pytest.approx(once)
    assert hours("pseudo_rounds=2") == hours("pseudo_rounds=2", "refit=yes") == pytest.approx(3 * once) and hours("unfreeze=0") == pytest.approx(0, abs=1e-9) == hours("epochs=0")
    epoch = 60 * budget.forecast(load_settings("kaggle", overrides=["train_dinov3.epochs=10", "train_dinov3.refit=no"]), "T4", rehearsed=fake_rehearsals()).stages.loc["train_dinov3", "gpu_hours"] / 50
    assert hours(f"save_minutes={epoch / 2.5}") == pytest.approx(3 * once)  # two on the way, one at the end


@pytest.mark.parametrize("rounds, refit", [(0, "no"), (0, "yes"), (2, "yes")])
@pytest.mark.parametrize("card", ["T4", "L4"])
def test_disk_is_what_the_files_say(card, rounds, refit, tmp_path, monkeypatch):
    """Fold weights and states as a training writes them, counted at their worst: while a state is written. What is saved is what was."""
    settings = load_settings("kaggle", overrides=[*TWIN, "train_dinov3.backbone=vit_twin_patch16_dinov3", "train_dinov3.unfreeze=4", "run.folds=2", "train_dinov3.schemes=grouped", "train_dinov3.parallel_folds=1", f"train_dinov3.pseudo_rounds={rounds}", f"train_dinov3.refit={refit}"])
    s, most = settings.train_dinov3, 0
    net = build_model(model_config(s, 4))
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

    def weighed(state, path):
        nonlocal most
        write(state, path)
        most = max(most, size())

    monkeypatch.setattr(torch, "save", weighed)
    names = ["state", *(f"state_round{k}" for k in range(1, rounds + 1)), *(["state_refit"] if refit == "yes" and not rounds else [])]
    for name in names:
        fit = TrainConfig(None, None, None, s, 0, 1, state=tmp_path / f"{name}.pt", key="k")
        for _ in range(4):
            write_checkpoint(fit.state, key="k", **progress.plain())
        if name != names[-1]:
            save_final_weights({"ended": progress.ema.mean, "history": []}, fit)
    said = budget.disk_gb(settings, sum(p.numel() for p in net.parameters()), sum(p.numel() for p in net.parameters() if p.requires_grad), 0, budget.GPUS[card].half)
    assert said["photos"] == 0 and 0.95 < sum(said.values()) / most < 1.05
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
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and not path.exists() and len(list(tmp_path.iterdir())) == 2
    assert read_checkpoint(path, "k")["step"] == 1
    write_checkpoint(path, key="k", step=3)
    assert read_checkpoint(path, "k")["step"] == 3 and {p.name for p in tmp_path.iterdir()} == {"state.pt", "state.before.pt"}


def test_what_does_not_fit_is_said():
    big = budget.Rehearsal({"weights": 15.5}, 8.0)
    f = budget.forecast(load_settings("kaggle"), "T4", rehearsed=fake_rehearsals(step=big))
    assert [v["fits"] for v in f.verdicts() if v["what"] == "memory of one GPU"] == [False]
    assert all(v["fits"] for v in budget.forecast(load_settings("kaggle"), "H100", rehearsed=fake_rehearsals(step=big)).verdicts() if v["what"] == "memory of one GPU")


@pytest.mark.parametrize("name", ["", "T5", "T4x", "T4x0", "x2", "T4xtwo"])
def test_unknown_cards_are_refused(name):
    if name == "T4x":
        assert budget.parse_gpus(name)[1] == 1
    else:
        with pytest.raises(InputError, match="gpu"):
            budget.parse_gpus(name)


def test_command_line(tmp_path, capsys):
    """A whole forecast of small networks, its files, the hours of a run beside it, and calls that are refused."""
    small = [f"--set={k}" for k in ("train_dinov3.backbone=vit_twin_patch16_dinov3", "frozen.backbone=tf_efficientnet_lite0", "frozen.widths=256", "siglip.weights=", "train_dinov3.size=256")]
    (tmp_path / "run.json").write_text(json.dumps({"stages": [{"name": "frozen", "seconds": 7200}]}))
    assert budget.main([*small, "--gpu", "L4", "--measured", str(tmp_path / "run.json"), "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "measured_hours" in told and "2.00" in told and "fits" in told and "TFLOP/s" in told
    record = json.loads((tmp_path / "out/budget.json").read_text())
    assert record["gpu"]["name"] == "L4" and record["stages"]["train_dinov3"]["tflop"] > 0 and (tmp_path / "out/budget.png").stat().st_size > 5000
    for argv in (["--gpu", "T5"], ["--profile", "moon"], ["--set", "train_dinov3.backbone=grass"], ["--measured", "nowhere.json"]):
        assert budget.main([*argv, "--output", str(tmp_path / "no")]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_folds_end_before_the_session_does():
    "However slow the cards: what a session is ended with is lost."
    s = load_settings("kaggle")
    folds = s.run.folds * len(s.train_dinov3.schemes)
    assert 0 < folds / s.train_dinov3.parallel_folds * s.train_dinov3.budget_minutes / 60 < budget.SESSION_HOURS - 1


def test_the_recipe_that_does_not_fit_names_the_one_that_does(capsys):
    gone = budget.Forecast(pd.DataFrame({"gb": {"submit": 30.0, "eda": 0.0}, "cautious_hours": {"submit": 1.0, "eda": 0.1}}), {}, {"photos": 1.0},
                           budget.GPUS["T4"], 2, {"hours": 9.0, "working_gb": 20.0})
    budget.tell(gone, {}, "recipe")
    assert "--preset recipe_t4" in capsys.readouterr().out
    budget.tell(gone, {}, "")
    assert "recipe_t4" not in capsys.readouterr().out
