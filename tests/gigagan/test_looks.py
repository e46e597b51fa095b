import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from gigagan.evaluation.judges.neighbours import (
    Memorisation,
    chance_limit,
    closest,
    copying,
    memorisation,
    nearest,
)
from gigagan.evaluation.report.categories import OTHER, by_category, categories
from gigagan.evaluation.report.page import Figures, write_page
from gigagan.evaluation.report.sweeps import CurvePoint, Speed, speeds, truncation_curve


def test_the_curve_is_over_the_same_captions_in_order_of_truncation():
    drawn = []

    def draw(captions, psi):
        drawn.append((tuple(captions), psi))
        return [psi] * len(captions)

    points = truncation_curve(
        draw, ["a", "b"], [1.0, 0.5], distance=sum, alignment=lambda x, texts: 10 * x[0]
    )
    assert drawn == [(("a", "b"), 0.5), (("a", "b"), 1.0)]
    assert points == [CurvePoint(0.5, 1.0, 5.0), CurvePoint(1.0, 2.0, 10.0)]


def test_speeds_warm_up_and_stop_when_the_budget_is_spent():
    calls = []
    found = speeds(lambda batch: calls.append(len(batch)), ["a", "b"], (3, 1), repeats=2)
    assert calls == [1, 1, 1, 3, 3, 3]
    assert [s.batch_size for s in found] == [1, 3]
    assert found[0].images_per_second == pytest.approx(1 / found[0].seconds_per_image)
    assert len(speeds(lambda batch: None, ["a"], (1, 2, 4), budget_seconds=0)) == 1


def test_neighbours_are_those_of_a_whole_comparison(monkeypatch):
    random = np.random.default_rng(0)
    samples, training = random.normal(size=(5, 3)), random.normal(size=(23, 3))
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (samples, training)]
    cosine = units[0] @ units[1].T
    monkeypatch.setattr("gigagan.evaluation.judges.neighbours._CHUNK", 7 * 3)
    for row, found in enumerate(nearest(samples, training, k=2)):
        assert [n.index for n in found] == np.argsort(-cosine[row])[:2].tolist()
        assert found[0].cosine == pytest.approx(cosine[row].max())
    with pytest.raises(ValueError, match="k=24"):
        nearest(samples, training, k=24)


def test_copies_of_training_pictures_are_found_out():
    random = np.random.default_rng(0)
    training, heldout = random.normal(size=(200, 16)), random.normal(size=(200, 16))
    honest = memorisation(random.normal(size=(200, 16)), heldout, training)
    copied = memorisation(training[:100] + 1e-3, heldout, training)
    assert honest.share_closer < 0.05
    assert copied.share_closer == 1
    assert copied.sample_median > 0.99 > copied.real_median


@pytest.mark.parametrize("held", [1, 7 * 3, 10**6])
def test_squared_distances_are_those_of_a_whole_comparison_in_double(monkeypatch, held):
    random = np.random.default_rng(0)
    samples, training = random.normal(size=(5, 3)), random.normal(size=(23, 3))
    groups = random.integers(0, 3, 5), random.integers(0, 3, 23)
    squares = np.square(samples[:, None] - training).sum(axis=2)
    monkeypatch.setattr("gigagan.evaluation.judges.neighbours._CHUNK", held)
    for apart in (None, groups):
        if apart is not None:
            squares[groups[0][:, None] == groups[1]] = np.inf
        far, rows = closest(samples, training, k=2, apart=apart)
        assert rows.tolist() == np.argsort(squares, axis=1)[:, :2].tolist()
        assert np.allclose(far, np.sort(squares, axis=1)[:, :2])
    single, _ = closest(samples.astype(np.float32), training.astype(np.float32))
    assert single.dtype == np.float32


def test_independent_draws_are_near_copies_as_often_as_chance_says_and_copies_always():
    random = np.random.default_rng(0)
    training, groups = random.normal(size=(2000, 5)), np.arange(2000) // 2
    training[1::2] = training[::2]  # each picture twice, in a group of its own
    limit = chance_limit(training, groups, 0.05)

    def rate(samples):
        return (closest(samples, training)[0] < limit).mean()

    assert rate(random.normal(size=(2000, 5))) == pytest.approx(0.05, abs=0.015)
    copies = training[:600] + 1e-3
    assert rate(copies) == 1
    mixed = np.concatenate([copies, random.normal(size=(1400, 5))])
    assert rate(mixed) == pytest.approx(0.3 + 0.7 * 0.05, abs=0.015)


def test_small_distances_of_large_features_are_not_lost_to_rounding():
    training = 30 + np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    samples = training + np.float32(0.01)
    far, rows = closest(samples, training)
    assert rows[:, 0].tolist() == list(range(20))
    assert far[:, 0] == pytest.approx(np.square(samples - training).sum(axis=1))


