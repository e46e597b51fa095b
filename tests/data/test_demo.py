from __future__ import annotations

import io
import json
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pydantic import ValidationError

from data import coco, concepts, demo
from data.config import EmbeddedConfig
from data.filter import duplicates
from gigagan.common.pictures import decode

SMALL = EmbeddedConfig(
    max_concepts=8, unseen_concepts=2, pictures_per_style=5, size_px=48, heldout_pictures=21
)


def changed(**settings):
    return EmbeddedConfig(**{**SMALL.model_dump(), **settings})


def annotations(built, name):
    return json.loads((built / "heldout" / f"{name}.json").read_text())["annotations"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    demo.build(out, SMALL)
    return out


def test_concepts_used_are_the_first_of_the_list_in_its_order():
    train, unseen = demo.split(SMALL)
    first = [concept.name for concept in concepts.nameable()[:8]]
    assert len(unseen) == 2
    assert [name for name in first if name not in {c.name for c in unseen}] == [
        c.name for c in train
    ]
    assert {c.name for c in [*train, *unseen]} == set(first)


def test_another_seed_trains_on_other_concepts():
    assert demo.split(SMALL) == demo.split(SMALL)
    assert demo.split(changed(max_concepts=20)) != demo.split(changed(max_concepts=20, seed=1))


def test_all_concepts_are_drawn_from_both_sets_by_seed():
    train, unseen = demo.split(changed(concepts="all", max_concepts=None, unseen_concepts=5))
    assert {*train, *unseen} == {*concepts.concepts()}
    assert [c.cldr for c in train] != sorted(c.cldr for c in train)


def test_too_many_unseen_concepts_are_refused():
    with pytest.raises(ValueError, match="unseen_concepts is 7, but there are 8"):
        demo.split(changed(unseen_concepts=7))


def test_holding_nothing_out_is_refused():
    with pytest.raises(ValidationError, match="holds nothing out to measure on"):
        changed(unseen_concepts=0, unseen_combinations=0)


@pytest.mark.parametrize(
    ("share", "per_style", "trained"),
    [(0, 8, [8, 8]), (0.01, 8, [7, 8]), (0.25, 8, [6, 6]), (0.2, 8, [6, 7]), (0.99, 8, [1, 1]),
     (0.25, 3, [3, 3])],
)  # fmt: skip
def test_each_style_keeps_some_combinations_to_train_on(share, per_style, trained):
    config = changed(unseen_combinations=share, pictures_per_style=per_style)
    seen, aside = demo._looks(demo.split(SMALL)[0][0], config)
    assert sorted(Counter(look.style for look in seen).values()) == trained
    both = {look.combination for look in [*seen, *aside]}
    assert len(both) == len(seen) + len(aside) == 16


def test_a_caption_tells_style_name_and_background():
    concept = demo.split(SMALL)[0][0]
    for picture in demo._looks(concept, SMALL)[0]:
        for word in (demo.STYLES[picture.style], concept.phrase, picture.background):
            assert word in picture.caption


def test_a_wrong_caption_leaves_the_label_of_the_picture():
    rows = demo.Plan.of(changed(defect_fraction=0.6)).rows
    assert all(row.label == row.picture.concept.name for row in rows if row.defect != "sixteen_bit")
    assert not [row for row in rows if "black and white" in row.label]
    wrong = [row for row in rows if row.defect == "wrong_caption"]
    assert wrong
    assert all(row.label not in row.caption for row in wrong)


def test_most_training_captions_are_worded_as_held_out_ones():
    rows = demo.Plan.of(changed(max_concepts=60, pictures_per_style=8, defect_fraction=0)).rows
    share = Counter(row.picture.template for row in rows)
    assert 0.65 < share[demo.TEMPLATES[0]] / len(rows) < 0.75
    assert len(share) == 4


def test_glyphs_are_centred_and_of_one_size_unless_jitter_is_asked_for():
    concept = demo.split(SMALL)[0][0]
    looks, _ = demo._looks(concept, SMALL)
    assert {(look.scale, look.place) for look in looks} == {(0.94, (0.5, 0.5))}
    looks, _ = demo._looks(concept, changed(jitter=1))
    assert len({(look.scale, look.place) for look in looks}) == len(looks) == 10


def test_the_gallery_has_every_combination_of_every_concept_once(built):
    rows = annotations(built, "gallery")
    unseen = {concept.name for concept in demo.split(SMALL)[1]}
    combinations = {(row["concept"], row["style"], row["background"]) for row in rows}
    assert len(combinations) == len(rows) == 8 * 2 * 8
    assert {row["concept"] for row in rows if row["split"] == "unseen"} == unseen
    one = next(row for row in rows if row["concept"] == "umbrella" and row["style"] == "flat")
    assert one["caption"] == f"flat emoji of an umbrella on a {one['background']} background"


def test_what_the_gallery_calls_trained_has_a_good_row_and_nothing_else_has_one(built):
    truth = pq.read_table(built / "site" / "truth.parquet").to_pylist()
    good = {
        row["url"].rsplit("/", 1)[1].rsplit(".", 1)[0]
        for row in truth
        if row["defect"] in ("none", "rotated")
    }
    document = json.loads((built / "heldout" / "gallery.json").read_text())
    names = {image["id"]: image["file_name"] for image in document["images"]}
    for row in document["annotations"]:
        is_good = names[row["image_id"]].removesuffix(".png") in good
        assert (row["split"] == "trained") == is_good


def test_heldout_is_a_coco_set_on_its_named_backgrounds(built):
    heldout = coco.read(built / "heldout" / "captions.json")
    assert len(heldout) == 21
    for path, extra in zip(heldout.paths, heldout.extras, strict=True):
        corner = np.asarray(Image.open(path).convert("RGB"))[0, 0]
        assert tuple(corner) == heldout.palette[extra["background"]]


def test_heldout_combinations_are_spread_over_trained_concepts_and_no_row_shows_one(built):
    rows = annotations(built, "captions")
    assert {row["split"] for row in rows} == {"combination"}
    assert sorted(Counter(row["concept"] for row in rows).values()) == [3, 3, 3, 4, 4, 4]
    assert abs(2 * sum(row["style"] == "flat" for row in rows) - len(rows)) <= 6
    shown = {row.picture.combination for row in demo.Plan.of(SMALL).rows}
    for row in rows:
        assert (row["concept"], demo.STYLES.index(row["style"]), row["background"]) not in shown


def test_without_held_out_combinations_unseen_concepts_are_held_out():
    config = changed(unseen_combinations=0, unseen_concepts=3, heldout_pictures=7)
    plan = demo.Plan.of(config)
    assert {plan.gallery[look] for look in plan.heldout} == {"unseen"}
    assert sorted(Counter(look.concept.name for look in plan.heldout).values()) == [2, 2, 3]
    assert {look.style for look in plan.heldout} == {0, 1}


def test_every_picture_that_should_be_there_is_served(built):
    rows = pq.read_table(built / "site" / "truth.parquet").to_pylist()
    with demo.serve(built / "site") as port:
        for row in rows:
            url = row["url"].replace(demo.HOST, f"127.0.0.1:{port}")
            if row["defect"] in ("missing", "no_host", "web_page", "truncated"):
                continue
            with urllib.request.urlopen(url) as answer:
                Image.open(io.BytesIO(answer.read())).load()
                assert bool(answer.headers["X-Robots-Tag"]) == (row["defect"] == "opt_out")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/../truth.parquet")


@pytest.mark.parametrize(("kind", "codec"), [("sixteen_bit", "png"), ("rotated", "jpg")])
def test_odd_encodings_decode_to_the_picture(kind, codec):
    train, _ = demo.split(SMALL)
    picture = replace(demo._looks(train[0], SMALL)[0][0], style=0)
    [row] = demo._plant(picture, kind, picture, 48, np.random.default_rng(0))
    glyph = demo.render(train[0].glyphs[0], 48)
    data = demo._bytes_of(row, glyph, 48)
    plain = demo.draw(row.picture, glyph, (48, 48))
    plain = plain.convert("L").convert("RGB") if kind == "sixteen_bit" else plain
    error = np.abs(np.asarray(decode(data), float) - np.asarray(plain, float)).mean()
    assert error < (0.6 if codec == "png" else 6)


def test_building_again_changes_nothing(built):
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*") if path.is_file()}
    demo.build(built, SMALL)
    assert before == {p: p.stat().st_mtime_ns for p in built.rglob("*") if p.is_file()}


def test_the_source_is_a_function_of_its_seed(built, tmp_path):
    demo.build(tmp_path, SMALL)
    for name in ("laion", "coyo", "truth"):
        first, second = (pq.read_table(o / "site" / f"{name}.parquet") for o in (built, tmp_path))
        assert first.equals(second)
    for path in (built / "site" / "files" / "pictures").iterdir():
        assert path.read_bytes() == (tmp_path / "site/files/pictures" / path.name).read_bytes()


@pytest.mark.parametrize("preset", ["smoke", "demo", "emoji"])
def test_only_copies_are_near_duplicates_for_the_presets_and_not_other_backgrounds(preset):
    document = yaml.safe_load(Path(f"flows/presets/{preset}.yaml").read_text())
    limit = document["filter"]["max_colour_distance"]
    looks = []
    for concept in concepts.nameable()[:5]:
        glyph = demo.render(concept.glyphs[0], 128)
        for background in demo.PALETTE:
            picture = demo.Picture(concept, 0, background)
            looks.append(duplicates.fingerprint(demo.draw(picture, glyph, (128, 128))))
    [row] = demo._plant(picture, "near_duplicate", picture, 128, np.random.default_rng(0))[1:]
    looks.append(duplicates.fingerprint(decode(demo._bytes_of(row, glyph, 128))))
    hash_N = np.array([bits for bits, _ in looks], np.uint64)
    small_ND = np.array([np.frombuffer(small, np.uint8) for _, small in looks])
    keeper = duplicates.near_duplicates(hash_N, small_ND, np.ones(len(looks)), 4, limit)
    assert keeper.tolist() == [-1] * 40 + [39]
