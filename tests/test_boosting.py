"""Model 2: leaks between folds, faults of features files, odd sizes, versions, and the whole stage."""
import importlib.metadata
import json
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone

from nbs_lib import boosting, members
from nbs_lib.boosting import (
    LabelledPhotos,
    PastureRegressor,
    StateClassifier,
    available_members,
    cross_validate,
    load_fitted,
    make_error_weighting,
    make_regressor,
    predict_fitted,
    run_boosting,
    select_members,
)
from nbs_lib.features import find_features, join_features
from nbs_lib.members import CompactFeatures
from nbs_lib.runtime import InputError, read_json
from nbs_lib.stages import open_run
from nbs_lib.tables import read_competition, read_draws, read_oof
from nbs_lib.targets import TARGET_WEIGHTS, TARGETS, from_parts, imbalance, reconcile, weighted_r2_score
from nbs_lib.validation import conformal_radius, group_folds, left_out_coverage, write_folds

RIDGE = dict(members=("ridge",))


def simulate_photos(n=90, d=24, sites=9, seed=0):
    "Simulate features (n, d), grams (n, 5) and the sorted site of each photo."
    r = np.random.default_rng(seed)
    site = np.sort(r.integers(0, sites, n))
    truth = r.normal(size=(sites, 3))[site] * 0.5 + r.normal(size=(n, 3))
    parts = np.maximum([[30, 10, 3]] * np.exp(truth * [0.5, 0.7, 1.0]) - [4, 4, 3], 0)
    X = np.tanh(truth @ r.normal(size=(3, d))) + r.normal(size=(n, d)) * 0.3
    green, dead, clover = parts.T
    return X.astype(np.float32), from_parts(green, clover, dead), np.array([f"s{s}" for s in site])


def predict_oof(estimator, X, y, site, fold, state=None, trained=True):
    "Return out-of-fold grams, or P(state) from a `StateClassifier`."
    state = np.full(len(y), "Tas") if state is None else state
    return cross_validate(estimator, LabelledPhotos([], X, y, site, state, trained), fold)


@pytest.fixture(scope="module")
def data():
    return simulate_photos()


@pytest.fixture(scope="module")
def fitted(data):
    X, y, site = data
    return PastureRegressor(members=("ridge", "lightgbm"), rounds=0.03).fit(X[:70], y[:70], site[:70])


# Leaks


def test_a_photo_of_weight_zero_is_not_trained_on(data):
    X, y, site = data
    fold = np.arange(len(y)) % 3
    left_out = np.arange(len(y)) % 10 == 0

    def predict(grams, trained):
        wrong = np.where(left_out[:, None], grams, y)
        return predict_oof(PastureRegressor(**RIDGE), X, wrong, site, fold, trained=trained)

    assert (predict(5.0, ~left_out) == predict(100.0, ~left_out)).all()
    assert abs(predict(5.0, True) - predict(100.0, True)).mean() > 1


def test_batch_does_not_matter(data, fitted):
    X = data[0][70:]
    whole, order = fitted.predict(X), np.random.default_rng(1).permutation(len(X))
    assert np.allclose(fitted.predict(X[order]), whole[order], atol=1e-6)
    alone = np.concatenate([fitted.predict(X[i : i + 1]) for i in range(len(X))])
    assert np.allclose(alone, whole, atol=1e-6)
    assert np.ptp(whole[:, 4]) > 5


def test_shuffled_labels_score_no_better_than_the_constant(data):
    X, y, site = data
    fold, scores, constants = group_folds(site, 5, 0), [], []
    for seed in range(4):
        z = y[np.random.default_rng(seed).permutation(len(y))]
        oof = predict_oof(PastureRegressor(**RIDGE), X, z, site, fold)
        scores.append(weighted_r2_score(z, oof))
        constants.append(boosting.score_oof(z, oof, fold)["constant"])
    assert np.mean(scores) <= np.mean(constants) + 0.02
    oof = predict_oof(PastureRegressor(**RIDGE), X, y, site, fold)
    assert weighted_r2_score(y, oof) > np.mean(constants) + 0.2


