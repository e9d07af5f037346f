"""Execute the lesson cells of notebooks.

A notebook holds exported cells, lesson cells and, in a stage, cells marked `#| run`.
`python tools/notebooks.py [--write] [NAME]...` runs all but the last kind, each notebook in a kernel of its own;
`--write` puts the outputs into the notebook, as they are committed.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

import nbs_lib  # noqa: F401 - it tells torch's threads how to wait, and the kernels inherit it: a lesson may load torch first
from nbs_lib.run import own_kernel_manager

HERE = Path(__file__).resolve().parent.parent / "notebooks"
RUN = re.compile(r"^#\|\s*run\s*$", re.M)
# No network, progress bars or warnings: what a kernel prints is committed.
QUIET = {
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::DeprecationWarning,ignore:IProgress not found",
    "NBS_LESSON": "1",
}


def notebooks() -> list[Path]:
    return sorted(HERE.glob("[0-9][0-9]_*.ipynb"))


def execute(path: Path, timeout: int = 300) -> nbformat.NotebookNode:
    """Return the notebook at `path` with its lesson cells executed; raise CellExecutionError where one fails."""
    nb = nbformat.read(path, as_version=4)
    whole = list(nb.cells)
    nb.cells = [c for c in whole if c.cell_type != "code" or not RUN.search(c.source)]
    os.environ.update(QUIET)
    with tempfile.TemporaryDirectory() as home:  # lessons that write files write them here
        NotebookClient(
            nb,
            timeout=timeout,
            kernel_name="python3",
            kernel_manager_class=own_kernel_manager(),
            resources={"metadata": {"path": home}},
        ).execute()
    nb.cells = whole
    return nb


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("names", nargs="*", help="such as 20_inpaint; none: all")
    ap.add_argument("--write", action="store_true")
    a = ap.parse_args()
    for path in notebooks():
        if a.names and path.stem not in a.names:
            continue
        print(path.stem, flush=True)
        nb = execute(path)
        if a.write:
            temporary = path.with_suffix(".tmp-write")
            nbformat.write(nb, temporary)
            temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
