"""The ledger: killed and concurrent writers, damaged lines, Kaggle's list, recorded runs, the choice."""
import csv
import dataclasses
import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from nbs_lib import ledger
from nbs_lib.ensemble import run_ensemble
from nbs_lib.ledger import (
    Candidates,
    add_facts,
    add_run,
    advise_selection,
    append_lines,
    choose_finals,
    estimate_scores,
    import_submissions,
    list_entries,
    main,
    parse_submissions,
    read_candidates,
    read_ledger,
    record,
    try_record,
)
from nbs_lib.runtime import InputError, write_json
from nbs_lib.tables import read_competition, read_oof
from nbs_lib.targets import weighted_r2_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.ledger import Season, fill_ledger, simulate_season, study, summarise

PUBLIC = 427  # photos


def choose(c: Candidates, copies: float = 0.995) -> pd.DataFrame:
    return choose_finals(c, PUBLIC, copies)


# ---- the file ----
def test_cut_at_every_byte_of_the_last_line(tmp_path, capsys):
    path = tmp_path / "ledger.jsonl"
    add_facts(path, "one", at="now")
    head = path.read_bytes()
    add_facts(path, "two", message="zwei ü")
    whole = path.read_bytes()
    for cut in range(len(head) + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert "one" in read_ledger(path)
        capsys.readouterr()
        add_facts(path, "three")
        assert path.read_bytes().startswith(whole[:cut] + b"\n"), "earlier bytes are unchanged"
        is_torn = cut < len(whole) - 1
        assert ("line 2 is damaged" in capsys.readouterr().out) == is_torn
        assert list(read_ledger(path)) == (["one", "three"] if is_torn else ["one", "two", "three"])


LINES = [b'{"v": 1}', b"[]", b'{"id": ["x"]}', b"null", b'{"id": 3, "public": 0.5}', b'"id"', b"7"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from(LINES)), max_size=8))
def test_any_bytes_between_the_lines(tmp_path_factory, junk):
    path = tmp_path_factory.mktemp("junk") / "ledger.jsonl"
    path.write_bytes(b"\n".join([*junk, json.dumps({"id": "good", "message": "m"}).encode(), b""]))
    assert read_ledger(path)["good"]["message"] == "m"


