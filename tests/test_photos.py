"""Faults and properties of 20_inpaint and 19_store that are no lesson: kills, full disks, torn stores, flips."""
import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image
from tiny import claim_size, grass

from benchmarks.store import bench_photos
from nbs_lib import demo, images, inpaint, settings, stages, stamp_training, stamps
from nbs_lib import store as store_module
from nbs_lib.images import photo_quality, read_photo, split_halves
from nbs_lib.inpaint import build_store, build_stores, clean_photo, inpaint_stamp, orange_rule, stamp_mask
from nbs_lib.runtime import InputError
from nbs_lib.settings import load_settings
from nbs_lib.stages import is_fresh, open_run
from nbs_lib.stamp_training import composites
from nbs_lib.store import (
    FULL,
    augment,
    half_shape,
    to_panorama,
    open_store,
    photo_weights,
    quarter_turns,
    to_halves,
    to_tensor,
    tta_views,
)
from nbs_lib.tables import read_sample_weights

HERE = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path


def write_photos(folder: Path, n: int, size=(300, 600)) -> list[Path]:
    paths = [folder / "in" / f"ID{k}.jpg" for k in range(n)]
    for k, path in enumerate(paths):
        Image.fromarray(grass(k, size)).save(path, quality=92)
    return paths


def run_in(folder: Path, *overrides: str):
    return open_run(folder / "in", folder / "out", overrides=["photos.workers=2", *overrides])


# --- cleaning --------------------------------------------------------------------------------------------------------------
def test_only_the_mask_is_touched():
    photo = grass(1)
    cv2.putText(photo, "24/12/2014", (40, 960), cv2.FONT_HERSHEY_SIMPLEX, 1.5, (255, 140, 10), 4, cv2.LINE_AA)
    mask = stamp_mask(photo)
    repaired = inpaint_stamp(photo, mask)
    assert mask.any() and (repaired[~mask] == photo[~mask]).all() and (repaired[mask] != photo[mask]).any()


@pytest.mark.parametrize("shape", [(64, 64), (64, 3000), (3000, 64), (64, 20000), (200, 30000), (333, 777), (1000, 2000), (2000, 1000)])
def test_any_size_without_writing_stays_clean(shape):
    photo = grass(2, shape)
    assert not stamp_mask(photo).any()
    left, right = split_halves(clean_photo(photo, load_settings("demo").inpaint))
    assert left.shape == right.shape and left.shape[0] <= 2 * left.shape[1] + 1


@pytest.mark.parametrize("ink, ground, found", [((255, 140, 10), None, True), ((230, 40, 20), None, True), ((250, 250, 250), None, False), ((15, 15, 15), (240, 235, 220), False), ((40, 90, 230), None, False)])
def test_only_writing_from_red_to_yellow_is_a_stamp(ink, ground, found):
    photo = grass(1)
    if ground:
        photo[900:] = ground  # a card along the bottom
    cv2.putText(photo, "24/12/2014 10:21", (60, 970), cv2.FONT_HERSHEY_DUPLEX, 1.4, ink, 3, cv2.LINE_AA)
    assert stamp_mask(photo).any() == found


def test_a_build_without_the_networks_says_so(folder, monkeypatch):
    monkeypatch.setattr(inpaint, "networks_path", lambda: folder / "nets.safetensors")
    inpaint.code_key.cache_clear(), inpaint.load_networks.cache_clear()
    with pytest.raises(InputError, match="nets.safetensors: holds no weights of the Finder"):  # no grey picture stands in for each photo
        build_stores(run_in(folder), "test", write_photos(folder, 1), ["ID0"], [64], strict=False)


def test_fitting_keeps_each_network_beside_the_other(monkeypatch, tmp_path):
    for module in (inpaint, stamp_training):
        monkeypatch.setattr(module, "networks_path", lambda: tmp_path / "nets.safetensors")
    with pytest.raises(InputError, match="nets.safetensors: holds no weights of the Finder"):
        inpaint.load_network(inpaint.StampDetector)  # not random ones, which would paint anything
    stamp_training.fit_detector(minutes=0.01, grounds=2)
    finder = inpaint.load_network(inpaint.StampDetector).state_dict()
    stamp_training.fit_segmenter(minutes=0.01, grounds=2)
    assert all(torch.equal(v, finder[key]) for key, v in inpaint.load_network(inpaint.StampDetector).state_dict().items())
    before = inpaint.load_network(inpaint.StampSegmenter).state_dict()["line.weight"]
    stamp_training.fit_segmenter(minutes=0.01, grounds=2, seed=2)  # goes on
    after = inpaint.load_network(inpaint.StampSegmenter).state_dict()["line.weight"]
    assert 0 < (after - before).abs().max() < before.abs().max()


