"""04_targets: what must hold for any prediction and any positive-definite weighting."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import nnls

from nbs_lib.runtime import InputError
from nbs_lib.targets import (
    SUMS,
    as_weighting,
    imbalance,
    make_weighting,
    project,
    reconcile,
    shrunk_covariance,
)

grams = st.floats(-300, 300, allow_subnormal=False).map(lambda v: round(v, 6))
rows = arrays(np.float64, st.tuples(st.integers(1, 20), st.just(5)), elements=grams)
parts = arrays(np.float64, (30, 3), elements=st.floats(0, 300))
seeds = st.integers(0, 2**32 - 1)


def random_weighting(seed, spread=1.0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    return as_weighting((basis * 10 ** rng.uniform(-spread, spread, 5)) @ basis.T)


def cost(y, points, W):
    d = points - y
    return np.einsum("ni,ij,nj->n", d, W, d)


@settings(max_examples=150, deadline=None)
@given(rows, seeds)
def test_feasible_and_idempotent(y, seed):
    W = random_weighting(seed)
    out = reconcile(y, W)
    assert out.min() >= 0 and np.abs(imbalance(out)).max() <= 1e-9
    assert np.allclose(reconcile(out, W), out, atol=1e-7)


@settings(max_examples=150, deadline=None)
@given(rows, seeds)
def test_equals_a_general_solver(y, seed):
    W = random_weighting(seed)
    root = np.linalg.cholesky(W).T
    solved = np.array([SUMS @ nnls(root @ SUMS, root @ row)[0] for row in y])
    ours = reconcile(y, W)
    assert np.allclose(cost(y, ours, W), cost(y, solved, W), rtol=1e-8, atol=1e-8)
    assert np.allclose(ours, solved, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(rows, parts, seeds)
def test_no_feasible_point_is_nearer(y, tried, seed):
    W = random_weighting(seed)
    nearest = cost(y, reconcile(y, W), W)
    for point in tried @ SUMS.T:
        assert (nearest <= cost(y, point[None], W) + 1e-7).all()


@settings(max_examples=50, deadline=None)
@given(rows)
def test_where_the_projection_is_possible_it_is_the_answer(y):
    down = project(y)
    fine = down.min(axis=1) >= 1e-9
    assert np.allclose(reconcile(y)[fine], down[fine], atol=1e-8)
    assert np.allclose(project(down), down, atol=1e-8) and np.abs(imbalance(down)).max() < 1e-8


@settings(max_examples=50, deadline=None)
@given(rows, seeds)
def test_known_zeros_stay_zero(y, seed):
    rng = np.random.default_rng(seed)
    W, zero = random_weighting(seed), rng.random((len(y), 3)) < 0.4
    out = reconcile(y, W, zero)
    root = np.linalg.cholesky(W).T
    for row, known, got in zip(y, zero, out, strict=True):
        assert (got[[0, 2, 1]][known] == 0).all()
        free = root @ SUMS[:, ~known]
        best = SUMS[:, ~known] @ nnls(free, root @ row)[0] if (~known).any() else np.zeros(5)
        assert np.allclose(got, best, atol=1e-5)


def test_rows_do_not_see_each_other():
    y = np.random.default_rng(0).normal(10, 30, (500, 5))
    assert np.allclose(np.vstack([reconcile(row) for row in y[:50]]), reconcile(y)[:50], atol=1e-12)
    order = np.random.default_rng(1).permutation(len(y))
    assert np.allclose(reconcile(y[order]), reconcile(y)[order], atol=1e-12)


def test_the_issue_s_example():
    y = np.array([[2.0, 30.0, 0.0, 2.0, 5.0]])  # green 2, dead 30, clover 0, GDM 2, total 5
    assert np.abs(imbalance(project(y).clip(0))).max() == pytest.approx(4.75)
    assert np.abs(imbalance(reconcile(y))).max() < 1e-12


@pytest.mark.parametrize("name", ["euclid", "metric", "mint"])
def test_two_hundred_thousand_rows_at_once(name):
    "Feasible to the last row, and every thousandth as a general solver says."
    rng = np.random.default_rng(0)
    y = rng.normal(10, 30, (200_000, 5))  # most rows need a face, not the plane
    W = make_weighting(name, rng.normal(0, [13, 10, 8, 12, 11], (300, 5)))
    out = reconcile(y, W)
    assert out.min() >= 0 and np.abs(imbalance(out)).max() < 1e-9
    root = np.linalg.cholesky(W).T
    for row, got in zip(y[::1000], out[::1000], strict=True):
        assert np.allclose(got, SUMS @ nnls(root @ SUMS, root @ row)[0], atol=1e-6)


def test_mint_with_many_errors_is_the_sample_covariance():
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(5, 5))
    errors = rng.normal(size=(200_000, 5)) @ mixed
    covariance, intensity = shrunk_covariance(errors)
    assert intensity == 0.01 and np.allclose(covariance, errors.T @ errors / len(errors), rtol=0.02, atol=0.05)


def test_mint_with_few_errors_shrinks_and_stays_positive_definite():
    few = np.random.default_rng(0).normal(size=(6, 5))
    assert shrunk_covariance(few)[1] > 0.2
    coherent = few[:, :3] @ SUMS.T  # errors of balanced predictions: rank three
    assert np.linalg.eigvalsh(make_weighting("mint", coherent)).min() > 0


@pytest.mark.parametrize(("call", "says"), [
    (lambda: reconcile(np.ones((2, 4))), "(2, 4)"),
    (lambda: reconcile([[1, 2, 3, 4, np.inf]]), "row 0"),
    (lambda: reconcile(np.ones((1, 5)), [1, 1, 1, 1, 0]), "positive-definite"),
    (lambda: reconcile(np.ones((1, 5)), np.eye(4)), "5 × 5"),
    (lambda: make_weighting("mint", np.zeros((9, 5))), "mint"),
    (lambda: make_weighting("mint", np.ones((2, 5))), "3 rows"),
    (lambda: make_weighting("other"), "euclid"),
])
def test_refusals(call, says):
    with pytest.raises(InputError) as e:
        call()
    assert says in str(e.value) and "\n" not in str(e.value)
