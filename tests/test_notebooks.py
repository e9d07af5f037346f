"""The lessons of every notebook pass: one test a notebook."""
import pytest

from notebooks import execute, notebooks


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_lessons(path):
    execute(path)
