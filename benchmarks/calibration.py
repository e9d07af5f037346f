"""Measure what own cuts are worth: new sites' predictions without and with a calibration by 3, 10, 30 cuts.

Sites, species and light are rendered (nbs_lib.demo); the model is the ridge probe on features of the wheel's
EfficientNet-Lite0, fitted on other sites. Compared: no calibration, least squares on √g, and
`nbs_lib.calibration` with its default prior and with the prior estimated from the probe's out-of-fold errors.
`covered` is the share of photos whose grams are inside their 90 % interval, before and after.
Run: `python -m benchmarks.calibration` (3 minutes on 2 free cores); writes results/calibration_study.csv.
"""
import argparse
from pathlib import Path

import cv2
import joblib
import numpy as np
import pandas as pd

from nbs_lib.backbones import FeatureExtractor, load_backbone, pixel_stats
from nbs_lib.biomass_net import fit_probe, roots_to_parts
from nbs_lib.calibration import SitePrior, default_prior, estimate_prior, fit_calibration, fit_lines
from nbs_lib.demo import plan_shots, render_photo
from nbs_lib.images import crop_bottom, resize_half, split_halves
from nbs_lib.runtime import atomic_write, progress
from nbs_lib.store import half_shape
from nbs_lib.sward import Site
from nbs_lib.targets import SUMS, TARGET_WEIGHTS, TARGETS, reconcile
from nbs_lib.validation import conformal_radius

RESULT = Path(__file__).resolve().parent.parent / "results" / "calibration_study.csv"
SHAPE = half_shape(400)
BACKBONE, WEIGHTS_FILE = "tf_efficientnet_lite0", "wheel:efficientnet_lite0"
CUTS = (3, 10, 30)
NEW_SITES = {  # fixed before the first run; `heavy` is dry mass per leaf area, 1 on average in training
    "shade, thin leaves": Site("Tas", species="Ryegrass_Clover", exposure=0.7,
                               cast=(0.95, 1.0, 1.06), heavy=0.75),
    "sun, thick leaves": Site("Vic", species="Phalaris", clover_g=0.0, blade_mm=6.8, exposure=1.3,
                              cast=(1.1, 1.0, 0.88), heavy=1.3),
    "lucerne": Site("Vic", species="Lucerne", clover_g=0.0, height_cm=14.0, green=(92, 136, 66)),
    "as in training": Site("NSW"),
}


def render_halves(seed: int, grams: tuple[float, float, float], site: Site, height_cm: float) -> tuple:
    "Return halves (2, H, W, 3) uint8 of one photo, and its five targets in grams."
    cv2.setNumThreads(1)
    photo, truth = render_photo(seed, *grams, site, height_cm, width=800)
    halves = split_halves(crop_bottom(photo, 0.1))
    return np.stack([resize_half(half, SHAPE) for half in halves]), [truth[t] for t in TARGETS]


def render_site(site: Site, photos: int, seed: int) -> list[tuple]:
    "Return arguments of `render_halves` for photos of one site, their grams spread as the demo spreads them."
    rng, shape = np.random.default_rng(seed), np.array([4.0, 3.5, 2.5])
    grams = np.array([site.green_g, site.dead_g, site.clover_g]) * rng.gamma(shape, 1 / shape, (photos, 3))
    return [(int(rng.integers(2**31)), tuple(g.tolist()), site, site.height_cm) for g in grams.clip(0, 150)]


def describe_photos(halves: list[np.ndarray]) -> np.ndarray:
    "Return pooled features (n, d) of halves, as the probe reads them."
    backbone = load_backbone(BACKBONE, WEIGHTS_FILE, 2)
    extractor, rows = FeatureExtractor(backbone, *pixel_stats(BACKBONE, WEIGHTS_FILE)), range(len(halves))
    parts = [extractor.extract(halves, [i], SHAPE).pooled for i in progress(rows, label="features")]
    return np.concatenate([part.numpy() for part in parts])


