"""Own cuts: the table's faults in one line each, the algebra of the shrunken line, balance, and refusals."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nbs_lib.calibration import (
    RootLines,
    SitePrior,
    adjust,
    default_prior,
    estimate_prior,
    fit_calibration,
    fit_lines,
    parse_calibration,
    read_cuts,
)
from nbs_lib.runtime import InputError
from nbs_lib.targets import CLOVER, DEAD, GREEN, TARGETS, TOTAL, from_parts, imbalance

FILES = ["a/IMG_1.jpg", "a/IMG_2.jpg", "b/IMG_3.jpg", "b/IMG_1.jpg", "IMG_4.png"]
GOOD = "file,Dry_Total_g,Dry_Dead_g\na/IMG_1.jpg,40,\nIMG_2.jpg,55.5,8\nb\\IMG_3.jpg,61,0\n"
PRIOR = default_prior()
INFINITE = SitePrior(np.full(5, np.inf), np.full(5, np.inf), np.ones(5))
grams = st.floats(0, 200, allow_nan=False)


def cuts(least: int, most: int):
    "Weighed and predicted grams of k photos, k between `least` and `most`, some of them not weighed."
    weighed = st.one_of(grams, st.just(np.nan))
    return st.integers(least, most).flatmap(lambda k: st.tuples(arrays(float, (k, 5), elements=weighed),
                                                                arrays(float, (k, 5), elements=grams)))


def site(k: int, bias: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    "Truth and predictions (k, 5) that miss it by `bias` on √g and by noise."
    r = np.random.default_rng(seed)
    y = from_parts(r.gamma(2, 15, k), r.gamma(1, 8, k), r.gamma(2, 6, k))
    return y, np.maximum(np.sqrt(y) + bias + r.normal(0, 0.4, (k, 1)), 0) ** 2


# ---- the table of cuts

@pytest.fixture
def table(tmp_path):
    "Return a function that writes text as cuts.csv and returns its path."
    def write(text: str):
        (tmp_path / "cuts.csv").write_text(text, encoding="utf-8")
        return tmp_path / "cuts.csv"
    return write


def test_cuts_are_read(table):
    found = read_cuts(table("\ufeff" + GOOD), FILES)
    assert list(found) == ["file", *TARGETS] and found["file"].tolist() == FILES[:3]
    assert found["Dry_Total_g"].tolist() == [40, 55.5, 61] and found["GDM_g"].isna().all()
    assert np.array_equal(found["Dry_Dead_g"], [np.nan, 8, 0], equal_nan=True)


def test_empty_rows_and_folders_above_the_photos_do_no_harm(table):
    text = GOOD.replace("a/IMG_1.jpg", "/farm/a/IMG_1.jpg") + ",,\n,\n"
    pd.testing.assert_frame_equal(read_cuts(table(text), FILES), read_cuts(table(GOOD), FILES))


@pytest.mark.parametrize(("old", "new", "words"), [
    ("IMG_2", "IMG_9", "file 'IMG_9.jpg' fits 0 photos"),
    ("a/IMG_1", "IMG_1", "file 'IMG_1.jpg' fits 2 photos"),
    ("IMG_2.jpg", "a/IMG_1.jpg", "a/IMG_1.jpg is named twice"),
    ("55.5", "-55.5", "Dry_Total_g of IMG_2.jpg is '-55.5'"),
    ("55.5", "heavy", "is 'heavy'"),
    ("55.5", "nan", "is 'nan'"),
    ("55.5", "inf", "is 'inf'"),
    ("40,", ",", "a/IMG_1.jpg has no number"),
    ("b\\IMG_3.jpg,61,0\n", "", "too few weighed quadrats (2)"),
    ("Dry_Total_g", "Dry_Total_kg", "column 'Dry_Total_kg' is in kg"),
    ("Dry_Total_g", "total [kg/quadrat]", "is in kg"),
    ("55.5", "2600", "the largest number is 2600, which looks like kg a hectare"),
    ("file,", "photo,", "give 'file' and any of"),
    ("Dry_Total_g,Dry_Dead_g", "total,dead", "give 'file' and any of"),
    ("40,\nIMG_2.jpg,55.5,8\nb\\IMG_3.jpg,61,0", ".04,\nIMG_2.jpg,.05,0\nb\\IMG_3.jpg,.06,0", "like kg"),
    (GOOD, "", "columns none; give 'file' and any of"),
    ("IMG_2", "c/IMG_2", "file 'c/IMG_2.jpg' fits 0 photos"),
    ("55.5,8", "55,5,8", "'IMG_2.jpg,55,5,8' has more cells than the header; write decimals with a point"),
    (GOOD, GOOD.replace(",", ";"), "separated by semicolons"),
    ("Dry_Dead_g", "Dry_dead_g", "column 'Dry_dead_g' is no target; choose from Dry_Green_g"),
    ("Dry_Dead_g", "Dry_Total_g ", "column 'Dry_Total_g' is there twice"),
    ("55.5,8", "55.5,80", "Dry_Dead_g of a/IMG_2.jpg is more than its Dry_Total_g"),
    (GOOD, "file,Dry_Total_g\n", "too few weighed quadrats (0)"),
])
def test_fault_is_one_line(table, old, new, words):
    assert old in GOOD
    with pytest.raises(InputError) as e:
        read_cuts(table(GOOD.replace(old, new)), FILES)
    assert words in str(e.value) and "cuts.csv" in str(e.value) and "\n" not in str(e.value)


def test_unreadable_table(tmp_path):
    (tmp_path / "bytes.csv").write_bytes(b"file,Dry_Total_g\n\xff\xfe\x00,1\n")
    for path in (tmp_path / "none.csv", tmp_path, tmp_path / "bytes.csv"):
        with pytest.raises(InputError, match="not readable as CSV"):
            read_cuts(path, FILES)


# ---- the line

@given(cuts(0, 12), arrays(float, (4, 5), elements=grams))
@settings(max_examples=30, deadline=None)
def test_never_nan_and_always_possible(pair, y):
    fitted = fit_calibration(*pair)
    new = fitted.apply(y)
    assert np.isfinite(new).all() and (new >= 0).all()
    assert not fitted.used.any() or np.abs(imbalance(new)).max() < 1e-6
    assert not fitted.used.any() or (fitted.cuts[fitted.used] >= 3).all()


@given(cuts(3, 12), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_infinite_prior_is_least_squares(pair, copies):
    y_true, y_pred = pair
    y_true = np.nan_to_num(y_true, nan=1.0)
    lines = fit_lines(np.tile(y_true, (copies, 1)), np.tile(y_pred, (copies, 1)), INFINITE)
    for t in range(5):
        x, z = np.sqrt(y_pred[:, t]), np.sqrt(y_true[:, t])
        if x.std() > 1e-3:
            line = np.polyfit(x - x.mean(), z, 1)
            ours = 1 + lines.slope[t], x.mean() + lines.intercept[t]
            assert np.allclose(ours, line, rtol=1e-4, atol=1e-6)


@given(cuts(3, 8))
@settings(max_examples=20, deadline=None)
def test_many_cuts_recover_least_squares(pair):
    squares, last = fit_lines(*pair, INFINITE), 0
    for copies in (1, 30, 1000):  # the same cuts again and again: the prior counts less and less
        lines = fit_lines(*(np.tile(y, (copies, 1)) for y in pair), PRIOR)
        known = np.isfinite(pair[0]).sum(0)
        share = known * copies / (known * copies + (PRIOR.error / PRIOR.intercept) ** 2)
        assert np.allclose(lines.intercept, share * squares.intercept)
        assert (np.abs(lines.slope) <= np.abs(squares.slope) + 1e-7).all()
        assert (np.abs(lines.slope) >= last - 1e-7).all()
        last = np.abs(lines.slope)


@given(cuts(0, 10), st.floats(0.1, 10), arrays(float, (3, 5), elements=grams))
@settings(max_examples=25, deadline=None)
def test_scaling(pair, s, y):
    """The unit does not matter: grams times s, and the prior's √g times √s, give predictions times s."""
    scaled = SitePrior(PRIOR.intercept * np.sqrt(s), PRIOR.slope, PRIOR.error * np.sqrt(s))
    one, other = fit_lines(*pair, PRIOR).predict(y), fit_lines(*(s * p for p in pair), scaled).predict(s * y)
    assert np.allclose(s * one, other, rtol=1e-6, atol=1e-6)


