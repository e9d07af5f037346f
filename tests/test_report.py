"""report.html agrees with the files of a run of any kind, escapes all text, and opens in a browser."""
import asyncio
import re
import shutil
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from browser import find_browser, open_browser
from markupsafe import escape
from run_results import choose_example, write_results
from tiny import competition, fake_members, run_on

from nbs_lib import ensemble, report, scores
from nbs_lib.runtime import read_json, write_json
from nbs_lib.stages import Run, manifest_path
from nbs_lib.tables import (
    read_competition,
    read_draws,
    read_oof,
    to_long,
    write_draws,
    write_oof,
    write_submission,
)
from nbs_lib.targets import TARGETS, constant_prediction, from_parts, weighted_r2_score
from nbs_lib.validation import bootstrap_scores, left_out_coverage, random_site_folds

NASTY = "<script>alert(1)</script> & \"quoted\" 'species' $a_b$"
EDA = {"name": "eda", "status": "done", "seconds": 19.0, "peak_rss_gb": 0.7, "written_mb": 5.7,
       "network": "guard", "warnings": ["two <b>photos</b> are twins & more"]}
BOOSTING = {"name": "boosting", "status": "up to date", "seconds": 50.0, "peak_rss_gb": 2.3,
            "written_mb": 1.0, "network": "guard", "warnings": []}
RECORD = {"status": "done", "profile": "demo", "started": "2026-01-02T03:04:05Z", "stages": [EDA, BOOSTING],
          "versions": {"python": "3.12"}, "machine": {"cpus": 2},
          "sandbox": {"network": "namespace", "cpus": 0},
          "inputs": {"input/*.csv": {"files": 3, "blake2b": "abc"}}}
ALL_SECTIONS = ["scores", "predictions", "errors", "intervals", "worst", "maps", "blend",
                "submission", "warnings", "cost", "settings", "notebooks"]


def make_run(folder: Path, n_train=48, n_test=6, truth=True, blended=True, stored=True, draws=0) -> Run:
    "A run folder as the stages leave it, made without any model."
    root = competition(folder / "csiro-biomass", n_train, n_test, size=(128, 64))
    table = pd.read_csv(root / "train.csv")
    table["Species"] = np.where(table["State"] == "Tas", NASTY, table["Species"])
    table.to_csv(root / "train.csv", index=False)
    run, comp, rng = run_on(root, folder / "out"), read_competition(root), np.random.default_rng(1)
    ids, sent = comp.train["image_id"], from_parts(*rng.gamma(2, [13, 4, 6], (n_test, 3)).T)
    write_submission(run.output / "submission.csv", comp.sample, comp.test["image_id"], sent)
    if truth:
        labels = to_long(comp.test["image_id"], sent * rng.uniform(0.8, 1.25, (n_test, 1)))
        labels.to_csv(scores.truth_path(root), index=False)
    if blended:
        fake_members(run)
        folds = random_site_folds(comp.groups, 4, draws)
        for k, model in enumerate(("dinov3", "boosting")):
            noise = rng.normal(0, 5 + 5 * k, (draws, *comp.y.shape)).clip(-comp.y)
            write_draws(run, model, ids, folds, comp.y + noise)
        ensemble.run_ensemble(run)
    quality = {"image_id": ids, "split": "train", "height": 32, "width": 64, "lamps": 0.0,
               "stamp": 0.01 * (np.arange(n_train) % 9 == 0), "sharpness": rng.gamma(4, 99, n_train)}
    pd.DataFrame(quality).to_csv(run.artefact_path("photos", "photos.csv"), index=False)
    if stored:
        halves = rng.integers(0, 255, (n_train, 2, 90, 128, 3), dtype=np.uint8)
        np.save(run.artefact_path("photos", "train_90x128", "halves.npy"), halves)
        store = {"ids": ids.tolist(), "shape": [90, 128], "inpaint": run.settings.inpaint}
        write_json(run.artefact_path("photos", "train_90x128", "store.json"), store)
    return run


