"""The version ranges of pyproject.toml: each has a floor, and what is pinned lies in it."""
import re
import tomllib

import pytest
from conftest import ROOT
from floors import floors
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
RANGES = {r.name: r.specifier for r in map(Requirement, [*PROJECT["dependencies"], *OPTIONAL])}


def test_floors_are_written_for_pip():
    project = {"dependencies": ["numpy>=2.0", "albumentations>=2.0.8,<2.1"]}
    project["optional-dependencies"] = {"dev": ["numpy>=2.0", "ruff>=0.6"]}
    assert floors(project, ["dev"]) == ["albumentations==2.0.8", "numpy==2.0", "ruff==0.6"]
    with pytest.raises(ValueError, match="rich has no floor"):
        floors({"dependencies": ["rich"]}, [])


def test_every_dependency_has_a_floor():
    assert len(floors(PROJECT, list(PROJECT["optional-dependencies"]))) == len(RANGES)


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-kaggle.txt"])
def test_pins_lie_in_the_ranges(name):
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / name).read_text(encoding="utf-8"), re.M)
    known = [(package, version) for package, version in pins if package in RANGES]
    assert len(known) > 7
    assert not [pin for pin in known if not RANGES[pin[0]].contains(pin[1])]
