"""The command line: artefacts, exit codes, resumption, refusals that change nothing, limits, isolation."""
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import tiny
from conftest import ROOT, command

import nbs_lib.isolation
import nbs_lib.run
from nbs_lib.isolation import choose_isolation
from nbs_lib.run import STAGES, open_here
from nbs_lib.runtime import read_json
from nbs_lib.settings import load_settings
from nbs_lib.stages import is_fresh, open_run
from nbs_lib.tables import read_oof
from nbs_lib.targets import TARGETS, imbalance, weighted_r2_score
from notebooks import execute

# Every stage for real, with the least work.
CHEAP = (
    "run.folds=2", "run.draws=2", "train_dinov3.size=96", "train_dinov3.probe_sizes=",
    "train_dinov3.depths=2", "train_dinov3.head=none", "train_dinov3.views=id,H",
    "frozen.widths=96", "frozen.depths=2", "frozen.poolings=mean", "frozen.colour_width=64",
    "boosting.members=ridge", "boosting.inner_folds=2",
    "ensemble.judge=no", "ensemble.weights=equal", "ensemble.shrink=no", "ensemble.draws=100",
)
SMALL = [word for setting in CHEAP for word in ("--set", setting)]
MAIN = [sys.executable, "-m", "nbs_lib.run"]


