"""The ledger under kills, two writers, damage, Kaggle's output in all its forms; and the choice where the answer is known."""
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

import numpy as np
import pandas as pd
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from nbs_lib import ledger
from nbs_lib.ledger import (
    Board,
    Candidates,
    Season,
    add_entry,
    add_run,
    advise,
    amend,
    append,
    calibrate,
    choose,
    fill_ledger,
    import_submissions,
    list_entries,
    look_ahead,
    main,
    parse_ledger,
    parse_submissions,
    play,
    read_candidates,
    read_ledger,
    record,
    record_sent,
    site_sums,
    try_record,
)
from nbs_lib.runtime import InputError, write_json
from nbs_lib.targets import weighted_r2_score

BOARD = Board(805, 0.47)


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
        assert data.startswith(whole[:cut] + b"\n"), "what was there is still there, byte by byte"
        assert {first, third} <= book.entries.keys()
        assert (second in book.entries) == (cut == len(whole) - 1) != bool(book.damaged)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([b'{"v": 1}', b"[]", b'{"v": 9, "kind": "submission", "id": "x"}', b'{"v": 1, "kind": "amend", "id": "a", "of": 3}', b"null"])), max_size=8))
def test_whatever_stands_between_the_lines(junk):
    line = json.dumps({"v": 1, "kind": "submission", "id": "good", "message": "m"}).encode()
    data = b"\n".join([*junk, line, b""])
    book = parse_ledger(data)
    assert book.entries["good"].get("message") == "m" and book.ended
    kept = sum(bool(part.strip()) for part in b"\n".join(junk).split(b"\n"))
    assert len(book.damaged) <= kept


def test_a_later_version_is_left_alone(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"v": 2, "kind": "submission", "id": "new", "x": 1}\n{"v": 1, "kind": "spell", "id": "y"}\n')
    add_entry(path, {"message": "one"})
    book = read_ledger(path)
    assert len(book.entries) == 1 and len(book.notes) == 2 and path.read_text().startswith('{"v": 2')


def test_the_order_of_lines_counts_not_the_clock(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    times = iter(["2026-01-20T10:00:00Z", "2026-01-20T10:05:00Z", "2020-01-01T00:00:00Z"])
    monkeypatch.setattr(ledger, "now", lambda: next(times))
    entry = add_entry(path, {"message": "one"})
    amend(path, entry, public=0.5)
    amend(path, entry, public=0.6)
    book = read_ledger(path)
    assert book.entries[entry].get("public") == 0.6 and [c["public"] for c in book.entries[entry].changes] == [0.5, 0.6]
    assert any("dated before" in note for note in book.notes)


def test_amendments_may_stand_before_what_they_amend(tmp_path):
    lines = ['{"v": 1, "kind": "amend", "id": "a", "of": "s", "public": 0.5}', '{"v": 1, "kind": "submission", "id": "s"}', '{"v": 1, "kind": "amend", "id": "b", "of": "gone", "public": 1}']
    book = parse_ledger("\n".join(lines).encode())
    assert book.entries["s"].get("public") == 0.5 and any("gone" in note for note in book.notes)


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
    assert amend(tmp_path / "ledger.jsonl", entry[:4], public=0.5) == entry


CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["nbs_lib.ledger", "test_ledger"])


def write_many(path: str, who: int, n: int, told: str = "") -> None:
    for k in range(n):
        entry = add_entry(path, {"message": f"{who}-{k}", "padding": "x" * 9000})
        if told:
            with open(told, "a") as f:
                f.write(entry + "\n")


def test_two_writers(tmp_path):
    path = tmp_path / "ledger.jsonl"
    writers = [CONTEXT.Process(target=write_many, args=(str(path), who, 20)) for who in range(3)]
    for w in writers:
        w.start()
    for w in writers:
        w.join(60)
        assert w.exitcode == 0
    book = read_ledger(path)
    assert not book.notes and {e.get("message") for e in book.entries.values()} == {f"{who}-{k}" for who in range(3) for k in range(20)}


