"""make bench: one table and one picture with the machine named, whatever a measurement does."""
import json

import pandas as pd
import pytest

from benchmarks import bench


@pytest.fixture
def measurements(monkeypatch):
    "Three measurements in place of the library's: one with seconds, one with another number, one that breaks."
    def breaks():
        raise ValueError("no\nkernel")

    found = {"a.bench_sum": lambda: [{"name": "loop", "seconds": 0.2}, {"name": "numpy", "seconds": 0.01}], "b.bench_broken": breaks,
             "c.bench_rate": lambda: [{"name": "ours", "photos_a_second": 3.0, "note": "kept out of the label"}, {"name": "theirs", "photos_a_second": 1.5}]}
    monkeypatch.setattr(bench, "find_benches", lambda only=(): {k: v for k, v in found.items() if not only or k in only})


def test_one_that_fails_is_named_and_the_others_go_on(measurements, tmp_path, capsys):
    assert bench.main(["--output", str(tmp_path)]) == 1
    told, table = capsys.readouterr(), pd.read_csv(tmp_path / "bench.csv")
    assert told.err == "error: 1 of 3 measurements failed: b.bench_broken\n"
    assert table["bench"].tolist() == ["a.bench_sum", "a.bench_sum", "b.bench_broken", "c.bench_rate", "c.bench_rate"]
    assert table.loc[2, "failed"] == "ValueError: no kernel" and (table["machine"] == bench.name_machine(bench.machine())).all()
    assert json.loads((tmp_path / "bench.json").read_text())["cores"] > 0 and (tmp_path / "bench.png").stat().st_size > 2000


def test_picture_has_a_panel_a_measurement(measurements):
    table = bench.gather(bench.find_benches())
    figure = bench.plot_bench(table)
    assert [(a.get_title(), a.get_xlabel(), len(a.patches)) for a in figure.axes] == [("a.bench_sum", "seconds", 2), ("c.bench_rate", "photos_a_second", 2)]
    assert [t.get_text() for t in figure.axes[1].get_yticklabels()] == ["ours", "theirs"] and figure.get_suptitle() == table["machine"][0]


def test_only_failures_make_no_picture(measurements, tmp_path):
    assert bench.main(["--output", str(tmp_path), "--only", "b.bench_broken"]) == 1
    assert not (tmp_path / "bench.png").exists() and len(pd.read_csv(tmp_path / "bench.csv")) == 1


def test_unknown_name_is_refused_in_one_line(tmp_path, capsys):
    assert bench.main(["--output", str(tmp_path / "out"), "--only", "paddock"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --only paddock: ") and err.count("\n") == 1 and "fusion.bench_scan" in err and not (tmp_path / "out").exists()


def test_a_name_means_a_room_or_one_of_its_functions():
    everything = bench.find_benches()
    assert {"fusion.bench_scan", "submit.bench_submit"} <= everything.keys()
    assert set(bench.find_benches(["fusion"])) == {n for n in everything if n.startswith("fusion.")}
    assert set(bench.find_benches(["bench_scan"])) == set(bench.find_benches(["fusion.bench_scan"])) == {"fusion.bench_scan"}
    assert all(callable(f) for f in everything.values())


def test_every_measurement_can_be_called_without_arguments():
    import inspect

    for name, function in bench.find_benches().items():
        needed = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        assert not needed, f"{name} needs {needed}"
