"""Measure how fast the demo's photos are rendered, by one process and by all cores."""
import os
import tempfile
import time
from pathlib import Path

from nbs_lib.demo import write_demo


def bench_demo(photos: int = 60) -> list[dict]:
    "Render a demo at full size; return a row for each number of processes: name, seconds, photos_a_second."
    rows = []
    for workers in sorted({1, os.cpu_count()}):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            write_demo(Path(folder) / "demo", photos - 4, 4, workers=workers)
            seconds = (time.perf_counter() - start) / photos
        name = f"a photo of the demo, {workers} process{'es' * (workers > 1)}"
        rows.append({"name": name, "seconds": round(seconds, 3), "photos_a_second": round(1 / seconds, 2)})
    return rows
