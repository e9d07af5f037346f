"""report.html is right and useful whatever the run was like, escapes what it is told, and opens in a browser."""
import asyncio
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from browser import browser, find_browser
from markupsafe import escape
from tiny import competition, fake_members, run_on

from nbs_lib import ensemble, report
from nbs_lib.runtime import read_json, write_json
from nbs_lib.stages import Run
from nbs_lib.tables import (
    to_long,
    read_competition,
    read_draws,
    read_oof,
    write_draws,
    write_oof,
    write_submission,
)
from nbs_lib.targets import TARGETS, constant_prediction, from_parts, weighted_r2_score
from nbs_lib.validation import bootstrap_scores, left_out_coverage, random_site_folds

NASTY = "<script>alert(1)</script> & \"quoted\" 'species' $a_b$"
STAGES = [{"name": "eda", "status": "done", "seconds": 19.0, "peak_rss_gb": 0.7, "written_mb": 5.7, "network": "guard", "warnings": ["two <b>photos</b> are twins & more"]},
          {"name": "boosting", "status": "up to date", "seconds": 50.0, "peak_rss_gb": 2.3, "written_mb": 1.0, "network": "guard", "warnings": []}]
RECORD = {"status": "done", "profile": "demo", "started": "2026-01-02T03:04:05Z", "stages": STAGES, "versions": {"python": "3.12"}, "machine": {"cpus": 2}, "inputs": {"input/*.csv": {"files": 3, "blake2b": "abc"}}}


def make_run(folder: Path, n_train=48, n_test=6, truth=True, blended=True, stored=True, draws=0) -> Run:
    "A run folder as the stages leave it, made without any model."
    root = competition(folder / "csiro-biomass", n_train, n_test, size=(128, 64))
    table = pd.read_csv(root / "train.csv")
    table["Species"] = np.where(table["State"] == "Tas", NASTY, table["Species"])
    table.to_csv(root / "train.csv", index=False)
    run, comp, rng = run_on(root, folder / "out"), read_competition(root), np.random.default_rng(1)
    said = from_parts(*rng.gamma(2, [13, 4, 6], (n_test, 3)).T)
    write_submission(run.output / "submission.csv", comp.sample, comp.test["image_id"], said)
    if truth:
        to_long(comp.test["image_id"], said * rng.uniform(0.8, 1.25, (n_test, 1))).to_csv(report.truth_path(root), index=False)
    if blended:
        fake_members(run)
        folds = random_site_folds(comp.groups, 4, draws)
        for k, model in enumerate(("dinov3", "boosting")):
            write_draws(run, model, comp.train["image_id"], folds, comp.y + rng.normal(0, 5 + 5 * k, (draws, *comp.y.shape)).clip(-comp.y))
        ensemble.run_ensemble(run)
    ids = comp.train["image_id"]
    pd.DataFrame({"image_id": ids, "split": "train", "height": 32, "width": 64, "stamp": 0.01 * (np.arange(n_train) % 9 == 0), "sharpness": rng.gamma(4, 99, n_train),
                  "lamps": 0.0}).to_csv(run.artefact_path("photos", "photos.csv"), index=False)
    if stored:
        np.save(run.artefact_path("photos", "train_90x128", "halves.npy"), rng.integers(0, 255, (n_train, 2, 90, 128, 3), dtype=np.uint8))
        write_json(run.artefact_path("photos", "train_90x128", "store.json"), {"ids": ids.tolist(), "shape": [90, 128], "inpaint": run.settings.inpaint})
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run with everything there is: the run and its page."
    run = make_run(tmp_path_factory.mktemp("whole"))
    comp = read_competition(run.input)
    write_json(run.artefact_path("boosting", "intervals.json"), {"coverage": 0.9, "radius": dict.fromkeys(TARGETS, 2.0), "measured": dict.fromkeys(TARGETS, 0.91)})
    np.savez(run.artefact_path("dinov3", "density.npz"), image_id=comp.train["image_id"].to_numpy(str), density=np.random.default_rng(0).gamma(2, 20, (48, 3, 4, 12)).astype(np.float16))
    pd.DataFrame({"fusion": ["none", "none", "mamba", "mamba"], "scheme": "grouped", "seed": [0, 1, 0, 1], "key": list("abcd"), "r2w": [0.5, 0.6, 0.4, 0.3], "seconds": 1.0}).to_csv(run.artefact_path("ablation.csv"), index=False)
    cells = [nbformat.v4.new_markdown_cell("# Eda\nThen [20_inpaint](20_inpaint.ipynb)"), nbformat.v4.new_code_cell("1 / 0", outputs=[nbformat.v4.new_output("error", ename="ZeroDivisionError", evalue="by <zero>", traceback=["by <zero>"])])]
    (run.output / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), run.output / "notebooks/10_eda.ipynb")
    return run, report.write_report(run, RECORD).read_text()


