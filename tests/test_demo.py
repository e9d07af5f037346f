"""The synthetic paddock: form, truth, determinism, faults."""
import errno
import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbs_lib import demo
from nbs_lib.demo import (
    STAMP_FONTS,
    add_stamp,
    plan_shots,
    render_photo,
    write_demo,
)
from nbs_lib.eda import photo_facts
from nbs_lib.runtime import InputError
from nbs_lib.stamps import FIT_FONTS
from nbs_lib.sward import Site, polygon_area, sow_grass
from nbs_lib.tables import read_competition
from nbs_lib.targets import TARGETS, imbalance

ROOT = Path(__file__).resolve().parent.parent


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_form_is_kaggles(small_paddock):
    names = ["sample_submission.csv", "test", "test.csv", "train", "train.csv"]
    assert sorted(p.name for p in small_paddock.iterdir()) == names
    tables = "train", "test", "sample_submission"
    train, test, sample = (pd.read_csv(small_paddock / f"{name}.csv") for name in tables)
    assert list(train) == ["sample_id", "image_path", "Sampling_Date", "State", "Species", "Pre_GSHH_NDVI",
                           "Height_Ave_cm", "target_name", "target"]
    assert list(test) == ["sample_id", "image_path", "target_name"]
    assert list(sample) == ["sample_id", "target"]
    assert len(train) == 42 * 5 and (test["sample_id"] == sample["sample_id"]).all() and len(test) == 8 * 5
    assert train["Sampling_Date"].str.fullmatch(r"2015/[1-9]\d?/[1-9]\d?").all()
    assert train["image_path"].str.fullmatch(r"train/ID\d{7,10}\.jpg").all()
    assert (train["sample_id"] == train["image_path"].str[6:-4] + "__" + train["target_name"]).all()


def test_reads_back_with_its_facts(small_paddock):
    comp = read_competition(small_paddock)
    off = np.abs(imbalance(comp.y)).max(1)
    assert (off > 1e-3).sum() == 1 and off.max() == pytest.approx(0.31, abs=1e-3)
    wa, nsw = comp.train["state"] == "WA", comp.train["state"] == "NSW"
    assert wa.any() and (comp.y[wa, 1] == 0).all() and (comp.y[:, 3] > 0).all()
    assert (comp.y[nsw, 2] > 0).mean() < 0.2
    assert comp.train["ndvi"].between(0.16, 0.91).all() and comp.train["height_cm"].between(1, 70).all()


def test_truth_is_beside_and_complete(small_paddock):
    truth = pd.read_csv(small_paddock.with_name("paddock-truth.csv"))
    test = pd.read_csv(small_paddock / "test.csv")
    assert list(truth) == ["sample_id", "target"] and len(truth) == 40
    assert set(truth["sample_id"]) == set(test["sample_id"])
    assert truth["target"].std() > 1


def test_workers_do_not_matter_and_seeds_do(tmp_path):
    one, two = (write_demo(tmp_path / f"w{w}", 3, 1, seed=1, width=240, workers=w) for w in (1, 2))
    other = write_demo(tmp_path / "other", 2, 1, seed=2, width=240, workers=1)
    assert contents(one) == contents(two)
    assert not {p.name for p in one.glob("*/ID*")} & {p.name for p in other.glob("*/ID*")}
    assert (tmp_path / "w1-truth.csv").read_bytes() == (tmp_path / "w2-truth.csv").read_bytes()


def test_complete_demo_is_kept_and_another_replaced(tmp_path, monkeypatch):
    def written(n_train: int) -> int:
        folder = write_demo(tmp_path / "d", n_train, 1, width=240, workers=1)
        assert len(list((folder / "train").iterdir())) == n_train
        return (folder / "train.csv").stat().st_mtime_ns

    first = written(2)
    assert written(2) == first
    other = written(3)
    monkeypatch.setattr(demo, "RENDERER", demo.RENDERER + 1)  # the same seed gives other photos
    assert written(3) > other


def test_foreign_folder_is_refused_untouched(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.txt").write_text("mine")
    with pytest.raises(InputError, match="is no demo"):
        write_demo(tmp_path / "thesis", 6, 2, width=240)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is no demo"):
        write_demo(tmp_path / "file", 6, 2, width=240)
    assert contents(tmp_path) == {"thesis/a.txt": b"mine", "file": b"mine"}


COUNTS = [{"n_train": 1}, {"n_test": 0}, {"n_train": 6.5}, {"sites": 1}, {"width": 10}]


@pytest.mark.parametrize("wrong", COUNTS)
def test_bad_counts(tmp_path, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        write_demo(tmp_path / "d", **{"n_train": 6, "n_test": 2, "width": 240, "workers": 1, **wrong})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, code):
    def full(self, data):
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="full|read-only"):
        write_demo(tmp_path / "d", 6, 2, width=240, workers=1)
    assert not list(tmp_path.iterdir())