def test_the_search_is_judged_from_the_command_line(tmp_path, capsys):
    assert stamp_training.main(["judge", "2", "--keep", str(tmp_path / "new" / "stamps.csv")]) == 0
    assert (tmp_path / "new" / "stamps.csv").read_text().startswith("rule,stamps,recall,precision,clean,coverage,area\nwriting (stamp_mask),2.0,")
    assert stamp_training.main(["judge", "0"]) == 2 and capsys.readouterr().err == "error: judge 0: at least one composite is needed\n"


def test_rules_and_crop():
    settings = load_settings("demo", overrides=["inpaint.rule=orange", "inpaint.crop_bottom=0"]).inpaint
    photo = grass(3)
    photo[400:500, 400:900] = (230, 150, 40)
    clean, mask = clean_photo(photo, settings, with_mask=True)
    assert clean.shape == photo.shape and mask[450, 600] and orange_rule(photo)[450, 600] and not stamp_mask(photo).any()
    for bad in ("inpaint.rule=blue", "inpaint.crop_bottom=0.7"):
        with pytest.raises(InputError, match=r"settings \[inpaint\]"):
            clean_photo(photo, load_settings("demo", overrides=[bad]).inpaint)


def test_what_covers_much_of_a_photo_is_no_stamp(monkeypatch):
    photo = cv2.putText(grass(1), "24/12/2014", (40, 960), cv2.FONT_HERSHEY_SIMPLEX, 1.5, (255, 140, 10), 4, cv2.LINE_AA)
    assert 0 < stamp_mask(photo).mean() < inpaint.MOST
    monkeypatch.setattr(inpaint, "line_mask", lambda photo, line: (np.s_[:], np.ones(photo.shape[:2], bool)))
    assert not stamp_mask(photo).any()


@pytest.mark.parametrize("height", [40, 56])
@pytest.mark.parametrize("x, y", [(8, 8), (8, 940), (1200, 8), (1200, 940)])
def test_writing_close_to_an_edge_is_not_read_with_its_mirror(x, y, height):
    "Windows mirror what lies beyond the photo, and so the writing."
    photo, text = grass(2), stamps.draw_text("2013-04-05 12:06", height, "pillow")
    x, y = min(x, 1992 - text.shape[1]), min(y, 992 - height)
    place = np.s_[y : y + height, x : x + text.shape[1]]
    photo[place] = photo[place] * (1 - text[..., None]) + np.array([255, 140, 10]) * text[..., None]
    line, = inpaint.find_stamps(photo)
    assert np.abs(np.subtract(line.box, (x, y, x + text.shape[1], y + height))).max() < 0.3 * height
    assert stamp_mask(photo)[place][text > 0.5].mean() > 0.95


@pytest.mark.parametrize("turn", [1, 3])
def test_writing_that_was_turned_with_the_photo_is_found(turn):
    "A camera held upright writes along its sensor; when the photo is turned afterwards the writing stands, and is found as if it lay."
    for one in composites(6, 3):
        mask = stamp_mask(np.ascontiguousarray(np.rot90(one.stamped, turn)))
        assert mask[np.rot90(one.truth, turn)].mean() == pytest.approx(stamp_mask(one.stamped)[one.truth].mean(), abs=0.05)
        assert not stamp_mask(np.ascontiguousarray(np.rot90(one.empty, turn))).any()


# --- the store -------------------------------------------------------------------------------------------------------------
def count_cleaned(monkeypatch) -> list[str]:
    "Names of the photos that are cleaned from now on."
    seen, real = [], inpaint.clean_halves
    monkeypatch.setattr(inpaint, "clean_halves", lambda content, name, settings: (seen.append(Path(name).stem), real(content, name, settings))[1])
    return seen


def test_only_what_changed_is_done_again(folder, monkeypatch):
    paths = write_photos(folder, 4)
    ids = [p.stem for p in paths]
    seen = count_cleaned(monkeypatch)
    first = build_store(run_in(folder), "train", paths, ids, 64)
    kept = first.halves[0].copy()
    assert sorted(seen) == ids
    build_store(run_in(folder), "train", paths, ids, 64)
    assert len(seen) == 4
    Image.fromarray(grass(9, (300, 600))).save(paths[2])
    again = build_store(run_in(folder), "train", paths, ids, 64)
    assert seen[4:] == ["ID2"] and (again.halves[0] == kept).all()
    build_store(run_in(folder, "inpaint.crop_bottom=0"), "train", paths, ids, 64)
    assert len(seen) == 9
    build_stores(run_in(folder, "inpaint.crop_bottom=0"), "train", paths, ids, [64, 96])
    assert len(seen) == 13  # the new size is made, from one decode a photo
    build_store(run_in(folder, "inpaint.crop_bottom=0"), "train", paths[:2], ids[:2], 64)
    assert open_store(run_in(folder, "inpaint.crop_bottom=0"), "train", 64).ids == ids[:2]
    with pytest.raises(InputError, match="train_64x64: its photos were cleaned with .*0.0.*--from inpaint"):
        open_store(run_in(folder), "train", 64)