class Tree(HTMLParser):
    "What a screen reader meets: tags with their attributes, in order."

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


# ---- what the page says is what the files say

def test_scores_are_those_of_the_files(whole):
    run, page = whole
    scores, comp = read_json(run.output / "scores.json"), read_competition(run.input)
    ids = comp.train["image_id"].tolist()
    for scheme, name in (("grouped", "ensemble.parquet"), ("stratified", "ensemble_stratified.parquet")):
        said = read_oof(run.artefacts / "oof" / name, ids)
        mine = scores["oof"]["ensemble"][scheme]
        assert mine["r2"] == pytest.approx(weighted_r2_score(comp.y, said), abs=1e-12)
        assert f'<div class="score">{mine["r2"]:.3f}</div>' in page
        low, high = np.quantile(bootstrap_scores(comp.y, [said], comp.groups)[:, 0], [0.025, 0.975])
        assert mine["interval_95"] == pytest.approx([low, high], abs=1e-9), "the blend's own bootstrap draws the same sites"
        assert report.spread(mine["interval_95"]) in page and f"{scores['constant'][scheme]['r2']:.3f}" in page
    assert f'<div class="score">{scores["test"]["ensemble"]["r2"]:.3f}</div>' in page


@pytest.mark.parametrize("draws", [0, 1, 3])
def test_scores_over_random_draws_of_sites(draws, tmp_path):
    run = make_run(tmp_path, draws=draws)
    page, scores, comp = report.write_report(run, RECORD).read_text(), read_json(run.output / "scores.json")["draws"], read_competition(run.input)
    assert set(scores) == ({"constant", "dinov3", "boosting", "ensemble"} if draws else set())
    assert f"{draws} random draws of sites" in page if draws else "random draws of sites" not in page
    for model in sorted(set(scores) - {"constant"}):
        folds, y = read_draws(run, model, comp.train["image_id"].tolist())
        r2 = [weighted_r2_score(comp.y, p) for p in y]
        assert scores[model]["r2"] == pytest.approx(np.mean(r2)) and scores[model]["draws"] == draws == len(folds)
        assert scores[model]["sd"] == (pytest.approx(np.std(r2, ddof=1)) if draws > 1 else None) and f"{np.mean(r2):.3f}" in page
    if draws:
        plain = [np.concatenate([constant_prediction(comp.y[fold != k], int((fold == k).sum())) for k in np.unique(fold)]) for fold in folds]
        truth = [np.concatenate([comp.y[fold == k] for k in np.unique(fold)]) for fold in folds]
        assert scores["constant"]["r2"] == pytest.approx(np.mean([weighted_r2_score(t, p) for t, p in zip(truth, plain, strict=True)]))


def test_intervals_are_judged_as_boosting_judges_them(whole):
    run, _ = whole
    found = report.read_findings(run, RECORD)
    kept = report.kept_promises(found.y, found.predicted, found.competition.groups, np.array([0.9]))[0]
    assert kept == pytest.approx(left_out_coverage(found.y, found.predicted, found.competition.groups, 0.9), abs=1e-9)


def test_every_section_is_there(whole):
    page = whole[1]
    assert sections(page) == ["all-scores", "predicted-against-measured", "where-the-error-sits", "how-sure", "the-photos-it-got-most-wrong", "where-the-clover-stands", "what-the-blend-weighs",
                              "what-each-part-is-worth", "what-was-sent", "what-was-dropped-or-repaired", "what-it-cost", "made-with", "notebooks"]
    assert page.count("image/jpeg") == 10 + 2 * 4, "ten worst photos, four maps beside their photos"
    assert re.search(r"<td[^>]*>0\.550</td>", page), "the mean over seeds of an ablation"


def test_error_shares_add_up(whole):
    found = report.read_findings(whole[0], RECORD)
    for key in ("state", "species", "date"):
        table = report.error_by(found, found.competition.train[key])
        assert table["share"].sum() == pytest.approx(1) and table["photos"].sum() == 48
    worst = int(np.argmax(found.loss))
    assert f"1. {found.competition.train['image_id'][worst]}" in whole[1]


