"""What several tests share: a small synthetic competition, and one finished run of the whole chain on it."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nbs_lib  # noqa: F401 - before any test loads torch: it tells torch's threads how to wait

ROOT = Path(__file__).resolve().parent.parent
# The chain with the least work that still runs every stage for real.
SMALL = ["--set", "run.folds=2"]


def command(*argv: str, cwd: Path | None = None, **kwargs) -> subprocess.CompletedProcess:
    "python -m nbs_lib.run with `argv`, its output caught."
    return subprocess.run([sys.executable, "-m", "nbs_lib.run", *map(str, argv)], capture_output=True, text=True, cwd=cwd or ROOT, **kwargs)


@pytest.fixture(scope="session")
def paddock(tmp_path_factory) -> Path:
    "A competition folder of 24 training photos and 4 of a hidden test; the truth beside it."
    from nbs_lib.demo import write_demo

    return write_demo(tmp_path_factory.mktemp("paddock") / "csiro-biomass", n_train=24, n_test=4, seed=3)


@pytest.fixture
def tables(paddock, tmp_path) -> Path:
    "A copy of the tables whose photos are links, to put faults into."
    folder = tmp_path / "csiro-biomass"
    folder.mkdir()
    for name in ("train.csv", "test.csv", "sample_submission.csv"):
        shutil.copy(paddock / name, folder / name)
    for split in ("train", "test"):
        (folder / split).mkdir()
        for photo in (paddock / split).iterdir():
            os.symlink(photo, folder / split / photo.name)
    return folder


@pytest.fixture(scope="session")
def finished(paddock, tmp_path_factory) -> Path:
    "The output folder of one whole run on `paddock`."
    out = tmp_path_factory.mktemp("finished") / "out"
    done = command("--profile", "demo", "--input", paddock, "--output", out, *SMALL)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out
