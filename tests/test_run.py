"""The command line and its promises: artefacts, exit codes, resumption, refusals that leave nothing changed."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import tiny
from conftest import ROOT, SMALL, command

from nbs_lib.run import STAGES
from nbs_lib.runtime import read_json
from nbs_lib.settings import load_settings
from nbs_lib.tables import read_oof
from nbs_lib.targets import TARGETS, imbalance, weighted_r2_score


def tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


# ---- what a whole run leaves

def test_every_promised_file_is_there(finished):
    for name in ("submission.csv", "report.html", "scores.json", "run.json", "artefacts/folds.csv", "artefacts/photos/stamps.csv", "artefacts/photos/photos.csv",
                 "artefacts/oof/dinov3.parquet", "artefacts/oof/boosting.parquet", "artefacts/oof/ensemble.parquet", "artefacts/blend.json"):
        assert (finished / name).is_file(), name
    for notebook in STAGES.values():
        assert (finished / "notebooks" / f"{notebook}.ipynb").is_file()
    assert list((finished / "artefacts/dinov3").glob("fold*.safetensors")) and list((finished / "artefacts/features").glob("*.npz"))
    assert not [p for p in finished.rglob("*") if ".tmp-" in p.name]


def test_submission_is_valid(finished, paddock):
    sample, mine = pd.read_csv(paddock / "sample_submission.csv"), pd.read_csv(finished / "submission.csv")
    assert mine.columns.tolist() == ["sample_id", "target"] and mine["sample_id"].tolist() == sample["sample_id"].tolist()
    assert np.isfinite(mine["target"]).all() and (mine["target"] >= 0).all()
    wide = mine.assign(image=mine.sample_id.str.rpartition("__")[0], name=mine.sample_id.str.rpartition("__")[2]).pivot(index="image", columns="name", values="target")
    assert np.abs(imbalance(wide[list(TARGETS)].to_numpy())).max() < 1e-6
    assert wide[list(TARGETS)].std().min() > 0, "every photo got the same answer"


def test_scores_are_what_the_files_say(finished, paddock):
    scores = read_json(finished / "scores.json")
    train = pd.read_csv(paddock / "train.csv")
    wide = train.assign(image=train.sample_id.str.rpartition("__")[0]).pivot(index="image", columns="target_name", values="target")[list(TARGETS)]
    for model in ("dinov3", "boosting", "ensemble"):
        again = weighted_r2_score(wide.to_numpy(), read_oof(finished / f"artefacts/oof/{model}.parquet", wide.index))
        assert scores["oof"][model]["grouped"]["r2"] == pytest.approx(again, abs=1e-12)
    assert {"grouped", "stratified"} <= scores["constant"].keys() and scores["test"]["ensemble"]["photos"] == 4


def test_run_json_tells_what_it_cost(finished):
    record = read_json(finished / "run.json")
    assert record["status"] == "done" and [s["name"] for s in record["stages"]] == list(STAGES)
    for stage in record["stages"]:
        assert stage["seconds"] > 0 and stage["peak_rss_gb"] > 0.01 and stage["network"] in ("namespace", "guard")
    assert record["versions"]["torch"] and record["inputs"]["input/train/*"]["files"] == 24 and "seed" in record


def test_nothing_was_written_to_the_input(finished, paddock):
    assert {p.name for p in paddock.iterdir()} == {"train.csv", "test.csv", "sample_submission.csv", "train", "test"}


def test_second_run_does_nothing_again(finished, paddock):
    before = tree(finished / "artefacts")
    done = command("--profile", "demo", "--input", paddock, "--output", finished, *SMALL)
    assert done.returncode == 0 and done.stdout.count("up to date") == len(STAGES), done.stdout
    assert tree(finished / "artefacts") == before


def test_a_changed_setting_reruns_its_stage(finished, paddock):
    done = command("--profile", "demo", "--input", paddock, "--output", finished, *SMALL, "--only", "eda", "--set", "run.seed=5", "--no-report")
    assert done.returncode == 0 and "eda: done" in done.stdout
    done = command("--profile", "demo", "--input", paddock, "--output", finished, *SMALL, "--only", "eda", "--no-report")
    assert done.returncode == 0 and "eda: done" in done.stdout


def test_stage_notebook_runs_with_plain_papermill(finished, paddock, tmp_path):
    done = subprocess.run([sys.executable, "-m", "papermill", str(ROOT / "notebooks/51_ensemble.ipynb"), str(tmp_path / "out.ipynb"), "-p", "input", str(paddock),
                           "-p", "output", str(finished), "-p", "profile", "demo", "-y", "overrides: [run.folds=2]"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_stage_notebook_makes_itself_a_demo(tmp_path):
    """Opened with its defaults, a stage notebook makes a demo and runs what comes before it."""
    done = subprocess.run([sys.executable, "-m", "papermill", str(ROOT / "notebooks/20_inpaint.ipynb"), str(tmp_path / "out.ipynb"), "-p", "output", str(tmp_path / "out"),
                           "-y", "overrides: [demo.n_train=10, demo.n_test=2, run.folds=2]"], capture_output=True, text=True, cwd=ROOT / "notebooks")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out/input/csiro-biomass-truth.csv").is_file() and (tmp_path / "out/artefacts/folds.csv").is_file()
    assert (tmp_path / "out/artefacts/photos/photos.csv").is_file()


# ---- refusals: exit 2, one line, nothing changed

def edit(folder: Path, name: str, change) -> None:
    table = pd.read_csv(folder / name, dtype=str, keep_default_na=False)
    change(table).to_csv(folder / name, index=False)


def drop_photo(folder: Path) -> None:
    next((folder / "train").iterdir()).unlink()


FAULTS = {
    "no train.csv": lambda f: (f / "train.csv").unlink(),
    "no test.csv": lambda f: (f / "test.csv").unlink(),
    "no sample": lambda f: (f / "sample_submission.csv").unlink(),
    "no column": lambda f: edit(f, "train.csv", lambda t: t.drop(columns="State")),
    "no photo": drop_photo,
    "no test photo folder": lambda f: shutil.rmtree(f / "test"),
    "double row": lambda f: edit(f, "train.csv", lambda t: pd.concat([t, t.iloc[:1]])),
    "blank id": lambda f: edit(f, "train.csv", lambda t: t.assign(sample_id=[""] + t.sample_id.tolist()[1:])),
    "four rows": lambda f: edit(f, "train.csv", lambda t: t.iloc[1:]),
    "NaN": lambda f: edit(f, "train.csv", lambda t: t.assign(target=["nan"] + t.target.tolist()[1:])),
    "blank target": lambda f: edit(f, "train.csv", lambda t: t.assign(target=[""] + t.target.tolist()[1:])),
    "negative": lambda f: edit(f, "train.csv", lambda t: t.assign(target=["-3"] + t.target.tolist()[1:])),
    "a word": lambda f: edit(f, "train.csv", lambda t: t.assign(target=["much"] + t.target.tolist()[1:])),
    "unknown target": lambda f: edit(f, "train.csv", lambda t: t.assign(sample_id=t.sample_id.str.replace("Dry_Green_g", "Roots_g"))),
    "unknown target name": lambda f: edit(f, "train.csv", lambda t: t.assign(target_name=t.target_name.str.replace("Dry_Green_g", "Roots_g"))),
    "a sample of something else": lambda f: edit(f, "sample_submission.csv", lambda t: t.assign(sample_id=t.sample_id.str.replace("__", "/"))),
    "empty train": lambda f: edit(f, "train.csv", lambda t: t.iloc[:0]),
    "empty test": lambda f: edit(f, "test.csv", lambda t: t.iloc[:0]),
    "zero bytes": lambda f: (f / "train.csv").write_text(""),
    "not a table": lambda f: (f / "train.csv").write_bytes(os.urandom(2000)),
}


def refused(capsys, *argv) -> str:
    "Run the command line in this process; it must exit 2 with one line."
    from nbs_lib.run import main

    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err, err
    return err


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_tables_are_refused(fault, tables, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "submission.csv").write_text("an earlier one")
    FAULTS[fault](tables)
    refused(capsys, "--profile", "demo", "--input", tables, "--output", out)
    assert (out / "submission.csv").read_text() == "an earlier one" and len(list(out.rglob("*"))) == 1


@pytest.mark.parametrize("argv", [["--profile", "moon"], ["--only", "mow"], ["--from", "mow"], ["--set", "train_dinov3.nothing=3"], ["--set", "run.folds"], ["--set", "run.folds=three"],
                                  ["--preset", "moon"], ["--what"], ["--budget-hours", "-1"], ["--input", "nowhere"]], ids=" ".join)
def test_bad_calls_are_refused(argv, tables, tmp_path, capsys):
    call = ["--profile", "demo", "--input", tables, "--output", tmp_path / "out", *argv]
    assert len(refused(capsys, *call)) < 1000
    assert not (tmp_path / "out" / "artefacts").exists()


def test_output_inside_the_input_is_refused(tables, capsys):
    assert "inside the input" in refused(capsys, "--profile", "demo", "--input", tables, "--output", tables / "out")
    assert not (tables / "out").exists()


def test_output_that_is_a_file_is_refused(tables, tmp_path, capsys):
    (tmp_path / "out").write_text("not a folder")
    refused(capsys, "--profile", "demo", "--input", tables, "--output", tmp_path / "out")


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_full_or_read_only_output_is_refused(kind, tables, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    options = "size=32k" if kind == "full" else "size=1m,ro"
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(out)], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        assert str(out) in refused(capsys, "--profile", "demo", "--input", tables, "--output", out)
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.mark.parametrize("fault", ["zero bytes", "half a photo", "text"])
def test_unreadable_photo_is_named(fault, tables, finished, tmp_path):
    photo = sorted((tables / "train").iterdir())[0]
    content = photo.read_bytes()
    photo.unlink()
    photo.write_bytes({"zero bytes": b"", "half a photo": content[: len(content) // 2], "text": b"green grass"}[fault])
    done = command("--profile", "demo", "--input", tables, "--output", tmp_path / "out", "--only", "inpaint", *SMALL)
    assert done.returncode == 2 and photo.name in done.stderr and "Traceback" not in done.stderr.splitlines()[-1]
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert (tmp_path / "out/notebooks/20_inpaint.ipynb").is_file() and not (tmp_path / "out/submission.csv").exists()


def test_features_are_enough_to_judge_model_2(finished, tables, tmp_path):
    "Neither photos nor the stages before: whoever has features of their own asks for boosting alone."
    for split in ("train", "test"):
        shutil.rmtree(tables / split)
    shutil.copytree(finished / "artefacts" / "features", tmp_path / "out" / "artefacts" / "features")
    call = ("--profile", "demo", "--input", tables, "--output", tmp_path / "out", *SMALL)
    done = command(*call, "--only", "boosting", "--set", "boosting.members=ridge")
    assert done.returncode == 0, done.stderr
    assert len(pd.read_parquet(tmp_path / "out" / "artefacts" / "oof" / "boosting.parquet")) == 24
    asked = command(*call, "--only", "inpaint")
    assert asked.returncode == 2 and "there is no such folder" in asked.stderr


def test_a_missing_artefact_names_its_stage(paddock, tmp_path):
    done = command("--profile", "demo", "--input", paddock, "--output", tmp_path / "out", "--only", "ensemble", "--no-report")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and "boosting" in last


# ---- stopped runs

def test_time_budget_ends_the_run_with_3(paddock, tmp_path):
    done = command("--profile", "demo", "--input", paddock, "--output", tmp_path / "out", "--budget-hours", "0.0008", *SMALL)
    assert done.returncode == 3 and "budget" in done.stderr
    assert read_json(tmp_path / "out/run.json")["status"].startswith("LimitPassed")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda s: s.name)
def test_a_stopped_run_leaves_no_orphan(how, paddock, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-m", "nbs_lib.run", "--profile", "demo", "--input", str(paddock), "--output", str(out), *SMALL],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # the tests themselves may stand under nohup
    family = []
    for _ in range(1200):
        family = psutil.Process(process.pid).children(recursive=True)
        if len(family) > 1:  # the worker and its kernel
            break
        time.sleep(0.1)
    process.send_signal(how)
    assert process.wait(120) != 0 and len(family) > 1
    gone, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert json.loads((out / "run.json").read_text())["status"] != "done"


# ---- limits, provoked in stages that are made for it

FAKE = """#| run
import os, socket, subprocess, sys, time, signal
from pathlib import Path
saved = Path(output) / "artefacts" / "saved.txt"
saved.parent.mkdir(parents=True, exist_ok=True)
saved.write_text("saved")
print("one cell is done; the run began at", os.environ.get("NBS_STARTED", "no matter when"))"""
BEGIN = 'began = saved.parent / "began.txt"\nbegan.write_text(str(time.time()))\n'
# How fast a system hands out pages is not the runner's doing: its time counts from the last moment at which the hog held less than 0.85 GB.
HOG = """
import sys, time
hog = []
while True:
    hog.append(b"x" * 50_000_000)
    if len(hog) < 18:
        open(sys.argv[-1], "w").write(str(time.time()))
