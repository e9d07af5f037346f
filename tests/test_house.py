"""Notebooks and library agree, imports run one way, no file contains a path of a machine."""
import ast
import builtins
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from comments import read_comments, write_comments

from nbs_lib import (
    backbones,
    biomass_net,
    boosting,
    fold_training,
    fusion,
    inpaint,
    members,
    runtime,
    targets,
    validation,
)
from nbs_lib.run import STAGES
from nbs_lib.runtime import InputError
from nbs_lib.settings import KEYS, SECTIONS, SETTING_CHOICES, load_settings

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXPORTING = [p for p in NOTEBOOKS if p.stem != "00_overview"]
MODULES = {p.stem.partition("_")[2]: p for p in EXPORTING}


def imports(path: Path) -> set[str]:
    "Return the modules of nbs_lib that a source file imports."
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):  # nbdev makes imports from nbs_lib relative
            module = "." * node.level + (node.module or "")
            if module in (".", "nbs_lib"):
                found |= {a.name for a in node.names} - {"__version__"}
            elif module.startswith((".", "nbs_lib.")):
                found.add(module.removeprefix("nbs_lib").lstrip(".").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("nbs_lib.")}
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    "A module imports only modules of notebooks with a lower number."
    found = imports(ROOT / "nbs_lib" / f"{name}.py")
    assert found <= MODULES.keys(), f"{name} imports {sorted(found - MODULES.keys())}"
    below = sorted(n for n in found if MODULES[n].name >= MODULES[name].name)
    assert not below, f"{name} imports modules of later notebooks: {below}"


@pytest.mark.parametrize("name", MODULES)
def test_exported_code_has_explicit_imports_and_needs_no_nbdev(name):
    source = (ROOT / "nbs_lib" / f"{name}.py").read_text()
    assert not re.search(r"^\s*from \S+ import \*", source, re.M)
    assert not re.search(r"^\s*(from|import) (nbdev|fastcore)\b", source, re.M)


