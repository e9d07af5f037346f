"""Measure targets."""
import time

import numpy as np

from nbs_lib.targets import make_weighting, reconcile


def bench_balance(rows: int = 1_000_000) -> list[dict]:
    "Rows name, rows, seconds, rows_a_second: `reconcile` under each weighting, of random points that mostly need a face and not the plane; the faster of two."
    rng = np.random.default_rng(0)
    y, errors, out = rng.normal(10, 30, (rows, 5)), rng.normal(0, [13, 10, 8, 12, 11], (300, 5)), []
    for name in ("euclid", "metric", "mint"):
        took = []
        for _ in range(2):
            start = time.perf_counter()
            reconcile(y, make_weighting(name, errors))
            took.append(time.perf_counter() - start)
        out.append({"name": name, "rows": rows, "seconds": round(min(took), 3), "rows_a_second": round(rows / min(took))})
    return out