"""
PROVOKED = {  # what the second cell does; settings; what must be told
    "memory": (BEGIN + f"sys.argv = [str(began)]\n{HOG}", ["limits.memory_gb=1"], "limits.memory_gb = 1"),
    "memory of a child": (BEGIN + f"subprocess.run([sys.executable, '-c', {HOG!r}, began])", ["limits.memory_gb=1"], "limits.memory_gb = 1"),
    "disk": (BEGIN + "while True:\n    (saved.parent / f'{time.monotonic()}.bin').write_bytes(bytes(5_000_000))\n    time.sleep(0.02)", ["limits.working_gb=0.1"], "limits.working_gb = 0.1"),
    "endless, deaf, with a child that ran away": (
        BEGIN + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsubprocess.Popen(['sh', '-c', 'setsid sleep 87.5 &'])\nwhile True: pass", [], "limits.stage_hours = "),
}


@pytest.fixture(scope="module")
def field(tmp_path_factory) -> Path:
    return tiny.competition(tmp_path_factory.mktemp("field") / "csiro-biomass", n_train=8, n_test=2)


@pytest.fixture(scope="module")
def fakes(tmp_path_factory) -> dict[str, str]:
    "The environment of a run whose stages do nothing but what $NBS_FAULT says."
    folder = tmp_path_factory.mktemp("notebooks")
    for name in STAGES.values():
        nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
        parameters = nbformat.v4.new_code_cell('input = ""\noutput = ""\nprofile = "demo"\npreset = ""\noverrides = []', metadata={"tags": ["parameters"]})
        lesson = nbformat.v4.new_code_cell("raise AssertionError('a lesson was executed')")
        nb.cells = [parameters, lesson, nbformat.v4.new_code_cell(FAKE), nbformat.v4.new_code_cell('#| run\nexec(os.environ.get("NBS_FAULT", ""))')]
        nbformat.write(nb, folder / f"{name}.ipynb")
    return {**{k: v for k, v in os.environ.items() if k != "NBS_STARTED"}, "NBS_NOTEBOOKS": str(folder)}


def submit_only(field: Path, out: Path, env: dict, *argv: str, fault: str = "") -> subprocess.CompletedProcess:
    return command("--profile", "demo", "--input", field, "--output", out, "--from", "submit", "--no-report", *argv, env={**env, "NBS_FAULT": fault})


@pytest.fixture(scope="module")
def quiet(fakes, field, tmp_path_factory) -> dict:
    "The entry in run.json of a stage that does nothing wrong, with a budget of 1.8 hours."
    out, start = tmp_path_factory.mktemp("quiet"), time.time()
    done = submit_only(field, out, fakes, "--budget-hours", "1.8")
    assert done.returncode == 0 and "sandbox: " in done.stdout and "1.8 h for the run" in done.stdout, done.stderr
    entry, notebook = ended(out)
    late = float(notebook.partition("the run began at ")[2].split("\\")[0]) - start
    return {**entry, "late": late, "early": time.time() - start - late - entry["seconds"], "overrides": read_json(out / "run.json")["overrides"]}


def ended(out: Path) -> tuple[dict, str]:
    "What run.json and the executed notebook tell of submit."
    entry = next(s for s in read_json(out / "run.json")["stages"] if s["name"] == "submit")
    return entry, (out / "notebooks/60_submit.ipynb").read_text()


@pytest.mark.parametrize("fault", PROVOKED)
def test_a_limit_ends_the_stage_in_seconds(fault, fakes, field, quiet, tmp_path):
    body, settings, told = PROVOKED[fault]
    for patience in (1, 4, 16):  # a stage must have time to come to its cell, also on a machine that has become busier
        stage_hours = patience * (1.3 * quiet["seconds"] + 4) / 3600
        asked = settings or [f"limits.stage_hours={stage_hours}"]
        done = submit_only(field, tmp_path, fakes, *(w for s in asked for w in ("--set", s)), fault=body)
        now = time.time()
        if (tmp_path / "artefacts/began.txt").is_file():
            break
    assert done.returncode == 3, done.stdout + done.stderr
    assert told in done.stderr and "stage submit" in done.stderr and "in cell 4 (exec(" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    entry, notebook = ended(tmp_path)
    late = entry["seconds"] - 3600 * stage_hours if not settings else now - float((tmp_path / "artefacts/began.txt").read_text())
    assert entry["status"] == "stopped" and entry["cell"] == 4 and "one cell is done" in notebook
    assert (tmp_path / "artefacts/saved.txt").read_text() == "saved"
    assert not [p for p in psutil.process_iter(["cmdline"]) if "87.5" in (p.info["cmdline"] or [])], "a process ran away"
    again = submit_only(field, tmp_path, fakes)  # --from finishes the run
    entry, notebook = ended(tmp_path)
    assert again.returncode == 0 and entry["status"] == read_json(tmp_path / "run.json")["status"] == "done" and "a lesson was executed" in notebook
    idle = max(quiet["seconds"], entry["seconds"])  # of a stage that does nothing, before and after
    print(f"{fault}: ended {late:.1f} s after it passed its limit; a stage that does nothing takes {idle:.1f} s")  # seen with -s
    assert late < 5 * max(1.0, idle / 4)  # seconds; more only on a machine so busy that even doing nothing takes its time


def test_the_start_and_a_short_budget_reach_the_stages(quiet):
    assert quiet["late"] > -0.1 and quiet["early"] > -0.1, "the run did not begin between the command and its stage"
    assert quiet["overrides"] == ["limits.hours=1.8", "submit.margin_minutes=4"]


def test_at_home_nobody_counts_the_hours_before_submit(fakes, field, tmp_path):
    "Without a budget, and away from Kaggle, submit is not told when the run began; in a Kaggle session it is."
    for env, told in ((fakes, "the run began at no matter when"), ({**fakes, "KAGGLE_KERNEL_RUN_TYPE": "Batch"}, "the run began at 1")):
        assert submit_only(field, tmp_path, env).returncode == 0
        assert told in ended(tmp_path)[1]


def test_one_run_at_a_time_in_an_output(fakes, field, tmp_path):
    import fcntl

    with open(tmp_path / ".lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        kept_out = submit_only(field, tmp_path, fakes)
        assert kept_out.returncode == 2 and kept_out.stderr == f"error: output {tmp_path}: another run is at work there; wait for its end, or choose another --output\n"
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock"], "the other run's files were touched"
    assert submit_only(field, tmp_path, fakes).returncode == 0


def test_a_terminal_that_knows_no_utf8(fakes, field, tmp_path):
    "Dots and dashes may be lost there, the run may not; and what it writes is UTF-8 all the same."
    plain = {**fakes, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = command("--profile", "demo", "--input", field, "--output", tmp_path, "--from", "submit", env={**plain, "NBS_FAULT": "1 / 0"})
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "Encode" not in done.stderr + done.stdout, done.stderr
    assert "ZeroDivisionError" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_litter_of_a_file_manager_is_no_change(fakes, tmp_path):
    source = tiny.competition(tmp_path / "csiro-biomass", n_train=4, n_test=1)
    (source / "train" / ".DS_Store").write_bytes(b"before")
    litter = "(Path(input) / 'train' / '.DS_Store').write_bytes(b'after'); (Path(input) / 'Thumbs.db').write_bytes(b'new')"
    done = submit_only(source, tmp_path / "out", fakes, "--sandbox", "none", fault=litter)
    assert done.returncode == 0 and (source / "Thumbs.db").is_file(), done.stderr


LEAVING = """
for what in (lambda: socket.create_connection(('192.0.2.1', 80), 5), lambda: (Path(input) / 'cache.bin').write_bytes(b'x'), lambda: (Path(input) / 'test.csv').rename(Path(input) / 'old.csv'),
             lambda: open(Path(input) / 'train.csv', 'a').write('x')):
    try:
        what()
        print('WENT THROUGH')
    except OSError as e:
        print('refused:', e.strerror)
        last = e