ALL_KINDS = PastureRegressor(
    members=("ridge", "catboost_joint", "lightgbm"), clear=0.5, inner=2, rounds=0.005)


@pytest.mark.parametrize("estimator", [ALL_KINDS, StateClassifier()])
def test_the_outer_fold_is_not_seen(data, estimator):
    X, y, site = data
    states, fold = np.where(X[:, 0] > 0, "NSW", "Tas"), group_folds(site, 3, 0)
    clean = predict_oof(estimator, X, y, site, fold, states)
    held, poisoned, odd = fold == 1, y.copy(), states.copy()
    poisoned[held] = 1e5
    odd[held] = "Tas"
    dirty = predict_oof(estimator, X, poisoned, site, fold, odd)
    assert np.array_equal(clean[held], dirty[held]) and not np.allclose(clean[~held], dirty[~held])
    moved = X.copy()
    moved[np.flatnonzero(held)[0]] = 1e6  # one held-out photo; no other prediction may move
    other = predict_oof(estimator, moved, y, site, fold, states)
    assert np.allclose(other[held][1:], clean[held][1:], atol=1e-6)


@pytest.mark.slow
def test_candidate_members_do_not_lower_the_score_on_average():
    gains = []
    for seed in range(4):
        X, y, site = simulate_photos(n=100, sites=16, d=[24, 200][seed % 2], seed=seed)
        fold = group_folds(site, 5, 3)
        more, ridge = (PastureRegressor(members=m) for m in (("ridge", "catboost_joint"), ("ridge",)))
        scores = [weighted_r2_score(y, predict_oof(r, X, y, site, fold)) for r in (more, ridge)]
        gains.append(scores[0] - scores[1])
    assert np.mean(gains) > -0.005 and min(gains) > -0.02


def test_a_member_is_used_only_if_inner_folds_show_a_clear_gain():
    r = np.random.default_rng(0)
    site, y = np.repeat(np.arange(20), 6), r.gamma(2, 20, (120, 5))
    fold = group_folds(site, 5)
    base, noise, as_good = (y + r.normal(0, s, y.shape) for s in (8, 40, 8))
    weights, blended = select_members(np.stack([base, noise, as_good]), y, fold, site)
    assert weights[1] < 0.05 and 0.3 < weights[2] < 0.7 and np.isclose(weights.sum(), 1)
    assert ((blended - y) ** 2).mean() < 0.7 * ((base - y) ** 2).mean()
    assert select_members(np.stack([base, noise * 0]), y, fold, site)[0][0] > 0.95
    no_inner_folds, _ = select_members(np.stack([base, as_good]), y, fold * 0, site)
    assert no_inner_folds.tolist() == [1, 0]


def test_penalty_may_be_almost_none_and_very_large():
    X, y, site = simulate_photos(n=80, d=400, sites=16)
    noise = np.random.default_rng(0).normal(size=X.shape)
    low, high = (PastureRegressor(**RIDGE).fit(x, y, site).members_[0].penalty_ for x in (X, noise))
    assert low < 1 < high


def test_grams_on_average_are_what_was_measured(data):
    X, y, site = data
    for transform in ("none", "sqrt"):
        member = PastureRegressor(**RIDGE, transform=transform).fit(X, y, site).members_[0]
        before, after = (np.abs(grams.mean(0) / y.mean(0) - 1)
                         for grams in (member.inner_ / member.ratio_, member.inner_))
        assert (after <= before / 3).all(), transform  # the rest is the prior of twenty photos
    assert np.isclose(members.bias_correction_ratio(y[:2], y[:2] / 2), 22 / 21).all()
    assert members.bias_correction_ratio(y * 0, y).tolist() == [1.0] * 5


@pytest.mark.parametrize("name", ["mint", "euclid", "no"])
def test_five_that_add_up(data, name):
    X, y, site = data
    fit = PastureRegressor(**RIDGE, reconcile=name).fit(X[:70], y[:70], site[:70])
    grams = np.concatenate([fit.predict(X), fit.predict(X * 5), fit.inner_])  # X * 5: extrapolated
    assert grams.min() >= 0 and np.isfinite(grams).all()
    assert (imbalance(grams).max() < 1e-6) == (name != "no")


