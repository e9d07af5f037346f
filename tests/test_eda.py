"""Stage eda: the image statistics, contact sheets, baselines, and what a run writes and shows."""
import io
import json

import cv2
import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import command
from PIL import Image
from tiny import competition, grass

from nbs_lib import eda
from nbs_lib.images import read_photo, to_landscape
from nbs_lib.runtime import InputError
from nbs_lib.stages import open_run
from nbs_lib.tables import read_competition
from nbs_lib.targets import TARGETS


# ---- image statistics
def facts_by_definition(photo: np.ndarray) -> dict[str, float]:
    "Compute `FACTS` by their definitions: interleaved pixels, a full sort, masks."
    full = cv2.resize(photo, (800, 400), interpolation=cv2.INTER_AREA)
    rgb = full.astype(np.float32)
    grey = rgb.mean(2) / 255 + 1e-3
    r, g, b = np.moveaxis((rgb + 1) / (rgb + 1).sum(2, keepdims=True), 2, 0)
    excess = 2 * g - r - b
    edge = np.ones(grey.shape, bool)
    edge[12:-12, 12:-12] = False
    dark, pale = grey < 0.22, (grey > 0.55) & (rgb.max(2) - rgb.min(2) < 40)
    coarse, blocks = (cv2.resize(grey, size, interpolation=cv2.INTER_AREA) for size in ((100, 50), (16, 8)))
    h, s, v = np.moveaxis(cv2.cvtColor(full, cv2.COLOR_RGB2HSV), 2, 0)
    return {
        "green_cover": (excess > 0.1).mean(), "excess_green": excess.mean(), "redness": (r - b).mean(),
        "straw_cover": ((r > g) & (g > b) & (excess < 0.06) & (grey > grey.mean())).mean(),
        "brightness": grey.mean(), "contrast": grey.std() / grey.mean(),
        "gaps": np.sort(grey, axis=None)[: grey.size // 10].mean() / grey.mean(),
        "fine_texture": np.abs(np.diff(grey)).mean() / grey.mean(),
        "coarse_texture": np.abs(np.diff(coarse)).mean() / grey.mean(),
        "lamps": ((r > 0.55) & (g < 0.25) & (rgb[..., 0] > 180)).mean(),
        "dark_border": dark[edge].mean() - dark[~edge].mean(),
        "pale_edge": max(part.mean() for part in (pale[:20], pale[-20:], pale[:, :20], pale[:, -20:])),
        "shadow": (blocks < 0.6 * np.median(blocks)).mean(),
        "orange_rule": ((h >= 5) & (h <= 25) & (s > 150) & (v > 150)).mean(),
    }


def test_facts_match_their_definitions(small_paddock, tmp_path):
    folders = competition(tmp_path / "tiny"), small_paddock
    photos = [read_photo(p) for folder in folders for p in read_competition(folder).paths("train")[::6]]
    photos += [grass(0), np.zeros((200, 400, 3), np.uint8), np.full((200, 400, 3), 255, np.uint8)]
    rods = grass(1)
    rods[-60:], rods[:40], rods[300:340, 500:900] = 190, 10, (255, 30, 20)
    for photo in (*photos, rods):
        expected, found = facts_by_definition(photo), eda.photo_facts(photo)
        assert set(found) == set(expected) and list(found) == list(eda.FACTS)
        assert found == pytest.approx(expected, abs=1e-6)


def test_thumbnails_are_in_the_order_of_the_table(small_paddock):
    comp = read_competition(small_paddock)
    facts, thumbnails = eda.describe_photos(comp)
    assert list(facts.index) == list(comp.train["image_id"])
    assert thumbnails.shape == (42, 150, 300, 3) and thumbnails.dtype == np.uint8
    for path, thumbnail in zip(comp.paths("train"), thumbnails, strict=True):
        photo = cv2.resize(to_landscape(read_photo(path)), (30, 15), interpolation=cv2.INTER_AREA).astype(int)
        assert np.abs(cv2.resize(thumbnail, (30, 15), interpolation=cv2.INTER_AREA) - photo).mean() < 1


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 half", b"no photo at all"])
def test_eda_names_a_broken_photo(tmp_path, content):
    (tmp_path / "ID7.jpg").write_bytes(content)
    with pytest.raises(InputError, match="ID7.jpg"):
        eda.describe_photo(tmp_path / "ID7.jpg")


# ---- contact sheets
def pixels(sheet) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sheet.data)).convert("RGB")).astype(int)


