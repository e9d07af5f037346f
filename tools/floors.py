"""Print the lowest versions that pyproject.toml admits, for pip.

`python tools/floors.py dev phone > floors.txt` writes a line `name==floor` for each dependency and
those of the named extras; `make test-lowest` installs them.
"""

import re
import sys
import tomllib
from pathlib import Path


def floors(project: dict, extras: list[str]) -> list[str]:
    """Return `name==floor` for each dependency of a [project] table; raise ValueError for one without."""
    optional = [line for extra in extras for line in project["optional-dependencies"][extra]]
    wanted = [*project["dependencies"], *optional]
    found = [(line, re.match(r"([\w.-]+)>=([\w.]+)", line)) for line in wanted]
    if bare := [line for line, floor in found if not floor]:
        raise ValueError(f"pyproject.toml: {bare[0]} has no floor; write {bare[0]}>=VERSION")
    return sorted({f"{floor[1]}=={floor[2]}" for _, floor in found})


if __name__ == "__main__":
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    print("\n".join(floors(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"], sys.argv[1:])))