def test_a_killed_build_goes_on(folder):
    paths = write_photos(folder, 12, (1000, 2000))
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from nbs_lib.stages import open_run
        from nbs_lib.inpaint import build_stores
        folder = Path(sys.argv[1])
        paths = [folder / "in" / f"ID{k}.jpg" for k in range(12)]
        run = open_run(folder / "in", folder / "out", overrides=["photos.workers=1"])
        print("ready", flush=True)
        build_stores(run, "train", paths, [p.stem for p in paths], [(320, 320), (900, 1000)])
    """)
    child = subprocess.Popen([sys.executable, "-c", program, str(folder)], cwd=HERE, stdout=subprocess.PIPE)
    rows = folder / "out/artefacts/photos/train_900x1000/rows.npy"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        if rows.is_file() and rows.stat().st_size and (np.load(rows)["key"] != b"").sum() >= 3:
            break
    child.send_signal(signal.SIGKILL)
    child.communicate()
    done = int((np.load(rows)["key"] != b"").sum())
    assert 3 <= done < 12
    with pytest.raises(InputError, match="not finished"):
        open_store(run_in(folder), "train", FULL)
    with pytest.MonkeyPatch.context() as patch:
        seen = count_cleaned(patch)
        store = build_stores(run_in(folder), "train", paths, [p.stem for p in paths], [(320, 320), FULL])[1]
    assert 12 - done <= len(seen) <= 13 - done
    for k in (0, 5, 11):
        whole = clean_photo(read_photo(paths[k]), load_settings("demo").inpaint)
        assert (to_panorama(store[k]) == whole).all()


def test_a_full_disk_is_told(folder, monkeypatch):
    paths = write_photos(folder, 2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError) as told:  # the stage decorator turns it into one line
            build_store(run_in(folder), "train", paths, ["ID0", "ID1"], 64)
        assert told.value.errno == errno.ENOSPC
    usage = store_module.shutil.disk_usage(folder)
    one = store_module.store_bytes(2, half_shape(96))
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: usage._replace(free=int(1.5 * one)))
    build_store(run_in(folder), "train", paths, ["ID0", "ID1"], 96)  # there is room for one
    with pytest.raises(InputError, match="GB more"):  # and not for two, though each alone would do
        build_stores(run_in(folder), "train", paths, ["ID0", "ID1"], [(96, 128), (128, 96)])
    build_store(run_in(folder), "train", paths, ["ID0", "ID1"], 96)  # what is there needs no room


def test_a_write_that_is_cut_short_goes_on(folder, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[: max(1, len(data) // 3)], at))
    paths = write_photos(folder, 2)
    store = build_store(run_in(folder), "train", paths, ["ID0", "ID1"], 64)
    monkeypatch.undo()
    whole = build_store(run_in(folder), "train", paths, ["ID0", "ID1"], 64, folder=folder / "elsewhere")
    assert (store.halves == whole.halves).all() and (store.rows == whole.rows).all() and store.halves.std() > 5


def test_a_row_that_was_being_replaced_does_not_count(folder, monkeypatch):
    """Photo A is stored, B is to take its place and the disk fills up in the middle of the row; then A is back."""
    path, = write_photos(folder, 1)
    first, real = path.read_bytes(), os.pwrite
    kept = build_store(run_in(folder), "train", [path], ["ID0"], 64).halves.copy()
    Image.fromarray(grass(7, (300, 600))).save(path)

    def half_a_row(file, data, at):
        if len(data) < 10_000:
            return real(file, data, at)
        real(file, data[:5000], at)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", half_a_row)
    with pytest.raises(OSError):
        build_store(run_in(folder), "train", [path], ["ID0"], 64)
    monkeypatch.undo()
    path.write_bytes(first)
    assert (build_store(run_in(folder), "train", [path], ["ID0"], 64).halves == kept).all()


def bad_photo(kind: str, path: Path) -> None:
    "Put what `kind` says in the place of the good photo at `path`."
    good = path.read_bytes()
    path.unlink()
    if kind == "folder":
        return path.mkdir()
    content = {"zero bytes": b"", "half a JPEG": good[: len(good) // 2], "text": b"this is no photo\n" * 20, "huge": claim_size(good, 20000, 10000)}
    path.write_bytes(content[kind]) if kind in content else Image.new("RGB", (1, 1)).save(path)


@pytest.mark.parametrize("kind", ["zero bytes", "half a JPEG", "text", "1x1", "huge", "folder"])
def test_a_build_over_a_bad_photo_names_it_and_is_mended(folder, monkeypatch, kind):
    paths = write_photos(folder, 4)
    ids, good = [p.stem for p in paths], paths[3].read_bytes()
    bad_photo(kind, paths[3])
    with pytest.raises(InputError, match="ID3.jpg") as told:
        build_store(run_in(folder, "photos.workers=1"), "train", paths, ids, 64)
    assert "\n" not in str(told.value)
    with pytest.raises(InputError, match="not finished"):
        open_store(run_in(folder), "train", 64)
    paths[3].rmdir() if kind == "folder" else paths[3].unlink()
    paths[3].write_bytes(good)
    seen = count_cleaned(monkeypatch)
    store = build_store(run_in(folder), "train", paths, ids, 64)
    assert seen == ["ID3"] and store.halves[3].std() > 5


def test_a_png_called_jpg_is_a_photo(folder):
    picture = grass(1, (300, 600))
    for name, kind in (("a.jpg", "PNG"), ("b.png", "PNG")):
        Image.fromarray(picture).save(folder / "in" / name, format=kind)
    paths = [folder / "in/a.jpg", folder / "in/b.png"]
    store = build_store(run_in(folder), "train", paths, ["a", "b"], 64)
    assert (read_photo(paths[0]) == picture).all() and (store[0] == store[1]).all()


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small disk")
def test_a_disk_that_fills_up_in_the_middle(folder, monkeypatch):
    small = folder / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(small)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        paths = write_photos(folder, 20)
        ids = [p.stem for p in paths]
        monkeypatch.setattr(inpaint, "check_room", lambda *_: None)  # another program took the room after it was checked
        with pytest.raises(OSError) as told:
            build_store(run_in(folder), "train", paths, ids, 64, folder=small)
        assert told.value.errno == errno.ENOSPC and not (small / "train_64x64/store.json").exists()
        subprocess.run(["mount", "-o", "remount,size=2m", str(small)], check=True)
        store = build_store(run_in(folder), "train", paths, ids, 64, folder=small)
        assert (store.halves == build_store(run_in(folder), "train", paths, ids, 64).halves).all()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_broken_photo(folder):
    paths = write_photos(folder, 3)
    paths[1].write_bytes(paths[1].read_bytes()[:3000])
    ids = [p.stem for p in paths]
    with pytest.raises(InputError, match="ID1.jpg"):
        build_store(run_in(folder), "test", paths, ids, 64)
    run = run_in(folder)
    store = build_store(run, "test", [*paths[:2], folder / "in/absent.jpg"], ids, 64, folder=folder / "elsewhere", strict=False)
    assert (store[1] == 128).all() and (store[2] == 128).all() and store[0].std() > 5 and len(run.warnings) == 2
    assert open_store(run, "test", 64, folder / "elsewhere").ids == ids


def test_what_a_library_raises_costs_one_photo(folder, monkeypatch):
    "A submission reads up to 32 photos at a time."
    paths, ids, real = write_photos(folder, 3), ["ID0", "ID1", "ID2"], inpaint.clean_photo

    def choke(photo, *args, **more):
        if abs(photo.mean() - read_photo(paths[1]).mean()) < 1e-9:
            raise cv2.error("OpenCV: an assertion\nfailed somewhere")
        return real(photo, *args, **more)

    monkeypatch.setattr(inpaint, "clean_photo", choke)
    run = run_in(folder)
    store = build_store(run, "test", paths, ids, 64, strict=False)
    assert [bool((store[k] == 128).all()) for k in range(3)] == [False, True, False] and (store.rows["size"].min(1) > 0).tolist() == [True, False, True]
    assert len(run.warnings) == 1 and "ID1.jpg: error: OpenCV: an assertion failed" in run.warnings[0] and "\n" not in run.warnings[0]
    with pytest.raises(cv2.error):
        build_store(run_in(folder), "test", paths, ids, 64)
    monkeypatch.setattr(inpaint, "clean_photo", real)  # what ailed it has passed: nobody takes the stand-in for the photo
    assert (build_store(run_in(folder), "test", paths, ids, 64)[1] != 128).any()


# --- the stage -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def paddock(tmp_path):
    "A run on eight training and two test photos."
    tiny.competition(tmp_path / "in", 8, 2)
    return open_run(tmp_path / "in", tmp_path / "out", "demo", "", ["train_dinov3.size=64", "train_dinov3.unfreeze=1", "photos.workers=2"])


def test_a_test_photo_that_cannot_be_read_is_left_out(paddock):
    broken, good = sorted((paddock.input / "test").iterdir())
    broken.write_text("this is no photo")
    assert inpaint.readable_photos(paddock) == {good.stem: good}
    assert len(paddock.warnings) == 1 and broken.name in paddock.warnings[0]
    broken.unlink()
    assert inpaint.readable_photos(paddock) == {good.stem: good} and len(paddock.warnings) == 2


def test_photos_go_by_image_id_whatever_their_files_are_called(paddock):
    train, test = (pd.read_csv(paddock.input / f"{name}.csv") for name in ("train", "test"))
    first, last = train["sample_id"][0].rpartition("__")[0], test["sample_id"][0].rpartition("__")[0]
    renamed = (paddock.input / "train" / f"{first}.jpg").rename(paddock.input / "train" / "gate 3, north.jpg")
    train.loc[train["sample_id"].str.startswith(first), "image_path"] = f"train/{renamed.name}"
    train.to_csv(paddock.input / "train.csv", index=False)
    moved = (paddock.input / "test" / f"{last}.jpg").rename(paddock.input / "test" / f"{last}.JPEG")
    test["image_path"] = [name.replace("/", "\\") if k % 2 else name for k, name in enumerate(test["image_path"])]  # one photo, written in two ways
    test.to_csv(paddock.input / "test.csv", index=False)
    assert inpaint.readable_photos(paddock)[last] == moved
    inpaint.run_inpaint(paddock)
    for name, table in (("train", train), ("test", test)):
        assert open_store(paddock, name, 64).ids == sorted(set(table["sample_id"].str.rpartition("__")[0]))
    where = open_store(paddock, "train", FULL).position([first])[0]
    wanted = clean_photo(read_photo(renamed), paddock.settings.inpaint)
    assert (open_store(paddock, "train", FULL)[where] == np.stack([images.resize_half(half, FULL) for half in split_halves(wanted)])).all()


def test_photos_of_an_earlier_test_do_not_stay(paddock):
    inpaint.run_inpaint(paddock)
    assert len(open_store(paddock, "test", 64)) == 2
    for path in (paddock.input / "test").iterdir():
        path.write_text("this is no photo")
    inpaint.run_inpaint(paddock)
    assert len(open_store(paddock, "train", 64)) == 8
    for shape in (64, FULL):
        with pytest.raises(InputError, match="not there"):
            open_store(paddock, "test", shape)


@pytest.mark.parametrize("name", ["rows.npy", "halves.npy", "store.json"])
def test_the_stage_is_not_up_to_date_while_a_part_of_its_store_is_gone(paddock, name):
    inpaint.run_inpaint(paddock)
    store = open_store(paddock, "train", 64)
    assert is_fresh(paddock, "inpaint")
    (store.folder / name).unlink()
    with pytest.raises(InputError, match="--from inpaint"):
        open_store(paddock, "train", 64)
    assert not is_fresh(paddock, "inpaint")
    inpaint.run_inpaint(paddock)
    assert len(open_store(paddock, "train", 64)) == 8


def test_networks_fitted_anew_make_what_they_cleaned_stale(tmp_path, monkeypatch):
    shutil.copytree(settings.package_folder(), tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for module in (settings, stages):
        monkeypatch.setattr(module, "package_folder", lambda: tmp_path / "lib")
    rooms = ("inpaint", "train_dinov3", "submit", "ensemble")
    before = {room: stages.hash_code(room) for room in rooms}
    nets = tmp_path / "lib" / inpaint.networks_path().name
    nets.write_bytes(nets.read_bytes()[:-1] + b"\1")
    assert [stages.hash_code(room) != before[room] for room in rooms] == [True, True, True, False]


def test_workers_may_pickle_a_store(folder):
    import pickle

    store = build_store(run_in(folder), "train", write_photos(folder, 2), ["ID0", "ID1"], 64)
    store.halves  # mapped: must not travel
    copy = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 2000 and (copy[1] == store[1]).all()
    with pytest.raises(InputError, match="ID9"):
        store.position(["ID0", "ID9"])


# --- augmentation ----------------------------------------------------------------------------------------------------------
@examples(max_examples=25, deadline=None)
@given(st.integers(8, 40), st.integers(8, 40), st.integers(0, 2**31))
def test_views_are_flips_of_the_panorama(h, w, seed):
    pair = np.random.default_rng(seed).integers(0, 256, (2, h, w, 3), dtype=np.uint8)
    whole = to_panorama(pair)
    for view, flipped in zip(tta_views(pair), (whole, whole[:, ::-1], whole[::-1], whole[::-1, ::-1])):
        assert (to_panorama(view) == flipped).all()
    assert (to_halves(whole) == pair).all()


@pytest.mark.parametrize("override", ["jitter=0", "jitter=0.3", "scale_pad=0.3", "rotate90=yes", "flips=no", "rotate=10", "lamps=0.5", "stamps=0.7"])
def test_augment_repeats_and_keeps_its_input(override):
    settings = load_settings("demo", overrides=[f"photos.{override}"]).photos
    pair = np.random.default_rng(0).integers(0, 256, (2, 112, 128, 3), dtype=np.uint8)
    before = pair.copy()
    outs = [augment(pair, np.random.default_rng(k), settings) for k in range(20)]
    assert (pair == before).all() and all(o.shape == pair.shape and o.dtype == np.uint8 for o in outs)
    assert all((o == augment(pair, np.random.default_rng(k), settings)).all() for k, o in enumerate(outs))
    assert any((o != pair).any() for o in outs)


ALONE = ("photos.flips=no", "photos.jitter=0")


def test_each_option_changes_what_it_says():
    pair = np.stack([cv2.resize(grass(k, (448, 512)), (512, 448)) for k in (0, 1)])

    def changed(*overrides: str, seed: int = 0) -> np.ndarray:
        return augment(pair, np.random.default_rng(seed), load_settings("demo", overrides=[*ALONE, *overrides]).photos)

    assert (changed() == pair).all()
    dim = changed("photos.lamps=1")
    lit = dim[..., 0].astype(int) - dim[..., 1] > 60
    assert 0.0005 < lit.mean() < 0.2 and dim[~lit].mean() < 0.6 * pair[~lit].mean()
    stamped = changed("photos.stamps=1")
    touched = (stamped != pair).any(-1)
    assert 0 < touched.mean() < 0.1 and stamped[touched][:, 0].mean() > stamped[touched][:, 2].mean() + 50
    turned = to_panorama(changed("photos.rotate=10"))
    assert abs(turned.astype(int) - to_panorama(pair)).mean() > 5 and abs(turned.mean() - pair.mean()) < 3  # mirrored, no black corners
    for bad in ("rotate=90", "scale_pad=1.5", "lamps=2", "stamps=-1", "jitter=3"):
        with pytest.raises(InputError, match=rf"\[photos\] {bad.partition('=')[0]}"):
            changed(f"photos.{bad}")


def test_flips_and_quarter_turns_are_the_symmetries_of_the_square():
    pair = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    settings = load_settings("demo", overrides=["photos.rotate90=yes", "photos.jitter=0", "photos.hue=0"]).photos
    seen = {augment(pair, np.random.default_rng(k), settings).tobytes() for k in range(200)}
    assert len(seen) == 8
    assert (to_panorama(quarter_turns(pair, 2)) == to_panorama(pair)[::-1, ::-1]).all()
    assert (quarter_turns(quarter_turns(pair, 1)[::-1, ::-1, ::-1], 0) == quarter_turns(pair, 3)).all()


def test_a_quarter_turn_of_a_half_that_is_not_square_fits():
    pair = np.stack([cv2.resize(grass(k, (90, 100)), (512, 448)) for k in (0, 1)])
    turned = quarter_turns(pair, 1)
    assert turned.shape == pair.shape
    for one, was in zip(turned, pair):
        upright = cv2.resize(np.rot90(was), (392, 448), interpolation=cv2.INTER_LINEAR)  # 448 x 448 / 512 = 392
        assert abs(one[:, 60:452].astype(int) - upright).mean() < 4 and (one[:, 59:50:-1].astype(int) - one[:, 61:70]).std() < 12


# --- quality and weights ---------------------------------------------------------------------------------------------------
def test_each_number_tells_its_disturbance_from_the_others():
    """Disturbances drawn by the demo's renderer: the number of a photo that has one is beyond that of photos that have not."""
    rng = np.random.default_rng(3)
    plain = [demo.render_photo(k, s.green_g, s.dead_g, s.clover_g, s, width=1000, disturbed=False)[0] for k, s in enumerate(demo.draw_sites(rng, 4))]

    def gain(p, *by):
        return np.clip(p * np.array(by), 0, 255).astype(np.uint8)

    drawn = {"rod": [cv2.rectangle(p.copy(), (0, 470), (1000, 500), (225, 222, 215), -1) for p in plain], "frame": [demo.add_frame(rng, p) for p in plain],
             "lamps": [demo.add_lamps(rng, gain(p, 0.3)) for p in plain], "blur": [cv2.GaussianBlur(p, (0, 0), 2) for p in plain], "dim": [gain(p, 0.5) for p in plain],
             "bright": [gain(p, 2.5) for p in plain], "warm": [gain(p, 1.3, 1, 0.5) for p in plain]}
    told = {name: [photo_quality(p) for p in pictures] for name, pictures in {"plain": plain, **drawn}.items()}
    for number, name, sign in (("rod", "rod", 1), ("lamps", "lamps", 1), ("sharpness", "blur", -1), ("exposure", "dim", -1), ("clipped", "bright", 1), ("cast", "warm", 1)):
        having = [sign * row[number] for row in told[name]]
        others = [sign * row[number] for row in told["plain"]]
        assert min(having) > max(others), (number, having, others)
    assert np.mean([row["frame"] > 0.5 for row in told["frame"]]) >= 0.5  # some of these frames hardly reach into the photo
    for name in ("plain", "dim", "blur", "lamps", "rod"):
        assert max(row["frame"] for row in told[name]) < 0.4, name
    for name in ("plain", "dim", "warm", "frame"):
        assert max(row["rod"] for row in told[name]) < 0.01, name
    assert min(row["sharpness"] for row in told["dim"]) > max(row["sharpness"] for row in told["blur"])  # dim is not blurred


