"""29_weights: a stage that reads pretrained weights runs again when the weights change."""

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


def test_a_stage_runs_again_when_its_weights_change(run, tmp_path):
    file, done = tmp_path / "weights.bin", []

    @stage("reads weights", weights=lambda run: [file])
    def reads(run):
        done.append(file.exists())
        return {}

    def again() -> bool:
        "Run the stage; return whether it did its work. It is fresh afterwards if its weights exist."
        before, stale = len(done), not is_fresh(run, "reads weights")
        reads(run)
        assert stale == (len(done) > before) and is_fresh(run, "reads weights") == file.exists()
        return stale

    file.write_bytes(b"one network")
    assert again() and not again()
    shutil.copy(file, tmp_path / "copy")
    os.utime(tmp_path / "copy", (1e9, 1e9))
    (tmp_path / "copy").replace(file)
    assert not again()  # a copy with another time stamp
    file.write_bytes(b"two network")
    assert again() and not again()  # other content of the same size
    file.unlink()
    assert again() and again()  # while they are missing
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


class StageStoppedError(Exception):
    pass


def manifest_weights(run, function, monkeypatch) -> set[str]:
    "Return the names of the weight files in the manifest of the stage `function`."

    def stop(run, name, module, reads, sections, weights):
        raise StageStoppedError({os.path.basename(p) for p in weights})

    monkeypatch.setattr(stages, "describe_inputs", stop)
    monkeypatch.setattr(stages, "check_reads", lambda *args: None)
    with pytest.raises(StageStoppedError) as stopped:
        function(run)
    return stopped.value.args[0]


SIGLIP_FILES = {"preprocessor_config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (run_train_dinov3, {"model1.safetensors"}),
        (run_siglip, SIGLIP_FILES),
        (run_frozen, {"frozen.safetensors"}),
        (submit.predict_test, {"frozen.safetensors", *SIGLIP_FILES}),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_every_stage_names_the_weights_it_reads(function, names, exists, tmp_path, monkeypatch):
    monkeypatch.setattr(submit.siglip, "check_folder", Path if exists else refuse)
    if exists:
        (tmp_path / "siglip").mkdir()
        siglip = [f"siglip/{name}" for name in SIGLIP_FILES]
        for name in ("model1.safetensors", "frozen.safetensors", *siglip):
            (tmp_path / name).touch()
    files = {"train_dinov3": "model1.safetensors", "siglip": "siglip", "frozen": "frozen.safetensors"}
    settings = [f"{section}.weights={tmp_path}/{name}" for section, name in files.items()]
    run = tiny.run_on(tiny.competition(tmp_path / "in", 4, 1), tmp_path / "out", *settings)
    if not exists and names & SIGLIP_FILES:
        names = names - SIGLIP_FILES | {"siglip"}
    assert manifest_weights(run, function, monkeypatch) == names


def refuse(folder):
    raise InputError("there is no such folder")


@pytest.mark.parametrize("function", [run_train_dinov3, run_siglip, run_frozen, submit.predict_test])
def test_keywords_for_weights_name_no_file(function, run, monkeypatch):
    assert manifest_weights(run, function, monkeypatch) == set()


def test_a_folder_means_its_only_file(run, tmp_path):
    def files(weights):
        return files_of(str(weights), "vit_twin_patch16_dinov3", run.settings.kaggle)

    (tmp_path / "model").mkdir()
    assert files(tmp_path / "model") == [tmp_path / "model"]  # empty, as if it did not exist
    save_file({"a": torch.zeros(1)}, tmp_path / "model/weights.safetensors")
    assert files(tmp_path / "model") == [tmp_path / "model/weights.safetensors"]
    save_file({"b": torch.zeros(1)}, tmp_path / "model/more.safetensors")
    assert files(tmp_path / "model") == [tmp_path / "model"]  # neither fits, which the stage itself reports
    assert files("random") == files("wheel:efficientnet_lite0") == []


def test_unreadable_weights_do_not_stop_a_submission(run, tmp_path, monkeypatch):
    "The file exists but the disk fails: its reader reports that, the manifest only leaves the hash unknown."

    @stage("reads weights", weights=lambda run: [tmp_path / "weights.bin"])
    def reads(run):
        return {}

    (tmp_path / "weights.bin").write_bytes(b"one network")
    real = runtime.hash_file

    def fail(path):
        if Path(path).name == "weights.bin":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    for module in (runtime, stages):
        monkeypatch.setattr(module, "hash_file", fail)
    assert reads(run) == {} and not is_fresh(run, "reads weights")
