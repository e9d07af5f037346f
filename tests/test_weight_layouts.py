"""29_weights: one DINOv3 in every published layout loads, or is refused with a helpful message."""

import copy
import json
import re
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import timm
import tiny
import torch
from safetensors.torch import load_file, save_file
from timm.models import register_model

from nbs_lib import eda, frozen, inpaint, train_dinov3, weights
from nbs_lib.backbones import Backbone
from nbs_lib.biomass_net import ModelConfig, build_model, save_model
from nbs_lib.runtime import InputError, hash_file, read_json
from nbs_lib.settings import load_settings
from nbs_lib.stages import is_fresh
from nbs_lib.weights import build_header, files_of, find_weights, fits_backbone, load_weights

WIDTH, DEPTH = 128, 2
SMALL = {"embed_dim": WIDTH, "num_heads": 2, "depth": DEPTH}
MLPS = ("", "_plus")  # plain, SwiGLU


def register(kind: str, biases: str) -> None:
    "Register vit_nano…: timm's DINOv3 S of this kind, narrower and with two blocks."

    def make(pretrained: bool = False, **kwargs):
        return timm.create_model(f"vit_small{kind}_patch16_dinov3{biases}", **{**SMALL, **kwargs})

    make.__name__ = f"vit_nano{kind}_patch16_dinov3{biases}"
    register_model(make)


for kind in MLPS:
    for biases in ("", "_qkvb"):
        register(kind, biases)


def make_reference(kind: str, biases: bool = False):
    "Build a random DINOv3 of transformers, the reference for every layout."
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        hidden_size=WIDTH,
        num_attention_heads=2,
        num_hidden_layers=DEPTH,
        intermediate_size=4 * WIDTH,
        use_gated_mlp=bool(kind),
        hidden_act="silu" if kind else "gelu",
        num_register_tokens=4,
    )
    torch.manual_seed(0)
    net = DINOv3ViTModel(config).eval()
    for key, p in net.named_parameters():
        p.data.normal_(0, 0.2).mul_(biases or ("q_proj.bias" not in key and "v_proj.bias" not in key))
    return net


@pytest.fixture(scope="module", params=MLPS, ids=["plain", "swiglu"])
def reference(request, tmp_path_factory):
    "Return kind of MLP, model of transformers, its state dict as in files, and the same under timm's names."
    net, folder = make_reference(request.param), tmp_path_factory.mktemp("transformers")
    net.save_pretrained(folder)
    theirs = load_file(folder / "model.safetensors")
    assert (
        "layer.0.attention.q_proj.weight" in theirs and "embeddings.cls_token" in theirs
    )  # as the published files
    return request.param, net, theirs, to_timm(theirs)


def to_timm(theirs: dict) -> dict:
    "Rename transformers' tensors to timm's by hand, with biases of q, k and v only if they are not zero."
    swiglu, out = any("gate_proj" in key for key in theirs), {}
    for old, new in (
        ("cls_token", "cls_token"),
        ("register_tokens", "reg_token"),
        ("patch_embeddings.weight", "patch_embed.proj.weight"),
        ("patch_embeddings.bias", "patch_embed.proj.bias"),
    ):
        out[new] = theirs[f"embeddings.{old}"]
    for i in range(DEPTH):
        block = {
            key.removeprefix(f"layer.{i}."): value
            for key, value in theirs.items()
            if key.startswith(f"layer.{i}.")
        }
        new = {
            "attn.qkv.weight": torch.cat([block[f"attention.{p}_proj.weight"] for p in "qkv"]),
            "gamma_1": block["layer_scale1.lambda1"],
            "gamma_2": block["layer_scale2.lambda1"],
        }
        new |= {
            f"attn.{p}_bias": block[f"attention.{p}_proj.bias"]
            for p in "qv"
            if block[f"attention.{p}_proj.bias"].any()
        }
        for part in ("weight", "bias"):
            new |= {
                f"attn.proj.{part}": block[f"attention.o_proj.{part}"],
                f"mlp.fc2.{part}": block[f"mlp.down_proj.{part}"],
            }
            new |= {f"norm{n}.{part}": block[f"norm{n}.{part}"] for n in (1, 2)}
            new |= (
                {
                    f"mlp.fc1_g.{part}": block[f"mlp.gate_proj.{part}"],
                    f"mlp.fc1_x.{part}": block[f"mlp.up_proj.{part}"],
                }
                if swiglu
                else {f"mlp.fc1.{part}": block[f"mlp.up_proj.{part}"]}
            )
        out |= {f"blocks.{i}.{key}": value for key, value in new.items()}
    return out | {f"norm.{part}": theirs[f"norm.{part}"] for part in ("weight", "bias")}