def flat(*colours: tuple[int, int, int]) -> np.ndarray:
    "Make a thumbnail of one colour for each of `colours`."
    return np.stack([np.full((150, 300, 3), colour, np.uint8) for colour in colours])


@pytest.mark.parametrize(("columns", "width"), [(1, 300), (3, 300), (4, 225), (6, 150)])
def test_sheet_tiles_row_by_row(columns, width):
    colours = [(30 * k, 200 - 20 * k, 120) for k in range(7)]
    sheet = pixels(eda.draw_contact_sheet(flat(*colours), [""] * 7, columns))
    height = width // 2 + 16
    assert sheet.shape == (-(-7 // columns) * height, columns * width, 3) and sheet.shape[1] <= 900
    for k, colour in enumerate(colours):
        centre = sheet[k // columns * height + 16 + width // 4, k % columns * width + width // 2]
        assert np.abs(centre - colour).max() < 12


def test_sheet_draws_titles_in_their_colours():
    black, green = (
        pixels(eda.draw_contact_sheet(flat((9, 9, 9)), ["45 g · Tas"], 1, colours))[:12, :60]
        for colours in ((), ("#2f7d32",))
    )
    assert black.min() < 60 and np.ptp(black.mean((0, 1))) < 1
    assert (green[..., 1] - green[..., 0]).mean() > 5
    assert pixels(eda.draw_contact_sheet(flat((9, 9, 9)), [""], 1))[:12].min() > 240
    with pytest.raises(ValueError):
        eda.draw_contact_sheet(flat((9, 9, 9)), ["one", "too many"])


def drawn(monkeypatch, draw, *args, **kwargs) -> tuple[list[int], list[str]]:
    "Return the positions of the photos that `draw` puts on its sheet, by their colour, and the titles."
    sheets = []
    monkeypatch.setattr(eda, "draw_contact_sheet", lambda *sheet, **_: sheets.append(sheet))
    draw(*args, **kwargs)
    photos, titles, *_ = sheets[0]
    return [int(photo[0, 0, 0]) for photo in photos], list(titles)


def numbered(count: int) -> np.ndarray:
    "Make `count` thumbnails whose red is their position."
    return flat(*((k, 0, 0) for k in range(count)))


def test_outliers_are_ranked_and_named(monkeypatch):
    rng = np.random.default_rng(0)
    facts = pd.DataFrame(rng.normal(0, 1, (40, 3)), columns=["redness", "gaps", "shadow"])
    facts.loc[[7, 3, 5], "gaps"] = [12.0, 10, 9]
    facts.loc[11, "shadow"] = 8
    score = eda.outlier_score(facts)
    assert score.idxmax() == 7 and score[[7, 3, 5, 11]].min() > score.drop([7, 3, 5, 11]).max()
    found, titles = drawn(monkeypatch, eda.draw_outliers, facts, numbered(40), count=4)
    assert found[:3] == [7, 3, 11] and titles[:3] == ["gaps 12.00", "gaps 10.00", "shadow 8.00"]
    assert 5 not in found, "at most two outliers of one fact"


def test_sheet_marks_disturbances_that_do_not_occur(monkeypatch):
    facts = pd.DataFrame(0.0, index=["a", "b", "c"], columns=list(eda.FACTS))
    facts.loc["b", "lamps"], facts.loc["c", "shadow"] = 0.2, 0.5
    found, titles = drawn(monkeypatch, eda.draw_disturbances, facts, numbered(3), each=5)
    assert len(found) == 3 * 6 and found[0] == 1 and found[3] == 2
    expected = "lamps 0.200,no dark_border,no pale_edge,shadow 0.500,no redness,no orange_rule"
    assert titles[:6] == expected.split(",")


def test_photos_by_grams_go_from_least_to_most(small_paddock, monkeypatch):
    comp = read_competition(small_paddock)
    found, titles = drawn(monkeypatch, eda.draw_by_grams, comp, numbered(42), count=10)
    total = comp.y[found, -1]
    assert len(found) == 10 and (np.diff(total) >= 0).all() and total[-1] == comp.y[:, -1].max()
    assert titles[0].startswith(f"{total[0]:.0f} g · {comp.train['state'][found[0]]}")


def test_worst_errors_come_first(small_paddock, monkeypatch):
    comp = read_competition(small_paddock)
    predicted = comp.y.copy()
    predicted[[4, 9], -1] += (-80, 50)
    found, titles = drawn(monkeypatch, eda.draw_worst_errors, comp, predicted, numbered(42), count=2)
    wanted = f"measured {comp.y[4, -1]:.0f} g, predicted {predicted[4, -1]:.0f} g"
    assert found == [4, 9] and wanted in titles[0]


# ---- neighbours
def test_neighbours_are_compared_with_random_pairs(small_paddock, monkeypatch):
    comp = read_competition(small_paddock)
    n, rng, groups = len(comp.train), np.random.default_rng(1), comp.groups
    facts = pd.DataFrame(rng.normal(0, 1, (n, 4)))
    facts.iloc[30] = facts.iloc[2] + 1e-6
    nearest, distance = eda.nearest_neighbours(facts)
    assert nearest[30] == 2 and nearest[2] == 30 and distance.argmin() in (2, 30)
    assert (nearest != np.arange(n)).all()
    found = eda.neighbour_statistics(comp, facts)
    total = comp.y[:, -1]
    pairs = {"random": [(i, j) for i in range(n) for j in range(n) if i != j],
             "nearest": list(enumerate(nearest))}
    for kind, some in pairs.items():
        same_site = np.mean([groups[i] == groups[j] for i, j in some])
        difference = np.mean([abs(total[i] - total[j]) for i, j in some])
        assert found[f"{kind}_same_site"] == pytest.approx(same_site)
        assert found[f"{kind}_difference_g"] == pytest.approx(difference)
    photos, titles = drawn(monkeypatch, eda.draw_neighbours, comp, facts, numbered(n), count=3)
    assert photos[:2] == [2, 30] and len(photos) == 6
    assert titles[1] == f"pair 1: {groups[30].replace('|', ' ')} · {total[30]:.0f} g"
    assert len({tuple(sorted(p)) for p in zip(photos[::2], photos[1::2])}) == 3, "a pair is shown once"


# ---- baselines
def test_a_rare_fact_does_not_extrapolate_in_a_baseline():
    rng = np.random.default_rng(0)
    facts = pd.DataFrame({"excess_green": rng.normal(0.3, 0.1, 40), "lamps": 1e-9 * rng.random(40)})
    facts.loc[39, "lamps"] = 0.004
    y = 50 * facts[["excess_green"]].to_numpy() + np.zeros((40, 5))
    predicted = eda.predict_baselines(facts, y, np.arange(40) // 8)["ridge on facts"]
    assert np.abs(predicted - y).max() < 2


def test_a_baseline_is_fitted_without_the_held_out_fold():
    rng = np.random.default_rng(0)
    facts = pd.DataFrame(rng.normal(0, 1, (30, len(eda.FACTS))), columns=list(eda.FACTS))
    y, fold = rng.gamma(2, 10, (30, 5)), np.arange(30) % 3
    other = np.where(fold[:, None] == 1, 1000.0, y)
    before, after = eda.predict_baselines(facts, y, fold), eda.predict_baselines(facts, other, fold)
    for name, predicted in before.items():
        assert np.array_equal(predicted[fold == 1], after[name][fold == 1])
        assert not np.allclose(predicted[fold != 1], after[name][fold != 1])


# ---- tables and plots
def test_a_site_is_a_state_on_a_date_of_a_year():
    "Two states may be visited on one day, and one state on the same day of two years."
    dates = pd.to_datetime(["2015-06-26", "2015-06-26", "2015-06-26", "2014-06-26"])
    train = pd.DataFrame({"date": dates, "state": ["WA", "WA", "Vic", "Vic"], "species": "Clover"})
    train[list(TARGETS)] = 1.0
    assert eda.site_names(train).tolist() == ["26 Jun 2015 WA"] * 2 + ["26 Jun 2015 Vic", "26 Jun 2014 Vic"]
    assert eda.site_names(train[:3]).tolist() == ["26 Jun WA"] * 2 + ["26 Jun Vic"]
    for plot in (eda.plot_sites, eda.plot_composition):
        names = [label.get_text() for label in plot(train).axes[0].get_xticklabels()]
        assert names == ["26 Jun 2014 Vic", "26 Jun 2015 Vic", "26 Jun 2015 WA"]


def test_composition_names_the_parts_that_a_site_lacks(small_paddock):
    train = read_competition(small_paddock).train
    train.loc[train["state"] == "WA", "Dry_Dead_g"] = 0
    axes = eda.plot_composition(train).axes[0]
    order = train.sort_values(["date", "state"])
    zero = order.groupby(eda.site_names(order), sort=False)["Dry_Dead_g"].max() == 0
    assert zero.any() and not zero.all()
    assert ["no dead" in text.get_text().split("\n") for text in axes.texts] == zero.tolist()


# ---- the stage
def test_eda_stage(small_paddock, tmp_path, capsys):
    run = open_run(small_paddock, tmp_path / "out", "demo")
    summary, comp = eda.run_eda(run), read_competition(small_paddock)
    folds = pd.read_csv(run.artefacts / "folds.csv")
    assert list(folds["image_id"]) == list(comp.train["image_id"])
    assert all(len(set(folds["fold_grouped"][comp.groups == g])) == 1 for g in set(comp.groups))
    assert summary["photos"] == 42 and summary["zeros"]["Dry_Dead_g"] == (comp.y[:, 1] == 0).sum()
    assert set(summary["baselines"]["grouped"]) == {"constant", "greenness", "ridge on facts"}
    artefacts = {p.name for p in (run.artefacts / "eda").iterdir() if p.suffix != ".json"}
    assert artefacts == {"facts.csv", "baselines.csv", "thumbnails.npz"}
    assert all((run.artefacts / "eda" / name).with_suffix(".json").is_file() for name in artefacts)
    with np.load(run.artefacts / "eda" / "thumbnails.npz") as arrays:
        assert arrays["image_id"].tolist() == list(comp.train["image_id"])
        assert arrays["photo"].shape == (42, 150, 300, 3)
    assert eda.run_eda(run) == summary and "up to date" in capsys.readouterr().out
    (run.artefacts / "eda" / "thumbnails.npz").unlink()
    eda.run_eda(run)
    assert (run.artefacts / "eda" / "thumbnails.npz").is_file(), "a stage with a missing artefact runs again"


@pytest.mark.parametrize("photos", [2, 42])
def test_each_photo_is_decoded_once(small_paddock, tmp_path, monkeypatch, photos):
    "By the stage and its pictures together; also with so few photos that no sheet is full."
    import matplotlib.pyplot as plt

    folder = small_paddock if photos == 42 else competition(tmp_path / "two", 2, 1)
    decoded, shown = [], []
    monkeypatch.setattr(eda, "read_photo", lambda path: decoded.append(path) or read_photo(path))
    monkeypatch.setattr("IPython.display.display", lambda *images: shown.extend(images))
    monkeypatch.setattr(plt, "show", lambda: None)
    plt.close("all")
    run = open_run(folder, tmp_path / "out", "demo")
    eda.run_eda(run)
    table = eda.show_eda(run)
    assert sorted(decoded) == sorted(read_competition(folder).paths("train")) and len(decoded) == photos
    assert len(shown) == 5 and len(plt.get_fignums()) == 6
    assert list(table.index) == ["constant", "greenness", "ridge on facts"]
    plt.close("all")


@pytest.mark.slow
def test_executed_notebook_shows_small_pictures(paddock, tmp_path):
    "Six plots as PNG and five sheets of photos as JPEG; photos as PNG made a notebook of 8 MB."
    options = ("--profile", "demo", "--only", "eda", "--no-report")
    done = command(*options, "--input", paddock, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "notebooks" / "10_eda.ipynb"
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.source.startswith("#| run")]
    outputs = [o for cell in cells for o in cell.outputs]
    kinds = [kind for o in outputs for kind in o.get("data", {}) if kind.startswith("image/")]
    assert kinds == ["image/png"] * 5 + ["image/jpeg"] * 5 + ["image/png"]
    assert path.stat().st_size < 2_000_000
    assert json.loads((tmp_path / "run.json").read_text())["stages"][0]["warnings"] == []
