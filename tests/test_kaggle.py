"""Metadata, notebooks, wheels, mounts, and the chain in a made-up Kaggle root; test_push has the pushes."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from nbs_lib import kaggle, wheelhouse
from nbs_lib.demo import write_demo
from nbs_lib.run import STAGES
from nbs_lib.runtime import InputError, mount_candidates, resolve_mount
from nbs_lib.settings import load_settings

SETTINGS = load_settings("kaggle", path=ROOT / "settings.ini")
NEW, OLD = 0, 1  # layouts of mounts


# Metadata


def test_metadata_is_what_the_settings_say():
    stale = kaggle.update_metadata(SETTINGS, ROOT / "datasets-metadata")
    assert stale == [], "python -m nbs_lib.kaggle metadata --write, and commit"


def test_metadata_that_differs_is_listed_and_written(tmp_path):
    names = kaggle.update_metadata(SETTINGS, tmp_path)
    assert len(names) == len(kaggle.KAGGLE_DATASETS) + len(kaggle.KAGGLE_KERNELS)
    assert not list(tmp_path.iterdir())
    assert kaggle.update_metadata(SETTINGS, tmp_path, write=True) == names
    assert kaggle.update_metadata(SETTINGS, tmp_path) == []
    (tmp_path / "old.json").write_text("{}")
    (tmp_path / "wheels/dataset-metadata.json").write_text("{}")
    assert kaggle.update_metadata(SETTINGS, tmp_path) == ["old.json", "wheels/dataset-metadata.json"]


def dry_run(folder: Path) -> dict:
    method = "kernels_push" if (folder / "kernel-metadata.json").is_file() else "dataset_create_new"
    return kaggle.dry_run(SETTINGS.kaggle.username, method, str(folder))


@pytest.mark.parametrize("name", kaggle.KAGGLE_KERNELS)
def test_the_client_takes_every_kernel(name, tmp_path):
    files = kaggle.stage_kernel(
        kaggle.KAGGLE_KERNELS[name], SETTINGS, tmp_path / name, kaggle.KAGGLE_PARAMETERS
    )
    request = dry_run(tmp_path / name)
    notebook = json.loads(request["text"])
    assert request["enableInternet"] is False and request["isPrivate"] is True
    assert request.get("competitionDataSources", []) == ([] if name == "predict" else ["csiro-biomass"])
    assert notebook["metadata"]["kernelspec"]["name"] == "python3" and not any(
        c.get("outputs") for c in notebook["cells"]
    )
    assert files[0][1] < 50_000


@pytest.mark.parametrize("name", kaggle.KAGGLE_DATASETS)
def test_the_client_takes_every_dataset(name, tmp_path):
    dataset, source = kaggle.KAGGLE_DATASETS[name], tmp_path / "source"
    file = source / (dataset.sentinel or "weights.pth").replace("*", "0")
    file.parent.mkdir(parents=True)
    file.write_text("something")
    (source / "photos").mkdir()
    (source / "photos" / "halves.npy").write_text("big")
    sent = {n for n, _ in kaggle.stage_dataset(dataset, SETTINGS, tmp_path / name, source)}
    request = dry_run(tmp_path / name)
    assert request["licenseName"] == dataset.licence and dataset.ref(SETTINGS).endswith(f"/{request['slug']}")
    assert sent == {str(file.relative_to(source))} | (
        set() if name == "trained-models" else {"photos/halves.npy"}
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"title": "Ab"}, "at least five characters"),
        ({"title": "Another name altogether"}, "does not resolve"),
        ({"language": "cobol"}, "valid language"),
        ({"code_file": "nowhere.ipynb"}, "Source file not found"),
        ({"dataset_sources": ["no-owner"]}, "username"),
        # so versions are owner/slug/3
        ({"dataset_sources": ["owner/slug/versions/3"]}, "Invalid dataset specification"),
        ({"model_sources": ["a/b/c/d/first"]}, "integer"),
    ],
)
def test_what_the_client_refuses_is_one_line(change, words, tmp_path):
    kaggle.stage_kernel(kaggle.KAGGLE_KERNELS["eda"], SETTINGS, tmp_path, kaggle.KAGGLE_PARAMETERS)
    path = tmp_path / "kernel-metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=words):
        dry_run(tmp_path)


@pytest.mark.parametrize("override, words", [
    ("kaggle.wheels_dataset=wheels of mine", "no owner/slug"),
    ("kaggle.wheels_dataset=whl", "no owner/slug"),
    ("kaggle.wheels_dataset=w" + 50 * "x", "no owner/slug"),
    ("kaggle.kernel_prefix=My_Kernels", "no owner/slug"),
    ("kaggle.wheels_dataset=image2biomass-nbs-lib", "used twice"),
    ("kaggle.trained=disk", "kernels, dataset"),
])
def test_settings_that_kaggle_would_refuse(override, words):
    with pytest.raises(InputError, match=words):
        kaggle.metadata_files(load_settings("kaggle", overrides=[override]))


def test_the_submission_takes_its_models_from_kernels_or_from_the_dataset():
    other = load_settings("kaggle", overrides=["kaggle.trained=dataset"])
    first, second = (kaggle.KAGGLE_KERNELS["submit"].metadata(s) for s in (SETTINGS, other))
    assert first["kernel_sources"] and not second["kernel_sources"]
    added = [d for d in second["dataset_sources"] if d not in first["dataset_sources"]]
    assert added == [kaggle.KAGGLE_DATASETS["trained-models"].ref(SETTINGS)]


def test_kernels_run_every_stage_in_order():
    alone = [
        n for name in ("eda", "train", "features", "submit") for n in kaggle.KAGGLE_KERNELS[name].notebooks
    ]
    assert sorted(set(alone)) == sorted(STAGES.values())
    for kernel in kaggle.KAGGLE_KERNELS.values():
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


def test_a_dry_run_needs_no_credentials_and_sends_nothing(nobody, monkeypatch):
    monkeypatch.setattr(kaggle, "sign_in", lambda *a: pytest.fail("signed in"))
    code, out, _ = call("push", "submit")
    assert code == 0 and "enableInternet: False" in out and "nothing was sent" in out
    assert {p.name for p in (nobody / "build/kaggle/submit").iterdir()} == {
        "kernel-metadata.json",
        "submit.ipynb",
    }


@pytest.mark.parametrize("argv, words", [
    (["push", "hay"], "no such dataset or kernel"),
    (["push", "siglip-weights", "--source", "nowhere"], "preprocessor_config.json"),
    (["push", "dinov3-weights", "--source", "nowhere"], "no .safetensors"),
    (["push", "eda", "--send"], "no Kaggle credentials"),
    (["submit", "--version", "2", "--send"], "no Kaggle credentials"),
    (["data"], "no Kaggle credentials"),
    (["submit"], "VERSION"),
    (["--profile", "moon", "metadata"], "moon"),
    (["metadata"], "metadata --write"),
])
def test_what_is_missing_is_one_line(argv, words, nobody):
    code, _, error = call(*argv)
    assert code == 2 and words in error and len(error.splitlines()) == 1


def test_a_client_that_is_not_installed_is_one_line(nobody, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "kaggle" else find(n))
    code, _, error = call("push", "eda")
    assert code == 2 and "pip install" in error


def test_an_empty_file_is_refused(nobody):
    (nobody / "source").mkdir()
    (nobody / "source/wheelhouse.lock").touch()
    assert "empty or missing" in call("push", "wheels", "--source", "source")[2]


def test_a_link_that_leads_nowhere_is_refused(nobody):
    (nobody / "source").mkdir()
    (nobody / "source/wheelhouse.lock").write_text("x")
    (nobody / "source/a.whl").symlink_to(nobody / "gone.whl")
    code, _, error = call("push", "wheels", "--source", "source")
    assert code == 2 and "a.whl: empty or missing" in error


# Wheels


def test_the_lock_holds_what_the_image_lacks():
    lock = (ROOT / wheelhouse.LOCK).read_text().splitlines()
    assert all(re.fullmatch(r"[\w.]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lock)
    assert sorted(map(wheelhouse.package_name, lock)) == sorted(
        map(wheelhouse.package_name, wheelhouse.missing_in_image(ROOT))
    )


def test_a_wheel_that_changed_is_refused(tmp_path):
    shutil.copytree(ROOT / "datasets-metadata/wheels", tmp_path / "datasets-metadata/wheels")
    (tmp_path / "small-1.0-py3-none-any.whl").write_bytes(b"not what was locked")
    lock = tmp_path / "wheelhouse.lock"
    lock.write_text(f"small==1.0 --hash=sha256:{'0' * 64}\n")
    words = ["--no-index", "--find-links", tmp_path, "--dest", tmp_path / "to", "--require-hashes"]
    with pytest.raises(InputError, match="pip download failed"):
        wheelhouse.run_pip("download", *wheelhouse.KAGGLE_WHEELS, *map(str, words), "-r", str(lock))


def test_the_test_environment_pins_only_what_the_image_has():
    names = map(wheelhouse.package_name, (ROOT / "constraints-kaggle.txt").read_text().splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {n for n in names if n} <= {wheelhouse.package_name(w) for w in project["dependencies"]}


CUDA = "mamba_ssm-2.3.2+cu12torch2.10cxx11abiTRUE-cp312-cp312-linux_x86_64.whl"


@pytest.mark.parametrize("name", [
    CUDA, "a-1-py2.py3-none-any.whl", "a-1-cp312-cp312-manylinux_2_28_x86_64.whl",
    "a-1-cp39-abi3-manylinux2014_x86_64.whl",
    "a-1-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", "a-1+local-py3-none-any.whl",
])
def test_a_wheel_that_fits_the_image_is_taken(name):
    wheelhouse.check_wheel(Path(name), "2.10")


@pytest.mark.parametrize("name, words", [
    (CUDA.replace("torch2.10", "torch2.9"), "built for torch2.9; Kaggle needs torch2.10"),
    (CUDA.replace("cu12", "cu11"), "Kaggle needs cu12"),
    (CUDA.replace("TRUE", "FALSE"), "Kaggle needs abitrue"),
    (CUDA.replace("cp312", "cp313"), "cp313-cp313-linux_x86_64; Kaggle needs cp312"),
    ("a-1-cp312-cp312-manylinux_2_39_x86_64.whl", "manylinux_2_39"),
    ("a-1-cp312-cp312-win_amd64.whl", "win_amd64"), ("a-1.tar.gz", "not a wheel"),
])
def test_a_wheel_that_does_not_fit_is_refused(name, words):
    with pytest.raises(InputError, match="extra/.*" + re.escape(words)):
        wheelhouse.check_wheel(Path("extra", name), "2.10")


def write_wheel(folder: Path, name: str) -> Path:
    "A wheel with one module, of the name `name`."
    folder.mkdir(parents=True, exist_ok=True)
    distribution, version = name.split("-")[:2]
    info = f"{distribution}-{version}.dist-info"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr(f"{distribution}.py", f"version = '{version}'\n")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{info}/RECORD", "")
    return folder / name


@pytest.mark.parametrize("relock", [False, True])
def test_extra_wheels_are_in_the_lock_of_the_dataset_alone(relock, tmp_path, monkeypatch):
    for name in (wheelhouse.LOCK, "constraints-kaggle.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    house = tmp_path / "wheelhouse"
    for name in ("extra_one-1.0+cu12torch2.10-py3-none-any.whl", "peft-9.9-py3-none-any.whl"):
        write_wheel(house / "extra", name)
    (house / "extra/.DS_Store").touch()

    def run_pip(command, *words):  # the registry's wheels
        to = Path(words[words.index("--dest") + 1])
        for name in ("accelerate-1.0-py3-none-any.whl", "peft-1.0-py3-none-any.whl"):
            write_wheel(to, name)

    monkeypatch.setattr(wheelhouse, "run_pip", run_pip)
    monkeypatch.setattr(wheelhouse, "build_library", lambda _, to: write_wheel(to, "nbs_lib-0-py3-none.whl"))
    wheelhouse.build_wheelhouse(tmp_path, house, relock)
    lines = [line.split(" ")[0] for line in (house / "wheels/wheelhouse.lock").read_text().splitlines()]
    assert lines == ["accelerate==1.0", "extra_one==1.0+cu12torch2.10", "peft==9.9"]
    names = {p.name.split("-py3")[0] for p in (house / "wheels").glob("*.whl")}
    assert names == {"accelerate-1.0", "extra_one-1.0+cu12torch2.10", "peft-9.9"}
    committed = (tmp_path / wheelhouse.LOCK).read_text()
    assert ("accelerate==1.0 " in committed) == relock and "extra" not in committed
    write_wheel(house / "extra", "bad-1-cp313-cp313-linux_x86_64.whl")
    with pytest.raises(InputError, match="bad-1-cp313"):
        wheelhouse.build_wheelhouse(tmp_path, house, relock)


# Mounts


THINGS = {
    "competitions": "csiro-biomass",
    "datasets": "ann/some-weights",
    "notebooks": "ann/a-kernel",
    "models": "meta/dinov3/pyTorch/huge/1",
}


@pytest.mark.parametrize("kind", THINGS)
@pytest.mark.parametrize("layout", ["new", "old", "kind", "elsewhere", "inner"])
def test_mounts_are_found_wherever_they_are(kind, layout, tmp_path):
    name = THINGS[kind]
    slug = name.split("/")[1 if "/" in name else 0]
    known = mount_candidates(kind, name, tmp_path)
    folder = {
        "new": known[0],
        "old": known[1],
        "kind": known[2],
        "elsewhere": tmp_path / "x" / slug,
        "inner": known[0] / "version" / "files",
    }[layout]
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
    found = resolve_mount("competitions", "csiro-biomass", "train.csv", tmp_path, env="NBS_INPUT")
    assert found == tmp_path / "here"


def test_artefacts_are_linked_once_and_never_written_through(tmp_path):
    first, second = tmp_path / "input/datasets/ann/models", tmp_path / "input/notebooks/ann/train/artefacts"
    for folder, text in ((first, "first"), (second, "second")):
        for name in ("stages/train_dinov3.json", "dinov3/fold0.safetensors", "photos/halves.npy"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    (second / "dinov3/fold1.safetensors").write_text("second")
    out = tmp_path / "working"
    assert list(kaggle.link_artefacts(out, tmp_path / "input").values()) == [2, 1]
    file = out / "artefacts/dinov3/fold0.safetensors"
    assert file.read_text() == "first" and not (out / "artefacts/photos").exists()
    with kaggle.atomic_write(file) as temporary:
        temporary.write_text("mine")
    assert (first / "dinov3/fold0.safetensors").read_text() == "first"
    assert kaggle.unlink_artefacts(out) == 2 and file.read_text() == "mine"
    assert kaggle.link_artefacts(tmp_path / "none", tmp_path / "nothing") == {}


# The cell that installs


def test_every_stage_notebook_begins_with_the_same_cell():
    for name in STAGES.values():
        code = [source for kind, source in wheelhouse.read_cells(name) if kind == "code"]
        assert code[0].startswith("#| default_exp") and code[2] == wheelhouse.read_install_cell(), name
    assert SETTINGS.kaggle.library_dataset in wheelhouse.read_install_cell()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The dataset with the library: its wheel and lock, as `make wheelhouse` writes them."
    folder = tmp_path_factory.mktemp("nbs-lib")
    wheelhouse.build_library(ROOT, folder)
    wheelhouse.write_lock(folder, folder / "wheelhouse.lock")
    return folder


@pytest.fixture
def kernel(wheel, tmp_path) -> Path:
    "A Python that has all packages of this one but neither nbs_lib nor anything of nbdev."
    python = wheelhouse.make_overlay(Path(sys.prefix), tmp_path / "venv")
    site = next((tmp_path / "venv/lib").glob("python3*")) / "site-packages"
    (site / "refuse.py").write_text(
        "import sys\n\nclass Refuse:\n    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] in {'nbdev', 'fastcore', 'execnb'}:\n"
        "            raise ModuleNotFoundError(name)\n\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    (site / "refuse.pth").write_text("import refuse\n")
    return python


# In namespaces of its own: the folder read-only, no network but the loopback of a kernel's client.
SEAL = """
import fcntl, os, socket, struct, subprocess, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    fcntl.ioctl(s, 0x8914, b"lo".ljust(16, bytes(1)) + struct.pack("h", 0x1 | 0x40))
folder, *command = sys.argv[1:]
subprocess.run(["mount", "--bind", folder, folder], check=True)
subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
os.execvp(command[0], command)
"""


def isolate_command(folder: Path) -> list[str]:
    "Return the words before a command that isolate it; none where that is not permitted."
    words = ["unshare", "--map-root-user", "--mount", "--net", sys.executable, "-c", SEAL, str(folder)]
    return (
        words
        if shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0
        else []
    )


class Kaggle:
    "A made-up root with input/, working/ and a home; commands have no network, input/ is read-only."

    def __init__(self, root: Path, python: Path, wheel: Path, layout: int):
        self.input, self.working, self.python, self.layout = root / "input", root / "working", python, layout
        for folder in (self.input, self.working, root / "home"):
            folder.mkdir()
        self.attach("datasets", kaggle.KAGGLE_DATASETS["nbs-lib"].ref(SETTINGS), wheel)
        self.env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NBS_LESSON")} | {
            "NBS_KAGGLE_INPUT": str(self.input),
            "HOME": str(root / "home"),
            "PIP_IGNORE_INSTALLED": "1",
            "OMP_NUM_THREADS": "2",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        self.seal = isolate_command(self.input)

    def attach(self, kind: str, name: str, folder: Path) -> None:
        shutil.copytree(folder, mount_candidates(kind, name, self.input)[self.layout])

    def run(self, *command) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*self.seal, *command], cwd=self.working, env=self.env, capture_output=True, text=True
        )

    def push(self, name: str, profile: str, overrides: list[str]) -> None:
        "Run the notebook that a push of kernel `name` would send, as Kaggle does."
        parameters = kaggle.KAGGLE_PARAMETERS | {
            "output": str(self.working),
            "profile": profile,
            "overrides": overrides,
        }
        notebook = self.working.parent / f"{name}.ipynb"
        notebook.write_text(
            json.dumps(kaggle.build_kernel_notebook(kaggle.KAGGLE_KERNELS[name], SETTINGS, parameters))
        )
        done = self.run(
            self.python, "-m", "papermill", "--no-progress-bar", notebook, self.working / "__notebook__.ipynb"
        )
        assert done.returncode == 0, done.stderr[-3000:]


def fingerprint(folder: Path) -> str:
    text = "".join(
        f"{p.relative_to(folder)} {p.stat().st_mtime_ns} {hashlib.md5(p.read_bytes()).hexdigest()}\n"
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    )
    return hashlib.md5(text.encode()).hexdigest()


def test_the_cell_installs_from_the_attached_datasets(kernel, wheel, tmp_path):
    "The library, and a wheel that was added to the other dataset."
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(tmp_path / "extra", "extra_one-1.0+cu12torch2.10-py3-none-any.whl")
    wheelhouse.add_extra_wheels(tmp_path / "extra", wheels, ROOT / "constraints-kaggle.txt")
    wheelhouse.write_lock(wheels, wheels / "wheelhouse.lock")
    root = Kaggle(tmp_path, kernel, wheel, NEW)
    root.attach("datasets", kaggle.KAGGLE_DATASETS["wheels"].ref(SETTINGS), wheels)
    show = ("import extra_one, nbs_lib.settings as c\n"
            "print(c.__file__, extra_one.version, c.load_settings('kaggle').run.folds)")
    done = root.run(kernel, "-c", f"{wheelhouse.read_install_cell()}\n{show}")
    assert done.returncode == 0, done.stderr
    file, version, folds = done.stdout.split()
    assert str(tmp_path / "venv") in file
    assert (version, folds) == ("1.0+cu12torch2.10", str(SETTINGS.run.folds))


def test_without_the_dataset_the_cell_says_which_one_to_attach(kernel, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"NBS_KAGGLE_INPUT": str(tmp_path)}
    done = subprocess.run(
        [kernel, "-c", wheelhouse.read_install_cell()], cwd=tmp_path, capture_output=True, text=True, env=env
    )
    assert done.returncode == 1 and done.stderr.splitlines() == [done.stderr.strip()]
    assert SETTINGS.kaggle.library_dataset in done.stderr


# The chain


# Every stage for real, with the least work.
CHEAP = ["run.folds=2", "train_dinov3.size=128", "train_dinov3.epochs=0", "train_dinov3.depths=2",
         "train_dinov3.inner_folds=2", "frozen.widths=128", "frozen.depths=2", "frozen.colour_width=128",
         "boosting.members=ridge", "boosting.inner_folds=2", "ensemble.draws=50", "train_dinov3.probe_sizes=",
         "run.draws=2", "siglip.weights=tiny"]


@pytest.fixture(scope="module")
def meadow(tmp_path_factory) -> Path:
    "A competition folder that is rendered and read in seconds."
    return write_demo(
        tmp_path_factory.mktemp("meadow") / "csiro-biomass", n_train=12, n_test=2, sites=4, seed=3, width=600
    )


def test_a_kernel_runs_in_a_made_up_kaggle_root(kernel, wheel, meadow, tmp_path):
    root = Kaggle(tmp_path, kernel, wheel, NEW)
    root.attach("competitions", SETTINGS.kaggle.competition, meadow)
    before = fingerprint(root.input)
    root.push("eda", "laptop", CHEAP)
    assert fingerprint(root.input) == before and (root.working / "artefacts/folds.csv").is_file()


@pytest.mark.slow
def test_the_chain_runs_in_a_made_up_kaggle_root(kernel, wheel, meadow, tmp_path):
    """Kernel after kernel, then all in one that continues; no network, no nbdev, writes only to working/."""
    (tmp_path / "new").mkdir()
    root, left = Kaggle(tmp_path / "new", kernel, wheel, NEW), {}
    root.attach("competitions", SETTINGS.kaggle.competition, meadow)
    for name in ("train", "features", "submit"):
        before = fingerprint(root.input)
        root.push(name, "laptop", CHEAP)
        assert fingerprint(root.input) == before, f"kernel {name} wrote to its input"
        links = [p for p in root.working.rglob("*") if p.is_symlink()]
        assert not links, f"kernel {name} leaves links that end with its session"
        left[name] = shutil.move(root.working, tmp_path / f"left-{name}")
        root.attach("notebooks", kaggle.KAGGLE_KERNELS[name].ref(SETTINGS), left[name])
        root.working.mkdir()
    answer = (left["submit"] / "submission.csv").read_bytes()
    sample = (meadow / "sample_submission.csv").read_text().splitlines()
    first = [[row.split(",")[0] for row in rows] for rows in (answer.decode().splitlines(), sample)]
    assert first[0] == first[1]

    (tmp_path / "old").mkdir()
    root = Kaggle(tmp_path / "old", kernel, wheel, OLD)
    root.attach("competitions", SETTINGS.kaggle.competition, meadow)
    for name in ("train", "features"):
        root.attach("notebooks", kaggle.KAGGLE_KERNELS[name].ref(SETTINGS), left[name])
    before = fingerprint(root.input)
    root.push("suite", "laptop", CHEAP)
    assert fingerprint(root.input) == before, "the suite wrote to its input"
    stages = {s["name"]: s["status"] for s in json.loads((root.working / "run.json").read_text())["stages"]}
    assert list(stages) == list(STAGES)
    fresh = [n for n, status in stages.items() if status == "up to date"]
    assert fresh == ["siglip", "frozen", "boosting", "ensemble"]  # train made its own folds: eda's are new
    assert (root.working / "submission.csv").read_bytes() == answer
    assert {p.name for p in tmp_path.iterdir()} == {"new", "old", "venv", *(f"left-{name}" for name in left)}
    assert {p.name for p in (tmp_path / "old").iterdir()} == {"input", "working", "home", "suite.ipynb"}


@pytest.mark.parametrize("words, flag, there", [
    ("push STAGE=train SEND=1", "--send", True), ("push STAGE=train SEND=0", "--send", False),
    ("push STAGE=train SEND=", "--send", False), ("submit VERSION=1 SEND=yes", "--send", True),
    ("push STAGE=train WATCH=1", "--watch", True), ("push STAGE=train", "--watch", False),
    ("weights NAME=siglip TO=here", 'weights siglip --to "here"', True), ("clean", "wheelhouse ", False),
])
def test_make_passes_what_it_is_given(words, flag, there):
    out = subprocess.check_output(["make", "-n", *words.split()], cwd=ROOT, text=True)
    assert (flag in out) == there