def to_meta(state: dict, mask: float = 0.0) -> dict:
    "Rename timm's tensors to Meta's; q, k and v have one bias and its mask (all 0 in published files)."
    swiglu = any("fc1_g" in key for key in state)
    out = {"mask_token": torch.zeros(1, WIDTH), "rope_embed.periods": torch.ones(16)}
    for key, value in state.items():
        if not re.search(r"[qkv]_bias$", key):
            for old, new in (
                ("gamma_1", "ls1.gamma"),
                ("gamma_2", "ls2.gamma"),
                ("reg_token", "storage_tokens"),
                ("fc1_g", "w1"),
                ("fc1_x", "w2"),
                ("mlp.fc2", "mlp.w3" if swiglu else "mlp.fc2"),
            ):
                key = key.replace(old, new)
            out[key] = value
    zero = torch.zeros(WIDTH)
    for i in range(DEPTH):
        out[f"blocks.{i}.attn.qkv.bias"] = torch.cat(
            [state.get(f"blocks.{i}.attn.{p}_bias", zero) for p in "qkv"]
        )
        out[f"blocks.{i}.attn.qkv.bias_mask"] = torch.full((3 * WIDTH,), mask)
    return out


def to_qkvb(state: dict) -> dict:
    return state | {f"blocks.{i}.attn.{p}_bias": torch.zeros(WIDTH) for i in range(DEPTH) for p in "qv"}


def write(folder: Path, layout: str, net, theirs: dict, ours: dict) -> Path:
    "Write one layout; return its file or folder."
    head = {"head.weight": torch.zeros(10, WIDTH), "head.bias": torch.zeros(10)}
    states = {
        "timm.pth": ours,
        "timm.bin": ours,
        "timm.pt": ours,
        "classifier.pth": ours | head,
        "qkvb.pth": to_qkvb(ours),
        "meta.pth": to_meta(ours),
        "meta7b.pth": {k: v for k, v in to_meta(ours).items() if "qkv.bias" not in k},
        "meta-teacher.pth": {
            "teacher": {f"backbone.{k}": v for k, v in to_meta(ours).items()}
            | {"dino_head.mlp.0.weight": torch.zeros(1), "ibot_head.mlp.0.weight": torch.zeros(1)},
            "iteration": 7,
        },
        "transformers.pth": theirs,
        "loaded.pth": net.state_dict(),  # as transformers 5 names them in memory
        **{f"{w}.pth": {w: ours, "epoch": 3} for w in ("state_dict", "model_state_dict", "model", "teacher")},
        **{
            f"{p}pth": {p + k: v for k, v in ours.items()}
            for p in ("module.", "backbone.", "_orig_mod.", "module.backbone.", "timm_model.")
        },
    }
    if layout in states:
        torch.save(states[layout], folder / layout)
        return folder / layout
    if layout == "legacy.pth":  # of torch before 1.6: no zip archive
        torch.save(ours, folder / layout, _use_new_zipfile_serialization=False)
        return folder / layout
    if layout == "timm.safetensors":
        save_file(ours, folder / layout)
        return folder / layout
    net.save_pretrained(folder, max_shard_size="300KB" if "sharded" in layout else "1GB")
    if layout == "folder.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    if layout == "both":  # as many repositories of transformers have it
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(b"\x80\x04junk") if layout != "file" else None
    name = {"file": "model.safetensors", "index": "model.safetensors.index.json"}.get(layout.split()[-1], "")
    return folder / name


