"""SigLIP, frozen and colour features: what the lessons of 40_siglip and 41_frozen do not test."""
import copy
import dataclasses
import json
import shutil
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nbs_lib import backbones, features, frozen, siglip
from nbs_lib.backbones import feature_names, fitting_shape, pool_features, pool_map
from nbs_lib.images import resize_half
from nbs_lib.runtime import InputError, read_json
from nbs_lib.settings import load_settings
from nbs_lib.stages import installed_versions, open_run
from nbs_lib.store import FULL, ROW, half_shape, store_folder, to_panorama

CPU = torch.device("cpu")


def some_pairs(n: int, shape=(180, 200), seed: int = 0) -> np.ndarray:
    "Blobs of many sizes in the colours of a paddock, (n, 2, H, W, 3) uint8."
    rng = np.random.default_rng(seed)
    size = (2 * shape[1], shape[0])
    coarse = [cv2.resize(rng.integers(0, 200, (side, 2 * side, 3)).astype(np.float32), size)
              for _ in range(n) for side in (4, 16, 60)]
    panorama = np.stack(coarse).reshape(n, 3, *size[::-1], 3).mean(1) * rng.uniform(0.6, 1.2, (n, 1, 1, 1))
    panorama = panorama.clip(0, 255).astype(np.uint8)
    return np.stack([panorama[:, :, : shape[1]], panorama[:, :, shape[1] :]], 1)


def write_store(run, pairs: np.ndarray, split: str = "train") -> list[str]:
    "Write a finished store of `pairs`, as stage inpaint does."
    folder, ids = store_folder(run, split, FULL), [f"ID{i}" for i in range(len(pairs))]
    folder.mkdir(parents=True)
    np.save(folder / "halves.npy", np.stack([siglip.resize_to_full(p) for p in pairs]))
    np.save(folder / "rows.npy", np.zeros(len(pairs), ROW))
    description = {"ids": ids, "shape": FULL, "inpaint": dataclasses.asdict(run.settings.inpaint)}
    (folder / "store.json").write_text(json.dumps(description))
    return ids


@pytest.fixture
def open_here(tmp_path):
    (tmp_path / "input").mkdir()

    def open_it(*overrides, profile="demo"):
        return open_run(tmp_path / "input", tmp_path / "out", profile, overrides=overrides)

    return open_it


@pytest.fixture(scope="module")
def settings():
    return load_settings("demo")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, settings):
    words = [w for words in siglip.read_prompts(settings.siglip).values() for w in words]
    return siglip.write_tiny_siglip(tmp_path_factory.mktemp("siglip"), words)


@pytest.fixture(scope="module")
def loaded(tiny):
    return siglip.load_siglip(tiny, CPU)


@pytest.fixture(scope="module")
def extractor(settings):
    return frozen.make_frozen_extractor(settings.frozen, device=CPU)


# --- SigLIP


@given(st.integers(1, 4000), st.integers(2, 900), st.data())
def test_patches_cover_every_pixel(length, patch, data):
    patch = min(patch, length)
    overlap = data.draw(st.integers(0, patch - 1))
    starts = siglip.patch_starts(length, patch, overlap)
    assert starts[0] == 0 and starts[-1] == length - patch
    steps = np.diff(starts)
    assert (steps > 0).all() and (steps <= patch - overlap + 0.5).all()
    assert len(starts) == 1 or (len(starts) - 2) * (patch - overlap) < length - patch  # none is needless


@hypothesis_settings(deadline=None, max_examples=30)
@given(st.integers(200, 2600), st.sampled_from([0.5, 0.45]))
def test_a_photo_has_eight_patches_at_any_size(width, ratio):
    assert siglip.cut_patches(np.zeros((round(width * ratio), width, 3), np.uint8)).shape[0] == 8