def test_correlated_errors_decide_which_part_is_corrected(data):
    _, y, _ = data
    r = np.random.default_rng(0)
    shared = r.normal(0, 6, (len(y), 1)) * [1, 0, -1, 0, 0]  # green taken for clover
    errors = shared + r.normal(0, 1, y.shape) * [1, 6, 1, 3, 3]

    def loss(name):
        grams = reconcile(y + errors, make_error_weighting(name, errors))
        return ((grams - y) ** 2).mean(0) @ TARGET_WEIGHTS

    assert loss("mint") < 0.8 * loss("euclid")
    assert np.array_equal(make_error_weighting("mint", errors[:10]), np.eye(5))
    assert not np.allclose(make_error_weighting("mint", errors[:11]), np.eye(5))
    with pytest.raises(InputError, match="boosting.reconcile: unknown .mean.; choose from mint, euclid, no"):
        make_error_weighting("mean", errors)


# The estimator


def test_clone_and_repeat(data):
    X, y, site = data
    one = PastureRegressor(members=("ridge", "lightgbm"), rounds=0.02, seed=3)
    assert np.array_equal(one.fit(X, y, site).predict(X), clone(one).fit(X, y, site).predict(X))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_very_few_photos(n):
    X, y, site = simulate_photos(n=40)
    regressor = PastureRegressor(members=("ridge", "catboost_joint", "lightgbm"), rounds=0.02)
    assert np.isfinite(regressor.fit(X[:n], y[:n], site[:n]).predict(X)).all()
    classifier = StateClassifier().fit(X[:n], ["NSW"] * (n - 1) + ["WA"], site[:n])
    assert np.allclose(classifier.predict_proba(X).sum(1), 1)


def test_target_of_zeros_and_constant_columns(data):
    X, y, site = data
    y = y.copy()
    y[:, 2] = 0
    X = np.concatenate([X, np.full((len(X), 2), 7.0)], 1)
    regressor = PastureRegressor(members=("ridge", "catboost_joint", "lightgbm", "histgb", "gb"), rounds=0.02)
    fit = regressor.fit(X[:60], y[:60], site[:60])
    assert np.abs(fit.predict(X)[:, 2]).max() < 0.05  # though the others do not add up without it
    X[60:, -1] = 900  # constant in training, so it must not count
    assert np.allclose(fit.predict(X)[60:], fit.predict(np.where(X == 900, 7, X))[60:])


def test_lightgbm_predicts_as_its_wrapper_without_a_warning():
    "With Kaggle's scikit-learn the wrapper warns at each call that an array has no column names."
    rng = np.random.default_rng(0)
    S, z = rng.normal(size=(60, 12)), rng.normal(size=(60, 5))
    tree = members.TreeMember("lightgbm", rounds=0.02)
    fitted = tree._fit_models(S, z, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predicted = tree._predict_models(fitted, S)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        features = fitted[0].transform(S)
        assert all(np.array_equal(predicted[:, t[0]], model.predict(features)) for t, model in fitted[2])


@pytest.mark.parametrize("visible", [False, True])
def test_state_probabilities_are_calibrated(visible):
    X, y, site = simulate_photos(120, sites=16)
    r, fold, names = np.random.default_rng(0), group_folds(site, 4, 0), np.array(["NSW", "Tas", "Vic", "WA"])
    state = names[r.permutation(np.arange(16) % 4)[[int(s[1:]) for s in site]]]
    if visible:
        X[:, :4] += 1.5 * (state[:, None] == names)
    proba = predict_oof(StateClassifier(), X, y, site, fold, state)
    prior = np.stack([[(state[fold != k] == name).mean() for name in names] for k in fold])
    loss, known = (boosting.log_loss(p, state, names) for p in (proba, prior))
    assert loss < (known / 2 if visible else known)


def test_clusters_fewer_than_photos_allow():
    S = np.random.default_rng(0).normal(size=(6, 5))
    assert np.isfinite(CompactFeatures().fit(S, S[:, :1]).transform(S)).all()


def test_few_sites_take_the_largest_error():
    y = np.arange(20.0).reshape(4, 5)
    assert np.allclose(conformal_radius(y, y * 0, np.array([0, 0, 1, 1]), 0.9), np.sqrt(y[-1]))
    assert np.isnan(left_out_coverage(y, y, np.zeros(4))).all()


# Features files


def _write(folder, **arrays):
    np.savez(folder / "f.npz", **{"image_id": ["a", "b"], "embedding": np.ones((2, 3)), **arrays})
    return find_features(folder)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(embedding=np.array([[1, np.nan, 1], [1, np.inf, 1]])),
         "2 values that are not finite in 1 columns, the first in column 1 of a"),
        (dict(embedding=np.full((2, 3), 1e300)), "not finite"),
        (dict(embedding=np.ones((3, 3))), "3 rows for 2 image_id"),
        (dict(embedding=np.ones((0, 3)), image_id=np.array([], dtype=str)), "0 rows for 0"),
        (dict(embedding=np.ones(2)), "not float64 of shape"),
        (dict(embedding=np.array([["x"], ["y"]])), "must be a table of numbers"),
        (dict(embedding=np.ones((2, 0))), "must be a table of numbers"),
        (dict(embedding=np.array([[None], [1]], dtype=object)), "plain arrays"),
        (dict(semantic=np.full((2, 1), np.nan)), "semantic has 2 values"),
        (dict(image_id=["a", "a"]), "a is there more than once"),
        (dict(image_id=["a", "c"]), "1 photos are missing, b the first"),
    ],
)
def test_faults_of_a_features_file(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message) as e:
        join_features(_write(tmp_path, **arrays), ["a", "b"])
    assert "\n" not in str(e.value) and "f" in str(e.value)