def test_a_stamp_is_no_lamp():
    photo = grass(6)
    stamped = cv2.putText(photo.copy(), "24/12/2014 10:21", (1200, 950), cv2.FONT_HERSHEY_SIMPLEX, 1.6, (255, 90, 10), 5)
    mask = (stamped != photo).any(2)
    bare, ignored, known = (photo_quality(p, *m)["lamps"] for p, m in ((photo, ()), (stamped, ()), (stamped, (mask,))))
    assert ignored > bare + 0.001 and known == pytest.approx(bare, abs=1e-6)


def test_weights_reach_those_who_train(tmp_path):
    tiny.competition(tmp_path / "in", 8, 2)
    rule = "exposure>0.4:0.5"
    run = open_run(tmp_path / "in", tmp_path / "out", "demo", "", [f"photos.weights={rule}", "train_dinov3.size=64", "photos.workers=2"])
    inpaint.run_inpaint(run)
    table = pd.read_csv(run.artefacts / "photos/photos.csv").set_index("image_id")
    assert set(table["weight"]) <= {0.5, 1.0} and (table["weight"] == np.where(table["exposure"] > 0.4, 0.5, 1)).all() and table["weight"].nunique() == 2
    ids = list(table.index[table["split"] == "train"])[::-1]
    assert (read_sample_weights(run, ids) == table["weight"][ids].to_numpy()).all()
    with pytest.raises(InputError, match="no weight for ID0"):
        read_sample_weights(run, ["ID0", *ids])
    assert read_sample_weights(open_run(tmp_path / "in", tmp_path / "out", "demo"), ids) is None
    quality = table[list(images.QUALITY)]
    assert photo_weights(quality, [rule, "exposure>0.4:0.5"]).min() == 0.25
    for bad, why in (("blur>1:0", "is no rule"), ("cast>1", "is no rule"), ("cast>1:-1", "is no rule"), ("lamps>1.2.3:0.3", "is no rule"), ("lamps>.:1", "is no rule"), ("lamps>0.001:.", "is no rule"), ("exposure>0:0", "leaves no photo"),
                     ("exposure>0:1e999", "is no rule"), ("exposure<1e999:0.5", "is no rule")):
        with pytest.raises(InputError, match=why):
            photo_weights(quality, [bad])
    with pytest.raises(InputError, match="smaller weights"):
        photo_weights(quality, ["exposure>0:1e200", "exposure>0:1e200", "exposure>0:0"])
    with pytest.raises(InputError, match="is no rule"):  # said before a photo is opened
        inpaint.run_inpaint(open_run(tmp_path / "in", tmp_path / "early", "demo", "", ["photos.weights=lamp>1:0"]))
    assert not (tmp_path / "early/artefacts/photos").exists()
    white = next((tmp_path / "in/test").glob("*.jpg"))
    Image.fromarray(np.full((300, 600, 3), 255, np.uint8)).save(white)
    with pytest.raises(InputError, match="leaves no photo"):  # a test photo that is left teaches nothing
        inpaint.run_inpaint(open_run(tmp_path / "in", tmp_path / "out", "demo", "", ["photos.weights=exposure<0.9:0", "train_dinov3.size=64"]))


