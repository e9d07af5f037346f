"""Measure boosting."""
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from nbs_lib.boosting import LabelledPhotos, StateClassifier, fit_rows, make_regressor
from nbs_lib.runtime import peak_memory
from nbs_lib.settings import load_settings
from nbs_lib.validation import group_folds


def synthetic_labelled(photos: int, width: int, sites: int = 30, seed: int = 0) -> LabelledPhotos:
    "Make photos of some sites, with `width` features that depend on the grams: for measuring time only."
    r = np.random.default_rng(seed)
    site = r.permutation(np.arange(photos) % sites)
    truth = 0.7 * r.normal(size=(sites, 3))[site] + r.normal(size=(photos, 3))
    green, dead, clover = (np.exp(0.7 * truth) * [20, 9, 4]).T
    X = np.tanh(truth @ r.normal(size=(3, width))) + 0.7 * r.normal(size=(photos, width))
    y = np.stack([green, dead, clover, green + clover, green + clover + dead], axis=1)
    state = np.array(["NSW", "Tas", "Vic", "WA"])[site % 4]
    return LabelledPhotos([f"ID{i}" for i in range(photos)], X.astype(np.float32), y, np.char.add("site", site.astype(str)), state)


def time_boosting(photos: int, width: int, preset: str = "", folds: int = 5) -> dict:
    "Measure seconds, CPU seconds and peak memory of this process, for `folds` of five folds with the profile kaggle."
    settings, data = load_settings("kaggle", preset), synthetic_labelled(photos, width)
    regressor = make_regressor(settings, (("made_up", width),))
    fold, start, used = group_folds(data.group, 5, 0), time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(os.cpu_count()) as pool, threadpool_limits(1):
        fitted = list(pool.map(lambda k: (fit_rows(regressor, data, fold != k), fit_rows(StateClassifier(), data, fold != k, "state")), range(folds)))
    for k, (one, state) in enumerate(fitted):
        one.predict(data.X[fold == k])
        state.predict_proba(data.X[fold == k])
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "peak_gb": round(peak_memory() / 2**30, 2)}


def bench_boosting() -> list[dict]:
    "Rows name, seconds, cpu_seconds, peak_gb, note: our members with blend and states, five folds; the recipe's four, one fold."
    cases = {"ours, 357 photos × 384": (357, 384), "ours, 112 photos × 10,000": (112, 10_000), "ours, 357 photos × 10,000": (357, 10_000),
             "the recipe's four, 357 photos × 384": (357, 384, "recipe", 1)}
    rows = []
    for name, case in cases.items():
        code = f"import json; from nbs_lib.boosting import time_boosting; print(json.dumps(time_boosting(*{case!r})))"
        out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        note = "one fold: five are five times as much" if "recipe" in case else "five folds"
        rows.append({"name": name, **json.loads(out.splitlines()[-1]), "note": note})
    return rows
