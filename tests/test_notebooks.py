"""The lessons of every notebook pass, and the outputs that are committed are those that executing gives: one test a notebook."""
import base64
import importlib.metadata
import io
import re

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from notebooks import RUN, execute, notebooks

EXACT = ("04_targets", "05_tables")  # arithmetic alone: the same text and the same pixels wherever the pins are the same

PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if line.startswith(("numpy==", "pandas==", "scikit-learn==", "matplotlib==", "pillow==")))
SAME = all(importlib.metadata.version(name) == pin for name, pin in PINNED.items())  # other than in Kaggle's image


def shown(nb: nbformat.NotebookNode) -> list[dict]:
    "What each lesson cell displays, by MIME type; printed lines are left out, for some tell seconds."
    cells = [c for c in nb.cells if c.cell_type == "code" and not RUN.search(c.source)]
    return [{mime: value for output in c.outputs for mime, value in output.get("data", {}).items()} for c in cells]


def picture(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_lessons(path):
    committed, again = shown(nbformat.read(path, as_version=4)), shown(execute(path))
    assert [sorted(c) for c in committed] == [sorted(c) for c in again], "the committed outputs are of other code: make notebooks"
    for old, new in zip(committed, again, strict=True) if SAME and path.stem in EXACT else ():
        assert old.get("text/plain") == new.get("text/plain")
        assert "image/png" not in old or np.array_equal(picture(old["image/png"]), picture(new["image/png"]))


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_first_screen_says_where_you_are(path):
    """H1, what it gives the reader, and what is read and written."""
    first = next(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    assert re.match(r"# .+\n+> .+\n", first) and re.search(r"\*\*You are here:?\*\*.*→", first) and len(first) < 1500
