"""51_ensemble: alignment of the models, unbiased scores, and the stage on a tiny competition."""
import dataclasses

import numpy as np
import pandas as pd
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from nbs_lib.ensemble import (
    ModelPredictions,
    Policy,
    apply_blend,
    choose_policy,
    compare_weights,
    cross_fitted_predictions,
    fit_blend,
    learn_weights,
    load_blend,
    nested_cv_predictions,
    run_ensemble,
    weighted_mean,
)
from nbs_lib.runtime import InputError, read_json
from nbs_lib.settings import load_settings
from nbs_lib.tables import read_competition, read_oof
from nbs_lib.targets import from_parts, imbalance, weighted_r2_score
from nbs_lib.validation import bootstrap_scores

CHOSEN = dataclasses.replace(load_settings("demo").ensemble, draws=200)


def toy_models(n_sites=12, each=6, seed=0, biases=(4.0, 4.0), leak=0.0):
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(n_sites), each)
    part = rng.gamma(1.5, [18, 6, 8], (n_sites, 3))[site] * rng.gamma(6, 1 / 6, (n_sites * each, 3))
    y = from_parts(*part.T)
    predictions = {}
    for k, bias in enumerate(biases):
        wrong = rng.normal(0, bias, (n_sites, 3))[site] + rng.normal(0, 3, part.shape)
        predictions[f"m{k}"] = from_parts(*(part + wrong).clip(0).T)
    states = pd.DataFrame({s: (site % 4 == k) * 0.9 + 0.025 for k, s in enumerate(tiny.STATES)})
    return ModelPredictions(y, site % 4, site.astype(str), predictions, states)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.floats(0, 100))
def test_learned_weights_are_shares_and_no_worse_than_equal(seed, m, pull):
    rng = np.random.default_rng(seed)
    y = rng.gamma(1, 20, (40, 5))
    stack = y + rng.normal(0, rng.uniform(1, 20, (m, 1, 1)), (m, 40, 5)) + rng.normal(0, 5, (m, 1, 5))
    w = learn_weights(stack, y, pull)
    assert (w >= 0).all() and np.allclose(w.sum(axis=0), 1, atol=1e-6)
    fitted, equal = (((weighted_mean(stack, v) - y) ** 2).sum() for v in (w, np.full((m, 5), 1 / m)))
    assert fitted <= equal * (1 + 1e-6)


def test_weighted_mean_gives_the_weight_of_a_missing_model_to_the_others():
    stack = np.full((3, 4, 5), [[[1.0]], [[2.0]], [[4.0]]])
    stack[0, 1], stack[:, 2] = np.nan, np.nan
    weights = np.full((3, 5), [[0.5], [0.5], [0.0]])
    mixed = weighted_mean(stack, weights)
    assert np.allclose(mixed[[0, 1]], [[1.5] * 5, [2.0] * 5]) and np.isnan(mixed[2]).all()
    stack[:2, 3] = np.nan  # only the model of weight zero has a number
    assert np.allclose(weighted_mean(stack, weights)[3], 4)


def test_nested_predictions_do_not_see_their_fold():
    m = toy_models()
    policy = Policy("learned", "mint", ("WA:Dry_Dead_g",), carry=True, shrink=True)
    before = cross_fitted_predictions(policy, m, CHOSEN)
    poisoned = dataclasses.replace(m, y=np.where((m.fold == 2)[:, None], 1e3, m.y))
    after = cross_fitted_predictions(policy, poisoned, CHOSEN)
    assert np.allclose(before[m.fold == 2], after[m.fold == 2])
    assert not np.allclose(before[m.fold != 2], after[m.fold != 2])


WEIGHTS_ALONE = dataclasses.replace(CHOSEN, rules=(), shrink=False, weighting=("euclid",))


def test_nested_cv_does_not_see_its_fold():
    m = toy_models(n_sites=16)
    other = dataclasses.replace(m, y=np.where((m.fold == 2)[:, None], m.y[::-1], m.y))
    before, after = (nested_cv_predictions(x, CHOSEN, 0) for x in (m, other))
    assert np.allclose(before[m.fold == 2], after[m.fold == 2])
    assert not np.allclose(before[m.fold != 2], after[m.fold != 2])


