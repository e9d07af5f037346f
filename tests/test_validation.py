"""06_validation and 28_ridge: properties of folds, blend weights and ridge, against slower references."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import Ridge

from nbs_lib.ridge import (
    PENALTIES,
    center_gram,
    cross_validate_ridge,
    draw_inner_folds,
    fit_standardiser,
    ridge_coefficients,
    ridge_path,
)
from nbs_lib.targets import TARGET_WEIGHTS, weighted_r2_score
from nbs_lib.validation import (
    bootstrap_scores,
    compare_predictions,
    conformal_radius,
    group_folds,
    left_out_coverage,
    mean_score,
    random_site_folds,
    score_interval,
    simplex_weights,
)

QUICK = hypothesis_settings(max_examples=60, deadline=None)
SITES = st.lists(st.integers(0, 12), min_size=2, max_size=60)
SEEDS = st.integers(0, 2**32 - 1)


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# ---- folds of whole sites ----
@QUICK
@given(SITES, st.integers(-1, 8), SEEDS)
def test_group_folds_keep_sites_whole_and_are_even(sites, folds, seed):
    fold, sites = group_folds(sites, folds, seed), np.array(sites)
    alone = len(set(sites)) == 1  # a single site: each photo is one of its own
    units = np.arange(len(sites)) if alone else sites
    names, sizes = np.unique(units, return_counts=True)
    assert fold.shape == sites.shape and sorted(set(fold)) == list(range(max(1, min(folds, len(names)))))
    assert all(len(set(fold[units == name])) == 1 for name in names)
    loads = np.bincount(fold)
    assert loads.max() - loads.min() <= sizes.max()
    assert np.array_equal(group_folds(sites, folds, seed), fold)


@QUICK
@given(SITES, st.integers(2, 8), SEEDS)
def test_group_folds_do_not_depend_on_the_order_of_photos(sites, folds, seed):
    assume(len(set(sites)) > 1)
    order = np.random.default_rng(seed).permutation(len(sites))
    assert np.array_equal(
        group_folds(np.array(sites)[order], folds, seed), group_folds(sites, folds, seed)[order]
    )
    assert np.array_equal(
        group_folds([f"site {s:02d}" for s in sites], folds, seed), group_folds(sites, folds, seed)
    )


@QUICK
@given(SITES, st.integers(1, 8), st.integers(0, 5), SEEDS)
def test_random_site_folds_keep_sites_whole_and_cut_them_evenly(sites, folds, draws, seed):
    drawn, sites = random_site_folds(sites, folds, draws, seed), np.array(sites)
    units = np.arange(len(sites)) if len(set(sites)) == 1 else sites
    names = np.unique(units)
    assert drawn.shape == (draws, len(sites)) and drawn.dtype.kind == "i"
    for fold in drawn:
        of_site = np.array([set(fold[units == name]) for name in names])
        assert all(len(one) == 1 for one in of_site)
        counts = np.bincount([one.pop() for one in of_site])
        assert len(counts) == min(folds, len(names)) and counts.max() - counts.min() <= 1
    assert np.array_equal(random_site_folds(sites, folds, draws + 2, seed)[:draws], drawn), (
        "more draws leave the first as they are"
    )


def test_random_site_folds_differ_from_draw_to_draw_and_from_seed_to_seed():
    sites = np.repeat(np.arange(30), 4)
    drawn = np.concatenate([random_site_folds(sites, 5, 10, seed) for seed in (0, 1)])
    assert len({fold.tobytes() for fold in drawn}) == 20
    together = np.mean(
        [
            [fold[4 * a] == fold[4 * b] for a in range(30) for b in range(a)]
            for fold in random_site_folds(sites, 5, 200, 2)
        ],
        axis=0,
    )
    assert abs(together.mean() - 5 / 29) < 1e-9 and together.max() < 0.35, (
        "every pair of sites meets as often as chance says"
    )


@QUICK
@given(SITES, st.integers(2, 6), st.integers(1, 4), SEEDS)
def test_inner_folds_are_group_folds_of_several_seeds(sites, folds, draws, seed):
    drawn = draw_inner_folds(sites, folds, draws, seed)
    assert np.array_equal(drawn, [group_folds(sites, folds, seed + d) for d in range(draws)])


# ---- the bootstrap over sites ----
def photos(seed: int, n: int = 40, sites: int = 10, noise: float = 8.0):
    rng = np.random.default_rng(seed)
    y = rng.gamma(2, 12, (n, 5))
    return y, (y + rng.normal(0, noise, y.shape)).clip(0), np.arange(n) % sites


@QUICK
@given(SEEDS, st.integers(2, 12))
def test_a_bootstrap_score_is_the_score_of_the_photos_it_drew(seed, sites):
    y, p, groups = photos(seed, sites=sites)
    times = np.random.default_rng(seed).multinomial(sites, np.full(sites, 1 / sites), 5)
    for score, counts in zip(bootstrap_scores(y, [p], groups, 5, seed)[:, 0], times, strict=True):
        rows = np.repeat(np.arange(len(y)), counts[groups])
        assert score == pytest.approx(weighted_r2_score(y[rows], p[rows]), abs=1e-9)


@QUICK
@given(SEEDS)
def test_predictions_over_draws_of_folds_count_by_their_mean_error(seed):
    y, p, groups = photos(seed)
    three = np.stack([p, y * 0.9, p + 1])
    assert mean_score(y, three) == pytest.approx(
        np.mean([weighted_r2_score(y, one) for one in three]), abs=1e-12
    )
    assert np.allclose(
        bootstrap_scores(y, [three], groups, 20, seed)[:, 0],
        np.mean(bootstrap_scores(y, list(three), groups, 20, seed), axis=1),
        atol=1e-9,
    )


@QUICK
@given(SEEDS)
def test_a_comparison_is_fair_to_both_sides(seed):
    y, p, groups = photos(seed)
    other = p + numbers(seed + 1, *p.shape)
    there, back, same = (
        compare_predictions(y, p, other, groups, 200, seed),
        compare_predictions(y, other, p, groups, 200, seed),
        compare_predictions(y, p, p, groups, 200, seed),
    )
    assert there["gain"] == pytest.approx(-back["gain"], abs=1e-12) and there["p_better"] == pytest.approx(
        1 - back["p_better"], abs=1e-12
    )
    assert (
        same["gain"] == same["noise"] == 0
        and same["p_better"] == 0.5
        and same["score"] == pytest.approx(weighted_r2_score(y, p))
    )
    assert compare_predictions(y, p, y, groups, 200, seed)["p_better"] == 1


def test_an_interval_needs_three_sites_and_holds_the_score():
    y, p, groups = photos(0, 60, 12)
    low, high = score_interval(y, p, groups)
    assert low < weighted_r2_score(y, p) < high
    assert score_interval(y, p, groups % 2) is None and score_interval(y, p, np.zeros(60)) is None


# ---- weights on a simplex ----
@QUICK
@given(
    SEEDS,
    st.integers(1, 6),
    st.integers(2, 40),
    st.sampled_from([0.0, 0.1, 10.0, 1000.0]),
    st.sampled_from([1e-2, 1.0, 100.0]),
)
def test_simplex_weights_are_shares_that_no_other_shares_beat(seed, m, k, pull, scale):
    rng = np.random.default_rng(seed)
    y = scale * rng.normal(2, 1, k)
    members = y + scale * rng.normal(0, rng.uniform(0.1, 3, (m, 1)), (m, k))
    w = simplex_weights(members, y, pull)
    assert w.shape == (m,) and (w >= 0).all() and w.sum() == pytest.approx(1, abs=1e-12)

    def loss(w):
        return ((w @ members - y) ** 2).sum() + pull * ((w - 1 / m) ** 2).sum()

    others = np.vstack([rng.dirichlet(np.ones(m), 50), np.eye(m), np.full((1, m), 1 / m)])
    best = minimize(
        loss,
        np.full(m, 1 / m),
        method="SLSQP",
        bounds=[(0, 1)] * m,
        constraints={"type": "eq", "fun": lambda v: v.sum() - 1},
        options={"ftol": 1e-12},
    ).x
    best = best / best.sum()  # SLSQP may miss the sum by some per mille
    assert loss(w) <= min([*map(loss, others), loss(best)]) * (1 + 1e-4) + 1e-9 * scale**2


def test_a_pull_without_end_makes_the_weights_equal():
    y, members = numbers(0, 30), numbers(1, 4, 30)
    assert np.allclose(simplex_weights(members, y, 1e7), 0.25, atol=1e-3)
    assert np.allclose(simplex_weights(np.stack([members[0], y, members[1]]), y), [0, 1, 0], atol=1e-4), (
        "who is right gets all"
    )
    assert np.allclose(simplex_weights(np.stack([members[0]] * 3), y, 1e-6), 1 / 3, atol=1e-3), (
        "twins share alike"
    )


# ---- conformal intervals ----
@QUICK
@given(SEEDS, st.integers(2, 20), st.sampled_from([0.5, 0.8, 0.9]))
def test_radii_grow_with_the_coverage_and_hold_the_sites_they_were_found_on(seed, sites, coverage):
    y, p, groups = photos(seed, 60, sites)
    small, large = conformal_radius(y, p, groups, coverage / 2), conformal_radius(y, p, groups, coverage)
    errors = np.abs(np.sqrt(y) - np.sqrt(p))
    assert (small <= large).all() and (large <= errors.max(0)).all()
    inside = np.mean([(errors[groups == s] <= large + 1e-12).mean(0) for s in np.unique(groups)], axis=0)
    assert (inside >= min(coverage, 1) - 1e-9).all(), (
        "on the sites that were seen, at least what is promised for a new one"
    )


def test_a_site_that_was_left_out_is_covered_as_promised():
    rng, shares = np.random.default_rng(0), []
    for _ in range(30):
        sites = np.repeat(np.arange(25), 8)
        y = rng.gamma(3, 10, (200, 5))
        p = (np.sqrt(y) + rng.normal(0, 0.3, (25, 5))[sites] + rng.normal(0, 0.3, y.shape)).clip(0) ** 2
        shares.append(left_out_coverage(y, p, sites, 0.9).mean())
    assert 0.88 < np.mean(shares) < 0.96


# ---- ridge ----
@QUICK
@given(SEEDS, st.integers(4, 25), st.integers(1, 40), st.integers(1, 6), st.sampled_from([0.0, 5.0, -300.0]))
def test_a_ridge_path_is_sklearns_ridge_at_each_penalty(seed, n, d, t, shift):
    rng = np.random.default_rng(seed)
    x, new, y = rng.normal(shift, 1, (n, d)), rng.normal(shift, 1, (7, d)), rng.normal(10, 5, (n, t))
    penalties = np.array([1e-3, 1e-2, 1.0, 50.0])
    path = ridge_path(x @ x.T / d, y, new @ x.T / d, penalties)
    assert path.shape == (4, 7, t)
    for penalty, said in zip(penalties, path, strict=True):
        slow = Ridge(alpha=penalty * d, solver="cholesky").fit(x - shift, y)
        assert np.allclose(
            said, slow.predict(new - shift).reshape(7, t), rtol=1e-5, atol=1e-5 * max(1, abs(shift))
        )
        dual = ridge_coefficients(x @ x.T / d, y, penalty)
        assert np.allclose(
            y.mean(0) + center_gram(x @ x.T / d, new @ x.T / d) @ dual,
            said,
            rtol=1e-6,
            atol=1e-6 * max(1, abs(shift)),
        )
        assert np.allclose(
            (x - x.mean(0)).T @ dual / d,
            slow.coef_.reshape(t, d).T,
            rtol=1e-3,
            atol=1e-5 * max(1, abs(shift)),
        )


@QUICK
@given(SEEDS, st.integers(3, 20), st.integers(1, 30))
def test_a_centred_gram_is_that_of_centred_columns(seed, n, d):
    x, new = numbers(seed, n, d) + 4, numbers(seed + 1, 5, d) + 4
    assert np.allclose(center_gram(x @ x.T), (x - x.mean(0)) @ (x - x.mean(0)).T, atol=1e-9)
    assert np.allclose(center_gram(x @ x.T, new @ x.T), (new - x.mean(0)) @ (x - x.mean(0)).T, atol=1e-9)


@hypothesis_settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(2, 4))
def test_cross_validated_ridge_predicts_each_fold_from_the_others(seed, folds):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(24, 10))
    y = np.abs(x[:, :5] + rng.normal(size=(24, 5)))
    drawn = np.stack([group_folds(np.arange(24) // 3, folds, s) for s in range(2)])
    penalty, held = cross_validate_ridge(x @ x.T / 10, y, y, drawn, lambda z: z)
    assert penalty in PENALTIES and held.shape == (2, 24, 5)
    scores = {}
    for p in PENALTIES[::4]:
        slow = np.empty_like(held)
        for draw, fold in enumerate(drawn):
            for k in np.unique(fold):
                slow[draw][fold == k] = (
                    Ridge(alpha=p * 10, solver="cholesky")
                    .fit(x[fold != k], y[fold != k])
                    .predict(x[fold == k])
                )
        scores[p] = np.mean([weighted_r2_score(y, s) for s in slow])
        if p == penalty:
            assert np.allclose(held, slow, rtol=1e-4, atol=1e-4)
    assert np.mean([weighted_r2_score(y, s) for s in held]) >= max(scores.values()) - 1e-6, (
        "no other penalty does better"
    )


@QUICK
@given(SEEDS, st.floats(-1e4, 1e4), st.floats(1e-3, 1e3))
def test_a_standardiser_drops_columns_that_do_not_vary(seed, level, spread):
    x = np.c_[level + spread * numbers(seed, 30), np.full(30, level), np.full(30, 0.0)].astype(np.float32)
    mean, sd = fit_standardiser(x)
    z = (x - mean) / sd
    assert np.isfinite(z).all() and np.isinf(sd[1:]).all() and not z[:, 1:].any()
    if np.isfinite(sd[0]):
        assert z[:, 0].mean() == pytest.approx(0, abs=1e-6) and z[:, 0].std() == pytest.approx(1, abs=1e-6)


def test_the_weights_of_the_metric_are_those_of_the_competition():
    assert np.allclose(TARGET_WEIGHTS, [0.1, 0.1, 0.1, 0.2, 0.5])
