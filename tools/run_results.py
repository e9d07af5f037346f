"""Keep the scores of a run in results/: a CSV, what they were measured on as JSON, and a picture.

The picture shows a photo as taken, as the models see it, and its grams. Only synthetic photos are drawn:
those of the competition belong to Kaggle.
"""

import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from nbs_lib.images import read_photo, to_landscape
from nbs_lib.runtime import InputError, atomic_write, write_json
from nbs_lib.scores import (
    LABELS,
    RunOutputs,
    collect_scores,
    format_number,
    halves_to_photo,
    is_synthetic,
    list_stages,
    open_halves,
    read_outputs,
    tabulate_scores,
)
from nbs_lib.stages import Run
from nbs_lib.targets import TARGETS


def choose_example(outputs: RunOutputs) -> int:
    "Return the row of the photo nearest to the mean grams, among those with the larger date stamps if any."
    rows = np.arange(len(outputs.y))
    if "stamp" in outputs.quality and (outputs.quality["stamp"] > 0).any():
        stamp = outputs.quality["stamp"].to_numpy()
        rows = np.flatnonzero(stamp >= np.median(stamp[stamp > 0]))
    distance = ((outputs.y[rows] - outputs.y.mean(0)) / np.maximum(outputs.y.std(0), 1e-9)) ** 2
    return int(rows[distance.sum(1).argmin()])


def draw_example(
    photo: np.ndarray,  # (H, W, 3)
    pair: np.ndarray,  # (2, h, w, 3) its cleaned halves
    measured: np.ndarray,  # (5,) grams
    predicted: np.ndarray,  # (5,) grams
) -> Figure:
    "Draw a photo as taken, as the models see it, and its grams."
    figure, cleaned = Figure(figsize=(10, 4.4), layout="constrained"), halves_to_photo(pair, 227)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.05))
    shown = {"the photo": np.asarray(Image.fromarray(photo).resize((460, 230), Image.Resampling.BOX)),
             "cleaned and cut into halves, as the models see it": cleaned}
    axes = left.subplots(2, 1, height_ratios=[len(pixels) for pixels in shown.values()])
    for ax, (title, pixels) in zip(axes, shown.items(), strict=True):
        ax.imshow(pixels)
        ax.set_title(title, fontsize=10, loc="left")
        ax.axis("off")
    draw_grams(right.subplots(), measured, predicted)
    return figure


def draw_grams(ax, measured: np.ndarray, predicted: np.ndarray) -> None:
    "Draw five measured and predicted grams as bars."
    places = np.arange(len(TARGETS))
    bars = ((-0.19, measured, "#7a838c", "measured"), (0.19, predicted, "#2f9a64", "predicted out of fold"))
    for shift, values, colour, name in bars:
        drawn = ax.barh(places + shift, values, 0.36, color=colour, label=name)
        ax.bar_label(drawn, [format_number(v) for v in values], padding=3, fontsize=9)
    ax.set_yticks(places, list(LABELS.values()))
    ax.invert_yaxis()
    ax.set_title("grams of dry matter in the quadrat", fontsize=10, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)


def to_small_png(figure: Figure, dpi: int = 96) -> bytes:
    "Return the figure as PNG of 256 colours."
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    image = Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT)
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


def draw_photo(outputs: RunOutputs, i: int) -> bytes:
    "Return labelled photo `i`, its halves and its grams as PNG; raise `InputError` without a store."
    row, halves = outputs.competition.train.iloc[i], open_halves(outputs)
    if row["image_id"] not in halves:
        raise InputError(f"{outputs.run.artefacts / 'photos'}: lacks {row['image_id']}; run stage inpaint")
    photo = to_landscape(read_photo(outputs.run.input / row["image_path"]))
    return to_small_png(draw_example(photo, halves[row["image_id"]], outputs.y[i], outputs.predicted[i]))


def describe_setup(outputs: RunOutputs) -> dict:
    "Return what the scores of a run rest on: photos, settings, machine, cost."
    record, settings = outputs.record, outputs.run.settings
    stages = [s for s in list_stages(record) if "seconds" in s]
    return {"photographs": "synthetic" if is_synthetic(outputs.run) else "real",
            "profile": settings.profile, "preset": settings.preset, "overrides": record.get("overrides", []),
            "seed": settings.run.seed,
            "photos": len(outputs.y), "sites": len(set(outputs.competition.groups)),
            "date": record.get("started", "")[:10], "seconds": {s["name"]: s["seconds"] for s in stages},
            "peak_gb": max((s.get("peak_rss_gb", 0) for s in stages), default=None),
            "machine": {k: v for k, v in record.get("machine", {}).items() if k != "system"},
            "versions": record.get("versions", {})}


def write_results(run: Run, record: dict, folder: str | Path) -> list[Path]:
    """Write the scores of a run, what they rest on and a picture into `folder`; return their paths.

    They are synthetic_<profile>.csv, .json and .png, or, of real photos, real_<profile>.csv and .json.
    Raises `InputError` when no model has predicted out of fold yet.
    """
    outputs = read_outputs(run, record)
    if not outputs.model:
        raise InputError(f"{run.output}: no model has predicted out of fold; run stage boosting")
    about = describe_setup(outputs)
    base = Path(folder) / f"{about['photographs']}_{about['profile']}"
    table, facts, picture = (base.with_suffix(suffix) for suffix in (".csv", ".json", ".png"))
    with atomic_write(table) as temporary:
        tabulate_scores(collect_scores(outputs)).round(6).to_csv(temporary, index=False)
    write_json(facts, about)
    if not is_synthetic(run):
        return [table, facts]
    with atomic_write(picture) as temporary:
        temporary.write_bytes(draw_photo(outputs, choose_example(outputs)))
    return [table, facts, picture]