LAYOUTS = (
    "timm.safetensors",
    "timm.pth",
    "timm.bin",
    "timm.pt",
    "legacy.pth",
    "classifier.pth",
    "qkvb.pth",
    "meta.pth",
    "meta7b.pth",
    "meta-teacher.pth",
    "transformers.pth",
    "loaded.pth",
    "folder",
    "file",
    "both",
    "sharded folder",
    "sharded index",
    "folder.bin",
    "state_dict.pth",
    "model_state_dict.pth",
    "model.pth",
    "teacher.pth",
    "module.pth",
    "backbone.pth",
    "_orig_mod.pth",
    "module.backbone.pth",
    "timm_model.pth",
)


@torch.inference_mode()
def difference(net: Backbone, reference, shape=(1, 3, 64, 96)) -> float:
    "Return the largest difference from the last map and prefix tokens of transformers."
    photo = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    maps, prefix = net.eval().encode(photo)
    tokens = torch.cat([prefix, maps[-1].flatten(2).transpose(1, 2)], 1)
    wanted = reference.eval()(photo).last_hidden_state
    assert wanted.std() > 0.1
    return (tokens - wanted).abs().max().item()


@pytest.mark.parametrize("variant", ["", "_qkvb"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_features(reference, layout, variant, tmp_path):
    kind, net, theirs, ours = reference
    name = f"vit_nano{kind}_patch16_dinov3{variant}"
    path, backbone = write(tmp_path, layout, net, theirs, ours), Backbone(name)
    load_weights(backbone, str(path))
    assert difference(backbone, net) < 1e-5
    assert Path(find_weights(str(path), name, load_settings("kaggle").kaggle)).is_file()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["timm.safetensors", "qkvb.pth", "meta.pth", "folder"])
def test_half_precision_loads_into_float32(reference, layout, dtype, tmp_path):
    kind, net, theirs, ours = reference
    path = write(
        tmp_path, layout, copy.deepcopy(net).to(dtype), theirs, {k: v.to(dtype) for k, v in ours.items()}
    )
    backbone = Backbone(f"vit_nano{kind}_patch16_dinov3")
    load_weights(backbone, str(path))
    state = backbone.net.state_dict()
    assert {v.dtype for v in state.values()} == {torch.float32}
    assert all(torch.equal(state[k], v.to(dtype).float()) for k, v in ours.items())


@pytest.mark.parametrize("layout", ["qkvb", "meta", "transformers"])
@pytest.mark.parametrize("kind", MLPS)
def test_biases_that_are_not_zero_need_the_qkvb_variant(kind, layout, tmp_path):
    net = make_reference(kind, biases=True)
    net.save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    ours = to_timm(theirs)
    torch.save(
        {"qkvb": ours, "meta": to_meta(ours, mask=1.0), "transformers": theirs}[layout], tmp_path / "w.pth"
    )
    with pytest.raises(
        InputError, match=f"q/k/v biases.*set frozen.backbone = vit_nano{kind}_patch16_dinov3_qkvb$"
    ):
        load_weights(Backbone(f"vit_nano{kind}_patch16_dinov3"), str(tmp_path / "w.pth"), "frozen.weights")
    backbone = Backbone(f"vit_nano{kind}_patch16_dinov3_qkvb")
    load_weights(backbone, str(tmp_path / "w.pth"))
    assert difference(backbone, net) < 1e-5


def test_a_masked_bias_counts_as_zero_and_a_bias_of_the_keys_fits_nothing(reference, tmp_path):
    kind, net, _, ours = reference
    state = to_meta(ours)
    state["blocks.0.attn.qkv.bias"] += 1
    torch.save(state, tmp_path / "masked.pth")
    backbone = Backbone(f"vit_nano{kind}_patch16_dinov3")
    load_weights(backbone, str(tmp_path / "masked.pth"))
    assert difference(backbone, net) < 1e-5
    state["blocks.0.attn.qkv.bias_mask"] += 1
    torch.save(state, tmp_path / "keys.pth")
    for variant in ("", "_qkvb"):
        with pytest.raises(InputError, match="k_bias.*is train_dinov3.backbone the right model"):
            load_weights(Backbone(f"vit_nano{kind}_patch16_dinov3{variant}"), str(tmp_path / "keys.pth"))


@pytest.mark.parametrize("layout", ["timm.pth", "meta.pth", "folder"])
def test_a_misfit_is_described_by_layout_architecture_and_timm_name(reference, layout, tmp_path, capsys):
    kind, net, theirs, ours = reference
    path = write(tmp_path, layout, net, theirs, ours)
    capsys.readouterr()
    with pytest.raises(InputError) as e:
        load_weights(Backbone("vit_twin_patch16_dinov3"), str(path))
    owner = {"timm.pth": "timm's", "meta.pth": "Meta's", "folder": "transformers'"}[layout]
    swiglu = ", SwiGLU" if kind else ""
    described = f"({owner} layout, a ViT of width 128, depth 2, patch 16{swiglu}) does not fit "
    wanted = "this backbone (timm's layout, a ViT of width 192, depth 12, patch 16): "
    assert str(e.value).startswith("train_dinov3.weights: ") and described + wanted in str(e.value)
    assert str(e.value).endswith(
        f"set train_dinov3.backbone = vit_nano{kind}_patch16_dinov3 or vit_nano{kind}_patch16_dinov3_qkvb"
    )
    assert capsys.readouterr() == ("", "")  # timm's filter prints what it drops


@pytest.mark.slow
def test_the_real_huge_plus_is_recognised_by_its_header(tmp_path):
    "The 3.4 GB file is sparse and must not be read."
    sizes, offset = {}, 0
    for key, value in build_header("vit_huge_plus_patch16_dinov3").state_dict().items():
        sizes[key] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [offset, offset := offset + 4 * value.numel()],
        }
    head = json.dumps(sizes).encode()
    with open(tmp_path / "dinov3.safetensors", "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        f.truncate(8 + len(head) + offset)
    assert offset > 3.3e9
    before = psutil.Process().memory_info().rss
    assert fits_backbone(tmp_path / "dinov3.safetensors", build_header("vit_huge_plus_patch16_dinov3"))
    wanted = "width 1280, depth 32, patch 16, SwiGLU.*backbone = vit_huge_plus_patch16_dinov3 or "
    with pytest.raises(InputError, match=wanted):
        load_weights(Backbone("vit_twin_patch16_dinov3"), str(tmp_path / "dinov3.safetensors"))
    assert psutil.Process().memory_info().rss - before < 0.6e9


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        ("timm.pth", "blocks.1.mlp.fc2.weight"),
        ("meta.pth", "blocks.1.mlp.w2.weight"),
        ("transformers.pth", "layer.1.attention.k_proj.weight"),
        ("qkvb.pth", "blocks.1.attn.v_bias"),
    ],
)
def test_one_lost_tensor_is_an_error_and_changes_nothing(layout, key, tmp_path):
    net = make_reference("_plus")
    net.save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    path = write(tmp_path, layout, net, theirs, to_timm(theirs))
    state = torch.load(path, weights_only=True)
    del state[key]
    torch.save(state, path)
    backbone = Backbone(f"vit_nano_plus_patch16_dinov3{'_qkvb' if layout == 'qkvb.pth' else ''}")
    before = {k: v.clone() for k, v in backbone.net.state_dict().items()}
    with pytest.raises(InputError, match="missing"):
        load_weights(backbone, str(path))
    assert all(torch.equal(v, before[k]) for k, v in backbone.net.state_dict().items())


