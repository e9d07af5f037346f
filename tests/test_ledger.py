"""The ledger: killed and concurrent writers, damaged lines, Kaggle's list, recorded runs, the choice."""
import csv
import dataclasses
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
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
    add_entry,
    add_run,
    advise_selection,
    amend_entry,
    append_lines,
    choose_finals,
    encode_grams,
    estimate_scores,
    explain_choice,
    import_submissions,
    list_entries,
    main,
    make_line,
    parse_ledger,
    parse_submissions,
    read_candidates,
    read_ledger,
    record,
    record_sent,
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
def test_cut_at_every_byte_of_the_last_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first = add_entry(path, {"message": "one"})
    head = path.read_bytes()
    second = add_entry(path, {"message": "zwei ü"})
    whole = path.read_bytes()
    for cut in range(len(head) + 1, len(whole)):
        path.write_bytes(whole[:cut])
        book = read_ledger(path)
        assert first in book.entries and not book.ended
        third = add_entry(path, {"message": "three"})
        data, book = path.read_bytes(), read_ledger(path)
        assert data.startswith(whole[:cut] + b"\n"), "earlier bytes are unchanged"
        assert {first, third} <= book.entries.keys()
        assert (second in book.entries) == (cut == len(whole) - 1) != bool(book.damaged)


LINES = [b'{"v": 1}', b"[]", b'{"v": 9, "kind": "submission", "id": "x"}', b"null",
         b'{"v": 1, "kind": "amend", "id": "a", "of": 3}']


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from(LINES)), max_size=8))
def test_any_bytes_between_the_lines(junk):
    line = json.dumps({"v": 1, "kind": "submission", "id": "good", "message": "m"}).encode()
    book = parse_ledger(b"\n".join([*junk, line, b""]))
    assert book.entries["good"]["message"] == "m" and book.ended
    assert len(book.damaged) <= sum(bool(part.strip()) for part in b"\n".join(junk).split(b"\n"))


def test_lines_of_a_later_version_are_left_alone(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"v": 2, "kind": "submission", "id": "new"}\n{"v": 1, "kind": "other", "id": "y"}\n')
    add_entry(path, {"message": "one"})
    book = read_ledger(path)
    assert len(book.entries) == 1 and len(book.notes) == 2 and path.read_text().startswith('{"v": 2')


def test_the_order_of_lines_decides_not_the_clock(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    times = iter(["2026-01-20T10:00:00Z", "2026-01-20T10:05:00Z", "2020-01-01T00:00:00Z"])
    monkeypatch.setattr(ledger, "utc_now", lambda: next(times))
    entry = add_entry(path, {"message": "one"})
    amend_entry(path, entry, public=0.5)
    amend_entry(path, entry, public=0.6)
    assert read_ledger(path).entries[entry]["public"] == 0.6


def test_an_amendment_may_precede_its_entry():
    lines = ['{"v": 1, "kind": "amend", "id": "a", "of": "s", "public": 0.5}',
             '{"v": 1, "kind": "submission", "id": "s"}',
             '{"v": 1, "kind": "amend", "id": "b", "of": "gone", "public": 1}']
    book = parse_ledger("\n".join(lines).encode())
    assert book.entries["s"]["public"] == 0.5 and any("gone" in note for note in book.notes)


def test_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    first = add_entry(path, {"message": "one"})
    real, taken = os.write, []

    def write(descriptor, data):
        if taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken.append(real(descriptor, data[:20]))
        return taken[0]

    monkeypatch.setattr(ledger.os, "write", write)
    with pytest.raises(InputError, match="is full"):
        add_entry(path, {"message": "two"})
    monkeypatch.undo()
    second = add_entry(path, {"message": "two"})
    book = read_ledger(path)
    assert list(book.entries) == [first, second] and len(book.damaged) == 1


def test_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "fcntl", None)
    entry = add_entry(tmp_path / "ledger.jsonl", {"message": "one"})
    assert amend_entry(tmp_path / "ledger.jsonl", entry[:4], public=0.5) == entry


CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["nbs_lib.ledger", "test_ledger"])


def write_many(path: str, who: int, n: int, acknowledged: str = "") -> None:
    for k in range(n):
        entry = add_entry(path, {"message": f"{who}-{k}", "padding": "x" * 9000})
        if acknowledged:
            with open(acknowledged, "a") as f:
                f.write(entry + "\n")


def test_three_writers_at_once(tmp_path):
    path = tmp_path / "ledger.jsonl"
    writers = [CONTEXT.Process(target=write_many, args=(str(path), who, 20)) for who in range(3)]
    for w in writers:
        w.start()
    for w in writers:
        w.join(60)
        assert w.exitcode == 0
    book = read_ledger(path)
    expected = {f"{who}-{k}" for who in range(3) for k in range(20)}
    assert not book.notes and {e["message"] for e in book.entries.values()} == expected


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
    entry = add_entry(path, {"message": "after"})
    book = read_ledger(path)
    assert acknowledged <= book.entries.keys() and entry in book.entries and len(acknowledged) >= 3
    assert all(len(text) < 9500 for _, text in book.damaged), "a damaged line never holds two lines"


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
    rows = parse_submissions(print_rows(ROWS))
    assert [row["status"] for row in rows] == ["complete", "pending", "error"]
    assert rows[0]["public"] == 0.70 and rows[0]["message"] == ROWS[0][3] and "private" not in rows[0]
    assert rows[0]["sent"] == "2026-01-22T08:00:00Z" and rows[2]["message"] == ROWS[2][3]
    saved_by_spreadsheet = "\ufeff" + print_rows(ROWS).partition("\n")[2]
    assert rows == parse_submissions(saved_by_spreadsheet)
    assert parse_submissions("No submissions found") == []


@pytest.mark.parametrize("text", ["", "403 - Forbidden", "ref  fileName  date\n---  --------  ----\n",
                                  '[\n {"fileName": "x"', print_rows([], HEAD[1:])])
def test_other_output_of_the_client_is_refused(text):
    with pytest.raises(InputError, match="submissions -c csiro-biomass -v"):
        parse_submissions(text)


def test_an_import_matches_by_reference_message_and_id_and_is_repeatable(tmp_path):
    path = tmp_path / "ledger.jsonl"
    file = {"source": "run", "file": "submission.csv"}
    by_message = add_entry(path, {**file, "message": ROWS[2][3]})
    by_reference = add_entry(path, {**file, "message": "another message"})
    amend_entry(path, by_reference, reference="48000005")
    by_id = add_entry(path, {**file, "k": 1})
    late = ("48000006", "submission.csv", "2026-01-23 08:00:00", f"late [{by_id}]", "COMPLETE", ".71", ".65")
    rows = [*ROWS, late]
    assert import_submissions(path, print_rows(rows)) == {"rows": 4, "new": 1, "changed": 3}
    size = path.stat().st_size
    for order in (rows, rows[::-1]):
        assert import_submissions(path, print_rows(order)) == {"rows": 4, "new": 0, "changed": 0}
    assert path.stat().st_size == size
    entries = read_ledger(path).entries
    assert entries[by_reference]["public"] == 0.70 and entries[by_id]["private"] == 0.65
    assert entries[by_message]["status"] == "error"
    assert [e["reference"] for e in entries.values() if e["source"] == "kaggle"] == ["48000004"]


def test_one_message_for_several_submissions(tmp_path):
    path = tmp_path / "ledger.jsonl"
    facts = {"source": "run", "file": "submission.csv", "message": "again"}
    runs = [add_entry(path, {**facts, "sha256": str(k)}) for k in range(2)]
    rows = [(str(k), "submission.csv", f"2036-01-2{k} 08:00:00", "again", "COMPLETE", f"0.7{k}", "")
            for k in range(3)]
    assert import_submissions(path, print_rows(rows))["new"] == 1, "two runs, three submissions"
    assert import_submissions(path, print_rows(rows)) == {"rows": 3, "new": 0, "changed": 0}
    entries = read_ledger(path).entries
    assert sorted(e["public"] for e in entries.values()) == [0.70, 0.71, 0.72]
    assert len(entries) == 3 and all("public" in entries[r] for r in runs)