@given(arrays(float, (6, 5), elements=grams))
@settings(max_examples=20, deadline=None)
def test_no_cuts_change_nothing(y):
    for k in (0, 4):
        fitted = fit_calibration(np.full((k, 5), np.nan), y[:k])
        assert np.array_equal(fitted.apply(y), y) and fitted.message == ""
        assert fitted.summary()["left out"].eq("not weighed").all()


def test_three_cuts_move_little_and_fifty_much():
    y, y_pred = site(50, bias=-1.0)
    moved = [fit_lines(y[:k], y_pred[:k], PRIOR).intercept[CLOVER] for k in (3, 50)]
    assert 0 < moved[0] < 0.3 and moved[1] > 0.6


# ---- the calibration

def test_biased_site_is_corrected():
    y, y_pred = site(200, bias=-1.2)
    fitted = fit_calibration(y[:20], y_pred[:20])
    error = [np.sqrt(((p - y[20:]) ** 2).mean(0)) for p in (y_pred[20:], fitted.apply(y_pred[20:]))]
    assert fitted.used.all() and (error[1] < 0.7 * error[0]).all() and fitted.message == ""
    assert (fitted.error_with < fitted.error_without).all()


def test_calibration_without_gain_is_refused():
    y, _ = site(8, bias=0)
    noise = np.sqrt(y) + np.array([1, -1] * 4)[:, None]  # mean error 0: leaving one out makes it worse
    fitted = fit_calibration(y, noise**2)
    assert not fitted.used.any() and np.array_equal(fitted.apply(y), y)
    assert "no gain" in fitted.message and "no grams change" in fitted.message
    assert np.array_equal(fitted.error_with, fitted.error_without)


