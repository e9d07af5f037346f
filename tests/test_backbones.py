"""31_backbones: maps of many families of networks at any size, precision, memory, compilation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from nbs_lib import backbones
from nbs_lib.backbones import (
    POOLINGS,
    TINY_DINOV3,
    Backbone,
    BackboneFeatures,
    choose_depths,
    compile_encoder,
    concat_features,
    hash_network,
    load_backbone,
    pool_features,
    run_autocast,
    to_final_map,
)
from nbs_lib.runtime import InputError

# Families whose final maps have different forms: behind a head convolution (EfficientNet), unchanged (ResNet,
# ConvNeXt), channels last and normalised (Swin), tokens with and without a class token (ViT).
FAMILIES = (
    "tf_efficientnet_lite0",
    "resnet18",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
    "vit_base_patch16_siglip_224",
    TINY_DINOV3,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    return {name: Backbone(name, 2).eval() for name in FAMILIES}


def as_map(net: Backbone, features: Tensor, shape: torch.Size) -> Tensor:
    "Reshape the output of `forward_features` to (B, C, h, w), in another way than the library."
    if features.ndim == 3:
        features = features[:, net.prefix_tokens :].transpose(1, 2).unflatten(2, tuple(shape[-2:]))
    return features if features.shape == shape else features.movedim(-1, 1)


@pytest.mark.parametrize("name", FAMILIES)
@hypothesis_settings(max_examples=4, deadline=None)
@given(st.integers(2, 4), st.integers(2, 4), st.integers(1, 2), st.integers(0, 2**16))
def test_the_final_map_is_what_the_classifier_would_pool(nets, name, rows, columns, batch, seed):
    net = nets[name]
    side = 32 if 32 % net.stride == 0 else net.stride
    x = torch.randn(batch, 3, rows * side, columns * side, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        maps, prefix = net.encode(x)
        called, final = net(x), as_map(net, net.net.forward_features(x), maps[-1].shape)
    torch.testing.assert_close(maps[-1], final, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(called, maps, strict=True)), "a call gives the maps alone"
    assert [m.shape[1] for m in maps] == net.channels and prefix.shape == (
        batch,
        net.prefix_tokens,
        net.channels[-1],
    )
    assert all(m.shape[0] == batch and m.shape[2] * columns == m.shape[3] * rows for m in maps), (
        "places keep the proportions"
    )
    assert maps[-1].shape[-2:] == (rows * side // net.stride, columns * side // net.stride)


@pytest.mark.parametrize("name", FAMILIES)
def test_depths_count_back_from_the_final_map(nets, name):
    torch.manual_seed(0)
    deeper = Backbone(name, 3).eval()
    deeper.load_state_dict(nets[name].state_dict())
    with torch.inference_mode():
        x = torch.randn(1, 3, 64, 96)
        few, more = nets[name](x), deeper(x)
    assert torch.equal(few[-1], more[-1]) and len(few) == 2 and len(more) == 3
    sizes = [m.shape[-1] for m in more]
    assert sizes == sorted(sizes, reverse=True), "shallow to deep"
    if sizes[0] > sizes[-1]:  # stage by stage: the same maps, one more in front
        assert torch.equal(few[0], more[1])


@given(st.integers(1, 40), st.data())
def test_depths_of_one_size_are_spread_evenly_and_end_with_the_last(count, data):
    depths = data.draw(st.integers(1, count))
    chosen = choose_depths([{"reduction": 16}] * count, depths)
    assert len(chosen) == depths and chosen[-1] == count - 1 and chosen == sorted(set(chosen))
    gaps = np.diff([-1, *chosen])
    assert gaps.max() - gaps.min() <= 1
    assert choose_depths([{"reduction": 2**i} for i in range(count)], depths) == list(
        range(count - depths, count)
    )


def test_a_map_is_recognised_in_each_form():
    last, final = torch.randn(2, 6, 3, 5), torch.randn(2, 6, 3, 5)
    tokens = final.flatten(2).mT
    for form in (final, final.permute(0, 2, 3, 1), tokens, torch.cat([torch.randn(2, 4, 6), tokens], 1)):
        assert torch.equal(to_final_map(form, last), final)
    for odd in (torch.randn(2, 7, 3, 5), torch.randn(2, 9, 6), torch.randn(2, 15, 7)):
        assert to_final_map(odd, last) is last


@pytest.mark.parametrize(
    "name, message",
    [
        ("vit_enormous", "has no such model; near: "),
        ("efficientvit_b0", "without pooling"),
        ("resnet18", "has 5 depths, not 6"),
    ],
)
def test_a_network_that_cannot_be_built_raises_one_line(name, message):
    with pytest.raises(InputError, match=message) as e:
        Backbone(name, 6)
    assert "\n" not in str(e.value) and f"backbone '{name}'" in str(e.value)


def test_a_loaded_backbone_is_frozen_and_stays_in_eval_mode():
    net = load_backbone("resnet18", "random", 2)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    net.train()
    assert not any(m.training for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    before = hash_network(net)
    with torch.inference_mode():
        net(torch.randn(2, 3, 64, 64))
    assert hash_network(net) == before, "no batch statistics are learned"


def test_a_hash_of_a_network_depends_on_its_numbers_only():
    net = Backbone(TINY_DINOV3)
    before = hash_network(net)
    assert hash_network(net.half()) != before and hash_network(net.float()) != before, (
        "half precision lost digits"
    )
    again = hash_network(net)
    assert (
        hash_network(net.half().float())
        == again
        == hash_network(net.double().float())
        == hash_network(net.requires_grad_(False))
    )


def test_rows_halves_and_joins_keep_their_order():
    one = BackboneFeatures(
        torch.arange(3.0)[:, None], torch.arange(6.0).view(3, 2, 1, 1, 1), torch.zeros(3, 2, 0, 1)
    )
    two = concat_features([one.rows([2]), one.rows([0, 1])])
    assert two.pooled.flatten().tolist() == [2, 0, 1] and two.grid.flatten().tolist() == [4, 5, 0, 1, 2, 3]
    assert one.halves_as_batch().grid.flatten().tolist() == [0, 1, 2, 3, 4, 5]


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_pooling_ignores_the_order_of_places(seed, photos, rows, columns):
    torch.manual_seed(seed)
    maps, prefix = [torch.randn(2 * photos, 4, rows, columns)], torch.randn(2 * photos, 2, 4)
    pooled = pool_features(maps, prefix, tuple(POOLINGS))
    swapped = [m.unflatten(0, (photos, 2)).flip(1).flip(-1).flip(-2).flatten(0, 1) for m in maps]
    assert pooled.shape == (photos, 4 * 4 + 4)
    torch.testing.assert_close(pool_features(swapped, prefix, tuple(POOLINGS)), pooled, rtol=1e-5, atol=1e-5)


def test_an_overflow_is_computed_again_in_float32(monkeypatch):
    monkeypatch.setattr(backbones, "pick_dtype", lambda device: torch.bfloat16)
    net, calls = torch.nn.Linear(4, 4), []

    def work():
        out = net(torch.ones(1, 4))
        calls.append(out.dtype)
        return (out if len(calls) > 1 else out * torch.inf,)

    (out,) = run_autocast(net, CPU, work)
    assert out.isfinite().all() and calls == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("out"), RuntimeError("DefaultCPUAllocator: not enough memory")],
)
def test_out_of_memory_names_the_settings(error):
    def work():
        raise error

    with pytest.raises(InputError, match="halve batch") as e:
        run_autocast(torch.nn.Identity(), CPU, work)
    assert e.value.__cause__ is error
    with pytest.raises(RuntimeError, match="^shapes do not fit$"):
        run_autocast(
            torch.nn.Identity(), CPU, lambda: (_ for _ in ()).throw(RuntimeError("shapes do not fit"))
        )


@pytest.mark.parametrize(
    "fault, message", [("raises", "RuntimeError: no compiler"), ("differs", "its maps differ by")]
)
def test_a_failing_compiler_costs_one_warning(nets, fault, message, monkeypatch):
    def compile(work, **more):
        if fault == "raises":
            raise RuntimeError("no compiler\nfound in PATH")
        return lambda x: ([m + 0.1 for m in work(x)[0]], work(x)[1])

    net, warned = nets["resnet18"], []
    monkeypatch.setattr(torch, "compile", compile)
    assert compile_encoder(net, torch.randn(2, 3, 64, 64), warned.append) == net.encode
    assert (
        len(warned) == 1
        and warned[0].startswith("run.compile: the backbone is not compiled")
        and message in warned[0]
        and "\n" not in warned[0]
    )


def test_a_network_is_compiled_only_for_enough_photos(nets, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda work, **more: (compiled.append(more), work)[1])
    store = np.random.default_rng(0).integers(0, 255, (3, 2, 64, 64, 3), dtype=np.uint8)
    many = int(backbones.COMPILE_PIXELS / (2 * 64 * 64)) + 1
    for expected, calls in ((0, 0), (many - 1, 0), (many, 1)):
        compiled.clear()
        extractor = backbones.FeatureExtractor(
            nets["resnet18"], (0.5,) * 3, (0.5,) * 3, None, CPU, pytest.fail, expected=expected
        )
        for view in ("id", "H"):
            extractor.extract(store, range(3), (64, 64), view)
        assert len(compiled) == calls, "once for a shape"
