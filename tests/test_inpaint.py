"""Date stamps: sizes, colours, edges, turned photos, rules, and the fit of the two networks."""
import shutil

import cv2
import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import grass

from nbs_lib import inpaint, settings, stages, stamp_detection, stamp_training, stamps
from nbs_lib.images import split_halves
from nbs_lib.inpaint import build_stores, clean_photo, inpaint_stamp, orange_rule, stamp_mask
from nbs_lib.runtime import InputError
from nbs_lib.settings import load_settings
from nbs_lib.stages import open_run
from nbs_lib.stamp_detection import StampDetector, StampSegmenter, load_network
from nbs_lib.stamp_training import composites


def test_only_the_mask_is_touched():
    photo = grass(1)
    cv2.putText(photo, "24/12/2014", (40, 960), cv2.FONT_HERSHEY_SIMPLEX, 1.5, (255, 140, 10), 4, cv2.LINE_AA)
    mask = stamp_mask(photo)
    repaired = inpaint_stamp(photo, mask)
    assert mask.any() and (repaired[~mask] == photo[~mask]).all() and (repaired[mask] != photo[mask]).any()


SHAPES = [(64, 64), (64, 3000), (3000, 64), (64, 20000), (200, 30000), (333, 777), (1000, 2000), (2000, 1000)]
INKS = [((255, 140, 10), None, True), ((230, 40, 20), None, True), ((250, 250, 250), None, False),
        ((15, 15, 15), (240, 235, 220), False), ((40, 90, 230), None, False)]


@pytest.mark.parametrize("shape", SHAPES)
def test_any_size_without_writing_stays_clean(shape):
    photo = grass(2, shape)
    assert not stamp_mask(photo).any()
    left, right = split_halves(clean_photo(photo, load_settings("demo").inpaint)[0])
    assert left.shape == right.shape and left.shape[0] <= 2 * left.shape[1] + 1


@pytest.mark.parametrize("ink, ground, found", INKS)
def test_only_writing_from_red_to_yellow_is_a_stamp(ink, ground, found):
    photo = grass(1)
    if ground:
        photo[900:] = ground  # a card along the bottom
    cv2.putText(photo, "24/12/2014 10:21", (60, 970), cv2.FONT_HERSHEY_DUPLEX, 1.4, ink, 3, cv2.LINE_AA)
    assert stamp_mask(photo).any() == found


@pytest.fixture
def empty_networks(tmp_path, monkeypatch):
    "Let the file of the networks be one that is not there yet."
    for module in (stamp_detection, stamp_training):
        monkeypatch.setattr(module, "networks_path", lambda: tmp_path / "nets.safetensors")
    load_network.cache_clear()
    yield
    load_network.cache_clear()


def test_build_needs_the_networks(tmp_path, empty_networks):
    inpaint.code_key.cache_clear()
    (tmp_path / "in").mkdir()
    Image.fromarray(grass(0, (300, 600))).save(tmp_path / "in" / "ID0.jpg")
    run = open_run(tmp_path / "in", tmp_path / "out", overrides=["photos.workers=1"])
    with pytest.raises(InputError, match="nets.safetensors: holds no weights of the StampDetector"):
        build_stores(run, "test", [tmp_path / "in" / "ID0.jpg"], ["ID0"], [64], strict=False)


def test_fitting_keeps_each_network_beside_the_other(empty_networks):
    with pytest.raises(InputError, match="nets.safetensors: holds no weights of the StampDetector"):
        load_network(StampDetector)  # not random ones, which would paint anything
    with joblib.parallel_config("sequential"):
        stamp_training.fit("detector", minutes=0.01, grounds=1)
        detector = load_network(StampDetector).state_dict()
        stamp_training.fit("segmenter", minutes=0.01, grounds=1)
        before = load_network(StampSegmenter).state_dict()["line.weight"]
        stamp_training.fit("segmenter", minutes=0.01, grounds=1, seed=2)  # goes on
    assert all(torch.equal(v, detector[key]) for key, v in load_network(StampDetector).state_dict().items())
    after = load_network(StampSegmenter).state_dict()["line.weight"]
    assert 0 < (after - before).abs().max() < before.abs().max()