def test_choosing_among_many_is_optimistic_and_nested_cv_is_not():
    "Six models alike: the best of them by chance scores better than it is."
    chosen, nested = [], []
    for seed in range(4):
        m = toy_models(n_sites=10, seed=seed, biases=(8.0,) * 6)
        settings_ = dataclasses.replace(WEIGHTS_ALONE, weights=("m0", "single"), clear=0.5, draws=50)
        policy, _ = choose_policy(m, settings_, 0)
        chosen.append(weighted_r2_score(m.y, cross_fitted_predictions(policy, m, settings_)))
        nested.append(weighted_r2_score(m.y, nested_cv_predictions(m, settings_, 0)))
    assert np.mean(chosen) > np.mean(nested) + 0.01


def test_two_folds_leave_the_default_policy():
    m = toy_models()
    two = dataclasses.replace(m, fold=m.fold % 2)
    default = cross_fitted_predictions(Policy("equal"), two, CHOSEN)
    assert np.allclose(nested_cv_predictions(two, CHOSEN, 0), default)


def test_a_refinement_without_clear_gain_is_not_used():
    "Two models alike: equal weights stay, except where chance gives a clear gain."
    policies = [choose_policy(toy_models(seed=seed), WEIGHTS_ALONE, 0)[0] for seed in range(12)]
    assert sum(policy.weights == "equal" for policy in policies) >= 7


@pytest.mark.parametrize("biases", [(2.0, 12.0), (12.0, 2.0)])
def test_the_better_model_gets_its_weight(biases):
    "The blend is about as good as the better model, and beats the recipe if that prefers the worse one."
    m = toy_models(n_sites=30, biases=biases)
    named = {"boosting": m.predictions["m0"], "dinov3": m.predictions["m1"]}
    m = dataclasses.replace(m, predictions=named)
    policy, _ = choose_policy(m, WEIGHTS_ALONE, 0)
    score = {e["candidate"]: e["score"] for e in compare_weights(m, policy.weights, WEIGHTS_ALONE, 0)}
    better = max(score["boosting"], score["dinov3"])
    assert policy.weights != "equal" and score[policy.weights] > better - 0.01
    assert weighted_r2_score(m.y, nested_cv_predictions(m, WEIGHTS_ALONE, 0)) > better - 0.02
    if biases[0] < biases[1]:
        assert score[policy.weights] > score["recipe"] + 0.05


def test_a_useless_model_loses_its_weight():
    m = toy_models(biases=(2.0, 60.0))
    policy, _ = choose_policy(m, CHOSEN, 0)
    assert policy.weights == "m0" or fit_blend(policy, m, CHOSEN).weights[0].mean() > 0.8


RULES = ("WA:Dry_Dead_g", "NSW:Dry_Clover_g")


@pytest.mark.parametrize("policy", [
    Policy("equal"), Policy("learned", "mint", RULES, carry=True, shrink=True), Policy("m1", "metric"),
])
def test_blends_are_possible_masses(policy):
    m = toy_models()
    out = cross_fitted_predictions(policy, m, CHOSEN)
    assert out.min() >= 0 and np.abs(imbalance(out)).max() < 1e-9
    blend = fit_blend(policy, m, CHOSEN)
    photos = [m.rows(np.arange(len(m.y)) == i) for i in range(9)]
    alone = np.vstack([apply_blend(blend, p.predictions, p.states) for p in photos])
    together = apply_blend(blend, m.predictions, m.states)[:9]
    assert np.allclose(alone, together, atol=1e-9), "a photo alone is blended as in a batch"


def test_rules_zero_their_part():
    m = toy_models()
    blend = fit_blend(Policy("equal", rules=("WA:Dry_Dead_g",), carry=True), m, CHOSEN)
    out = apply_blend(blend, m.predictions, m.states)
    sure = m.states["WA"].to_numpy() > 0.75
    assert sure.any() and (out[sure, 1] == 0).all() and (out[~sure, 1] > 0).any()


def test_bootstrap_knows_sites():
    m = toy_models(each=10)
    a, b = m.predictions.values()
    by_site = bootstrap_scores(m.y, [a, b], m.groups, 2000)
    by_photo = bootstrap_scores(m.y, [a, b], np.arange(len(m.y)), 2000)
    gain = [np.subtract(*r.T).std() for r in (by_site, by_photo)]
    assert gain[0] > 1.5 * gain[1], "errors shared in a site: photos are not independent"


@pytest.fixture
def run(tmp_path):
    source = tiny.competition(tmp_path / "in", n_train=32, n_test=2, size=(128, 64))
    return tiny.run_on(source, tmp_path / "out", "ensemble.draws=100")