@pytest.mark.parametrize("fault", ["no halves", "short halves", "other rows", "torn rows", "cut word", "no word", "other word"])
def test_a_store_that_is_not_whole_says_so_and_is_mended(folder, fault):
    run, paths = run_in(folder), write_photos(folder, 2)
    whole = build_store(run, "train", paths, ["ID0", "ID1"], 64)
    halves = whole.halves.copy()
    {"no halves": lambda: (whole.folder / "halves.npy").unlink(),
     "short halves": lambda: os.truncate(whole.folder / "halves.npy", 5000),
     "other rows": lambda: np.save(whole.folder / "rows.npy", np.zeros(3, store_module.ROW)),
     "torn rows": lambda: (whole.folder / "rows.npy").write_bytes((whole.folder / "rows.npy").read_bytes().replace(b"'descr': [", b"'descr': {{")),
     "cut word": lambda: os.truncate(whole.folder / "store.json", 12),
     "no word": lambda: (whole.folder / "store.json").unlink(),
     "other word": lambda: (whole.folder / "store.json").write_text("[]")}[fault]()
    with pytest.raises(InputError, match=r"train_64x64.*--from inpaint"):
        open_store(run, "train", 64)
    assert (build_store(run, "train", paths, ["ID0", "ID1"], 64).halves == halves).all()
    assert (open_store(run, "train", 64).halves == halves).all()


