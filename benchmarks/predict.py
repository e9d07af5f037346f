"""Measure `nbs_lib.predict` on rendered photos of new sites: camera height, coverage, flags and seconds.

Sites, grams and seeds are drawn anew (nbs_lib.demo); each quadrat is shown at 0.7, 1 and 1.3 times the width
on the ground that the model has learned: cropped from a larger rendering, or a smaller one continued by its
mirror image; predicted as it is, and with `--ground-width`. Flags are counted on these photos, on disturbed
ones and on pictures that are no quadrat.
Run: `python -m benchmarks.predict runs/demo/model.zip FOLDER` after `make demo`; writes
results/predict_study.csv and results/flags.csv. Rendered photos in FOLDER are used again.
"""
import argparse
import tempfile
import time
from pathlib import Path

import cv2
import joblib
import numpy as np
import pandas as pd
from skimage import data

from nbs_lib.bundle import open_model
from nbs_lib.demo import Shot, plan_shots, render_photo
from nbs_lib.photo_files import GROUND_WIDTH, Ground, crop_photo
from nbs_lib.predict import Predictions, predict_photos
from nbs_lib.runtime import atomic_write, progress
from nbs_lib.targets import QUADRAT_M2, TARGETS, TOTAL
from nbs_lib.validation import intervals

RESULTS = Path(__file__).resolve().parent.parent / "results"
WIDTHS = (0.7, 1.0, 1.3)  # on the ground, of the learned one


def render_widths(shot: Shot, folder: Path) -> list[float]:
    "Write one quadrat at each of `WIDTHS`, as `folder`/width/id.png; return its five targets in grams."
    cv2.setNumThreads(1)
    for width in WIDTHS:
        pixels = round(2000 / width)
        photo, truth = render_photo(shot.seed, *shot.grams, shot.site, shot.height_cm, pixels, False)
        photo = crop_photo(photo, photo.shape[1] / 2000)
        (folder / str(width)).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / str(width) / f"{shot.image_id}.png"), photo[..., ::-1])
    return [truth[t] for t in TARGETS]


def render_study(folder: Path, photos: int = 32, seed: int = 777) -> pd.DataFrame:
    "Render photos of new sites into `folder`; return their grams by name."
    shots = plan_shots(photos, 1, seed, 8)[:photos]
    jobs = (joblib.delayed(render_widths)(shot, folder) for shot in progress(shots, label="photos"))
    rows = joblib.Parallel(-1)(jobs)
    table = pd.DataFrame(rows, [shot.image_id for shot in shots], list(TARGETS))
    table.to_csv(folder / "truth.csv")
    return table


def disturb_photo(photo: np.ndarray) -> dict[str, np.ndarray]:
    "Return a photo (1000, 2000, 3) blurred, dark, tilted, small, and cropped to a square."
    corners = np.float32([[0, 0], [2000, 0], [2000, 1000], [0, 1000]])
    seen = np.float32([[0, 0], [2000, 0], [1300, 1000], [700, 1000]])  # the far side is wider
    tilted = cv2.warpPerspective(photo, cv2.getPerspectiveTransform(seen, corners), (2000, 1000))
    dark = (photo * 0.15).astype(np.uint8)
    return {"blurred": cv2.GaussianBlur(photo, (0, 0), 12), "dark": dark, "tilted": tilted,
            "small": cv2.resize(photo, (640, 320)), "square": photo[:, :1000]}


def draw_others() -> dict[str, np.ndarray]:
    "Return pictures that are no quadrat, (1000, 2000, 3)."
    rng, black = np.random.default_rng(0), np.zeros((1000, 2000, 3), np.uint8)
    landscape, face = black + np.uint8((235, 180, 120)), black + np.uint8(200)
    landscape[500:] = (40, 140, 60)
    cv2.circle(landscape, (1500, 180), 90, (80, 220, 250), -1)
    cv2.ellipse(face, (1000, 500), (300, 420), 0, 0, 360, (140, 170, 220), -1)
    for x in (880, 1120):
        cv2.circle(face, (x, 400), 45, (60, 60, 60), -1)
    textures = {name: cv2.resize(np.repeat(getattr(data, name)()[..., None], 3, axis=2), (2000, 1000))
                for name in ("brick", "gravel", "grass")}
    noise = rng.integers(0, 256, (1000, 2000, 3), dtype=np.uint8)
    blobs = cv2.resize(noise[:25, :50], (2000, 1000))
    textures |= {"black frame": black, "white frame": black + 255, "landscape": landscape, "face": face}
    return textures | {"noise in pixels": noise, "noise in blobs": blobs}


