"""What the README tells people to type works, and what it points at is there.

Commands that take minutes (`make demo`, `make test`, `make run`) are run whole by other tests and by CI; here
make prints what it would do, and each inner command is parsed by the program that would get it. The pages are
free to change: commands are found in fenced blocks and between backticks.
"""

import ast
import contextlib
import functools
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import tables
import torch
from conftest import ROOT

from nbs_lib import fusion
from nbs_lib.biomass_net import ModelConfig, build_model
from nbs_lib.run import choose_stages, parse_run_call
from nbs_lib.runtime import InputError
from nbs_lib.settings import SECTIONS, load_settings
from nbs_lib.targets import TARGETS

README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
PROGRAMS = (
    "make",
    "python",
    "python3",
    "papermill",
    "pip",
    "nbdev-export",
    "nbdev-clean",
    "git",
    "cd",
    "kaggle",
    "jupyter",
    "pytest",
)
VALUES = {
    "DIR": "some/folder",
    "OUT": "runs/x",
    "STAGE": "eda",
    "H": "1",
    "N": "1",
    "P": "demo",
    "PROFILE": "demo",
    "recipe": "recipe",
}


def commands(text: str) -> list[str]:
    "Return the command lines of a page: of its fenced blocks, continued lines joined, and between backticks."
    found, outside = [], []
    for k, part in enumerate(re.split(r"^```", text, flags=re.M)):
        if k % 2 == 0:
            outside.append(part)
            continue
        language, _, body = part.partition("\n")
        if language.strip() in ("", "sh", "bash", "shell", "console", "text"):
            body = re.sub(r"\s*\\\n\s*|\n\s+(?=\[?-)", " ", body)
            found += [line.removeprefix("$ ").split(" #")[0].strip() for line in body.splitlines()]
    found += re.findall(r"`([^`\n]+)`", "".join(outside))
    return [
        line
        for line in found
        if line.split()[:1]
        and line.split()[0] in PROGRAMS
        and len(line.split()) > 1
        or line in ("nbdev-export", "nbdev-clean")
    ]


def plain(line: str) -> list[str]:
    "The words of a command: `[--only STAGE]...` and `{a,b}` as one would type them, placeholders filled in."
    line = re.sub(
        r"--(\w[\w-]*)/--no-\1",
        r"--\1",
        re.sub(r"\{(\w+)[,|][^}]*\}", r"\1", line.replace("...", "").replace("…", "")),
    )
    line = (
        re.sub(r"[\[\]]", " ", line)
        .replace("stage.key=value", "run.seed=1")
        .replace("STAGE.KEY=VALUE", "run.seed=1")
    )
    return [VALUES.get(word, word) for word in shlex.split(line)]


# ---- each kind of command, checked by what would receive it


def check_make(words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        if re.match(r"\S*python -m (nbs_lib|pytest)", line):
            check_python(["python", *shlex.split(line)[1:]])
    for word in words[1:]:
        if word.startswith("PROFILE="):
            load_settings(word.partition("=")[2])


def check_python(words: list[str]) -> None:
    if words[1] == "-m" and words[2] == "nbs_lib.run":
        args = parse_run_call(words[3:])
        load_settings(args.profile, args.preset, args.overrides)
        choose_stages(args.only), choose_stages((), args.start)  # a usage line names both, a call gives one
    elif words[1] == "-m" and words[2] in ("papermill", "pip", "pytest", "venv", "build"):
        {"papermill": check_papermill, "pip": check_pip}.get(words[2], lambda w: None)(words[2:])
    elif words[1] == "-m":
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file() and words[2].startswith(
            ("nbs_lib.", "benchmarks.")
        ), f"there is no module {words[2]}"
        commands = re.findall(r"[\w-]+", (re.search(r"\{([\w,-]+)\}", help_of(words[2])) or [""])[0])
        part = next(
            ([w] for w in words[3:] if w in commands), []
        )  # a command of the module, with flags of its own
        check_flags(words[3:], help_of(words[2]) + help_of(words[2], *part))
    elif not words[1].startswith("-"):
        assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"
        check_flags(words[2:], (ROOT / words[1]).read_text())


@functools.cache
def help_of(module: str, *part: str) -> str:
    "Return what `python -m module part --help` prints, run in this process."
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setattr(sys, "argv", [module, *part, "--help"])
        with warnings.catch_warnings(action="ignore"), pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__")  # warns where the module is imported already
    assert not end.value.code
    return shown.getvalue()


def check_flags(words: list[str], known: str) -> None:
    for word in words:
        flag = word.partition("=")[0]
        assert not flag.startswith("--") or re.search(rf"{re.escape(flag)}\b(?!-)", known), (
            f"{flag} is not understood"
        )


def check_papermill(words: list[str]) -> None:
    path = ROOT / words[1]
    assert path.is_file(), f"there is no notebook {words[1]}"
    cell = next(
        c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", [])
    )
    known = {
        t.id for node in ast.parse(cell.source).body if isinstance(node, ast.Assign) for t in node.targets
    }
    given = {words[k + 1] for k, word in enumerate(words) if word in ("-p", "-r")}
    assert given <= known, f"{words[1]} has no parameter {', '.join(sorted(given - known))}"


def check_pip(words: list[str]) -> None:
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M), (
                f"there is no extra {extra}"
            )