def test_the_word_that_a_store_is_whole_comes_last(folder, monkeypatch):
    "After a power cut there may be rows without the word, never the word without the rows."
    told, sync, say = [], os.fsync, store_module.write_json
    monkeypatch.setattr(store_module.os, "fsync", lambda file: (told.append(os.readlink(f"/proc/self/fd/{file}")), sync(file)))
    monkeypatch.setattr(store_module, "write_json", lambda path, what: (told.append(str(path)), say(path, what)))
    build_store(run_in(folder), "train", write_photos(folder, 1), ["ID0"], 64)
    names = [name for t in told if (name := Path(t).name) in ("halves.npy", "rows.npy", "store.json")]
    assert sorted(names[:2]) == ["halves.npy", "rows.npy"] and names[2:] == ["store.json"]


@pytest.mark.parametrize("ids", [["ID0"], ["ID0", "ID0"], ["ID0", "ID1", "ID2"]])
def test_each_photo_needs_an_id_of_its_own(folder, ids):
    with pytest.raises(InputError, match="train photos: 2 files and"):
        build_store(run_in(folder), "train", write_photos(folder, 2), ids, 64)


def test_the_bench_needs_photographs(folder):
    with pytest.raises(InputError, match=r"in: holds no \*.jpg"):
        bench_photos(folder / "in")