def test_the_stage(run):
    tiny.fake_members(run)
    summary = run_ensemble(run)
    comp = read_competition(run.input)
    final = read_oof(run.artefacts / "oof" / "ensemble.parquet", comp.train["image_id"].tolist())
    assert weighted_r2_score(comp.y, final) == pytest.approx(summary["r2"]["grouped"]["ensemble"])
    assert np.abs(imbalance(final)).max() < 1e-6 and final.min() >= 0
    assert set(load_blend(run.artefacts / "blend.json").models) == {"dinov3", "boosting"}
    assert read_json(run.artefacts / "blend.json")["evidence"]
    assert (run.artefacts / "oof" / "ensemble_stratified.parquet").is_file()
    stamp = (run.artefacts / "blend.json").stat().st_mtime_ns
    run_ensemble(run)  # nothing changed
    assert (run.artefacts / "blend.json").stat().st_mtime_ns == stamp
    tiny.fake_members(run, noise=(("dinov3", 6.0), ("boosting", 9.0), ("extra", 3.0)))
    assert "extra" in run_ensemble(run)["weights"]


def test_one_model_is_enough(run):
    tiny.fake_members(run, noise=(("boosting", 5.0),), schemes=("grouped",))
    summary = run_ensemble(run)
    assert summary["weights"] == {"boosting": [1.0] * 5} and "stratified" not in summary["r2"]


def test_preset_recipe(tmp_path):
    from nbs_lib.stages import open_run

    source = tiny.competition(tmp_path / "in", n_train=24, n_test=2, size=(128, 64))
    run = open_run(source, tmp_path / "out", "demo", "recipe")
    tiny.fake_members(run)
    weights = run_ensemble(run)["weights"]
    assert weights == {"boosting": [0.15, 0.15, 0.0, 0.15, 0.15], "dinov3": [0.85, 0.85, 1.0, 0.85, 0.85]}


def test_refusals(run):
    tiny.fake_members(run, noise=())
    with pytest.raises(InputError, match="no out-of-fold"):
        run_ensemble(run)
    tiny.fake_members(run)
    path = run.artefacts / "oof" / "boosting.parquet"
    table = pd.read_parquet(path)
    table.assign(fold=(table["fold"] + 1) % 4).to_parquet(path, index=False)
    with pytest.raises(InputError, match="in other folds"):
        run_ensemble(run)
    table.iloc[1:].to_parquet(path, index=False)
    with pytest.raises(InputError, match="boosting.parquet"):
        run_ensemble(run)
    for wrong, message in (
        ("ensemble.weights=", "weights"), ("ensemble.weights=best", "best"), ("ensemble.rules=WA", "WA"),
    ):
        fresh = tiny.run_on(run.input, run.output, wrong)
        tiny.fake_members(fresh)
        with pytest.raises(InputError, match=message):
            run_ensemble(fresh)


def test_choices_use_the_random_draws_if_every_model_has_them():
    m = toy_models(n_sites=14, biases=(2.0, 9.0))
    flipped = dataclasses.replace(m, predictions=dict(zip(m.predictions, reversed(m.predictions.values()))))
    draws = tuple(dataclasses.replace(flipped, fold=np.roll(m.fold, k)) for k in range(5))
    alone, drawn = (choose_policy(dataclasses.replace(m, draws=d), CHOSEN, 0)[0].weights for d in ((), draws))
    assert (alone, drawn) == ("m0", "m1")  # in the draws the other one is the better model


def test_draws_of_a_model_that_differ_are_not_compared(tmp_path):
    from nbs_lib.ensemble import read_models
    from nbs_lib.tables import write_draws

    run = tiny.run_on(tiny.competition(tmp_path / "in"), tmp_path / "out")
    tiny.fake_members(run)
    comp = read_competition(run.input)
    ids, y = comp.train["image_id"], np.stack([comp.y] * 2)
    folds = np.stack([np.arange(len(ids)) % 2, np.arange(len(ids)) % 3])
    assert not read_models(run, comp).draws  # nobody has any
    write_draws(run, "dinov3", ids, folds, y)
    assert not read_models(run, comp).draws  # one of two
    write_draws(run, "boosting", ids, folds, y)
    assert [d.fold.max() for d in read_models(run, comp).draws] == [1, 2]
    write_draws(run, "boosting", ids, folds[::-1], y)
    assert not read_models(run, comp).draws and "random draws of sites differ" in run.warnings[-1]