def test_killed_in_the_middle_then_run_again(tmp_path):
    folder = str(tmp_path / "d")
    call = f"from nbs_lib.demo import write_demo; write_demo({folder!r}, 30, 2, width=600, workers=1)"
    process = subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".d.tmp-*/train/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(".d.tmp-*")) and not (tmp_path / "d").exists()
    folder = write_demo(tmp_path / "d", 3, 1, width=240, workers=1)
    assert len(read_competition(folder).train) == 3


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 60), st.floats(0, 40), st.floats(0, 40), st.floats(1, 40))
def test_truth_is_what_was_asked_to_the_last_leaf(seed, green, dead, clover, height):
    photo, truth = render_photo(seed, green, dead, clover, height_cm=height, width=240, stamped=seed % 2 == 0)
    assert photo.shape == (120, 240, 3) and photo.dtype == np.uint8
    for target, asked in zip(TARGETS[:3], (green, dead, clover)):
        assert truth[target] == 0 if asked == 0 else asked <= truth[target] < asked + 1.5
    assert abs(imbalance(np.array([[truth[t] for t in TARGETS]]))).max() < 1e-9


WRONG = [{"green_g": -1}, {"dead_g": np.nan}, {"clover_g": 1e4}, {"width": 50}, {"height_cm": 0}]


@pytest.mark.parametrize("wrong", WRONG)
def test_render_refuses(wrong):
    with pytest.raises(InputError):
        render_photo(0, **wrong)


def test_grams_are_leaf_area():
    rng = np.random.default_rng(0)
    plants = sow_grass(rng, 400, Site(heavy=1.0), 8.0, (2000, 1000))
    inside = plants.grams > 0
    assert 0.6 < inside.mean() < 1
    assert np.allclose(plants.leaf_px, polygon_area(plants.outline))
    heavier = sow_grass(np.random.default_rng(0), 400, Site(heavy=1.2), 8.0, (2000, 1000))
    assert np.allclose(heavier.grams, 1.2 * plants.grams)


def test_biomass_can_be_seen():
    facts = [[photo_facts(render_photo(s, g, d, 0, width=400, disturbed=False)[0]) for s in range(3)]
             for g, d in ((3, 0), (25, 0), (25, 40))]
    cover = [np.mean([f["green_cover"] for f in row]) for row in facts]
    straw = [np.mean([f["straw_cover"] for f in row]) for row in facts]
    assert cover[0] + 0.1 < cover[1] and straw[1] + 0.02 < straw[2]


def test_distribution_is_near_the_real_table():
    shots = [s for s in plan_shots(357, 40, seed=0) if s.split == "train"]
    grams = np.array([s.grams for s in shots])
    assert np.abs(grams.mean(0) / [26.62, 12.04, 6.65] - 1).max() < 0.35
    assert np.abs(grams.std(0) / [25.40, 12.40, 12.12] - 1).max() < 0.4
    zeros = (grams == 0).mean(0)
    assert 0.01 < zeros[0] < 0.1 and 0.05 < zeros[1] < 0.2 and 0.25 < zeros[2] < 0.55
    assert len({s.image_id for s in shots}) == 357 and len({(s.site.state, s.site.day) for s in shots}) == 30
    assert 0.04 < np.mean([s.stamped for s in shots]) < 0.25


def test_most_of_the_test_comes_from_unseen_sites():
    shots = plan_shots(80, 20, seed=0)
    seen = {(s.site.state, s.site.day) for s in shots if s.split == "train"}
    new = [(s.site.state, s.site.day) not in seen for s in shots if s.split == "test"]
    assert len(seen) == 14 and len(new) == 20 and 0.5 < np.mean(new) < 1


def test_demo_stamps_are_in_typefaces_that_the_detector_was_not_fitted_on():
    assert len(STAMP_FONTS) == 3 and not set(STAMP_FONTS) & set(FIT_FONTS)


def test_a_stamp_stays_in_its_mask():
    photo = np.full((500, 1000, 3), 90, np.uint8)
    for seed in range(12):
        stamped, mask = add_stamp(np.random.default_rng(seed), photo, date(2015, 9, 4))
        changed = np.abs(stamped.astype(int) - photo).max(2)
        assert mask.any() and changed[~mask].max() <= 30 and changed[mask].min() > 5
        assert 3 < np.ptp(np.flatnonzero((changed > 100).any(1))) < 50
