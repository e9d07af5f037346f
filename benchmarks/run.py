"""What the runner costs: stages bare and in the runner, and the measuring of memory."""
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from nbs_lib.demo import write_demo
from nbs_lib.isolation import measure_memory
from nbs_lib.run import notebook_path
from nbs_lib.runtime import read_json

BARE = """
import io, json, sys
names = json.loads(sys.argv[2])
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if "".join(cell["source"]).startswith("#| run"):
        exec("".join(cell["source"]), names)
if plt := sys.modules.get("matplotlib.pyplot"):
    for number in plt.get_fignums():  # a notebook draws them too
        plt.figure(number).savefig(io.BytesIO(), bbox_inches="tight")
"""


def bench_run(photos: int = 40, stages: tuple[str, ...] = ("eda", "inpaint")) -> list[dict]:
    "Time stages bare and in the runner, where 3 s and 5 % more are allowed."
    rows, bare = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = str(write_demo(folder / "csiro-biomass", photos, 2))
        call = {"input": source, "output": str(folder / "bare"), "profile": "demo", "preset": "",
                "overrides": []}
        for stage in stages:
            command = [sys.executable, "-c", BARE, str(notebook_path(stage)), json.dumps(call)]
            bare[stage], cpu = time_command(command)
            rows.append({"name": f"{stage}, bare", "seconds": round(bare[stage], 1),
                         "note": f"{cpu:.1f} s of CPU"})
        for stage in stages:
            command = [sys.executable, "-m", "nbs_lib.run", "--input", source, "--only", stage, "--no-report"]
            whole, cpu = time_command([*command, "--output", str(folder / "run")])
            entries = read_json(folder / "run" / "run.json")["stages"]
            inside = next(s["seconds"] for s in entries if s["name"] == stage)
            more, allowed = inside - bare[stage], 3 + 0.05 * bare[stage]
            note = f"{more:+.1f} s, allowed +{allowed:.1f} s; {cpu:.1f} s of CPU, start of the run included"
            rows.append({"name": f"{stage}, in the runner", "seconds": inside, "note": note})
            rows.append({"name": f"start and end of a run of {stage} alone", "note": "once a run",
                         "seconds": round(whole - inside, 1)})
    return rows


def bench_memory(gigabytes: float = 1.0, processes: int = 4, repeats: int = 20) -> list[dict]:
    "Time one measurement of the memory of several processes, which the runner takes five times a second."
    size = int(gigabytes * 2**30 / processes)
    code = f"import time; a = bytearray({size}); a[::4096] = b'x' * len(a[::4096]); print(flush=True); "
    command = [sys.executable, "-c", code + "time.sleep(300)"]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(processes)]
    for child in children:
        child.stdout.readline()
    tree, rows = [psutil.Process(child.pid) for child in children], []
    for name, method in (("resident", "memory_info"), ("proportional", "memory_full_info")):
        start = time.perf_counter()
        for _ in range(repeats):
            measured = measure_memory(tree, method)
        seconds = (time.perf_counter() - start) / repeats
        rows.append({"name": f"{name} memory of {processes} processes", "seconds": round(seconds, 5),
                     "note": f"{measured:.2f} GB"})
    for child in children:
        child.kill()
        child.wait()
    return rows


def time_command(command: list[str]) -> tuple[float, float]:
    "Return the wall-clock and CPU seconds of `command`, its children included."
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "MPLBACKEND": "agg"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu
