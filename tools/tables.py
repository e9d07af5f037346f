"""Write the tables of README.md, docs/ and benchmarks/ from the files of results/.

`python tools/tables.py [--run DIR [--input DIR]] [--bench DIR] [--write]`: `--run` first keeps the scores of
a finished run, `--bench` what `make bench` measured; `--write` puts the tables into the pages. Without it
the tables that differ are named. Synthetic and real photographs never share a table.
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
sys.path.insert(0, str(ROOT))  # for benchmarks, which is not installed
RESULTS = ROOT / "results"
PAGES = ("README.md", "docs/experiments.md", "docs/recipe.md", "docs/robustness.md", "benchmarks/README.md")
MARKS = re.compile(r"(<!-- (\w+):begin -->\n)(.*?)(<!-- \2:end -->)", re.S)


def format_table(head: list[str], lines: list[list[str]]) -> str:
    "Format a table in Markdown."
    cells = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |\n" for line in cells)


def format_csv(name: str) -> str:
    "Format a file of results/ as it is."
    table = pd.read_csv(RESULTS / name, dtype=str).drop(columns="readme", errors="ignore")
    return format_table(list(table), table.to_numpy().tolist())


def format_real() -> str:
    "Format the rows of results/real.csv that README shows."
    table = pd.read_csv(RESULTS / "real.csv", dtype=str).query("readme == 'yes'").drop(columns="readme")
    return format_table(list(table), table.to_numpy().tolist())


def format_number(value: float, digits: int = 2) -> str:
    "Format a score with a true minus sign, never a minus zero; `–` for none."
    return "–" if pd.isna(value) else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def describe_run(about: dict) -> str:
    "Say in a sentence what the scores of a run were measured on."
    minutes, where = sum(about["seconds"].values()) / 60, about["machine"]
    changes = [f"the preset {about['preset']}"] if about["preset"] else []
    changes += [", ".join(about["overrides"])] if about["overrides"] else []
    changed = "".join(f" with {what}" for what in changes)
    photos = f"{about['photos']} {about['photographs']} photos of {about['sites']} sites"
    cores = where.get("cpus", "?")
    cost = f"{minutes:.0f} minutes of stages on {cores} cores, at most {about['peak_gb']:.1f} GB"
    profile = f"Profile `{about['profile']}`{changed}"
    return f"{profile}, {photos}, seed {about['seed']}, {about['date']}: {cost}.\n\n"


def format_scores(photographs: str) -> str:
    "Format every score of each kept run on `photographs`: synthetic or real."
    pages = []
    for path in sorted(RESULTS.glob(f"{photographs}_*.json")):
        table = pd.read_csv(path.with_suffix(".csv"))
        lines = [
            [
                r.model,
                r.judged_on,
                format_number(r.r2, 3),
                format_spread(r),
                *map(format_number, (r.Dry_Green_g, r.Dry_Dead_g, r.Dry_Clover_g, r.GDM_g, r.Dry_Total_g)),
            ]
            for r in table.itertuples()
        ]
        head = ["model", "judged on", "R²", "95 % of sites; sd", "Green", "Dead", "Clover", "GDM", "Total"]
        pages.append(describe_run(json.loads(path.read_text())) + format_table(head, lines))
    return "\n".join(pages) or f"No run on {photographs} photographs has been kept here yet.\n"


def format_summary(photographs: str) -> str:
    "Format R² of each model in each kept run on `photographs`, a column per way of judging."
    pages = []
    for path in sorted(RESULTS.glob(f"{photographs}_*.json")):
        table = pd.read_csv(path.with_suffix(".csv"))
        wide = table.pivot(index="model", columns="judged_on", values="r2")[
            list(dict.fromkeys(table["judged_on"]))
        ]
        wide = wide.loc[list(dict.fromkeys(table["model"]))]
        lines = [
            [model, *(format_number(v, 3) for v in row)]
            for model, row in zip(wide.index, wide.to_numpy(), strict=True)
        ]
        pages.append(
            describe_run(json.loads(path.read_text())) + format_table(["model", *wide.columns], lines)
        )
    return "\n".join(pages) or f"No run on {photographs} photographs has been kept here yet.\n"


def format_spread(row) -> str:
    "Format the interval over resampled sites, or the sd over random draws of sites."
    if pd.notna(getattr(row, "sd", None)):
        return f"± {row.sd:.3f}"
    return "–" if pd.isna(row.low) else f"{format_number(row.low)} to {format_number(row.high)}"


def format_value(value) -> str:
    "Format a setting as settings.ini writes it."
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def format_recipe() -> str:
    "Format the table that tests/test_recipe.py holds: the recipe's value of each setting, and its source."
    source = (ROOT / "tests" / "test_recipe.py").read_text(encoding="utf-8")
    assigned = [n for n in ast.parse(source).body if isinstance(n, ast.Assign)]
    tables = {
        n.targets[0].id: ast.literal_eval(n.value)
        for n in assigned
        if getattr(n.targets[0], "id", "") in ("RECIPE", "T4")
    }
    lines = [
        [f"`{name}`", format_value(value), format_value(tables["T4"].get(name, value)), where]
        for name, (value, where) in tables["RECIPE"].items()
    ]
    return format_table(["setting", "recipe", "recipe_t4", "source"], lines)


def format_ablation() -> str:
    "Format the mean over seeds of each mixer and head."
    table = pd.read_csv(RESULTS / "ablation.csv", keep_default_na=False)
    table = table.pivot_table("r2w", ["fusion", "head"], "scheme", ["mean", "std", "size"])
    table = table.sort_values(("mean", "grouped"), ascending=False)
    names = {("none", "none"): ("–", "the probe alone")}
    lines = []
    for key, row in table.iterrows():
        scores = [f"{row['mean', s]:.3f} ± {row['std', s]:.3f}" for s in ("grouped", "stratified")]
        lines.append([*names.get(key, key), *scores, int(row["size", "grouped"])])
    return format_table(["fusion", "head", "grouped", "stratified", "seeds"], lines)


def format_stamps() -> str:
    "Format how both rules do on drawn stamps."
    table = pd.read_csv(RESULTS / "stamps.csv")
    lines = [
        [
            r.rule,
            f"{r.recall:.3f}",
            f"{r.precision:.3f}",
            f"{r.clean:.3f}",
            f"{r.coverage:.3f}",
            f"{r.area:.2f}",
        ]
        for r in table.itertuples()
    ]
    head = [
        "what is inpainted",
        "stamps found",
        "inpainted and a stamp",
        "stampless photos unchanged",
        "pixels of those found",
        "area by their box",
    ]
    return (
        f"On {table['stamps'].iloc[0]:.0f} composites with a stamp and as many without:\n\n"
        + format_table(head, lines)
    )


def format_calibration() -> str:
    "Format errors in grams and coverage at new sites by the number of weighed quadrats."
    table = pd.read_csv(RESULTS / "calibration_study.csv").set_index(["site", "cuts"])
    own, squares = (table[table["method"] == name] for name in ("out-of-fold prior", "least squares"))
    lines = []
    for site, rows in own.groupby("site", sort=False):
        errors = [f"{error:.1f}" for error in rows["error"]]
        least = " / ".join(f"{error:.1f}" for error in squares.loc[site, "error"])
        covered = [f"{rows['covered_without'].mean():.0%}", f"{rows['covered'].min():.0%}"]
        lines.append([site, f"{rows['without'].mean():.1f}", *errors, least, *covered])
    head = ["new site", "no cuts, g", "3", "10", "30", "least squares, 3 / 10 / 30", "covered", "with cuts"]
    return format_table(head, lines)


def format_widths() -> str:
    "Format the errors at other camera heights, predicted as they are and brought to the learned width."
    lines = []
    for row in pd.read_csv(RESULTS / "predict_study.csv").to_dict("records"):
        line = [f"{row['ground width']:.1f} ×", f"{row['photos']}", f"{row['true kg/ha']:,.0f}"]
        for way in ("as learned", "--ground-width"):
            line += [f"{row[f'{way}: {what}']:,.0f}" for what in ("mean", "error")]
            line += [f"{row[f'{way}: covered']:.0%}"]
        lines.append(line)
    ways = [f"{way}: {what}" for way in ("as it is", "with `--ground-width`")
            for what in ("mean", "error", "covered")]
    return format_table(["width on the ground", "photos", "true mean, kg/ha", *ways], lines)


def format_bench() -> str:
    "Format every row that `make bench` measured, with its machine."
    from benchmarks.bench import label_row, main_column  # here: pandas alone makes the other tables

    if not (RESULTS / "bench.csv").is_file():
        return "Nothing is kept here yet: `make bench`, then `make results`.\n"
    table, lines = pd.read_csv(RESULTS / "bench.csv"), []
    for name, group in table.groupby("bench", sort=False):
        column = main_column(group)
        for _, row in group.iterrows():
            missing = "failed" if pd.notna(row.get("failed")) else "–"
            value = f"{row[column]:.3g}" if column and pd.notna(row[column]) else missing
            memory = f"{row['peak_mb']:.0f}" if pd.notna(row.get("peak_mb")) else ""
            notes = [row["note"] if isinstance(row.get("note"), str) else ""]
            notes += [f"{row['times_decode']:.2f} × decode alone"] if row.get("times_decode", 0) > 1 else []
            note = "; ".join(n for n in notes if n)
            lines.append([name, label_row(row), value, column.replace("_", " "), memory, note])
    head = format_table(["measurement", "what", "value", "unit", "peak MB", "note"], lines)
    return f"Measured on {table['machine'].iloc[0]}; also [as a picture](../results/bench.png).\n\n" + head


CHAPTERS = {  # first and last number of the notebooks
    "Data": (4, 21), "Model 1": (28, 34), "Model 2": (39, 43), "Blend, submission, any photos": (51, 61),
    "Kaggle": (70, 81), "Plumbing": (1, 90),
}


def list_notebooks() -> str:
    "List every notebook by its title in the order of reading, stages in bold; the plumbing comes last."
    lines = {chapter: [] for chapter in CHAPTERS}  # the overview, which is first, is linked above them
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))[1:]:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        title = next("".join(c["source"]) for c in cells if c["cell_type"] == "markdown").partition("\n")[0]
        exported = ["".join(c["source"]) for c in cells if c["source"][:1] == ["#| export\n"]]
        is_stage = any("\n@stage(" in source for source in exported)
        name = f"**{path.stem}**" if is_stage else path.stem
        subject = title.partition(": ")[2]
        subject = subject if len(subject) < 40 else subject.partition(",")[0]
        number = int(path.stem[:2])
        chapter = next(c for c, (first, last) in CHAPTERS.items() if first <= number <= last)
        lines[chapter].append(f"- [{name}](notebooks/{path.name}) {subject}\n")
    return "\n".join(f"{chapter}\n" + "".join(items) for chapter, items in lines.items())


BLOCKS: dict[str, Callable[[], str]] = {
    "notebooks": list_notebooks,
    "labels": lambda: format_csv("labels.csv"),
    "measured": format_real,
    "experiments": lambda: format_csv("real.csv"),
    "recipe": format_recipe,
    "real": lambda: format_summary("real"),
    "synthetic": lambda: format_summary("synthetic"),
    "synthetic_all": lambda: format_scores("synthetic"),
    "ablation": format_ablation,
    "stamps": format_stamps,
    "calibration": format_calibration,
    "widths": format_widths,
    "flags": lambda: format_csv("flags.csv"),
    "bench": format_bench,
}


def fill(text: str) -> tuple[str, list[str]]:
    "Return `text` with every block made anew, and the names of those that differed."
    stale = []

    def block(m: re.Match) -> str:
        new = BLOCKS[m[2]]() if m[2] in BLOCKS else m[3]
        stale.extend([m[2]] if new != m[3] else [])
        return m[1] + new + m[4]

    return MARKS.sub(block, text), stale


def keep_results(run: str, input: str, measurements: str) -> None:
    "Copy the scores of a run and the files of `make bench` into results/."
    if run:
        from run_results import write_results

        from nbs_lib.report import reopen

        write_results(*reopen(run, input), RESULTS)
    for name in ("bench.csv", "bench.png") if measurements else ():
        shutil.copyfile(Path(measurements) / name, RESULTS / name)


def main() -> int:
    "Name the tables that differ, or write them; return the exit code."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run", default="", help="keep the scores of this finished run")
    p.add_argument("--input", default="", help="the competition folder of that run; not needed for the demo")
    p.add_argument("--bench", default="", help="keep bench.csv and bench.png of this folder")
    p.add_argument("--write", action="store_true", help="put the tables into the pages")
    a = p.parse_args()
    keep_results(a.run, a.input, a.bench)
    differ = []
    for page in map(ROOT.joinpath, PAGES):
        text, stale = fill(page.read_text(encoding="utf-8"))
        differ += stale
        if a.write:
            page.write_text(text, encoding="utf-8")
        state = "written" if a.write else "to write"
        print(f"{page.relative_to(ROOT)}: {', '.join(stale) or 'nothing'} {state}")
    return 1 if differ and not a.write else 0


if __name__ == "__main__":
    sys.exit(main())