def test_tables_are_read_once(whole, monkeypatch):
    read = []
    monkeypatch.setattr(report, "read_competition", lambda folder, **more: read.append(folder) or read_competition(folder, **more))
    monkeypatch.setattr(report, "render", lambda found, scores, pages: whole[1])
    report.write_report(whole[0], RECORD)
    assert len(read) == 1


# ---- a page that can be trusted and read by everybody

def test_what_it_is_told_is_escaped(whole):
    page = whole[1]
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "two &lt;b&gt;photos&lt;/b&gt; are twins &amp; more" in page
    labels = [a.get("alt") or a.get("aria-label") or "" for _, a in Tree(page).tags]
    assert any(NASTY in label for label in labels), "quotes in an attribute end it"


def test_nothing_is_fetched(whole):
    run, page = whole
    for text in (page, (run.output / "notebooks/10_eda.html").read_text()):
        tree = Tree(text)
        assert all(re.match(r"data:|#|notebooks/|\.\./report", a.get("src") or a.get("href") or "#") for _, a in tree.tags)
        assert not tree.all("script", "iframe", "object", "link") and "url(" not in text
        assert any("default-src 'none'" in a.get("content", "") for a in tree.all("meta"))


def test_it_can_be_read_without_seeing_it(whole):
    page = whole[1]
    tree = Tree(page)
    assert tree.all("html")[0]["lang"] == "en" and len(tree.all("main")) == len(tree.all("h1")) == 1 and tree.all("nav")[0]["aria-label"]
    assert all(len(a["alt"]) > 10 for a in tree.all("img"))
    assert len(tree.all("caption")) == len(tree.all("table")) > 10 and all(a.get("scope") in ("col", "row") for a in tree.all("th"))
    ids = [a["id"] for _, a in tree.tags if "id" in a]
    assert len(ids) == len(set(ids)) and all(a["href"][1:] in ids for a in tree.all("a") if a["href"].startswith("#"))
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
    "WCAG 2: 4.5 for words, 3 for the marks of a picture, on both backgrounds of both themes."
    c = dict(re.findall(r"--([\w-]+): (#\w+);", re.findall(r":root \{(.*?)\}", report.STYLE)[theme]))
    for ground in (c["paper"], c["card"]):
        assert min(contrast(c[name], ground) for name in ("ink", "soft", "leaf", "alarm")) >= 4.5
        assert min(contrast(hue, ground) for hue in report.HUES) >= 3
        assert contrast(re.findall(r"color:(#\w+)", report.THEMED)[theme], ground) >= 4.5
    assert contrast(c["alarm"], c["alarm-card"]) >= 4.5


# ---- whatever the run was like

def test_failed_stage(tmp_path):
    """Nothing but the tables and the first stage: the page says what failed and invents nothing."""
    run = make_run(tmp_path, 12, 2, truth=False, blended=False, stored=False)
    (run.output / "submission.csv").unlink()
    failed = {"name": "inpaint", "status": "failed", "seconds": 2.0, "ename": "RuntimeError", "evalue": "no <memory> left", "cell": 3}
    page = report.write_report(run, {**RECORD, "status": "RuntimeError: …", "stages": [STAGES[0], failed]}).read_text()
    assert "Stage inpaint failed in cell 3 of its notebook: RuntimeError: no &lt;memory&gt; left." in page and "No model has predicted out of fold yet" in page and "There is no submission.csv." in page
    assert 'class="score"' not in page and sections(page) == ["what-was-sent", "what-was-dropped-or-repaired", "what-it-cost", "made-with"]


def test_stage_after_the_models_failed(tmp_path):
    """Models but no blend: the page is about the best single model, and says so."""
    run = make_run(tmp_path, 24, 2, truth=False, blended=False)
    fake_members(run)
    page = report.write_report(run, {**RECORD, "status": "LimitPassed: the time budget ended in stage ensemble"}).read_text()
    best = read_json(run.output / "scores.json")["oof"]["dinov3"]["grouped"]["r2"]
    assert f"Weighted R² {best:.3f} out of fold" in page, "boosting, which comes first, is worse"
    assert "There is no blend: these are the numbers of dinov3" in page and "The run did not finish: a limit was passed: the time budget ended" in page
    assert "how-sure" in sections(page) and "what-the-blend-weighs" not in sections(page)


@pytest.mark.parametrize(("status", "told"), [("LimitPassed: stage boosting used 31.00 GB of memory, more than limits.memory_gb = 29, in cell 4 (run_boosting(run))", "stopped: a limit was passed: stage boosting used 31.00 GB"),
                                              ("KeyboardInterrupt: ", "stopped: a person stopped it."), ("SystemExit: 143", "stopped: it was asked to end.")])