import tempfile
print('room for what is temporary:', tempfile.TemporaryFile().write(b'x'))
raise last"""


def without(monkeypatch, *ways: str) -> None:
    "Let the runner find that this machine grants no namespaces, or no Landlock."
    import nbs_lib.run

    for way in ways:
        monkeypatch.setattr(nbs_lib.run, way, lambda *_: False)


@pytest.mark.parametrize("missing", [(), ("may_build",), ("may_build", "may_forbid")], ids=["walls where allowed", "no namespaces", "guards alone"])
def test_what_leaves_the_sandbox_is_refused(missing, fakes, field, tmp_path, monkeypatch, capsys):
    import nbs_lib.run

    before = tree(field)
    without(monkeypatch, *missing)
    for key, value in {**fakes, "NBS_FAULT": LEAVING}.items():
        monkeypatch.setenv(key, value)
    assert nbs_lib.run.main(["--profile", "demo", "--input", str(field), "--output", str(tmp_path), "--only", "submit", "--no-report"]) == 1
    err = capsys.readouterr().err
    assert "stage submit failed in cell 4: OSError" in err and "ead-only" in err and "train.csv" in err, err
    notebook = ended(tmp_path)[1]
    assert "WENT THROUGH" not in notebook and notebook.count("refused: ") == 4 and ("nreachable" in notebook or "network is off" in notebook)
    assert "room for what is temporary: 1" in notebook and tree(field) == before
    sandbox = read_json(tmp_path / "run.json")["sandbox"]
    assert not missing or sandbox["network"] == "guard" and sandbox["input"] == ("guard" if "may_forbid" in missing or not nbs_lib.run.may_forbid(field, tmp_path) else "landlock")


SCRIBBLE = "import cv2, numpy; print('OpenCV wrote', cv2.imwrite(input + '/train/cache.png', numpy.zeros((2, 2), 'uint8')))"


@pytest.mark.parametrize("missing", [("may_build",), ("may_build", "may_forbid")], ids=["Landlock", "guards alone"])
def test_what_a_c_library_writes_to_the_input(missing, fakes, tmp_path, monkeypatch, capsys):
    """Landlock refuses it. A guard does not see it, and then the stage has failed, and is not up to date."""
    import nbs_lib.run

    source, out = tiny.competition(tmp_path / "csiro-biomass", n_train=4, n_test=1), tmp_path / "out"
    out.mkdir()
    held = "may_forbid" not in missing and nbs_lib.run.may_forbid(source, out)
    without(monkeypatch, *missing)
    for key, value in {**fakes, "NBS_FAULT": SCRIBBLE}.items():
        monkeypatch.setenv(key, value)
    code = nbs_lib.run.main(["--profile", "demo", "--input", str(source), "--output", str(out), "--only", "submit", "--no-report"])
    told, (entry, notebook) = capsys.readouterr(), ended(out)
    assert (source / "train/cache.png").exists() != held and f"OpenCV wrote {not held}" in notebook
    assert code == (0 if held else 1) and entry["status"] == ("done" if held else "failed")
    assert held or "train/cache.png is new" in told.err and "does not see C libraries" in told.out


def test_half_a_run_has_its_report(fakes, field, tmp_path):
    """Of a run that failed too; a fault of the report is told and leaves the run's own end as it was."""
    call = ("--profile", "demo", "--input", field, "--output", tmp_path, "--only", "submit")
    failed = command(*call, env={**fakes, "NBS_FAULT": "1 / 0"})
    assert failed.returncode == 1 and "ZeroDivisionError" in failed.stderr and "warning" not in failed.stderr
    assert "ZeroDivisionError" in (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()  # what cannot be replaced
    again = command(*call, env={**fakes, "NBS_FAULT": "1 / 0"})
    assert again.returncode == 1 and "ZeroDivisionError" in again.stderr and "warning: no report was written" in again.stderr and "Traceback" not in again.stderr


def test_an_ordinary_user_gets_the_same_walls(tmp_path):
    """As root and as nobody: namespaces are granted to both, or (in some containers) to neither."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    code = "import sys; from pathlib import Path; from nbs_lib.run import may_build; print(may_build(True, Path(sys.argv[1])))"
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:3]:
        parent.chmod(parent.stat().st_mode | 0o055)
    told = {}
    for user in (0, 65534):
        try:
            done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, user=user, env={**os.environ, "HOME": str(tmp_path), "MPLCONFIGDIR": str(tmp_path)}, check=True)
        except (PermissionError, subprocess.CalledProcessError):
            pytest.skip("another user cannot read this installation")
        told[user] = done.stdout.strip()
    assert told[0] == "True" or told[65534] != "True"


# ---- the interpreter of the kernels

@pytest.fixture(params=["gone", "without packages"])
def foreign_kernel(request, tmp_path) -> dict[str, str]:
    "An environment whose kernelspec `python3` is of another interpreter."
    others = {"gone": [str(tmp_path / "bin/python")], "without packages": [sys.executable, "-I", "-S"]}
    argv = [*others[request.param], "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "other", "language": "python"}
    folder = tmp_path / "jupyter/kernels/python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    return {**os.environ, "JUPYTER_PATH": str(tmp_path / "jupyter")}


def test_a_stage_runs_in_this_interpreter(foreign_kernel, tmp_path):
    folder = tiny.competition(tmp_path / "csiro-biomass", n_train=8, n_test=2)
    out = tmp_path / "out"
    done = command("--input", folder, "--output", out, "--only", "eda", "--no-report", env=foreign_kernel)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "artefacts/folds.csv").is_file()
    assert nbformat.read(out / "notebooks/10_eda.ipynb", as_version=4).metadata.kernelspec.name == "python3"


def test_lessons_run_in_this_interpreter(foreign_kernel, tmp_path):
    cell = nbformat.v4.new_code_cell("import sys, nbs_lib\nprint(sys.executable)")
    kernelspec = {"name": "python3", "display_name": "python3", "language": "python"}
    nb = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernelspec})
    nbformat.write(nb, tmp_path / "a.ipynb")
    code = "from notebooks import *; print(execute(Path(sys.argv[1])).cells[0].outputs[0].text)"
    call = [sys.executable, "-c", code, str(tmp_path / "a.ipynb")]
    environment = {**foreign_kernel, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT / "tests", env=environment)
    assert done.returncode == 0 and done.stdout.strip() == sys.executable, done.stderr[-2000:]


def test_a_killed_kernel_is_told(fakes, field, tmp_path):
    done = submit_only(field, tmp_path, fakes, fault="os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == 1 and "stage submit failed in cell 4: Killed" in done.stderr and "short of memory" in done.stderr
    assert "one cell is done" in ended(tmp_path)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing ends a stage whose runner was killed")
def test_a_killed_runner_takes_its_stage_along(fakes, field, tmp_path):
    """SIGKILL leaves the runner no word; Linux ends the worker, and the kernel follows it."""
    process = subprocess.Popen([sys.executable, "-m", "nbs_lib.run", "--profile", "demo", "--input", str(field), "--output", str(tmp_path), "--only", "submit", "--no-report"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env={**fakes, "NBS_FAULT": "time.sleep(60)"})
    for _ in range(1200):
        if (tmp_path / "artefacts/saved.txt").is_file():
            break
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(family) > 1 and not psutil.wait_procs(family, timeout=60)[1]


def test_fewer_cores(tmp_path):
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores and Linux")
    code = "import os; from pathlib import Path; from nbs_lib.run import Sandbox, enter_sandbox; enter_sandbox(Sandbox('as it is', 'as it is', 1), Path(), Path()); print(len(os.sched_getaffinity(0)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "1"


# ---- settings

def test_every_profile_and_preset_loads():
    for profile in ("demo", "laptop", "kaggle"):
        for preset in ("", "recipe"):
            assert load_settings(profile, preset).profile == profile


def test_the_recipe_on_kaggle_names_the_preset_that_fits(tables, tmp_path, capsys, monkeypatch):
    from nbs_lib import run as runner

    monkeypatch.setattr(runner, "is_fresh", lambda *a: True)
    monkeypatch.setattr(runner, "adopt_orphans", lambda: None)
    for preset, named in (("recipe", True), ("recipe_t4", False)):
        runner.main(["--profile", "kaggle", "--preset", preset, "--input", str(tables), "--output", str(tmp_path / preset), "--only", "eda", "--no-report"])
        assert ("recipe_t4 is the same less" in capsys.readouterr().out) == named
