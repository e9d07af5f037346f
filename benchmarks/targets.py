"""Measure the mass balance: `targets.reconcile` of a million predictions under each weighting.

Compared: the Euclidean distance, the metric's weights, and the inverse covariance of errors (`mint`). Most of
the random points are negative in a part, so that the projection alone does not do.
"""
import time

import numpy as np

from nbs_lib.targets import make_weighting, reconcile


def bench_balance(rows: int = 1_000_000) -> list[dict]:
    "Return rows name, rows, seconds, rows_a_second: the faster of two runs under each weighting."
    rng = np.random.default_rng(0)
    y, errors, out = rng.normal(10, 30, (rows, 5)), rng.normal(0, [13, 10, 8, 12, 11], (300, 5)), []
    for name in ("euclid", "metric", "mint"):
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            reconcile(y, make_weighting(name, errors))
            seconds.append(time.perf_counter() - start)
        speed = round(rows / min(seconds))
        out.append({"name": name, "rows": rows, "seconds": round(min(seconds), 3), "rows_a_second": speed})
    return out
