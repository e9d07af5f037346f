"""Run every `bench_*` function of benchmarks/*.py; write one table and one picture that name the machine.

`python -m benchmarks.bench [--output DIR] [--only NAME]...`; each file's docstring says what it compares.
"""
import argparse
import importlib
import platform
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import psutil

from nbs_lib import __version__ as version
from nbs_lib.runtime import InputError, atomic_write, exit_code_of, write_json


def find_benches(only: Iterable[str] = ()) -> dict[str, Callable[[], list[dict]]]:
    """Return {'file.bench_name': function}; `only` keeps those whose file or function it names.

    Raise `InputError` for a name that is neither.
    """
    names, only = {}, set(only)
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        for name in re.findall(r"^def (bench_\w+)", path.read_text(encoding="utf-8"), re.M):
            names[f"{path.stem}.{name}"] = {f"{path.stem}.{name}", path.stem, name}
    for name in sorted(only - set().union(*names.values())):
        raise InputError(f"--only {name}: unknown; give a file of benchmarks/ or one of {', '.join(names)}")
    found = {}
    for full in (full for full, short in names.items() if not only or short & only):
        module, name = full.split(".")
        found[full] = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    return found


def describe_machine() -> dict:
    "Return processor, cores, memory, system and versions."
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": (models or [platform.processor()])[0], "cores": psutil.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1), "system": platform.system(),
            "python": platform.python_version(), "nbs_lib": version}


def name_machine(m: dict) -> str:
    "Return one line: processor, cores, memory."
    return f"{m['cpu'] or m['system']}, {m['cores']} cores, {m['memory_gb']:g} GB"


def run_benches(benches: dict[str, Callable[[], list[dict]]]) -> pd.DataFrame:
    "Return the rows of every bench under its name; one that fails has one row, its error in `failed`."
    rows = []
    for name, bench in benches.items():
        print(f"{name} …", flush=True)
        try:
            rows += [{"bench": name, **row} for row in bench()]
        except Exception as e:
            rows.append({"bench": name, "failed": " ".join(f"{type(e).__name__}: {e}".split())})
            print(f"{name} failed: {rows[-1]['failed']}", flush=True)
    return pd.DataFrame(rows).assign(machine=name_machine(describe_machine()))


def main_column(group: pd.DataFrame) -> str:
    "Return the column that is shown: seconds, else the first of positive numbers; '' when there is none."
    columns = group.select_dtypes("number").dropna(axis=1, how="all")
    numbers = [c for c in columns if (columns[c].dropna() > 0).all()]
    return "seconds" if "seconds" in numbers else next(iter(numbers), "")


def label_row(row: pd.Series) -> str:
    "Return the words that distinguish a row from the others of its bench."
    hidden = ("bench", "note", "kind", "failed", "machine")
    words = {k: v for k, v in row.items() if isinstance(v, str) and k not in hidden}
    if pd.notna(length := row.get("length")):
        words["length"] = f"{length:,.0f} long"
    return " · ".join(words.values()) or str(row.name)


def plot_bars(ax, group: pd.DataFrame, column: str) -> None:
    "Draw a bar a row on a logarithmic axis, its number at its end."
    group = group[group[column].notna()]
    values, places = group[column].astype(float), range(len(group))  # rows may share a label
    bars = ax.barh(places, values, color="#567d46")
    ax.bar_label(bars, fmt=lambda v: f"{v:,.0f}" if v >= 1000 else f"{v:.3g}", padding=3, fontsize=7)
    ax.set_yticks(places, [label_row(row) for _, row in group.iterrows()], fontsize=7)
    ax.set(xscale="log", xlabel=column, xlim=(values.min() / 10, values.max() * 3))
    ax.xaxis.set_minor_formatter("")  # minor labels overlap where a panel spans less than a decade
    ax.invert_yaxis()


def plot_bench(table: pd.DataFrame):
    "Return a figure with a panel a bench, titled with the machine; None when no bench has numbers."
    from matplotlib.figure import Figure

    groups = [(name, g, main_column(g)) for name, g in table.groupby("bench", sort=False)]
    groups = [group for group in groups if group[2]]
    if not groups:
        return None
    heights = [len(g) + 3 for _, g, _ in groups]
    figure = Figure(figsize=(9, 0.9 + 0.28 * sum(heights)), layout="constrained")
    figure.suptitle(table["machine"].iloc[0], fontsize=9)
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (name, group, column) in zip(axes, groups, strict=True):
        plot_bars(ax, group, column)
        ax.set_title(name)
    return figure


def write_bench(output: str | Path, only: Iterable[str] = ()) -> pd.DataFrame:
    "Measure; write bench.csv, bench.json (the machine) and bench.png to `output`; return the table."
    output = Path(output)
    table = run_benches(find_benches(only))
    with atomic_write(output / "bench.csv") as temporary:
        table.to_csv(temporary, index=False)
    write_json(output / "bench.json", describe_machine())
    if (figure := plot_bench(table)) is not None:
        with atomic_write(output / "bench.png") as temporary:
            figure.savefig(temporary, dpi=80)
    return table


def main(argv: list[str] | None = None) -> int:
    "Run the command line; return 0 when done, 1 when a measurement failed, 2 for an unknown name."
    p = argparse.ArgumentParser(prog="python -m benchmarks.bench", description="Measure speed and memory.")
    p.add_argument("--output", default="runs/bench")
    p.add_argument("--only", action="append", default=[], metavar="NAME", help="a file or a bench_…")
    args = p.parse_args(argv)
    return exit_code_of(lambda: print_bench(write_bench(args.output, args.only), args.output))


def print_bench(table: pd.DataFrame, output: str) -> int:
    "Print what was measured and what failed; return 1 when a measurement failed."
    with pd.option_context("display.width", 160, "display.max_columns", 20, "display.max_rows", 200):
        print(table.drop(columns="machine").to_string(index=False, na_rep=""))
    print(f"on {table['machine'].iloc[0]}; written to {output}")
    failed = table.loc[table["failed"].notna(), "bench"].tolist() if "failed" in table else []
    if failed:
        count = f"{len(failed)} of {table['bench'].nunique()} measurements failed"
        print(f"error: {count}: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