@pytest.mark.parametrize("change", [dict, to_meta])
def test_patches_of_another_size_are_not_resampled(change, tmp_path):
    other = timm.create_model("vit_small_patch16_dinov3", patch_size=8, num_classes=0, **SMALL)
    torch.save(change(other.state_dict()), tmp_path / "w.pth")
    with pytest.raises(InputError, match="patch 8.*1 of another shape"):
        load_weights(Backbone("vit_nano_patch16_dinov3"), str(tmp_path / "w.pth"))


def test_metas_dinov2_loads_too(tmp_path):
    "The filter of timm is found beside any model's class, not only DINOv3's."
    ours = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, depth=1).state_dict()
    theirs = {k.replace("reg_token", "register_tokens"): v.clone() for k, v in ours.items()} | {
        "mask_token": torch.zeros(1, 384)
    }
    theirs["cls_token"] = theirs["cls_token"] * 1
    grid, theirs["pos_embed"] = ours["pos_embed"], torch.cat([torch.zeros(1, 1, 384), ours["pos_embed"]], 1)
    torch.save(theirs, tmp_path / "dinov2.pth")
    net = type(
        "Holder", (), {"net": timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, depth=1)}
    )
    load_weights(net, str(tmp_path / "dinov2.pth"))
    assert torch.equal(net.net.state_dict()["pos_embed"], grid)