def test_the_bench_measures_each_way(folder):
    from benchmarks.bench import find_benches

    assert list(find_benches(["store"])) == ["store.bench_photos"]
    write_photos(folder, 2)
    rows = {row["way"].partition(", files")[0]: row for row in bench_photos(folder / "in", many=3)}
    assert len(rows) == 7 and all(row["ms"] > 0 for row in rows.values())
    assert rows["decode alone"]["times_decode"] == 1 and rows["the recipe, each epoch"]["times_recipe"] == 1
    assert "0.00 GB on disk" in rows["ours, 3 photos built at 512 and read"]["note"]


def test_a_store_is_a_dataset(folder):
    store = build_store(run_in(folder), "train", write_photos(folder, 3), ["ID0", "ID1", "ID2"], 64)
    store.halves  # mapped here; a worker that gets the store maps the file itself
    loader = torch.utils.data.DataLoader(store, batch_size=2, sampler=[2, 1], num_workers=1, multiprocessing_context="spawn", collate_fn=np.stack)
    pictures = next(iter(loader))
    assert pictures.shape == (2, 2, *half_shape(64), 3) and (pictures == store.halves[[2, 1]]).all()
    x = to_tensor(pictures, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert torch.allclose(x[0, 1, 2], (torch.from_numpy(store[2][1, ..., 2].astype(np.float32)) / 255 - 0.3) / 0.1, atol=1e-5)


def test_a_store_of_another_size_is_only_built_for_a_backbone_that_is_trained(tmp_path):
    tiny.competition(tmp_path / "in", 4, 1)
    for more, built in (((), {"900x1000"}), (("train_dinov3.unfreeze=1",), {"900x1000", "64x64"}), (("train_dinov3.unfreeze=1", "train_dinov3.size=96"), {"900x1000", "64x64", "96x96"})):
        run = open_run(tmp_path / "in", tmp_path / "out", "demo", "", ["train_dinov3.size=64", *more])
        inpaint.run_inpaint(run)
        assert {p.parent.name for p in (run.artefacts / "photos").glob("*/store.json")} >= {f"{split}_{form}" for split in ("train", "test") for form in built}
        assert ("64x64" in built) == (run.artefacts / "photos" / "train_64x64").exists()
        assert store_module.wanted_shapes(run.settings)[-1] == FULL and len(store_module.wanted_shapes(run.settings)) == 1 + bool(more)