def write_failed_notebook(run: Run) -> None:
    "An executed notebook whose cell failed, with a link to one that was not executed."
    error = {"ename": "ZeroDivisionError", "evalue": "by <zero>", "traceback": ["by <zero>"]}
    cells = [nbformat.v4.new_markdown_cell("# Eda\nThen [20_inpaint](20_inpaint.ipynb)"),
             nbformat.v4.new_code_cell("1 / 0", outputs=[nbformat.v4.new_output("error", **error)])]
    (run.output / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), run.output / "notebooks/10_eda.ipynb")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run with everything there is: the run and its page."
    run = make_run(tmp_path_factory.mktemp("whole"))
    ids = read_competition(run.input).train["image_id"].to_numpy(str)
    measured = dict.fromkeys(TARGETS, 0.91)
    write_json(run.artefact_path("boosting", "intervals.json"), {"coverage": 0.9, "measured": measured})
    density = np.random.default_rng(0).gamma(2, 20, (48, 3, 4, 12)).astype(np.float16)
    np.savez(run.artefact_path("dinov3", "density.npz"), image_id=ids, density=density)
    write_failed_notebook(run)
    return run, report.write_report(run, RECORD).read_text(encoding="utf-8")


class Tree(HTMLParser):
    "Tags of a page with their attributes, in order, as a screen reader meets them."

    def __init__(self, text: str):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def all(self, *names):
        return [a for tag, a in self.tags if tag in names]


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)"', page)


def squeeze(page: str) -> str:
    "The page with every run of white space as one blank."
    return " ".join(page.split())


# ---- the page agrees with the files

def test_scores_are_those_of_the_files(whole):
    run, page = whole
    written, comp = read_json(run.output / "scores.json"), read_competition(run.input)
    ids = comp.train["image_id"].tolist()
    for scheme, name in (("grouped", "ensemble.parquet"), ("stratified", "ensemble_stratified.parquet")):
        predicted = read_oof(run.artefacts / "oof" / name, ids)
        score = written["oof"]["ensemble"][scheme]
        assert score["r2"] == pytest.approx(weighted_r2_score(comp.y, predicted), abs=1e-12)
        assert f'<div class="score">{score["r2"]:.3f}</div>' in page
        low, high = np.quantile(bootstrap_scores(comp.y, [predicted], comp.groups)[:, 0], [0.025, 0.975])
        assert score["interval_95"] == pytest.approx([low, high], abs=1e-9)
        assert scores.format_interval(low, high) in page
        assert scores.format_number(written["constant"][scheme]["r2"], 3) in page
    assert f'<div class="score">{written["test"]["ensemble"]["r2"]:.3f}</div>' in page


@pytest.mark.parametrize("draws", [0, 1, 3])
def test_scores_over_random_draws_of_sites(draws, tmp_path):
    run = make_run(tmp_path, draws=draws)
    page, comp = report.write_report(run, RECORD).read_text(encoding="utf-8"), read_competition(run.input)
    written = read_json(run.output / "scores.json")["draws"]
    assert set(written) == ({"constant", "dinov3", "boosting", "ensemble"} if draws else set())
    assert (f"{draws} random draws of sites" in page) == (draws > 0)
    for model in sorted(set(written) - {"constant"}):
        folds, y = read_draws(run, model, comp.train["image_id"].tolist())
        r2 = [weighted_r2_score(comp.y, p) for p in y]
        assert written[model]["r2"] == pytest.approx(np.mean(r2))
        assert written[model]["draws"] == draws == len(folds)
        assert written[model]["sd"] == (pytest.approx(np.std(r2, ddof=1)) if draws > 1 else None)
        assert f"{np.mean(r2):.3f}" in page
    if draws:
        constant = []
        for fold in folds:
            outs = [fold == k for k in np.unique(fold)]
            plain = np.concatenate([constant_prediction(comp.y[~out], int(out.sum())) for out in outs])
            constant.append(weighted_r2_score(np.concatenate([comp.y[out] for out in outs]), plain))
        assert written["constant"]["r2"] == pytest.approx(np.mean(constant))


def test_coverage_is_that_of_validation(whole):
    run, page = whole
    outputs = scores.read_outputs(run, RECORD)
    y, predicted, sites = outputs.y, outputs.predicted, outputs.competition.groups
    observed = left_out_coverage(y, predicted, sites, 0.9)
    assert f"held {scores.format_percent(observed[4])} of the totals" in squeeze(page)


