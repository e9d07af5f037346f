"""Measure store."""
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


def recipe_chain(content: bytes, side: int = 512) -> np.ndarray:
    "What the public notebooks do to each photo in every epoch: decode, crop, orange rule, Telea, split, squeeze; (2, side, side, 3) uint8."
    photo = cv2.cvtColor(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    photo = np.ascontiguousarray(photo[: round(0.9 * photo.shape[0])])
    photo = cv2.inpaint(photo, orange_rule(photo).astype(np.uint8), 3, cv2.INPAINT_TELEA)
    return np.stack([cv2.resize(half, (side, side)) for half in split_halves(photo)])


def textured_files(folder: Path, count: int = 24, fine: bool = False) -> list[Path]:
    """`count` JPEG photos 2000 x 1000 of textures; the first and each eighth after it carry a stamp, and `-stamp` in their name.

    The competition's files hold 1.1 GB in 358 photos, about 3 MB each, for grass is fine down to the pixel. `fine` ones are as large: 10 grey values
    of noise, quality 100, colours at half the width (4:2:2), as cameras write them. The others are smooth, and a tenth of that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths, rng = [], np.random.default_rng(7)
    how = [cv2.IMWRITE_JPEG_QUALITY, 100, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422] if fine else [cv2.IMWRITE_JPEG_QUALITY, 92]
    for k, one in enumerate(composites(count, seed=7)):
        photo = (one.stamped if k % 8 == 0 else one.empty) + fine * 10 * rng.standard_normal(one.empty.shape, np.float32)
        paths.append(folder / f"ID{k:02}{'' if k % 8 else '-stamp'}.jpg")
        cv2.imwrite(str(paths[-1]), photo.clip(0, 255).astype(np.uint8)[..., ::-1], how)
    return paths


def seconds_each(way: Callable, things: Sequence, times: int = 3) -> np.ndarray:
    "Least seconds of the processor that `way` takes for each of `things`, out of `times`; what else the machine does counts little."
    taken = np.full((times, len(things)), np.inf)
    for t, k in np.ndindex(taken.shape):
        start = time.process_time()
        way(things[k])
        taken[t, k] = time.process_time() - start
    return taken.min(0)


def bench_photos(photos: str | Path = "", many: int = 800) -> list[dict]:
    "Rows way, photos_a_second, ms, times_decode, times_recipe, note, on one core: the ways to a pair at 512 (seconds of the processor), and `many` photos stored and read (of the clock, with start-up). `photos`: a folder of JPEGs; empty: textures as large as the competition's files, then smooth ones."
    threads = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    keep_memory()
    try:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            if photos:
                kinds = {"given": sorted(Path(photos).glob("*.jpg"))[:24]}
                if not kinds["given"]:
                    raise InputError(f"{photos}: holds no *.jpg to measure with; name a folder of photographs")
            else:
                kinds = {"fine": textured_files(folder / "fine", fine=True), "smooth": textured_files(folder / "smooth")}
            rows = [row for kind, paths in kinds.items() for row in _measure_ways(paths, folder / f"{kind} ways")]
            return [*rows, _measure_many(next(iter(kinds.values())), folder, many)]
    finally:
        cv2.setNumThreads(threads[0])
        torch.set_num_threads(threads[1])


def _measure_ways(paths: list[Path], folder: Path) -> list[dict]:
    "A row a way; of ours a second one for the photos that carry a stamp, if their names say so: painting costs more than looking."
    run, shape = open_run(paths[0].parent, folder), half_shape(512)
    contents, ids = [p.read_bytes() for p in paths], [p.stem for p in paths]
    writers = {name: [StoreWriter(store_folder(run, name, s), ids, s) for s in shapes] for name, shapes in (("512", [shape]), ("512 and full size", [shape, FULL]))}
    ways = {"decode alone": lambda k: cv2.imdecode(np.frombuffer(contents[k], np.uint8), cv2.IMREAD_COLOR),
            "search for a stamp alone": lambda k, decoded=[decode_photo(c) for c in contents]: inpaint.stamp_mask(decoded[k]),
            **{f"ours, build at {name}": lambda k, w=w: _build_one(k, paths[k], w, run.settings, True) for name, w in writers.items()},
            "the recipe, each epoch": lambda k: recipe_chain(contents[k])}
    stamped = np.array([p.stem.endswith("-stamp") for p in paths])
    each = {name: seconds_each(way, range(len(paths))) for name, way in ways.items()}
    taken = {name: seconds[~stamped].mean() for name, seconds in each.items()}
    if stamped.any():
        taken |= {f"{name}, with a stamp": each[name][stamped].mean() for name in ("search for a stamp alone", "ours, build at 512")}
    store = writers["512"][0].finish(run.settings.inpaint)
    for writer in sum(writers.values(), []):
        writer.close()
    taken["ours, each epoch: read the pair"] = seconds_each(lambda k: np.array(store[k]), range(len(paths))).mean()
    megabytes = f"files of {np.mean([len(c) for c in contents]) / 1e6:.1f} MB"
    return [{"way": f"{name}, {megabytes}", "photos_a_second": round(1 / s, 1), "ms": round(1000 * s, 2), "times_decode": round(s / taken["decode alone"], 2),
             "times_recipe": round(taken["the recipe, each epoch"] / s, 1)} for name, s in taken.items()]


def _measure_many(paths: list[Path], folder: Path, many: int) -> dict:
    "Build and read the store of `many` photos at 512, links to `paths`, in a process of its own: photos a second, its peak of memory, and the disk."
    (folder / "many").mkdir()
    for k in range(many):
        (folder / "many" / f"ID{k:05d}.jpg").symlink_to(paths[k % len(paths)].resolve())
    code = ("import sys; import cv2; from pathlib import Path; from nbs_lib.inpaint import build_store; from nbs_lib.runtime import peak_memory; from nbs_lib.stages import open_run; cv2.setNumThreads(1); "
            "paths = sorted(Path(sys.argv[1]).iterdir()); run = open_run(sys.argv[1], sys.argv[2], overrides=['photos.workers=1']); "
            "store = build_store(run, 'train', paths, [p.stem for p in paths], 512); total = sum(int(store[i].sum()) for i in range(len(store))); "
            "print(peak_memory(), store.halves.nbytes)")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, str(folder / "many"), str(folder / "many out")], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    peak, disk = map(int, done.stdout.split()[-2:])
    return {"way": f"ours, {many} photos built at 512 and read", "photos_a_second": round(many / seconds, 1), "ms": round(1000 * seconds / many, 2),
            "note": f"{disk / 1e9:.2f} GB on disk; the process peaks at {peak / 1e9:.2f} GB, mapped pages counted"}