FILES = ("config.json", "preprocessor_config.json", "spiece.model", "model.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tiny, tmp_path, name):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(InputError, match=name.split(".")[0]) as refused:
        siglip.load_siglip(folder, CPU)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


def test_all_missing_files_are_named_at_once(tmp_path):
    with pytest.raises(InputError, match=r"config\.json.*preprocessor.*spiece.*safetensors"):
        siglip.check_folder(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_half_a_file_is_refused(tiny, tmp_path, name):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be loaded"):
        siglip.load_siglip(folder, CPU)


def test_a_missing_tensor_is_not_replaced_by_noise(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    state = load_file(folder / "model.safetensors")
    del state["vision_model.post_layernorm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="post_layernorm"):
        siglip.load_siglip(folder, CPU)


def test_threads_build_one_network_at_a_time(tiny, loaded, settings, monkeypatch):
    "Loading in transformers changes torch's state: in parallel, another network would get random weights."
    inside, seen = [], []

    def watched(real):
        def build(*args):
            inside.append(real)
            seen.append(len(inside))
            time.sleep(0.05)
            try:
                return real(*args)
            finally:
                inside.remove(real)

        return build

    monkeypatch.setattr(siglip, "read_parts", watched(siglip.read_parts))
    monkeypatch.setattr(backbones, "load_weights", watched(backbones.load_weights))
    jobs = [lambda: siglip.load_siglip(tiny, CPU).model,
            lambda: frozen.make_frozen_extractor(settings.frozen, device=CPU).backbone] * 3
    with ThreadPoolExecutor(len(jobs)) as pool:
        built = [future.result().state_dict() for future in [pool.submit(job) for job in jobs]]
    assert seen == [1] * len(jobs)
    for state in built[::2]:
        assert all(torch.equal(state[key], value) for key, value in loaded.model.state_dict().items())


def test_another_kind_of_model_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(InputError, match="'clip', not 'siglip'"):
        siglip.load_siglip(folder, CPU)


def test_half_precision_is_computed_in_float32(tiny, loaded, tmp_path):
    "In transformers 5 the default would load the file's own precision: on a CPU other features, slowly."
    folder = shutil.copytree(tiny, tmp_path / "half")
    copy.deepcopy(loaded.model).half().save_pretrained(folder)
    assert {v.dtype for v in load_file(folder / "model.safetensors").values()} == {torch.float16}
    half, picture = siglip.load_siglip(folder, CPU), some_pairs(1)[0]
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    model = copy.deepcopy(loaded.model).half().float()
    rounded = siglip.Siglip(model, loaded.tokenizer, loaded.processor, CPU)
    assert torch.equal(half.embed_images(picture), rounded.embed_images(picture))
    assert torch.equal(half.embed_texts(["clover"]), rounded.embed_texts(["clover"]))


def test_a_torch_archive_loads_like_safetensors(tiny, loaded, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "bin")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    again = siglip.load_siglip(folder, CPU)
    assert torch.equal(again.embed_texts(["clover"]), loaded.embed_texts(["clover"]))


def test_code_in_a_torch_archive_is_not_run(tiny, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = shutil.copytree(tiny, tmp_path / "bin")
    torch.save({"logit_scale": Evil()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="siglip.weights: .*cannot be loaded"):
        siglip.load_siglip(folder, CPU)
    assert not (tmp_path / "ran").exists()


def test_the_processor_may_stand_where_transformers_5_writes_it(tiny, loaded, tmp_path):
    folder, picture = shutil.copytree(tiny, tmp_path / "new"), some_pairs(1)[0]
    settings = {**read_json(folder / "preprocessor_config.json"), "image_mean": [0.3, 0.4, 0.6]}
    (folder / "preprocessor_config.json").unlink()
    whole = {"image_processor": settings, "processor_class": "SiglipProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(whole))
    other = siglip.load_siglip(folder, CPU)
    assert list(other.processor.image_mean) == [0.3, 0.4, 0.6]
    assert not torch.allclose(other.embed_images(picture), loaded.embed_images(picture))


def write_siglip2(folder: Path, tiny: Path, words: list[str], tokenizer: str = "GemmaTokenizer") -> Path:
    "Write a SigLIP 2 of fixed size: SigLIP's classes and Gemma's tokenizer, without a padding side."
    from tokenizers import Tokenizer, models, normalizers, processors, trainers
    from transformers import SiglipConfig, SiglipModel

    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("spiece.model", "tokenizer*", "special*"))
    text = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    text.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    text.train_from_iterator(words, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    text.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    text.save(str(folder / "tokenizer.json"))
    named = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    written = {"tokenizer_class": tokenizer, "add_bos_token": False, "add_eos_token": True, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    config = SiglipConfig.from_pretrained(folder)
    config.text_config.vocab_size = text.get_vocab_size()
    SiglipModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tokenizer", ["GemmaTokenizer", "GemmaTokenizerFast"])
def test_a_siglip_2_of_fixed_size_loads_and_pads_as_it_was_trained(tiny, tmp_path, settings, tokenizer):
    words = [w for words in siglip.read_prompts(settings.siglip).values() for w in words]
    loaded = siglip.load_siglip(write_siglip2(tmp_path / "siglip2", tiny, words, tokenizer), CPU)
    embedding, semantic = siglip.embed_photos(some_pairs(2), loaded, settings.siglip)
    assert embedding.shape == (2, 32) and np.isfinite(semantic).all()
    ids = loaded.tokenizer(["dense clover"])["input_ids"][0]
    padded = torch.tensor([ids + [0] * (64 - len(ids))])
    assert ids[-1] == 1 and len(ids) > 2
    wanted = siglip.pooled_output(loaded.model.get_text_features(input_ids=padded))
    assert torch.allclose(loaded.embed_texts(["Dense Clover"]), wanted, atol=1e-5)


def test_a_siglip_2_of_free_size_is_refused_with_one_that_would_do(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "naflex")
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    with pytest.raises(InputError, match="'siglip2', not 'siglip'; give a SigLIP 2 of fixed size"):
        siglip.load_siglip(folder, CPU)


@pytest.fixture
def kernel(tmp_path, monkeypatch, open_here):
    "Where a Kaggle kernel has its inputs, and a run whose SigLIP is named as in the settings."
    root = tmp_path / "kaggle"
    (root / "competitions/csiro-biomass").mkdir(parents=True)
    monkeypatch.setenv("NBS_KAGGLE_INPUT", str(root))
    return root, open_here("siglip.weights=siglip-so400m-patch14-384")


def own_dataset(run) -> str:
    return f"datasets/{run.settings.kaggle.username}/{run.settings.kaggle.siglip_dataset}"


PLACES = ("own", "image2biomass-siglip-weights", "datasets/someone/eyes/deep/folder",
          "models/google/siglip/transformers/so400m/1")


@pytest.mark.parametrize("place", PLACES)
def test_an_attached_siglip_is_found_whatever_its_name(kernel, tiny, place, capsys):
    root, run = kernel
    folder = shutil.copytree(tiny, root / (own_dataset(run) if place == "own" else place))
    (root / "datasets/someone/dinov3").mkdir(parents=True)  # transformers' DINOv3 has files of the same names
    (root / "datasets/someone/dinov3/config.json").write_text(json.dumps({"model_type": "dinov3_vit"}))
    (root / "datasets/someone/dinov3/preprocessor_config.json").write_text("{}")
    assert siglip.find_siglip(run) == folder
    printed = "siglip.weights: siglip-so400m-patch14-384 is not attached; "
    assert capsys.readouterr().out == f"{printed}{folder} holds a SigLIP and is used\n"
    assert siglip.siglip_files(run) == sorted(folder.iterdir()) and capsys.readouterr().out == ""


def test_of_several_siglips_the_named_one_then_the_own_dataset_else_none(kernel, tiny, capsys):
    root, run = kernel
    with pytest.raises(InputError, match="^siglip.weights: .* no folder holds a SigLIP; attach one"):
        siglip.find_siglip(run)
    others = [shutil.copytree(tiny, root / f"datasets/someone/{name}") for name in ("a", "b")]
    with pytest.raises(InputError, match="2 folders hold a SigLIP .*; name one") as e:
        siglip.find_siglip(run)
    assert all(str(folder) in str(e.value) for folder in others)
    own = shutil.copytree(tiny, root / own_dataset(run))
    assert siglip.find_siglip(run) == own
    capsys.readouterr()
    named = shutil.copytree(tiny, root / "models/google/siglip/transformers/siglip-so400m-patch14-384/1")
    assert siglip.find_siglip(run) == named and capsys.readouterr().out == ""


def test_versions_stand_beside_features_and_a_difference_is_one_warning(open_here, tmp_path):
    run = open_here("frozen.widths=96", "frozen.colour_width=64")
    write_store(run, some_pairs(2))
    siglip.run_siglip(run)
    frozen.run_frozen(run)
    names, given = ["siglip", "frozen", "colour", "of somebody else"], []
    for name in names[:2]:
        made = read_json(run.artefacts / f"features/{name}.json")["versions"]
        assert made == installed_versions(features.FEATURE_PACKAGES)
        assert made.keys() == {"transformers", "timm", "torchvision"}
    features.warn_version_drift(run.artefacts, names, given.append)
    assert given == []
    for name, package in (("siglip", "transformers"), ("siglip", "torchvision"), ("frozen", "torchvision")):
        path = run.artefacts / f"features/{name}.json"
        beside = read_json(path)
        beside["versions"][package] = "0.0.1"
        path.write_text(json.dumps(beside))
    features.warn_version_drift(run.artefacts, names, given.append)
    here = installed_versions(features.FEATURE_PACKAGES)
    assert len(given) == 1 and "\n" not in given[0]
    assert f"siglip by transformers 0.0.1 (here {here['transformers']})" in given[0]
    assert f"siglip, frozen by torchvision 0.0.1 (here {here['torchvision']})" in given[0]
    (run.artefacts / "features/siglip.json").write_text("{")
    features.warn_version_drift(run.artefacts, names, given.append)
    # a warning only: an error would stop a submission
    assert "not readable" in given[1] and "frozen by torchvision" in given[2]


def test_pooled_output_of_both_transformers_versions():
    pooled = torch.ones(2, 3)
    assert siglip.pooled_output(pooled) is pooled  # 4.5x
    output = SimpleNamespace(pooler_output=pooled, last_hidden_state=None)
    assert siglip.pooled_output(output) is pooled  # 5.x


def test_tiny_siglip_repeats_and_follows_its_seed(tiny, tmp_path, settings):
    words = [w for words in siglip.read_prompts(settings.siglip).values() for w in words]
    state = torch.random.get_rng_state()
    again, other = (siglip.write_tiny_siglip(tmp_path / str(seed), words, seed) for seed in (0, 1))
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's random numbers are left alone
    first, same, differ = (load_file(f / "model.safetensors") for f in (tiny, again, other))
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not all(torch.equal(first[k], differ[k]) for k in first)


def test_case_and_punctuation_of_a_text_do_not_matter(loaded):
    a, b, c = loaded.embed_texts(["Dense green Clover!", "dense green clover", "bare soil"])
    assert torch.allclose(a, b, atol=1e-6) and not torch.allclose(a, c, atol=1e-3)


def test_no_photo_depends_on_another(loaded, settings):
    pairs, s = some_pairs(5), settings.siglip
    together = siglip.embed_photos(pairs, loaded, s)
    for batch in (1, 3):
        reverse = siglip.embed_photos(pairs[::-1], loaded, dataclasses.replace(s, batch=batch))
        for whole, part in zip(together, reverse, strict=True):
            assert np.abs(whole - part[::-1]).max() < 1e-5
    alone = siglip.embed_photos(pairs[2:3], loaded, s)
    assert all(np.abs(whole[2:3] - part).max() < 1e-5 for whole, part in zip(together, alone, strict=True))
    assert np.abs(alone[1]).min() > 0 and together[0].std(0).max() > 1e-3  # not zeros, and photos differ


def test_probes_against_a_slow_reference(loaded, settings):
    pairs, s = some_pairs(2), settings.siglip
    embedding, semantic = siglip.embed_photos(pairs, loaded, s)
    photos = [to_panorama(siglip.resize_to_full(pair)) for pair in pairs]
    patches = [loaded.embed_images(siglip.cut_patches(photo, s.patch, s.overlap)) for photo in photos]
    patches = torch.stack(patches).numpy()
    assert np.allclose(embedding, patches.mean(1), atol=1e-5)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    prompts = siglip.read_prompts(s)
    concepts = {c: unit(unit(loaded.embed_texts(words).numpy()).mean(0)) for c, words in prompts.items()}
    scale, bias = float(np.exp(loaded.model.logit_scale.item())), loaded.model.logit_bias.item()
    for row, seen in zip(semantic, patches, strict=True):
        cosine = {c: (unit(seen) @ direction).mean() for c, direction in concepts.items()}
        p = {c: 1 / (1 + np.exp(-(scale * v + bias))) for c, v in cosine.items()}
        wanted = [*cosine.values(), p["green"] / (p["green"] + p["dead"]),
                  p["clover"] / (p["clover"] + p["grass"]),
                  np.log((p["dense"] + p["medium"]) / (p["bare"] + p["sparse"]))]
        assert np.allclose(row, wanted, atol=1e-4)


@given(st.lists(st.floats(-1, 1), min_size=8, max_size=8))
def test_ratios_are_finite_for_any_cosines(cosine):
    row = siglip.add_ratios(torch.tensor([cosine]), 117.0, -12.9)[0]
    assert torch.isfinite(row).all() and (0 <= row[8:10]).all() and (row[8:10] <= 1).all()


def test_a_concept_without_words_is_refused():
    with pytest.raises(InputError, match=r"siglip\.clover: no prompt"):
        siglip.read_prompts(load_settings("demo", overrides=["siglip.clover="]).siglip)


def test_stage_siglip_writes_once_and_then_reads_the_cache(open_here, monkeypatch):
    run = open_here()
    ids = write_store(run, some_pairs(3))
    summary = siglip.run_siglip(run)
    path = run.artefacts / "features" / "siglip.npz"
    with np.load(path, allow_pickle=False) as npz:
        assert list(npz["image_id"]) == ids and npz["embedding"].dtype == np.float32
        assert npz["embedding"].shape == (3, 32) and npz["semantic"].shape == (3, 11)
    assert read_json(path.with_suffix(".json"))["semantic"] == list(siglip.SEMANTIC)
    monkeypatch.setattr(siglip, "embed_photos", lambda *_: pytest.fail("computed again"))
    assert siglip.run_siglip(run) == summary


def test_without_weights_the_stage_warns_and_goes_on(open_here, capsys):
    run = open_here(profile="laptop")
    write_store(run, some_pairs(1))
    stale = run.artefact_path("features", "siglip.npz")
    stale.write_bytes(b"of an earlier run")
    assert siglip.run_siglip(run) == {"photos": 0}
    assert "no weights" in capsys.readouterr().out and not stale.exists()
    assert siglip.compute_siglip_features(run, []) == {}


def test_weights_that_are_nowhere_are_an_error(open_here):
    run = open_here("siglip.weights=no/such/folder")
    write_store(run, some_pairs(1))
    with pytest.raises(InputError, match="no/such/folder"):
        siglip.run_siglip(run)


def test_a_stage_before_inpaint_names_inpaint(open_here):
    for stage in (siglip.run_siglip, frozen.run_frozen):
        with pytest.raises(InputError, match="inpaint"):
            stage(open_here())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    siglip.write_features(path, ["a"], np.ones((1, 2)))
    before = path.read_bytes()

    def fail(file, **_):
        file.write_bytes(b"half")
        raise OSError("disk")

    monkeypatch.setattr(siglip.np, "savez", fail)
    with pytest.raises(OSError, match="disk"):
        siglip.write_features(path, ["a"], np.zeros((1, 2)))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.npz"]


class Watched:
    "Makes each pair when it is asked for; counts how often, and how many are held at once."

    def __init__(self, n: int, shape=FULL):
        self.ids, self.asked = [f"ID{i}" for i in range(n)], [0] * n
        self.alive, self.most = weakref.WeakSet(), 0
        self.base = some_pairs(1, shape)[0]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        pair = self.base.copy().view(Pair)
        self.asked[i] += 1
        self.alive.add(pair)
        self.most = max(self.most, len(self.alive))
        return pair


class Pair(np.ndarray):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


COMPUTE = {"siglip": siglip.compute_siglip_features, "frozen": frozen.compute_frozen_features}


@pytest.mark.parametrize(("name", "passes"), [("siglip", 1), ("frozen", 3)])
def test_each_photo_is_read_once_a_pass_and_one_batch_is_held(open_here, name, passes):
    "A pass is one width of the frozen backbone, the colours, or all patches of SigLIP."
    overrides = ("siglip.batch=2", "frozen.batch=2", "frozen.widths=96,64", "frozen.colour_width=64")
    store = Watched(5)
    for ids, embedding, _ in COMPUTE[name](open_here(*overrides), store, CPU).values():
        assert ids == store.ids and len(embedding) == 5
    assert store.asked == [passes] * 5 and store.most <= 3


@pytest.mark.parametrize("name", ["siglip", "frozen"])
def test_a_store_of_another_size_gives_nearly_the_same(open_here, name):
    run, pairs = open_here("frozen.widths=96", "frozen.colour_width=128"), some_pairs(3, FULL)
    larger = np.stack([[cv2.resize(half, (1024, 928), interpolation=cv2.INTER_CUBIC) for half in pair]
                       for pair in pairs])
    stores = [type("Store", (list,), {"ids": ["a", "b", "c"]})(p) for p in (pairs, larger)]
    made = [COMPUTE[name](run, store, CPU) for store in stores]
    for key, (_, first, _) in made[0].items():
        second = made[1][key][1]
        assert np.median(np.abs(first - second) / (np.abs(first).mean(0) + 1e-3)) < 0.05


# --- frozen


def test_no_frozen_photo_depends_on_another(extractor, settings):
    pairs = some_pairs(5)
    s = dataclasses.replace(settings.frozen, widths=(96, 160), poolings=("mean", "sd", "max", "gem"))
    whole = frozen.frozen_features(pairs, range(5), extractor, s)
    assert whole.shape == (5, sum(frozen.frozen_columns(s).values()))
    assert whole.dtype == np.float32 and np.isfinite(whole).all()
    assert np.array_equal(frozen.frozen_features(pairs, [4, 0, 2], extractor, s), whole[[4, 0, 2]])
    assert np.array_equal(frozen.frozen_features(pairs[3:], range(2), extractor, s), whole[3:])


def test_photos_in_one_forward_do_not_change_each_other(settings):
    "A GPU takes a batch at a time; the same here, past the rule that a CPU takes one."
    pairs, e = some_pairs(5), frozen.make_frozen_extractor(settings.frozen, device=CPU)
    together = e._compute(pairs, range(5), (96, 96), "id", True)
    for i, one in enumerate(together):
        alone, = e._compute(pairs, [i], (96, 96), "id", True)
        assert one.keys() == alone.keys() == {"pooled", "prefix", "grid"}
        for n in one:
            off = np.abs(one[n].astype(float) - alone[n]).max(initial=0)
            assert off <= 2e-3 * max(1, np.abs(alone[n]).max(initial=0)), n


def test_columns_name_what_they_cover(extractor, settings):
    s = dataclasses.replace(settings.frozen, widths=(64, 96), poolings=("max", "mean"))
    row, at = frozen.frozen_features(some_pairs(1), [0], extractor, s)[0], 0
    blocks = {}
    for name, wide in frozen.frozen_columns(s).items():
        blocks[name] = row[at : (at := at + wide)]
    names = [f"{w}px map {i} {p}" for w in (64, 96) for i in (-2, -1) for p in ("mean", "max")]
    assert at == len(row) and list(blocks) == names
    for name in blocks:
        if name.endswith("mean"):
            assert (blocks[name] <= blocks[name.removesuffix("mean") + "max"] + 1e-5).all()
    only = dataclasses.replace(s, widths=(96,), poolings=("max",))
    one = frozen.frozen_features(some_pairs(1), [0], extractor, only)[0]
    wanted = [v for k, v in blocks.items() if k.startswith("96px") and k.endswith("max")]
    assert np.array_equal(one, np.concatenate(wanted))


def test_both_halves_are_pooled_as_one_photo(extractor, settings):
    "Mean and maximum are those of both halves; the sd includes the difference between the halves."
    s = dataclasses.replace(settings.frozen, widths=(96,), poolings=("mean", "sd", "max", "gem"))
    pairs = some_pairs(1)
    x = np.stack([resize_half(half, half_shape(96)) for half in pairs[0]])
    with torch.inference_mode():
        inputs = backbones.to_tensor(torch.from_numpy(x[None]), extractor.mean, extractor.std)[0]
        maps, prefix = extractor.backbone.encode(inputs)
    wide = [np.concatenate(list(m.numpy()), -1).reshape(m.shape[1], -1) for m in maps]  # (C, h · 2w)
    wanted = np.concatenate([
        np.r_[m.mean(1), m.std(1), m.max(1), (m.clip(1e-6) ** 3).mean(1) ** (1 / 3)] for m in wide])
    row = frozen.frozen_features(pairs, [0], extractor, s)[0]
    assert prefix.shape[1] == 0 and np.allclose(row, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_twin_patch16_dinov3", "vit_small_patch14_dinov2"])
def test_a_vit_keeps_the_shape_and_gives_its_class_token(name, settings):
    s = dataclasses.replace(settings.frozen, backbone=name, weights="random", depths=2, widths=(64,),
                            poolings=("mean",))
    e = frozen.make_frozen_extractor(s, device=CPU)
    features = frozen.frozen_features(some_pairs(2), range(2), e, s)
    channels = e.backbone.channels
    assert features.shape[1] == sum(frozen.frozen_columns(s).values()) == sum(channels) + channels[-1]
    assert list(feature_names(e.backbone, s.poolings))[-1] == "class token"
    assert np.abs(features[:, -channels[-1] :]).min() > 0
    *_, grid = e.extract(some_pairs(2), [0], half_shape(64), grid=True)[:2]
    assert grid.shape[-2:] == tuple(round(64 / e.backbone.stride) for _ in range(2))


def test_pooling_against_numpy():
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    flat = x.numpy().reshape(2, 3, -1)
    wanted = [flat.mean(-1), flat.std(-1), flat.max(-1), (flat.clip(1e-6) ** 3).mean(-1) ** (1 / 3)]
    assert np.allclose(pool_map(x).numpy(), np.concatenate(wanted, 1), atol=1e-5)
    two = pool_map(x, ("gem", "mean"))
    assert np.array_equal(two, pool_map(x).numpy()[:, [0, 1, 2, 9, 10, 11]]), "in the order of POOLINGS"
    halves, prefix = torch.randn(4, 3, 5, 7), torch.randn(4, 2, 3)
    pooled = pool_features([halves], prefix, ("mean",))
    assert torch.allclose(pooled[:, :3], halves.unflatten(0, (2, 2)).mean((1, 3, 4)), atol=1e-6)
    assert torch.allclose(pooled[:, 3:], prefix[:, 0].unflatten(0, (2, 2)).mean(1), atol=1e-6)


@given(st.integers(32, 1500), st.integers(32, 1500), st.sampled_from([7, 14, 16, 32, 64]))
def test_a_fitting_shape_is_near_and_divisible(height, width, stride):
    fitted = fitting_shape((height, width), stride)
    assert all(side % stride == 0 and side >= stride for side in fitted)
    pairs = zip(fitted, (height, width), strict=True)
    assert all(side == stride or abs(side - asked) <= stride / 2 for side, asked in pairs)


@pytest.mark.parametrize(("override", "message"), [
    ("frozen.poolings=mean,average", "average"), ("frozen.poolings=", "poolings"),
    ("frozen.colour_width=16", "colour_width"), ("frozen.widths=", "widths"), ("frozen.widths=0", "widths"),
    ("frozen.batch=0", "batch"), ("frozen.depths=9", "depths"), ("frozen.depths=0", "depths"),
    ("frozen.backbone=efficientnet_of_dreams", "efficientnet_of_dreams"),
    ("frozen.weights=no/such.safetensors", "no/such.safetensors"),
    ("frozen.weights=", "weights"), ("frozen.colour_width=-1", "colour_width")])
def test_frozen_settings_are_checked_before_the_first_photo(open_here, override, message):
    store = Watched(1)
    with pytest.raises(InputError, match=message) as refused:
        frozen.compute_frozen_features(open_here(override), store, CPU)
    assert "\n" not in str(refused.value) and store.asked == [0]


@pytest.mark.parametrize(
    "override", ["siglip.patch=0", "siglip.overlap=520", "siglip.overlap=-1", "siglip.batch=0"])
def test_siglip_settings_are_checked_before_the_first_photo(open_here, override):
    store = Watched(1)
    with pytest.raises(InputError, match=override.split("=")[0].split(".")[1]):
        siglip.compute_siglip_features(open_here(override), store, CPU)
    assert store.asked == [0]


# --- colour


def test_no_colour_photo_depends_on_another(settings):
    pairs, s = some_pairs(4), dataclasses.replace(settings.frozen, colour_width=128)
    whole, names = frozen.colour_features(pairs, s)
    assert len(names) == len(set(names)) == whole.shape[1] and np.isfinite(whole).all()
    # to rounding: sums over arrays that lie elsewhere in memory may add up in another order
    alone, swapped = (frozen.colour_features(p, s)[0] for p in (pairs[2:3], pairs[:, ::-1]))
    assert np.allclose(whole[2:3], alone, rtol=1e-5, atol=1e-6)
    assert np.allclose(whole, swapped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0, 1, 128, 255])
def test_flat_pictures_give_finite_numbers(value, settings):
    row, names = frozen.colour_features(np.full((1, 2, 90, 100, 3), value, np.uint8), settings.frozen)
    assert np.isfinite(row).all() and not row[0, len(names) // 2 :].any()


@hypothesis_settings(max_examples=200)
@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_indices_of_any_colour_are_bounded(rgb):
    bounds = {"CIVE": (-190, 235), "ExG": (-1, 2), "ExR": (-1, 1.4), "ExGR": (-2.4, 3), "VARI": (-2, 2),
              "a": (-1.3, 1.3), "b": (-1.3, 1.3)}
    for name, value in frozen.vegetation_indices(np.full((1, 1, 3), rgb, np.uint8)).items():
        low, high = bounds.get(name, (-1, 1))
        assert low - 1e-3 <= value.item() <= high + 1e-3, name


def test_indices_by_hand():
    red, green, blue = 80.0, 120.0, 50.0
    maps = frozen.vegetation_indices(np.array([[[red, green, blue]]], np.uint8))
    wanted = {"ExG": (2 * green - red - blue) / 250, "ExR": (1.4 * red - green) / 250, "NGRDI": 40 / 200,
              "GLI": (2 * green - red - blue) / (2 * green + red + blue), "VARI": 40 / 150,
              "CIVE": 0.441 * red - 0.811 * green + 0.385 * blue + 18.787,
              "MGRVI": (green**2 - red**2) / (green**2 + red**2), "saturation": 70 / 120}
    assert all(np.isclose(maps[k].item(), v, rtol=0.01, atol=0.01) for k, v in wanted.items())


def test_a_cloud_changes_no_chromatic_index():
    pair = some_pairs(1)[0].clip(60, 240)
    dark = (pair[0] * 0.5).astype(np.uint8)
    bright, dim = frozen.vegetation_indices(pair[0]), frozen.vegetation_indices(dark)
    for name in ("ExG", "ExR", "NGRDI", "GLI", "saturation"):
        assert np.abs(bright[name] - dim[name]).mean() < 0.02, name


def test_classes_of_cover_do_not_overlap():
    rgb = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    masks = frozen.cover_masks(rgb)
    lone = [masks[k] & ~masks["shadow"] & ~masks["glare"] for k in ("green", "straw", "earth", "grey")]
    assert np.sum(lone, axis=0).max() == 1
    assert (np.sum(lone, axis=0) + masks["shadow"] + masks["glare"] >= 1).all()  # every pixel is something


def test_more_green_is_more_green(settings):
    soil, leaf = np.array([120, 90, 70], np.uint8), np.array([70, 130, 50], np.uint8)
    shares = []
    for rows in (0, 30, 60, 90):
        half = np.tile(soil, (90, 100, 1))
        half[:rows] = leaf
        shares.append(frozen.colour_half(half, 100)["cover green"])
    assert np.allclose(shares, [0, 1 / 3, 2 / 3, 1], atol=0.04)


def test_glcm_contrast_against_a_slow_reference():
    grey = np.random.default_rng(0).integers(0, 256, (24, 30), dtype=np.uint8)
    q = grey.astype(int) // 8
    right, down = (q[:, 1:] - q[:, :-1]) ** 2, (q[1:] - q[:-1]) ** 2
    slash, back = (q[1:, 1:] - q[:-1, :-1]) ** 2, (q[1:, :-1] - q[:-1, 1:]) ** 2
    wanted = np.mean([d.mean() for d in (right, down, slash, back)])
    assert np.isclose(frozen.texture_features(grey)["contrast 1px"], wanted)


def test_texture_does_not_care_for_quarter_turns():
    grey = cv2.cvtColor(some_pairs(1, (128, 128))[0, 0], cv2.COLOR_RGB2GRAY)
    turned = frozen.texture_features(np.ascontiguousarray(np.rot90(grey)))
    for name, value in frozen.texture_features(grey).items():
        assert np.isclose(value, turned[name], rtol=0.05, atol=0.01), name


def test_stage_frozen_writes_both_files_and_then_reads_the_cache(open_here, monkeypatch):
    run = open_here("frozen.widths=64,96", "frozen.colour_width=64")
    ids = write_store(run, some_pairs(3))
    summary = frozen.run_frozen(run)
    for name, wide in (("frozen", 2 * (320 + 1280)), ("colour", summary["colour"])):
        path = run.artefacts / "features" / f"{name}.npz"
        with np.load(path, allow_pickle=False) as npz:
            assert list(npz["image_id"]) == ids and npz["embedding"].shape == (3, wide)
            assert npz["embedding"].dtype == np.float32
        columns = read_json(path.with_suffix(".json"))["columns"]
        assert (sum(columns.values()) if name == "frozen" else len(columns)) == wide
    monkeypatch.setattr(frozen, "compute_frozen_features", lambda *_: pytest.fail("computed again"))
    assert frozen.run_frozen(run) == summary


def test_without_a_colour_width_there_are_no_colours_not_even_old_ones(open_here):
    write_store(run := open_here("frozen.widths=64", "frozen.colour_width=64"), some_pairs(2))
    assert {"frozen", "colour"} <= frozen.run_frozen(run).keys()
    summary = frozen.run_frozen(open_here("frozen.widths=64", "frozen.colour_width=0"))
    assert summary == {"photos": 2, "frozen": 320 + 1280}
    assert sorted(p.name for p in (run.artefacts / "features").iterdir()) == ["frozen.json", "frozen.npz"]
