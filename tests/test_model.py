"""32_biomass_net: weights that do not fit, heads and their density maps, adapters, checkpoints."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nbs_lib.backbones import Backbone, BackboneFeatures, pool_map, pooling_influence_map
from nbs_lib.biomass_net import (
    TARGETS_TO_PARTS,
    ModelConfig,
    build_model,
    fit_probe,
    load_model,
    parts_to_targets,
    save_model,
)
from nbs_lib.fold_training import split_groups
from nbs_lib.runtime import InputError
from nbs_lib.targets import QUADRAT_M2, SUMS, imbalance
from nbs_lib.weights import load_weights

VIT, CNN = "vit_twin_patch16_dinov3", "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return Backbone(VIT)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def write_weights(state: dict, form: str, path: Path) -> Path:
    "Write the same weights in one of several forms; return the path."
    if form == "safetensors":
        save_file(state, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    if form == "folder":
        save_file(state, path.parent / "model.safetensors")
        return path.parent
    forms = {
        "bare": state,
        "wrapped": {"state_dict": state, "epoch": 3},
        "prefixed": {f"module.{k}": v for k, v in state.items()},
        "classifier": {**state, "head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)},
    }
    torch.save(forms[form], path.with_suffix(".pth"))
    return path.with_suffix(".pth")


@pytest.mark.parametrize("form", ["safetensors", "folder", "bare", "wrapped", "prefixed", "classifier"])
def test_weights_load_from_every_layout(vit, form, tmp_path):
    state = {k: v.clone() for k, v in vit.net.state_dict().items()}
    other = Backbone(VIT)
    load_weights(other, str(write_weights(state, form, tmp_path / "w")))
    assert all(torch.equal(v, state[k]) for k, v in other.net.state_dict().items())


FAULTS = {
    "missing": "1 missing",
    "unexpected": "1 unexpected",
    "shape": "1 of another shape",
    "text": "not a weight file",
    "half": "not a weight file",
    "absent": "no such weight file",
    "empty": "train_dinov3.weights: is empty",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_are_described(vit, fault, tmp_path):
    state = {k: v.clone() for k, v in vit.net.state_dict().items()}
    key = "blocks.3.attn.qkv.weight"
    if fault == "missing":
        del state[key]
    if fault == "unexpected":
        state["blocks.99.attn.qkv.weight"] = torch.zeros(1)
    if fault == "shape":
        state[key] = state[key][:1]
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    if fault == "text":
        path.write_text("<!doctype html><title>403 Forbidden</title>")
    if fault == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if fault == "absent":
        path.unlink()
    before = {k: v.clone() for k, v in vit.net.state_dict().items()}
    with pytest.raises(InputError, match=FAULTS[fault]) as e:
        load_weights(vit, "" if fault == "empty" else str(path))
    assert "\n" not in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in vit.net.state_dict().items())


@pytest.mark.parametrize("backbone", [VIT, CNN])
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("order", ["panorama", "left_right"])
def test_the_mean_of_a_density_map_is_the_prediction(backbone, halves, order):
    config = ModelConfig(backbone, probe=False, dim=16, halves=halves, order=order, prefix=True)
    net = build_model(config).eval()
    net.init_output_from_labels(np.abs(np.random.default_rng(0).normal(20, 9, (9, 3))) @ SUMS.T)
    for part in net.head.parts:
        torch.nn.init.normal_(part[-1].weight)
    x = torch.randn(2, 2, 3, 64, 96)
    with torch.inference_mode():
        grams, picture = net(x), net.density(net.encode(x))
    assert picture.shape[-1] == 2 * picture.shape[-2] * 96 // 64
    torch.testing.assert_close(picture.mean((2, 3)) * QUADRAT_M2, grams, rtol=1e-4, atol=1e-4)
    assert np.abs(imbalance(parts_to_targets(grams.double()).numpy())).max() < 1e-9


def solve_probe(backbone: str):
    "Return a network that is a probe of two sizes, its training photos at each size, and their features."
    net = build_model(ModelConfig(backbone, probe_sizes=(96, 64), depths=3, head="none")).eval()
    large = torch.randn(12, 2, 3, 96, 160)
    small = torch.nn.functional.interpolate(large.flatten(0, 1), (64, 96), mode="area").unflatten(0, (12, 2))
    parts = np.abs(np.random.default_rng(0).normal(20, 9, (12, 3)))
    with torch.inference_mode():
        pooled = torch.cat([net.encode(x).pooled for x in (large, small)], 1)
        net.probe.solve(pooled.numpy(), parts @ SUMS.T, np.arange(12))
    return net, [large, small], pooled


@pytest.mark.parametrize("backbone, grid", [(CNN, (3, 10)), (VIT, (6, 20))])
def test_the_mean_of_a_probe_map_is_the_prediction_and_slopes_are_derivatives(backbone, grid):
    net, photos, pooled = solve_probe(backbone)
    with torch.inference_mode():
        grams, picture = net.probe(pooled), net.density(photos)
        assert picture.shape == (12, 3, *grid) and (picture >= 0).all()
        assert (picture.std((2, 3)) > 1e-3 * picture.mean((2, 3))).any()
        torch.testing.assert_close(picture.mean((2, 3)) * QUADRAT_M2, grams, rtol=1e-3, atol=1e-3)
        slopes = net.probe.slopes(pooled)
    inside = ((pooled.clone() - net.probe.mean) * net.probe.inv_sd) @ net.probe.weight + net.probe.bias
    inside = ((inside > 0) & (inside < net.probe.cap)).all(1) & (grams > 0).all(1)
    assert inside.sum() > 3
    x = pooled.clone().requires_grad_()
    for part in range(3):
        (real,) = torch.autograd.grad(net.probe(x)[:, part].sum(), x)
        torch.testing.assert_close(slopes[inside, :, part], real[inside], rtol=1e-3, atol=1e-6)


def test_a_pooled_head_makes_no_map():
    net = build_model(ModelConfig(CNN, probe=False, head="pooled", dim=8)).eval()
    message = r"train_dinov3.head: makes no map \(pooled\)"
    with torch.inference_mode(), pytest.raises(InputError, match=message):
        net.density(net.encode(torch.randn(1, 2, 3, 64, 64)))


def test_influence_of_a_place_is_the_change_if_it_counts_a_little_more():
    x, copies = torch.rand(1, 3, 4, 5, dtype=torch.float64) + 0.1, 400
    place = x[..., 2, 3][..., None]
    once, more = pool_map(x), pool_map(torch.cat([x.flatten(2).repeat(1, 1, copies), place], 2)[..., None])
    change = (more - once) * (copies * 20 + 1)
    keep = torch.arange(12) // 3 != 2  # a maximum has no influence function
    influence = pooling_influence_map(x)[..., 2, 3]
    torch.testing.assert_close((once + change)[:, keep], influence[:, keep], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("order", ["panorama", "left_right"])
def test_the_seam_is_where_the_halves_meet(order):
    "The right edge of the left half and the left edge of the right half are neighbouring columns of the map."
    net = build_model(ModelConfig(CNN, probe=False, dim=8, fusion="none", order=order)).eval()
    for part in net.head.parts:
        torch.nn.init.normal_(part[-1].weight)
    dark = BackboneFeatures(torch.zeros(1, 0), torch.zeros(1, 2, 1280, 4, 8), torch.zeros(1, 2, 0, 1280))
    lit = dark._replace(grid=dark.grid.clone())
    lit.grid[:, 0, :, :, -1], lit.grid[:, 1, :, :, 0] = torch.randn(1, 1280, 1), torch.randn(1, 1280, 1)
    with torch.inference_mode():
        change = (net.density(lit) - net.density(dark)).abs().amax((0, 1, 2))
    assert change.nonzero().flatten().tolist() == [7, 8]


@pytest.mark.parametrize("backbone", [VIT, "vit_tiny_patch16_224"])
def test_lora_starts_as_the_backbone_and_every_adapter_learns(backbone):
    torch.manual_seed(1)
    config = ModelConfig(backbone, probe=False, head="pooled", dim=8, lora=2)
    net = build_model(config).eval()
    plain = build_model(dataclasses.replace(config, lora=0)).eval()
    names = {k.replace("base_layer.", ""): v for k, v in net.state_dict().items() if "lora_" not in k}
    plain.load_state_dict(names)
    x = torch.randn(1, 2, 3, 64, 64)
    for head in (net.head, plain.head):
        for part in head.parts:
            torch.nn.init.ones_(part[-1].weight)
    torch.testing.assert_close(net(x), plain(x))
    net(x).sum().backward()
    grads = {n: p.grad for n, p in net.named_parameters() if "lora_B" in n}
    assert len(grads) == 12 * 4 and all(g is not None and g.abs().max() > 0 for g in grads.values())


def test_checkpointing_changes_no_gradient():
    net = build_model(ModelConfig(VIT, probe=False, head="density", dim=8)).train()
    for part in net.head.parts:
        torch.nn.init.ones_(part[-1].weight)
    x, grads = torch.randn(1, 2, 3, 64, 64), []
    for on in (False, True):
        net.backbone.net.set_grad_checkpointing(on)
        net.zero_grad()
        torch.manual_seed(5)
        net(x).sum().backward()
        grads.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any(n.startswith("backbone") for n in grads[0])
    for n in grads[0]:
        torch.testing.assert_close(grads[0][n], grads[1][n], rtol=1e-4, atol=1e-5)


def test_pieces_of_a_checkpoint_are_joined_and_a_missing_one_is_named(tmp_path):
    net = build_model(ModelConfig(VIT, probe=False, head="pooled", dim=8)).eval()
    for name, p in net.backbone.named_parameters():
        p.requires_grad_("blocks.11." in name)
    common = tmp_path / "backbone.safetensors"
    save_model(net, tmp_path / "fold0.safetensors", common)
    x = torch.randn(1, 2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / "fold0.safetensors")(x), net(x))
    common.unlink()
    with pytest.raises(InputError, match="backbone.safetensors: missing"):
        load_model(tmp_path / "fold0.safetensors")


def test_weights_of_another_architecture_are_refused(tmp_path):
    save_model(build_model(ModelConfig(CNN, probe=False, dim=8)), tmp_path / "fold0.safetensors")
    save_model(build_model(ModelConfig(CNN, probe=False, dim=16)), tmp_path / "fold1.safetensors")
    (tmp_path / "fold0.safetensors").write_bytes((tmp_path / "fold1.safetensors").read_bytes())
    with pytest.raises(InputError, match="another architecture"):
        load_model(tmp_path / "fold0.safetensors")


def test_held_out_predictions_of_the_probe_do_not_leak():
    "Features identify the photo: a probe that leaks would be right, else it is no better than a constant."
    rng = np.random.default_rng(0)
    y = np.abs(rng.normal(20, 10, (40, 3))) @ SUMS.T
    groups = np.arange(40) // 4
    _, held, _ = fit_probe(np.eye(40), y, groups)
    predicted = held @ SUMS.T
    assert ((y - predicted) ** 2).sum() > 0.9 * ((y - y.mean(0)) ** 2).sum()
    for train, out in split_groups(groups, 5, 0):
        assert not set(groups[train]) & set(groups[out])


def test_projection_is_orthogonal_and_exact_on_balanced_targets():
    parts = np.abs(np.random.default_rng(0).normal(size=(6, 3)))
    np.testing.assert_allclose(parts @ SUMS.T @ TARGETS_TO_PARTS.T, parts, atol=1e-12)
    both = SUMS @ TARGETS_TO_PARTS
    np.testing.assert_allclose(both, both.T, atol=1e-12)


def test_encoded_rows_and_halves_keep_their_order():
    grid = torch.arange(6.0).view(3, 2, 1, 1, 1)
    features = BackboneFeatures(torch.arange(3.0)[:, None], grid, torch.zeros(3, 2, 0, 1))
    assert features.rows(torch.tensor([2, 0])).pooled.flatten().tolist() == [2, 0]
    halves = features.halves_as_batch()
    assert halves.grid.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert halves.pooled.flatten().tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("head", ["pooled", "density"])
def test_a_plain_head_is_softplus_of_its_raw_output(head):
    net = build_model(ModelConfig(CNN, probe=False, head=head, dim=8, fusion="none")).eval()
    net.init_output_plain()
    encoded = BackboneFeatures(torch.zeros(2, 0), torch.randn(2, 2, 1280, 2, 3), torch.zeros(2, 2, 0, 1280))
    with torch.inference_mode():
        tokens = net.mix_tokens(encoded)
        tokens = tokens.mean(1, keepdim=True) if head == "pooled" else tokens
        raw = torch.cat([part(net.head.norm(tokens)) for part in net.head.parts], -1)
        wanted = torch.nn.functional.softplus(raw).mean(1)
        torch.testing.assert_close(net(encoded), wanted, rtol=1e-5, atol=1e-6)
    assert raw.abs().max() > 0.01
