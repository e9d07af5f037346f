"""Measure ablation."""
import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from nbs_lib.biomass_net import BiomassNet
from nbs_lib.prediction import predict
from nbs_lib.runtime import InputError, atomic_write, seed_everything
from nbs_lib.settings import TrainDinov3Settings
from nbs_lib.stages import Run, open_run
from nbs_lib.targets import weighted_r2_score
from nbs_lib.train_dinov3 import FoldData, hash_values, fit_fold, load_fold_data

FUSION_NAMES = ("none", "gated_conv", "mamba", "film", "attention")


def out_of_fold(m: FoldData, s: TrainDinov3Settings, numbers: np.ndarray, seed: int, warn: Callable = print) -> np.ndarray:
    "Predictions (n, 5) of fresh networks, each for the fold it has not seen; the backbone is that of `m`, and stays as it is."
    seed_everything(seed)
    net, y = BiomassNet(dataclasses.replace(m.net.config, fusion=s.fusion, head=s.head)), np.zeros_like(m.y)
    net.backbone = m.net.backbone
    for k in np.unique(numbers):
        out, index = np.flatnonzero(numbers == k), np.flatnonzero(numbers != k)
        fitted, _ = fit_fold(dataclasses.replace(m, net=net), s, index, out, seed, warn=warn)
        y[out] = predict(fitted, m.store, s.views, 32, index=out, features=m.features)
    return y


def ablate(run: Run, fusions: Sequence[str] = FUSION_NAMES, heads: Sequence[str] = ("pooled", "density"), seeds: Sequence[int] = (0, 1, 2)) -> pd.DataFrame:
    "Out-of-fold R²w of seed × fusion × head × scheme on a frozen backbone, against the probe alone; rows of ablation.csv, those that are there already taken as they are."
    s = dataclasses.replace(run.settings.train_dinov3, unfreeze=0, lora=0, select="last", probe=True, pseudo_rounds=0)
    m, ids, schemes = load_fold_data(dataclasses.replace(run, settings=dataclasses.replace(run.settings, train_dinov3=s)))
    path, what = run.artefact_path("ablation.csv"), ["fusion", "head", "scheme", "seed", "key"]
    rows = pd.read_csv(path).to_dict("records") if path.is_file() else []
    for seed, (fusion, head), (scheme, numbers) in itertools.product(seeds, [("none", "none"), *itertools.product(fusions, heads)], schemes.items()):
        own = dataclasses.replace(s, fusion=fusion, head=head)
        row = dict(zip(what, (fusion, head, scheme, seed, hash_values(own, seed, ids, numbers, m.y, m.photo_keys())), strict=True))
        if any(all(row[k] == old[k] for k in what) for old in rows):
            continue
        start, y = time.monotonic(), out_of_fold(m, own, numbers, seed, run.warn)
        rows.append(row | {"r2w": round(weighted_r2_score(m.y, y), 4), "seconds": round(time.monotonic() - start, 1)})
        print(*rows[-1].values(), flush=True)
        with atomic_write(path) as temporary:
            pd.DataFrame(rows).to_csv(temporary, index=False)
    return pd.DataFrame(rows)


def sum_up(table: pd.DataFrame) -> pd.DataFrame:
    "Mean and standard deviation over seeds of each fusion × head × scheme, best first on grouped folds."
    long = table.groupby(["fusion", "head", "scheme"]).agg(mean=("r2w", "mean"), sd=("r2w", "std"), seconds=("seconds", "mean"))
    return long.round({"mean": 4, "sd": 4, "seconds": 0}).unstack("scheme").sort_values(("mean", "grouped"), ascending=False)


def main(argv: Sequence[str] | None = None) -> int:
    "Write and print the ablation table of a run's folder."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description="Score fusion × head on a frozen backbone.")
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--preset", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    a = parser.parse_args(argv)
    try:
        print(sum_up(ablate(open_run(a.input, a.output, a.profile, a.preset, a.set), seeds=range(a.seeds))).to_string())
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
