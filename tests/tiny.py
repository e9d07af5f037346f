"""A tiny competition folder and simulated outputs of the models, for tests that need no training."""

import zlib
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from nbs_lib.stages import Run, open_run
from nbs_lib.tables import META, read_competition, write_oof
from nbs_lib.targets import DEAD, GREEN, TARGETS, from_parts, to_parts
from nbs_lib.validation import make_folds

STATES = ("NSW", "Tas", "Vic", "WA")


def photo(path: Path, green: float, dead: float, rng, size=(400, 200)) -> None:
    "Write a noisy photo of `size` (width, height) whose colours follow the grams."
    base = np.array([60.0, 90.0, 110.0])
    base += np.array([-20.0, 60.0, -40.0]) * min(green / 60, 1)
    base += np.array([10.0, 40.0, 60.0]) * min(dead / 40, 1)
    pixels = base + rng.normal(0, 25, (size[1], size[0], 1)) + rng.normal(0, 6, (size[1], size[0], 3))
    cv2.imwrite(str(path), pixels.clip(0, 255).astype(np.uint8))


def competition(folder: Path, n_train: int = 24, n_test: int = 6, seed: int = 0, size=(400, 200)) -> Path:
    "Write train.csv, test.csv, sample_submission.csv, train/ and test/, with four photos a site."
    rng = np.random.default_rng(seed)
    n = n_train + n_test
    site = np.arange(n) // 4
    state = np.array(STATES)[site % 4]
    parts = rng.gamma(2.0, [13, 4, 6], (n, 3)) * rng.gamma(6, 1 / 6, (site.max() + 1, 3))[site]
    parts[state == "WA", 2] = 0
    y = from_parts(*parts.T).round(4)
    (folder / "train").mkdir(parents=True)
    (folder / "test").mkdir()
    train, test = [], []
    for i in range(n):
        split, name = ("train", f"ID{1000 + i}") if i < n_train else ("test", f"ID{9000 - i}")
        path = f"{split}/{name}.jpg"
        photo(folder / path, y[i, GREEN], y[i, DEAD], rng, size)
        samples = [(f"{name}__{target}", path) for target in TARGETS]
        if split == "test":
            test += [[*sample, target] for sample, target in zip(samples, TARGETS, strict=True)]
            continue
        meta = [f"2015/{1 + site[i] % 11}/{3 + site[i] % 20}", state[i], "Ryegrass", 0.6, 7.0]
        train += [[*sample, *meta, *row] for sample, row in zip(samples, zip(TARGETS, y[i]), strict=True)]
    ids, labels = ["sample_id", "image_path"], ["target_name", "target"]
    pd.DataFrame(train, columns=[*ids, *META, *labels]).to_csv(folder / "train.csv", index=False)
    order = rng.permutation(len(test))
    test = pd.DataFrame(test, columns=[*ids, "target_name"]).iloc[order]
    test.to_csv(folder / "test.csv", index=False)
    sample = test[["sample_id"]].assign(target=0.0).iloc[rng.permutation(len(test))]
    sample.to_csv(folder / "sample_submission.csv", index=False)
    return folder


def run_on(folder: Path, output: Path, *overrides: str) -> Run:
    "Open a run of the profile demo."
    return open_run(folder, output, "demo", "", overrides)


def fake_members(
    run: Run,
    noise=(("dinov3", 6.0), ("boosting", 9.0)),
    schemes=("grouped", "stratified"),
    seed: int = 0,
) -> None:
    "Write folds.csv, oof/<model>.parquet and boosting/state.parquet as the stages before ensemble do."
    comp, rng = read_competition(run.input), np.random.default_rng(seed)
    folds = make_folds(comp.train, 4, 0, warn=lambda text: None)
    folds.to_csv(run.artefact_path("folds.csv"), index=False)
    for model, sd in noise:
        for scheme in schemes:
            parts = (to_parts(comp.y) + rng.normal(0, sd, (len(comp.y), 3))).clip(0)
            fold = folds[f"fold_{scheme}"].to_numpy()
            write_oof(run, model, comp.train["image_id"], fold, from_parts(*parts.T), scheme)
    probability = pd.DataFrame({s: np.where(comp.train["state"] == s, 0.9, 0.1 / 3) for s in STATES})
    probability.insert(0, "image_id", comp.train["image_id"])
    probability.to_parquet(run.artefact_path("boosting", "state.parquet"), index=False)


def grass(seed: int, size=(1000, 2000)) -> np.ndarray:
    "Return a textured green picture, (h, w, 3) uint8."
    rng = np.random.default_rng(seed)
    grain = cv2.GaussianBlur(rng.normal(0, 60, size).astype(np.float32), (0, 0), 2)[..., None]
    return (np.array([95, 125, 60]) + grain).clip(0, 255).astype(np.uint8)


def claim_size(content: bytes, width: int, height: int) -> bytes:
    "Return the bytes of a small JPEG or PNG with another size in its header."
    if content[:4] == b"\x89PNG":
        head = content[12:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + content[24:29]
        return content[:12] + head + zlib.crc32(head).to_bytes(4, "big") + content[33:]
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + content[at + 4 :]