# --- files that must not be loaded


@pytest.mark.parametrize("form", ["module", "wrapped", "with numbers"])
def test_a_pickled_module_is_refused_with_the_command_that_extracts_it(form, tmp_path, monkeypatch):
    net = timm.create_model("vit_small_patch16_dinov3", num_classes=0, **SMALL)
    held = {
        "module": net,
        "wrapped": {"model": net, "epoch": 1},
        "with numbers": {"state_dict": net.state_dict(), "best": np.float64(0.7)},
    }[form]
    torch.save(held, tmp_path / "w.pth")
    backbone = Backbone("vit_nano_patch16_dinov3")
    with pytest.raises(InputError, match="holds pickled code .*if you trust it") as e:
        load_weights(backbone, str(tmp_path / "w.pth"))
    command = str(e.value).partition("name that: ")[2]
    assert command.startswith("python -c ")
    program, flag, code = shlex.split(command)  # as a shell reads it; run here, without a new interpreter
    assert (program, flag) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    load_weights(backbone, str(tmp_path / "w_state_dict.pth"))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in backbone.net.state_dict().items())


def test_code_in_an_archive_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Evil()}, tmp_path / "w.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    for name in ("w.pth", "script.pt"):
        with pytest.raises(InputError, match="holds pickled code"):
            load_weights(Backbone("vit_nano_patch16_dinov3"), str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04junk",
        b"<!doctype html><title>403</title>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
        bytes(range(256)) * 40,
        b"PK\x03\x04" + bytes(99),
    ],
    ids=["empty", "pickle", "page", "pointer", "bytes", "zip"],
)
@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.safetensors"])
def test_other_files_are_refused_in_one_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^frozen.weights: .*{name}: not a weight file") as e:
        load_weights(Backbone("vit_nano_patch16_dinov3"), str(tmp_path / name), "frozen.weights")
    assert "\n" not in str(e.value)


