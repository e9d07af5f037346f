"""The lessons of every notebook pass, and show what is committed: the same pictures, words and numbers."""
import base64
import importlib.metadata
import io
import multiprocessing
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
from conftest import ROOT
from PIL import Image

from nbs_lib.isolation import kill_processes
from notebooks import QUIET, RUN, list_notebooks

EXACT = ("04_targets", "05_tables")  # arithmetic alone: the same pixels under the same pins
PACKAGES = ("numpy==", "pandas==", "scikit-learn==", "matplotlib==", "pillow==")
PINS = [line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith(PACKAGES)]
SAME = all(importlib.metadata.version(name) == pin for name, pin in (line.split("==") for line in PINS))
INLINE = "module://matplotlib_inline.backend_inline"
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
# Lessons whose output depends on the clock or the machine: how their cells begin.
OF_THE_MACHINE = {"89_isolation": ("code = \"import os, time; a = b'x'",)}


def list_lessons(path: Path) -> list[nbformat.NotebookNode]:
    nb = nbformat.read(path, as_version=4)
    return [c for c in nb.cells if c.cell_type == "code" and not RUN.search(c.source)]


def run_lessons(path: Path) -> list[dict[str, str]]:
    "Execute the lessons of a notebook in this process; return what each cell shows, by MIME type."
    import pandas as pd
    from ipykernel.zmqshell import ZMQInteractiveShell
    from IPython.utils.capture import capture_output

    os.environ.update({**QUIET, "MPLBACKEND": INLINE})
    shell, shown = ZMQInteractiveShell.instance(), []
    shell._showtraceback = lambda *_: None  # there is no front end: the error is raised
    shell.enable_gui = lambda *_: None  # that of `%matplotlib inline`
    shell.enable_matplotlib("inline")
    pd.set_option("display.max_columns", 20)  # as in a notebook
    with tempfile.TemporaryDirectory() as home:
        os.chdir(home)
        for cell in list_lessons(path):
            with capture_output() as captured:
                shell.display_trap.hook = sys.displayhook  # keeps the last expression of the cell
                result = shell.run_cell(cell.source)
            result.raise_error()
            data = {mime: value for output in captured.outputs for mime, value in output.data.items()}
            shown.append(data | ({"stdout": captured.stdout} if captured.stdout else {}))
        os.chdir("/")
    kill_processes(psutil.Process().children(recursive=True))  # joblib's wait five minutes for more work
    return shown


def read_outputs(path: Path) -> list[dict[str, str]]:
    "Return what each lesson of a notebook shows as it is committed, by MIME type."
    shown = []
    for cell in list_lessons(path):
        stdout = "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")
        data = {mime: value for output in cell.outputs for mime, value in output.get("data", {}).items()}
        shown.append(data | ({"stdout": stdout} if stdout else {}))
    return shown


@pytest.fixture(scope="module")
def forks():
    "A way to start processes that have loaded the large packages already; each notebook gets one."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nbs_lib.predict", "matplotlib.pyplot", "ipykernel.zmqshell"])
    with pytest.MonkeyPatch.context() as environment:  # what the packages read when they are loaded
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "NO_ALBUMENTATIONS_UPDATE"):
            environment.setenv(name, "1")
        yield context


def compare_text(old: str, new: str) -> None:
    "Assert that words are equal, and numbers within 1e-3 or one unit of the last digit shown."
    old, new = (" ".join(text.split()) for text in (old, new))
    assert NUMBER.sub("#", old) == NUMBER.sub("#", new)
    for a, b in zip(NUMBER.findall(old), NUMBER.findall(new), strict=True):
        digit = 0.0 if "e" in a else 10.0 ** -len(a.partition(".")[2])
        assert abs(float(a) - float(b)) <= max(1e-3 * abs(float(a)), 1.01 * digit * ("." in a)), (old, new)


@pytest.mark.parametrize("path", list_notebooks(), ids=lambda p: p.stem)
def test_lessons(path, forks):
    with ProcessPoolExecutor(1, mp_context=forks) as executor:
        again = executor.submit(run_lessons, path).result(timeout=600)
    for cell, old, new in zip(list_lessons(path), read_outputs(path), again, strict=True):
        assert sorted(old) == sorted(new), f"make notebooks, for the output of other code: {cell.source}"
        if not SAME or any(cell.source.startswith(start) for start in OF_THE_MACHINE.get(path.stem, ())):
            continue
        for mime in {"text/plain", "stdout"} & old.keys():
            compare_text(old[mime], new[mime])
        if path.stem in EXACT and "image/png" in old:
            assert np.array_equal(read_picture(old["image/png"]), read_picture(new["image/png"]))


def read_picture(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.mark.parametrize("path", list_notebooks(), ids=lambda p: p.stem)
def test_first_screen_says_where_you_are(path):
    """H1, what it gives the reader, and what is read and written."""
    first = next(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    assert re.match(r"# .+\n+> .+\n", first) and len(first) < 1500
    assert re.search(r"\*\*You are here:?\*\*.*→", first)
