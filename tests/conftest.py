"""Fixtures: a small synthetic competition, its tables, one thread."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import nbs_lib  # noqa: F401 - before any test loads torch: it limits OpenMP's busy-waiting

ROOT = Path(__file__).resolve().parent.parent


def command(*argv: str, cwd: Path | None = None, **kwargs) -> subprocess.CompletedProcess:
    "Run python -m nbs_lib.run with `argv` and capture its output."
    program = [sys.executable, "-m", "nbs_lib.run", *map(str, argv)]
    return subprocess.run(program, capture_output=True, text=True, cwd=cwd or ROOT, **kwargs)


def make_once(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    "Return a folder that `make` fills once for all processes of a test run."
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / name, base / f"{name}.done"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def paddock(tmp_path_factory) -> Path:
    "Write a competition folder with 24 training photos and a hidden test of 4, with its truth."
    from nbs_lib.demo import write_demo

    folder = make_once(tmp_path_factory, "full", lambda f: write_demo(f / "csiro-biomass", 24, 4, seed=3))
    return folder / "csiro-biomass"


@pytest.fixture(scope="session")
def small_paddock(tmp_path_factory) -> Path:
    "Write a competition folder with 42 small training photos of 9 sites and 8 test photos, with its truth."
    from nbs_lib.demo import write_demo

    size = {"n_train": 42, "n_test": 8, "seed": 5, "sites": 9, "width": 400}
    return make_once(tmp_path_factory, "small", lambda f: write_demo(f / "paddock", **size)) / "paddock"


@pytest.fixture
def tables(paddock, tmp_path) -> Path:
    "Copy the tables of `paddock` and link its photos, to put faults into them."
    folder = tmp_path / "csiro-biomass"
    folder.mkdir()
    for name in ("train.csv", "test.csv", "sample_submission.csv"):
        shutil.copy(paddock / name, folder / name)
    for split in ("train", "test"):
        (folder / split).mkdir()
        for photo in (paddock / split).iterdir():
            os.symlink(photo, folder / split / photo.name)
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    "Compute on one thread, so that sums have one order whatever ran before; xdist uses the other cores."
    import torch

    torch.set_num_threads(1)