@given(cuts(3, 10))
@settings(max_examples=30, deadline=None)
def test_error_left_out_never_rises(pair):
    fitted = fit_calibration(*pair)
    weights = np.array([0.1, 0.1, 0.1, 0.2, 0.5]) * fitted.cuts
    assert np.nansum(weights * fitted.error_with**2) <= np.nansum(weights * fitted.error_without**2)


def test_targets_not_weighed_follow():
    y, y_pred = site(30, bias=-1.2)
    y_pred = from_parts(*(1 + y_pred[:, [GREEN, CLOVER, DEAD]].T))
    only = np.full_like(y, np.nan)
    only[:, TOTAL] = y[:, TOTAL]
    new = fit_calibration(only, y_pred).apply(y_pred)
    assert np.allclose(new[:, :4] / y_pred[:, :4], (new / y_pred)[:, [TOTAL]], rtol=1e-6)
    only = np.full_like(y, np.nan)
    only[:, DEAD] = y[:, DEAD]
    new = fit_calibration(only, y_pred).apply(y_pred)
    assert np.allclose(new[:, [GREEN, CLOVER]], y_pred[:, [GREEN, CLOVER]], atol=0.01)


def test_adjust_keeps_what_is_right():
    y = from_parts([20.0], [5.0], [10.0])
    none, lines = np.zeros(5, bool), RootLines(np.zeros(5), np.ones(5), np.zeros(5))
    assert np.allclose(adjust(y, lines, none, ~none), y)


def test_json_keeps_everything():
    y, y_pred = site(12, bias=-1)
    y[:, GREEN] = np.nan
    fitted = fit_calibration(y, y_pred)
    same = parse_calibration(fitted.to_json())
    assert np.allclose(same.apply(y_pred), fitted.apply(y_pred)) and same.message == fitted.message
    pd.testing.assert_frame_equal(same.summary(), fitted.summary())
    assert "NaN" not in fitted.to_json()


def test_intervals_follow_the_cuts_left_out():
    "Few cuts change a radius little, many decide it, in both directions; a target not weighed keeps its own."
    for noise, wider in ((0.2, False), (2.0, True)):
        ratios = []
        for k in (3, 10, 60):
            r = np.random.default_rng(k)
            y = from_parts(*r.gamma(4, 10, (3, k)))
            y_pred = (np.sqrt(y) + r.normal(0, noise, (k, 1))) ** 2
            y[:, DEAD] = np.nan
            fitted = fit_calibration(y, y_pred)
            ratios.append(fitted.radius(np.full(5, 1.645), 0.9) / 1.645)
            assert np.isclose(ratios[-1][DEAD], 1) and np.isnan(fitted.spread[DEAD])
        few, some, many = (ratio[TOTAL] for ratio in ratios)
        assert 1 < few < some < many if wider else 1 > few > some > many


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"center": {"0": 1}}'])
def test_broken_json(text):
    with pytest.raises(InputError, match="fit it again"):
        parse_calibration(text)


def test_half_a_file_is_refused():
    text = fit_calibration(*site(5, -1)).to_json()
    for wrong in (text[:-20], text.replace('"slope"', '"steep"'), text.replace('"4":', '"5":', 1)):
        with pytest.raises(InputError):
            parse_calibration(wrong)


@pytest.mark.parametrize(("y_true", "y_pred"), [
    (np.ones((3, 4)), np.ones((3, 4))), (np.ones((3, 5)), np.ones((4, 5))),
    (-np.ones((3, 5)), np.ones((3, 5))),
    (np.ones((3, 5)), np.full((3, 5), np.nan)), (np.full((3, 5), np.inf), np.ones((3, 5))),
])
def test_wrong_arrays(y_true, y_pred):
    with pytest.raises(InputError):
        fit_calibration(y_true, y_pred)


# ---- the prior

def test_prior_is_found_in_errors_between_sites():
    r = np.random.default_rng(1)
    parts = [site(15, bias, k) for k, bias in enumerate(r.normal(0, 0.6, 80))]
    y, y_pred = (np.concatenate(p) for p in zip(*parts, strict=True))
    prior = estimate_prior(y, y_pred, np.repeat(np.arange(80), 15))
    assert np.isclose(prior.intercept[TOTAL], 0.6, atol=0.12)
    assert np.isclose(prior.error[TOTAL], 0.4, atol=0.05)


@given(st.integers(1, 30), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_prior_is_positive(n, sites):
    y, y_pred = site(n, 0, n)
    prior = estimate_prior(y, y_pred, np.arange(n) % sites)
    assert all((np.isfinite(s) & (s > 0)).all() for s in vars(prior).values())
    if sites < 5:
        assert np.array_equal(prior.intercept, PRIOR.intercept)
