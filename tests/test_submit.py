"""60_submit: a fault drill.

Whatever is missing, broken or slow at test time, the file is whole, and the fault is named.
`python tests/test_submit.py --table` runs the drill and writes the table of docs/robustness.md.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from conftest import make_once
from PIL import Image
from safetensors.torch import load_file, save_file

from nbs_lib import deadline, inference, submit
from nbs_lib.backbones import Backbone
from nbs_lib.biomass_net import build_model, load_model, save_model
from nbs_lib.inpaint import run_inpaint
from nbs_lib.prediction import predict
from nbs_lib.runtime import InputError, read_json
from nbs_lib.stages import is_fresh
from nbs_lib.store import FULL, open_store
from nbs_lib.submit import run_submit
from nbs_lib.tables import read_competition, read_oof
from nbs_lib.targets import TARGETS

ROBUSTNESS = Path(__file__).parent.parent / "docs" / "robustness.md"
BEGIN, END = "<!-- faults:begin -->\n", "<!-- faults:end -->\n"
# Every stage for real, with the least work: a probe alone, narrow features, one regressor.
SMALL = (
    "run.folds=3",
    "train_dinov3.size=96",
    "train_dinov3.probe_sizes=",
    "train_dinov3.head=none",
    "train_dinov3.views=id,H",
    "train_dinov3.schemes=grouped",
    "train_dinov3.depths=2",
    "frozen.widths=96",
    "frozen.depths=2",
    "frozen.poolings=mean",
    "frozen.colour_width=64",
    "boosting.members=ridge",
    "boosting.inner_folds=2",
    "run.draws=2",
    "ensemble.judge=no",
    "ensemble.weights=equal",
    "ensemble.rules=WA:Dry_Dead_g",
    "ensemble.shrink=no",
    "ensemble.draws=100",
    "run.workers=2",
)


def whole(path: Path, folder: Path) -> pd.Series:
    "Return the grams of a submission, after checking all that Kaggle checks and that the five agree."
    table = pd.read_csv(path)
    wanted = pd.read_csv(folder / "sample_submission.csv")
    assert list(table.columns) == ["sample_id", "target"]
    assert list(table["sample_id"]) == list(wanted["sample_id"]), "the sample's rows in the sample's order"
    grams = table.set_index("sample_id")["target"]
    assert np.isfinite(grams).all() and (grams >= 0).all()
    for photo in {i.rpartition("__")[0] for i in grams.index}:
        green, dead, clover, gdm, total = (grams[f"{photo}__{t}"] for t in TARGETS)
        assert abs(green + clover - gdm) <= 1e-6 and abs(gdm + dead - total) <= 1e-6
    return grams


def record_predictions(monkeypatch) -> dict[str, np.ndarray]:
    "Return a dictionary that gets the last grams of each model that a submission takes."
    seen, real = {}, submit.SubmissionWriter.take

    def take(self, model, rows, grams):
        seen[model] = grams
        return real(self, model, rows, grams)

    monkeypatch.setattr(submit.SubmissionWriter, "take", take)
    return seen


def copy_run(source: Path, target: Path, overrides=(), links=True):
    "A run on a copy of the input and of the artefacts, to break things in."
    shutil.copytree(source / "in", target / "in")
    shutil.copytree(
        source / "out" / "artefacts",
        target / "out" / "artefacts",
        ignore=shutil.ignore_patterns("test_*", "submit.json"),
        copy_function=os.link if links else shutil.copy2,
    )
    return tiny.run_on(target / "in", target / "out", *SMALL, *overrides)


def train_small(folder: Path) -> Path:
    "All stages before submit, on 24 photos."
    run = tiny.run_on(tiny.competition(folder / "in", 24, 6), folder / "out", *SMALL)
    for stage in before_submit():
        stage(run)
    return folder


def before_submit() -> list[Callable]:
    from nbs_lib.boosting import run_boosting
    from nbs_lib.eda import run_eda
    from nbs_lib.ensemble import run_ensemble
    from nbs_lib.frozen import run_frozen
    from nbs_lib.inpaint import run_inpaint
    from nbs_lib.siglip import run_siglip
    from nbs_lib.train_dinov3 import run_train_dinov3

    return [run_eda, run_inpaint, run_train_dinov3, run_siglip, run_frozen, run_boosting, run_ensemble]


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    if os.environ.get("NBS_TRAINED"):
        return Path(os.environ["NBS_TRAINED"])
    return make_once(tmp_path_factory, "trained", train_small)


@pytest.fixture(scope="session")
def untouched(trained, tmp_path_factory):
    "What comes out when nothing is wrong: grams, summary."
    run = copy_run(trained, tmp_path_factory.mktemp("untouched"))
    summary = run_submit(run)
    return whole(run.output / "submission.csv", run.input), summary


@pytest.fixture(autouse=True)
def no_internet(monkeypatch):
    real = socket.socket.connect

    def connect(self, address):
        if self.family != socket.AF_UNIX:  # the fork server listens on one
            raise OSError("no network here")
        return real(self, address)

    def refuse(*args, **kwargs):
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# ---- the drill: what is done to the run, a part of the warning, which models must predict
def text_photo(run, _):
    next((run.input / "test").iterdir()).write_text("this is no photo")


def cut_photo(run, _):
    path = min((run.input / "test").iterdir())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def missing_photo(run, _):
    min((run.input / "test").iterdir()).unlink()


def all_photos(run, _):
    for path in (run.input / "test").iterdir():
        path.write_text("this is no photo")


def odd_photos(run, _):
    "Another size, another format under the same name, another ending, grey."
    a, b, c, d, *_ = sorted((run.input / "test").iterdir())
    cv2.imwrite(str(a), cv2.resize(cv2.imread(str(a)), (901, 333)))
    Image.open(b).save(b, format="PNG")
    Image.open(c).save(c.with_suffix(".PNG"), format="PNG")
    c.unlink()
    Image.open(d).convert("L").save(d, format="JPEG")


def whole_chain(run, _):
    "All stages, not submit alone, with one test photo gone and one broken."
    missing_photo(run, _)
    cut_photo(run, _)
    eda, *others = before_submit()
    eda(
        run, force=True
    )  # it looks for the test photos but does not open them: nothing that it reads has changed
    for stage in others:
        stage(run)


def shuffled_rows(run, _):
    for name, seed in (("test.csv", 1), ("sample_submission.csv", 2)):
        path = run.input / name
        pd.read_csv(path).sample(frac=1, random_state=seed).to_csv(path, index=False)


def odd_paths(run, _):
    path = run.input / "test.csv"
    table = pd.read_csv(path)
    table["image_path"] = [
        "\\".join(p.split("/")) if k % 2 else p.split("/")[1] for k, p in enumerate(table["image_path"])
    ]
    table.to_csv(path, index=False)


def tables_apart(run, _):
    "A photo that only one of the tables knows, a row that stands twice, and one of another competition."
    path = run.input / "test.csv"
    table = pd.read_csv(path).sort_values("sample_id")
    odd = pd.DataFrame(
        [table.iloc[-1].to_dict(), {"sample_id": "remark", "image_path": "", "target_name": ""}]
    )
    pd.concat([table.iloc[5:], odd]).to_csv(path, index=False)


def one_photo(run, _):
    keep = min(pd.read_csv(run.input / "sample_submission.csv")["sample_id"].str[:6])
    for name in ("test.csv", "sample_submission.csv"):
        table = pd.read_csv(run.input / name)
        table[table["sample_id"].str.startswith(keep)].to_csv(run.input / name, index=False)


def replace(path: Path, content: bytes | None) -> None:
    path.unlink()  # artefacts are hard links: never write through one
    if content is not None:
        path.write_bytes(content)


def missing_fold(run, _):
    for ending in ("safetensors", "json"):
        replace(run.artefacts / "dinov3" / f"fold1.{ending}", None)


def corrupt_fold(run, _):
    path = run.artefacts / "dinov3" / "fold1.safetensors"
    replace(path, path.read_bytes()[:100])


def corrupt_backbone(run, _):
    replace(next((run.artefacts / "dinov3").glob("backbone*.safetensors")), b"gone")


def no_model1(run, _):
    shutil.rmtree(run.artefacts / "dinov3")


def nan_fold(run, _):
    path = run.artefacts / "dinov3" / "fold2.safetensors"
    state = {
        k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in load_file(path).items()
    }
    replace(path, None)
    save_file(state, path)


def no_siglip(run, monkeypatch):
    shutil.rmtree(run.artefacts / "siglip-tiny")
    monkeypatch.setattr(
        submit.siglip, "find_siglip", lambda run: submit.siglip.check_folder(run.artefacts / "siglip-tiny")
    )


def no_siglip_nor_training_features(run, monkeypatch):
    no_siglip(run, monkeypatch)
    shutil.rmtree(run.artefacts / "features")


def no_backbone(run, monkeypatch):
    def missing(*_):
        raise InputError("frozen.weights: there is no such file")

    monkeypatch.setattr(submit.frozen, "load_backbone", missing)


def others_features(run, _):
    "Someone put a file of their own into features/ before boosting was trained: here nobody can make it."
    np.savez(
        run.artefacts / "features" / "dinov2.npz",
        **{k: v for k, v in np.load(run.artefacts / "features" / "colour.npz").items()},
    )
    inference.boosting.run_boosting(run)


def other_version(run, _):
    path = run.artefacts / "boosting" / "model.json"
    beside = read_json(path)
    beside["versions"]["scikit-learn"] = "0.99"
    replace(path, json.dumps(beside).encode())


def no_boosting(run, _):
    for path in (run.artefacts / "boosting").glob("model.*"):
        replace(path, None)


def corrupt_boosting(run, _):
    replace(run.artefacts / "boosting" / "model.joblib", b"\x80\x05garbage")


def corrupt_boosting_no_training_features(run, _):
    corrupt_boosting(run, _)
    shutil.rmtree(run.artefacts / "features")


def nothing_trained(run, _):
    for name in ("dinov3", "boosting", "features", "oof"):
        shutil.rmtree(run.artefacts / name)


def nothing_at_all(run, monkeypatch):
    nothing_trained(run, monkeypatch)
    (run.artefacts / "blend.json").unlink()
    (run.input / "train.csv").unlink()


def no_blend(run, _):
    replace(run.artefacts / "blend.json", b'{"models": ["dinov3"')


def no_train(run, _):
    (run.input / "train.csv").unlink()
    shutil.rmtree(run.input / "train")


def memory(run, monkeypatch):
    "Three times there is no room; then the batch is small enough."
    real, room = Backbone.encode, [3]

    def encode(backbone, x):
        if room[0]:
            room[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(backbone, x)

    monkeypatch.setattr(Backbone, "encode", encode)


def memory_gpu(run, monkeypatch):
    "A GPU on which not even one photo fits: the work ends on the CPU."
    real = inference.FoldGroup.predict_view

    def predict_view(group, store, index, view, device):
        if device.type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(group, store, index, view, device)

    monkeypatch.setattr(inference.FoldGroup, "predict_view", predict_view)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    cpu = torch.device("cpu")
    monkeypatch.setattr(
        submit, "find_devices", lambda batch, warn: [deadline.Device(torch.device("cuda", 0), batch, warn)]
    )
    for module, name in (
        (submit.siglip, "compute_siglip_features"),
        (submit.frozen, "compute_frozen_features"),
    ):
        compute = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda run, store, device=None, compute=compute, **more: compute(run, store, cpu, **more),
        )
    opened = submit.frozen.open_extractor
    monkeypatch.setattr(
        submit.frozen, "open_extractor", lambda run, device=None, photos=0: opened(run, cpu, photos)
    )


def nan_boosting(run, monkeypatch):
    real = inference.boosting.predict_fitted

    def predict(*args):
        grams, proba, names = real(*args)
        grams[0] = np.nan
        return grams, proba, names

    monkeypatch.setattr(inference.boosting, "predict_fitted", predict)


def full_disk(run, monkeypatch):
    from nbs_lib import store

    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))


def late(run, monkeypatch):
    monkeypatch.setenv("NBS_STARTED", str(time.time() - 9 * 3600))


ALL = {"dinov3": 6, "boosting": 6}
DRILL: dict[str, tuple[Callable | None, str, dict]] = {
    "nothing is wrong": (None, "", ALL),
    "rows in a strange order": (shuffled_rows, "", ALL),
    "photos of another size, format, ending": (
        odd_photos,
        "1 of 6 test photos are found under another name",
        ALL,
    ),
    "odd paths in the table": (odd_paths, "6 of 6 test photos are found under another name", ALL),
    "one table lacks a photo and has odd rows": (
        tables_apart,
        "5 rows stand in only one of test.csv and sample_submission.csv",
        ALL,
    ),
    "one test photo": (one_photo, "", {"dinov3": 1, "boosting": 1}),
    "a photo that is no photo": (text_photo, "1 test photos cannot be read", {"dinov3": 5, "boosting": 5}),
    "a photo cut in half": (cut_photo, "1 test photos cannot be read", {"dinov3": 5, "boosting": 5}),
    "a photo that is not there": (
        missing_photo,
        "1 of 6 test photos are not there",
        {"dinov3": 5, "boosting": 5},
    ),
    "a photo gone and one cut in half, all stages": (
        whole_chain,
        "1 of 6 test photos are not there",
        {"dinov3": 4, "boosting": 4},
    ),
    "no photo can be read": (all_photos, "6 test photos cannot be read", {}),
    "a fold of model 1 is missing": (missing_fold, "fold 1 of model 1 is missing", ALL),
    "a checkpoint is half written": (corrupt_fold, "fold 1 of model 1 is left out", ALL),
    "a fold gives NaN": (nan_fold, "NaN predictions", ALL),
    "the shared backbone is broken": (corrupt_backbone, "fold 0 of model 1 is left out", {"boosting": 6}),
    "no model 1": (no_model1, "of model 1 is missing", {"boosting": 6}),
    "no SigLIP weights": (
        no_siglip,
        "model.joblib needs the features siglip, siglip:semantic as training made them",
        ALL,
    ),
    "no SigLIP weights, no training features": (
        no_siglip_nor_training_features,
        "model 2 is left out",
        {"dinov3": 6},
    ),
    "no weights for the frozen features": (
        no_backbone,
        "the frozen backbone (features of model 2) is left out",
        ALL,
    ),
    "features that nobody can make here": (
        others_features,
        "model.joblib needs the features dinov2 as training made them",
        ALL,
    ),
    "model 2 of another scikit-learn": (other_version, "model.joblib was saved under scikit-learn 0.99", ALL),
    "no model 2": (no_boosting, "model 2 is left out", {"dinov3": 6}),
    "model 2 is half written": (corrupt_boosting, "model.joblib cannot be read", ALL),
    "the same, no training features": (
        corrupt_boosting_no_training_features,
        "model 2 is left out",
        {"dinov3": 6},
    ),
    "model 2 gives a NaN": (
        nan_boosting,
        "model 2 gave no number for 1 photos",
        {"dinov3": 6, "boosting": 5},
    ),
    "no model at all": (nothing_trained, "of model 1 is missing", {}),
    "no model, no blend, no training table": (nothing_at_all, "the mean of train.csv is left out", {}),
    "blend.json is half written": (no_blend, "blending with weights 'equal'", ALL),
    "no training table and photos": (no_train, "the colour model is left out", ALL),
    "memory for one photo at a time": (memory, "the batch is now 1", ALL),
    "no memory on the GPU at all": (memory_gpu, "going on with the CPU", ALL),
    "the disk is full": (full_disk, "reading 2 photos is left out", {}),
    "the deadline has passed": (late, "the deadline came", {}),
}


def drill(name: str, source: Path, folder: Path, monkeypatch) -> dict:
    "Break one thing, submit, check the file; what was said and who answered."
    break_it, says, models = DRILL[name]
    run = copy_run(source, folder)
    if break_it is not None:
        break_it(run, monkeypatch)
    summary = run_submit(run)
    warnings = read_json(run.artefacts / "stages" / "submit.json")["warnings"]
    grams = whole(run.output / "submission.csv", run.input)
    said = next((w for w in warnings if says in w), None)
    assert (said is not None) if says else not warnings, warnings
    assert {m: k for m, k in summary["models"].items() if k or m in models} == models, (summary, warnings)
    assert not list((run.artefacts / "photos").glob("submit")), "what was stored for the run is cleaned up"
    return {
        "fault": name,
        "said": tidy(said or "", says),
        "models": models,
        "photos": summary["photos"],
        "grams": grams,
    }


def tidy(text: str, says: str) -> str:
    "A warning up to its details, which name temporary folders and differ between versions of libraries."
    head = text.removeprefix("submit: ").partition(": ")[0]
    return head if says in head else f"… {says}"


def row(result: dict) -> str:
    answered = [
        f"{'model 1' if m == 'dinov3' else 'model 2'} {k} of {result['photos']}"
        for m, k in result["models"].items()
        if k
    ]
    return f"| {result['fault']} | {result['said']} | {', '.join(answered) or 'colour or the means'} |"


# One of each kind; the others are long drills.
QUICK = {
    "nothing is wrong", "photos of another size, format, ending", "one table lacks a photo and has odd rows",
    "a photo cut in half", "a checkpoint is half written", "a fold gives NaN",
    "the shared backbone is broken", "no SigLIP weights", "no weights for the frozen features",
    "model 2 of another scikit-learn",
    "model 2 gives a NaN", "no model, no blend, no training table", "blend.json is half written",
    "memory for one photo at a time", "no memory on the GPU at all", "the disk is full",
    "the deadline has passed",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in DRILL]
)
def test_fault(name, trained, untouched, tmp_path, monkeypatch):
    result = drill(name, trained, tmp_path, monkeypatch)
    grams, reference = result["grams"], untouched[0]
    if name in (
        "nothing is wrong",
        "rows in a strange order",
        "odd paths in the table",
        "one table lacks a photo and has odd rows",
        "one test photo",
        "memory for one photo at a time",
        "no memory on the GPU at all",
    ):
        assert np.allclose(grams, reference[grams.index], atol=1e-5), (
            "the same photo gets the same five numbers"
        )
    if "photo" in name and name.startswith("a "):
        odd = [i for i in grams.index if abs(grams[i] - reference[i]) > 1e-5]
        assert len({i.rpartition("__")[0] for i in odd}) == 6 - max(result["models"].values()), (
            "only a broken photo is predicted otherwise"
        )
        assert all(grams[i] > 0 for i in grams.index if i.endswith("Dry_Total_g")), "never zeros"
    assert row(result) in ROBUSTNESS.read_text().splitlines(), (
        "docs/robustness.md is stale: python tests/test_submit.py --table"
    )


def test_the_test_is_cleaned_as_training_was(trained, untouched, tmp_path):
    "Whatever the settings of the submission say: folds know the photos that they learned from."
    run = copy_run(
        trained, tmp_path, ("inpaint.rule=none", "inpaint.crop_bottom=0.3", "train_dinov3.size=160")
    )
    assert run_submit(run)["models"] == untouched[1]["models"]
    assert np.allclose(whole(run.output / "submission.csv", run.input), untouched[0], atol=1e-5)
    (said,) = read_json(run.artefacts / "stages" / "submit.json")["warnings"]
    assert (
        "inpaint.rule = stamp and not none, inpaint.crop_bottom = 0.1 and not 0.3; the test's are made alike"
        in said
    )


def told_otherwise(path: Path, section: str, **values) -> None:
    "Let the file beside an artefact tell of other settings; None: of none."
    told = read_json(path)
    told["settings"][section] |= values
    told["settings"][section] = {
        key: value for key, value in told["settings"][section].items() if value is not None
    }
    replace(path, json.dumps(told).encode())


def with_another_fold(run, k: int, **changes) -> None:
    "Put a network of another configuration, on the same backbone file, in place of fold `k`."
    path = run.artefacts / "dinov3" / f"fold{k}.safetensors"
    meta = read_json(path.with_suffix(".json"))
    torch.manual_seed(k)
    net = build_model(dataclasses.replace(load_model(path).config, **changes), "wheel:efficientnet_lite0")
    net.backbone.requires_grad_(False)
    for name, value in {
        "inv_sd": 1,
        "weight": torch.randn_like(net.probe.weight) / 1000,
        "bias": 3,
        "cap": 9,
    }.items():
        getattr(net.probe, name).copy_(torch.as_tensor(value))
    if net.config.head != "none":
        for part in net.head.parts:
            torch.nn.init.normal_(part[-1].weight)
    for old in (path, path.with_suffix(".json")):
        old.unlink()  # a hard link of what all tests share
    save_model(
        net,
        path,
        run.artefacts / "dinov3" / meta["shared"],
        **{key: v for key, v in meta.items() if key not in ("config", "shared", "frozen")},
    )


CHANGES = [
    {"head": "density", "dim": 8},
    {"size": 160},
    {"size": 160, "squeeze": True},
    {"depths": 1},
    {"poolings": ("mean", "sd")},
    {"probe_sizes": (64, 128)},
    {"head": "pooled", "dim": 8, "size": 128, "probe_sizes": (64,)},
]


@pytest.mark.parametrize("k", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "changes", [*CHANGES[:2], *(pytest.param(c, marks=pytest.mark.slow) for c in CHANGES[2:])], ids=str
)
def test_a_fold_of_another_configuration_predicts_in_its_own_way(trained, tmp_path, monkeypatch, k, changes):
    "Training with other settings stopped after some of its folds; or one fold alone kept its head."
    run = copy_run(trained, tmp_path)
    with_another_fold(run, k, **changes)
    seen = record_predictions(monkeypatch)
    assert run_submit(run)["models"] == ALL
    assert not read_json(run.artefacts / "stages" / "submit.json")["warnings"]
    run_inpaint(run)
    task = submit.read_task(run.input)
    store = open_store(run, "test", FULL)
    wanted = np.mean(
        [
            predict(inference.load_fold(run.artefacts, k), store, ("id", "H"), index=store.position(task.ids))
            for k in range(3)
        ],
        axis=0,
    )
    assert np.abs(seen["dinov3"] - wanted).max() <= 1e-4


def test_folds_of_an_earlier_division_have_no_say(trained, untouched, tmp_path):
    run = copy_run(trained, tmp_path)
    for k in range(3, 10):
        for ending in ("json", "safetensors"):
            shutil.copy(
                run.artefacts / "dinov3" / f"fold0.{ending}", run.artefacts / "dinov3" / f"fold{k}.{ending}"
            )
        told_otherwise(run.artefacts / "dinov3" / f"fold{k}.json", "train_dinov3", size=160)
    assert run_submit(run)["models"] == ALL
    (said,) = read_json(run.artefacts / "stages" / "submit.json")["warnings"]
    assert "of an earlier division into 10 folds" in said
    assert np.allclose(whole(run.output / "submission.csv", run.input), untouched[0], atol=1e-5)


def test_folds_that_do_not_tell_of_their_photos_get_those_of_the_settings(trained, untouched, tmp_path):
    run = copy_run(trained, tmp_path, ("inpaint.crop_bottom=0.1", "train_dinov3.size=160"))
    for k in range(3):
        told_otherwise(run.artefacts / "dinov3" / f"fold{k}.json", "inpaint", rule=7, crop_bottom=None)
    assert run_submit(run)["models"] == ALL
    assert not read_json(run.artefacts / "stages" / "submit.json")["warnings"]
    assert np.allclose(whole(run.output / "submission.csv", run.input), untouched[0], atol=1e-5)


def test_model_2_alone_is_shown_what_it_learned_from(trained, tmp_path):
    grams = {}
    for rule in ("stamp", "none"):
        run = copy_run(
            trained,
            tmp_path / rule,
            (f"inpaint.rule={rule}", f"inpaint.crop_bottom={0.1 if rule == 'stamp' else 0.4}"),
        )
        no_model1(run, None)
        assert run_submit(run)["models"] == {"boosting": 6}
        grams[rule] = whole(run.output / "submission.csv", run.input)
    assert np.allclose(grams["none"], grams["stamp"], atol=1e-5)


def test_model_2_of_another_cleaning_than_model_1_is_left_out(trained, tmp_path):
    run = copy_run(trained, tmp_path)
    for path in (run.artefacts / "features").glob("*.json"):
        told_otherwise(path, "inpaint", crop_bottom=0.4)
    assert run_submit(run)["models"] == {"dinov3": 6}
    (said,) = read_json(run.artefacts / "stages" / "submit.json")["warnings"]
    assert "model 2 is left out" in said and "cleaned otherwise than those of model 1" in said


def test_a_store_of_another_cleaning_is_told_and_left_as_it_is(trained, tmp_path):
    "The settings changed and inpaint did not run: training stops, and submit reads the photos anew."
    from nbs_lib.siglip import run_siglip
    from nbs_lib.train_dinov3 import run_train_dinov3

    run = copy_run(trained, tmp_path, ("inpaint.crop_bottom=0.4", "train_dinov3.views=id"))
    for stage in (run_train_dinov3, run_siglip):
        with pytest.raises(
            InputError, match=r"were cleaned with .*0\.1.* not .*0\.4.*--from inpaint"
        ):
            stage(run)
    run_inpaint(run)
    before = open_store(run, "test", FULL).rows["key"].tolist()
    run_submit(run)
    assert open_store(run, "test", FULL).rows["key"].tolist() == before and is_fresh(run, "inpaint")


def test_a_file_that_a_decoder_chokes_on_costs_no_other_its_colour(trained, tmp_path, monkeypatch):
    run, real = copy_run(trained, tmp_path), Image.open
    paths = sorted((run.input / "test").iterdir())
    odd = paths[1].read_bytes()

    def choke(file, *args, **more):
        if hasattr(file, "getvalue") and file.getvalue().startswith(odd):
            raise struct.error("'H' format requires 0 <= number <= 65535")
        return real(file, *args, **more)

    monkeypatch.setattr(Image, "open", choke)
    assert np.isnan(submit.read_thumbs(paths)).all(axis=1).tolist() == [
        False,
        True,
        False,
        False,
        False,
        False,
    ]
    assert run_submit(run)["models"] == {"dinov3": 5, "boosting": 5}
    assert (whole(run.output / "submission.csv", run.input).filter(like="Dry_Total_g") > 0).all()


@pytest.mark.parametrize("gone", ["test.csv", "sample_submission.csv", "test"])
def test_only_tables_and_the_photo_folder_are_needed(trained, tmp_path, gone):
    run = copy_run(trained, tmp_path)
    shutil.rmtree(run.input / gone) if gone == "test" else (run.input / gone).unlink()
    with pytest.raises(InputError, match=gone):
        run_submit(run)
    assert not (run.output / "submission.csv").exists()


@pytest.mark.parametrize("name", ["test.csv", "sample_submission.csv"])
def test_tables_of_something_else_are_refused(trained, tmp_path, name):
    run = copy_run(trained, tmp_path)
    (run.input / name).write_text("sample_id,image_path,target\nROOTS1,test/ROOTS1.jpg,0\n")
    with pytest.raises(InputError, match="no sample_id ends in"):
        run_submit(run)


# ---- one preprocessing path ----
def test_a_training_photo_gets_its_out_of_fold_numbers(trained, tmp_path, monkeypatch):
    "Training photos as test photos, predicted by the fold that left them out, give oof/dinov3.parquet."
    run = copy_run(trained, tmp_path)
    comp = read_competition(run.input)
    fold = pd.read_parquet(run.artefacts / "oof" / "dinov3.parquet").set_index("image_id")["fold"]
    ids = [i for i in comp.train["image_id"] if fold[i] == 1]
    rows = pd.DataFrame({"sample_id": [f"{i}__{t}" for i in ids for t in TARGETS]})
    rows.assign(
        image_path="train/" + rows["sample_id"].str.partition("__")[0] + ".jpg",
        target_name=rows["sample_id"].str.partition("__")[2],
    ).to_csv(run.input / "test.csv", index=False)
    rows.assign(target=0).to_csv(run.input / "sample_submission.csv", index=False)
    monkeypatch.setattr(inference, "plan_fold_groups", lambda artefacts: [(1,)])
    seen = record_predictions(monkeypatch)
    run_submit(run)
    wanted = read_oof(run.artefacts / "oof" / "dinov3.parquet", comp.train["image_id"].tolist())[
        [list(comp.train["image_id"]).index(i) for i in sorted(ids)]
    ]
    assert np.abs(seen["dinov3"] - wanted).max() <= 1e-5


def test_alone_or_among_others(trained, untouched, tmp_path):
    "Each photo submitted alone gets the numbers it gets among the others."
    reference = untouched[0]
    for photo in sorted({i[:6] for i in reference.index})[:3]:
        run = copy_run(trained, tmp_path / photo)
        for name in ("test.csv", "sample_submission.csv"):
            table = pd.read_csv(run.input / name)
            table[table["sample_id"].str.startswith(photo)].to_csv(run.input / name, index=False)
        run_submit(run)
        grams = whole(run.output / "submission.csv", run.input)
        assert np.allclose(grams, reference[grams.index], atol=1e-5)


# ---- several devices, several backbones ----
def part_ways(run) -> None:
    "Give every fold a backbone file of its own, as a fine-tuned model has."
    for k in range(3):
        path = run.artefacts / "dinov3" / f"fold{k}.safetensors"
        net, meta = load_model(path), read_json(path.with_suffix(".json"))
        for old in (path, path.with_suffix(".json")):
            old.unlink()
        save_model(net, path, None, **{key: v for key, v in meta.items() if key not in ("config", "shared")})


def test_folds_with_backbones_of_their_own_and_two_devices(trained, untouched, tmp_path, monkeypatch):
    run = copy_run(trained, tmp_path)
    part_ways(run)
    assert inference.plan_fold_groups(run.artefacts) == [(0,), (1,), (2,)]
    cpu = torch.device("cpu")
    used = set()
    monkeypatch.setattr(
        submit,
        "find_devices",
        lambda batch, warn: [deadline.Device(cpu, 2, warn), deadline.Device(cpu, 2, warn)],
    )
    real = deadline.Device.each
    monkeypatch.setattr(
        deadline.Device,
        "each",
        lambda self, index, work: (used.add((id(self), threading.get_ident())), real(self, index, work))[1],
    )
    run_submit(run)
    assert len({device for device, _ in used}) >= 2 and len({thread for _, thread in used}) >= 2, (
        "both devices worked, each in its thread"
    )
    assert np.allclose(whole(run.output / "submission.csv", run.input), untouched[0], atol=1e-5)


# ---- the clock ----
def test_half_the_time_it_needs(trained, tmp_path, monkeypatch):
    "In virtual time: features cost 1000 seconds a photo, and nothing else costs any."
    now, ends, real = [0.0], [np.inf], inference.extract_store

    def extract(net, store, views, batch, device, extractor, index):
        now[0] += 1000 * len(index)
        return real(net, store, views, batch, device, extractor, index)

    monkeypatch.setattr(inference, "extract_store", extract)
    monkeypatch.setattr(submit, "open_clock", lambda run: deadline.Clock(ends[-1], lambda: now[0]))
    monkeypatch.setattr(submit, "raise_at_deadline", lambda clock: contextlib.nullcontext())
    whole_run, run = copy_run(trained, tmp_path / "whole"), copy_run(trained, tmp_path / "half")
    part_ways(whole_run)
    part_ways(run)
    assert not run_submit(whole_run)["dropped"]
    ends.append(now[0] / 2)
    now[0] = 0.0
    summary = run_submit(run)
    # two photos measure the pace of a kind of work; should they be too many, the alarm stops them
    assert 0.5 * ends[-1] < now[0] <= ends[-1] + 2000, "as much as the time allows"
    whole(run.output / "submission.csv", run.input)
    assert summary["dropped"] and "view H" in summary["dropped"][-1], "further views go first"
    assert summary["models"]["dinov3"] == 6, "every photo was predicted once"
    warnings = read_json(run.artefacts / "stages" / "submit.json")["warnings"]
    assert any("no time for" in w for w in warnings)


def test_what_there_was_no_time_for_is_done_next_time(trained, untouched, tmp_path, monkeypatch):
    "The hours ran out before submit began: the means, and not for good."
    run = copy_run(trained, tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("NBS_STARTED", str(time.time() - 9 * 3600))
        assert not any(run_submit(run)["models"].values())
    told = read_json(run.artefacts / "stages" / "submit.json")
    assert told["unfinished"] == ["what was running when the deadline came"] and not is_fresh(run, "submit")
    assert run_submit(run)["models"] == untouched[1]["models"] and is_fresh(run, "submit")
    assert np.allclose(whole(run.output / "submission.csv", run.input), untouched[0], atol=1e-5)


def test_where_the_hours_count_from(trained, tmp_path, monkeypatch):
    run = copy_run(trained, tmp_path, ["limits.hours=2", "submit.margin_minutes=30"])
    monkeypatch.delenv("NBS_STARTED", raising=False)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.setattr(deadline.psutil.Process, "create_time", lambda self: time.time() - 3600)
    assert deadline.open_clock(run).left() == pytest.approx(1.5 * 3600, abs=5), (
        "at home from the stage's start"
    )
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert deadline.open_clock(run).left() == pytest.approx(0.5 * 3600, abs=5), "on Kaggle from the session's"
    monkeypatch.setenv("NBS_STARTED", str(time.time() - 2 * 3600))
    assert deadline.open_clock(run).left() == pytest.approx(-0.5 * 3600, abs=5)


def test_folds_of_an_earlier_division_do_not_answer(trained, untouched, tmp_path, capsys):
    run = copy_run(trained, tmp_path)
    for ending in (".json", ".safetensors"):
        shutil.copy(run.artefacts / "dinov3" / f"fold1{ending}", run.artefacts / "dinov3" / f"fold3{ending}")
    run_submit(run)
    assert (
        "fold 3 of model 1 is of an earlier division into 4 folds, and is left out" in capsys.readouterr().out
    )
    assert np.allclose(whole(run.output / "submission.csv", run.input), untouched[0], atol=1e-5)


def test_a_stall_is_broken_off(trained, tmp_path, monkeypatch):
    "One photo takes a minute: no plan sees that coming, the alarm does."
    real = inference.extract_store
    monkeypatch.setattr(inference, "extract_store", lambda *args: time.sleep(60) or real(*args))
    run = copy_run(trained, tmp_path, ["limits.hours=0.001", "submit.margin_minutes=0"])  # 3.6 s
    monkeypatch.setenv("NBS_STARTED", str(time.time()))
    start = time.time()
    run_submit(run)
    assert time.time() - start < 40
    whole(run.output / "submission.csv", run.input)
    assert any(
        "the deadline came" in w for w in read_json(run.artefacts / "stages" / "submit.json")["warnings"]
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_lost_ring_is_followed_by_another():
    "What an alarm raises inside a finaliser is printed and forgotten."

    class Slow:
        def __del__(self):
            time.sleep(0.4)

    start = time.time()
    with pytest.raises(deadline.DeadlinePassed), deadline.raise_at_deadline(deadline.Clock(start + 0.2)):
        slow = Slow()
        del slow
        time.sleep(30)
    assert 0.4 <= time.time() - start < 20


def test_a_second_run_changes_nothing_and_an_earlier_file_is_not_made_worse(trained, tmp_path, monkeypatch):
    run = copy_run(trained, tmp_path)
    run_submit(run)
    before = (run.output / "submission.csv").read_bytes()
    run_submit(run)
    assert (run.output / "submission.csv").read_bytes() == before
    seen = []
    real = submit.add_colour
    monkeypatch.setattr(
        submit,
        "add_colour",
        lambda *args: (real(*args), seen.append((run.output / "submission.csv").read_bytes())),
    )
    run_submit(run, force=True)
    assert seen == [before], "means and colours do not replace what models said"


# ---- kills ----
def submit_quietly(folder: str) -> None:
    torch.set_num_threads(1)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        run_submit(tiny.run_on(Path(folder) / "in", Path(folder) / "out", *SMALL), force=True)


def watched(
    folder: Path, end: float | None = None, number: int = signal.SIGKILL
) -> tuple[float, float | None, int]:
    "Kill a submission `end` seconds after its start, reading its file all the time; return the times."
    process = CONTEXT.Process(target=submit_quietly, args=(str(folder),))
    path, came, reads = folder / "out" / "submission.csv", None, 0
    process.start()
    start = time.time()
    while process.is_alive():
        if end is not None and time.time() - start >= end:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(process.pid, number)
            process.join(10)
            break
        if path.exists():
            whole(path, folder / "in")
            came, reads = came or time.time() - start, reads + 1
        time.sleep(0.01)
    process.join(10)
    took = time.time() - start
    if path.exists():
        whole(path, folder / "in")
    assert end is not None or process.exitcode == 0
    return took, came, reads


CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["nbs_lib.submit", "tiny"])


def kill_ten_times(trained: Path, tmp_path: Path) -> None:
    "SIGTERM and SIGKILL in turn, at random moments of a run; whenever the file is there it is whole."
    run = copy_run(trained, tmp_path)
    watched(tmp_path)  # warms the fork server
    (run.output / "submission.csv").unlink()
    needed, first, reads = watched(tmp_path)
    assert first < 60 and reads > 5
    outcomes = []
    for k, moment in enumerate(np.random.default_rng(0).uniform(0, needed, 10)):
        (run.output / "submission.csv").unlink(missing_ok=True)
        _, came, _ = watched(tmp_path, moment, (signal.SIGTERM, signal.SIGKILL)[k % 2])
        assert came is not None or moment < 2 * first + 2, f"killed after {moment:.1f} s, and no file"
        outcomes.append(came is not None)
    assert any(outcomes)
    watched(tmp_path)
    assert not list(run.output.glob(".submission.tmp-*")), "the next run removes temporary files"


def test_killed_as_soon_as_there_is_a_file(trained, tmp_path):
    run = copy_run(trained, tmp_path)
    path = run.output / "submission.csv"
    process = CONTEXT.Process(target=submit_quietly, args=[str(tmp_path)])
    process.start()
    while not path.exists() and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join(10)
    assert process.exitcode == -signal.SIGKILL
    whole(path, run.input)
    assert run_submit(run)["models"] == ALL and not list(run.output.glob(".submission.tmp-*"))


@pytest.mark.slow
def test_killed_at_ten_random_moments(trained, tmp_path):
    kill_ten_times(trained, tmp_path)
    assert KILLED in ROBUSTNESS.read_text().splitlines()


KILLED = "| killed at ten random moments | | a whole file, whenever there was one |"


def write_table() -> None:
    "Run the drill and write what came out into docs/robustness.md."
    import tempfile

    folder = Path(tempfile.mkdtemp())
    source = train_small(folder / "trained")
    lines = ["| What is wrong | What is said | Predicted by |", "|---|---|---|"]
    for k, name in enumerate(DRILL):
        with pytest.MonkeyPatch.context() as monkeypatch:
            lines.append(row(drill(name, source, folder / str(k), monkeypatch)))
    kill_ten_times(source, folder / "killed")
    before, _, rest = ROBUSTNESS.read_text().partition(BEGIN)
    ROBUSTNESS.write_text(before + BEGIN + "\n".join([*lines, KILLED]) + "\n" + END + rest.partition(END)[2])
    shutil.rmtree(folder)
    print(*lines, sep="\n")


if __name__ == "__main__":
    write_table()
