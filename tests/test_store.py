"""The store of cleaned photos and its faults: kills, full disks, damaged files; augmentation and quality."""
import errno
import os
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
from nbs_lib import demo, images, inpaint, stamps
from nbs_lib import store as store_module
from nbs_lib.images import photo_quality, read_photo, split_halves
from nbs_lib.inpaint import build_store, build_stores, clean_photo
from nbs_lib.runtime import InputError
from nbs_lib.settings import load_settings
from nbs_lib.stages import is_fresh, open_run
from nbs_lib.store import (
    FULL,
    augment,
    half_shape,
    open_store,
    photo_weights,
    quarter_turns,
    to_halves,
    to_panorama,
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


# --- the store
def count_cleaned(monkeypatch) -> list[str]:
    "Return a list that grows by the name of each photo that is cleaned."
    seen, real = [], inpaint.clean_halves

    def counted(content, name, settings):
        seen.append(Path(name).stem)
        return real(content, name, settings)

    monkeypatch.setattr(inpaint, "clean_halves", counted)
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


def test_a_killed_build_resumes(folder):
    paths = write_photos(folder, 8, (1000, 2000))
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from nbs_lib.stages import open_run
        from nbs_lib.inpaint import build_stores
        folder = Path(sys.argv[1])
        paths = [folder / "in" / f"ID{k}.jpg" for k in range(8)]
        run = open_run(folder / "in", folder / "out", overrides=["photos.workers=1"])
        print("ready", flush=True)
        build_stores(run, "train", paths, [p.stem for p in paths], [(320, 320), (900, 1000)])
    """)
    child = subprocess.Popen([sys.executable, "-c", program, str(folder)], cwd=HERE, stdout=subprocess.PIPE)
    rows = folder / "out/artefacts/photos/train_900x1000/rows.npy"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and child.poll() is None:
        if rows.is_file() and rows.stat().st_size and (np.load(rows)["key"] != b"").sum() >= 2:
            break
    child.send_signal(signal.SIGKILL)
    child.communicate()
    done = int((np.load(rows)["key"] != b"").sum())
    assert 2 <= done < 8
    with pytest.raises(InputError, match="not finished"):
        open_store(run_in(folder), "train", FULL)
    with pytest.MonkeyPatch.context() as patch:
        seen = count_cleaned(patch)
        store = build_stores(run_in(folder), "train", paths, [p.stem for p in paths], [(320, 320), FULL])[1]
    assert 8 - done <= len(seen) <= 9 - done
    for k in (0, 7):
        whole, _ = clean_photo(read_photo(paths[k]), load_settings("demo").inpaint)
        assert (to_panorama(store[k]) == whole).all()


def test_a_full_disk_is_reported(folder, monkeypatch):
    paths = write_photos(folder, 2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError) as error:  # the stage decorator turns it into one line
            build_store(run_in(folder), "train", paths, ["ID0", "ID1"], 64)
        assert error.value.errno == errno.ENOSPC
    usage = store_module.shutil.disk_usage(folder)
    one = store_module.store_bytes(2, half_shape(96))
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: usage._replace(free=int(1.5 * one)))
    build_store(run_in(folder), "train", paths, ["ID0", "ID1"], 96)  # one fits
    with pytest.raises(InputError, match="GB more"):  # two do not, though each alone would
        build_stores(run_in(folder), "train", paths, ["ID0", "ID1"], [(96, 128), (128, 96)])
    build_store(run_in(folder), "train", paths, ["ID0", "ID1"], 96)  # what is there needs no space


def test_a_partial_write_is_continued(folder, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[: max(1, len(data) // 3)], at))
    paths = write_photos(folder, 2)
    store = build_store(run_in(folder), "train", paths, ["ID0", "ID1"], 64)
    monkeypatch.undo()
    whole = build_store(run_in(folder), "train", paths, ["ID0", "ID1"], 64, folder=folder / "elsewhere")
    assert (store.halves == whole.halves).all() and (store.rows == whole.rows).all()
    assert store.halves.std() > 5


def test_a_row_that_was_being_replaced_does_not_count(folder, monkeypatch):
    "Photo A is stored, the disk fills up while B replaces it, and then A is back."
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
    "Replace the good photo at `path` by a bad one of this kind."
    good = path.read_bytes()
    path.unlink()
    if kind == "folder":
        return path.mkdir()
    content = {"zero bytes": b"", "half a JPEG": good[: len(good) // 2], "text": b"this is no photo\n" * 20,
               "huge": claim_size(good, 20000, 10000)}
    path.write_bytes(content[kind]) if kind in content else Image.new("RGB", (1, 1)).save(path)


@pytest.mark.parametrize("kind", ["zero bytes", "half a JPEG", "text", "1x1", "huge", "folder"])
def test_a_build_over_a_bad_photo_names_it_and_is_mended(folder, monkeypatch, kind):
    paths = write_photos(folder, 4)
    ids, good = [p.stem for p in paths], paths[3].read_bytes()
    bad_photo(kind, paths[3])
    with pytest.raises(InputError, match="ID3.jpg") as error:
        build_store(run_in(folder, "photos.workers=1"), "train", paths, ids, 64)
    assert "\n" not in str(error.value)
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
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        paths = write_photos(folder, 20)
        ids = [p.stem for p in paths]
        # another program fills the disk after the check
        monkeypatch.setattr(inpaint, "check_disk_space", lambda *_: None)
        with pytest.raises(OSError) as error:
            build_store(run_in(folder), "train", paths, ids, 64, folder=small)
        assert error.value.errno == errno.ENOSPC and not (small / "train_64x64/store.json").exists()
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
    paths[2] = folder / "in/absent.jpg"
    store = build_store(run, "test", paths, ids, 64, folder=folder / "elsewhere", strict=False)
    assert (store[1] == 128).all() and (store[2] == 128).all() and store[0].std() > 5
    assert len(run.warnings) == 2
    assert open_store(run, "test", 64, folder / "elsewhere").ids == ids


def test_an_error_of_a_library_costs_one_photo(folder, monkeypatch):
    "A submission reads up to 32 photos at a time."
    paths, ids, real = write_photos(folder, 3), ["ID0", "ID1", "ID2"], inpaint.clean_photo

    def fail(photo, *args, **more):
        if abs(photo.mean() - read_photo(paths[1]).mean()) < 1e-9:
            raise cv2.error("OpenCV: an assertion\nfailed somewhere")
        return real(photo, *args, **more)

    monkeypatch.setattr(inpaint, "clean_photo", fail)
    run = run_in(folder)
    store = build_store(run, "test", paths, ids, 64, strict=False)
    assert [bool((store[k] == 128).all()) for k in range(3)] == [False, True, False]
    assert (store.rows["size"].min(1) > 0).tolist() == [True, False, True]
    assert len(run.warnings) == 1 and "\n" not in run.warnings[0]
    assert "ID1.jpg: error: OpenCV: an assertion failed" in run.warnings[0]
    with pytest.raises(cv2.error):
        build_store(run_in(folder), "test", paths, ids, 64)
    monkeypatch.setattr(inpaint, "clean_photo", real)  # the grey placeholder is not reused
    assert (build_store(run_in(folder), "test", paths, ids, 64)[1] != 128).any()


# --- the stage
@pytest.fixture
def paddock(tmp_path):
    "Open a run on eight training and two test photos."
    tiny.competition(tmp_path / "in", 8, 2)
    overrides = ["train_dinov3.size=64", "train_dinov3.unfreeze=1", "photos.workers=2"]
    return open_run(tmp_path / "in", tmp_path / "out", "demo", "", overrides)


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
    photo = paddock.input / "train" / f"{first}.jpg"
    renamed = photo.rename(photo.with_name("gate 3, north.jpg"))
    train.loc[train["sample_id"].str.startswith(first), "image_path"] = f"train/{renamed.name}"
    train.to_csv(paddock.input / "train.csv", index=False)
    photo = paddock.input / "test" / f"{last}.jpg"
    moved = photo.rename(photo.with_suffix(".JPEG"))
    # one photo, written in two ways
    paths = enumerate(test["image_path"])
    test["image_path"] = [name.replace("/", "\\") if k % 2 else name for k, name in paths]
    test.to_csv(paddock.input / "test.csv", index=False)
    assert inpaint.readable_photos(paddock)[last] == moved
    inpaint.run_inpaint(paddock)
    for name, table in (("train", train), ("test", test)):
        assert open_store(paddock, name, 64).ids == sorted(set(table["sample_id"].str.rpartition("__")[0]))
    where = open_store(paddock, "train", FULL).position([first])[0]
    wanted, _ = clean_photo(read_photo(renamed), paddock.settings.inpaint)
    halves = np.stack([images.resize_half(half, FULL) for half in split_halves(wanted)])
    assert (open_store(paddock, "train", FULL)[where] == halves).all()


def test_photos_of_an_earlier_test_set_are_removed(paddock):
    inpaint.run_inpaint(paddock)
    assert len(open_store(paddock, "test", 64)) == 2
    for path in (paddock.input / "test").iterdir():
        path.write_text("this is no photo")
    inpaint.run_inpaint(paddock)
    assert len(open_store(paddock, "train", 64)) == 8
    for shape in (64, FULL):
        with pytest.raises(InputError, match="missing or not finished"):
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


def test_workers_may_pickle_a_store(folder):
    import pickle

    store = build_store(run_in(folder), "train", write_photos(folder, 2), ["ID0", "ID1"], 64)
    store.halves  # mapped: must not travel
    copy = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 2000 and (copy[1] == store[1]).all()
    with pytest.raises(InputError, match="ID9"):
        store.position(["ID0", "ID9"])


# --- augmentation
@examples(max_examples=25, deadline=None)
@given(st.integers(8, 40), st.integers(8, 40), st.integers(0, 2**31))
def test_views_are_flips_of_the_panorama(h, w, seed):
    pair = np.random.default_rng(seed).integers(0, 256, (2, h, w, 3), dtype=np.uint8)
    whole = to_panorama(pair)
    for view, flipped in zip(tta_views(pair), (whole, whole[:, ::-1], whole[::-1], whole[::-1, ::-1])):
        assert (to_panorama(view) == flipped).all()
    assert (to_halves(whole) == pair).all()


CHANGES = ("jitter=0", "jitter=0.3", "scale_pad=0.3", "rotate90=yes", "flips=no", "rotate=10", "lamps=0.5",
           "stamps=0.7")


@pytest.mark.parametrize("override", CHANGES)
def test_augment_repeats_and_keeps_its_input(override):
    settings = load_settings("demo", overrides=[f"photos.{override}"]).photos
    pair = np.random.default_rng(0).integers(0, 256, (2, 112, 128, 3), dtype=np.uint8)
    before = pair.copy()
    outs = [augment(pair, np.random.default_rng(k), settings) for k in range(20)]
    assert (pair == before).all() and all(o.shape == pair.shape and o.dtype == np.uint8 for o in outs)
    assert all((o == augment(pair, np.random.default_rng(k), settings)).all() for k, o in enumerate(outs))
    assert any((o != pair).any() for o in outs)


ALONE = ("photos.flips=no", "photos.jitter=0")


def test_each_option_does_what_its_name_means():
    pair = np.stack([cv2.resize(grass(k, (448, 512)), (512, 448)) for k in (0, 1)])

    def changed(*overrides: str, seed: int = 0) -> np.ndarray:
        settings = load_settings("demo", overrides=[*ALONE, *overrides]).photos
        return augment(pair, np.random.default_rng(seed), settings)

    assert (changed() == pair).all()
    dim = changed("photos.lamps=1")
    lit = dim[..., 0].astype(int) - dim[..., 1] > 60
    assert 0.0005 < lit.mean() < 0.2 and dim[~lit].mean() < 0.6 * pair[~lit].mean()
    stamped = changed("photos.stamps=1")
    touched = (stamped != pair).any(-1)
    assert 0 < touched.mean() < 0.1 and stamped[touched][:, 0].mean() > stamped[touched][:, 2].mean() + 50
    turned = to_panorama(changed("photos.rotate=10"))
    assert abs(turned.astype(int) - to_panorama(pair)).mean() > 5
    assert abs(turned.mean() - pair.mean()) < 3  # mirrored, no black corners
    for bad in ("rotate=90", "scale_pad=1.5", "lamps=2", "stamps=-1", "jitter=3"):
        with pytest.raises(InputError, match=f"photos.{bad.partition('=')[0]}"):
            changed(f"photos.{bad}")


def test_flips_and_quarter_turns_are_the_symmetries_of_the_square():
    pair = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    overrides = ["photos.rotate90=yes", "photos.jitter=0", "photos.hue=0"]
    settings = load_settings("demo", overrides=overrides).photos
    seen = {augment(pair, np.random.default_rng(k), settings).tobytes() for k in range(200)}
    assert len(seen) == 8
    assert (to_panorama(quarter_turns(pair, 2)) == to_panorama(pair)[::-1, ::-1]).all()
    assert (quarter_turns(quarter_turns(pair, 1)[::-1, ::-1, ::-1], 0) == quarter_turns(pair, 3)).all()


def test_a_quarter_turn_of_a_half_that_is_not_square_fits():
    pair = np.stack([cv2.resize(grass(k, (90, 100)), (512, 448)) for k in (0, 1)])
    turned = quarter_turns(pair, 1)
    assert turned.shape == pair.shape
    for one, was in zip(turned, pair):
        upright = cv2.resize(np.rot90(was), (392, 448))  # 448 x 448 / 512 = 392
        assert abs(one[:, 60:452].astype(int) - upright).mean() < 4
        assert (one[:, 59:50:-1].astype(int) - one[:, 61:70]).std() < 12


# --- quality and weights
def test_each_number_separates_its_disturbance_from_the_others():
    "The disturbances are drawn by the demo's renderer."
    rng = np.random.default_rng(3)
    sites = [(k, s.green_g, s.dead_g, s.clover_g, s) for k, s in enumerate(demo.draw_sites(rng, 4))]
    plain = [demo.render_photo(*site, width=1000, disturbed=False)[0] for site in sites]

    def gain(p, *by):
        return np.clip(p * np.array(by), 0, 255).astype(np.uint8)

    def rod(p):
        return cv2.rectangle(p.copy(), (0, 470), (1000, 500), (225, 222, 215), -1)

    drawn = {
        "plain": plain,
        "rod": [rod(p) for p in plain],
        "frame": [demo.add_frame(rng, p) for p in plain],
        "lamps": [stamps.add_lamps(rng, gain(p, 0.3)) for p in plain],
        "blur": [cv2.GaussianBlur(p, (0, 0), 2) for p in plain],
        "dim": [gain(p, 0.5) for p in plain],
        "bright": [gain(p, 2.5) for p in plain],
        "warm": [gain(p, 1.3, 1, 0.5) for p in plain],
    }
    quality = {name: pd.DataFrame(map(photo_quality, pictures)) for name, pictures in drawn.items()}
    for number, name in (("rod", "rod"), ("lamps", "lamps"), ("clipped", "bright"), ("cast", "warm")):
        assert quality[name][number].min() > quality["plain"][number].max(), number
    for number, name in (("sharpness", "blur"), ("exposure", "dim")):
        assert quality[name][number].max() < quality["plain"][number].min(), number
    assert (quality["frame"]["frame"] > 0.5).mean() >= 0.5  # some of these frames hardly reach into the photo
    for name in ("plain", "dim", "blur", "lamps", "rod"):
        assert quality[name]["frame"].max() < 0.4, name
    for name in ("plain", "dim", "warm", "frame"):
        assert quality[name]["rod"].max() < 0.01, name
    assert quality["dim"]["sharpness"].min() > quality["blur"]["sharpness"].max()  # dim is not blurred


def test_a_stamp_is_no_lamp():
    photo = grass(6)
    stamped, font = photo.copy(), cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(stamped, "24/12/2014 10:21", (1200, 950), font, 1.6, (255, 90, 10), 5)
    plain, unmasked = photo_quality(photo)["lamps"], photo_quality(stamped)["lamps"]
    masked = photo_quality(stamped, (stamped != photo).any(2))["lamps"]
    assert unmasked > plain + 0.001 and masked == pytest.approx(plain, abs=1e-6)


def test_weights_reach_the_training(tmp_path):
    tiny.competition(tmp_path / "in", 8, 2)
    rule = "exposure>0.4:0.5"

    def run_with(rule, output):
        overrides = [f"photos.weights={rule}", "train_dinov3.size=64", "photos.workers=2"]
        run = open_run(tmp_path / "in", tmp_path / output, "demo", "", overrides)
        inpaint.run_inpaint(run)
        return run

    run = run_with(rule, "out")
    table = pd.read_csv(run.artefacts / "photos/photos.csv").set_index("image_id")
    assert table["weight"].nunique() == 2
    assert (table["weight"] == np.where(table["exposure"] > 0.4, 0.5, 1)).all()
    ids = list(table.index[table["split"] == "train"])[::-1]
    assert (read_sample_weights(run, ids) == table["weight"][ids].to_numpy()).all()
    with pytest.raises(InputError, match="photos are missing, ID0 the first"):
        read_sample_weights(run, ["ID0", *ids])
    assert read_sample_weights(open_run(tmp_path / "in", tmp_path / "out", "demo"), ids) is None
    quality = table[list(images.QUALITY)]
    assert photo_weights(quality, [rule, "exposure>0.4:0.5"]).min() == 0.25
    with pytest.raises(InputError, match="is not a rule"):  # raised before a photo is opened
        run_with("lamp>1:0", "early")
    assert not (tmp_path / "early/artefacts/photos").exists()
    white = next((tmp_path / "in/test").glob("*.jpg"))
    Image.fromarray(np.full((300, 600, 3), 255, np.uint8)).save(white)
    with pytest.raises(InputError, match="leaves no photo"):  # a test photo that is left is not trained on
        run_with("exposure<0.9:0", "out")


BAD_RULES = ("blur>1:0", "cast>1", "cast>1:-1", "lamps>1.2.3:0.3", "lamps>.:1", "lamps>0.001:.",
             "exposure>0:1e999", "exposure<1e999:0.5")


@pytest.mark.parametrize("rules, reason", [
    *(([rule], "is not a rule") for rule in BAD_RULES),
    (["exposure>0:0"], "leaves no photo"),
    (["exposure>0:1e200", "exposure>0:1e200", "exposure>0:0"], "smaller weights"),
])
def test_bad_weight_rules_are_refused(rules, reason):
    quality = pd.DataFrame(0.5, range(3), list(images.QUALITY))
    with pytest.raises(InputError, match=reason):
        photo_weights(quality, rules)


@pytest.mark.parametrize(
    "fault", ["no halves", "short halves", "other rows", "torn rows", "short json", "no json", "other json"]
)
def test_a_damaged_store_is_refused_and_rebuilt(folder, fault):
    run, paths = run_in(folder), write_photos(folder, 2)
    whole = build_store(run, "train", paths, ["ID0", "ID1"], 64)
    halves = whole.halves.copy()
    path, rows, entry = (whole.folder / name for name in ("halves.npy", "rows.npy", "store.json"))
    {"no halves": lambda: path.unlink(),
     "short halves": lambda: os.truncate(path, 5000),
     "other rows": lambda: np.save(rows, np.zeros(3, store_module.ROW)),
     "torn rows": lambda: rows.write_bytes(rows.read_bytes().replace(b"'descr': [", b"'descr': {{")),
     "short json": lambda: os.truncate(entry, 12),
     "no json": lambda: entry.unlink(),
     "other json": lambda: entry.write_text("[]")}[fault]()
    with pytest.raises(InputError, match=r"train_64x64.*--from inpaint"):
        open_store(run, "train", 64)
    assert (build_store(run, "train", paths, ["ID0", "ID1"], 64).halves == halves).all()
    assert (open_store(run, "train", 64).halves == halves).all()


def test_store_json_is_written_last(folder, monkeypatch):
    "After a power cut there may be rows without store.json, never store.json without the rows."
    written, sync, write_json = [], os.fsync, store_module.write_json

    def traced_sync(file):
        written.append(os.readlink(f"/proc/self/fd/{file}"))
        sync(file)

    def traced_write(path, content):
        written.append(str(path))
        write_json(path, content)

    monkeypatch.setattr(store_module.os, "fsync", traced_sync)
    monkeypatch.setattr(store_module, "write_json", traced_write)
    build_store(run_in(folder), "train", write_photos(folder, 1), ["ID0"], 64)
    names = [Path(path).name for path in written]
    names = [name for name in names if name in ("halves.npy", "rows.npy", "store.json")]
    assert sorted(names[:2]) == ["halves.npy", "rows.npy"] and names[2:] == ["store.json"]


@pytest.mark.parametrize("ids", [["ID0"], ["ID0", "ID0"], ["ID0", "ID1", "ID2"]])
def test_each_photo_needs_an_id_of_its_own(folder, ids):
    with pytest.raises(InputError, match="train photos: 2 files and"):
        build_store(run_in(folder), "train", write_photos(folder, 2), ids, 64)


def test_the_benchmark_needs_photographs(folder):
    with pytest.raises(InputError, match=r"in: holds no \*.jpg"):
        bench_photos(folder / "in")


@pytest.mark.slow
def test_the_benchmark_measures_each_way(folder):
    from benchmarks.bench import find_benches

    assert list(find_benches(["store"])) == ["store.bench_photos"]
    write_photos(folder, 2)
    rows = {row["way"].partition(", files")[0]: row for row in bench_photos(folder / "in", many=3)}
    assert len(rows) == 7 and all(row["ms"] > 0 for row in rows.values())
    assert rows["decode alone"]["times_decode"] == 1 and rows["the recipe, each epoch"]["times_recipe"] == 1
    assert "0.00 GB on disk" in rows["ours, 3 photos built at 512 and read"]["note"]


def test_a_store_is_a_dataset(folder):
    store = build_store(run_in(folder), "train", write_photos(folder, 3), ["ID0", "ID1", "ID2"], 64)
    store.halves  # mapped here; a worker that receives the store maps the file itself
    loader = torch.utils.data.DataLoader(store, batch_size=2, sampler=[2, 1], num_workers=1,
                                         multiprocessing_context="spawn", collate_fn=np.stack)
    pictures = next(iter(loader))
    assert pictures.shape == (2, 2, *half_shape(64), 3) and (pictures == store.halves[[2, 1]]).all()
    x = to_tensor(pictures, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    blue = torch.from_numpy(store[2][1, ..., 2].astype(np.float32)) / 255
    assert torch.allclose(x[0, 1, 2], (blue - 0.3) / 0.1, atol=1e-5)


def test_a_store_of_another_size_is_only_built_for_a_backbone_that_is_trained(tmp_path):
    tiny.competition(tmp_path / "in", 4, 1)
    unfreeze = "train_dinov3.unfreeze=1"
    for more, sizes in (
        ((), {"900x1000"}),
        ((unfreeze,), {"900x1000", "64x64"}),
        ((unfreeze, "train_dinov3.size=96"), {"900x1000", "64x64", "96x96"}),
    ):
        run = open_run(tmp_path / "in", tmp_path / "out", "demo", "", ["train_dinov3.size=64", *more])
        inpaint.run_inpaint(run)
        folders = {path.parent.name for path in (run.artefacts / "photos").glob("*/store.json")}
        assert folders >= {f"{split}_{size}" for split in ("train", "test") for size in sizes}
        assert ("64x64" in sizes) == (run.artefacts / "photos" / "train_64x64").exists()
        shapes = store_module.wanted_shapes(run.settings)
        assert shapes[-1] == FULL and len(shapes) == 1 + bool(more)
