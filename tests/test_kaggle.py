"""What goes to Kaggle: metadata, wheels, mounts, a rehearsed push, and the chain in a false Kaggle root."""
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from nbs_lib import kaggle
from nbs_lib.core import InputError, load_settings, mount_candidates, resolve_mount
from nbs_lib.demo import write_demo
from nbs_lib.ledger import add_entry, read_ledger
from nbs_lib.run import STAGES

SETTINGS = load_settings("kaggle", path=ROOT / "settings.ini")
NEW, OLD = 0, 1  # layouts of mounts


# Metadata


def test_metadata_is_what_the_settings_say():
    assert kaggle.stale_metadata(SETTINGS, ROOT / "datasets-metadata") == [], "python -m nbs_lib.kaggle metadata --write, and commit"


@pytest.mark.parametrize("name", kaggle.KERNELS)
def test_the_client_takes_every_kernel(name, tmp_path):
    files = kaggle.stage_kernel(kaggle.KERNELS[name], SETTINGS, tmp_path / name, kaggle.ON_KAGGLE)
    request = kaggle.rehearse(tmp_path / name)
    notebook = json.loads(request["text"])
    assert request["enableInternet"] is False and request["isPrivate"] is True
    assert request["competitionDataSources"] == ["csiro-biomass"]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3" and not any(c.get("outputs") for c in notebook["cells"])
    assert files[0][1] < 50_000


@pytest.mark.parametrize("name", kaggle.DATASETS)
def test_the_client_takes_every_dataset(name, tmp_path):
    dataset, source = kaggle.DATASETS[name], tmp_path / "source"
    file = source / dataset.sentinel(SETTINGS).replace("*", "0")
    file.parent.mkdir(parents=True)
    file.write_text("something")
    (source / "photos").mkdir()
    (source / "photos" / "halves.npy").write_text("big")
    sent = {n for n, _ in kaggle.stage_dataset(dataset, SETTINGS, tmp_path / name, source)}
    request = kaggle.rehearse(tmp_path / name)
    assert request["licenseName"] in kaggle.LICENCES and request["slug"] == dataset.slug(SETTINGS)
    assert sent == {str(file.relative_to(source))} | (set() if name == "trained-models" else {"photos/halves.npy"})


@pytest.mark.parametrize("change, told", [
    ({"title": "Ab"}, "at least five characters"),
    ({"title": "Another name altogether"}, "does not resolve"),
    ({"language": "cobol"}, "valid language"),
    ({"code_file": "nowhere.ipynb"}, "Source file not found"),
    ({"dataset_sources": ["no-owner"]}, "username"),
    ({"model_sources": ["a/b/c/d/first"]}, "integer"),
])
def test_what_the_client_refuses_is_told_in_one_line(change, told, tmp_path):
    kaggle.stage_kernel(kaggle.KERNELS["eda"], SETTINGS, tmp_path, kaggle.ON_KAGGLE)
    path = tmp_path / "kernel-metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=told):
        kaggle.rehearse(tmp_path)


@pytest.mark.parametrize("override, told", [
    ("kaggle.wheels_dataset=wheels of mine", "wants owner/slug"),
    ("kaggle.wheels_dataset=whl", "6 to 50"),
    ("kaggle.kernel_prefix=My_Kernels", "wants owner/slug"),
    ("kaggle.trained=disk", "kernels or dataset"),
])
def test_settings_that_kaggle_would_refuse(override, told):
    with pytest.raises(InputError, match=told):
        kaggle.metadata_files(load_settings("kaggle", overrides=[override]))


def test_the_submission_takes_its_models_from_kernels_or_from_the_dataset():
    other = load_settings("kaggle", overrides=["kaggle.trained=dataset"])
    first, second = (kaggle.kernel_metadata(kaggle.KERNELS["submit"], s) for s in (SETTINGS, other))
    assert first["kernel_sources"] and not second["kernel_sources"]
    assert [d for d in second["dataset_sources"] if d not in first["dataset_sources"]] == [f"{SETTINGS.kaggle.username}/{SETTINGS.kaggle.models_dataset}"]