def test_library_and_notebooks_agree(tmp_path):
    """nbdev-export and nbdev-clean change nothing: notebooks and library are committed together."""
    for name in ("notebooks", "nbs_lib"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    before = snapshot(tmp_path)
    for command in ("nbdev-clean", "nbdev-export"):
        program = str(Path(sys.executable).with_name(command))
        done = subprocess.run([program], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    after = snapshot(tmp_path)
    drifted = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    assert not drifted, f"run nbdev-export and nbdev-clean, and commit: {drifted}"


@pytest.mark.parametrize("name", MODULES)
def test_a_program_uses_nothing_defined_below_its_main_guard(name):
    "What is defined below `if __name__ == ...` does not exist yet when the program above it runs."
    body = parse_module(name).body
    conditions = {i: ast.unparse(node.test) for i, node in enumerate(body) if isinstance(node, ast.If)}
    cut = min((i for i, test in conditions.items() if "__name__" in test), default=len(body))
    defined = set()
    for node in body[cut + 1 :]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        if isinstance(node, ast.Assign):
            defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    above = [n for node in body[: cut + 1] for n in ast.walk(node)]
    used = {n.id for n in above if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    assert not defined & used, f"{name}: {sorted(defined & used)} are defined below the main guard"


@pytest.mark.parametrize("name", MODULES)
def test_text_files_have_an_explicit_encoding(name):
    "Files are UTF-8 whatever the encoding of the machine is."
    for node in ast.walk(parse_module(name)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
            call = f"{name}.py:{node.lineno}: {ast.unparse(node.func)}"
            assert "encoding" in {k.arg for k in node.keywords}, f"{call} without an encoding"


def parse_module(name: str) -> ast.Module:
    return ast.parse((ROOT / "nbs_lib" / f"{name}.py").read_text(encoding="utf-8"))


def snapshot(root: Path) -> dict[str, bytes]:
    paths = [p for folder in ("notebooks", "nbs_lib") for p in sorted((root / folder).glob("*.[ip][py]*"))]
    return {str(p.relative_to(root)): p.read_bytes() for p in paths if p.is_file()}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_can_be_browsed(path):
    """Small, with outputs, a kernelspec, no machine paths, no warnings, no error outputs."""
    assert path.stat().st_size < 600_000
    nb = nbformat.read(path, as_version=4)
    assert nb.metadata.kernelspec.name == "python3"
    first = next(c for c in nb.cells if c.cell_type == "markdown").source
    assert first.startswith("# ") and "\n> " in first, "a notebook begins with H1 and a > line"
    assert any(c.outputs for c in nb.cells if c.cell_type == "code"), "the notebook shows nothing"
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", cell.source
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"/(home|root|work|tmp|Users)/", text), f"a path of a machine: {text[:200]}"
            assert "Warning:" not in text, text[:300]


METAPHORS = "rooms? houses? walls? shelf teams? desks? tally voices? luck believes? glances? told tells said"


def exported_cells(path: Path) -> list[str]:
    cells = nbformat.read(path, as_version=4).cells
    return [c.source for c in cells if c.cell_type == "code" and c.source.startswith("#| export")]


@pytest.mark.parametrize("name", MODULES)
def test_words_are_those_of_the_field(name):
    "Exported code and settings use no metaphors (CONTRIBUTING.md)."
    for source in [*exported_cells(MODULES[name]), (ROOT / "settings.ini").read_text(encoding="utf-8")]:
        found = re.search(rf"\b({METAPHORS.replace(' ', '|')})\b", source, re.I)
        assert not found, f"{name}: '{found[0]}' in: {source[max(0, found.start() - 60) : found.end() + 60]}"


@pytest.mark.parametrize("name", MODULES)
def test_a_cell_holds_one_idea(name):
    long = [source for source in exported_cells(MODULES[name]) if len(source.splitlines()) - 1 > 40]
    assert not long, f"{name}: an exported cell of {len(long[0].splitlines())} lines: {long[0][:80]}"


@pytest.mark.parametrize("stage", STAGES.values())
def test_run_cells_stand_alone(stage):
    "A run executes only these: they open the run, call the stage, and import what they use."
    cells = nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", as_version=4).cells
    cells = [c for c in cells if c.source.startswith("#| run") or "parameters" in c.metadata.get("tags", [])]
    sources = [c.source for c in cells]
    tree = ast.parse("\n".join(sources))
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    bound = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    bound |= {a.name.partition(".")[0] for n in imports for a in n.names}
    assert not {n.id for n in names} - bound - set(dir(builtins))
    text = "".join(sources)
    assert "open_here(" in text and f"run_{stage.partition('_')[2]}(run)" in text


def test_a_name_has_one_meaning():
    "No two modules export the same name."
    homes = {}
    for name in MODULES:
        tree = ast.parse((ROOT / "nbs_lib" / f"{name}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and node.name != "main":
                homes.setdefault(node.name, []).append(name)
    twice = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert not twice, twice


def test_submit_imports_without_the_tools_of_a_notebook():
    """The offline submission needs neither nbdev nor papermill nor matplotlib."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.split('.')[0] in {'nbdev', 'fastcore', 'papermill', 'matplotlib', 'nbconvert', 'execnb'}:
            raise ImportError(f'{name} is not there')
sys.meta_path.insert(0, Refuse())
import nbs_lib.submit
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_file_contains_a_path_of_a_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not [name for name in listed.stdout.split() if (ROOT / name).is_symlink()], "a link is a path"
    endings = (".py", ".md", ".ini", ".toml", ".txt", "Makefile", ".json", "run")
    for name in listed.stdout.split():
        if name.endswith(endings) and name != "tests/test_house.py":
            assert not re.search(r"/(root|work|home)/\w", (ROOT / name).read_text()), name


def test_comments_of_settings_ini_are_those_of_the_dataclasses():
    text = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert write_comments(text) == text, "run python tools/comments.py"


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_has_a_comment(section):
    comments = read_comments(section)
    assert comments.keys() == KEYS[section].keys() and all(comments.values())


def test_names_in_settings_are_those_of_the_modules():
    "A mixer, head or rule that is added to its module can be chosen; one that is gone is refused."
    tables = {
        "run.precision": runtime.PRECISIONS, "inpaint.rule": inpaint.RULES,
        "train_dinov3.poolings": backbones.POOLINGS, "frozen.poolings": backbones.POOLINGS,
        "train_dinov3.views": backbones.VIEWS, "train_dinov3.fusion": (*fusion.FUSIONS, "none"),
        "train_dinov3.order": fusion.ORDERS, "train_dinov3.head": biomass_net.CHOICES["head"],
        "train_dinov3.aux": biomass_net.AUX, "train_dinov3.select": fold_training.SELECT,
        "train_dinov3.schemes": validation.SCHEMES, "boosting.members": ("ridge", *members.BOOSTERS),
        "boosting.transform": members.TRANSFORMS, "boosting.reconcile": boosting.RECONCILE,
    }
    assert {key: set(SETTING_CHOICES[key]) for key in tables} == {key: set(tables[key]) for key in tables}
    for name in SETTING_CHOICES["ensemble.weighting"]:
        assert targets.make_weighting(name, np.random.default_rng(0).normal(size=(20, 5))).shape == (5, 5)


@pytest.mark.parametrize("where", SETTING_CHOICES)
def test_a_wrong_name_is_refused_when_settings_are_read(where):
    section, _, key = where.partition(".")
    assert all(name in read_comments(section)[key] for name in SETTING_CHOICES[where])
    with pytest.raises(InputError, match=rf"^{where}: unknown \(shfit\); choose from \w+"):
        load_settings(overrides=[f"{where}=shfit"])


@pytest.mark.parametrize(("given", "kept"), [({}, "300"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_openmp_busy_waiting_is_limited_before_torch_is_loaded(given, kept):
    "OpenMP reads the variable once, when torch is loaded; a value of the user is kept."
    code = "import os, sys; import nbs_lib; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | given
    run = {"capture_output": True, "text": True, "check": True, "cwd": ROOT, "env": env}
    assert subprocess.run([sys.executable, "-c", code], **run).stdout.split() == ["False", kept]
