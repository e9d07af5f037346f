"""The preset `recipe` key by key: the recipe's value and its source; and the whole chain with this preset."""
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from nbs_lib.biomass_net import Head, ModelConfig, build_model
from nbs_lib.ensemble import Blend, ModelPredictions, Policy, apply_blend, choose_policy
from nbs_lib.inpaint import clean_photo, orange_rule
from nbs_lib.runtime import InputError
from nbs_lib.scores import is_optimistic, summarise_scores
from nbs_lib.settings import load_settings
from nbs_lib.store import augment
from nbs_lib.targets import PART_COLUMNS, TARGETS
from nbs_lib.trainer import lr_factor

# section.key: the recipe's value, its source. docs/recipe.md shows this table (`tools/tables.py --write`).
RECIPE = {
    "train_dinov3.backbone": ("vit_huge_plus_patch16_dinov3", "write-up"),
    "train_dinov3.fusion": ("mamba", "write-up; its code runs a gated convolution called LocalMamba"),
    "train_dinov3.size": (512, "code"),
    "train_dinov3.probe": (False, "code"),
    "train_dinov3.layers": (2, "code"),
    "train_dinov3.dropout": (0.1, "code"),
    "train_dinov3.prefix": (True, "code"),
    "train_dinov3.halves": (False, "code"),
    "train_dinov3.aux": ((), "code"),
    "train_dinov3.pseudo_rounds": (0, "code"),
    "train_dinov3.lora": (0, "code"),
    "train_dinov3.layer_decay": (1.0, "code"),
    "train_dinov3.batch": (2, "code"),
    "train_dinov3.accumulate": (4, "code"),
    "train_dinov3.weight_decay": (1e-2, "code"),
    "train_dinov3.clip": (1.0, "code"),
    "train_dinov3.ema": (0.9, "code"),
    "train_dinov3.checkpointing": (True, "write-up"),
    "train_dinov3.dim": (0, "code: as wide as the backbone"),
    "train_dinov3.order": ("left_right", "code"),
    "train_dinov3.head": ("recipe", "code: Linear(D, D/2), GELU, dropout, Linear, Softplus"),
    "train_dinov3.head_dropout": (0.2, "code"),
    "train_dinov3.label_scale": (False, "code: a bare softplus"),
    "train_dinov3.squeeze": (True, "code: each half a square"),
    "train_dinov3.unfreeze": (-1, "write-up"),
    "train_dinov3.freeze_epochs": (2, "write-up"),
    "train_dinov3.warmup": (3, "code: .33, .67, 1, again when the backbone is released"),
    "train_dinov3.epochs": (30, "code"),
    "train_dinov3.patience": (5, "code"),
    "train_dinov3.select": ("outer", "code: the held-out fold chooses the epoch"),
    "train_dinov3.beta": (5.0, "write-up"),
    "train_dinov3.loss_weights": ((0.3, 0.3, 0.2, 0.1, 0.1), "code"),
    "train_dinov3.lr_backbone": (5e-5, "code"),
    "train_dinov3.lr": (1e-3, "code"),
    "train_dinov3.views": (("id", "H", "V", "HV"), "write-up: 4 × test-time augmentation"),
    "train_dinov3.schemes": (
        ("grouped", "stratified"), "code: stratified by photo; grouped stands next to it"),
    "photos.flips": (True, "code"),
    "photos.rotate90": (True, "code: D4"),
    "photos.scale_pad": (0.0, "code"),
    "photos.rotate": (10.0, "code"),
    "photos.rotate_chance": (0.3, "code"),
    "photos.jitter": (0.1, "code: brightness, contrast, saturation, p = .5"),
    "photos.hue": (0.05, "code"),
    "inpaint.rule": ("orange", "code: hue 5–25, S and V ≥ 150, after the crop"),
    "inpaint.crop_bottom": (0.1, "write-up"),
    "boosting.features": (("siglip",), "write-up"),
    "boosting.members": (("catboost", "lightgbm", "histgb", "gb"), "write-up"),
    "boosting.pca_variance": (0.8, "code"),
    "boosting.pls": (8, "code"),
    "boosting.gmm": (6, "code"),
    "boosting.gmm_columns": (0, "code: on all dimensions"),
    "boosting.transform": ("none", "code"),
    "boosting.stack": (False, "code: a plain mean"),
    "boosting.inner_folds": (0, "code"),
    "boosting.reconcile": ("no", "code"),
    "boosting.rounds": (1.0, "code"),
    "ensemble.weights": (("recipe",), "write-up: .85 of model 1, clover from model 1 alone"),
    "ensemble.recipe_weights": ((0.85, 0.85, 1.0, 0.85, 0.85), "write-up"),
    "ensemble.shrink": (False, "write-up"),
    "ensemble.judge": (False, "write-up: nothing is chosen out of fold"),
    "ensemble.weighting": (("euclid",), "write-up: orthogonal projection"),
    "ensemble.rules": (("WA:Dry_Dead_g",), "write-up"),
    "ensemble.rules_last": (True, "code: dead := 0, total := green + clover"),
    "ensemble.state_threshold": (0.75, "write-up"),
}
# what does not fit into two T4
T4 = {"train_dinov3.dim": 512, "train_dinov3.unfreeze": 4, "train_dinov3.schemes": ("grouped",)}


