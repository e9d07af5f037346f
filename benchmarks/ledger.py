"""Judge the rule of `nbs_lib.ledger` on simulated competitions, and measure its speed."""
import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from nbs_lib.ledger import Candidates, choose_finals, list_entries, read_candidates, read_ledger
from nbs_lib.runtime import atomic_write
from nbs_lib.settings import library_file
from nbs_lib.targets import TARGETS, weighted_r2_score


@dataclass(frozen=True)
class Season:
    "A simulated competition."
    submissions: int = 24
    tuned_to_folds: int = 3
    tuned_to_public: int = 3
    changes: int = 60  # small changes tried by each submission that is tuned to the public test
    copies: int = 8  # submissions that are an earlier one with a small change
    train: int = 357  # photos
    public: int = 427
    private: int = 378
    site: int = 12  # photos
    mixed: bool = False  # whether public and private test share their sites
    spread: float = 0.025  # sd of the error's size between submissions and between families


def draw_errors(site: np.ndarray, count: int, difficulty: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    "Return errors (count, n) of unit size; three tenths of the variance are common to a site."
    common = rng.standard_normal((count, site[-1] + 1), np.float32)[:, site]
    own = rng.standard_normal((count, len(site)), np.float32)
    return difficulty * (0.3**0.5 * common + 0.7**0.5 * own)


def simulate_season(season: Season, rng: np.random.Generator) -> tuple[Candidates, np.ndarray, np.ndarray]:
    """Return the candidates, their private R² (m,) and their order in time (m,).

    One number a photo stands for all five targets.
    """
    s, m = season, season.submissions
    n = s.train + s.public + s.private
    site = np.arange(n) // s.site
    difficulty = np.exp(0.4 * rng.standard_normal(site[-1] + 1, np.float32))[site]
    y = 45 + 20 * rng.standard_normal(site[-1] + 1)[site] + 19 * rng.standard_normal(n)
    family = rng.integers(0, 4, m)
    improvement = np.linspace(0, 1.5, m)  # later submissions are better
    size = 1 + s.spread * (rng.standard_normal(4)[family] + rng.standard_normal(m) - improvement)
    shared, of_family, own = (draw_errors(site, count, difficulty, rng) for count in (1, 4, m))
    mixture = 0.93**0.5 * shared + 0.04**0.5 * of_family[family] + 0.03**0.5 * own
    error = 15 * size.astype(np.float32)[:, None] * mixture
    test = np.arange(s.train, n)
    public, private = np.split(rng.permutation(test) if s.mixed else test, [s.public])
    who = rng.permutation(m)
    folds, climbers = np.split(who[: s.tuned_to_folds + s.tuned_to_public], [s.tuned_to_folds])
    originals, copies = np.split(who, [m - s.copies])
    error[np.ix_(folds, np.arange(s.train))] *= 1 - rng.uniform(0.01, 0.05, (len(folds), 1))
    for i in climbers:
        change = 0.4 * draw_errors(site, s.changes, difficulty, rng)
        change[:, : s.train] = 0  # never tried out of fold
        helps = ((error[i] + change)[:, public] ** 2).sum(axis=1) < (error[i, public] ** 2).sum()
        error[i] += change[helps].sum(axis=0)
    small = 1.2 * draw_errors(site, s.copies, difficulty, rng)
    error[copies] = error[rng.choice(originals, s.copies)] + small
    late = np.isin(np.arange(m), np.append(climbers, copies))
    order = np.argsort(np.argsort(rng.random(m) + late))
    c = make_candidates(y, y + error, site, s.train, public)
    return c, score_all(y, y + error, private), order


def score_all(y: np.ndarray, predicted: np.ndarray, photos: np.ndarray) -> np.ndarray:
    "Return R² (m,) of predictions (m, n) on some photos."
    error = ((predicted - y)[:, photos] ** 2).sum(axis=1)
    return 1 - error / ((y[photos] - y[photos].mean()) ** 2).sum()


def make_candidates(
    y: np.ndarray,  # (n,) grams
    predicted: np.ndarray,  # (m, n)
    site: np.ndarray,  # (n,)
    train: int,  # the first photos
    public: np.ndarray,  # rows of the public test
) -> Candidates:
    "Return candidates as a ledger would hold them."
    five = np.repeat(predicted[:, :train, None], len(TARGETS), axis=2)
    truth = np.repeat(y[:train, None], len(TARGETS), axis=1)
    names = [f"submission {k + 1}" for k in range(len(predicted))]
    oof = score_all(y, predicted, np.arange(train))
    return Candidates(names, names, oof, score_all(y, predicted, public), five, truth, site[:train])


def take_best(score: np.ndarray) -> list[int]:
    "Return the rows of the two best scores."
    return np.argsort(-score, kind="stable")[:2].tolist()


def apply_rules(c: Candidates, order: np.ndarray, public_photos: int) -> dict[str, list[int]]:
    "Return the rows of the two submissions that each rule selects."
    chosen = choose_finals(c, public_photos, copies=0.995)["id"][:2]
    public, oof = take_best(c.public), take_best(c.oof)
    each = [oof[0], public[0] if public[0] != oof[0] else public[1]]
    return {"ledger": [c.ids.index(i) for i in chosen], "best public": public, "best OOF": oof,
            "best OOF and best public": each, "best mean of both": take_best(c.oof + c.public),
            "two earliest": np.argsort(order)[:2].tolist()}


def study(seasons: int = 1000, seed: int = 0, season: Season = Season()) -> pd.DataFrame:
    "Return a row a simulated competition: the loss in private R² of each rule against the best submission."
    rng, rows = np.random.default_rng(seed), []
    for _ in range(seasons):
        c, private, order = simulate_season(season, rng)
        rules = apply_rules(c, order, season.public)
        rows.append({rule: private.max() - private[pair].max() for rule, pair in rules.items()})
    return pd.DataFrame(rows)


def summarise(losses: pd.DataFrame) -> pd.DataFrame:
    "Return for each rule its mean loss, and how much more it loses than the ledger, with standard errors."
    more = losses.sub(losses["ledger"], axis=0)
    root = np.sqrt(len(losses))
    return pd.DataFrame({"loss": losses.mean(), "loss_error": losses.std() / root, "more": more.mean(),
                         "more_error": more.std() / root}).rename_axis("rule")


CASES = {
    "default": {},
    "40 public photos": {"public": 40},
    "107 public photos": {"public": 107},
    "1600 public photos": {"public": 1600},
    "6400 public photos": {"public": 6400},
    "same sites in public and private": {"mixed": True},
    "nothing tuned": {"tuned_to_folds": 0, "tuned_to_public": 0},
    "no copies": {"copies": 0},
}


def study_all(seasons: int, seed: int = 0) -> pd.DataFrame:
    "Return the summary of every case, columns case, seasons, rule, loss, loss_error, more, more_error."
    tables = []
    for case, changes in CASES.items():
        season = replace(Season(), **changes)
        count = seasons if case == "default" else seasons // 6
        table = summarise(study(count, seed, season)).reset_index()
        table.insert(0, "public_photos", season.public)
        table.insert(0, "seasons", count)
        table.insert(0, "case", case)
        tables.append(table.round(5))
        print(tables[-1].to_string(index=False), flush=True)
    return pd.concat(tables, ignore_index=True)


def fill_ledger(path: str | Path, entries: int, photos: int = 357, seed: int = 0) -> None:
    "Write a ledger of simulated runs with public scores."
    rng = np.random.default_rng(seed)
    site = np.arange(photos) * 30 // photos
    y = 45 + 20 * rng.standard_normal((30, 1))[site] + 10 * rng.standard_normal((photos, len(TARGETS)))
    common = {"source": "run", "labels": y.round(2).ravel().tolist(), "sites": site.tolist()}
    with open(path, "w", encoding="utf-8") as f:
        for k in range(entries):
            noise = (rng.standard_normal((30, 1))[site] + rng.standard_normal(y.shape)) / np.sqrt(2)
            predicted = (y + rng.uniform(10, 14) * noise).round(2)
            r2 = weighted_r2_score(y, predicted)
            public = round(r2 + 0.03 * rng.standard_normal(), 3)
            facts = {"id": f"run{k}", "message": f"run {k}", "reference": str(10**6 + k), "public": public,
                     "oof": {"grouped": {"r2": r2, "se": 0.02}}, "predictions": predicted.ravel().tolist()}
            f.write(json.dumps(facts | common) + "\n")


def bench_ledger(entries: int = 1000) -> list[dict]:
    "Return rows name, entries, seconds, note: reading, listing and choosing."
    with tempfile.TemporaryDirectory() as folder:
        path, rows = Path(folder, "ledger.jsonl"), []
        fill_ledger(path, entries)
        steps = {"read": lambda: read_ledger(path),
                 "read and list": lambda: list_entries(read_ledger(path)).to_string(),
                 "read and pick": lambda: choose_finals(read_candidates(read_ledger(path)), 427, 0.995)}
        for name, work in steps.items():
            start = time.perf_counter()
            work()
            seconds = round(time.perf_counter() - start, 3)
            rows.append({"name": f"ledger: {name}", "entries": entries, "seconds": seconds,
                         "note": f"{path.stat().st_size / 2**20:.0f} MB"})
        return rows


def main() -> None:
    "Run the study and write results/ledger_study.csv."
    p = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description=main.__doc__)
    p.add_argument("--seasons", type=int, default=3000, help="of the default case; the others get a sixth")
    p.add_argument("--output", type=Path, default=library_file("results", "ledger_study.csv"))
    args = p.parse_args()
    table = study_all(args.seasons)
    with atomic_write(args.output) as temporary:
        table.to_csv(temporary, index=False)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
