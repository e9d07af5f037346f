"""Execute the notebooks: their lessons, and on a finished demo run also the cells of their stages.

A notebook holds exported cells, lesson cells and, in a stage, cells marked `#| run`.
`python tools/notebooks.py [--run RUN] [--write] [NAME]...` executes each notebook in a kernel of its own.
Cells marked `#| run` are executed on the finished run RUN only; `--write` puts the outputs into the notebook.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

import nbs_lib  # noqa: F401 - limits OpenMP's busy waiting before a lesson loads torch; kernels inherit it
from nbs_lib.run import own_kernel_manager

ROOT = Path(__file__).resolve().parent.parent
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


def list_notebooks() -> list[Path]:
    """Return the notebooks in the order of reading."""
    return sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def execute(path: Path, run: Path | None = None, timeout: int = 300) -> nbformat.NotebookNode:
    """Return the notebook at `path` executed; cells marked `#| run` only on `run`, a finished run."""
    nb = nbformat.read(path, as_version=4)
    whole = list(nb.cells)
    skipped = [c for c in whole if c.cell_type == "code" and RUN.search(c.source) and not run]
    nb.cells = [c for c in whole if c not in skipped]
    parameters = next((c for c in whole if "parameters" in c.metadata.get("tags", [])), None)
    source = parameters.source if parameters else ""
    os.environ.update(QUIET)
    with tempfile.TemporaryDirectory() as home:  # lessons that write files write them here
        if run:  # relative names, so that no path of this machine is shown
            (Path(home) / "runs").symlink_to(run.resolve().parent)
            if parameters:
                folder = f"runs/{run.name}"
                parameters.source += f'\noutput, input = "{folder}", "{folder}/input/csiro-biomass"'
        NotebookClient(
            nb,
            timeout=timeout,
            kernel_name="python3",
            kernel_manager_class=own_kernel_manager(),
            resources={"metadata": {"path": home}},
        ).execute()
    if parameters:
        parameters.source = source
    nb.cells = whole
    return nb


def drop_last_pictures(nb: nbformat.NotebookNode, limit: int = 590_000) -> None:
    """Drop the last outputs of cells marked `#| run` until the notebook has at most `limit` bytes."""
    cells = [c for c in nb.cells if c.cell_type == "code" and RUN.search(c.source)]
    while len(nbformat.writes(nb).encode()) > limit and any(c.outputs for c in cells):
        next(c for c in reversed(cells) if c.outputs).outputs.pop()


def main() -> None:
    """Execute the named notebooks, all without a name."""
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("names", nargs="*", help="such as 20_inpaint; none: all")
    ap.add_argument("--run", type=Path, help="a finished demo run, for the cells of stages and the overview")
    ap.add_argument("--write", action="store_true")
    a = ap.parse_args()
    for path in list_notebooks():
        if a.names and path.stem not in a.names:
            continue
        print(path.stem, flush=True)
        nb = execute(path, a.run)
        if a.write:
            drop_last_pictures(nb)
            temporary = path.with_suffix(".tmp-write")
            nbformat.write(nb, temporary)
            temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