def predict_sites(
    train: int = 90, photos: int = 44, seed: int = 0,
) -> tuple[dict, SitePrior, np.ndarray]:
    "Return {site: (truth, predictions), each (photos, 5)}, prior and 90 % radius from out-of-fold errors."
    shots = plan_shots(train, 1, seed)[:train]
    jobs = [(s.seed, s.grams, s.site, s.height_cm) for s in shots]
    for k, site in enumerate(NEW_SITES.values()):
        jobs += render_site(site, photos, seed + k)
    done = joblib.Parallel(-1)(joblib.delayed(render_halves)(*job) for job in progress(jobs, label="photos"))
    y, x = np.array([truth for _, truth in done]), describe_photos([halves for halves, _ in done])
    groups = np.array([f"{s.site.state} {s.site.day}" for s in shots])
    solved, held_out, _ = fit_probe(x[:train], y[:train], groups, seed)
    root = (x[train:] - solved["mean"]) * solved["inv_sd"] @ solved["weight"] + solved["bias"]
    predicted = roots_to_parts(root, solved["cap"]) @ SUMS.T
    parts = zip(np.split(y[train:], len(NEW_SITES)), np.split(predicted, len(NEW_SITES)), strict=True)
    errors = y[:train], held_out @ SUMS.T, groups
    return dict(zip(NEW_SITES, parts, strict=True)), estimate_prior(*errors), conformal_radius(*errors, 0.9)


def weighted_error(y: np.ndarray, predicted: np.ndarray) -> float:
    "Return the root mean squared error in grams, targets weighted as in the competition."
    return float(np.sqrt(((y - predicted) ** 2 @ TARGET_WEIGHTS).mean()))


def coverage(y: np.ndarray, predicted: np.ndarray, radius: np.ndarray) -> float:
    "Return the share of grams (n, 5) within `radius` (5,) on √g of their predictions."
    return float((np.abs(np.sqrt(y) - np.sqrt(predicted)) <= radius).mean())


def judge_cuts(y: np.ndarray, predicted: np.ndarray, k: int, priors: dict, radius, rng) -> list[dict]:
    "Return a row a method: error and coverage on the photos of one site that are not among k random cuts."
    order = rng.permutation(len(y))
    cuts, rest = order[:k], order[k:]
    flat = SitePrior(np.full(5, np.inf), np.full(5, np.inf), np.ones(5))
    lines = reconcile(fit_lines(y[cuts], predicted[cuts], flat).predict(predicted[rest]))
    without = weighted_error(y[rest], predicted[rest])
    rows = [{"method": "least squares", "error": weighted_error(y[rest], lines), "refused": 0.0,
             "covered": coverage(y[rest], lines, radius)}]
    for name, prior in priors.items():
        fitted = fit_calibration(y[cuts], predicted[cuts], prior)
        after = fitted.apply(predicted[rest])
        rows.append({"method": name, "error": weighted_error(y[rest], after),
                     "refused": float(not fitted.used.any()),
                     "covered": coverage(y[rest], after, fitted.radius(radius, 0.9))})
    before = {"without": without, "covered_without": coverage(y[rest], predicted[rest], radius)}
    return [{"cuts": k, **before, **row} for row in rows]


def study(repeats: int = 50, seed: int = 0) -> pd.DataFrame:
    "Return and write mean and 90 % quantile of the error of site × cuts × method over random cuts."
    sites, estimated, radius = predict_sites(seed=seed)
    priors = {"default prior": default_prior(), "out-of-fold prior": estimated}
    rng, rows = np.random.default_rng(seed), []
    for site, (y, predicted) in sites.items():
        for k in CUTS:
            for _ in range(repeats):
                rows += [{"site": site, **row} for row in judge_cuts(y, predicted, k, priors, radius, rng)]
    groups = pd.DataFrame(rows).groupby(["site", "cuts", "method"], sort=False)
    table = groups.agg(without=("without", "mean"), error=("error", "mean"),
                       error_90=("error", lambda e: e.quantile(0.9)),
                       refused=("refused", "mean"), covered_without=("covered_without", "mean"),
                       covered=("covered", "mean"), repeats=("error", "size")).round(2).reset_index()
    with atomic_write(RESULT) as temporary:
        table.to_csv(temporary, index=False)
    return table


if __name__ == "__main__":
    p = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=study.__doc__)
    p.add_argument("--repeats", type=int, default=50, help="random draws of the cuts of a site")
    print(study(p.parse_args().repeats).to_string(index=False))