def list_times(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def finished(paddock, tmp_path_factory) -> Path:
    "The output folder of one run of the whole chain."
    out = tmp_path_factory.mktemp("finished") / "out"
    done = command("--profile", "demo", "--input", paddock, "--output", out, *SMALL)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


# ---- what a whole run leaves

def test_every_promised_file_is_there(finished):
    artefacts = ("folds.csv", "photos/stamps.csv", "photos/photos.csv", "oof/dinov3.parquet",
                 "oof/boosting.parquet", "oof/ensemble.parquet", "blend.json")
    files = ["submission.csv", "report.html", "scores.json", "run.json"]
    files += [f"artefacts/{a}" for a in artefacts] + [f"notebooks/{n}.ipynb" for n in STAGES.values()]
    assert [name for name in files if not (finished / name).is_file()] == []
    assert list((finished / "artefacts/dinov3").glob("fold*.safetensors"))
    assert list((finished / "artefacts/features").glob("*.npz"))
    assert not [p for p in finished.rglob("*") if ".tmp-" in p.name]


def test_submission_is_valid(finished, paddock):
    sample, mine = pd.read_csv(paddock / "sample_submission.csv"), pd.read_csv(finished / "submission.csv")
    assert mine.columns.tolist() == ["sample_id", "target"]
    assert mine["sample_id"].tolist() == sample["sample_id"].tolist()
    assert np.isfinite(mine["target"]).all() and (mine["target"] >= 0).all()
    parts = mine["sample_id"].str.rpartition("__")
    wide = mine.assign(image=parts[0], name=parts[2]).pivot(index="image", columns="name", values="target")
    assert np.abs(imbalance(wide[list(TARGETS)].to_numpy())).max() < 1e-6
    assert wide[list(TARGETS)].std().min() > 0, "every photo got the same prediction"


def test_scores_agree_with_the_files(finished, paddock):
    scores = read_json(finished / "scores.json")
    train = pd.read_csv(paddock / "train.csv")
    train["image"] = train["sample_id"].str.rpartition("__")[0]
    wide = train.pivot(index="image", columns="target_name", values="target")[list(TARGETS)]
    for model in ("dinov3", "boosting", "ensemble"):
        oof = read_oof(finished / f"artefacts/oof/{model}.parquet", wide.index)
        again = weighted_r2_score(wide.to_numpy(), oof)
        assert scores["oof"][model]["grouped"]["r2"] == pytest.approx(again, abs=1e-12)
    assert {"grouped", "stratified"} <= scores["constant"].keys()
    assert scores["test"]["ensemble"]["photos"] == 4


def test_run_json_records_the_costs(finished):
    record = read_json(finished / "run.json")
    assert record["status"] == "done" and [s["name"] for s in record["stages"]] == list(STAGES)
    for stage in record["stages"]:
        assert stage["seconds"] > 0 and stage["peak_rss_gb"] > 0.01
        assert stage["network"] in ("namespace", "guard")
    assert record["versions"]["torch"] and record["inputs"]["input/train/*"]["files"] == 24
    assert "seed" in record


def test_nothing_was_written_to_the_input(finished, paddock):
    names = {p.name for p in paddock.iterdir()}
    assert names == {"train.csv", "test.csv", "sample_submission.csv", "train", "test"}


def run_here(*argv) -> int:
    "Run the command line in this process."
    return nbs_lib.run.main([str(a) for a in argv])


def test_second_run_does_nothing_again(finished, paddock, capsys):
    before = list_times(finished / "artefacts")
    call = ("--profile", "demo", "--input", paddock, "--output", finished, *SMALL, "--no-report")
    assert run_here(*call) == 0 and capsys.readouterr().out.count("up to date") == len(STAGES)
    assert list_times(finished / "artefacts") == before


def test_a_changed_setting_makes_its_stage_stale(finished, paddock):
    for more, fresh in (((), True), (("run.seed=5",), False)):
        run = open_run(paddock, finished, overrides=(*CHEAP, *more))
        assert {is_fresh(run, name) for name in STAGES} == {fresh}


def test_stage_notebook_runs_with_plain_papermill(finished, paddock, tmp_path):
    call = [sys.executable, "-m", "papermill", ROOT / "notebooks/51_ensemble.ipynb", tmp_path / "out.ipynb",
            "-p", "input", paddock, "-p", "output", finished, "-p", "profile", "demo",
            "-y", f"overrides: {json.dumps(CHEAP)}"]
    done = subprocess.run([str(word) for word in call], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- refusals: exit 2, one line, nothing changed

def edit(folder: Path, name: str, change) -> None:
    table = pd.read_csv(folder / name, dtype=str, keep_default_na=False)
    change(table).to_csv(folder / name, index=False)


def edit_train(change):
    return lambda folder: edit(folder, "train.csv", change)


def set_first(column: str, value: str):
    return edit_train(lambda t: t.assign(**{column: [value, *t[column].tolist()[1:]]}))


def rename_target(column: str):
    return edit_train(lambda t: t.assign(**{column: t[column].str.replace("Dry_Green_g", "Roots_g")}))


def change_sample(folder: Path) -> None:
    edit(folder, "sample_submission.csv", lambda t: t.assign(sample_id=t.sample_id.str.replace("__", "/")))


FAULTS = {
    "no train.csv": lambda f: (f / "train.csv").unlink(),
    "no test.csv": lambda f: (f / "test.csv").unlink(),
    "no sample": lambda f: (f / "sample_submission.csv").unlink(),
    "no column": edit_train(lambda t: t.drop(columns="State")),
    "no photo": lambda f: next((f / "train").iterdir()).unlink(),
    "no test photo folder": lambda f: shutil.rmtree(f / "test"),
    "double row": edit_train(lambda t: pd.concat([t, t.iloc[:1]])),
    "blank id": set_first("sample_id", ""),
    "four rows": edit_train(lambda t: t.iloc[1:]),
    "NaN": set_first("target", "nan"),
    "blank target": set_first("target", ""),
    "negative": set_first("target", "-3"),
    "a word": set_first("target", "much"),
    "unknown target": rename_target("sample_id"),
    "unknown target name": rename_target("target_name"),
    "a sample of something else": change_sample,
    "empty train": edit_train(lambda t: t.iloc[:0]),
    "empty test": lambda f: edit(f, "test.csv", lambda t: t.iloc[:0]),
    "zero bytes": lambda f: (f / "train.csv").write_text(""),
    "not a table": lambda f: (f / "train.csv").write_bytes(os.urandom(2000)),
}


def assert_refused(capsys, *argv) -> str:
    "Run the command line in this process; it must exit 2 with one line, which is returned."
    assert run_here(*argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err, err
    return err


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_tables_are_refused(fault, tables, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "submission.csv").write_text("an earlier one")
    FAULTS[fault](tables)
    assert_refused(capsys, "--profile", "demo", "--input", tables, "--output", out)
    assert (out / "submission.csv").read_text() == "an earlier one" and len(list(out.rglob("*"))) == 1


BAD_CALLS = ["--profile moon", "--only mow", "--from mow", "--set train_dinov3.nothing=3", "--set run.folds",
             "--set run.folds=three", "--preset moon", "--what", "--budget-hours -1", "--input nowhere"]


@pytest.mark.parametrize("argv", BAD_CALLS)
def test_bad_calls_are_refused(argv, field, tmp_path, capsys):
    call = ["--profile", "demo", "--input", field, "--output", tmp_path / "out", *argv.split()]
    assert len(assert_refused(capsys, *call)) < 1000
    assert not (tmp_path / "out" / "artefacts").exists()


def test_output_inside_the_input_is_refused(tables, capsys):
    err = assert_refused(capsys, "--profile", "demo", "--input", tables, "--output", tables / "out")
    assert "inside the input" in err and not (tables / "out").exists()


def test_output_that_is_a_file_is_refused(tables, tmp_path, capsys):
    (tmp_path / "out").write_text("not a folder")
    assert_refused(capsys, "--profile", "demo", "--input", tables, "--output", tmp_path / "out")


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_full_or_read_only_output_is_refused(kind, tables, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k" if kind == "full" else "size=1m,ro", "tmpfs", str(out)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        assert str(out) in assert_refused(capsys, "--profile", "demo", "--input", tables, "--output", out)
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.mark.parametrize("fault", ["half a photo", pytest.param("no bytes", marks=pytest.mark.slow),
                                   pytest.param("text", marks=pytest.mark.slow)])
def test_unreadable_photo_is_named(fault, tables, tmp_path, capsys):
    photo = sorted((tables / "train").iterdir())[0]
    content = photo.read_bytes()
    photo.unlink()
    faults = {"no bytes": b"", "half a photo": content[: len(content) // 2], "text": b"green grass"}
    photo.write_bytes(faults[fault])
    out = tmp_path / "out"
    call = ("--profile", "demo", "--input", tables, "--output", out, "--only", "inpaint", "--no-report")
    assert photo.name in assert_refused(capsys, *call, *SMALL)
    assert (out / "notebooks/20_inpaint.ipynb").is_file() and not (out / "submission.csv").exists()


def test_features_are_enough_for_model_2(finished, tables, tmp_path, capsys):
    "With features of one's own, boosting alone needs neither photos nor the stages before it."
    for split in ("train", "test"):
        shutil.rmtree(tables / split)
    artefacts = tmp_path / "out" / "artefacts"
    shutil.copytree(finished / "artefacts" / "features", artefacts / "features")
    call = ("--profile", "demo", "--input", tables, "--output", tmp_path / "out", *SMALL, "--no-report")
    assert run_here(*call, "--only", "boosting") == 0
    assert len(pd.read_parquet(artefacts / "oof" / "boosting.parquet")) == 24
    capsys.readouterr()
    assert "there is no such folder" in assert_refused(capsys, *call, "--only", "inpaint")


def test_a_missing_artefact_names_its_stage(field, tmp_path, capsys):
    call = ("--profile", "demo", "--input", field, "--output", tmp_path / "out", "--no-report")
    assert "boosting" in assert_refused(capsys, *call, "--only", "ensemble")


# ---- stages made for a test: they do nothing but what $NBS_FAULT holds

STUB = """#| run
import os, socket, subprocess, sys, time, signal
from pathlib import Path
saved = Path(output) / "artefacts" / "saved.txt"
saved.parent.mkdir(parents=True, exist_ok=True)
saved.write_text("saved")
print("one cell is done; the run began at", os.environ.get("NBS_STARTED", "no given time"))"""
KERNELSPEC = {"name": "python3", "display_name": "python3", "language": "python"}
PARAMETERS = 'input = ""\noutput = ""\nprofile = "demo"\npreset = ""\noverrides = []'


@pytest.fixture(scope="module")
def field(tmp_path_factory) -> Path:
    return tiny.competition(tmp_path_factory.mktemp("field") / "csiro-biomass", n_train=8, n_test=2)


@pytest.fixture(scope="module")
def stubs(tmp_path_factory) -> dict[str, str]:
    "The variables of a run whose stages do only what $NBS_FAULT holds."
    folder, cell = tmp_path_factory.mktemp("notebooks"), nbformat.v4.new_code_cell
    for name in STAGES.values():
        cells = [cell(PARAMETERS, metadata={"tags": ["parameters"]}), cell("1 / 0  # a lesson"), cell(STUB),
                 cell('#| run\nexec(os.environ.get("NBS_FAULT", ""))')]
        nb = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNELSPEC})
        nbformat.write(nb, folder / f"{name}.ipynb")
    return {"NBS_NOTEBOOKS": str(folder)}


def submit_call(field: Path, out: Path) -> list[str]:
    return ["--input", str(field), "--output", str(out), "--from", "submit", "--no-report"]


@pytest.fixture
def run_submit(stubs, field, tmp_path, monkeypatch, capsys):
    "Return a function that runs the stage submit in this process with a fault: exit code, stdout, stderr."
    monkeypatch.setenv("NBS_NOTEBOOKS", stubs["NBS_NOTEBOOKS"])
    monkeypatch.delenv("NBS_STARTED", raising=False)

    def run(*argv: str, fault: str = "", source: Path = field) -> tuple[int, str, str]:
        monkeypatch.setenv("NBS_FAULT", fault)
        code = run_here(*submit_call(source, tmp_path), *argv)
        return code, *capsys.readouterr()

    return run


def accept_signals() -> None:
    "Undo what nohup, or a shell for a job in the background, has ignored."
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def start_submit(field: Path, out: Path, env: dict, fault: str) -> subprocess.Popen:
    "Start the stage submit with `fault` and return when its first cell has run."
    process = subprocess.Popen(
        MAIN + submit_call(field, out), env={**os.environ, **env, "NBS_FAULT": fault}, cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=accept_signals)
    end = time.monotonic() + 120
    while not (out / "artefacts/saved.txt").is_file():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    return process


def read_entry(out: Path) -> tuple[dict, str]:
    "Return the entry of submit in run.json and its executed notebook."
    entry = next(s for s in read_json(out / "run.json")["stages"] if s["name"] == "submit")
    return entry, (out / "notebooks/60_submit.ipynb").read_text()


def test_a_notebook_makes_itself_a_demo(stubs, tmp_path, monkeypatch):
    """Opened with its defaults, a stage notebook makes a demo and runs the stages before its own."""
    monkeypatch.setenv("NBS_NOTEBOOKS", stubs["NBS_NOTEBOOKS"])
    run = open_here("inpaint", output=str(tmp_path), overrides=["demo.n_train=4", "demo.n_test=1"])
    assert (tmp_path / "input/csiro-biomass-truth.csv").is_file()
    assert (tmp_path / "artefacts/saved.txt").is_file()
    assert len(list(run.input.glob("train/*"))) == 4
    assert [p.name for p in (tmp_path / "notebooks").iterdir()] == ["10_eda.ipynb"]


# ---- stopped runs

def test_time_budget_ends_the_run_with_3(run_submit, tmp_path):
    "Run again, the stage is done; lessons are kept and not executed."
    code, _, err = run_submit("--budget-hours", "0.0008", fault="time.sleep(60)")
    assert code == 3 and "budget" in err
    assert read_json(tmp_path / "run.json")["status"].startswith("LimitPassed")
    assert run_submit()[0] == 0
    entry, notebook = read_entry(tmp_path)
    assert entry["status"] == read_json(tmp_path / "run.json")["status"] == "done"
    assert "a lesson" in notebook and "ZeroDivisionError" not in notebook


HANG_UP = pytest.param(signal.SIGHUP, marks=pytest.mark.slow)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, HANG_UP], ids=lambda s: s.name)
def test_a_stopped_run_leaves_no_process(how, stubs, field, tmp_path):
    process = start_submit(field, tmp_path, stubs, "time.sleep(60)")
    tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(how)
    assert process.wait(60) != 0 and tree
    assert not psutil.wait_procs(tree, timeout=60)[1]
    entry, notebook = read_entry(tmp_path)
    assert entry["status"] == "stopped" and read_json(tmp_path / "run.json")["status"] != "done"
    assert "one cell is done" in notebook


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing ends a stage whose runner was killed")
def test_a_killed_runner_takes_its_stage_along(stubs, field, tmp_path):
    """Linux ends the kernel of a runner that got SIGKILL; the next run removes its sockets, and no others."""
    process = start_submit(field, tmp_path, stubs, "time.sleep(60)")
    tree = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert tree and not psutil.wait_procs(tree, timeout=60)[1]
    folder = Path(tempfile.gettempdir())
    mine = folder / f"nbs-{os.getpid()}-0-1"
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(mine))
    nbs_lib.run.remove_stale_sockets()
    assert mine.is_socket() and not list(folder.glob(f"nbs-{process.pid}-*"))
    mine.unlink()


def test_a_killed_kernel_is_reported(run_submit, tmp_path):
    code, _, err = run_submit(fault="os.kill(os.getpid(), signal.SIGKILL)")
    assert code == 1 and "stage submit failed in cell 4: Killed" in err
    assert "short of memory" in err and "one cell is done" in read_entry(tmp_path)[1]


# ---- limits

BEGIN = 'began = saved.parent / "began.txt"\nbegan.write_text(str(time.time()))\n'
# How fast the system hands out pages does not count: the clock starts at the last moment below 0.85 GB.
GROW = """
import sys, time
blocks = []
while True:
    blocks.append(b"x" * 50_000_000)
    if len(blocks) < 18:
        open(sys.argv[-1], "w").write(str(time.time()))
"""
FILL_DISK = """
while True:
    (saved.parent / f"{time.monotonic()}.bin").write_bytes(bytes(5_000_000))
    time.sleep(0.02)
"""
ENDLESS = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sh", "-c", "setsid sleep 87.5 &"])
while True: pass
"""
PROVOKED = {  # code of the last cell; the limit
    "memory of a child": (f"subprocess.run([sys.executable, '-c', {GROW!r}, began])", "limits.memory_gb=1"),
    "disk": (FILL_DISK, "limits.working_gb=0.1"),
    "endless, without SIGTERM, with an orphan": (ENDLESS, ""),
}


@pytest.mark.parametrize("fault", PROVOKED)
def test_a_limit_ends_the_stage_in_seconds(fault, run_submit, tmp_path):
    code, limit = PROVOKED[fault]
    began = tmp_path / "artefacts/began.txt"
    for seconds in (5, 20, 80):  # a stage must reach its last cell, also on a busy machine
        setting = limit or f"limits.stage_hours={seconds / 3600}"
        exit_code, _, err = run_submit("--set", setting, fault=BEGIN + code)
        now = time.time()
        if began.is_file():
            break
    assert exit_code == 3 and err.count("\n") == 1, err
    named = limit.replace("=", " = ") or "limits.stage_hours = "
    assert named in err and "stage submit" in err and "in cell 4 (exec(" in err
    entry, notebook = read_entry(tmp_path)
    late = now - float(began.read_text()) if limit else entry["seconds"] - seconds
    assert entry["status"] == "stopped" and entry["cell"] == 4 and "one cell is done" in notebook
    assert (tmp_path / "artefacts/saved.txt").read_text() == "saved"
    assert not [p for p in psutil.process_iter(["cmdline"]) if "87.5" in (p.info["cmdline"] or [])]
    assert late < 5 * max(1, seconds / 5)  # more where even starting takes long


def test_the_start_and_a_short_budget_reach_the_stages(run_submit, tmp_path):
    start = time.time()
    code, out, _ = run_submit("--budget-hours", "1.8")
    entry, notebook = read_entry(tmp_path)
    began = float(notebook.partition("the run began at ")[2].split("\\")[0])
    assert code == 0 and "isolation: " in out and start <= began <= time.time() - entry["seconds"] + 0.1
    overrides = read_json(tmp_path / "run.json")["overrides"]
    assert overrides == ["limits.hours=1.8", "submit.margin_minutes=4"]


def test_at_home_hours_before_submit_do_not_count(run_submit, tmp_path, monkeypatch):
    "Without a budget submit is not given the start of the run, except in a Kaggle session."
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert run_submit()[0] == 0 and "the run began at no given time" in read_entry(tmp_path)[1]
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert run_submit()[0] == 0 and "the run began at 1" in read_entry(tmp_path)[1]


def test_one_run_at_a_time_in_an_output(run_submit, tmp_path):
    with open(tmp_path / ".lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, _, err = run_submit()
        expected = "another run is at work there; wait for its end, or choose another --output"
        assert code == 2 and err == f"error: output {tmp_path}: {expected}\n"
        assert [p.name for p in tmp_path.iterdir()] == [".lock"], "files of the other run were touched"


def test_a_submission_is_named_only_where_it_was_written(run_submit, tmp_path):
    for written in (False, True):
        if written:
            (tmp_path / "submission.csv").write_text("sample_id,target\n")
        code, out, _ = run_submit("--report")
        assert code == 0 and f"open {tmp_path / 'report.html'}" in out
        assert ("submission.csv" in out) == written


def test_half_a_run_has_its_report(run_submit, tmp_path):
    """A fault of the report is a warning and leaves the run's own end as it was."""
    code, _, err = run_submit("--report", fault="1 / 0")
    assert code == 1 and "ZeroDivisionError" in err and "warning" not in err
    assert "ZeroDivisionError" in (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()  # cannot be replaced
    code, _, err = run_submit("--report", fault="1 / 0")
    assert code == 1 and "ZeroDivisionError" in err and "Traceback" not in err
    assert "warning: no report was written" in err


# ---- isolation

LEAVE = """
try:
    socket.create_connection(("192.0.2.1", 80), 5)
    print("WENT THROUGH")
except OSError as e:
    print("refused:", e.errno)
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname(), 5).close()
    print("the loopback works")
import cv2, numpy
for write in (lambda: (Path(input) / "cache.bin").write_bytes(b"x"),
              lambda: cv2.imwrite(input + "/train/cache.png", numpy.zeros((2, 2), "uint8"))):
    try:
        print("written:", write())
    except OSError as e:
        print("refused:", e.errno)
"""


@pytest.mark.parametrize("permitted", [True, False], ids=["namespaces where permitted", "guard"])
def test_a_stage_is_isolated(permitted, run_submit, tmp_path, monkeypatch):
    """No network; a read-only input where namespaces are permitted, else changing it is a failure."""
    source = tiny.competition(tmp_path / "input" / "csiro-biomass", n_train=4, n_test=1)
    mounted = permitted and nbs_lib.isolation.can_isolate(source)
    monkeypatch.setattr(nbs_lib.isolation, "can_isolate", lambda folder: mounted)
    code, out, err = run_submit(fault=LEAVE, source=source)
    entry, notebook = read_entry(tmp_path)
    assert "WENT THROUGH" not in notebook and f"refused: {errno.ENETUNREACH}" in notebook
    assert "the loopback works" in notebook
    assert (f"refused: {errno.EROFS}" in notebook) == mounted == (not (source / "train/cache.png").exists())
    network = read_json(tmp_path / "run.json")["sandbox"]["network"]
    if mounted:
        assert code == 0 and entry["status"] == "done" and network == "namespace"
        assert "network off and input read-only (namespaces)" in out
    else:
        assert code == 1 and entry["status"] == "failed" and network == "guard"
        assert "cache.bin is new (and 1 more)" in err and "without C libraries" in out


def test_no_sandbox_is_reported(run_submit, tmp_path):
    code, out, _ = run_submit("--sandbox", "none")
    assert code == 0 and "isolation: network as it is" in out
    assert read_json(tmp_path / "run.json")["sandbox"]["network"] == "as it is"


def test_an_ordinary_user_gets_the_same_isolation(tmp_path):
    """Namespaces are granted to root and nobody, or (in some containers) to neither."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    code = ("import sys; from pathlib import Path; from nbs_lib.isolation import can_isolate; "
            "print(can_isolate(Path(sys.argv[1])))")
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:3]:
        parent.chmod(parent.stat().st_mode | 0o055)
    env = {**os.environ, "HOME": str(tmp_path), "MPLCONFIGDIR": str(tmp_path)}
    answers = {}
    for user in (0, 65534):
        try:
            done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True,
                                  cwd=ROOT, user=user, env=env, check=True)
        except (PermissionError, subprocess.CalledProcessError):
            pytest.skip("another user cannot read this installation")
        answers[user] = done.stdout.strip()
    assert answers[0] == "True" or answers[65534] != "True"


def test_fewer_cores(tmp_path):
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores and Linux")
    assert choose_isolation("auto", tmp_path, 1).cpus == 1
    assert choose_isolation("auto", tmp_path, 10**6).cpus == 0
    code = ("import os; from nbs_lib.isolation import enter_isolation; "
            "enter_isolation('as it is', 1); print(len(os.sched_getaffinity(0)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "1"


# ---- the interpreter of the kernels

@pytest.fixture(params=["gone", "without packages"])
def foreign_kernel(request, tmp_path, monkeypatch) -> None:
    "A kernelspec `python3` that is of another interpreter."
    others = {"gone": [str(tmp_path / "bin/python")], "without packages": [sys.executable, "-I", "-S"]}
    argv = [*others[request.param], "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "other", "language": "python"}
    folder = tmp_path / "jupyter/kernels/python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))


def test_a_stage_runs_in_this_interpreter(foreign_kernel, run_submit, tmp_path):
    assert run_submit(fault="import nbs_lib; print(sys.executable)")[0] == 0
    assert sys.executable in read_entry(tmp_path)[1]


def test_lessons_run_in_this_interpreter(foreign_kernel, tmp_path):
    cell = nbformat.v4.new_code_cell("import sys, nbs_lib\nprint(sys.executable)")
    nb = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": KERNELSPEC})
    nbformat.write(nb, tmp_path / "a.ipynb")
    assert execute(tmp_path / "a.ipynb").cells[0].outputs[0].text.strip() == sys.executable


# ---- settings

def test_every_profile_and_preset_loads():
    for profile in ("demo", "laptop", "kaggle"):
        for preset in ("", "recipe"):
            assert load_settings(profile, preset).profile == profile


def test_the_recipe_on_kaggle_names_the_preset_that_fits(tables, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nbs_lib.run, "is_fresh", lambda *a: True)
    for preset, named in (("recipe", True), ("recipe_t4", False)):
        nbs_lib.run.main(["--profile", "kaggle", "--preset", preset, "--input", str(tables), "--only", "eda",
                          "--output", str(tmp_path / preset), "--no-report"])
        assert ("recipe_t4 is the same less" in capsys.readouterr().out) == named
