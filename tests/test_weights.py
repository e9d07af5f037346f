"""Pretrained weights lie outside a run: a stage that reads them is done again when they are others."""
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from nbs_lib import runtime, stages, submit
from nbs_lib.frozen import run_frozen
from nbs_lib.runtime import InputError
from nbs_lib.siglip import run_siglip
from nbs_lib.stages import is_fresh, stage
from nbs_lib.train_dinov3 import run_train_dinov3
from nbs_lib.weights import files_of


@pytest.fixture
def run(tmp_path):
    return tiny.run_on(tiny.competition(tmp_path / "in", 4, 1), tmp_path / "out")


def test_a_stage_is_done_again_when_its_weights_are_others(run, tmp_path, capsys):
    file, done = tmp_path / "weights.bin", []

    @stage("reads weights", weights=lambda run: [file])
    def reads(run):
        done.append(file.exists())
        return {}

    def again() -> bool:
        "Whether the stage is done again; fresh it is behind, if its weights are there."
        before, stale = len(done), not is_fresh(run, "reads weights")
        reads(run)
        assert stale == (len(done) > before) and is_fresh(run, "reads weights") == file.exists()
        return stale

    file.write_bytes(b"one network")
    assert again() and not again()
    shutil.copy(file, tmp_path / "copy")
    os.utime(tmp_path / "copy", (1e9, 1e9))
    (tmp_path / "copy").replace(file)
    assert not again()  # a copy
    file.write_bytes(b"two network")
    assert again() and not again()  # of the same size
    file.unlink()
    assert again() and again()  # as long as they are missing
    file.write_bytes(b"two network")
    assert again() and not again()


def test_a_manifest_without_weights_is_of_another_version(run):
    @stage("reads none")
    def reads(run):
        return {}

    reads(run)
    path = stages.manifest_path(run, "reads none")
    old = runtime.read_json(path)
    assert is_fresh(run, "reads none") and old.pop("weights") == {}
    runtime.write_json(path, old)
    assert not is_fresh(run, "reads none")


class Told(Exception):
    pass


def files_told(run, function, monkeypatch) -> set[str]:
    "The names of the files that go into the manifest of the stage `function`."
    def tell(run, name, room, reads, sections, weights):
        raise Told({os.path.basename(p) for p in weights})

    monkeypatch.setattr(stages, "describe_inputs", tell)
    monkeypatch.setattr(stages, "check_reads", lambda *args: None)
    with pytest.raises(Told) as told:
        function(run)
    return told.value.args[0]


@pytest.mark.parametrize(("function", "names"), [(run_train_dinov3, {"model1.safetensors"}), (run_siglip, {"preprocessor_config.json", "model.safetensors"}),
                                                 (run_frozen, {"frozen.safetensors"}), (submit.predict_test, {"frozen.safetensors", "preprocessor_config.json", "model.safetensors"})])
@pytest.mark.parametrize("there", [True, False])
def test_every_stage_names_the_weights_it_reads(function, names, there, tmp_path, monkeypatch):
    monkeypatch.setattr(submit.siglip, "check_folder", Path)
    if there:
        (tmp_path / "siglip").mkdir()
        for name in ("model1.safetensors", "frozen.safetensors", "siglip/model.safetensors", "siglip/preprocessor_config.json"):
            (tmp_path / name).touch()
    else:
        monkeypatch.setattr(submit.siglip, "check_folder", refuse)
    run = tiny.run_on(tiny.competition(tmp_path / "in", 4, 1), tmp_path / "out", f"train_dinov3.weights={tmp_path}/model1.safetensors", f"siglip.weights={tmp_path}/siglip",
                      f"frozen.weights={tmp_path}/frozen.safetensors")
    siglip = {"preprocessor_config.json", "model.safetensors"}
    assert files_told(run, function, monkeypatch) == (names if there or not names & siglip else names - siglip | {"siglip"})


def refuse(folder):
    raise InputError("there is no such folder")


@pytest.mark.parametrize("function", [run_train_dinov3, run_siglip, run_frozen, submit.predict_test])
def test_words_that_stand_for_weights_name_no_file(function, run, monkeypatch):
    assert files_told(run, function, monkeypatch) == set()


def test_a_folder_means_its_only_file(run, tmp_path):
    def files(weights):
        return files_of(str(weights), "vit_twin_patch16_dinov3", run.settings.kaggle)

    (tmp_path / "model").mkdir()
    assert files(tmp_path / "model") == [tmp_path / "model"]  # nothing in it: not there
    save_file({"a": torch.zeros(1)}, tmp_path / "model/weights.safetensors")
    assert files(tmp_path / "model") == [tmp_path / "model/weights.safetensors"]
    save_file({"b": torch.zeros(1)}, tmp_path / "model/more.safetensors")
    assert files(tmp_path / "model") == [tmp_path / "model"]  # neither fits, and the stage itself says so
    assert files("random") == files("wheel:efficientnet_lite0") == []


def test_weights_that_cannot_be_read_stop_no_submission(run, tmp_path, monkeypatch):
    "The file is there and the disk refuses it: what reads it says so, the manifest only notes that it is not known."
    @stage("reads weights", weights=lambda run: [tmp_path / "weights.bin"])
    def reads(run):
        return {}

    (tmp_path / "weights.bin").write_bytes(b"one network")
    real = runtime.hash_file

    def refuse(path):
        if Path(path).name == "weights.bin":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(runtime, "hash_file", refuse)
    assert reads(run) == {} and not is_fresh(run, "reads weights")