def test_every_section_is_there(whole):
    page = whole[1]
    assert sections(page) == ALL_SECTIONS
    assert page.count("image/jpeg") == 10 + 2 * 4, "ten worst photos, four photos with maps"
    assert "91 %" in page, "the coverage that boosting measured"


def test_error_shares_add_up(whole):
    outputs = scores.read_outputs(whole[0], RECORD)
    for key in ("state", "species", "date"):
        table = report.group_errors(outputs, outputs.competition.train[key])
        assert table["error_share"].sum() == pytest.approx(1) and table["photos"].sum() == 48
    worst = int(np.argmax(outputs.error_share))
    assert f"1. {outputs.competition.train['image_id'][worst]}" in whole[1]


def test_tables_are_read_once(whole, monkeypatch):
    read = []

    def count(folder, **options):
        read.append(folder)
        return read_competition(folder, **options)

    monkeypatch.setattr(scores, "read_competition", count)
    monkeypatch.setattr(report, "render_page", lambda outputs, scores, pages: whole[1])
    report.write_report(whole[0], RECORD)
    assert len(read) == 1


def test_page_says_what_model_1_is(whole):
    "A ridge probe on frozen features is called so, whatever its files are called."
    run, outputs = whole[0], scores.read_outputs(whole[0], RECORD)
    write_json(manifest_path(run, "train_dinov3"), {"summary": {"model": "ridge on frozen features of x"}})
    page = report.render_page(outputs, scores.collect_scores(outputs))
    manifest_path(run, "train_dinov3").unlink()
    assert "<b>Model 1</b> (dinov3 in file names): ridge on frozen features of x." in page
    assert '<th scope="row">model 1 (ridge)</th>' in page
    assert '<th scope="row">dinov3</th>' not in page


# ---- a page that everybody can read

def test_text_is_escaped(whole):
    page = whole[1]
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "two &lt;b&gt;photos&lt;/b&gt; are twins &amp; more" in page
    labels = [a.get("alt") or a.get("aria-label") or "" for _, a in Tree(page).tags]
    assert any(NASTY in label for label in labels), "quotes in an attribute end it"


def test_nothing_is_fetched(whole):
    run, page = whole
    for text in (page, (run.output / "notebooks/10_eda.html").read_text(encoding="utf-8")):
        tree = Tree(text)
        links = [a.get("src") or a.get("href") or "#" for _, a in tree.tags]
        assert all(re.match(r"data:|#|notebooks/|\.\./report", link) for link in links)
        assert not tree.all("script", "iframe", "object", "link") and "url(" not in text
        assert any("default-src 'none'" in a.get("content", "") for a in tree.all("meta"))


def test_page_is_accessible(whole):
    page = whole[1]
    tree = Tree(page)
    assert tree.all("html")[0]["lang"] == "en" and len(tree.all("main")) == len(tree.all("h1")) == 1
    assert tree.all("nav")[0]["aria-label"] and all(len(a["alt"]) > 10 for a in tree.all("img"))
    assert len(tree.all("caption")) == len(tree.all("table")) > 10
    assert all(a.get("scope") in ("col", "row") for a in tree.all("th"))
    ids = [a["id"] for _, a in tree.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a["href"][1:] in ids for a in tree.all("a") if a["href"].startswith("#"))
    levels = [int(tag[1]) for tag, _ in tree.tags if re.fullmatch(r"h\d", tag)]
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False)), "no heading level is skipped"
    assert tree.tags[[t for t, _ in tree.tags].index("body") + 1][1]["class"] == "skip"


def luminance(colour: str) -> float:
    colour = colour.lstrip("#")
    colour = "".join(c * 2 for c in colour) if len(colour) == 3 else colour
    c = np.array([int(colour[k : k + 2], 16) for k in (0, 2, 4)]) / 255
    return float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast(theme):
    "WCAG 2: 4.5 for words, 3 for the marks of a picture, on every background of both themes."
    css = Path(report.__file__).with_name("templates").joinpath("report.css").read_text(encoding="utf-8")
    c = dict(re.findall(r"--([\w-]+): (#\w+);", re.findall(r":root \{(.*?)\}", css, re.S)[theme]))
    for ground in (c["paper"], c["card"]):
        assert min(contrast(c[name], ground) for name in ("ink", "soft", "leaf", "alarm")) >= 4.5
        assert min(contrast(hue, ground) for hue in report.HUES) >= 3
        assert contrast(re.findall(r"color:(#\w+)", report.SVG_STYLE)[theme], ground) >= 4.5
    assert contrast(c["alarm"], c["alarm-card"]) >= 4.5 and contrast(c["ink"], c["band"]) >= 4.5