def trained(form: str, folder: Path) -> Path:
    "Save a whole biomass model as the recipe does, in several wrappers, or as this suite does."
    if form == "ours":
        save_model(
            build_model(ModelConfig("vit_nano_patch16_dinov3", probe=False, dim=16)),
            folder / "fold0.safetensors",
        )
        return folder / "fold0.safetensors"
    state = {
        f"backbone.{k}": v
        for k, v in timm.create_model("vit_small_patch16_dinov3", num_classes=0, **SMALL).state_dict().items()
    }
    state |= {
        "fusion.0.norm.weight": torch.zeros(2),
        "head_green.0.weight": torch.zeros(2, 2),
        "head_total.0.bias": torch.zeros(2),
    }
    if form == "no prefix":
        state = {k.removeprefix("backbone."): v for k, v in state.items()}
    if form == "fusion alone":
        state = {k: v for k, v in state.items() if not k.startswith("head_")}
    torch.save(
        {
            "plain": state,
            "parallel": {f"module.{k}": v for k, v in state.items()},
            "wrapped": {"model_state_dict": state},
        }.get(form, state),
        folder / "best_model_fold0.pth",
    )
    return folder / "best_model_fold0.pth"


@pytest.mark.parametrize("form", ["plain", "parallel", "wrapped", "no prefix", "fusion alone", "ours"])
def test_a_trained_biomass_model_is_no_pretrained_backbone(form, tmp_path):
    path = trained(form, tmp_path)
    with pytest.raises(InputError, match="frozen.weights: .* whole trained model .*scores would .*leak"):
        load_weights(Backbone("vit_nano_patch16_dinov3"), str(path), "frozen.weights")
    assert not fits_backbone(path, build_header("vit_nano_patch16_dinov3"))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("", "frozen.weights: is empty"),
        ("wheel:x", "frozen.weights: wheel:x is unknown"),
        ("wheel:efficientnet_lite0", "frozen.weights: .*set frozen.backbone = tf_efficientnet_lite0"),
        ("no/such.pth", "frozen.weights: no/such.pth: there is no such weight file"),
    ],
)
def test_a_message_names_the_setting_that_was_read(weights, message):
    with pytest.raises(InputError, match=message):
        load_weights(Backbone("vit_nano_patch16_dinov3"), weights, "frozen.weights")


# --- shards


@pytest.fixture
def sharded(tmp_path):
    make_reference("").save_pretrained(tmp_path / "model", max_shard_size="300KB")
    return tmp_path / "model"


def test_a_missing_shard_and_a_broken_index_are_named(sharded):
    shard, index = sorted(sharded.glob("model-*.safetensors"))[-1], sharded / "model.safetensors.index.json"
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name}: there is no such weight file"):
        load_weights(Backbone("vit_nano_patch16_dinov3"), str(sharded))
    index.write_text("{}")
    with pytest.raises(InputError, match="no weight_map"):
        load_weights(Backbone("vit_nano_patch16_dinov3"), str(index))


def test_every_shard_counts_for_a_manifest_and_for_a_trained_fold(sharded):
    index, shards = sharded / "model.safetensors.index.json", sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2 and files_of(
        str(sharded), "vit_nano_patch16_dinov3", load_settings("kaggle").kaggle
    ) == [index, *shards]
    before = train_dinov3.weights_key(str(index))
    state = load_file(shards[-1])
    save_file({k: v + 1 for k, v in state.items()}, shards[-1], {"format": "pt"})
    assert (
        train_dinov3.weights_key(str(index)) != before
        and train_dinov3.weights_key(str(shards[0])) == hash_file(shards[0])
        and train_dinov3.weights_key("random") == "random"
    )


# --- in a Kaggle kernel


KAGGLE = load_settings("kaggle").kaggle
OWN = f"datasets/{KAGGLE.username}/{KAGGLE.dinov3_dataset}"
MOUNTS = (
    OWN,
    KAGGLE.dinov3_dataset,
    "datasets/someone/dino",
    "dino",
    "models/facebook/dinov3/pyTorch/vits16/1",
    "dinov3/pyTorch/vits16/2",
    "notebooks/someone/download",
)
find = partial(find_weights, kaggle=KAGGLE)


def put(root: Path, place: str, kind: str = "", change=dict, name: str = "model.safetensors") -> Path:
    path = root / place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    state = change(timm.create_model(f"vit_nano{kind}_patch16_dinov3", num_classes=0).state_dict())
    save_file(state, path) if name.endswith(".safetensors") else torch.save(state, path)
    return path