def check_nbdev(words: list[str]) -> None:
    assert shutil.which(words[0], path=f"{Path(sys.executable).parent}") or shutil.which(words[0]), (
        f"{words[0]} is not installed"
    )


def elsewhere(words: list[str]) -> None:
    "git, cd, kaggle, jupyter: other people's programs, with what they need out of the network."


CHECKS = {
    "make": check_make,
    "python": check_python,
    "python3": check_python,
    "papermill": check_papermill,
    "pip": check_pip,
    "pytest": lambda words: None,
    "nbdev-export": check_nbdev,
    "nbdev-clean": check_nbdev,
    "git": elsewhere,
    "cd": elsewhere,
    "kaggle": elsewhere,
    "jupyter": elsewhere,
}


def check(line: str) -> None:
    for one in re.split(r" && | ; ", line):
        words = plain(one) if "pip" not in one else shlex.split(one)
        try:
            CHECKS[words[0]](words)
        except InputError as e:
            raise AssertionError(str(e)) from e


LINES = sorted({line for page in PAGES for line in commands(page.read_text())})


@pytest.mark.parametrize("line", LINES)
def test_command_can_be_typed(line):
    check(line)


def test_the_two_commands_are_there():
    assert {"make demo", "make test"} <= set(LINES) and any(
        line.startswith("make run DATA=") for line in LINES
    )


# ---- settings, links, files


def check_settings(text: str) -> None:
    for setting in re.findall(r"--set[ =]([\w.]+=[^\s`\]]+)", text):
        if setting.lower() != "stage.key=value":
            assert setting.partition(".")[0] in SECTIONS, (
                f"no section of settings.ini is called {setting.partition('.')[0]}"
            )
            load_settings("demo", overrides=[setting])


def anchors(text: str) -> set[str]:
    "The anchors GitHub gives the headings of `text`."
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.M)
    }


def check_links(text: str, folder: Path = ROOT) -> None:
    "Fail where a link in `text`, a page in `folder`, leads to no file or heading."
    prose = re.sub(r"^```(?!mermaid).*?^```", "", text, flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose):
        target, _, anchor = "".join(link).partition("#")
        if not re.match(r"\w+:", target):
            assert (folder / target).exists(), f"there is no {target}"
            if anchor and (not target or target.endswith(".md")):
                assert anchor in anchors((folder / target).read_text() if target else text), (
                    f"there is no heading #{anchor} in {target or 'this page'}"
                )
    for name in re.findall(
        r"\b(?:notebooks/\d\d_\w+\.ipynb|tests/\w+\.\w+|tools/\w+\.py|benchmarks/\w+\.\w+|docs/\w+\.md|nbs_lib/\w+\.py|datasets-metadata/[\w./-]*\w)",
        prose,
    ):
        assert (ROOT / name).exists(), f"there is no {name}"