def test_copying_is_the_share_of_pairs_in_which_the_drawn_one_is_nearer():
    drawn, real = np.array([1.0, 2, 5]), np.array([2.0, 3, 2, 7])
    naive = [[(d < r) + (d == r) / 2 for r in real] for d in drawn]
    assert copying(drawn, real).tolist() == np.mean(naive, axis=1).tolist()
    assert copying(real, real).mean() == 0.5
    assert copying(real * (1 + 1e-7), real).tolist() == copying(real, real).tolist()


def test_every_caption_has_a_kind_and_may_have_several():
    captions = ["two red dogs beside a car", "something abstract", 'a sign that says "stop"']
    found = categories(captions, {"background": {0: "teal", 2: "teal"}})
    for kind in ("count", "colour", "animal", "place", "vehicle"):
        assert found[kind] == [0], kind
    assert found["written text"] == [2]
    assert found["background: teal"] == [0, 2]
    assert found[OTHER] == [1]
    assert categories(["something abstract"]) == {OTHER: [0]}
    assert categories(["redo the carpet"]) == {OTHER: [0]}  # words, not parts of them
    assert categories(["word " * 16]) == {"over 15 words": [0]}


def test_the_worst_kind_and_its_worst_pictures_come_first():
    rows = by_category([0.9, 0.1, 0.8, 0.3], {"good": [0, 2], "bad": [1, 3], "all": [0, 1, 2, 3]})
    assert [row.name for row in rows] == ["bad", "all", "good"]
    assert rows[0].worst == [1, 3]
    assert rows[0].mean == pytest.approx(0.2)
    assert rows[0].low <= rows[0].mean <= rows[0].high
    assert rows[1].count == 4
    (alone,) = by_category([0.1, 0.7], {"alone": [1]})
    assert (alone.low, alone.high) == (None, None)


# ---- the page

EVIL = '<script>document.title="caught"</script><img src=x onerror="document.title=1">'
RESULTS = {
    "protocol": {
        "name": "gigagan-coco2014-256",
        "num_generated": 30_000,
        "num_real": 40_504,
        "truncation": 0.8,
        "seed": 3,
        "captions_sha256": "0" * 64,
    },
    "metrics": {"fid": 12.5, "kid": 0.01, "clip_score_ViT-B-32_openai": 0.31},
    "intervals": {"fid": [12.1, 12.9]},
    "reference": {"real": {"fid": 2.0}, "chance": {}},
    "absent": {"cmmd": "no encoder <b>"},
}


def figures():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))
    return Figures(
        grid=[(EVIL, picture, picture)] * 20,
        latents=[("a" * 300, [picture] * 4)],
        curve=[CurvePoint(0.5, 0.2, 0.1), CurvePoint(1.0, 0.1, 0.3)],
        speeds=[Speed(1, 0.1, 10.0)],
        neighbours=[("caption", picture, [(picture, 0.91)])],
        memorisation=Memorisation(0.5, 0.6, 0.013),
        categories=by_category([0.1, 0.2], {"colour": [0, 1], "place": [1]}),
        worst=[("colour", EVIL, picture, 0.1)],
    )


def test_the_page_is_whole_in_itself_and_captions_are_only_text(tmp_path):
    page = write_page(tmp_path / "report.html", RESULTS, figures()).read_text()

    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.seen, self.sources = set(), []

        def handle_starttag(self, tag, attributes):
            self.seen.add(tag)
            self.sources += [v for k, v in attributes if k in ("src", "href")]

    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.seen
    assert all(source.startswith("data:image/webp") for source in tags.sources)
    assert len(page) < 1_500_000
    for text in ("12.5", "12.1 to 12.9", "9.09", "no encoder &lt;b&gt;", "1.3%", "ψ 0.5"):
        assert text in page, text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_what_was_not_measured_is_left_out(tmp_path):
    results = RESULTS | {"protocol": RESULTS["protocol"] | {"name": "embedded-heldout-64"}}
    page = write_page(tmp_path / "r.html", results, Figures()).read_text()
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == ["All metrics", "Not measured", "The rules"]
    assert "no paper" in page


@pytest.mark.slow
def test_the_page_fits_a_phone_and_runs_nothing(tmp_path):
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    page = write_page(tmp_path / "report.html", RESULTS, figures())
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox"):
        options.add_argument(argument)
    options.add_experimental_option(
        "mobileEmulation", {"deviceMetrics": {"width": 390, "height": 800, "pixelRatio": 1}}
    )
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        browser.get(page.as_uri())
        width, inner = browser.execute_script(
            "return [document.documentElement.scrollWidth, window.innerWidth]"
        )
        assert width <= inner == 390
        assert browser.title == "gigagan-coco2014-256"
        asked = browser.execute_script(
            "return performance.getEntriesByType('resource').map(e => e.name)"
        )
        assert [name for name in asked if not name.startswith("data:")] == []
        loaded = "return [...document.images].every(i => i.complete && i.naturalWidth > 0)"
        assert browser.execute_script(loaded)
    finally:
        browser.quit()
