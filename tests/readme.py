"""Write the tables of README.md and benchmarks/README.md: `python tests/readme.py [--run DIR] [--bench DIR] [--write]`

They come from the files in results/. `--run` first keeps the scores of a finished run there, `--bench` what
`make bench` measured. Without `--write` it only prints which tables differ. Scores on synthetic and on real
photographs are in files and tables of their own.
"""
import argparse
import ast
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README, BENCHMARKS = ROOT / "results", ROOT / "README.md", ROOT / "benchmarks" / "README.md"
MARKS = re.compile(r"(<!-- (\w+):begin -->\n)(.*?)(<!-- \2:end -->)", re.S)


def rows(head: list[str], lines: list[list[str]]) -> str:
    "A table in Markdown."
    cells = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |\n" for line in cells)


def as_it_is(name: str) -> str:
    table = pd.read_csv(RESULTS / name, dtype=str)
    return rows(list(table), table.to_numpy().tolist())


def score(value: float) -> str:
    return "–" if pd.isna(value) else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # + 0.0: no minus zero


def told(about: dict) -> str:
    "What the scores of a run were measured on, in a sentence."
    minutes, where = sum(about["seconds"].values()) / 60, about["machine"]
    changed = "".join(f" with {what}" for what in (about["preset"] and f"the preset {about['preset']}", ", ".join(about["overrides"])) if what)
    return (f"Profile `{about['profile']}`{changed}, {about['photos']} {about['photographs']} photos of {about['sites']} sites, seed {about['seed']}, {about['date']}: "
            f"{minutes:.0f} minutes of stages on {where.get('cpus', '?')} cores, at most {about['peak_gb']:.1f} GB.\n\n")


def scores(photographs: str) -> str:
    "A table for each run on `photographs`: synthetic or real."
    out = []
    for path in sorted(RESULTS.glob(f"{photographs}_*.json")):
        table = pd.read_csv(path.with_suffix(".csv"))
        lines = [[r.model, r.judged_on, f"**{r.r2:.3f}**" if (r.model, r.judged_on) == ("ensemble", "grouped") else f"{r.r2:.3f}", spread(r),
                  *map(score, (r.Dry_Green_g, r.Dry_Dead_g, r.Dry_Clover_g, r.GDM_g, r.Dry_Total_g))] for r in table.itertuples()]
        out.append(told(json.loads(path.read_text())) + rows(["model", "judged on", "score", "95 % of sites; sd", "Green", "Dead", "Clover", "GDM", "Total"], lines))
    return "\n".join(out) or f"No run on {photographs} photographs has been kept here yet.\n"


def spread(row) -> str:
    "The interval over resampled sites, or the sd over random draws of sites."
    if pd.notna(getattr(row, "sd", None)):
        return f"± {row.sd:.3f}"
    return "–" if pd.isna(row.low) else f"{score(row.low)} to {score(row.high)}"


def recipe() -> str:
    "What the recipe does, where it says so, and that our preset does the same: the table that tests/test_recipe.py checks."
    source = (ROOT / "tests" / "test_recipe.py").read_text(encoding="utf-8")
    tables = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(source).body
              if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("RECIPE", "T4")}

    def told(value) -> str:
        return ", ".join(map(str, value)) if isinstance(value, tuple) else {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else str(value)

    lines = [[f"`{name}`", told(value), told(tables["T4"].get(name, value)), where] for name, (value, where) in tables["RECIPE"].items()]
    return rows(["setting", "recipe", "recipe_t4", "source"], lines)


def ablation() -> str:
    "The mean over seeds of each fusion and head."
    table = pd.read_csv(RESULTS / "ablation.csv", keep_default_na=False).pivot_table("r2w", ["fusion", "head"], "scheme", ["mean", "std", "size"])
    table = table.sort_values(("mean", "grouped"), ascending=False)
    names = {("none", "none"): ("–", "the probe alone")}
    lines = [[*names.get(key, key), f"{r['mean', 'grouped']:.3f} ± {r['std', 'grouped']:.3f}", f"{r['mean', 'stratified']:.3f} ± {r['std', 'stratified']:.3f}", int(r["size", "grouped"])] for key, r in table.iterrows()]
    return rows(["fusion", "head", "grouped", "stratified", "seeds"], lines)


def stamps() -> str:
    "Both rules on composites."
    table = pd.read_csv(RESULTS / "stamps.csv")
    lines = [[r.rule, f"{r.recall:.3f}", f"{r.precision:.3f}", f"{r.clean:.3f}", f"{r.coverage:.3f}", f"{r.area:.2f}"] for r in table.itertuples()]
    return f"On {table['stamps'].iloc[0]:.0f} composites with a stamp and as many without:\n\n" + rows(
        ["what is painted over", "stamps found", "painted and a stamp", "stampless left alone", "pixels of those found", "area by their box"], lines)


def bench_line(row: pd.Series, column: str) -> list[str]:
    "Return the cells of one measurement; `column` holds the number that is shown."
    from benchmarks.bench import label_row

    row = row.dropna()  # absent: the bench has no such column
    number = row.get(column)
    value = f"{number:.3g}" if number is not None else "failed" if "failed" in row else "–"
    memory = f"{row['peak_mb']:.0f}" if "peak_mb" in row else ""
    ratio = f"{row['times_decode']:.2f} × decode alone" if row.get("times_decode", 0) > 1 else ""
    notes = "; ".join(filter(None, [row.get("note"), ratio]))
    return [row["bench"], label_row(row), value, column.replace("_", " "), memory, notes]


def bench() -> str:
    "Return every row that `make bench` measured, with its machine."
    from benchmarks.bench import main_column

    if not (RESULTS / "bench.csv").is_file():
        return "Nothing is kept here yet: `make bench`, then `make results`.\n"
    table, lines = pd.read_csv(RESULTS / "bench.csv"), []
    for _, group in table.groupby("bench", sort=False):
        lines += [bench_line(row, main_column(group)) for _, row in group.iterrows()]
    where = f"Measured on {table['machine'].iloc[0]}; also [as a picture](../results/bench.png).\n\n"
    return where + rows(["measurement", "what", "value", "of", "peak MB", "note"], lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "labels": lambda: as_it_is("labels.csv"), "measured": lambda: as_it_is("real.csv"), "recipe": recipe,
    "real": lambda: scores("real"), "synthetic": lambda: scores("synthetic"), "ablation": ablation, "stamps": stamps,
    "bench": bench,
}
PAGES = (README, BENCHMARKS)


def filled(text: str) -> tuple[str, list[str]]:
    "Return `text` with every block made anew, and the names of those that differed."
    stale = []

    def block(m: re.Match) -> str:
        new = BLOCKS[m[2]]() if m[2] in BLOCKS else m[3]
        stale.extend([m[2]] if new != m[3] else [])
        return m[1] + new + m[4]

    return MARKS.sub(block, text), stale


def keep(run: str, measurements: str) -> None:
    "Put what a run and `make bench` left into results/."
    if run:
        from nbs_lib.report import reopen, write_results

        write_results(*reopen(run), RESULTS)
    for name in ("bench.csv", "bench.png") if measurements else ():
        shutil.copyfile(Path(measurements) / name, RESULTS / name)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run", default="", help="keep the scores of this finished run")
    p.add_argument("--bench", default="", help="keep bench.csv and bench.png of this folder")
    p.add_argument("--write", action="store_true", help="put the tables into README.md and benchmarks/README.md")
    a = p.parse_args()
    keep(a.run, a.bench)
    drift = []
    for page in PAGES:
        text, stale = filled(page.read_text(encoding="utf-8"))
        if a.write:
            page.write_text(text, encoding="utf-8")
        drift += stale
        print(f"{page.relative_to(ROOT)}: {', '.join(stale) or 'nothing'} {'written' if a.write else 'to write'}")
    return 1 if drift and not a.write else 0


if __name__ == "__main__":
    sys.exit(main())