def judge_width(learned: Predictions, rescaled: Predictions, truth: pd.DataFrame, width: float) -> dict:
    "Return mean and error of the total in kg/ha, coverage and flags, without and with `--ground-width`."
    y = truth.loc[[path.stem for path in learned.paths]].to_numpy(float)
    true, out = y[:, TOTAL] * 10 / QUADRAT_M2, {"ground width": width, "photos": len(y)}
    out["true kg/ha"] = true.mean().round()
    for name, p in (("as learned", learned), ("--ground-width", rescaled)):
        kg = p.grams[:, TOTAL] * 10 / p.area
        error = np.sqrt(((kg - true) ** 2).mean())
        low, high = intervals(p.grams, p.radii[1])
        grams = y * p.area / QUADRAT_M2
        unlike = [any("unlike" in flag for flag in flags) for flags in p.flags]
        out |= {f"{name}: mean": kg.mean().round(), f"{name}: error": error.round(),
                f"{name}: covered": ((low <= grams) & (grams <= high)).mean().round(3),
                f"{name}: unlike": np.mean(unlike).round(3)}
    return out


def study(model_path: str, folder: Path) -> None:
    "Render, predict, and write both tables."
    is_rendered = (folder / "truth.csv").is_file()
    truth = pd.read_csv(folder / "truth.csv", index_col=0) if is_rendered else render_study(folder)
    rows, learned = [], {}
    with open_model(model_path) as model, tempfile.TemporaryDirectory() as kept:
        start = time.time(), time.process_time()
        for width in WIDTHS:
            photos = sorted((folder / str(width)).glob("*.png"))
            learned[width] = predict_photos(model, photos, Path(kept), maps=0)
            rescaled = predict_photos(model, photos, Path(kept), Ground(GROUND_WIDTH * width), maps=0)
            rows.append(judge_width(learned[width], rescaled, truth, width))
        wall, cpu = time.time() - start[0], time.process_time() - start[1]
        count = len(truth) * (2 * len(WIDTHS) - 1)
        print(f"{count} photos, seconds a photo: {wall / count:.2f}, CPU {cpu / count:.2f}")
        new = learned[1.0]
        photo = cv2.imread(str(new.paths[0]))
        odd = disturb_photo(photo) | draw_others()
        paths = [Path(kept) / f"{name}.png" for name in odd]
        for path, picture in zip(paths, odd.values(), strict=True):
            cv2.imwrite(str(path), picture)
        others = predict_photos(model, paths, Path(kept) / "others", maps=0)
    table = pd.DataFrame(rows)
    counts = pd.Series([flag for flags in new.flags for flag in flags]).value_counts()
    rows = [{"picture": f"{len(truth)} photos of new sites", "distance": f"at most {new.distances.max():.2f}",
             "flags": "; ".join(f"{count} {flag}" for flag, count in counts.items()) or "none"}]
    rows += [{"picture": path.stem, "distance": f"{distance:.2f}", "flags": "; ".join(flags) or "none"}
             for path, distance, flags in zip(paths, others.distances, others.flags, strict=True)]
    for name, result in (("predict_study", table), ("flags", pd.DataFrame(rows))):
        with atomic_write(RESULTS / f"{name}.csv") as temporary:
            result.to_csv(temporary, index=False)
        print(result.to_string(index=False))


if __name__ == "__main__":
    p = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=study.__doc__)
    p.add_argument("model", help="a bundle or a run")
    p.add_argument("folder", type=Path, help="where the photos are rendered, or were")
    args = p.parse_args()
    study(args.model, args.folder)