def test_a_full_disk_leaves_earlier_lines_unharmed(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    add_facts(path, "one")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written .*; earlier lines are unharmed"):
            add_facts(path, "two", message="long " * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not path.read_bytes().endswith(b"\n"), "a part of the line was written"
    add_facts(path, "two")
    assert list(read_ledger(path)) == ["one", "two"]


CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["nbs_lib.ledger", "test_ledger"])


def write_many(path: str, who: int, n: int, acknowledged: str = "") -> None:
    for k in range(n):
        entry = add_facts(path, f"{who}-{k}", padding="x" * 9000)
        if acknowledged:
            with open(acknowledged, "a") as f:
                f.write(entry + "\n")


def test_three_writers_at_once(tmp_path, capsys):
    path = tmp_path / "ledger.jsonl"
    writers = [CONTEXT.Process(target=write_many, args=(str(path), who, 20)) for who in range(3)]
    for w in writers:
        w.start()
    for w in writers:
        w.join(60)
        assert w.exitcode == 0
    assert read_ledger(path).keys() == {f"{who}-{k}" for who in range(3) for k in range(20)}
    assert "damaged" not in capsys.readouterr().out


def test_killed_while_writing(tmp_path):
    path, log = tmp_path / "ledger.jsonl", tmp_path / "acknowledged.txt"
    log.touch()
    rng = random.Random(time.time())
    for who in range(3):
        before = log.stat().st_size
        writer = CONTEXT.Process(target=write_many, args=(str(path), who, 10**6, str(log)))
        writer.start()
        end = time.time() + 30
        while time.time() < end and log.stat().st_size == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(10)
    acknowledged = set(log.read_text().split())
    add_facts(path, "after")
    assert acknowledged | {"after"} <= read_ledger(path).keys() and len(acknowledged) >= 3
    assert max(map(len, path.read_bytes().splitlines())) < 9500, "a torn line never holds two lines"


# ---- Kaggle's list ----
HEAD = ("ref", "fileName", "date", "description", "status", "publicScore", "privateScore")
ROWS = [
    ("48000005", "submission.csv", "2026-01-22 08:00:00.100000", "two,  spaces and \"quotes\"",
     "SubmissionStatus.COMPLETE", "0.70", ""),
    ("48000004", "submission.csv", "2026-01-21 08:00:00", "", "SubmissionStatus.PENDING", "", ""),
    ("48000003", "submission.csv", "2026-01-20 08:00:00", "über alles\nin two lines",
     "SubmissionStatus.ERROR", "", ""),
]


def print_rows(rows, head=HEAD) -> str:
    "Return what Kaggle's client prints."
    out = io.StringIO()
    csv.writer(out).writerows([head, *rows])
    return f"Warning: you are using an outdated API Version\n{out.getvalue()}\nNext Page Token = xyz\n"


def test_rows_of_kaggles_list():
    rows = parse_submissions(print_rows(ROWS))[::-1]
    assert [row["status"] for row in rows] == ["complete", "pending", "error"]
    assert rows[0]["public"] == 0.70 and rows[0]["message"] == ROWS[0][3] and "private" not in rows[0]
    assert rows[0]["sent"] == "2026-01-22T08:00:00Z" and rows[2]["message"] == ROWS[2][3]
    saved_by_spreadsheet = "\ufeff" + print_rows(ROWS).partition("\n")[2]
    assert rows == parse_submissions(saved_by_spreadsheet)[::-1]
    assert parse_submissions("No submissions found") == []


@pytest.mark.parametrize("text", ["", "403 - Forbidden", "ref  fileName  date\n---  --------  ----\n",
                                  '[\n {"fileName": "x"', print_rows([], HEAD[1:])])
def test_other_output_of_the_client_is_refused(text):
    with pytest.raises(InputError, match="submissions -c csiro-biomass -v"):
        parse_submissions(text)


def test_an_import_matches_by_reference_and_message_and_is_repeatable(tmp_path):
    path = tmp_path / "ledger.jsonl"
    add_facts(path, "by message", source="run", message=ROWS[2][3])
    add_facts(path, "by reference", source="run", message="another", reference="48000005")
    add_facts(path, "without a message", source="run")
    assert import_submissions(path, print_rows(ROWS)) == {"rows": 3, "new": 2, "changed": 1}
    size = path.stat().st_size
    for order in (ROWS, ROWS[::-1]):
        assert import_submissions(path, print_rows(order)) == {"rows": 3, "new": 0, "changed": 0}
    assert path.stat().st_size == size
    entries = read_ledger(path)
    assert entries["by reference"]["public"] == 0.70 and entries["by message"]["status"] == "error"
    assert list(entries) == ["by message", "by reference", "without a message", "48000004"]
    scored = [("48000004", *ROWS[1][1:4], "COMPLETE", "0.5", "0.4")]
    assert import_submissions(path, print_rows(scored))["changed"] == 1
    assert read_ledger(path)["48000004"]["private"] == 0.4


def test_one_message_for_several_submissions(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for k in range(2):
        add_facts(path, f"run {k}", message="again")
    rows = [(str(k), "submission.csv", f"2036-01-2{k} 08:00:00", "again", "COMPLETE", f"0.7{k}", "")
            for k in range(3)]
    for _ in range(2):
        import_submissions(path, print_rows(rows))
        public = {i: e["public"] for i, e in read_ledger(path).items()}
        assert public == {"run 0": 0.70, "run 1": 0.71, "2": 0.72}, "two runs, three submissions"


def test_an_imported_entry_joins_its_run_once_the_reference_is_known(tmp_path):
    path = tmp_path / "ledger.jsonl"
    add_facts(path, "run", profile="kaggle")
    import_submissions(path, print_rows(ROWS[:1]))
    assert list(read_ledger(path)) == ["run", "48000005"]
    add_facts(path, "run", reference="48000005")
    assert list(read_ledger(path)) == ["run"] and read_ledger(path)["run"]["public"] == 0.70
    assert import_submissions(path, print_rows(ROWS[:1]))["new"] == 0


# ---- the line of a run ----
@pytest.fixture(scope="module")
def blended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ledger")
    run = tiny.run_on(tiny.competition(folder / "in"), folder / "out", "ensemble.draws=100")
    tiny.fake_members(run)
    run_ensemble(run)
    rows = pd.read_csv(run.input / "sample_submission.csv")
    rows.assign(target=1.5).to_csv(run.output / "submission.csv", index=False)
    return run, read_competition(run.input)


def test_a_recorded_line_agrees_with_the_artefacts(blended, tmp_path):
    run, comp = blended
    path = tmp_path / "ledger.jsonl"
    entry = record(run, path)
    assert record(run, path) == entry and len(path.read_text().splitlines()) == 1
    facts = read_ledger(path)[entry]
    for scheme, name in (("grouped", "ensemble"), ("stratified", "ensemble_stratified")):
        predicted = read_oof(run.artefacts / "oof" / f"{name}.parquet", comp.train["image_id"].tolist())
        score = facts["oof"][scheme]
        assert np.isclose(score["r2"], weighted_r2_score(comp.y, predicted), atol=1e-5) and score["se"] > 0
    c = read_candidates(read_ledger(path))
    assert np.allclose(c.y, comp.y, atol=0.1) and len(set(c.sites)) == len(set(comp.groups))
    assert facts["settings"]["ensemble"]["draws"] == 100 and len(facts["sha256"]) == 64


def test_a_run_without_oof_can_still_be_chosen(blended, tmp_path, capsys):
    run, _ = blended
    bare = dataclasses.replace(run, output=tmp_path / "out")
    bare.output.mkdir()
    shutil.copy(run.output / "submission.csv", bare.output)
    entry = record(bare)
    assert read_ledger(bare.output / "ledger.jsonl")[entry]["oof"] == {}
    assert capsys.readouterr().out.count("recorded without the") == 2
    for _ in range(2):
        assert add_run(tmp_path / "book.jsonl", bare.output, message="first", reference="7") == entry
    assert choose(read_candidates(read_ledger(tmp_path / "book.jsonl")))["id"].tolist() == [entry]


def test_a_run_without_a_line_gets_one_from_its_run_json(blended, tmp_path):
    run, _ = blended
    made = {"profile": "demo", "preset": "", "overrides": ["ensemble.draws=100"]}
    write_json(run.output / "run.json", made)
    entry = add_run(tmp_path / "book.jsonl", run.output, run.input)
    assert len(read_ledger(tmp_path / "book.jsonl")[entry]["labels"]) == 24 * 5
    with pytest.raises(InputError, match="submission.csv"):
        add_run(tmp_path / "book.jsonl", tmp_path)


def test_the_reference_goes_to_the_file_that_was_sent(blended, tmp_path):
    "Settings A, then B, then A again: the newest line is B's, the file is A's, and so is Kaggle's number."
    run, _ = blended
    out = tmp_path / "out"
    shutil.copytree(run.output, out, ignore=shutil.ignore_patterns("ledger.jsonl"))
    rows = pd.read_csv(out / "submission.csv")
    lines = {}
    for name, grams in (("A", 1.5), ("B", 2.5), ("A", 1.5)):
        rows.assign(target=grams).to_csv(out / "submission.csv", index=False)
        lines[name] = record(dataclasses.replace(run, output=out))
    assert list(read_ledger(out / "ledger.jsonl")) == [lines["A"], lines["B"]]
    assert add_run(tmp_path / "book.jsonl", out, reference="7") == lines["A"]
    entries = read_ledger(tmp_path / "book.jsonl")
    assert list(entries) == [lines["A"]] and entries[lines["A"]]["reference"] == "7"


@pytest.mark.parametrize("fault", [MemoryError("all of it"), InputError("no"), KeyError("x"),
                                   OSError(errno.EROFS, "read-only")])
def test_a_submission_never_fails_for_its_ledger(blended, monkeypatch, capsys, fault):
    def fail(run):
        raise fault

    monkeypatch.setattr(ledger, "collect_run_facts", fail)
    assert try_record(blended[0]) is None and "not recorded" in capsys.readouterr().out


# ---- the choice ----
def simulate(seed: int, **changes) -> Candidates:
    return simulate_season(Season(**changes), np.random.default_rng(seed))[0]


HONEST = {"copies": 0, "tuned_to_public": 0, "tuned_to_folds": 0}


def test_near_copies_are_never_both_chosen():
    for seed in range(5):
        table = choose(simulate(seed))
        assert table["correlation"][1] < 0.995 and table["id"].is_unique


def test_only_copies():
    c = simulate(0, submissions=6, tuned_to_folds=0, tuned_to_public=0, copies=5)
    table = choose(c, copies=0.9)
    assert table["id"].nunique() == 6 and (table["correlation"] >= 0.9).all()
    assert table["estimate"].is_monotonic_decreasing, "without an alternative the two best are chosen"


def test_the_public_score_counts_for_its_size():
    c = simulate(2, **HONEST)
    small, large = (np.corrcoef(estimate_scores(c, n), [c.oof, c.public])[0, 1:] for n in (20, 40000))
    assert small[0] > 0.98 and large[1] > 0.98, "follows OOF; follows the public score"
    assert small[1] < 0.95 and large[0] < 0.95


def test_a_submission_tuned_to_the_public_test_is_not_first():
    c = simulate(3, **HONEST)
    worst = int(np.argmin(c.oof))
    public = c.public.copy()
    public[worst] = public.max() + 0.06
    table = choose(dataclasses.replace(c, public=public))
    assert table["id"][0] != c.ids[worst] and c.ids[worst] not in table["id"][:2].tolist()


def test_a_submission_tuned_to_the_folds_is_not_first():
    c = simulate(3, **HONEST)
    worst = int(np.argmin(c.public))
    oof = c.oof.copy()
    oof[worst] = oof.max() + 0.02
    assert choose(dataclasses.replace(c, oof=oof))["id"][0] != c.ids[worst]


def test_missing_scores():
    c = simulate(4)
    nothing = np.full(len(c.ids), np.nan)
    unknown = {"oof": nothing, "predictions": np.full_like(c.predictions, np.nan)}
    by_public = choose(dataclasses.replace(c, **unknown))
    assert by_public["id"][:2].tolist() == [c.ids[i] for i in np.argsort(-c.public)[:2]]
    by_oof = choose(dataclasses.replace(c, public=nothing))
    assert by_oof["id"][0] == c.ids[int(c.oof.argmax())] and np.isfinite(by_oof["estimate"]).all()
    some = c.public.copy()
    some[::2] = np.nan
    for case in ({"public": some}, {"public": nothing, **unknown}):
        table = choose(dataclasses.replace(c, **case))
        assert len(table) == len(c.ids) and np.isfinite(table["estimate"]).all()


def test_a_median_submission_without_oof_is_not_preferred():
    c = simulate(4, **HONEST)
    middle = int(np.argsort(c.public)[len(c.ids) // 2])
    oof, predictions = c.oof.copy(), c.predictions.copy()
    oof[middle], predictions[middle] = np.nan, np.nan
    table = choose(dataclasses.replace(c, oof=oof, predictions=predictions))
    assert c.ids[middle] not in table["id"][:2].tolist()
    assert np.isnan(table.set_index("id")["correlation"][c.ids[middle]])


def test_the_rule_loses_less_than_kaggles_default():
    table = summarise(study(150, seed=7))
    gain = table.loc["best public"]
    assert gain["more"] > 2 * gain["more_error"] and table.loc["best OOF", "more"] > 0


def test_many_entries(tmp_path):
    path = tmp_path / "ledger.jsonl"
    fill_ledger(path, 400, photos=120)
    entries = read_ledger(path)
    c = read_candidates(entries)
    assert len(c.ids) == len(list_entries(entries)) == 400 and c.predictions.shape == (400, 120, 5)
    assert len(choose(c)) == 400


def test_predictions_for_other_labels_are_not_compared(tmp_path):
    path = tmp_path / "ledger.jsonl"
    fill_ledger(path, 3, photos=60)
    grams = np.random.default_rng(0).uniform(0, 50, 200).tolist()
    other = {"labels": grams, "predictions": grams, "sites": [0] * 40, "oof": {"grouped": {"r2": 0.1}}}
    append_lines(path, lambda entries: [{"id": f"other{k}", "reference": str(k), "public": 0.5, **other}
                                        for k in range(2)])
    c = read_candidates(read_ledger(path))
    assert len(c.ids) == 5 and np.isnan(c.predictions[3:]).all() and np.isfinite(c.predictions[:3]).all()
    assert np.isfinite(choose(c)["estimate"]).all()


# ---- messages and the command line ----
def test_check_names_what_to_select(tmp_path, capsys):
    path = tmp_path / "ledger.jsonl"
    fill_ledger(path, 8, photos=60)
    entries = read_ledger(path)
    c = read_candidates(entries)
    table = choose(c)
    lines = advise_selection(entries, c, table, table["id"][2:4].tolist())
    assert [line.split()[0] for line in lines[1:]] == ["DESELECT", "DESELECT", "SELECT", "SELECT"]
    default = advise_selection(entries, c, table)
    assert "by default" in default[0] and [line.split()[0] for line in default[-2:]] == ["SELECT", "SELECT"]
    assert main(["pick", "--ledger", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Select {table['id'][0]}")
    references = [entries[i]["reference"] for i in table["id"][:2]]
    words = [word for r in references for word in ("--selected", r)]
    assert main(["check", "--ledger", str(path), "--deadline", "2020-01-01T00:00Z", *words]) == 0
    out = capsys.readouterr().out
    assert "as recommended" in out and "passed" in out


def test_a_better_run_that_was_not_submitted_is_named(tmp_path):
    path = tmp_path / "ledger.jsonl"
    fill_ledger(path, 4, photos=60)
    add_facts(path, "unsent", oof={"grouped": {"r2": 0.99, "se": 0.01}})
    entries = read_ledger(path)
    c = read_candidates(entries)
    assert "unsent" not in c.ids
    assert "Entry unsent has the best OOF score" in advise_selection(entries, c, choose(c))[-1]


WRONG_CALLS = [[], ["tick"], ["add", "nothing"], ["import", "nowhere"], ["pick"]]
WRONG_CALLS += [["check", "--selected", "x"], ["check", "--deadline", "soon"]]


@pytest.mark.parametrize("words", WRONG_CALLS)
def test_a_wrong_call_is_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if words[:1] == ["check"]:
        fill_ledger("ledger.jsonl", 3, photos=60)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_import_and_list(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(print_rows(ROWS)))
    assert main(["import", "-"]) == 0 and main(["list"]) == 0
    out = capsys.readouterr().out
    assert "3 new" in out and "Kaggle has more submissions" in out and "two,  spaces" in out