def test_run_that_was_ended(tmp_path, status, told):
    """A limit, Ctrl-C or a signal in the middle of a stage: which stage, why, what it cost until then, and how to go on."""
    run = make_run(tmp_path, 24, 2, truth=False, blended=False)
    fake_members(run)
    stopped = {"name": "boosting", "status": "stopped", "seconds": 7.5, "peak_rss_gb": 31.0, "written_mb": 0.0}
    page = report.write_report(run, {**RECORD, "status": status, "stages": [STAGES[0], stopped]}).read_text()
    assert f"Stage boosting {told}" in page and "the same command goes on from there" in page and "31.00" in page and "how-sure" in sections(page)
    assert page.count('class="told alarm"') == 1


def test_record_of_a_run_that_was_killed(tmp_path):
    """Nothing of a half written record is needed: stages without seconds, no status, no versions."""
    run = make_run(tmp_path, 12, 2, truth=False, blended=False)
    page = report.write_report(run, {"stages": [{"name": "eda"}, {"name": "inpaint", "status": "stopped"}, {}]}).read_text()
    assert "Stage inpaint stopped." in page and "what-it-cost" in sections(page)


def test_one_test_photo_and_no_truth(tmp_path):
    run = make_run(tmp_path, 24, 1, truth=False)
    page = report.write_report(run, RECORD).read_text()
    assert "submission.csv holds 1 photo," in page and "Every photo that was sent" in page and "On the hidden test" not in page
    assert read_json(run.output / "scores.json")["test"] == {}


def test_one_photo_in_all(tmp_path):
    run = make_run(tmp_path, 1, 1, truth=False, blended=False)
    page = report.write_report(run, {**RECORD, "stages": []}).read_text()
    assert "1 labelled photo of 1 site," in page and "No model has predicted" in page and "what-it-cost" in sections(page)


def test_two_photos_of_one_site(tmp_path):
    """No interval can be drawn from one site; none is."""
    run = make_run(tmp_path, 2, 1, truth=False, blended=False)
    comp = read_competition(run.input)
    pd.DataFrame({"image_id": comp.train["image_id"], "fold_grouped": [0, 1], "fold_stratified": [0, 1]}).to_csv(run.artefact_path("folds.csv"), index=False)
    write_oof(run, "boosting", comp.train["image_id"], np.array([0, 1]), comp.y[::-1])
    page = report.write_report(run, RECORD).read_text()
    assert "2 photos, no interval" in page and "how-sure" not in sections(page)


def test_many_photos(tmp_path):
    """357 labelled and 805 test photos: histograms in place of a list, and at most 6 MB."""
    run = make_run(tmp_path, 357, 805, truth=False, blended=False)
    fake_members(run)
    path = report.write_report(run, RECORD)
    page = path.read_text()
    assert "submission.csv holds 805 photos" in page and "Every photo that was sent" not in page and path.stat().st_size < 6e6
    assert Tree(page).all("img")[-3]["alt"].startswith("Green + clover:"), "what was sent is drawn"


def test_synthetic_photos_are_called_so(whole, tmp_path):
    inside = Run(whole[0].input, whole[0].input.parent, whole[0].settings)
    assert "The photographs are synthetic" not in whole[1]
    assert ("note", "The photographs are synthetic: their scores prove that the chain works and say nothing about a real paddock.") in report.what_happened(report.read_findings(inside, RECORD))


def test_broken_files_are_named_and_the_rest_stands(whole, tmp_path):
    run = Run(whole[0].input, tmp_path, whole[0].settings)
    shutil.copytree(whole[0].output, tmp_path, dirs_exist_ok=True)
    broken = ("blend.json", "boosting/intervals.json", "photos/photos.csv", "oof/dinov3.parquet", "ablation.csv", "dinov3/density.npz", "photos/train_90x128/halves.npy")
    for path in map(run.artefacts.joinpath, broken):
        path.write_bytes(b"\x00\xff,,\n\"" if path.suffix == ".csv" else path.read_bytes()[:60])
    found = report.read_findings(run, RECORD)
    page = report.render(found, report.collect_scores(found))
    assert len(found.problems) == len(broken), found.problems
    assert sections(page) == ["all-scores", "predicted-against-measured", "where-the-error-sits", "what-was-sent", "what-was-dropped-or-repaired", "what-it-cost", "made-with"]
    assert all(str(escape(problem)) in page for problem in found.problems)