def test_templates_are_shipped():
    "The wheel holds every template and style sheet."
    root = Path(report.__file__).parent
    project = tomllib.loads((root.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["nbs_lib"]
    shipped = {path for pattern in patterns for path in root.glob(pattern)}
    assert {f"{name}.html.j2" for name in report.SECTIONS} <= {path.name for path in shipped}
    assert set((root / "templates").rglob("*")) <= shipped


# ---- runs of any kind

def test_failed_stage(tmp_path):
    "Nothing but the tables and the first stage: the page names the failure and invents nothing."
    run = make_run(tmp_path, 12, 2, truth=False, blended=False, stored=False)
    (run.output / "submission.csv").unlink()
    failed = {"name": "inpaint", "status": "failed", "seconds": 2.0, "ename": "RuntimeError",
              "evalue": "no <memory> left", "cell": 3}
    record = {**RECORD, "status": "RuntimeError: …", "stages": [EDA, failed]}
    page = report.write_report(run, record).read_text(encoding="utf-8")
    assert "Stage inpaint failed in cell 3 of its notebook: RuntimeError: no &lt;memory&gt; left." in page
    assert "No model has predicted out of fold yet" in page and "There is no submission.csv." in page
    assert 'class="score"' not in page and sections(page) == ["submission", "warnings", "cost", "settings"]


def test_stage_after_the_models_failed(tmp_path):
    "Models but no ensemble: the page is about the best single model, and names it."
    run = make_run(tmp_path, 24, 2, truth=False, blended=False)
    fake_members(run)
    record = {**RECORD, "status": "LimitPassed: the time budget ended in stage ensemble"}
    page = report.write_report(run, record).read_text(encoding="utf-8")
    best = read_json(run.output / "scores.json")["oof"]["dinov3"]["grouped"]["r2"]
    assert f"Weighted R² {best:.3f} out of fold" in page, "boosting, which comes first, is worse"
    assert "There is no ensemble: these are the numbers of model 1" in page
    assert "The run did not finish: a limit was passed: the time budget ended" in page
    assert "intervals" in sections(page) and "blend" not in sections(page)


LIMIT = "stage boosting used 31.00 GB of memory, more than limits.memory_gb = 29, in cell 4"
ENDINGS = {f"LimitPassed: {LIMIT}": "stopped: a limit was passed: stage boosting used 31.00 GB",
           "KeyboardInterrupt: ": "stopped: interrupted by a person.",
           "SystemExit: 143": "stopped: asked to end."}


@pytest.mark.parametrize(("status", "text"), ENDINGS.items())
def test_run_that_was_ended(tmp_path, status, text):
    "A limit, Ctrl-C or a signal in the middle of a stage: which stage, why, its cost, and how to resume."
    run = make_run(tmp_path, 24, 2, truth=False, blended=False)
    fake_members(run)
    stopped = {"name": "boosting", "status": "stopped", "seconds": 7.5, "peak_rss_gb": 31.0}
    record = {**RECORD, "status": status, "stages": [EDA, stopped]}
    page = report.write_report(run, record).read_text(encoding="utf-8")
    assert f"Stage boosting {text}" in page and "run the same command to resume" in page
    assert "31.00" in page and "intervals" in sections(page) and page.count('class="alarm"') == 1


def test_record_of_a_run_that_was_killed(tmp_path):
    "A half written record is enough: stages without seconds, no status, no versions."
    run = make_run(tmp_path, 12, 2, truth=False, blended=False)
    record = {"stages": [{"name": "eda"}, {"name": "inpaint", "status": "stopped"}, {}]}
    page = report.write_report(run, record).read_text(encoding="utf-8")
    assert "Stage inpaint stopped." in page and {"cost", "settings"} <= set(sections(page))


def test_one_test_photo_and_no_truth(tmp_path):
    run = make_run(tmp_path, 24, 1, truth=False)
    page = report.write_report(run, RECORD).read_text(encoding="utf-8")
    assert "submission.csv holds 1 photo," in page and "Every photo of the submission" in page
    assert "Hidden test" not in page and read_json(run.output / "scores.json")["test"] == {}


def test_one_photo_in_all(tmp_path):
    run = make_run(tmp_path, 1, 1, truth=False, blended=False)
    page = report.write_report(run, {**RECORD, "stages": []}).read_text(encoding="utf-8")
    assert "1 labelled photo of 1 site," in squeeze(page).replace(" ,", ",")
    assert "No model has predicted" in page and "cost" in sections(page)


def test_two_photos_of_one_site(tmp_path):
    "One site gives no interval."
    run = make_run(tmp_path, 2, 1, truth=False, blended=False)
    comp = read_competition(run.input)
    ids = comp.train["image_id"]
    folds = pd.DataFrame({"image_id": ids, "fold_grouped": [0, 1], "fold_stratified": [0, 1]})
    folds.to_csv(run.artefact_path("folds.csv"), index=False)
    write_oof(run, "boosting", ids, np.array([0, 1]), comp.y[::-1])
    page = report.write_report(run, RECORD).read_text(encoding="utf-8")
    assert "2 photos, no interval" in page and "intervals" not in sections(page)


def test_many_photos(tmp_path):
    "357 labelled and 805 test photos: histograms in place of a list, and at most 6 MB."
    run = make_run(tmp_path, 357, 805, truth=False, blended=False)
    fake_members(run)
    path = report.write_report(run, RECORD)
    page = path.read_text(encoding="utf-8")
    assert "submission.csv holds 805 photos" in page and "Every photo of the submission" not in page
    assert path.stat().st_size < 6e6
    assert any(a["alt"].startswith("GDM: submission") for a in Tree(page).all("img"))


def test_synthetic_photos_are_named(whole):
    inside = Run(whole[0].input, whole[0].input.parent, whole[0].settings)
    assert "The photos are synthetic" not in whole[1]
    outputs = scores.read_outputs(inside, RECORD)
    assert "The photos are synthetic" in report.render_page(outputs, scores.collect_scores(outputs))


def test_broken_files_are_named_and_the_rest_stands(whole, tmp_path):
    run = Run(whole[0].input, tmp_path, whole[0].settings)
    shutil.copytree(whole[0].output, tmp_path, dirs_exist_ok=True)
    broken = ("blend.json", "boosting/intervals.json", "photos/photos.csv", "oof/dinov3.parquet",
              "dinov3/density.npz", "photos/train_90x128/halves.npy")
    for path in map(run.artefacts.joinpath, broken):
        path.write_bytes(b"\x00\xff,,\n\"" if path.suffix == ".csv" else path.read_bytes()[:60])
    outputs = scores.read_outputs(run, RECORD)
    page = report.render_page(outputs, scores.collect_scores(outputs))
    assert len(outputs.problems) == len(broken), outputs.problems
    left_out = {"intervals", "worst", "maps", "blend", "notebooks"}
    assert sections(page) == [name for name in ALL_SECTIONS if name not in left_out]
    assert all(str(escape(problem)) in page for problem in outputs.problems)


def test_notebook_pages(whole):
    run, page = whole
    text = (run.output / "notebooks/10_eda.html").read_text(encoding="utf-8")
    assert 'href="notebooks/10_eda.html"' in page and "by &lt;zero&gt;" in text
    assert "20_inpaint.ipynb" not in text and "20_inpaint" in text, "a link to a missing page becomes text"
    before = (run.output / "notebooks/10_eda.html").stat().st_mtime_ns
    report.write_pages(scores.read_outputs(run, RECORD))
    assert (run.output / "notebooks/10_eda.html").stat().st_mtime_ns == before, "written once"


def test_broken_notebook_is_left_out(whole):
    run, _ = whole
    half = run.output / "notebooks/20_inpaint.ipynb"
    half.write_text('{"cells": [')
    outputs = scores.read_outputs(run, RECORD)
    try:
        assert report.write_pages(outputs) == ["10_eda"] and "20_inpaint.ipynb" in outputs.problems[0]
    finally:
        half.unlink()


# ---- results for the README

def test_results_of_real_photos(whole, tmp_path):
    run, _ = whole
    with pytest.raises(report.InputError, match="no model has predicted"):
        empty = make_run(tmp_path / "empty", 12, 2, truth=False, blended=False)
        write_results(empty, RECORD, tmp_path)
    written = write_results(run, RECORD, tmp_path)
    assert [p.name for p in written] == ["real_demo.csv", "real_demo.json"], "real photos are never drawn"
    table = pd.read_csv(tmp_path / "real_demo.csv")
    score = read_json(run.output / "scores.json")["oof"]["ensemble"]["grouped"]
    best = table[(table["model"] == "ensemble") & (table["judged_on"] == "grouped")].iloc[0]
    assert best["r2"] == pytest.approx(score["r2"], abs=1e-4) and best["low"] < best["r2"] < best["high"]
    assert best["photos"] == 48 and read_json(tmp_path / "real_demo.json")["photographs"] == "real"


def test_picture_of_a_synthetic_run(tmp_path):
    "The photo nearest to the mean grams among those with a stamp, whatever its error."
    run = make_run(tmp_path, 24, 2)
    inside = Run(shutil.copytree(run.input, run.output / "input/csiro-biomass"), run.output, run.settings)
    assert choose_example(scores.read_outputs(inside, RECORD)) in (0, 9, 18)
    *_, picture = write_results(inside, RECORD, tmp_path / "results")
    assert picture.name == "synthetic_demo.png" and picture.stat().st_size < 300_000
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_report_is_written_again_from_the_folder(whole, tmp_path, capsys):
    run, _ = whole
    out = Path(shutil.copytree(run.output, tmp_path / "out"))
    assert report.main([str(out)]) == 2 and "holds no run.json" in capsys.readouterr().err
    write_json(out / "run.json", RECORD)
    (out / "report.html").unlink()
    assert report.main([str(out)]) == 2 and "--input" in capsys.readouterr().err
    assert report.main([str(out), "--input", str(run.input)]) == 0 and (out / "report.html").is_file()


# ---- in a browser

MEASURES = {"wide": "document.scrollingElement.scrollWidth",
            "ground": "getComputedStyle(document.body).backgroundColor",
            "broken": "[...document.images].filter(i => !i.complete || !i.naturalWidth).length",
            "score": "(document.querySelector('.score') || document.body).getBoundingClientRect().bottom",
            "right": "Math.min(...[...document.querySelectorAll('.content')]"
                     ".map(e => e.getBoundingClientRect().right))"}


@pytest.mark.skipif(find_browser() is None, reason="no Chromium on the PATH: apt-get install chromium")
def test_in_a_browser(whole, tmp_path):
    "No error, no request, nothing wider than the window, both themes, every picture, no empty right half."
    run, _ = whole

    async def measure():
        seen = {}
        async with open_browser(find_browser()) as page:
            for path in (run.output / "report.html", run.output / "notebooks/10_eda.html"):
                for width, dark in ((1280, False), (1280, True), (390, False), (390, True), (320, False)):
                    await page.open(path, width, dark)
                    shot = tmp_path / f"{path.stem}_{width}_{dark}.png"
                    await page.screenshot(shot)
                    values = {name: await page.evaluate(script) for name, script in MEASURES.items()}
                    seen[path.stem, width, dark] = {**values, "shot": shot.stat().st_size}
            return seen, page.complaints

    seen, complaints = asyncio.run(measure())
    assert not complaints, complaints
    for (name, width, dark), s in seen.items():
        assert s["wide"] <= width, f"{name} is {s['wide']} wide in a window of {width}"
        assert s["broken"] == 0 and s["shot"] > 5000 and (int(re.search(r"\d+", s["ground"])[0]) < 60) == dark
        assert name != "report" or s["score"] < 844, "the first screen holds the score"
        assert name != "report" or s["right"] > 0.9 * width, "sections fill the width"