def test_settings_that_are_named_exist():
    for page in PAGES:
        check_settings(page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    check_links(page.read_text(), page.parent)


def test_readme_is_short():
    assert README.stat().st_size <= 10_240


def test_every_environment_variable_is_explained():
    internal = {"NBS_LESSON"}  # set by tools/notebooks.py alone
    used = {
        name
        for path in (ROOT / "nbs_lib").glob("*.py")
        for name in re.findall(r"NBS_[A-Z_]+", path.read_text())
    }
    assert used - internal <= set(re.findall(r"NBS_[A-Z_]+", README.read_text()))


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(path):
    check_links(
        "\n\n".join(
            cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"
        ),
        path.parent,
    )


# ---- tables and pictures


def test_tables_are_those_of_the_files():
    stale = [name for page in tables.PAGES for name in tables.fill((ROOT / page).read_text())[1]]
    assert not stale, f"{', '.join(stale)}: python tools/tables.py --write"


def test_every_table_has_its_place():
    assert {m[1] for page in tables.PAGES for m in tables.MARKS.findall((ROOT / page).read_text())} == {
        *tables.BLOCKS,
        "faults",
    }


def test_every_benchmark_is_described():
    names = {path.name for path in (ROOT / "benchmarks").glob("[a-z]*.py")}
    described = re.findall(r"^\| \[(\w+\.py)\]", (ROOT / "benchmarks/README.md").read_text(), re.M)
    assert set(described) == names


def test_synthetic_and_real_scores_never_share_a_table(tmp_path, monkeypatch):
    for kind, r2 in (("synthetic", 0.9), ("real", 0.6)):
        pd.DataFrame(
            [
                {
                    "model": "ensemble",
                    "judged_on": "grouped",
                    "r2": r2,
                    "low": None,
                    "high": None,
                    "photos": 9,
                    **dict.fromkeys(TARGETS, -0.001),
                }
            ]
        ).to_csv(tmp_path / f"{kind}_x.csv", index=False)
        (tmp_path / f"{kind}_x.json").write_text(
            json.dumps(
                {
                    "photographs": kind,
                    "profile": "x",
                    "preset": "",
                    "overrides": [],
                    "seed": 1,
                    "photos": 9,
                    "sites": 3,
                    "date": "",
                    "seconds": {"eda": 60},
                    "peak_gb": 1,
                    "machine": {},
                }
            )
        )
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for view in (tables.format_scores, tables.format_summary):
        assert (
            "0.900" in view("synthetic")
            and "0.600" not in view("synthetic")
            and "9 real photos" in view("real")
        )
    assert "−0.00" not in tables.format_scores("real")
    assert "Nothing is kept here yet" in tables.format_bench()
    assert tables.fill("<!-- real:begin -->\nold\n<!-- real:end -->")[1] == ["real"]


def test_picture_is_small_and_described():
    alt, path = re.search(r"!\[([^\]]{30,})\]\((results/\w+\.png)\)", README.read_text()).groups()
    assert (ROOT / path).stat().st_size < 300_000 and "synthetic" in alt


# ---- what the page says one may add


def test_another_backbone():
    """The first sentence of that list, with a smaller twin of the same family."""
    assert (
        "`--set train_dinov3.backbone=convnext_tiny --set train_dinov3.weights=FILE`"
        in CONTRIBUTING.read_text()
    )
    net = build_model(ModelConfig("test_convnext", dim=16, layers=1, probe=False), "random").eval()
    assert net(torch.rand(2, 2, 3, 64, 64)).shape == (2, 3)


def test_another_mixer(monkeypatch):
    class Swap(torch.nn.Module):
        def __init__(self, dim, **kw):
            super().__init__()

        def forward(self, tokens):
            return tokens.flip(1)

    monkeypatch.setitem(fusion.FUSIONS, "swap", Swap)
    net = build_model(
        ModelConfig("test_convnext", fusion="swap", dim=16, layers=1, probe=False), "random"
    ).eval()
    assert net(torch.rand(2, 2, 3, 64, 64)).shape == (2, 3)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "A copy of the suite to change."
    root = tmp_path_factory.mktemp("clone") / "suite"
    shutil.copytree(
        ROOT,
        root,
        ignore=shutil.ignore_patterns(
            ".venv*", ".git", "runs", "build", "dist", "wheelhouse", "*.egg-info", "__pycache__"
        ),
    )
    return root


def in_clone(clone, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=clone,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(clone)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def change(path: Path, old: str, new: str) -> None:
    nb = nbformat.read(path, as_version=4)
    cell = next(c for c in nb.cells if old in c.source)
    cell.source = cell.source.replace(old, new, 1)
    nbformat.write(nb, path)


COUNT = """#| export
from nbs_lib.runtime import write_json
from nbs_lib.stages import Run, stage


@stage('count', reads=('input/train/*',))
def run_count(run: Run) -> dict:
    'Count the photos.'
    found = {'photos': len(list((run.input / 'train').iterdir()))}
    write_json(run.artefact_path('count.json'), found)
    return found"""
RUN_COUNT = """#| run
from nbs_lib.count import run_count
from nbs_lib.run import open_here

run_count(open_here('count', input, output, profile, preset, overrides))"""
EXPORT = """
from pathlib import Path
from nbdev.export import nb_export
for path in sorted(Path('notebooks').glob('[0-9]*.ipynb')):
    nb_export(path, 'nbs_lib')
"""
BRIGHTEST = """
import torch
from nbs_lib.biomass_net import ModelConfig, build_model
config = ModelConfig('test_convnext', head='brightest', dim=16, layers=1, probe=False)
print(build_model(config, 'random').eval()(torch.rand(2, 2, 3, 64, 64)).shape)
"""


def test_another_stage_and_another_head(clone, paddock, tmp_path):
    """As the page says: notebook and a line in STAGES; a branch and a name. Exported, and run."""
    stage = nbformat.read(clone / "notebooks/40_siglip.ipynb", as_version=4)
    parameters = next(c for c in stage.cells if "parameters" in c.metadata.get("tags", []))
    sources = "#| default_exp count", COUNT, RUN_COUNT
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=[cells[0], parameters, *cells[1:]], metadata=stage.metadata)
    nbformat.write(notebook, clone / "notebooks/45_count.ipynb")
    submit = '"submit": "60_submit"'
    change(clone / "notebooks/90_run.ipynb", submit, f'{submit}, "count": "45_count"')
    net = clone / "notebooks/32_biomass_net.ipynb"
    change(net, '"density", "none")', '"density", "none", "brightest")')
    branch = '        if self.kind == "brightest":\n            tokens = tokens.amax(1, keepdim=True)\n'
    old = '        if self.kind != "density":\n'
    change(net, old, branch + old)
    in_clone(clone, "-c", EXPORT)
    out = tmp_path / "out"
    words = "-m nbs_lib.run --profile demo --only count --no-report".split()
    in_clone(clone, *words, "--input", str(paddock), "--output", str(out))
    assert json.loads((out / "artefacts/count.json").read_text()) == {"photos": 24}
    assert "[2, 3]" in in_clone(clone, "-c", BRIGHTEST)


# ---- the checks themselves can fail


def test_commands_are_found():
    text = """Run `papermill a.ipynb b.ipynb` or `nbdev-clean`, not `make`.
```
make demo   # minutes
runs/demo/x.csv  the file
python -m nbs_lib.run --profile P \\
  --input DIR
          [--only STAGE]...
```
```mermaid
make --> test
```
"""
    assert commands(text) == [
        "make demo",
        "python -m nbs_lib.run --profile P --input DIR [--only STAGE]...",
        "papermill a.ipynb b.ipynb",
        "nbdev-clean",
    ]
    assert plain(
        "python -m nbs_lib.run [--sandbox {auto,none}] [--report/--no-report] [--set stage.key=value]..."
    )[3:] == ["--sandbox", "auto", "--report", "--set", "run.seed=1"]


@pytest.mark.parametrize(
    "line",
    [
        "make harvest",
        "make run PROFILE=moon DATA=x",
        "python -m nbs_lib.run --moon demo",
        "python -m nbs_lib.run --set demo.n_trian=3",
        "python -m nbs_lib.run --only mow",
        "python -m nbs_lib.moon",
        "python -m benchmarks.bench --onyl fusion",
        "papermill notebooks/99_moon.ipynb out.ipynb",
        "papermill notebooks/41_frozen.ipynb out.ipynb -p inptu x",
        "pip install '.[moon]'",
        "python tools/moon.py",
    ],
)
def test_wrong_command_is_found(line):
    with pytest.raises(AssertionError):
        check(line)


@pytest.mark.parametrize(
    ("find", "text"),
    [
        (check_links, "[x](notebooks/99_moon.ipynb)"),
        (check_links, "[x](#no-such-heading)"),
        (check_links, "as tests/moon.py says"),
        (check_links, '<img src="moon.png">'),
        (check_settings, "`--set moon.key=1`"),
        (check_settings, "--set demo.n_train=many"),
    ],
)
def test_wrong_pointer_is_found(find, text):
    with pytest.raises((AssertionError, InputError)):
        find(text)