def value(settings, name):
    section, key = name.split(".")
    return getattr(getattr(settings, section), key)


@pytest.mark.parametrize("profile", ["kaggle", "laptop", "demo"])
def test_the_recipe_is_the_recipe(profile):
    settings = load_settings(profile, "recipe")
    backbone = {} if profile == "kaggle" else {"train_dinov3.backbone"}
    for name in RECIPE.keys() - backbone:
        assert value(settings, name) == RECIPE[name][0], name


def test_on_two_t4_only_what_cannot_fit_is_changed():
    whole, small = load_settings("kaggle", "recipe"), load_settings("kaggle", "recipe_t4")
    for section in ("photos", "inpaint", "train_dinov3", "siglip", "frozen", "boosting", "ensemble"):
        full, reduced = vars(getattr(whole, section)), vars(getattr(small, section))
        changed = {f"{section}.{key}": v for key, v in reduced.items() if v != full[key]}
        assert changed == {k: v for k, v in T4.items() if k.startswith(section)}


def test_a_mamba_neck_is_the_default_and_the_gated_convolution_one_setting_away():
    for profile, preset in (("kaggle", ""), ("kaggle", "recipe"), ("kaggle", "recipe_t4"), ("demo", "")):
        assert load_settings(profile, preset).train_dinov3.fusion == "mamba"
    changed = load_settings("kaggle", "recipe", ["train_dinov3.fusion=gated_conv"])
    assert changed.train_dinov3.fusion == "gated_conv"


def test_the_head_has_the_recipes_layers():
    head = Head("recipe", 32, 0.2)
    kinds = [type(layer).__name__ for layer in head.parts[0]]
    assert kinds == ["Linear", "GELU", "Dropout", "Linear"] and head.parts[0][2].p == 0.2
    config = ModelConfig("vit_twin_patch16_dinov3", size=64, squeeze=True, probe=False, head="recipe",
                         head_dropout=0.2)
    net = build_model(config)
    modules = [*net.projection.modules(), *net.head.modules()]
    assert not any(isinstance(m, torch.nn.LayerNorm) for m in modules)
    net.init_output_plain()
    tokens = torch.randn(2, 7, 192)
    base = net.prior.expand(2, 3)
    pooled = tokens.mean(1)
    wanted = torch.cat([torch.nn.functional.softplus(part(pooled)) for part in net.eval().head.parts], 1)
    torch.testing.assert_close(net.head(tokens, base), wanted, rtol=1e-4, atol=1e-4)


def test_the_warm_up_starts_again_when_the_backbone_is_released():
    factors = [lr_factor(i, 30, 3, 2) for i in range(30)]  # a step an epoch
    assert factors[:5] == pytest.approx([1 / 3, 2 / 3, 1 / 3, 2 / 3, 1])
    assert max(factors) == 1 and factors[-1] < 0.01


def test_the_orange_rule_is_applied_to_the_cropped_photo():
    photo = np.full((100, 200, 3), (60, 120, 50), np.uint8)
    photo[40:50, 20:60] = photo[92:98, 20:60] = (200, 130, 40)  # one above the cut, one below
    at_bound = np.full((9, 9, 3), (150, 105, 62), np.uint8)  # hue 15, saturation and value 150
    assert orange_rule(at_bound).all()
    settings = replace(load_settings("kaggle", "recipe").inpaint, crop_bottom=0.1)
    clean, mask = clean_photo(photo, settings)
    assert clean.shape == (90, 200, 3) and mask.shape == (100, 200) and mask[45, 40] and not mask[90:].any()
    assert np.abs(clean[45, 40].astype(int) - (60, 120, 50)).max() < 25
    upright, turned = clean_photo(np.ascontiguousarray(np.rot90(photo, -1)), settings)
    assert (upright == clean).all() and (np.rot90(turned) == mask).all()


def test_a_photo_is_turned_in_three_of_ten_draws():
    settings = replace(load_settings("kaggle", "recipe").photos, flips=False, rotate90=False, jitter=0, hue=0)
    pair = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    turned = [not np.array_equal(augment(pair, np.random.default_rng(k), settings), pair) for k in range(400)]
    assert 0.22 < np.mean(turned) < 0.38


