"""Captions and pictures that others wrote: what is read, and what is refused by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from gigagan.config import EvaluateConfig
from gigagan.evaluation import drawing, measure
from gigagan.evaluation.heldout import read_drawn, read_heldout
from gigagan.evaluation.measure import evaluate, score
from gigagan.evaluation.setting import seed_of, setting

CONFIG = EvaluateConfig(
    batch_size=4, resolution=16, diversity_prompts=0, kid_subset_size=4, kid_subsets=2, seed=3,
    resamples=0, sweep=(), speed_batches=(), neighbours=0,
)  # fmt: skip
COLOURS = ["red", "lime", "blue", "white", "black", "yellow", "cyan", "gray"]
NOTE = {"id": 1, "image_id": 9, "caption": "a"}
IMAGE = {"id": 9, "file_name": "a.png"}


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    """Eight pictures of a colour each; the last two have one caption."""
    folder = tmp_path_factory.mktemp("heldout")
    (folder / "images").mkdir()
    images, notes = [], []
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (16, 16), colour).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
        caption = "one of two" if number > 5 else f"a {colour} square"
        notes.append({"id": number, "image_id": number, "caption": caption})
    content = {"images": images, "annotations": notes}
    (folder / "captions.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def drawn(heldout, tmp_path):
    """The real pictures as if they had been drawn, in the authors' layout."""
    shutil.copytree(heldout / "images", tmp_path / "drawn" / "fake_images")
    captions = read_heldout(heldout).captions
    (tmp_path / "drawn" / "captions.txt").write_text("".join(f"{line}\n" for line in captions))
    return tmp_path / "drawn"


def scored(drawn, heldout):
    return score(drawn, heldout, drawn / "out", CONFIG, statistics=heldout / "statistics")


# ---- pairs -------------------------------------------------------------------------------------


def test_captions_of_several_pictures_have_these_in_their_order(heldout):
    everything = read_heldout(heldout)
    asked = ["one of two", "a red square", "one of two", "of no picture", "one of two"]
    assert measure._places(asked, everything) == [6, 0, 7, None, 6]
    assert measure._places(everything.captions, everything) == list(range(8))


def test_blanks_and_ends_of_lines_do_not_tell_captions_apart(drawn, heldout):
    captions = read_heldout(heldout).captions
    spaced = [f"{captions[0]} ", f"\t{captions[1]}", captions[2].replace(" ", "  "), *captions[3:]]
    lines = "\r\n".join(spaced)
    for text in (lines, f"\ufeff{lines}\r\n", lines.replace(" ", "\u2028")):
        (drawn / "captions.txt").write_bytes(text.encode())
        assert read_drawn(drawn)[1] == captions


def test_a_caption_that_is_not_held_out_takes_no_other_along(drawn, heldout):
    lines = (drawn / "captions.txt").read_text().splitlines()
    (drawn / "captions.txt").write_text("\n".join([*lines[:3], "of something else", *lines[4:]]))
    results = scored(drawn, heldout)
    assert results["metrics"]["pixel_probe_median_rank"] == 1
    assert results["protocol"]["num_pairs"] == 7
    (drawn / "captions.txt").write_text("other\n" * 8)
    results = scored(drawn, heldout)
    assert "'other' and all others" in results["absent"]["pixel_probe_median_rank"]
    assert results["protocol"]["num_pairs"] == 0
    assert "fid" in results["metrics"]


def test_captions_that_are_not_utf8_are_named(drawn):
    (drawn / "captions.txt").write_bytes(b"caf\xe9\n" * 8)
    with pytest.raises(ValueError, match=r"captions\.txt is not UTF-8"):
        read_drawn(drawn)


# ---- files of COCO -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"images": [IMAGE], "annotations": [{"id": 1, "image_id": 9, "bbox": []}]},
         r"annotations\[0\] has no 'caption' that is str"),
        ({"images": [{"filename": "a.png", "imgid": 9, "sentences": []}], "dataset": "coco"},
         r"images\[0\] has no 'id' that is int"),
        ({"images": [IMAGE]}, "it has no list 'annotations'"),
        ({"annotations": [NOTE]}, "it has no list 'images'"),
        ({"images": {"9": "a.png"}, "annotations": [NOTE]}, "it has no list 'images'"),
        ([IMAGE], "it has no list 'images'"), ("text", "it has no list 'images'"),
        ({"images": ["a.png"], "annotations": [NOTE]}, r"images\[0\] has no 'id'"),
        ({"images": [IMAGE], "annotations": [{**NOTE, "caption": ["a", "b"]}]}, "'caption' that"),
        ({"images": [IMAGE], "annotations": [{**NOTE, "caption": None}]}, "'caption' that is str"),
        ({"images": [IMAGE], "annotations": [{"image_id": 9, "caption": "a"}]}, "no 'id' that is"),
        ({"images": [IMAGE], "annotations": [{**NOTE, "image_id": 8}]}, "annotation 1 is of a pic"),
        ({"images": [IMAGE], "annotations": [{**NOTE, "caption": "half \ud83d here"}]},
         "the caption of annotation 1 is no text"),
    ],
)  # fmt: skip
def test_another_json_is_refused_by_what_it_lacks(tmp_path, content, why):
    Image.new("RGB", (5, 3)).save(tmp_path / "a.png")
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"x\.json is not in COCO's captions format \(.*{why}"):
        read_heldout(tmp_path / "x.json")


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe{}", b"PAR1"])
def test_a_file_that_is_no_json_is_named(tmp_path, text):
    (tmp_path / "captions.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"captions\.json is not in COCO's captions format"):
        read_heldout(tmp_path)


def test_a_bad_caption_is_refused_before_anything_is_drawn(heldout, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(heldout, broken)
    content = json.loads((broken / "captions.json").read_text())
    content["annotations"][4]["caption"] = "half an emoji \ud83d here"
    (broken / "captions.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"captions\.json.*annotation 4 is no text"):
        evaluate(lambda *_: pytest.fail("drawn"), broken, tmp_path / "out", CONFIG)


# ---- seeds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7, 18_446_633, 18_446_634, 20_261_127, 2**31, 2**63, 10**30])
def test_every_seed_is_one_that_a_sampler_can_take(tmp_path, seed):
    config = CONFIG.model_copy(update={"seed": seed})
    asked = []

    def make(rows, seed):
        torch.Generator().manual_seed(seed * 1_000_003 + 99_999)  # as the sampler does
        asked.append(seed)
        return [Image.new("RGB", (4, 4))] * (rows.stop - rows.start)

    drawing.draw(make, 9, setting(config, tmp_path))
    assert len({*asked}) == 3
    expected = seed_of(config, 4)
    if seed <= 18_446_633:
        assert asked[1] == expected
    sample = drawing.within(lambda captions, seed, truncation: [seed])
    assert sample(["a"], expected, 1.0) == asked[1:2]


def test_a_set_is_measured_with_a_seed_of_today_s_date(heldout, tmp_path):
    def sample(captions, seed, truncation):
        torch.Generator().manual_seed(seed * 1_000_003)
        noise = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
        return [Image.fromarray(noise)] * len(captions)

    update = {"seed": 20_261_127, "sweep": (0.5, 1.0), "sweep_captions": 2, "speed_batches": (1,)}
    config = CONFIG.model_copy(update={**update, "num_images": 4})
    results = evaluate(sample, heldout, tmp_path, config, statistics=heldout / "statistics")
    assert results["protocol"]["seed"] == 20_261_127