def test_no_file_broken_file_and_lacking_array(tmp_path):
    with pytest.raises(InputError, match="no features there"):
        find_features(tmp_path)
    (tmp_path / "f.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(InputError, match=r"f\.npz: not readable"):
        find_features(tmp_path)
    np.savez(tmp_path / "f.npz", image_id=["a"])
    with pytest.raises(InputError, match="lacks the array 'embedding'"):
        find_features(tmp_path)


@pytest.mark.parametrize("kind", [np.float16, np.float64, np.int64, np.uint8, bool])
def test_other_dtypes_and_orders(tmp_path, kind):
    values = np.array([[1, 0], [0, 1], [1, 1]]).astype(kind)
    tables = _write(tmp_path, image_id=np.array(["c", "a", "b"]).astype("S1"), embedding=values)
    X, blocks = join_features(tables, ["a", "c"])
    assert X.dtype == np.float32 and blocks == (("f", 2),) and X.tolist() == [[0, 1], [1, 0]]


def test_features_that_training_knew_otherwise(data):
    X = data[0]
    tables = {"f": (["a"], X[:1], None)}
    with pytest.raises(InputError, match="'g' are missing"):
        join_features(tables, ["a"], (("f", X.shape[1]), ("g", 2)))
    with pytest.raises(InputError, match="24 columns, the model was fitted with 7"):
        join_features(tables, ["a"], (("f", 7),))


# Members


@pytest.fixture
def no_catboost(monkeypatch):
    real = importlib.metadata.version

    def version(package):
        if package == "catboost":
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_unknown_member_and_missing_library(no_catboost):
    with pytest.raises(InputError, match="unknown member .forest.; choose from ridge"):
        available_members(("forest",))
    warnings = []
    assert available_members(("ridge", "catboost", "catboost_joint"), warnings.append) == ("ridge",)
    assert len(warnings) == 2 and "catboost is not installed" in warnings[0]
    with pytest.raises(InputError, match="none can be used"):
        available_members(("catboost",), warnings.append)


def test_boosters_have_the_recipes_parameters():
    names = ("catboost", "lightgbm", "histgb", "gb")
    cat, light, hist, gb = (members.BOOSTERS[name](1.0, 42).get_params() for name in names)
    assert (cat["iterations"], cat["learning_rate"], cat["depth"]) == (1900, 0.045, 4)
    assert (light["n_estimators"], light["learning_rate"], light["num_leaves"]) == (807, 0.014, 48)
    assert (hist["max_iter"], hist["learning_rate"]) == (300, 0.05)
    assert (gb["n_estimators"], gb["learning_rate"]) == (1354, 0.01)


# The stage


def write_competition(folder, n=60):
    "Write the three tables; this stage opens no photo. Return features and grams."
    X, y, site = simulate_photos(n, sites=8)
    folder.mkdir(parents=True)
    rows = []
    for i in range(n):
        s = int(site[i][1:])
        photo = {"image_path": f"train/ID{i:03}.jpg", "Sampling_Date": f"2015/{1 + s}/3",
                 "State": ["Tas", "NSW", "Vic", "WA"][s % 4], "Species": "Clover", "Pre_GSHH_NDVI": 0.5,
                 "Height_Ave_cm": 5.0}
        rows += [{"sample_id": f"ID{i:03}__{t}", **photo, "target_name": t, "target": v}
                 for t, v in zip(TARGETS, y[i])]
    pd.DataFrame(rows).to_csv(folder / "train.csv", index=False)
    test = pd.DataFrame({"sample_id": [f"ID9__{t}" for t in TARGETS], "image_path": "test/ID9.jpg",
                         "target_name": TARGETS})
    test.to_csv(folder / "test.csv", index=False)
    test[["sample_id"]].assign(target=0.0).to_csv(folder / "sample_submission.csv", index=False)
    return X, y


def ids_of(X):
    return [f"ID{i:03}" for i in range(len(X))]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boosting")
    X, y = write_competition(folder / "in")
    overrides = ["boosting.members=ridge,lightgbm", "boosting.rounds=0.02", "boosting.inner_folds=2",
                 "run.folds=3", "run.draws=2"]
    run = open_run(folder / "in", folder / "out", "demo", overrides=overrides)
    write_folds(run, read_competition(run.input, photos=False).train)  # an input of the stage
    order = np.random.default_rng(0).permutation(len(X) + 1)  # one photo more than train.csv
    ids, embedding = np.array([*ids_of(X), "ID999"])[order], np.concatenate([X, X[:1]])[order]
    np.savez(run.artefact_path("features", "other.npz"), image_id=ids, embedding=embedding,
             semantic=embedding[:, :3].astype(np.float64))
    return run, run_boosting(run), X, y


def test_oof_is_what_an_estimator_of_the_other_folds_predicts(ran):
    run, summary, X, y = ran
    for scheme, name in (("grouped", "boosting"), ("stratified", "boosting_stratified")):
        r2 = weighted_r2_score(y, read_oof(run.artefacts / "oof" / f"{name}.parquet", ids_of(X)))
        assert np.isclose(r2, summary[scheme]["r2"]) and r2 > summary[scheme]["constant"] + 0.1
    table = pd.read_parquet(run.artefacts / "oof" / "boosting.parquet")
    both, site = np.concatenate([X, X[:, :3]], 1), read_competition(run.input, photos=False).groups
    held = (table["fold"] == 1).to_numpy()
    regressor = make_regressor(run.settings, load_fitted(run.artefacts)["regressor"].blocks)
    again = regressor.fit(both[~held], y[~held], site[~held]).predict(both[held])
    assert np.allclose(again, table.loc[held, list(TARGETS)], atol=1e-6)


def test_random_draws_of_sites_are_predicted_and_scored(ran):
    run, summary, X, y = ran
    folds, oof = read_draws(run, "boosting", ids_of(X))
    assert oof.shape == (2, len(X), 5) and len({tuple(f) for f in folds}) == 2
    scores = [weighted_r2_score(y, p) for p in oof]
    assert np.isclose(np.mean(scores), summary["draws"]["r2"])
    assert np.isclose(np.std(scores, ddof=1), summary["draws"]["sd"])
    groups = pd.read_csv(run.input / "train.csv").drop_duplicates("image_path")
    site = (groups["State"] + groups["Sampling_Date"]).to_numpy()
    assert all(len(set(f[site == s])) == 1 for f in folds for s in site)


def test_states_and_intervals(ran):
    run, _, X, _ = ran
    states = pd.read_parquet(run.artefacts / "boosting" / "state.parquet")
    names = ["NSW", "Tas", "Vic", "WA"]
    assert list(states.columns) == ["image_id", "fold", *names] and np.allclose(states[names].sum(axis=1), 1)
    written = read_json(run.artefacts / "boosting" / "intervals.json")
    assert set(written["radius"]) == set(TARGETS) and min(written["radius"].values()) > 0
    assert written["coverage"] == 0.9
    warnings = "\n".join(read_json(run.artefacts / "stages" / "boosting.json")["warnings"])
    assert "1 photos are not in train.csv" in warnings and "sites are too few" in warnings


@pytest.mark.parametrize("coverage", ["0", "8"])
def test_a_coverage_that_is_no_share_is_refused(tmp_path, coverage):
    write_competition(tmp_path / "in", 4)
    run = open_run(tmp_path / "in", tmp_path / "out", "demo", overrides=[f"boosting.coverage={coverage}"])
    with pytest.raises(InputError, match=f"boosting.coverage: must be between 0 and 1 .{coverage}."):
        run_boosting(run)


def test_fewer_photos_than_folds(tmp_path):
    X, _ = write_competition(tmp_path / "in", 4)
    overrides = ["boosting.members=ridge,catboost_joint,lightgbm", "boosting.rounds=0.02", "run.folds=5"]
    run = open_run(tmp_path / "in", tmp_path / "out", "demo", overrides=overrides)
    np.savez(run.artefact_path("features", "other.npz"), image_id=np.array(ids_of(X)), embedding=X)
    assert np.isfinite(run_boosting(run)["grouped"]["r2"])
    grams = predict_fitted(run.artefacts, {"other": (["p"], X[:1], None)})[0]
    assert grams.shape == (1, 5) and grams.min() >= 0 and imbalance(grams).max() < 1e-6


def test_a_second_run_has_nothing_to_do(ran, capsys):
    run = ran[0]
    manifest = read_json(run.artefacts / "stages" / "boosting.json")
    assert run_boosting(run) == manifest["summary"] and "up to date" in capsys.readouterr().out


@pytest.fixture
def copied(ran, tmp_path):
    "Return a copy of the artefacts, and a function that changes boosting/model.json in it."
    artefacts = shutil.copytree(ran[0].artefacts, tmp_path / "artefacts")
    path = artefacts / "boosting" / "model.json"

    def change_metadata(change):
        metadata = read_json(path)
        change(metadata)
        path.write_text(json.dumps(metadata))

    return artefacts, change_metadata


def test_a_member_whose_package_is_not_installed_is_left_out(ran, copied, no_catboost):
    "A model fitted with catboost, where catboost is not installed: fitted again without it."
    X, (artefacts, change_metadata) = ran[2], copied

    def add_catboost(metadata):
        metadata["members"] = metadata["params"]["members"] = [*metadata["members"], "catboost"]
        metadata["versions"]["catboost"] = "1.2"

    change_metadata(add_catboost)
    warnings = []
    y, _, _ = predict_fitted(artefacts, {"other": (["p", "q"], X[:2], X[:2, :3])}, warnings.append)
    assert np.isfinite(y).all()
    assert "catboost is not installed" in warnings[0] and "catboost 1.2 (here none)" in warnings[1]


def test_other_versions_are_refused_or_fitted_again(ran, copied):
    X, (artefacts, change_metadata) = ran[2], copied
    features = {"other": (["p", "q"], X[:2], X[:2, :3])}
    y, proba, states = predict_fitted(artefacts, features)
    assert y.shape == (2, 5) and proba.shape == (2, 4) and list(states) == ["NSW", "Tas", "Vic", "WA"]
    change_metadata(lambda metadata: metadata["versions"].update({"scikit-learn": "0.99.0"}))
    warnings = []
    again = predict_fitted(artefacts, features, warnings.append)[0]
    assert np.allclose(again, y, atol=1e-3) and "scikit-learn 0.99.0 (here " in warnings[0]
    shutil.rmtree(artefacts / "features")
    refused = r"saved under scikit-learn 0\.99\.0 \(here \d.*install those versions"
    with pytest.raises(InputError, match=refused):
        predict_fitted(artefacts, features)
