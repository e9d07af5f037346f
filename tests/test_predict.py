"""61_predict and 60_bundle: any photos, the numbers of submit, one line for whatever is wrong."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import cv2
import joblib
import numpy as np
import pandas as pd
import pytest
from conftest import make_once
from PIL import ExifTags, Image
from skimage import data
from test_submit import SMALL, copy_run, train_small

from nbs_lib import bundle, kaggle, photo_files, predict
from nbs_lib.runtime import InputError
from nbs_lib.settings import load_settings
from nbs_lib.stages import Run
from nbs_lib.submit import run_submit
from nbs_lib.targets import TARGETS

NUMBERS = [t.removesuffix("_g") + "_g" for t in TARGETS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    "A folder with in/ (a competition) and out/ (a finished run)."
    source = os.environ.get("NBS_TRAINED")
    folder = Path(source) if source else make_once(tmp_path_factory, "trained", train_small)
    run = copy_run(folder, tmp_path_factory.mktemp("run"))
    record = {"profile": "demo", "preset": "", "overrides": list(SMALL)}
    (run.output / "run.json").write_text(json.dumps(record))
    return run.output.parent


@pytest.fixture(scope="module")
def photos(trained, tmp_path_factory) -> Path:
    """Six photos under other names in two folders, two of them training photos, and a folder of odd pictures.

    Two files beside them are no photo.
    """
    folder, training = tmp_path_factory.mktemp("farm"), sorted((trained / "in" / "train").iterdir())
    for i, path in enumerate(sorted((trained / "in" / "test").iterdir())):
        target = folder / ("river flat" if i < 4 else "hill") / f"{path.stem} ü{'.JPG' if i else ''}"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(training[i] if i < 2 else path, target)
    (folder / "hill" / "broken.jpg").write_text("no photo")
    (folder / "hill" / "notes.txt").write_text("no photo, and not called one")
    (folder / "odd").mkdir()
    for name, picture in odd_pictures().items():
        cv2.imwrite(str(folder / "odd" / f"{name}.png"), picture)
    return folder


def odd_pictures() -> dict[str, np.ndarray]:
    "Pictures that are no photo of a quadrat, 1000 x 2000."
    black = np.zeros((1000, 2000, 3), np.uint8)
    landscape, face = black + np.uint8((235, 180, 120)), black + np.uint8(200)
    landscape[500:] = (40, 140, 60)
    cv2.ellipse(face, (1000, 500), (300, 420), 0, 0, 360, (140, 170, 220), -1)
    bricks = cv2.resize(np.repeat(data.brick()[..., None], 3, axis=2), (2000, 1000))
    noise = cv2.resize(np.random.default_rng(0).integers(0, 256, (25, 50, 3), dtype=np.uint8), (2000, 1000))
    frames = {"black": black, "white": black + 255, "landscape": landscape}
    return {**frames, "face": face, "bricks": bricks, "noise": noise}


def call(*argv) -> int:
    return predict.main([str(a) for a in argv])


def read_table(folder: Path) -> pd.DataFrame:
    table = pd.read_csv(folder / "predictions.csv", keep_default_na=True)
    table["flags"] = table["flags"].astype(object).fillna("")
    return table.set_index(pd.Index([Path(f).stem.removesuffix(" ü") for f in table["file"]]))


@pytest.fixture(scope="module")
def model(trained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "model.zip"
    assert call("pack", trained / "out", "--to", path) == 0
    return path


@pytest.fixture(scope="module")
def predicted(model, photos, tmp_path_factory) -> Path:
    "The output of a call with the bundle."
    out = tmp_path_factory.mktemp("predicted")
    assert call("--model", model, photos, "--output", out) == 0
    return out


def list_files(folder: Path) -> dict[str, tuple]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_a_run_and_its_bundle_give_the_numbers_of_submit(trained, model, photos, predicted, tmp_path):
    """In the batches of `submit` to 1e-5 g, and in others to 2e-3 g.

    In another batch, or on more threads, oneDNN adds up otherwise: 1e-5 in a feature, which the probe of this
    run, a ridge on 1,600 features of 24 photos, makes 4e-4 g. The cache keeps features of training's batches.
    """
    before, run = list_files(trained / "out"), copy_run(trained, tmp_path / "submit")
    shutil.rmtree(run.artefacts / "cache")
    files = {path.stem.removesuffix(" ü"): path for path in photos.rglob("ID*")}
    for name, path in files.items():
        shutil.copy(path, run.input / "test" / f"{name}.jpg")
    order = [files[Path(p).stem] for p in pd.read_csv(run.input / "test.csv")["image_path"].unique()]
    for source, output in ((trained / "out", "run"), (model, "bundle")):
        assert call("--model", source, *order, "--output", tmp_path / output) == 0
    assert list_files(trained / "out") == before, "the run stays as it is"
    run_submit(run)
    grams = pd.read_csv(run.output / "submission.csv").set_index("sample_id")["target"]
    for output, limit in ((tmp_path / "run", 1e-5), (tmp_path / "bundle", 1e-5), (predicted, 2e-3)):
        table = read_table(output)
        names = [n for n in table.index if n.startswith("ID")]
        wanted = [[grams[f"{name}__{t}"] for t in TARGETS] for name in names]
        assert len(names) == 6
        assert np.abs(table.loc[names, NUMBERS].to_numpy() - wanted).max() <= limit, output


def test_the_table_and_the_page(photos, predicted):
    table = read_table(predicted)
    assert len(table) == 13 and table["paddock"].nunique() == 3
    assert table.loc["broken", "flags"] == "not readable" and np.isnan(table.loc["broken", "Dry_Total_g"])
    known = table.drop(index="broken")
    for name in ("Dry_Green", "Dry_Dead", "Dry_Clover", "GDM", "Dry_Total"):
        assert np.allclose(known[f"{name}_kg_ha"], known[f"{name}_g"] * 10 / 0.21, atol=1e-3)
        low, value, high = (known[f"{name}_g{end}"] for end in ("_low", "", "_high"))
        assert (low <= value).all() and (value <= high).all()
    page = (predicted / "predictions.html").read_text(encoding="utf-8")
    assert page.count("<article") == 3 + 13 and "<script" not in page and "river flat" in page
    assert page.count("Density of") == 12, "model 1 makes maps"


def test_odd_pictures_are_flagged(predicted):
    flags = read_table(predicted)["flags"]
    assert all("unlike the training photos" in flags[name] for name in odd_pictures())
    assert "dark" in flags["black"] and "over- or underexposed" in flags["white"]


def test_a_bundle_holds_no_photo_and_no_label(trained, model, tmp_path):
    labels = np.load(trained / "out" / "artefacts" / "boosting" / "labels.npz")
    with zipfile.ZipFile(model) as archive:
        names = archive.namelist()
        text = b"".join(archive.read(n) for n in names if n.endswith((".json", ".md")))
        archive.extract("artefacts/boosting/model.joblib", tmp_path)
    forbidden = (".jpg", ".png", "labels.npz", ".parquet", "halves.npy", "folds.csv")
    assert not any(n.endswith(forbidden) for n in names)
    assert not any(str(i).encode() in text for i in labels["image_id"]), "names of training photos"
    columns = [f(column) for column in labels["y"].T for f in (np.asarray, np.sqrt)]
    for array in list_arrays(joblib.load(tmp_path / "artefacts/boosting/model.joblib")):
        assert not any(len(array) == len(c) and np.allclose(array, c, atol=1e-3) for c in columns)


def list_arrays(thing, seen=None):
    "Yield every column of every numeric array inside `thing`."
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, np.ndarray) and thing.dtype.kind == "f" and 1 <= thing.ndim <= 2:
        yield from thing.reshape(len(thing), -1).T
    elif isinstance(thing, dict | list | tuple):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from list_arrays(part, seen)
    elif hasattr(thing, "__dict__"):
        yield from list_arrays(vars(thing), seen)


def change_manifest(model: Path, to: Path, **changes) -> Path:
    with zipfile.ZipFile(model) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "manifest.json":
                content = json.dumps(json.loads(content) | changes).encode()
            new.writestr(name, content)
    return to


def test_another_version_or_a_broken_bundle_is_refused(model, photos, tmp_path, capsys):
    half = tmp_path / "half.zip"
    half.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    refused(capsys, tmp_path, "is not a whole bundle", "--model", half, photos)
    cases = {
        "is of nbs_lib 0.0.9 (here 0.1.0)": {"nbs_lib": "0.0.9"},
        "scikit-learn 0.99 (here ": {"estimators": {"scikit-learn": "0.99"}},
        "blend.json is broken": {"files": {"artefacts/blend.json": "0"}},
        "is not a whole bundle": {"files": {"../x": "0"}},
    }
    for message, changes in cases.items():
        path = change_manifest(model, tmp_path / "changed.zip", **changes)
        refused(capsys, tmp_path, message, "--model", path, photos)


def refused(capsys, tmp_path: Path, message: str, *argv) -> None:
    "The call ends with 2, one line, and no output."
    assert call(*argv, "--output", tmp_path / "nothing") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    assert not (tmp_path / "nothing").exists()


def test_bad_calls_are_refused_in_one_line(model, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jpg").write_text("no photo")
    refused(capsys, tmp_path, "no photo found", "--model", model, tmp_path / "empty")
    refused(capsys, tmp_path, "there is no such photo or folder", "--model", model, tmp_path / "gone")
    refused(capsys, tmp_path, "none could be read", "--model", model, tmp_path / "texts")
    refused(capsys, tmp_path, "there is no such run or bundle", "--model", tmp_path / "gone", photos)
    refused(capsys, tmp_path, "holds no artefacts/blend.json", "--model", tmp_path / "empty", photos)
    refused(capsys, tmp_path, "not a whole bundle", "--model", photos / "hill" / "notes.txt", photos)
    refused(capsys, tmp_path, "--area: must be from 0.1 to 2 (-1)", "--model", model, photos, "--area", "-1")
    wide = "--ground-width", "wide"
    refused(capsys, tmp_path, "--ground-width: not a number (wide)", "--model", model, photos, *wide)
    assert call("--model", model, photos, "--output", model) == 2
    assert "is a file; give a folder" in capsys.readouterr().err
    long = tmp_path / ("a" * 300)
    refused(capsys, tmp_path, f"{long}: cannot be read (File name too long)", "--model", long, photos)
    refused(capsys, tmp_path, f"{long}: cannot be read (File name too long)", "--model", model, long)
    with pytest.raises(SystemExit) as e:
        call(photos)
    assert e.value.code == 2


def test_area_location_and_heic(model, photos, tmp_path):
    heif = pytest.importorskip("pillow_heif")
    source, exif = next((photos / "hill").glob("ID*")), Image.Exif()
    exif[ExifTags.Base.DateTime] = "2015:09:04 10:30:00"
    exif[ExifTags.IFD.GPSInfo] = {1: "S", 2: (41.0, 30.0, 0.0), 3: "E", 4: (147.0, 0.0, 0.0)}
    heif.from_pillow(Image.open(source)).save(tmp_path / "IMG_1.HEIC", exif=exif.tobytes(), quality=95)
    call("--model", model, tmp_path / "IMG_1.HEIC", "--output", tmp_path / "a", "--ground-width", "1")
    row, = read_table(tmp_path / "a").to_dict("records")
    assert row["latitude"] == -41.5 and row["time"].startswith("2015-09-04")
    assert row["Dry_Total_kg_ha"] == pytest.approx(row["Dry_Total_g"] * 10 / 0.21, abs=1e-3)
    assert "1 m along the long side" in (tmp_path / "a" / "predictions.html").read_text()
    call("--model", model, tmp_path / "IMG_1.HEIC", "--output", tmp_path / "b", "--no-location")
    assert not {"time", "latitude", "longitude"} & set(read_table(tmp_path / "b").columns)
    page = (tmp_path / "b" / "predictions.html").read_text()
    assert "147.0" not in page and "2015-09-04" not in page


def test_the_distance_counts_whole_sites():
    "Photos alike within a site: the limits come from other sites, so an unseen site is mostly not flagged."
    rng = np.random.default_rng(1)
    sites = np.repeat(np.arange(20), 6)
    X = rng.normal(0, 1, (20, 60))[sites] + rng.normal(0, 0.2, (120, 60))
    distance = bundle.fit_distance(X[:90], sites[:90])
    assert (distance.measure(X[90:]) > 1).mean() <= 0.3 and (distance.measure(X[:90]) <= 1).all()


def test_a_run_whose_model_2_cannot_be_read_is_not_packed(trained, tmp_path, capsys):
    shutil.copytree(trained / "out", tmp_path / "run", copy_function=os.link)
    broken = tmp_path / "run" / "artefacts" / "boosting" / "model.joblib"
    broken.unlink()
    broken.write_bytes(b"\x80\x05garbage")
    assert call("pack", tmp_path / "run", "--to", tmp_path / "model.zip") == 2
    assert "run the stage boosting again, then pack" in capsys.readouterr().err
    assert not (tmp_path / "model.zip").exists()


def test_own_cuts_correct_the_predictions(model, photos, predicted, tmp_path, capsys):
    "Quadrats that weigh twice what was predicted raise all predictions, and a table says by how much."
    before = read_table(predicted)
    weighed = before[before["Dry_Total_g"].notna()]
    cuts = weighed.assign(Dry_Total_g=2 * weighed["Dry_Total_g"])[["file", "Dry_Total_g"]]
    cuts.to_csv(tmp_path / "cuts.csv", index=False)
    words = ("--model", model, photos, "--output", tmp_path / "out", "--calibrate")
    assert call(*words, tmp_path / "cuts.csv") == 0
    after = read_table(tmp_path / "out").loc[weighed.index]
    assert (after["Dry_Total_g"] > weighed["Dry_Total_g"]).all()
    assert after["Dry_Total_g"].mean() > 1.1 * weighed["Dry_Total_g"].mean()
    assert "Calibrated by 12 weighed quadrats: Total." in (tmp_path / "out" / "predictions.html").read_text()
    assert "error without" in capsys.readouterr().out
    assert call("--model", model, photos, "--output", tmp_path / "later", "--area", "0.49",
                "--calibrate", tmp_path / "out" / "calibration.json") == 0
    assert "no cuts in" not in capsys.readouterr().err
    assert "Calibrated by 12 weighed" in (tmp_path / "later" / "predictions.html").read_text()


@pytest.mark.parametrize("area", [0.21, 0.49])
def test_a_calibration_serves_later_photos_of_the_paddock(plain, model, tmp_path, capsys, area):
    "Its numbers are those of the call with the cuts, kept for a quadrat whatever area the cuts had."
    plain[1] = model
    (tmp_path / "cuts.csv").write_text(CUTS)
    words, out = (*plain, "--area", area), (tmp_path / "cuts", tmp_path / "later")
    assert call(*words, "--output", out[0], "--calibrate", tmp_path / "cuts.csv") == 0
    assert call(*words, "--output", out[1], "--calibrate", out[0] / "calibration.json") == 0
    pd.testing.assert_frame_equal(*map(read_table, out))
    path = out[0] / "calibration.json"
    record = json.loads(path.read_text())
    assert call(*plain, "--ground-width", "1", "--output", out[1], "--calibrate", path) == 0
    assert "was fitted at another --ground-width or --area" in capsys.readouterr().err
    for changed, message in (
        ({**record, "model": "1"}, "is of another model"),
        ([1], "is no calibration.json"),
        ({**record, "calibration": {}}, "fit it again"),
        ({**record, "calibration": {**record["calibration"], "used": dict.fromkeys("01234", 1)}}, "missing"),
    ):
        path.write_text(json.dumps(changed))
        refused(capsys, tmp_path, message, *words, "--calibrate", path)
    path.unlink()
    refused(capsys, tmp_path, "is no calibration.json", *words, "--calibrate", path)


def answer_by_name(model, paths, maps, ground) -> list[dict]:
    "Stand in for `predict.predict_piece`: grams from the name of the file."
    grams = [np.array([3.0, 1, 1, 4, 5]) * (1 + sum(path.name.encode()) % 7) for path in paths]
    return [{"grams": y.tolist(), "distance": 0.5, "flags": [], "crop": "", "pictures": {}} for y in grams]


@pytest.fixture
def plain(tmp_path, monkeypatch) -> list:
    "The call for seven pictures in two folders, answered two at a time by their names."
    for i in range(7):
        path = tmp_path / "farm" / ("hill" if i < 3 else "flat") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100 + i)).save(path)
    monkeypatch.setattr(predict, "predict_piece", answer_by_name)
    monkeypatch.setattr(predict, "PIECE", 2)
    return ["--model", "", tmp_path / "farm"]


def test_an_interrupted_call_goes_on_where_it_stopped(plain, model, tmp_path, monkeypatch, capsys):
    plain[1], asked = model, []

    def stop_at_five(model, paths, maps, ground):
        asked.extend(path.name for path in paths)
        if len(asked) > 5:
            raise KeyboardInterrupt
        return answer_by_name(model, paths, maps, ground)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(predict, "predict_piece", stop_at_five)
        call(*plain, "--output", tmp_path / "stopped")
    assert [p.name for p in (tmp_path / "stopped").iterdir()] == ["answers"], "nothing looks finished"
    Image.new("RGB", (200, 99)).save(tmp_path / "farm" / "hill" / "1.png")  # taken again
    asked.clear()
    monkeypatch.setattr(predict, "predict_piece", lambda *a: asked.extend(a[1]) or answer_by_name(*a))
    assert call(*plain, "--output", tmp_path / "stopped") == 0
    known = [p.name for p in photo_files.find_photos([plain[2]])][:4]
    assert "of 7 photos are answered already" in capsys.readouterr().out
    assert sorted(p.name for p in asked) == sorted({f"{i}.png" for i in range(7)} - set(known) | {"1.png"})
    assert call(*plain, "--output", tmp_path / "whole") == 0
    for name in ("predictions.csv", "paddocks.csv", "predictions.html"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_photo_that_may_not_be_opened_stops_no_other(plain, model, tmp_path, monkeypatch):
    def deny(path):
        if Path(path).name == "3.png":
            raise PermissionError(13, "Permission denied")
        return Path(path).name

    plain[1] = model
    monkeypatch.setattr(predict, "hash_file", deny)
    assert call(*plain, "--output", tmp_path / "out") == 0 and len(read_table(tmp_path / "out")) == 7


def test_photos_of_a_paddock_are_averaged(plain, model, tmp_path):
    "By folder, and by a table that names paddocks for some of the photos."
    plain[1] = model
    assert call(*plain, "--output", tmp_path / "out") == 0
    means = pd.read_csv(tmp_path / "out" / "paddocks.csv").set_index("paddock")
    table = read_table(tmp_path / "out")
    assert means["photos"].to_dict() == {"flat": 4, "hill": 3}
    own = table[table["paddock"] == "flat"]
    assert means.loc["flat", "Dry_Total_kg_ha"] == pytest.approx(own["Dry_Total_kg_ha"].mean())
    widths = means["Dry_Total_g_high"] - means["Dry_Total_g_low"]
    assert (means["Dry_Total_g_low"] < means["Dry_Total_g"]).all() and (widths > 0).all()
    (tmp_path / "p.csv").write_text("file,paddock\n0.png,north\n3.png,north\n4.png,\n")
    assert call(*plain, "--output", tmp_path / "out", "--paddocks", tmp_path / "p.csv") == 0
    means = pd.read_csv(tmp_path / "out" / "paddocks.csv").set_index("paddock")
    assert means["photos"].to_dict() == {"flat": 3, "hill": 2, "north": 2}
    assert "<h2>north</h2>" in (tmp_path / "out" / "predictions.html").read_text()


def read_crops(monkeypatch, folder: Path) -> list:
    "Answer by names from now on; return the list that gets {name: shape of the photo that a model is shown}."
    seen = []

    def measure(model, paths, maps, ground):
        files, _ = photo_files.crop_files(paths, ground, folder / str(len(seen)))
        shapes = [cv2.imread(str(file)).shape[:2] for file in files]
        seen.append({path.name: shape for path, shape in zip(paths, shapes, strict=True)})
        return answer_by_name(model, paths, maps, ground)

    monkeypatch.setattr(predict, "predict_piece", measure)
    monkeypatch.setattr(predict, "PIECE", 99)
    return seen


def test_other_formats_are_cropped_to_the_learned_width(model, tmp_path, monkeypatch):
    "What a model is shown: 2:1, 0.70 m wide; the area is that of the whole photo, before cropping."
    farm, seen = tmp_path / "farm", read_crops(monkeypatch, tmp_path / "cropped")
    farm.mkdir()
    sides = {"phone": (400, 300), "upright": (300, 400), "competition": (400, 200), "square": (400, 400),
             "wide": (400, 150)}
    for name, size in sides.items():
        Image.new("RGB", size).save(farm / f"{name}.png")
    words = "--model", model, farm, "--output", tmp_path / "out"
    for more in ((), ("--ground-width", "1.4"), ("--area", "1.26"), ("--area", "0.84")):
        assert call(*words, *more) == 0
    plain, wide, phone, flat = seen
    assert plain == {"phone.png": (200, 400), "upright.png": (400, 200), "competition.png": (200, 400),
                     "square.png": (200, 400), "wide.png": (200, 400)}
    assert set(wide.values()) == {(100, 200), (200, 100)}, "1.4 m: half of the width is shown"
    assert phone["phone.png"] == flat["competition.png"] == (100, 200), "six and four quadrats"
    assert phone["upright.png"] == (200, 100)


def test_kg_per_hectare_are_those_of_the_learned_quadrat(plain, tmp_path, monkeypatch, model):
    "5 g on 0.21 m2 are 238 kg/ha, whatever area the photo shows; grams and interval are for `--area`."
    plain[1] = model
    assert call(*plain, "--output", tmp_path / "a") == 0
    assert call(*plain, "--output", tmp_path / "b", "--area", ".84") == 0
    assert call(*plain, "--output", tmp_path / "c", "--ground-width", "1.4") == 0
    one, area, width = (read_table(tmp_path / name) for name in "abc")
    assert np.allclose(one["Dry_Total_kg_ha"], one["Dry_Total_g"] * 10 / 0.21, atol=1e-3)
    for name in ("Dry_Total", "Dry_Total_low", "Dry_Total_high"):
        kg, grams = (name.replace("Total", f"Total_{unit}") for unit in ("kg_ha", "g"))
        assert np.allclose(one[kg], area[kg]) and np.allclose(4 * one[grams], area[grams])
        assert np.allclose(one[kg], width[kg]) and np.allclose(one[grams], width[grams])


def test_a_phone_photo_is_named_as_cropped_and_not_flagged(photos, model, tmp_path, capsys):
    "Its numbers are those of its middle; a 2:1 photo is used as it is."
    source = next((photos / "hill").glob("ID*"))
    whole = cv2.imread(str(source))
    more = whole.shape[1] // 8  # above and below: 4:3
    phone = cv2.copyMakeBorder(whole, more, more, 0, 0, cv2.BORDER_REFLECT)
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "whole.png"), whole)
    cv2.imwrite(str(tmp_path / "in" / "phone.png"), phone)
    assert call("--model", model, tmp_path / "in", "--output", tmp_path / "out") == 0
    assert "1 of 2 photos were cropped to 2:1" in capsys.readouterr().out
    table = read_table(tmp_path / "out")
    size = f"{phone.shape[1]} x {phone.shape[0]}"
    assert table["crop"].fillna("").to_dict() == {"phone": f"cropped to 2:1 ({size})", "whole": ""}
    assert table.loc["phone", "flags"] == table.loc["whole", "flags"].replace(
        f"{whole.shape[1]} x {whole.shape[0]}", size)
    assert np.allclose(table.loc["phone", NUMBERS].astype(float), table.loc["whole", NUMBERS].astype(float))
    assert f"cropped to 2:1 ({size})" in (tmp_path / "out" / "predictions.html").read_text()


def test_paddocks_without_cuts_are_named_when_they_are_corrected(plain, model, tmp_path, capsys):
    plain[1] = model
    (tmp_path / "cuts.csv").write_text(CUTS)
    words = *plain, "--calibrate", tmp_path / "cuts.csv", "--output", tmp_path / "out"
    assert call(*words) == 0
    message = "no cuts in flat, whose predictions are corrected too; predict one paddock a call"
    assert message in capsys.readouterr().err
    names = "".join(f"{i}.png,all\n" for i in range(7))
    (tmp_path / "paddocks.csv").write_text(f"file,paddock\n{names}")
    assert call(*words, "--paddocks", tmp_path / "paddocks.csv") == 0
    assert "no cuts in" not in capsys.readouterr().err


def test_weights_far_from_the_predictions_are_asked_about(plain, model, tmp_path, capsys):
    "Numbers of another unit that no limit catches, such as kg/ha of a sparse paddock."
    plain[1] = model
    for factor, is_asked in ((1, False), (9, True)):
        rows = "".join(f"{i}.png,{factor * (20 + 5 * i)}\n" for i in range(3))
        (tmp_path / "cuts.csv").write_text(f"file,Dry_Total_g\n{rows}")
        assert call(*plain, "--calibrate", tmp_path / "cuts.csv", "--output", tmp_path / "out") == 0
        assert ("are they grams of dry matter" in capsys.readouterr().err) == is_asked


CUTS = "file,Dry_Total_g\n0.png,40\n1.png,55\n2.png,61\n"


@pytest.mark.parametrize(("option", "text", "message"), [
    ("--calibrate", CUTS.replace("1.png", "9.png"), "file '9.png' fits 0 photos"),
    ("--calibrate", CUTS.replace("55", "-55"), "Dry_Total_g of 1.png is '-55'; give grams"),
    ("--calibrate", CUTS.replace("55", ""), "1.png has no number"),
    ("--calibrate", CUTS.replace("40", ".04").replace("55", ".06").replace("61", ".1"), "like kg; give"),
    ("--calibrate", CUTS.replace("55", "2600"), "the largest number is 2600, which looks like kg a hectare"),
    ("--calibrate", CUTS.replace("Dry_Total_g", "total"), "give 'file' and any of Dry_Green_g"),
    ("--paddocks", CUTS, "give 'file' and any of paddock"),
    ("--paddocks", "file,paddock\n9.png,north\n", "file '9.png' fits 0 photos"),
    ("--paddocks", "file,paddock\n1.png,north\n1.png,south\n", "1.png is in two paddocks"),
])
def test_a_wrong_table_is_refused_before_the_model_is_opened(plain, tmp_path, capsys, option, text, message):
    (tmp_path / "table.csv").write_text(text)
    refused(capsys, tmp_path, message, *plain, option, tmp_path / "table.csv")


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(plain, model, tmp_path, monkeypatch, capsys):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    plain[1] = model
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", no_space)
        refused(capsys, tmp_path, "No space left on device); free disk space, or set TMPDIR", *plain)
    with monkeypatch.context() as patch:
        patch.setattr(predict, "write_json", no_space)
        refused(capsys, tmp_path, "cannot be written (No space left on device); choose another", *plain)
    monkeypatch.setattr(os, "fsync", no_space)  # at the end of the first file
    assert call(*plain, "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list((tmp_path / "out").rglob("*.*"))


def test_the_kernel_predicts_an_attached_dataset_with_an_extracted_bundle(
    plain, model, tmp_path, monkeypatch
):
    "Kaggle extracts the zips of a dataset, and its input is read only."
    root = tmp_path / "input" / "datasets" / "ann"
    shutil.copytree(tmp_path / "farm", root / "photos")
    with zipfile.ZipFile(model) as archive:
        archive.extractall(root / "bundle" / "model")
    before = list_files(root)
    monkeypatch.setenv("NBS_KAGGLE_INPUT", str(tmp_path / "input"))
    parameters = kaggle.KAGGLE_PARAMETERS | {"output": str(tmp_path / "working")}
    kernel, settings = kaggle.KAGGLE_KERNELS["predict"], load_settings("kaggle")
    names: dict = {}
    for cell in kaggle.build_kernel_notebook(kernel, settings, parameters).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
    assert len(names["predictions"]) == 7 and list_files(root) == before
    written = {path.name for path in (tmp_path / "working").iterdir()}
    assert written == {"predictions.csv", "paddocks.csv", "predictions.html"}
    with bundle.open_model(model) as one, bundle.open_model(root / "bundle" / "model") as other:
        assert one.key == other.key
    shutil.copytree(root / "bundle", root / "another")
    with pytest.raises(InputError, match="2 bundles; attach one"):
        predict.predict_attached(str(tmp_path / "input"), str(tmp_path / "working"))


@pytest.mark.slow
def test_a_killed_call_is_continued_by_the_next(photos, model, tmp_path):
    """SIGKILL after the first answers; the second call gives the table and the page of an undisturbed one.

    The batches of the second call depend on the moment of the kill, and so do the last digits of its sums.
    """
    words = [sys.executable, "-c", "from nbs_lib import predict; predict.PIECE = 2; predict.main()",
             "--model", str(model), str(photos / "hill"), str(photos / "river flat"), "--output"]
    process = subprocess.Popen([*words, str(tmp_path / "killed")])
    while not list(tmp_path.glob("killed/answers/*.json")) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -9 and not list(tmp_path.glob("killed/*.*"))
    again = subprocess.run([*words, str(tmp_path / "killed")], capture_output=True, text=True, check=True)
    assert "of 7 photos are answered already" in again.stdout
    subprocess.run([*words, str(tmp_path / "whole")], check=True)
    calls = tmp_path / "killed", tmp_path / "whole"
    for name in ("predictions.csv", "paddocks.csv"):
        killed, whole = (pd.read_csv(call / name) for call in calls)
        pd.testing.assert_frame_equal(killed, whole, rtol=1e-3, atol=1e-2)
    pages = [(call / "predictions.html").read_text(encoding="utf-8") for call in calls]
    killed, whole = (re.sub(r'data:[^"]+|[\d.,]+', "", page) for page in pages)
    assert killed == whole and len({page.count("data:image") for page in pages}) == 1


def test_a_bundle_holds_all_shards_of_the_frozen_weights(tmp_path):
    "An index alone would be refused at the first photo, away from the machine that trained."
    names = ["model-1.safetensors", "model-2.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(b"weights")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    settings = load_settings("laptop", overrides=[f"frozen.weights={index}", "siglip.weights="])
    paths = bundle.copy_weights(Run(tmp_path, tmp_path, settings), tmp_path / "to")
    assert paths == {"frozen.weights": f"weights/frozen/{index.name}"}
    assert {p.name for p in (tmp_path / "to" / "weights" / "frozen").iterdir()} == {index.name, *names}
