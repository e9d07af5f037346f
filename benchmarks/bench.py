"""Measure speed and memory beside what a person would use instead: `python -m benchmarks.bench --output DIR [--only NAME]...`."""
import argparse
import importlib
import inspect
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import psutil

from nbs_lib import __version__ as version
from nbs_lib.runtime import InputError, atomic_write, write_json


def find_benches(only: Iterable[str] = ()) -> dict[str, Callable[[], list[dict]]]:
    "The functions `bench_…` of benchmarks/ as {'module.bench_name': function}; `only` names modules or functions. Raises `InputError` for a name that is neither."
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        if path.stem != "bench" and "\ndef bench_" in path.read_text(encoding="utf-8"):
            module = importlib.import_module(f"benchmarks.{path.stem}")
            found |= {f"{path.stem}.{n}": f for n, f in inspect.getmembers(module, inspect.isfunction) if n.startswith("bench_") and f.__module__ == module.__name__}
    for name in only:
        if not any(name in (full, *full.split(".")) for full in found):
            raise InputError(f"--only {name}: nothing of that name is measured; there are {', '.join(found)}, or a module's name for all of its own")
    return {full: f for full, f in found.items() if not only or {full, *full.split(".")} & set(only)}


def machine() -> dict:
    "What this machine is: processor, cores, memory, system, versions."
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "cores": psutil.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 2**30, 1), "system": platform.system(),
            "python": platform.python_version(), "nbs_lib": version}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def name_machine(m: dict) -> str:
    "One line: processor, cores, memory."
    return f"{m['cpu'] or m['system']}, {m['cores']} cores, {m['memory_gb']:g} GB"


def gather(benches: dict[str, Callable[[], list[dict]]]) -> pd.DataFrame:
    "Run each bench; its rows under its name, the machine last. One that fails has a single row that says so in `failed`."
    rows = []
    for name, bench in benches.items():
        print(f"{name} …", flush=True)
        try:
            rows += [{"bench": name, **row} for row in bench()]
        except Exception as e:
            rows.append({"bench": name, "failed": " ".join(f"{type(e).__name__}: {e}".split())})
            print(f"{name} failed: {rows[-1]['failed']}", flush=True)
    return pd.DataFrame(rows).assign(machine=name_machine(machine()))


def measured(group: pd.DataFrame) -> str:
    "The column of `group` that is drawn: seconds, else the first number; empty when there is none."
    numbers = [c for c in group.select_dtypes("number") if group[c].notna().any() and (group[c].dropna() > 0).all()]
    return "seconds" if "seconds" in numbers else next(iter(numbers), "")


def label(row: pd.Series) -> str:
    "The words of a row that tell it from the others of its bench."
    words = {k: v for k, v in row.items() if isinstance(v, str) and k not in ("bench", "note", "kind", "failed", "machine")}
    if pd.notna(length := row.get("length")):
        words["length"] = f"{length:,.0f} long"
    return " · ".join(words.values()) or str(row.name)


def plot_bench(table: pd.DataFrame):
    "A figure with a panel a bench and a bar a row, titled with the machine; a bench without numbers has no panel. None when none has."
    from matplotlib.figure import Figure

    groups = [(name, g, column) for name, g in table.groupby("bench", sort=False) if (column := measured(g))]
    if not groups:
        return None
    heights = [len(g) + 3 for _, g, _ in groups]
    figure = Figure(figsize=(9, 0.9 + 0.28 * sum(heights)), layout="constrained")
    figure.suptitle(table["machine"].iloc[0], fontsize=9)
    for ax, (name, group, column) in zip(figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0], groups, strict=True):
        group = group[group[column].notna()]
        values = group[column].astype(float)
        ax.bar_label(ax.barh(range(len(group)), values, color="#567d46"), fmt=lambda v: f"{v:,.0f}" if v >= 1000 else f"{v:.3g}", padding=3, fontsize=7)  # rows may share a label: places are numbers
        ax.set_yticks(range(len(group)), [label(row) for _, row in group.iterrows()], fontsize=7)
        ax.set(xscale="log", title=name, xlabel=column, xlim=(values.min() / 10, values.max() * 3))  # a logarithm has no zero: the shortest bar is a decade
        ax.xaxis.set_minor_formatter("")  # a panel of less than a decade would write them one over the other
        ax.invert_yaxis()
    return figure


def write_bench(output: str | Path, only: Iterable[str] = ()) -> pd.DataFrame:
    "Measure, and write bench.csv, bench.json (the machine) and bench.png to `output`."
    output = Path(output)
    table = gather(find_benches(list(only)))
    with atomic_write(output / "bench.csv") as temporary:
        table.to_csv(temporary, index=False)
    write_json(output / "bench.json", machine())
    if (figure := plot_bench(table)) is not None:
        with atomic_write(output / "bench.png") as temporary:
            figure.savefig(temporary, dpi=80)
    return table


def main(argv: list[str] | None = None) -> int:
    "`python -m benchmarks.bench --output DIR [--only NAME]...`; 0 done, 1 a measurement failed, 2 a name is unknown."
    p = argparse.ArgumentParser(prog="python -m benchmarks.bench", description="Measure speed and memory, side by side.")
    p.add_argument("--output", default="runs/bench")
    p.add_argument("--only", action="append", default=[], metavar="NAME", help="just this module, or this bench_… of it (repeatable)")
    args = p.parse_args(argv)
    try:
        table = write_bench(args.output, args.only)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    with pd.option_context("display.width", 160, "display.max_columns", 20, "display.max_rows", 200):
        print(table.drop(columns="machine").to_string(index=False, na_rep=""))
    print(f"on {table['machine'].iloc[0]}; written to {args.output}")
    failed = table.loc[table["failed"].notna(), "bench"].tolist() if "failed" in table else []
    if failed:
        print(f"error: {len(failed)} of {table['bench'].nunique()} measurements failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
