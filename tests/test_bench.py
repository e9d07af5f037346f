"""make bench: one table and one picture with the machine named, whatever a measurement does."""
import inspect
import json
import subprocess
import sys

import pandas as pd
import pytest

from benchmarks import bench, boosting


@pytest.fixture
def measurements(monkeypatch):
    "Replace the library's measurements by three: one with seconds, one with a rate, one that fails."
    def breaks():
        raise ValueError("no\nkernel")

    sums = [{"name": "loop", "seconds": 0.2}, {"name": "numpy", "seconds": 0.01}]
    rates = [{"name": "ours", "photos_a_second": 3.0, "note": "not in the label"},
             {"name": "theirs", "photos_a_second": 1.5}]
    found = {"a.bench_sum": lambda: sums, "b.bench_broken": breaks, "c.bench_rate": lambda: rates}
    monkeypatch.setattr(bench, "find_benches", lambda only=(): {k: found[k] for k in only or found})


def test_one_that_fails_is_named_and_the_others_go_on(measurements, tmp_path, capsys):
    assert bench.main(["--output", str(tmp_path)]) == 1
    table = pd.read_csv(tmp_path / "bench.csv")
    assert capsys.readouterr().err == "error: 1 of 3 measurements failed: b.bench_broken\n"
    assert table["bench"].tolist() == [*["a.bench_sum"] * 2, "b.bench_broken", *["c.bench_rate"] * 2]
    assert table.loc[2, "failed"] == "ValueError: no kernel"
    assert (table["machine"] == bench.name_machine(bench.describe_machine())).all()
    assert json.loads((tmp_path / "bench.json").read_text())["cores"] > 0
    assert (tmp_path / "bench.png").stat().st_size > 2000


def test_picture_has_a_panel_a_measurement(measurements):
    table = bench.run_benches(bench.find_benches())
    figure = bench.plot_bench(table)
    panels = [(a.get_title(), a.get_xlabel(), len(a.patches)) for a in figure.axes]
    assert panels == [("a.bench_sum", "seconds", 2), ("c.bench_rate", "photos_a_second", 2)]
    assert [t.get_text() for t in figure.axes[1].get_yticklabels()] == ["ours", "theirs"]
    assert figure.get_suptitle() == table["machine"][0]


def test_only_failures_make_no_picture(measurements, tmp_path):
    assert bench.main(["--output", str(tmp_path), "--only", "b.bench_broken"]) == 1
    assert not (tmp_path / "bench.png").exists() and len(pd.read_csv(tmp_path / "bench.csv")) == 1


def test_unknown_name_is_refused_in_one_line(tmp_path, capsys):
    assert bench.main(["--output", str(tmp_path / "out"), "--only", "paddock"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --only paddock: ") and err.count("\n") == 1 and "fusion.bench_scan" in err
    assert not (tmp_path / "out").exists()


def test_a_name_means_a_file_or_one_of_its_functions():
    everything = bench.find_benches()
    assert {"fusion.bench_scan", "submit.bench_submit"} <= everything.keys()
    assert set(bench.find_benches(["fusion"])) == {n for n in everything if n.startswith("fusion.")}
    for name in ("bench_scan", "fusion.bench_scan"):
        assert set(bench.find_benches([name])) == {"fusion.bench_scan"}
    assert all(callable(f) for f in everything.values())


def test_every_measurement_can_be_called_without_arguments():
    for function in bench.find_benches().values():
        inspect.signature(function).bind()


def test_code_of_a_process_of_its_own_imports():
    code = boosting.CODE.partition("; print")[0]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=boosting.ROOT)
