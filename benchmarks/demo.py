"""Measure demo."""
import os
import tempfile
import time
from pathlib import Path

from nbs_lib.demo import write_demo


def bench_demo(photos: int = 60) -> list[dict]:
    "Rows name, seconds (of one photo), photos_a_second: the photos of a demo at full size, by one process and by all cores."
    rows = []
    for workers in sorted({1, os.cpu_count()}):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            write_demo(Path(folder) / "demo", photos - 4, 4, workers=workers)
            seconds = (time.perf_counter() - start) / photos
        rows.append({"name": f"a photo of the demo, {workers} process{'es' * (workers > 1)}", "seconds": round(seconds, 3), "photos_a_second": round(1 / seconds, 2)})
    return rows