def test_the_search_is_judged_from_the_command_line(tmp_path, capsys):
    assert stamp_training.main(["judge", "2", "--keep", str(tmp_path / "new" / "stamps.csv")]) == 0
    header, first, *_ = (tmp_path / "new" / "stamps.csv").read_text().splitlines()
    assert header == "rule,stamps,recall,precision,clean,coverage,area"
    assert first.startswith("writing (stamp_mask),2.0,")
    assert stamp_training.main(["judge", "0"]) == 2
    assert capsys.readouterr().err == "error: judge 0: at least one composite is needed\n"


def test_rules_and_crop():
    settings = load_settings("demo", overrides=["inpaint.rule=orange", "inpaint.crop_bottom=0"]).inpaint
    photo = grass(3)
    photo[400:500, 400:900] = (230, 150, 40)
    clean, mask = clean_photo(photo, settings)
    assert clean.shape == photo.shape and mask[450, 600]
    assert orange_rule(photo)[450, 600] and not stamp_mask(photo).any()
    for bad in ("inpaint.rule=blue", "inpaint.crop_bottom=0.7"):
        with pytest.raises(InputError, match=bad.partition("=")[0]):
            clean_photo(photo, load_settings("demo", overrides=[bad]).inpaint)


def test_what_covers_much_of_a_photo_is_no_stamp(monkeypatch):
    photo = grass(1)
    cv2.putText(photo, "24/12/2014", (40, 960), cv2.FONT_HERSHEY_SIMPLEX, 1.5, (255, 140, 10), 4, cv2.LINE_AA)
    assert 0 < stamp_mask(photo).mean() < stamp_detection.MAX_SHARE
    whole = np.s_[:], np.ones(photo.shape[:2], bool)
    monkeypatch.setattr(stamp_detection, "line_mask", lambda photo, line: whole)
    assert not stamp_mask(photo).any()


@pytest.mark.parametrize("height", [40, 56])
@pytest.mark.parametrize("x, y", [(8, 8), (8, 940), (1200, 8), (1200, 940)])
def test_writing_close_to_an_edge_is_not_read_with_its_mirror(x, y, height):
    "Windows mirror what lies beyond the photo, and so the writing."
    photo, text = grass(2), stamps.draw_text("2013-04-05 12:06", height, "pillow")
    x, y = min(x, 1992 - text.shape[1]), min(y, 992 - height)
    place = np.s_[y : y + height, x : x + text.shape[1]]
    photo[place] = photo[place] * (1 - text[..., None]) + np.array([255, 140, 10]) * text[..., None]
    line, = stamp_detection.find_stamps(photo)
    assert np.abs(np.subtract(line.box, (x, y, x + text.shape[1], y + height))).max() < 0.3 * height
    assert stamp_mask(photo)[place][text > 0.5].mean() > 0.95


def test_writing_that_was_turned_with_the_photo_is_found():
    "A camera writes along its sensor; a photo that is turned afterwards has vertical writing."
    for one in composites(4, 3):
        upright = stamp_mask(one.stamped)[one.truth].mean()
        for turn in (1, 3):
            mask = stamp_mask(np.ascontiguousarray(np.rot90(one.stamped, turn)))
            assert mask[np.rot90(one.truth, turn)].mean() == pytest.approx(upright, abs=0.05)
            assert not stamp_mask(np.ascontiguousarray(np.rot90(one.empty, turn))).any()


def test_networks_fitted_anew_make_what_they_cleaned_stale(tmp_path, monkeypatch):
    shutil.copytree(settings.package_folder(), tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for owner in (settings, stages):
        monkeypatch.setattr(owner, "package_folder", lambda: tmp_path / "lib")
    modules = ("inpaint", "submit", "ensemble")
    before = {module: stages.hash_code(module) for module in modules}
    nets = tmp_path / "lib" / stamp_detection.networks_path().name
    nets.write_bytes(nets.read_bytes()[:-1] + b"\1")
    assert [stages.hash_code(module) != before[module] for module in modules] == [True, True, False]
