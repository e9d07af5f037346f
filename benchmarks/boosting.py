"""Measure model 2: time and memory of fitting our members, next to the recipe's four boosters.

Features of 357 or 112 photos are synthetic. Ours: profile kaggle, five folds, with stack and state model.
The recipe: preset recipe, one fold (five take five times as long). Each case runs in a process of its own.
"""
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from nbs_lib.boosting import LabelledPhotos, StateClassifier, fit_rows, make_regressor
from nbs_lib.runtime import peak_memory
from nbs_lib.settings import load_settings
from nbs_lib.validation import group_folds

ROOT = Path(__file__).resolve().parent.parent


def make_labelled(photos: int, width: int, sites: int = 30, seed: int = 0) -> LabelledPhotos:
    "Return photos of some sites, with `width` features that depend on the grams: for measuring time only."
    r = np.random.default_rng(seed)
    site = r.permutation(np.arange(photos) % sites)
    truth = 0.7 * r.normal(size=(sites, 3))[site] + r.normal(size=(photos, 3))
    green, dead, clover = (np.exp(0.7 * truth) * [20, 9, 4]).T
    features = np.tanh(truth @ r.normal(size=(3, width))) + 0.7 * r.normal(size=(photos, width))
    y = np.stack([green, dead, clover, green + clover, green + clover + dead], axis=1)
    state = np.array(["NSW", "Tas", "Vic", "WA"])[site % 4]
    ids, sites = [f"ID{i}" for i in range(photos)], np.char.add("site", site.astype(str))
    return LabelledPhotos(ids, features.astype(np.float32), y, sites, state)


def time_boosting(photos: int, width: int, preset: str = "", folds: int = 5) -> dict:
    "Return seconds, CPU seconds and peak memory of this process for `folds` of five folds, profile kaggle."
    settings, data = load_settings("kaggle", preset), make_labelled(photos, width)
    regressor = make_regressor(settings, (("synthetic", width),))
    fold, start, used = group_folds(data.group, 5, 0), time.perf_counter(), time.process_time()

    def fit(k: int) -> tuple:
        "Return the regressor and the state classifier of fold k."
        return fit_rows(regressor, data, fold != k), fit_rows(StateClassifier(), data, fold != k, "state")

    with ThreadPoolExecutor(os.cpu_count()) as pool, threadpool_limits(1):
        fitted = list(pool.map(fit, range(folds)))
    for k, (one, state) in enumerate(fitted):
        one.predict(data.X[fold == k])
        state.predict_proba(data.X[fold == k])
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    peak = peak_memory() / 2**30
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "peak_gb": round(peak, 2)}


CASES = {  # arguments of `time_boosting`
    "ours, 357 photos × 384": (357, 384),
    "ours, 112 photos × 10,000": (112, 10_000),
    "ours, 357 photos × 10,000": (357, 10_000),
    "the recipe's four, 357 photos × 384": (357, 384, "recipe", 1),
}
CODE = "import json; from benchmarks import boosting; print(json.dumps(boosting.time_boosting(*{case!r})))"


def bench_boosting() -> list[dict]:
    "Return rows name, seconds, cpu_seconds, peak_gb, note of all CASES."
    rows = []
    for name, case in CASES.items():
        command = [sys.executable, "-c", CODE.format(case=case)]
        out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
        note = "one fold: five are five times as much" if "recipe" in case else "five folds"
        rows.append({"name": name, **json.loads(out.splitlines()[-1]), "note": note})
    return rows