def test_an_imported_entry_joins_its_run_once_the_reference_is_known(tmp_path):
    path = tmp_path / "ledger.jsonl"
    run = add_entry(path, {"source": "run", "file": "submission.csv"})
    import_submissions(path, print_rows(ROWS[:1]))
    assert len(read_ledger(path).entries) == 2
    amend_entry(path, run, reference="48000005")
    book = read_ledger(path)
    assert list(book.entries) == [run] and book.entries[run]["public"] == 0.70
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
    facts = read_ledger(path).entries[entry]
    for scheme, name in (("grouped", "ensemble"), ("stratified", "ensemble_stratified")):
        predicted = read_oof(run.artefacts / "oof" / f"{name}.parquet", comp.train["image_id"].tolist())
        score = facts["oof"][scheme]
        assert np.isclose(score["r2"], weighted_r2_score(comp.y, predicted), atol=1e-5) and score["se"] > 0
    c = read_candidates(read_ledger(path))
    assert np.allclose(c.y, comp.y, atol=0.1) and len(set(c.sites)) == len(set(comp.groups))
    assert not facts["missing"] and facts["settings"]["ensemble"]["draws"] == 100 and facts["blend"]["models"]
    assert len(facts["sha256"]) == 64 and len(facts["code"]) == 12


def test_a_run_without_oof_can_still_be_chosen(blended, tmp_path):
    run, _ = blended
    bare = dataclasses.replace(run, output=tmp_path / "out")
    bare.output.mkdir()
    shutil.copy(run.output / "submission.csv", bare.output)
    entry = record(bare)
    facts = read_ledger(bare.output / "ledger.jsonl").entries[entry]
    assert len(facts["missing"]) == 2 and facts["oof"] == {}
    for _ in range(2):
        assert record_sent(tmp_path / "book.jsonl", bare.output, "first", reference=7) == entry
    assert choose(read_candidates(read_ledger(tmp_path / "book.jsonl")))["id"].tolist() == [entry]


def test_a_run_without_a_line_gets_one_from_its_run_json(blended, tmp_path):
    run, _ = blended
    made = {"profile": "demo", "preset": "", "overrides": ["ensemble.draws=100"]}
    write_json(run.output / "run.json", made)
    entry = add_run(tmp_path / "book.jsonl", run.output, run.input)
    assert read_ledger(tmp_path / "book.jsonl").entries[entry]["oof"]["grouped"]["photos"] == 24
    with pytest.raises(InputError, match="run.json"):
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
    assert list(read_ledger(out / "ledger.jsonl").entries) == [lines["A"], lines["B"]]
    assert record_sent(tmp_path / "book.jsonl", out, "third", reference=7) == lines["A"]
    book = read_ledger(tmp_path / "book.jsonl").entries
    assert book[lines["A"]]["reference"] == "7" and "reference" not in book[lines["B"]]


@pytest.mark.parametrize("fault", [MemoryError("all of it"), InputError("no"), KeyError("x"),
                                   OSError(errno.EROFS, "read-only")])
def test_a_submission_never_fails_for_its_ledger(blended, monkeypatch, capsys, fault):
    def fail(run):
        raise fault

    monkeypatch.setattr(ledger, "collect_run_facts", fail)
    assert try_record(blended[0]) is None and "not recorded" in capsys.readouterr().out


