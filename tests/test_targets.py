"""04_targets: reconciliation for any prediction and any positive-definite weighting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import nnls

from nbs_lib.runtime import InputError
from nbs_lib.targets import (
    PART_COLUMNS,
    SUMS,
    as_weighting,
    from_parts,
    imbalance,
    make_weighting,
    project,
    reconcile,
    shrunk_covariance,
    to_parts,
)

grams = st.floats(-300, 300, allow_subnormal=False).map(lambda v: round(v, 6))
rows = arrays(np.float64, st.tuples(st.integers(1, 20), st.just(5)), elements=grams)
parts = arrays(np.float64, (30, 3), elements=st.floats(0, 300))
seeds = st.integers(0, 2**32 - 1)


def random_weighting(seed, spread=1.0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    return as_weighting((basis * 10 ** rng.uniform(-spread, spread, 5)) @ basis.T)


def cost(y, points, weighting):
    d = points - y
    return np.einsum("ni,ij,nj->n", d, weighting, d)


@given(parts)
def test_parts_and_targets_convert_both_ways(p):
    y = from_parts(*p.T)
    assert np.array_equal(to_parts(y), p) and np.allclose(y, p @ SUMS.T) and np.allclose(imbalance(y), 0)
    assert np.array_equal(SUMS[PART_COLUMNS], np.eye(3))


@settings(max_examples=150, deadline=None)
@given(rows, seeds)
def test_result_is_feasible_and_idempotent(y, seed):
    weighting = random_weighting(seed)
    out = reconcile(y, weighting)
    assert out.min() >= 0 and np.abs(imbalance(out)).max() <= 1e-9
    assert np.allclose(reconcile(out, weighting), out, atol=1e-7)


@settings(max_examples=150, deadline=None)
@given(rows, seeds)
def test_equals_a_general_solver(y, seed):
    weighting = random_weighting(seed)
    root = np.linalg.cholesky(weighting).T
    solved = np.array([SUMS @ nnls(root @ SUMS, root @ row)[0] for row in y])
    ours = reconcile(y, weighting)
    assert np.allclose(cost(y, ours, weighting), cost(y, solved, weighting), rtol=1e-8, atol=1e-8)
    assert np.allclose(ours, solved, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(rows, parts, seeds)
def test_no_feasible_point_is_nearer(y, tried, seed):
    weighting = random_weighting(seed)
    nearest = cost(y, reconcile(y, weighting), weighting)
    for point in tried @ SUMS.T:
        assert (nearest <= cost(y, point[None], weighting) + 1e-7).all()


@settings(max_examples=50, deadline=None)
@given(rows)
def test_a_feasible_projection_is_the_result(y):
    down = project(y)
    feasible = down.min(axis=1) >= 1e-9
    assert np.allclose(reconcile(y)[feasible], down[feasible], atol=1e-8)
    assert np.allclose(project(down), down, atol=1e-8) and np.abs(imbalance(down)).max() < 1e-8


@settings(max_examples=50, deadline=None)
@given(rows, seeds)
def test_known_zeros_stay_zero(y, seed):
    rng = np.random.default_rng(seed)
    weighting, zero = random_weighting(seed), rng.random((len(y), 3)) < 0.4
    out = reconcile(y, weighting, zero)
    root = np.linalg.cholesky(weighting).T
    for row, known, got in zip(y, zero, out, strict=True):
        assert (to_parts(got)[known] == 0).all()
        free = root @ SUMS[:, ~known]
        best = SUMS[:, ~known] @ nnls(free, root @ row)[0] if (~known).any() else np.zeros(5)
        assert np.allclose(got, best, atol=1e-5)


def test_rows_are_independent():
    y = np.random.default_rng(0).normal(10, 30, (500, 5))
    assert np.allclose(np.vstack([reconcile(row) for row in y[:50]]), reconcile(y)[:50], atol=1e-12)
    order = np.random.default_rng(1).permutation(len(y))
    assert np.allclose(reconcile(y[order]), reconcile(y)[order], atol=1e-12)


def test_clipping_leaves_an_imbalance_and_reconciling_does_not():
    y = np.array([[2.0, 30.0, 0.0, 2.0, 5.0]])  # green 2, dead 30, clover 0, GDM 2, total 5
    assert np.abs(imbalance(project(y).clip(0))).max() == pytest.approx(4.75)
    assert np.abs(imbalance(reconcile(y))).max() < 1e-12


@pytest.mark.parametrize("name", ["euclid", "metric", "mint"])
def test_twenty_thousand_rows_at_once(name):
    "All rows are feasible, and every hundredth equals the result of a general solver."
    rng = np.random.default_rng(0)
    y = rng.normal(10, 30, (20_000, 5))  # most rows need a face, not the plane
    weighting = make_weighting(name, rng.normal(0, [13, 10, 8, 12, 11], (300, 5)))
    out = reconcile(y, weighting)
    assert out.min() >= 0 and np.abs(imbalance(out)).max() < 1e-9
    root = np.linalg.cholesky(weighting).T
    for row, got in zip(y[::100], out[::100], strict=True):
        assert np.allclose(got, SUMS @ nnls(root @ SUMS, root @ row)[0], atol=1e-6)


def test_mint_with_many_errors_is_the_sample_covariance():
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(5, 5))
    errors = rng.normal(size=(200_000, 5)) @ mixed
    covariance, intensity = shrunk_covariance(errors)
    sample = errors.T @ errors / len(errors)
    assert intensity == 0.01 and np.allclose(covariance, sample, rtol=0.02, atol=0.05)


def test_mint_with_few_errors_shrinks_and_stays_positive_definite():
    few = np.random.default_rng(0).normal(size=(6, 5))
    assert shrunk_covariance(few)[1] > 0.2
    coherent = few[:, :3] @ SUMS.T  # errors of balanced predictions: rank three
    assert np.linalg.eigvalsh(make_weighting("mint", coherent)).min() > 0


@pytest.mark.parametrize(("call", "message"), [
    (lambda: reconcile(np.ones((2, 4))), "(2, 4)"),
    (lambda: reconcile([[1, 2, 3, 4, np.inf]]), "row 0"),
    (lambda: reconcile(np.ones((1, 5)), [1, 1, 1, 1, 0]), "positive-definite"),
    (lambda: reconcile(np.ones((1, 5)), np.eye(4)), "5 × 5"),
    (lambda: make_weighting("mint", np.zeros((9, 5))), "mint"),
    (lambda: make_weighting("mint", np.ones((2, 5))), "3 rows"),
    (lambda: make_weighting("other"), "euclid"),
])
def test_wrong_input_is_refused(call, message):
    with pytest.raises(InputError) as e:
        call()
    assert message in str(e.value) and "\n" not in str(e.value)
