"""The lessons of every notebook pass, and the committed outputs are those of the code."""
import base64
import importlib.metadata
import io
import re

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from notebooks import RUN, execute, list_notebooks

EXACT = ("04_targets", "05_tables")  # arithmetic alone: the same text and pixels under the same pins
PACKAGES = ("numpy==", "pandas==", "scikit-learn==", "matplotlib==", "pillow==")
PINS = [line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith(PACKAGES)]
SAME = all(importlib.metadata.version(name) == pin for name, pin in (line.split("==") for line in PINS))


def shown(nb: nbformat.NotebookNode) -> list[dict]:
    "Return what each lesson cell displays, by MIME type; printed lines may hold seconds and are left out."
    cells = [c for c in nb.cells if c.cell_type == "code" and not RUN.search(c.source)]
    return [{mime: v for output in c.outputs for mime, v in output.get("data", {}).items()} for c in cells]


def picture(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.mark.parametrize("path", list_notebooks(), ids=lambda p: p.stem)
def test_lessons(path):
    committed, again = shown(nbformat.read(path, as_version=4)), shown(execute(path))
    same = [sorted(c) for c in committed] == [sorted(c) for c in again]
    assert same, "the committed outputs are of other code: make notebooks"
    for old, new in zip(committed, again, strict=True) if SAME and path.stem in EXACT else ():
        assert old.get("text/plain") == new.get("text/plain")
        pictures = [picture(cell["image/png"]) for cell in (old, new) if "image/png" in cell]
        assert not pictures or np.array_equal(*pictures)


@pytest.mark.parametrize("path", list_notebooks(), ids=lambda p: p.stem)
def test_first_screen_says_where_you_are(path):
    """H1, what it gives the reader, and what is read and written."""
    first = next(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    assert re.match(r"# .+\n+> .+\n", first) and len(first) < 1500
    assert re.search(r"\*\*You are here:?\*\*.*→", first)
