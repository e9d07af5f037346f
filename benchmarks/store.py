"""Measure how long it takes to clean, store and read photographs."""
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from nbs_lib import inpaint
from nbs_lib.images import decode_photo, split_halves
from nbs_lib.inpaint import _build_one, orange_rule
from nbs_lib.runtime import InputError, keep_memory
from nbs_lib.stages import open_run
from nbs_lib.stamp_training import composites
from nbs_lib.store import FULL, StoreWriter, half_shape, store_folder

RECIPE, STORED = "the recipe, each epoch", "ours, build at 512"
BUILD = """
import sys
from pathlib import Path

import cv2

from nbs_lib.inpaint import build_store
from nbs_lib.runtime import peak_memory
from nbs_lib.stages import open_run

cv2.setNumThreads(1)
paths = sorted(Path(sys.argv[1]).iterdir())
run = open_run(sys.argv[1], sys.argv[2], overrides=["photos.workers=1"])
store = build_store(run, "train", paths, [p.stem for p in paths], 512)
total = sum(int(store[i].sum()) for i in range(len(store)))
print(peak_memory(), store.halves.nbytes)
"""


def recipe_chain(content: bytes, side: int = 512) -> np.ndarray:
    """Prepare a photo as public notebooks do in every epoch; return (2, side, side, 3) uint8.

    Decode, crop, orange rule, Telea inpainting, split, squeeze.
    """
    photo = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    photo = np.ascontiguousarray(photo[: round(0.9 * photo.shape[0])])
    photo = cv2.inpaint(photo, orange_rule(photo).astype(np.uint8), 3, cv2.INPAINT_TELEA)
    return np.stack([cv2.resize(half, (side, side)) for half in split_halves(photo)])


def textured_files(folder: Path, count: int = 24, fine: bool = False) -> list[Path]:
    """Write `count` JPEG photos 2000 x 1000 of textures; each eighth has a stamp, and `-stamp` in its name.

    Files of the competition have about 3 MB, since grass is fine down to the pixel. `fine` files too:
    noise of 10 grey values, quality 100, colours at half the width (4:2:2). The others have a tenth of that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths, rng = [], np.random.default_rng(7)
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422] if fine else []
    options = [cv2.IMWRITE_JPEG_QUALITY, 100 if fine else 92, *sampling]
    for k, one in enumerate(composites(count, seed=7)):
        photo = one.empty if k % 8 else one.stamped
        if fine:
            photo = photo + 10 * rng.standard_normal(photo.shape, np.float32)
        paths.append(folder / f"ID{k:02}{'' if k % 8 else '-stamp'}.jpg")
        cv2.imwrite(str(paths[-1]), photo.clip(0, 255).astype(np.uint8)[..., ::-1], options)
    return paths


def seconds_each(call: Callable, items: Sequence, times: int = 3) -> np.ndarray:
    "Measure the processor time of `call` for each item, the least of `times`: robust to other processes."
    taken = np.full((times, len(items)), np.inf)
    for t, k in np.ndindex(taken.shape):
        start = time.process_time()
        call(items[k])
        taken[t, k] = time.process_time() - start
    return taken.min(0)


def bench_photos(photos: str | Path = "", many: int = 800) -> list[dict]:
    """Measure every way to a pair at 512 (processor time), and `many` photos stored and read (wall time).

    `photos` is a folder of JPEGs; empty: textures as large as the competition's files, then smooth ones.
    Returns rows of way, photos_a_second, ms, times_decode, times_recipe, note, on one core.
    """
    threads = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    keep_memory()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            kinds = _photo_files(photos, folder)
            rows = [r for kind, paths in kinds.items() for r in _measure_ways(paths, folder / f"{kind} ways")]
            return [*rows, _measure_many(next(iter(kinds.values())), folder, many)]
    finally:
        cv2.setNumThreads(threads[0])
        torch.set_num_threads(threads[1])


def _photo_files(photos: str | Path, folder: Path) -> dict[str, list[Path]]:
    if not photos:
        return {kind: textured_files(folder / kind, fine=kind == "fine") for kind in ("fine", "smooth")}
    paths = sorted(Path(photos).glob("*.jpg"))[:24]
    if not paths:
        raise InputError(f"{photos}: holds no *.jpg to measure with; name a folder of photographs")
    return {"given": paths}


def _measure_ways(paths: list[Path], folder: Path) -> list[dict]:
    "Measure each way on photos without a stamp; two of them again on photos with one, where names show it."
    run, small = open_run(paths[0].parent, folder), half_shape(512)
    contents, ids = [p.read_bytes() for p in paths], [p.stem for p in paths]
    decoded = [decode_photo(content) for content in contents]

    def open_writers(name: str, *shapes) -> list[StoreWriter]:
        return [StoreWriter(store_folder(run, name, shape), ids, shape) for shape in shapes]

    one, two = open_writers("512", small), open_writers("both", small, FULL)
    ways = {
        "decode alone": lambda k: cv2.imdecode(np.frombuffer(contents[k], np.uint8), cv2.IMREAD_COLOR),
        "search for a stamp alone": lambda k: inpaint.stamp_mask(decoded[k]),
        STORED: lambda k: _build_one(k, paths[k], one, run.settings, True),
        f"{STORED} and full size": lambda k: _build_one(k, paths[k], two, run.settings, True),
        RECIPE: lambda k: recipe_chain(contents[k]),
    }
    each = {name: seconds_each(way, range(len(paths))) for name, way in ways.items()}
    stamped = np.array([p.stem.endswith("-stamp") for p in paths])
    taken = {name: seconds[~stamped].mean() for name, seconds in each.items()}
    for name in ("search for a stamp alone", STORED) if stamped.any() else ():
        taken[f"{name}, with a stamp"] = each[name][stamped].mean()
    store = one[0].finish(run.settings.inpaint)
    for writer in (*one, *two):
        writer.close()
    read = seconds_each(lambda k: np.array(store[k]), range(len(ids)))
    taken["ours, each epoch: read the pair"] = read.mean()
    megabytes = np.mean([len(c) for c in contents]) / 1e6
    return [{"way": f"{name}, files of {megabytes:.1f} MB", "photos_a_second": round(1 / s, 1),
             "ms": round(1000 * s, 2), "times_decode": round(s / taken["decode alone"], 2),
             "times_recipe": round(taken[RECIPE] / s, 1)} for name, s in taken.items()]


def _measure_many(paths: list[Path], folder: Path, many: int) -> dict:
    "Build and read the store of `many` photos, links to `paths`, at 512 in another process."
    (folder / "many").mkdir()
    for k in range(many):
        (folder / "many" / f"ID{k:05d}.jpg").symlink_to(paths[k % len(paths)].resolve())
    start = time.perf_counter()
    command = [sys.executable, "-c", BUILD, str(folder / "many"), str(folder / "many out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    peak, disk = map(int, done.stdout.split()[-2:])
    note = f"{disk / 1e9:.2f} GB on disk; the process peaks at {peak / 1e9:.2f} GB, mapped pages counted"
    return {"way": f"ours, {many} photos built at 512 and read", "photos_a_second": round(many / seconds, 1),
            "ms": round(1000 * seconds / many, 2), "note": note}
