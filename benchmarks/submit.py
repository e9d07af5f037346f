"""Measure submit."""
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from nbs_lib.deadline import find_devices
from nbs_lib.images import read_bytes, resize_half
from nbs_lib.inference import (
    InferenceContext,
    Model1,
    PhotoLoader,
    plan_fold_groups,
)
from nbs_lib.inpaint import clean_halves
from nbs_lib.prediction import predict
from nbs_lib.settings import library_file, load_settings
from nbs_lib.stages import Run
from nbs_lib.store import FULL
from nbs_lib.submit import SubmissionWriter, Task, open_blend, read_task
from nbs_lib.tables import to_long
from nbs_lib.train_dinov3 import load_fold


def one_at_a_time(encode: Callable) -> Callable:
    "Return a backbone's `encode` that takes one half after the other."

    def forward(x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:  # (halves, 3, H, W)
        maps, prefix = zip(*(encode(half) for half in x.split(1)), strict=True)
        return [torch.cat(level) for level in zip(*maps, strict=True)], torch.cat(prefix)

    return forward


def recipe_way(run: Run, task: Task, index: Sequence[int]) -> np.ndarray:
    """Return (m, 5) grams of model 1 as the recipe computes them.

    Each fold opens and cleans each photo again, and takes one view of one half of one photo at a time.
    """
    views, cpu = run.settings.train_dinov3.views, torch.device("cpu")
    folds = sorted(k for plan in plan_fold_groups(run.artefacts) for k in plan)
    grams = np.zeros((len(folds), len(index), 5))
    for f, k in enumerate(folds):
        net = load_fold(run.artefacts, k).eval()
        net.backbone.encode = one_at_a_time(net.backbone.encode)
        for row, i in enumerate(index):
            halves, _ = clean_halves(read_bytes(task.paths[i]), task.ids[i], run.settings)
            pair = np.stack([resize_half(half, FULL) for half in halves])
            grams[f, row] = np.mean([predict(net, [pair], (view,), 1, cpu)[0] for view in views], axis=0)
    return grams.mean(axis=0)


def our_way(run: Run, task: Task, index: Sequence[int]) -> np.ndarray:
    "Return (m, 5) grams of model 1 as `run_submit` computes them."
    writer = SubmissionWriter(run.output / "bench.csv", task, open_blend(run, print))
    loader = PhotoLoader(run, task.ids, task.paths, run.artefacts / "photos" / "submit")
    context = InferenceContext(run, loader, writer, find_devices(run.settings.submit.batch))
    try:
        model, good = Model1(context), loader.get(np.asarray(index))
        for view in model.views:
            for folds in model.plans:
                model.predict_view(folds, view, good)
        return model.averager.mean()[index]
    finally:
        loader.close()


def many_photos(source: Path, folder: Path, n: int) -> Path:
    "Make a competition folder whose test has `n` photos: links to those of `source` under other names."
    photos = sorted(Path(source, "test").iterdir())
    (folder / "test").mkdir(parents=True)
    shutil.copy(Path(source, "train.csv"), folder / "train.csv")
    (folder / "train").symlink_to(Path(source, "train").resolve())
    ids = [f"ID{i:06d}" for i in range(n)]
    for i, name in enumerate(ids):
        (folder / "test" / f"{name}.jpg").symlink_to(photos[i % len(photos)].resolve())
    rows = to_long(ids, np.zeros((n, 5)))
    rows.to_csv(folder / "sample_submission.csv", index=False)
    names = rows["sample_id"].str.rpartition("__")
    table = rows.assign(image_path="test/" + names[0] + ".jpg", target_name=names[2])
    table.to_csv(folder / "test.csv", index=False)
    return folder


def bench_submit(demo: str | Path = "", photos: int = 800, few: int = 12) -> list[dict]:
    "Return rows name, photos, seconds, photos_a_second, peak_mb, note of submit and of model 1."
    demo = Path(demo) if demo else library_file("runs", "demo")
    if not (demo / "artefacts" / "blend.json").is_file():
        return [{"name": "submit", "note": "not measured: there are no trained models; run make demo first"}]
    with tempfile.TemporaryDirectory() as folder:
        rows = [_measure_submit(demo, Path(folder, str(n)), n) for n in (photos // 8, photos)]
        photos = many_photos(demo / "input" / "csiro-biomass", Path(folder, "few"), few)
        run, task = _bench_run(demo, photos, Path(folder, "few out"))
        index, grams = np.arange(few), {}
        for name, way in (("model 1, the recipe's way", recipe_way), ("model 1, our way", our_way)):
            start = time.perf_counter()
            grams[name] = way(run, task, index)
            seconds = time.perf_counter() - start
            pace = {"seconds": round(seconds, 2), "photos_a_second": round(few / seconds, 2)}
            rows.append({"name": name, "photos": few, **pace})
        difference = np.abs(np.subtract(*grams.values())).max()
        ratio = rows[-2]["seconds"] / rows[-1]["seconds"]
        rows[-1]["note"] = f"{ratio:.1f} times as fast; grams differ by at most {difference:.0e}"
        return rows


def _bench_run(demo: Path, input: Path, output: Path) -> tuple[Run, Task]:
    "Open a run with the demo's models and settings on another input."
    output.mkdir(parents=True)
    (output / "artefacts").symlink_to((demo / "artefacts").resolve())
    run = Run(input, output, load_settings("demo"))
    return run, read_task(input)


def _measure_submit(demo: Path, folder: Path, n: int) -> dict:
    "Measure the whole of submit in a fresh process."
    source = many_photos(demo / "input" / "csiro-biomass", folder / "in", n)
    (folder / "out" / "artefacts").mkdir(parents=True)
    for part in Path(demo, "artefacts").iterdir():
        if part.name not in ("photos", "stages"):
            (folder / "out" / "artefacts" / part.name).symlink_to(part.resolve())
    code = (
        "import json, sys, time; from nbs_lib.runtime import peak_memory; "
        "from nbs_lib.stages import open_run; from nbs_lib.submit import run_submit; "
        "start = time.perf_counter(); "
        "s = run_submit(open_run(sys.argv[1], sys.argv[2], 'demo')); "
        "print(json.dumps([time.perf_counter() - start, peak_memory() / 2**20, s['models']]))"
    )
    call = [sys.executable, "-c", code, str(source), str(folder / "out")]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    seconds, peak, models = json.loads(done.stdout.splitlines()[-1])
    return {"name": f"the whole of submit, {n} photos", "photos": n, "seconds": round(seconds, 1),
            "photos_a_second": round(n / seconds, 2), "peak_mb": round(peak), "note": str(models)}