def test_notebook_pages(whole):
    run, page = whole
    text = (run.output / "notebooks/10_eda.html").read_text()
    assert 'href="notebooks/10_eda.html"' in page and "by &lt;zero&gt;" in text
    assert "20_inpaint.ipynb" not in text and "20_inpaint" in text, "a link to a page that is not there is only words"
    before = (run.output / "notebooks/10_eda.html").stat().st_mtime_ns
    report.write_pages(run)
    assert (run.output / "notebooks/10_eda.html").stat().st_mtime_ns == before


def test_broken_notebook_is_left_out(whole):
    run, _ = whole
    half = run.output / "notebooks/20_inpaint.ipynb"
    half.write_text('{"cells": [')
    try:
        assert report.write_pages(run) == ["10_eda"]
    finally:
        half.unlink()


# ---- what stays of a run

def test_results_that_are_kept(whole, tmp_path):
    run, _ = whole
    with pytest.raises(report.InputError, match="no model has predicted"):
        report.write_results(make_run(tmp_path / "empty", 12, 2, truth=False, blended=False), RECORD, tmp_path)
    assert [p.name for p in report.write_results(run, RECORD, tmp_path)] == ["real_demo.csv", "real_demo.json"], "real photographs are never drawn"
    table, scores = pd.read_csv(tmp_path / "real_demo.csv"), read_json(run.output / "scores.json")
    best = table[(table["model"] == "ensemble") & (table["judged_on"] == "grouped")].iloc[0]
    assert best["r2"] == pytest.approx(scores["oof"]["ensemble"]["grouped"]["r2"], abs=1e-4) and best["low"] < best["r2"] < best["high"] and best["photos"] == 48
    assert read_json(tmp_path / "real_demo.json")["photographs"] == "real"


def test_picture_of_a_synthetic_run(tmp_path):
    """Drawn of the photo whose grams are nearest to the mean among those with a stamp, however well it was predicted."""
    run = make_run(tmp_path, 24, 2)
    inside = Run(shutil.copytree(run.input, run.output / "input/csiro-biomass"), run.output, run.settings)
    found = report.read_findings(inside, RECORD)
    assert report.example_photo(found) in (0, 9, 18)
    written = report.write_results(inside, RECORD, tmp_path / "results")
    assert written[-1].name == "synthetic_demo.png" and written[-1].read_bytes()[:4] == b"\x89PNG" and written[-1].stat().st_size < 300_000


def test_report_is_written_again_from_the_folder(whole, tmp_path, capsys):
    run, _ = whole
    out = Path(shutil.copytree(run.output, tmp_path / "out"))
    assert report.main([str(out)]) == 2 and "holds no run.json" in capsys.readouterr().err
    write_json(out / "run.json", RECORD)
    (out / "report.html").unlink()
    assert report.main([str(out)]) == 2 and "--input" in capsys.readouterr().err
    assert report.main([str(out), "--input", str(run.input)]) == 0 and (out / "report.html").is_file()


# ---- in a browser

@pytest.mark.skipif(find_browser() is None, reason="no Chromium on the PATH: apt-get install chromium")
def test_in_a_browser(whole, tmp_path):
    """No complaint, no request, nothing wider than the window, dark where dark is asked for, and every picture drawn."""
    run, _ = whole

    async def look():
        seen = {}
        async with browser(find_browser()) as page:
            for path in (run.output / "report.html", run.output / "notebooks/10_eda.html"):
                for width, dark in ((1280, False), (1280, True), (390, False), (390, True), (320, False)):
                    await page.open(path, width, dark)
                    await page.screenshot(shot := tmp_path / f"{path.stem}_{width}_{dark}.png")
                    seen[path.stem, width, dark] = {"wide": await page.value("document.scrollingElement.scrollWidth"), "shot": shot.stat().st_size,
                                                    "ground": await page.value("getComputedStyle(document.body).backgroundColor"),
                                                    "broken": await page.value("[...document.images].filter(i => !i.complete || !i.naturalWidth).length"),
                                                    "answer": await page.value("(document.querySelector('.score') || document.body).getBoundingClientRect().bottom")}
            return seen, page.told

    seen, told = asyncio.run(look())
    assert not told, told
    for (name, width, dark), s in seen.items():
        assert s["wide"] <= width, f"{name} is {s['wide']} wide in a window of {width}"
        assert s["broken"] == 0 and s["shot"] > 5000 and (int(re.search(r"\d+", s["ground"])[0]) < 60) == dark
        assert name != "report" or s["answer"] < 844, "the first screen holds the answer"