def test_the_wa_rule_moves_nothing_into_green_and_clover():
    rules, states = ("WA:Dry_Dead_g",), pd.DataFrame({"WA": [0.9, 0.1]})
    grams = np.array([[24.0, 12.0, 6.0, 30.0, 42.0]] * 2)
    blend = Blend(("dinov3",), np.ones((1, 5)), shrink=np.ones(5), means=np.zeros(5), weighting=np.eye(5),
                  carry=np.eye(5)[PART_COLUMNS], rules=rules, threshold=0.75, rules_last=True)
    assert apply_blend(blend, {"dinov3": grams}, states).tolist() == [[24, 0, 6, 30, 30], [24, 12, 6, 30, 42]]
    oof = ModelPredictions(grams, np.zeros(2), np.array(["a", "b"]), {"dinov3": grams}, states)
    policy, _ = choose_policy(oof, load_settings("kaggle", "recipe").ensemble, 0)
    assert policy == Policy("recipe", rules=rules, rules_last=True)


@pytest.fixture(scope="module")
def recipe_run(tmp_path_factory):
    from nbs_lib.boosting import run_boosting
    from nbs_lib.ensemble import run_ensemble
    from nbs_lib.frozen import run_frozen
    from nbs_lib.inpaint import run_inpaint
    from nbs_lib.siglip import run_siglip
    from nbs_lib.stages import open_run
    from nbs_lib.submit import run_submit
    from nbs_lib.train_dinov3 import run_train_dinov3

    folder = tmp_path_factory.mktemp("recipe")
    source = tiny.competition(folder / "in", n_train=12, n_test=4)
    small = ["train_dinov3.backbone=vit_twin_patch16_dinov3", "train_dinov3.weights=random",
             "train_dinov3.size=64", "train_dinov3.epochs=2", "train_dinov3.freeze_epochs=1",
             "train_dinov3.dim=16", "train_dinov3.maps=0", "train_dinov3.schemes=grouped",
             "run.folds=2", "run.draws=0", "siglip.weights=tiny", "frozen.widths=64", "boosting.rounds=0.005"]
    run = open_run(source, folder / "out", "demo", "recipe", small)
    stages = (run_inpaint, run_train_dinov3, run_siglip, run_frozen, run_boosting, run_ensemble, run_submit)
    return run, [stage(run) for stage in stages]


def test_the_recipe_runs_from_photos_to_submission(recipe_run):
    run, (_, train, _, _, boost, blend, sent) = recipe_run
    assert train["model"] == "fine-tuned vit_twin_patch16_dinov3, neck mamba, head recipe"
    assert set(boost["features"]) == {"siglip", "siglip:semantic"}
    assert boost["features"]["siglip:semantic"] == 11
    assert blend["policy"]["rules_last"] and blend["weights"]["dinov3"] == [0.85, 0.85, 1.0, 0.85, 0.85]
    assert sent["models"] == {"dinov3": 4, "boosting": 4}
    assert len(pd.read_csv(run.output / "submission.csv")) == 20
    config = json.loads((run.artefacts / "dinov3" / "fold0.json").read_text())["config"]
    assert config["head"] == "recipe" and config["fusion"] == "mamba" and config["squeeze"]


def test_a_score_whose_fold_chose_the_epoch_is_called_optimistic(recipe_run):
    run, _ = recipe_run
    table = {"r2": 0.5, "interval_95": None, "r2_by_target": dict.fromkeys(TARGETS, 0.5), "photos": 9}
    scores = {"oof": {"dinov3": {"grouped": table}}, "constant": {"grouped": table}, "test": {}}
    assert "optimistic" in summarise_scores(scores | {"optimistic": is_optimistic(run)})
    assert "optimistic" not in summarise_scores(scores | {"optimistic": False})
    assert not is_optimistic(replace(run, settings=load_settings("laptop")))


def test_features_that_are_not_there_are_named(recipe_run):
    from nbs_lib.boosting import select_features

    run, _ = recipe_run
    section = replace(run.settings.boosting, features=("other",))
    odd = replace(run, settings=replace(run.settings, boosting=section), warnings=[])
    assert set(select_features(odd)) >= {"siglip", "frozen"}
    assert "boosting.features: no such features (other)" in odd.warnings[0]


def test_unknown_presets_are_refused():
    message = "unknown preset .recipe_v100.; settings.ini knows recipe, recipe_t4"
    with pytest.raises(InputError, match=message):
        load_settings("kaggle", "recipe_v100")