def test_killed_in_the_middle(tmp_path):
    path, told = tmp_path / "ledger.jsonl", tmp_path / "told.txt"
    rng = random.Random(time.time())
    for who in range(3):
        writer = CONTEXT.Process(target=write_many, args=(str(path), who, 10**6, str(told)))
        writer.start()
        end = time.time() + 30
        before = told.stat().st_size if told.exists() else 0
        while time.time() < end and (told.stat().st_size if told.exists() else 0) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(10)
    acknowledged = set(told.read_text().split()) if told.exists() else set()
    entry = add_entry(path, {"message": "after"})
    book = read_ledger(path)
    assert acknowledged <= book.entries.keys() and entry in book.entries and len(acknowledged) >= 3
    assert all(line == len(path.read_bytes().split(b"\n")) or len(text) < 9500 for line, text in book.damaged)


# ---- Kaggle's list ----
ROWS = [("48000005", "submission.csv", "2026-01-22 08:00:00.100000", "two,  spaces and \"quotes\"", "SubmissionStatus.COMPLETE", "0.70", ""),
        ("48000004", "submission.csv", "2026-01-21 08:00:00", "", "SubmissionStatus.PENDING", "", ""),
        ("48000003", "submission.csv", "2026-01-20 08:00:00", "über alles", "SubmissionStatus.ERROR", "", "")]
HEAD = ("ref", "fileName", "date", "description", "status", "publicScore", "privateScore")