@pytest.mark.parametrize("mount", MOUNTS)
@pytest.mark.parametrize("name", ["model.safetensors", "sub/dinov3_vits16_pretrain-08c60483.pth"])
def test_attached_weights_are_found_whatever_their_name(mount, name, tmp_path, capsys):
    path = put(tmp_path, mount, change=to_meta if name.endswith("pth") else dict, name=name)
    put(tmp_path, "datasets/someone/plus", "_plus")
    (tmp_path / "competitions/csiro-biomass").mkdir(parents=True)
    assert find("vit_huge.safetensors", "vit_nano_patch16_dinov3", root=tmp_path) == str(path)
    line = f"vit_huge.safetensors is not attached; {path} fits vit_nano_patch16_dinov3 and is used"
    assert capsys.readouterr().out == f"train_dinov3.weights: {line}\n"
    backbone = Backbone("vit_nano_patch16_dinov3")
    load_weights(backbone, str(path))


def test_a_folder_of_transformers_is_found(tmp_path):
    for place, size in (("whole", "1GB"), ("shards", "300KB")):
        root = tmp_path / place
        make_reference("").save_pretrained(
            root / "models/facebook/dinov3/transformers/vits16/1", max_shard_size=size
        )
        assert Path(find("x", "vit_nano_patch16_dinov3", root=root)).name == (
            "model.safetensors" if place == "whole" else "model.safetensors.index.json"
        )


def test_the_named_path_comes_first_then_the_own_dataset(tmp_path, capsys):
    own, other = put(tmp_path, OWN), put(tmp_path, "datasets/someone/dino", name="vit.safetensors")
    assert find("x.pth", "vit_nano_patch16_dinov3", root=tmp_path) == str(own)
    capsys.readouterr()
    for wanted in (
        "vit.safetensors",
        "dino",
        "someone/dino",
        "dino/vit.safetensors",
        "/kaggle/input/dino/vit.safetensors",
    ):
        assert find(wanted, "vit_nano_patch16_dinov3", root=tmp_path) == str(other)
    assert capsys.readouterr().out == ""
    assert find("vit.safetensors", "vit_twin_patch16_dinov3", root=tmp_path) == str(
        other
    )  # and load_weights describes it
    put(tmp_path, "datasets/other/dino", "_plus", name="vit.safetensors")
    assert find("vit.safetensors", "vit_nano_plus_patch16_dinov3", root=tmp_path) == str(
        tmp_path / "datasets/other/dino/vit.safetensors"
    )