def test_git_state(tmp_path):
    def git(*words):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words]
        subprocess.run(command, check=True, capture_output=True)

    assert ledger.read_git_state(tmp_path) is None
    git("init")
    (tmp_path / "a.txt").write_text("1")
    git("add", "a.txt")
    git("commit", "-m", "x")
    clean = ledger.read_git_state(tmp_path)
    (tmp_path / "a.txt").write_text("2")
    assert not clean["dirty"] and len(clean["commit"]) == 40
    assert ledger.read_git_state(tmp_path) == {**clean, "dirty": True}


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
    book = read_ledger(path)
    c = read_candidates(book)
    assert len(c.ids) == len(list_entries(book, 0)) == 400 and c.predictions.shape == (400, 120, 5)
    assert len(choose(c)) == 400 and len(list_entries(book)) == 20


def test_predictions_for_other_labels_are_not_compared(tmp_path):
    path = tmp_path / "ledger.jsonl"
    fill_ledger(path, 3, photos=60)
    labels = next(iter(read_ledger(path).entries.values()))["labels"]
    grams = encode_grams(np.random.default_rng(0).uniform(0, 50, (40, 5)))
    oof = {"grouped": {"r2": 0.1, "se": 0.1}}
    facts = {"source": "run", "oof": oof, "sites": [0] * 40, "predictions": grams}
    for other in ({"labels": grams}, {"labels": labels}, {"labels": labels, "predictions": "no base64!"}):
        append_lines(path, lambda book, other=other: [make_line(facts | other, public=0.5)])
    c = read_candidates(read_ledger(path))
    assert len(c.ids) == 6 and np.isnan(c.predictions[3:]).all() and np.isfinite(c.predictions[:3]).all()
    assert np.isfinite(choose(c)["estimate"]).all()


# ---- messages and the command line ----
def test_check_names_what_to_select(tmp_path, capsys):
    path = tmp_path / "ledger.jsonl"
    fill_ledger(path, 8, photos=60)
    book = read_ledger(path)
    c = read_candidates(book)
    table = choose(c)
    lines = advise_selection(book, c, table, table["id"][2:4])
    assert [line.split()[0] for line in lines[1:]] == ["DESELECT", "DESELECT", "SELECT", "SELECT"]
    assert "as recommended" in advise_selection(book, c, table, table["id"][:2])[1]
    assert main(["pick", "--ledger", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Select {table['id'][0]}") and "Kaggle's default" in out
    references = [book.entries[i]["reference"] for i in table["id"][:2]]
    words = [word for r in references for word in ("--selected", r)]
    assert main(["check", "--ledger", str(path), "--deadline", "2020-01-01T00:00Z", *words]) == 0
    out = capsys.readouterr().out
    assert "as recommended" in out and "passed" in out


def test_missing_scores_are_named():
    c = simulate(0)
    nothing = np.full(len(c.ids), np.nan)
    for case, words in (({"oof": nothing}, "No OOF score"), ({"public": nothing}, "No public score")):
        part = dataclasses.replace(c, **case)
        assert words in explain_choice(part, choose(part), PUBLIC)[-1]


def test_a_better_run_that_was_not_submitted_is_named(tmp_path):
    path = tmp_path / "ledger.jsonl"
    fill_ledger(path, 4, photos=60)
    unsent = add_entry(path, {"source": "run", "oof": {"grouped": {"r2": 0.99, "se": 0.01}}})
    book = read_ledger(path)
    c = read_candidates(book)
    assert unsent not in c.ids
    assert f"Entry {unsent} has the best OOF score" in advise_selection(book, c, choose(c))[-1]


WRONG_CALLS = [[], ["tick"], ["add", "nothing"], ["import", "nowhere"], ["pick"]]
WRONG_CALLS += [["check", "--selected", "x"], ["list", "--last", "x"], ["add", "run 0", "--public", "7"]]


@pytest.mark.parametrize("words", WRONG_CALLS)
def test_a_wrong_call_is_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_as_a_command(tmp_path):
    (tmp_path / "list.csv").write_text(print_rows(ROWS), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def call(*words):
        command = [sys.executable, "-m", "nbs_lib.ledger", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)

    done = call("import", "list.csv")
    assert done.returncode == 0 and "3 new" in done.stdout, done.stderr
    assert "two,  spaces" in call("list").stdout
    assert call("import", "none.csv").returncode == 2
