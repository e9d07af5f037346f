"""Score every fusion × head of model 1 on a frozen backbone, against the probe alone."""
import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from nbs_lib.biomass_net import BiomassNet
from nbs_lib.fold_training import FoldData, fit_fold
from nbs_lib.prediction import predict
from nbs_lib.runtime import atomic_write, exit_code_of, seed_everything
from nbs_lib.settings import TrainDinov3Settings
from nbs_lib.stages import Run, open_run
from nbs_lib.targets import weighted_r2_score
from nbs_lib.train_dinov3 import hash_values, load_fold_data

FUSIONS = ("none", "gated_conv", "mamba", "film", "attention")
HEADS = ("pooled", "density")
COLUMNS = ("fusion", "head", "scheme", "seed", "key")


def predict_folds(
    m: FoldData, s: TrainDinov3Settings, numbers: np.ndarray, seed: int, warn: Callable = print
) -> np.ndarray:
    "Return out-of-fold predictions (n, 5) of new networks on the backbone of `m`, which is not changed."
    seed_everything(seed)
    net, y = BiomassNet(dataclasses.replace(m.net.config, fusion=s.fusion, head=s.head)), np.zeros_like(m.y)
    net.backbone = m.net.backbone
    m = dataclasses.replace(m, net=net)
    for k in np.unique(numbers):
        out, index = np.flatnonzero(numbers == k), np.flatnonzero(numbers != k)
        fitted, _ = fit_fold(m, s, index, out, seed, warn=warn)
        y[out] = predict(fitted, m.store, s.views, 32, index=out, features=m.features)
    return y


def run_ablation(run: Run, seeds: Sequence[int] = (0, 1, 2)) -> pd.DataFrame:
    "Score seed × fusion × head × scheme out of fold; add the missing rows to ablation.csv."
    changes = {"unfreeze": 0, "lora": 0, "select": "last", "probe": True, "pseudo_rounds": 0}
    s = dataclasses.replace(run.settings.train_dinov3, **changes)
    run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, train_dinov3=s))
    m, ids, schemes = load_fold_data(run)
    path = run.artefact_path("ablation.csv")
    rows = pd.read_csv(path, keep_default_na=False).to_dict("records") if path.is_file() else []
    models = [("none", "none"), *itertools.product(FUSIONS, HEADS)]
    for seed, (fusion, head), scheme in itertools.product(seeds, models, schemes):
        own, numbers = dataclasses.replace(s, fusion=fusion, head=head), schemes[scheme]
        key = hash_values(own, seed, ids, numbers, m.y, m.photo_keys())
        row = dict(zip(COLUMNS, (fusion, head, scheme, seed, key), strict=True))
        if any(row.items() <= old.items() for old in rows):
            continue
        start = time.monotonic()
        r2w = weighted_r2_score(m.y, predict_folds(m, own, numbers, seed, run.warn))
        rows.append(row | {"r2w": round(r2w, 4), "seconds": round(time.monotonic() - start, 1)})
        print(*rows[-1].values(), flush=True)
        with atomic_write(path) as temporary:
            pd.DataFrame(rows).to_csv(temporary, index=False)
    return pd.DataFrame(rows)


def summarise_ablation(table: pd.DataFrame) -> pd.DataFrame:
    "Return mean and sd over seeds of each fusion × head × scheme, best grouped score first."
    groups = table.groupby(["fusion", "head", "scheme"])
    summary = groups.agg(mean=("r2w", "mean"), sd=("r2w", "std"), seconds=("seconds", "mean"))
    summary = summary.round({"mean": 4, "sd": 4, "seconds": 0}).unstack("scheme")
    return summary.sort_values(("mean", "grouped"), ascending=False)


def main(argv: Sequence[str] | None = None) -> int:
    "Write and print the ablation table; return the exit code."
    parser = argparse.ArgumentParser("python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--preset", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    a = parser.parse_args(argv)

    def work() -> None:
        run = open_run(a.input, a.output, a.profile, a.preset, a.set)
        print(summarise_ablation(run_ablation(run, range(a.seeds))).to_string())

    return exit_code_of(work)


if __name__ == "__main__":
    sys.exit(main())