def test_kernels_run_every_stage_in_order():
    alone = [n for name in ("eda", "train", "features", "submit") for n in kaggle.KERNELS[name].notebooks]
    assert sorted(set(alone)) == sorted(STAGES.values())
    for kernel in kaggle.KERNELS.values():
        assert list(kernel.notebooks) == sorted(kernel.notebooks)


# Commands


def call(*argv: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = kaggle.main(list(argv))
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    "A person without credentials, in a folder of their own."
    for name in [n for n in os.environ if n.startswith("KAGGLE")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_push_is_rehearsed_without_credentials_and_sends_nothing(nobody, monkeypatch):
    monkeypatch.setattr(kaggle, "send_folder", lambda *a: pytest.fail("sent"))
    code, told, _ = call("push", "submit")
    assert code == 0 and "enableInternet: False" in told and "nothing was sent" in told
    assert {p.name for p in (nobody / "build/kaggle/submit").iterdir()} == {"kernel-metadata.json", "submit.ipynb"}


@pytest.mark.parametrize("argv, told", [
    (["push", "hay"], "no such dataset or kernel"),
    (["push", "siglip-weights", "--source", "nowhere"], "preprocessor_config.json"),
    (["push", "eda", "--send"], "your-kaggle-name"),
    (["--set", "kaggle.username=ann", "push", "eda", "--send"], "no Kaggle credentials"),
    (["--set", "kaggle.username=ann", "submit", "--version", "2", "--send"], "no Kaggle credentials"),
    (["submit"], "VERSION"),
    (["--profile", "moon", "metadata"], "moon"),
    (["metadata"], "metadata --write"),
])
def test_what_is_missing_is_told_in_one_line(argv, told, nobody):
    code, _, error = call(*argv)
    assert code == 2 and told in error and len(error.splitlines()) == 1


def test_a_submission_that_was_sent_becomes_a_line_of_the_ledger(nobody, monkeypatch, capsys):
    sent, run = [], nobody / "run"
    run.mkdir()
    with pytest.raises(InputError, match="no ledger.jsonl"):
        kaggle.submit(3, "", SETTINGS, run=run)
    entry = add_entry(run / "ledger.jsonl", {"file": "submission.csv"})
    open_client = kaggle.open_client

    class Client:
        def competition_submit_code(self, **call):
            sent.append(call)
            return SimpleNamespace(message="taken", ref=77)

    monkeypatch.setattr(kaggle, "open_client", lambda owner="": open_client(owner) if owner else Client())
    kaggle.submit(3, "", SETTINGS, run=run, ledger=nobody / "book.jsonl")
    assert not sent and not (nobody / "book.jsonl").exists()
    kaggle.submit(3, "the first", SETTINGS, send=True, run=run, ledger=nobody / "book.jsonl")
    line = read_ledger(nobody / "book.jsonl").entries[entry]
    assert len(sent) == 1 and line.get("message") == "the first" and line.get("reference") == "77" and line.get("kernel").endswith("image2biomass-submit/3")


@pytest.mark.parametrize("name", ["kaggle", "kagglehub"])
def test_a_client_that_is_not_installed_is_told(name, nobody, monkeypatch):
    find = kaggle.importlib.util.find_spec
    monkeypatch.setattr(kaggle.importlib.util, "find_spec", lambda n: None if n == name else find(n))
    code, _, error = call(*(["push", "eda"] if name == "kaggle" else ["data"]))
    assert code == 2 and f"{name}" in error and "pip install" in error


# Wheels


def test_the_lock_holds_what_the_image_lacks():
    lock = (ROOT / "datasets-metadata/wheels/wheelhouse.lock").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lock)
    assert sorted(map(kaggle.package, lock)) == sorted(map(kaggle.package, kaggle.image_lacks(ROOT)))


def test_a_wheel_that_changed_is_refused(tmp_path):
    shutil.copytree(ROOT / "datasets-metadata/wheels", tmp_path / "datasets-metadata/wheels")
    (tmp_path / "small-1.0-py3-none-any.whl").write_bytes(b"not what was locked")
    lock = tmp_path / "wheelhouse.lock"
    lock.write_text(f"small==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(InputError, match="pip download failed.*"):
        kaggle.pip("download", *kaggle.ENOUGH, "--no-index", "--find-links", str(tmp_path), "--dest", str(tmp_path / "to"), "--require-hashes", "-r", str(lock))


def test_the_test_environment_pins_only_what_the_image_has():
    lines = [line for line in (ROOT / "constraints-kaggle.txt").read_text().splitlines() if kaggle.package(line)]
    wanted = {kaggle.package(w) for w in kaggle.tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]}
    assert {kaggle.package(line) for line in lines} <= wanted


# Mounts


THINGS = {"competitions": "csiro-biomass", "datasets": "ann/some-weights", "notebooks": "ann/a-kernel", "models": "meta/dinov3/pyTorch/huge/1"}


@pytest.mark.parametrize("kind", THINGS)
@pytest.mark.parametrize("layout", ["new", "old", "kind", "elsewhere", "inner"])
def test_mounts_are_found_wherever_they_are(kind, layout, tmp_path):
    name = THINGS[kind]
    slug = name.split("/")[1 if "/" in name else 0]
    known = mount_candidates(kind, name, tmp_path)
    folder = {"new": known[0], "old": known[1], "kind": known[2], "elsewhere": tmp_path / "x" / slug, "inner": known[0] / "version" / "files"}[layout]
    if kind == "models" and layout == "inner":
        folder = known[0]  # six folders deep is as deep as Kaggle goes
    for path in (folder, tmp_path / "datasets/bob/decoy"):
        path.mkdir(parents=True, exist_ok=True)
        (path / "a.file").write_text("x")
    assert resolve_mount(kind, name, "a.file", tmp_path) == folder
    (folder / "a.file").unlink()
    with pytest.raises(InputError, match="looked in .*attach it"):
        resolve_mount(kind, name, "b.file", tmp_path)


def test_a_variable_wins_over_mounts(tmp_path, monkeypatch):
    for name in ("here", "competitions/csiro-biomass"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "train.csv").touch()
    monkeypatch.setenv("NBS_INPUT", str(tmp_path / "here"))
    assert resolve_mount("competitions", "csiro-biomass", "train.csv", tmp_path, env="NBS_INPUT") == tmp_path / "here"


def test_artefacts_are_taken_once_and_never_written_through(tmp_path):
    first, second = tmp_path / "input/datasets/ann/models", tmp_path / "input/notebooks/ann/train/artefacts"
    for folder, text in ((first, "first"), (second, "second")):
        for name in ("stages/train_dinov3.json", "dinov3/fold0.safetensors", "photos/halves.npy"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    (second / "dinov3/fold1.safetensors").write_text("second")
    out = tmp_path / "working"
    assert list(kaggle.take_artefacts(out, tmp_path / "input").values()) == [2, 1]
    assert (out / "artefacts/dinov3/fold0.safetensors").read_text() == "first" and not (out / "artefacts/photos").exists()
    with kaggle.atomic(out / "artefacts/dinov3/fold0.safetensors") as temporary:
        temporary.write_text("mine")
    assert (first / "dinov3/fold0.safetensors").read_text() == "first"
    assert kaggle.release_artefacts(out) == 2 and (out / "artefacts/dinov3/fold0.safetensors").read_text() == "mine"
    assert kaggle.take_artefacts(tmp_path / "none", tmp_path / "nothing") == {}


# The cell that installs


def test_every_stage_notebook_begins_with_the_same_cell():
    for name in STAGES.values():
        code = [source for kind, source in kaggle.read_cells(name) if kind == "code"]
        assert code[0].startswith("#| default_exp") and code[1] == kaggle.install_cell(), name
    assert SETTINGS.kaggle.library_dataset in kaggle.install_cell()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The dataset with the library: its wheel and lock, as `make wheelhouse` writes them."
    folder = tmp_path_factory.mktemp("nbs-lib")
    kaggle.build_library(ROOT, folder)
    (folder / "wheelhouse.lock").write_text("\n".join(kaggle.lock_lines(folder)) + "\n")
    return folder


@pytest.fixture
def kernel(wheel, tmp_path) -> Path:
    "A Python that has all packages of this one but neither nbs_lib nor anything of nbdev."
    python = kaggle.make_overlay(Path(sys.prefix), tmp_path / "venv")
    site = next((tmp_path / "venv/lib").glob("python3*")) / "site-packages"
    (site / "refuse.py").write_text("import sys\n\nclass Refuse:\n    def find_spec(self, name, *rest):\n"
                                    "        if name.split('.')[0] in {'nbdev', 'fastcore', 'execnb'}:\n            raise ModuleNotFoundError(name)\n\n"
                                    "sys.meta_path.insert(0, Refuse())\n")
    (site / "refuse.pth").write_text("import refuse\n")
    return python


# In namespaces of its own: the folder read-only, no network but the loopback that a kernel's client needs; then the command.
SEAL = """
import fcntl, os, socket, struct, subprocess, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    fcntl.ioctl(s, 0x8914, b"lo".ljust(16, bytes(1)) + struct.pack("h", 0x1 | 0x40))
folder, *command = sys.argv[1:]
subprocess.run(["mount", "--bind", folder, folder], check=True)
subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
os.execvp(command[0], command)
"""


def sealed(folder: Path) -> list[str]:
    "Words before a command that seal it off; none where that is not permitted."
    words = ["unshare", "--map-root-user", "--mount", "--net", sys.executable, "-c", SEAL, str(folder)]
    return words if shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0 else []


class Kaggle:
    "A false root: input/ with mounts in one layout, working/, a home elsewhere; commands there have no network and cannot write to input/."

    def __init__(self, root: Path, python: Path, wheel: Path, layout: int):
        self.input, self.working, self.python, self.layout = root / "input", root / "working", python, layout
        for folder in (self.input, self.working, root / "home"):
            folder.mkdir()
        self.attach("datasets", f"{SETTINGS.kaggle.username}/{SETTINGS.kaggle.library_dataset}", wheel)
        self.env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NBS_LESSON")} | {
            "NBS_KAGGLE_INPUT": str(self.input), "HOME": str(root / "home"), "PIP_IGNORE_INSTALLED": "1", "OMP_NUM_THREADS": "2", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        self.seal = sealed(self.input)

    def attach(self, kind: str, name: str, folder: Path) -> None:
        shutil.copytree(folder, mount_candidates(kind, name, self.input)[self.layout])

    def run(self, *command) -> subprocess.CompletedProcess:
        return subprocess.run([*self.seal, *command], cwd=self.working, env=self.env, capture_output=True, text=True)

    def push(self, name: str, profile: str, overrides: list[str]) -> None:
        "Run the notebook that a push of kernel `name` would send, as Kaggle does."
        parameters = kaggle.ON_KAGGLE | {"output": str(self.working), "profile": profile, "overrides": overrides}
        notebook = self.working.parent / f"{name}.ipynb"
        notebook.write_text(json.dumps(kaggle.kernel_notebook(kaggle.KERNELS[name], SETTINGS, parameters)))
        done = self.run(self.python, "-m", "papermill", "--no-progress-bar", notebook, self.working / "__notebook__.ipynb")
        assert done.returncode == 0, done.stderr[-3000:]


def fingerprint(folder: Path) -> str:
    text = "".join(f"{p.relative_to(folder)} {p.stat().st_mtime_ns} {hashlib.md5(p.read_bytes()).hexdigest()}\n" for p in sorted(folder.rglob("*")) if p.is_file())
    return hashlib.md5(text.encode()).hexdigest()


@pytest.mark.parametrize("layout", [NEW, OLD])
def test_the_cell_installs_from_the_attached_dataset(layout, kernel, wheel, tmp_path):
    root = Kaggle(tmp_path, kernel, wheel, layout)
    done = root.run(kernel, "-c", f"{kaggle.install_cell()}\nimport nbs_lib.core\nprint(nbs_lib.core.__file__, nbs_lib.core.load_settings('kaggle').run.folds)")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "venv") in done.stdout and done.stdout.split()[-1] == str(SETTINGS.run.folds)


def test_without_the_dataset_the_cell_says_which_one_to_attach(kernel, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"NBS_KAGGLE_INPUT": str(tmp_path)}
    done = subprocess.run([kernel, "-c", kaggle.install_cell()], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and done.stderr.splitlines() == [done.stderr.strip()] and SETTINGS.kaggle.library_dataset in done.stderr


# The chain


# Every stage for real, with the least work.
CHEAP = ["run.folds=2", "train_dinov3.size=128", "train_dinov3.epochs=0", "train_dinov3.depths=2", "train_dinov3.inner_folds=2", "frozen.widths=128",
         "frozen.depths=2", "frozen.colour_width=128", "boosting.members=linear", "boosting.inner_folds=2", "ensemble.draws=50", "train_dinov3.scales=1.0", "siglip.weights=tiny"]


@pytest.fixture(scope="module")
def meadow(tmp_path_factory) -> Path:
    "A competition folder that is rendered and read in seconds."
    return write_demo(tmp_path_factory.mktemp("meadow") / "csiro-biomass", n_train=12, n_test=2, sites=4, seed=3, width=600)


def test_the_chain_runs_in_a_false_kaggle_root(kernel, wheel, meadow, tmp_path):
    """Kernel after kernel, then all in one that goes on from what they left; no network, no nbdev, a home elsewhere, nothing written but to working."""
    (tmp_path / "new").mkdir()
    root, left = Kaggle(tmp_path / "new", kernel, wheel, NEW), {}
    root.attach("competitions", SETTINGS.kaggle.competition, meadow)
    for name in ("train", "features", "submit"):
        before = fingerprint(root.input)
        root.push(name, "laptop", CHEAP)
        assert fingerprint(root.input) == before, f"kernel {name} wrote to its input"
        assert not any(p.is_symlink() for p in root.working.rglob("*")), f"kernel {name} leaves links that end with its session"
        left[name] = shutil.move(root.working, tmp_path / f"left-{name}")
        root.attach("notebooks", f"{SETTINGS.kaggle.username}/{kaggle.KERNELS[name].slug(SETTINGS)}", left[name])
        root.working.mkdir()
    answer = (left["submit"] / "submission.csv").read_bytes()
    sample = (meadow / "sample_submission.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in answer.decode().splitlines()] == [row.split(",")[0] for row in sample]

    (tmp_path / "old").mkdir()
    root = Kaggle(tmp_path / "old", kernel, wheel, OLD)
    root.attach("competitions", SETTINGS.kaggle.competition, meadow)
    for name in ("train", "features"):
        root.attach("notebooks", f"{SETTINGS.kaggle.username}/{kaggle.KERNELS[name].slug(SETTINGS)}", left[name])
    before = fingerprint(root.input)
    root.push("suite", "laptop", CHEAP)
    assert fingerprint(root.input) == before, "the suite wrote to its input"
    stages = {s["name"]: s["status"] for s in json.loads((root.working / "run.json").read_text())["stages"]}
    assert list(stages) == list(STAGES)
    assert [n for n, status in stages.items() if status == "up to date"] == ["siglip", "frozen", "boosting", "ensemble"]  # train made its own folds: eda's are new to it
    assert (root.working / "submission.csv").read_bytes() == answer
    assert {p.name for p in tmp_path.iterdir()} == {"new", "old", "venv", *(f"left-{name}" for name in left)}
    assert {p.name for p in (tmp_path / "old").iterdir()} == {"input", "working", "home", "suite.ipynb"}


@pytest.mark.parametrize("asked, sends", [("1", True), ("yes", True), ("0", False), ("", False), ("no", False)])
def test_make_sends_only_when_told_to(asked, sends):
    done = subprocess.run(["make", "-n", "push", "STAGE=train", f"SEND={asked}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ("--send" in done.stdout) == sends