def printed(rows, kind: str, head=HEAD) -> str:
    "As the client of Kaggle prints it."
    out = io.StringIO()
    if kind == "csv":
        csv.writer(out).writerows([head, *rows])
    elif kind == "json":
        out.write(json.dumps([dict(zip(head, (int(r[0]), *r[1:]), strict=True)) for r in rows], indent=2))
    else:
        widths = [max(len(h), *(len(r[i]) for r in rows)) for i, h in enumerate(head)]
        for row in (head, ["-" * w for w in widths], *rows):
            out.write("".join(f"{cell + '  ':{'>' if i == 0 else '<'}{w + 2}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))) + "\n")
    return f"Warning: looks like you're using an outdated API Version\n{out.getvalue()}\nNext Page Token = xyz\n"


def test_all_formats_say_the_same():
    table, comma, js = (parse_submissions(printed(ROWS, kind)) for kind in ("table", "csv", "json"))
    assert comma == js and len(comma) == 3 and comma[0]["public"] == 0.70 and comma[2]["status"] == "error"
    assert [{k: " ".join(str(v).split()) for k, v in r.items()} for r in table[:3]] == [{k: " ".join(str(v).split()) for k, v in r.items()} for r in comma]
    assert parse_submissions("No submissions found") == []
    for text in ("", "403 - Forbidden", '[\n {"fileName": "x"'):
        with pytest.raises(InputError):
            parse_submissions(text)


def test_no_row_of_a_table_is_lost():
    table = printed(ROWS, "table")
    assert parse_submissions("\n".join(line.rstrip() for line in table.splitlines())) == parse_submissions(table), "an editor takes blanks from the ends of lines"
    with pytest.raises(InputError, match="line break"):
        parse_submissions(table.replace("über alles", "über\nalles"))


def test_an_import_matches_by_reference_message_and_id_and_is_repeatable(tmp_path):
    path = tmp_path / "ledger.jsonl"
    by_message = add_entry(path, {"source": "run", "file": "submission.csv", "message": "über alles"})
    by_reference = add_entry(path, {"source": "run", "file": "submission.csv", "message": "another name at home"})
    amend(path, by_reference, reference="48000005")
    by_id = add_entry(path, {"source": "run", "file": "submission.csv", "k": 1})
    rows = [*ROWS, ("48000006", "submission.csv", "2026-01-23 08:00:00", f"late [{by_id}]", "SubmissionStatus.COMPLETE", "0.71", "0.65")]
    told = import_submissions(path, printed(rows, "csv"))
    assert told == {"rows": 4, "new": 1, "changed": 3}
    size = path.stat().st_size
    for kind in ("json", "csv"):
        for order in (rows, rows[::-1]):
            assert import_submissions(path, printed(order, kind)) == {"rows": 4, "new": 0, "changed": 0}
    assert path.stat().st_size == size
    book = read_ledger(path)
    assert book.entries[by_reference].get("public") == 0.70 and book.entries[by_id].get("private") == 0.65 and book.entries[by_message].get("status") == "error"
    hand = [e for e in book.entries.values() if e.get("source") == "kaggle"]
    assert [e.get("reference") for e in hand] == ["48000004"]


def test_the_same_message_twice_and_rows_without_reference(tmp_path):
    path = tmp_path / "ledger.jsonl"
    runs = [add_entry(path, {"source": "run", "file": "submission.csv", "message": "again", "sha256": str(k)}) for k in range(2)]
    head = HEAD[1:]
    rows = [("submission.csv", f"2036-01-2{k} 08:00:00", "again", "complete", f"0.7{k}", "") for k in range(3)]
    told = import_submissions(path, printed(rows, "csv", head))
    assert told["new"] == 1, "two runs, three submissions"
    assert import_submissions(path, printed(rows, "csv", head)) == {"rows": 3, "new": 0, "changed": 0}
    book = read_ledger(path)
    assert len(book.entries) == 3 and sorted(e.get("public") for e in book.entries.values()) == [0.70, 0.71, 0.72] and all(book.entries[r].get("public") for r in runs)


def test_an_entry_of_kaggle_joins_its_run_once_the_reference_is_known(tmp_path):
    path = tmp_path / "ledger.jsonl"
    run = add_entry(path, {"source": "run", "file": "submission.csv"})
    import_submissions(path, printed(ROWS[:1], "csv"))
    assert len(read_ledger(path).entries) == 2
    amend(path, run, reference="48000005")
    book = read_ledger(path)
    assert list(book.entries) == [run] and book.entries[run].get("public") == 0.70
    assert import_submissions(path, printed(ROWS[:1], "csv"))["new"] == 0


# ---- the line of a run ----
@pytest.fixture(scope="module")
def blended(tmp_path_factory):
    from nbs_lib.ensemble import run_ensemble
    from nbs_lib.tables import read_competition

    folder = tmp_path_factory.mktemp("ledger")
    run = tiny.run_on(tiny.competition(folder / "in"), folder / "out", "ensemble.draws=100")
    tiny.fake_members(run)
    run_ensemble(run)
    comp = read_competition(run.input)
    rows = pd.read_csv(run.input / "sample_submission.csv")
    rows.assign(target=1.5).to_csv(run.output / "submission.csv", index=False)
    return run, comp


def test_record_tells_what_the_artefacts_say(blended, tmp_path):
    run, comp = blended
    from nbs_lib.tables import read_oof

    entry = record(run, ledger=tmp_path / "ledger.jsonl", message="hello")
    assert record(run, ledger=tmp_path / "ledger.jsonl") == entry and len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 1
    facts = read_ledger(tmp_path / "ledger.jsonl").entries[entry].facts
    for scheme, name in (("grouped", "ensemble"), ("stratified", "ensemble_stratified")):
        said = read_oof(run.artefacts / "oof" / f"{name}.parquet", comp.train["image_id"].tolist())
        assert np.isclose(facts["oof"][scheme]["r2"], weighted_r2_score(comp.y, said), atol=1e-5) and facts["oof"][scheme]["se"] > 0
    assert len(facts["sites"]["names"]) == len(set(comp.groups)) and np.allclose(facts["sites"]["w"], pd.Series(comp.groups).value_counts().sort_index())
    assert not facts["missing"] and facts["settings"]["ensemble"]["draws"] == 100 and facts["blend"]["models"] and facts["code"]["notebooks"]["60_submit"]
    assert facts["message"] == "hello" and len(facts["sha256"]) == 64 and facts["predicted"]["GDM_g"][0] == 1.5


def test_record_without_oof_says_so_and_the_run_can_still_be_picked(blended, tmp_path):
    run, _ = blended
    import dataclasses
    import shutil

    bare = dataclasses.replace(run, output=tmp_path / "out")
    bare.output.mkdir()
    shutil.copy(run.output / "submission.csv", bare.output)
    entry = record(bare)
    facts = read_ledger(bare.output / "ledger.jsonl").entries[entry].facts
    assert len(facts["missing"]) == 2 and facts["oof"] == {}
    sent = record_sent(tmp_path / "book.jsonl", bare.output, "first", reference=7)
    assert sent == entry == record_sent(tmp_path / "book.jsonl", bare.output, "first", reference=7)
    choice = choose(read_candidates(read_ledger(tmp_path / "book.jsonl")), BOARD)
    assert choice.finals == (entry,)


def test_a_run_without_a_line_gets_one_from_its_run_json(blended, tmp_path):
    run, _ = blended
    write_json(run.output / "run.json", {"profile": "demo", "preset": "", "overrides": ["ensemble.draws=100"]})
    entry = add_run(tmp_path / "book.jsonl", run.output, run.input)
    assert read_ledger(tmp_path / "book.jsonl").entries[entry].get("oof")["grouped"]["photos"] == 24
    with pytest.raises(InputError, match="run.json"):
        add_run(tmp_path / "book.jsonl", tmp_path)


def test_what_was_sent_is_the_file_that_lies_there(blended, tmp_path):
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
    assert book[lines["A"]].get("reference") == "7" and book[lines["B"]].get("reference") is None


def test_a_submission_never_fails_for_its_book(blended, monkeypatch, capsys):
    run, _ = blended
    for fault in (MemoryError("all of it"), InputError("no"), KeyError("x"), OSError(errno.EROFS, "read-only")):
        monkeypatch.setattr(ledger, "run_facts", lambda *a, fault=fault: (_ for _ in ()).throw(fault))
        assert try_record(run) is None and "not in the book" in capsys.readouterr().out


def test_git_state(tmp_path):
    assert ledger.git_state(tmp_path) is None
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)  # noqa: E731
    git("init")
    (tmp_path / "a.txt").write_text("1")
    git("add", "a.txt")
    git("commit", "-m", "x")
    clean = ledger.git_state(tmp_path)
    (tmp_path / "a.txt").write_text("2")
    assert not clean["dirty"] and len(clean["commit"]) == 40 and ledger.git_state(tmp_path) == {**clean, "dirty": True}


def test_kaggles_image(tmp_path, monkeypatch):
    (tmp_path / "git_commit").write_text("abc\n")
    (tmp_path / "build_date").write_text("20260101-000000\n")
    monkeypatch.delenv("KAGGLE_DOCKER_IMAGE", raising=False)
    assert ledger.kaggle_state(tmp_path / "none", tmp_path)["docker"] == "abc-20260101-000000"
    monkeypatch.setenv("KAGGLE_DOCKER_IMAGE", "gcr.io/kaggle-images/python@sha256:1")
    assert ledger.kaggle_state(tmp_path / "none", tmp_path)["docker"].endswith("sha256:1")


# ---- the choice ----
def season(seed: int, **more) -> tuple[Candidates, np.ndarray]:
    return play(Season(**more), np.random.default_rng(seed))


def shown(c: Candidates, **more) -> Candidates:
    import dataclasses

    return dataclasses.replace(c, **more)


def test_copies_are_never_both_picked():
    for seed in range(5):
        c, _ = season(seed)
        o = look_ahead(c, BOARD, 300)
        assert c.alike[o.pair[0], o.pair[1]] < BOARD.copies and len(set(o.pair)) == 2


def test_only_copies():
    c, _ = season(0, tries=6, tuned=0, climbed=0, copies=5)
    choice = choose(c, Board(805, 0.47, 0.9), 200)
    assert len(set(choice.finals)) == 2 and (choice.table["copy_of"] != "").sum() == 5


def test_equal_predictions_share_their_luck():
    "A copy with a lucky public score lifts its twin just as much."
    c, _ = season(1, copies=0, climbed=0, tuned=0)
    rows = [0, 0, *range(1, len(c))]
    twins = c.only(np.array(rows))
    lucky = twins.public.copy()
    lucky[0] += 0.02
    mean, _ = ledger.believe(shown(twins, public=lucky), BOARD)
    before, _ = ledger.believe(twins, BOARD)
    assert abs(mean[0] - mean[1]) < 0.2 * 0.02 and mean[1] > before[1]


def test_the_board_counts_for_what_its_size_is_worth():
    c, _ = season(2, copies=0, climbed=0, tuned=0)
    agree = {photos: np.corrcoef(ledger.believe(c, Board(photos, 0.5))[0], c.public)[0, 1] for photos in (60, 800, 40000)}
    assert agree[60] < agree[800] < agree[40000] and agree[40000] > 0.93


def test_a_climber_does_not_lead():
    c, _ = season(3, copies=0, climbed=0, tuned=0)
    worst = int(np.argmin(c.cv))
    public = c.public.copy()
    public[worst] = public.max() + 0.06
    o = look_ahead(shown(c, public=public), BOARD, 500)
    assert public.argmax() == worst and o.pair[0] != worst and o.mean[worst] < o.mean.max() - 0.003, "the best public score, and yet not the first pick"


def test_missing_scores():
    c, _ = season(4)
    nothing = np.full(len(c), np.nan)
    for case in (shown(c, cv=nothing, errors=np.full_like(c.errors, np.nan), alike=np.full_like(c.alike, np.nan), apart=np.full_like(c.apart, np.nan)), shown(c, public=nothing)):
        choice = choose(case, BOARD, 300)
        best = np.argsort(-(case.public if np.isfinite(case.public).any() else case.cv))
        assert choice.finals[0] in [c.ids[i] for i in best[:3]] and np.isfinite(choice.table["expected"]).all()
    some = c.public.copy()
    some[::2] = np.nan
    assert len(choose(shown(c, public=some), BOARD, 300).finals) == 2
    assert choose(shown(c, public=nothing, cv=nothing), BOARD, 300).finals


def test_belief_is_calibrated():
    "Over seasons without tuning, what is believed to be 0.01 better is about 0.01 better on the private board."
    believed, true = [], []
    for seed in range(30):
        c, private = season(seed, tuned=0, climbed=0, copies=0, tries=12)
        mean, _ = ledger.believe(c, BOARD)
        believed += list(mean - mean.mean())
        true += list(private - private.mean())
    slope = np.dot(believed, true) / np.dot(believed, believed)
    assert 0.7 < slope < 1.4, slope


def test_expected_is_the_mean_of_the_draws():
    c, _ = season(5)
    choice = choose(c, BOARD, 3000)
    row = choice.table.set_index("id")["expected"]
    for name, rival in choice.rivals.items():
        assert row[rival["finals"]].max() - 1e-9 <= rival["expected"] <= choice.pairs["expected"].iloc[0] + 0.005, name
        assert rival["ahead"] + rival["behind"] <= 1
    assert np.allclose(np.diag(choice.values), row[choice.values.index], atol=1e-9)
    assert choose(c, BOARD, 3000).finals == choice.finals, "the same ledger gives the same answer"


def test_many_entries(tmp_path):
    path = tmp_path / "ledger.jsonl"
    fill_ledger(path, 400, photos=120)
    book = read_ledger(path)
    c = read_candidates(book)
    assert len(book.entries) == 400 and len(c) == ledger.MOST
    public = {e.id: e.get("public") for e in book.entries.values()}
    assert max(public, key=public.get) in c.ids and c.alike.shape == (ledger.MOST, ledger.MOST)
    assert len(list_entries(book, 0)) == 400 and len(choose(c, BOARD, 300).finals) == 2


def test_other_labels_are_not_compared(tmp_path):
    path = tmp_path / "ledger.jsonl"
    fill_ledger(path, 3, photos=60)
    rng = np.random.default_rng(0)
    y, said = rng.uniform(0, 50, (40, 5)), rng.uniform(0, 50, (40, 5))
    facts = {"source": "run", "oof": {"grouped": {"r2": 0.1, "se": 0.1}}, "data": "others", "sites": site_sums(y, said, ["a"] * 20 + ["b"] * 20), "said": ledger.pack(said)}
    append(path, lambda book: [ledger.submission_line(facts) | {"public": 0.5}])
    append(path, lambda book: [ledger.submission_line({**facts, "data": "bench", "said": "no base64!"}) | {"public": 0.4}])
    c = read_candidates(read_ledger(path))
    assert len(c) == 5 and np.isnan(c.errors[3:]).all() and np.isfinite(c.errors[:3]).all() and len(choose(c, BOARD, 200).finals) == 2


def test_calibration_sees_a_shift_and_tuning():
    c, private = season(6, climbed=0, tuned=0, copies=0)
    told = calibrate(shown(c, public=c.cv + 0.05), BOARD, private)
    assert np.isclose(told["CV to public"]["shift"], 0.05) and told["CV to public"]["scatter"] < 1e-9 and np.isclose(told["CV to public"]["rank_correlation"], 1)
    assert "something was tuned" in ledger.tell_calibration(calibrate(shown(c, public=np.random.default_rng(0).permutation(c.cv) * 3), BOARD))[0]


# ---- words and the command line ----
def test_check_in_plain_words(tmp_path, capsys):
    path = tmp_path / "ledger.jsonl"
    fill_ledger(path, 8, photos=60)
    book = read_ledger(path)
    c = read_candidates(book)
    choice = choose(c, BOARD)
    others = [i for i in c.ids if i not in choice.finals]
    lines = advise(book, c, choice, others[:2])
    assert [line.split()[0] for line in lines[1:]] == ["UNTICK", "UNTICK", "TICK", "TICK"]
    assert "leave it" in advise(book, c, choice, choice.finals)[1]
    references = [str(book.entries[i].get("reference")) for i in choice.finals]
    assert main(["check", "--ledger", str(path), "--deadline", "2020-01-01T00:00Z", *(w for r in references for w in ("--selected", r))]) == 0
    out = capsys.readouterr().out
    assert "leave it" in out and "passed" in out
    assert main(["pick", "--ledger", str(path)]) == 0 and path.with_suffix(".png").stat().st_size > 5000
    assert "Tick" in capsys.readouterr().out


def test_a_better_run_that_was_never_sent_is_named(tmp_path):
    path = tmp_path / "ledger.jsonl"
    fill_ledger(path, 4, photos=60)
    unsent = add_entry(path, {"source": "run", "oof": {"grouped": {"r2": 0.99, "se": 0.01}}})
    book = read_ledger(path)
    c = read_candidates(book)
    assert unsent not in c.ids and f"Entry {unsent} has the best CV" in " ".join(advise(book, c, choose(c, BOARD)))


@pytest.mark.parametrize("words", [[], ["tick"], ["add", "nothing"], ["import", "nowhere"], ["pick"], ["check", "--selected", "x"], ["list", "--last", "x"],
                                   ["pick", "--private-share", "1.5"], ["season", "--seasons", "1"], ["add", "run 0", "--public", "7"]])
def test_a_wrong_call_is_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_as_a_command(tmp_path):
    (tmp_path / "list.csv").write_text(printed(ROWS, "csv"))
    call = lambda *words: subprocess.run([sys.executable, "-m", "nbs_lib.ledger", *words], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # noqa: E731
    done = call("import", "list.csv")
    assert done.returncode == 0 and "3 new" in done.stdout, done.stderr
    assert "two,  spaces" in call("list").stdout
    assert call("import", "none.csv").returncode == 2
