"""31_backbones: the feature cache gives the same numbers despite broken files, full disks, kills."""

import dataclasses
import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT

from nbs_lib import backbones, frozen, inference, submit
from nbs_lib.backbones import TINY_DINOV3, Backbone, FeatureExtractor
from nbs_lib.inpaint import build_store, run_inpaint
from nbs_lib.runtime import read_json
from nbs_lib.settings import load_settings
from nbs_lib.stages import open_run
from nbs_lib.store import FULL, open_store
from nbs_lib.train_dinov3 import run_train_dinov3
from nbs_lib.weights import load_weights

CPU, CNN = torch.device("cpu"), "tf_efficientnet_lite0"
SMALL, LARGE = (64, 64), (64, 96)  # shapes of a half


class Photos:
    "Hold noise in place of photos; the key None stands for an unreadable one."

    def __init__(self, keys, seed: int = 0):
        self.keys = list(keys)
        shape = (len(self.keys), 2, 72, 80, 3)
        self.pairs = np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.pairs[i]

    def key(self, i: int) -> str | None:
        return self.keys[i]


def backbone(name: str = TINY_DINOV3, depths: int = 2, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(name, depths)


class CountingExtractor(FeatureExtractor):
    "Count the photos that the backbone encodes."

    computed = 0

    def _compute(self, store, index, *args):
        self.computed += len(index)
        return super()._compute(store, index, *args)


def extractor(folder: Path | None, net: Backbone | None = None, mean: float = 0.5, **more):
    options = {"warn": pytest.fail, **more}
    return CountingExtractor(net or backbone(), (mean,) * 3, (0.5,) * 3, folder, CPU, **options)


def equal(one, other) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


# ---- the same numbers ----
@pytest.mark.parametrize("name", [TINY_DINOV3, CNN])
@pytest.mark.parametrize("view", backbones.VIEWS)
@pytest.mark.parametrize("grid", [False, True])
def test_the_cache_gives_what_was_computed(name, view, grid, tmp_path):
    store, net = Photos("abc"), backbone(name)
    plain = extractor(None, net).extract(store, range(3), SMALL, view, grid)
    first = extractor(tmp_path, net)
    assert equal(first.extract(store, range(3), SMALL, view, grid), plain) and first.computed == 3
    again = extractor(tmp_path, backbone(name))
    assert equal(again.extract(store, [2, 0], SMALL, view, grid), plain.rows(torch.tensor([2, 0])))
    assert again.computed == 0
    assert plain.pooled.dtype == torch.float32 and plain.prefix.shape[1:3] == (2, net.prefix_tokens)


def test_what_is_missing_is_computed_and_the_rest_is_read(tmp_path):
    store, e = Photos("abcd"), extractor(tmp_path)
    plain = extractor(None).extract(store, range(4), SMALL)
    e.extract(store, [1, 3], SMALL)
    assert equal(e.extract(store, range(4), SMALL), plain) and e.computed == 4


def test_a_final_map_that_was_not_kept_is_computed_and_then_kept(tmp_path):
    store = Photos("ab")
    extractor(tmp_path).extract(store, range(2), SMALL)
    plain = extractor(None).extract(store, range(2), SMALL, grid=True)
    without = extractor(tmp_path, keep_grid=False)
    for times in (2, 4):
        assert equal(without.extract(store, range(2), SMALL, grid=True), plain) and without.computed == times
    kept = extractor(tmp_path)
    for _ in range(2):
        assert equal(kept.extract(store, range(2), SMALL, grid=True), plain) and kept.computed == 2
    assert equal(without.extract(store, range(2), SMALL, grid=True), plain) and without.computed == 4


def other_weights() -> Backbone:
    net = backbone()
    with torch.no_grad():
        net.net.blocks[3].mlp.fc1.weight[0, 0] += 1e-3
    return net


def same_weights(name: str) -> Backbone:
    "Build networks with tensors of the same names and numbers that pad their pictures in different ways."
    net = backbone(name, 1)
    load_weights(net, "wheel:efficientnet_lite0")
    return net


VARIATIONS = {  # name: (options of the extractor, of `extract`, of the photos)
    "plain": ({}, {}, {}),
    "other weights": ({"net": other_weights}, {}, {}),
    "another depth": ({"net": lambda: backbone(depths=3)}, {}, {}),
    "another network": ({"net": lambda: same_weights("tf_efficientnet_lite0")}, {}, {}),
    "another padding": ({"net": lambda: same_weights("efficientnet_lite0")}, {}, {}),
    "another mean": ({"mean": 0.4}, {}, {}),
    "another size": ({}, {"shape": LARGE}, {}),
    "another view": ({}, {"view": "H"}, {}),
    "both flips": ({}, {"view": "HV"}, {}),
    "other photos": ({}, {}, {"keys": "xyz", "seed": 1}),
    "another precision": ({"precision": "bfloat16"}, {}, {}),
}


def test_every_difference_has_files_of_its_own(tmp_path, monkeypatch):
    outputs = {}
    for folder, computed in ((None, 3), (tmp_path, 3), (tmp_path, 0)):
        for name, (options, call, photos) in VARIATIONS.items():
            monkeypatch.setenv("NBS_PRECISION", options.get("precision", "auto"))
            net = options["net"]() if "net" in options else None
            e = extractor(folder, net, options.get("mean", 0.5))
            out = e.extract(Photos(**{"keys": "abc", **photos}), range(3), **{"shape": SMALL, **call})
            assert e.computed == computed and equal(out, outputs.setdefault(name, out)), name
    assert len(files(tmp_path)) == 3 * len(VARIATIONS)
    same = [pair for pair in itertools.combinations(outputs, 2) if equal(*(outputs[name] for name in pair))]
    assert not same, "each variation changes the features"


def test_stores_of_two_sizes_have_different_keys(tmp_path):
    "A patch of 14 pixels fits no store: a photo that is resized twice differs from one resized once."
    run = tiny.run_on(tiny.competition(tmp_path / "in", 4, 0), tmp_path / "out")
    paths = sorted((run.input / "train").iterdir())
    one, full = (build_store(run, "train", paths, [p.stem for p in paths], size) for size in (96, FULL))
    net = backbone("vit_small_patch14_dinov2", 1)
    for store in (one, full):
        e, plain = extractor(tmp_path / "cache", net), extractor(None, net)
        assert equal(e.extract(store, range(4), (96, 96)), plain.extract(store, range(4), (96, 96)))
        assert e.computed == 4


# ---- broken files ----
@pytest.mark.parametrize("fault", ["truncated", "a few bytes", "empty", "flipped", "text", "pickle"])
def test_a_broken_file_is_computed_again_with_one_warning(fault, tmp_path):
    store, warned = Photos("abc"), []
    plain = extractor(None).extract(store, range(3), SMALL, grid=True)
    extractor(tmp_path).extract(store, range(3), SMALL, grid=True)
    path = next(p for p in files(tmp_path) if p.stem == "b")
    whole = path.read_bytes()
    if fault == "pickle":
        np.savez(path, pooled=np.array([{}], dtype=object), prefix=np.zeros(1), grid=np.zeros(1))
    else:
        flipped = whole[:2000] + bytes(255 - b for b in whole[2000:2100]) + whole[2100:]
        contents = {"truncated": whole[: len(whole) // 2], "a few bytes": whole[:3], "empty": b"",
                    "text": b"Not Found", "flipped": flipped}
        path.write_bytes(contents[fault])
    e = extractor(tmp_path, warn=warned.append)
    assert equal(e.extract(store, range(3), SMALL, grid=True), plain) and e.computed == 1
    (message,) = warned
    assert message.startswith("feature cache: b.npz is broken")
    assert message.endswith("its features are computed again")
    assert equal(e.extract(store, range(3), SMALL, grid=True), plain)
    assert e.computed == 1 and len(warned) == 1, "the new file is kept"


def test_a_photo_that_could_not_be_read_is_never_kept(tmp_path):
    store, e = Photos(["a", None, "", "c"]), extractor(tmp_path)
    plain = extractor(None).extract(store, range(4), SMALL)
    for times in (4, 6):
        assert equal(e.extract(store, range(4), SMALL), plain) and e.computed == times
    assert [p.stem for p in files(tmp_path)] == ["a", "c"]


def test_the_grey_picture_in_place_of_an_unreadable_photo_is_never_kept(tmp_path):
    run = tiny.run_on(tiny.competition(tmp_path / "in", 4, 0), tmp_path / "out")
    paths = sorted((run.input / "train").iterdir())
    paths[1].write_text("this is no photo")
    store = build_store(run, "train", paths, [p.stem for p in paths], FULL, strict=False)
    e = extractor(tmp_path / "cache")
    e.extract(store, range(4), SMALL)
    assert len({p.stem for p in files(tmp_path / "cache")}) == 3 and store.key(1) is None


# ---- a disk that fills up, a writer that is killed ----
@pytest.mark.parametrize(
    "fault, message",
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "is over its quota"),
        (errno.EROFS, "is read-only"),
        (errno.EACCES, "cannot be written"),
    ],
)
def test_a_full_disk_costs_one_warning(fault, message, tmp_path, monkeypatch):
    store, warned, real = Photos("abcd"), [], np.savez
    plain = extractor(None).extract(store, range(4), SMALL)

    def half(path, **arrays):
        if len(files(tmp_path)) >= 2:
            Path(path).write_bytes(b"PK half a file")
            raise OSError(fault, os.strerror(fault))
        real(path, **arrays)

    monkeypatch.setattr(np, "savez", half)
    e = extractor(tmp_path, warn=warned.append)
    assert equal(e.extract(store, range(4), SMALL), plain)
    assert len(warned) == 1 and message in warned[0]
    assert warned[0].endswith("going on without keeping features")
    assert [p.name for p in files(tmp_path)] == ["a.npz", "b.npz"], "no half of a file under any name"
    monkeypatch.undo()
    e = extractor(tmp_path)
    assert equal(e.extract(store, range(4), SMALL), plain) and e.computed == 2