def test_several_that_fit_or_none_are_listed(tmp_path):
    paths = [
        put(tmp_path, f"datasets/someone/{name}", change=change)
        for name, change in (("lvd", dict), ("sat", to_meta))
    ]
    with pytest.raises(InputError, match="2 of 2 weight files fit this backbone; name one: ") as e:
        find("x.pth", "vit_nano_patch16_dinov3", root=tmp_path, where="frozen.weights")
    assert str(e.value).startswith("frozen.weights: x.pth is not attached") and all(
        str(p) in str(e.value) for p in paths
    )
    with pytest.raises(InputError, match="none of 2 weight files fit this backbone") as e:
        find("x.pth", "vit_nano_plus_patch16_dinov3", root=tmp_path)
    assert "Meta's layout, a ViT of width 128, depth 2, patch 16, vit_nano_patch16_dinov3" in str(e.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is not attached; .* holds no weights"):
        find("x.pth", "vit_nano_patch16_dinov3", root=tmp_path / "empty")


def test_trained_folds_and_other_models_are_passed_over(tmp_path):
    "Outputs of the training kernel are attached too, and SigLIP or anything else may be."
    folds = tmp_path / "notebooks/someone/train/artefacts/dinov3"
    folds.mkdir(parents=True)
    net = build_model(ModelConfig("vit_nano_patch16_dinov3", probe=False, dim=16))
    net.backbone.requires_grad_(False)
    save_model(net, folds / "fold0.safetensors", folds / "backbone_abc.safetensors")
    torch.save({"step": 1}, folds / "state.pt")
    (tmp_path / "datasets/someone/table").mkdir(parents=True)
    (tmp_path / "datasets/someone/table/numbers.bin").write_bytes(bytes(range(256)))
    path = put(tmp_path, "models/facebook/dinov3/pyTorch/vits16/1")
    put(tmp_path, "competitions/csiro-biomass")
    assert find("x.pth", "vit_nano_patch16_dinov3", root=tmp_path) == str(path)


def test_a_folder_with_several_models_gives_the_one_that_fits(tmp_path):
    plain, plus = (
        put(tmp_path, "zoo", name="a.safetensors"),
        put(tmp_path, "zoo/sub", "_plus", to_meta, "b.pth"),
    )
    assert find(str(tmp_path / "zoo"), "vit_nano_patch16_dinov3") == str(plain)
    assert find(str(tmp_path / "zoo"), "vit_nano_plus_patch16_dinov3") == str(plus)
    backbone = Backbone("vit_nano_plus_patch16_dinov3")
    load_weights(backbone, str(tmp_path / "zoo"))
    with pytest.raises(InputError, match="none of 2 weight files fit"):
        load_weights(Backbone("vit_twin_patch16_dinov3"), str(tmp_path / "zoo"))
    with pytest.raises(InputError, match="timm .* has no such model"):
        find(str(tmp_path / "zoo"), "vit_enormous_dinov3")


def test_keywords_are_left_as_they_are():
    for word in ("", "random", "wheel:efficientnet_lite0"):
        assert find(word, "tf_efficientnet_lite0") == word and weights.shard_files(word) == []


def test_both_stages_use_attached_weights_in_any_layout(tmp_path, monkeypatch):
    "Meta's file in a Kaggle model, under a name that no setting has, serves model 1 and the frozen features."
    monkeypatch.setenv("NBS_KAGGLE_INPUT", str(tmp_path / "kaggle"))
    name = "vit_nano_plus_patch16_dinov3"
    path = put(tmp_path / "kaggle", MOUNTS[4], "_plus", to_meta, "dinov3_vits16plus.pth")
    keys = (f"backbone={name}", "weights=x.pth", "depths=1")
    settings = [f"{stage}.{key}" for stage in ("train_dinov3", "frozen") for key in keys]
    settings += ["train_dinov3.size=96", "train_dinov3.epochs=0"]
    settings += ["frozen.widths=96", "frozen.colour_width=64", "run.folds=2"]
    run = tiny.run_on(tiny.competition(tmp_path / "in", 8, 1), tmp_path / "out", *settings)
    for stage in (eda.run_eda, inpaint.run_inpaint, train_dinov3.run_train_dinov3, frozen.run_frozen):
        stage(run)
        assert is_fresh(run, stage.__name__.removeprefix("run_"))
    wanted = torch.load(path, weights_only=True)["blocks.1.mlp.w2.weight"]
    shared = load_file(next((run.artefacts / "dinov3").glob("backbone_*.safetensors")))
    assert torch.equal(shared["backbone.net.blocks.1.mlp.fc1_x.weight"].float(), wanted)
    for stage in ("train_dinov3", "frozen"):
        assert [*read_json(run.artefacts / f"stages/{stage}.json")["weights"]] == [str(path)]
    before = np.load(run.artefacts / "features/frozen.npz")["embedding"]
    state = weights.convert_weights(torch.load(path, weights_only=True), build_header(name))
    path.unlink()
    save_file(state, path.with_name("model.safetensors"))  # the same numbers as timm has them
    assert not is_fresh(run, "frozen")
    frozen.run_frozen(run)
    after = np.load(run.artefacts / "features/frozen.npz")["embedding"]
    assert np.abs(after - before).max() < 1e-5