def test_a_file_in_the_place_of_the_folder_costs_one_warning(tmp_path):
    (tmp_path / "features").write_text("a file")
    store, warned = Photos("a"), []
    e = extractor(tmp_path / "features", warn=warned.append)
    plain = extractor(None).extract(store, [0], SMALL)
    for _ in range(2):
        assert equal(e.extract(store, [0], SMALL), plain)
    assert [w for w in warned if "going on without keeping features" in w] == warned[-1:]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import numpy as np
import test_feature_cache as t
real = np.savez

def half(path, **arrays):
    real(path, **arrays)
    if len(t.files(Path({folder!r}))) > 2:
        os.truncate(path, 500)
        os.kill(os.getpid(), signal.SIGKILL)

np.savez = half
t.torch.set_num_threads(1)
t.extractor(Path({folder!r})).extract(t.Photos("abcd"), range(4), t.SMALL)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_files_only(tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGKILL
    left, = (p for p in files(tmp_path) if ".tmp-" in p.name)
    assert [p.name for p in files(tmp_path) if p != left] == ["a.npz", "b.npz"] and left.stat().st_size == 500
    e, plain = extractor(tmp_path), extractor(None).extract(Photos("abcd"), range(4), SMALL)
    assert equal(e.extract(Photos("abcd"), range(4), SMALL), plain) and e.computed == 2
    assert left.stat().st_size == 500, "it is neither read nor renamed"


def fill(folder: str, start, keys: str) -> None:
    torch.set_num_threads(1)
    store, warned = Photos(keys), []
    e = extractor(Path(folder), warn=warned.append)
    start.wait(300)
    e.extract(store, range(len(store)), SMALL, grid=True)
    assert not warned, warned


@pytest.mark.slow
def test_two_processes_fill_one_folder_and_a_third_reads_whole_files(tmp_path):
    context = get_context("spawn")
    start, keys = context.Barrier(3), "abcdefgh"
    both = [context.Process(target=fill, args=(str(tmp_path), start, keys)) for _ in range(2)]
    for process in both:
        process.start()
    plain, count = extractor(None).extract(Photos(keys), range(8), SMALL, grid=True), 0
    dtypes = {"pooled": "float32", "prefix": "float16", "grid": "float16"}
    start.wait(300)
    while any(p.is_alive() for p in both):
        for path in files(tmp_path):
            if ".tmp-" not in path.name:
                with np.load(path) as npz:
                    assert {n: npz[n].dtype.name for n in npz.files} == dtypes
                count += 1
    assert [p.exitcode for p in both] == [0, 0] and count > 0
    e = extractor(tmp_path)
    assert equal(e.extract(Photos(keys), range(8), SMALL, grid=True), plain) and e.computed == 0
    assert sorted(p.name for p in files(tmp_path)) == [f"{k}.npz" for k in keys]


def test_two_threads_fill_one_folder(tmp_path):
    store, out, start, nets = Photos("abcdef"), {}, threading.Barrier(2), [backbone(), backbone()]

    def work(k: int) -> None:
        e = extractor(tmp_path, nets[k])
        start.wait(60)
        out[k] = e.extract(store, range(6), SMALL)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plain = extractor(None).extract(store, range(6), SMALL)
    assert equal(out[0], plain) and equal(out[1], plain)
    assert sorted(p.name for p in files(tmp_path)) == [f"{k}.npz" for k in "abcdef"]


# ---- the stages ----
QUICK = (
    "run.folds=2", "run.draws=0",
    "train_dinov3.inner_folds=2", "train_dinov3.epochs=1", "train_dinov3.schemes=grouped",
    "train_dinov3.maps=0",
    "siglip.weights=", "frozen.colour_width=64",
    "boosting.members=ridge", "boosting.inner_folds=2", "ensemble.judge=no", "ensemble.draws=100",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    "Run the stages up to model 1 with the demo's own size, depths and poolings."
    folder = tmp_path_factory.mktemp("demo")
    run = open_run(tiny.competition(folder / "in", 8, 2), folder / "out", "demo", "", QUICK)
    run_inpaint(run)
    run_train_dinov3(run)
    return folder


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    "Record the number of halves in each call of a backbone."
    calls, real = [], Backbone.encode
    monkeypatch.setattr(Backbone, "encode", lambda self, x: (calls.append(len(x)), real(self, x))[1])
    return calls


def copied(demo: Path, folder: Path):
    shutil.copytree(demo, folder, dirs_exist_ok=True)
    return open_run(folder / "in", folder / "out", "demo", "", QUICK)


def test_frozen_reuses_the_features_of_model_1(demo, tmp_path, encoded):
    run = copied(demo, tmp_path)
    summary = frozen.run_frozen(run)
    assert summary["photos"] == 8 and not encoded
    with np.load(run.artefacts / "features" / "frozen.npz") as npz:
        kept = npz["embedding"]
    shutil.rmtree(run.artefacts / "cache")
    frozen.run_frozen(run, force=True)
    assert sum(encoded) == 2 * 8
    with np.load(run.artefacts / "features" / "frozen.npz") as npz:
        assert np.array_equal(npz["embedding"], kept) and npz["embedding"].dtype == np.float32


def test_a_second_training_reuses_the_features(demo, tmp_path, encoded):
    run = copied(demo, tmp_path)
    before = (run.artefacts / "oof" / "dinov3.parquet").read_bytes()
    run_train_dinov3(run, force=True)
    assert not encoded and (run.artefacts / "oof" / "dinov3.parquet").read_bytes() == before
    for path in (run.artefacts / "dinov3").glob("fold*"):
        path.unlink()
    shutil.rmtree(run.artefacts / "cache")
    run_train_dinov3(run, force=True)
    assert encoded
    assert (run.artefacts / "oof" / "dinov3.parquet").read_bytes() == before, "same folds without the cache"


@pytest.mark.parametrize("stored", [False, True])
def test_model_2_of_a_submission_reuses_the_features_of_model_1(demo, tmp_path, encoded, monkeypatch, stored):
    "The test photos are stored by inpaint, or submit reads them itself."
    from nbs_lib.boosting import run_boosting
    from nbs_lib.ensemble import run_ensemble

    run = copied(demo, tmp_path)
    if not stored:
        for path in (run.artefacts / "photos").glob("test_*"):
            shutil.rmtree(path)
    for stage in (frozen.run_frozen, run_boosting, run_ensemble):
        stage(run)
    assert not encoded
    real, during = inference.FeatureTable.add, []

    def add(table, piece):
        before = len(encoded)
        real(table, piece)
        during.append(len(encoded) - before)

    monkeypatch.setattr(inference.FeatureTable, "add", add)
    assert submit.run_submit(run)["models"] == {"dinov3": 2, "boosting": 2}
    assert encoded and during and not any(during)
    first = (run.output / "submission.csv").read_bytes()
    shutil.rmtree(run.artefacts / "cache")
    submit.run_submit(run, force=True)
    assert (run.output / "submission.csv").read_bytes() == first


def test_the_settings_of_the_demo_let_both_models_read_the_same_features():
    for profile in ("demo", "laptop"):
        s = load_settings(profile)
        m, f = s.train_dinov3, s.frozen
        same = (m.backbone, m.weights, m.depths, m.squeeze) == (f.backbone, f.weights, f.depths, False)
        assert same and set(f.widths) <= {*m.probe_sizes, m.size}, profile


def test_a_read_only_folder_costs_one_warning(demo, tmp_path, monkeypatch):
    "On Kaggle the trained models may be in a read-only folder."
    run, real = copied(demo, tmp_path), backbones.atomic_write
    shutil.rmtree(run.artefacts / "cache")

    def refuse(path):
        if "cache" in Path(path).parts:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path)

    monkeypatch.setattr(backbones, "atomic_write", refuse)
    assert frozen.run_frozen(run)["photos"] == 8
    warnings = read_json(run.artefacts / "stages" / "frozen.json")["warnings"]
    assert warnings == ["feature cache: the disk is read-only; going on without keeping features"]
    assert not (run.artefacts / "cache").exists() and len(open_store(run, "train", FULL)) == 8


def test_columns_selects_the_poolings():
    "`columns` selects some of all poolings, in the order in which they are pooled."
    from nbs_lib.backbones import POOLINGS, feature_names, pool_features

    for name in (TINY_DINOV3, CNN):
        net, store = backbone(name, 3), Photos("ab")
        e = extractor(None, net)
        pooled = e.extract(store, range(2), SMALL).pooled
        assert pooled.shape[1] == sum(feature_names(net, tuple(POOLINGS)).values())
        x = backbones.load_pixels(store, range(2), SMALL, "id")
        with torch.inference_mode():
            maps, prefix = net.encode(backbones.to_tensor(x, e.mean, e.std).flatten(0, 1))
            for poolings in (("gem",), ("sd", "mean"), tuple(POOLINGS)):
                wanted = pool_features(maps, prefix, poolings)
                torch.testing.assert_close(pooled[:, e.columns(poolings)], wanted, rtol=1e-4, atol=1e-4)
                assert wanted.shape[1] == sum(feature_names(net, poolings).values())


def test_the_dataclass_has_the_fields_that_stages_set():
    wanted = {"folder", "device", "warn", "keep_grid", "expected"}
    assert {f.name for f in dataclasses.fields(FeatureExtractor)} >= wanted
