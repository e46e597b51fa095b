"""Captions and pictures that others wrote: what is read, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gigagan.__main__ import main
from gigagan.config import EvaluateConfig
from gigagan.evaluation import drawing, measure
from gigagan.evaluation.heldout import read_drawn, read_gallery, read_heldout
from gigagan.evaluation.judges.alignment import mean_similarity, recall_at
from gigagan.evaluation.judges.features import image_vectors, text_vectors
from gigagan.evaluation.measure import evaluate, score
from gigagan.evaluation.setting import embedded, seed_of, setting
from gigagan.models import pretrained
from gigagan.models.aligner import Aligner, fit_aligner
from gigagan.seeds import derived

from . import small

CONFIG = EvaluateConfig(
    batch_size=4, resolution=16, diversity_prompts=0, kid_subset_size=4, kid_subsets=2, seed=3,
    resamples=0, sweep=(), speed_batches=(), neighbours=0,
)  # fmt: skip
COLOURS = ["red", "lime", "blue", "white", "black", "yellow", "cyan", "gray"]
NOTE = {"id": 1, "image_id": 9, "caption": "a"}
IMAGE = {"id": 9, "file_name": "a.png"}


@pytest.fixture(scope="module", autouse=True)
def quick_inception():
    """Also where a module's evaluation is made."""
    with small.quick_inception():
        yield


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


@pytest.fixture(scope="module")
def aligner(heldout, tmp_path_factory):
    real = read_heldout(heldout)
    images = image_vectors(
        real.pictures, pretrained.image_encoder("embedded:efficientnet-lite0"), px=32
    )
    texts = text_vectors(real.captions, pretrained.text_encoder("embedded:minilm-l6"))
    path = tmp_path_factory.mktemp("aligner") / "aligner.safetensors"
    fit_aligner(images, texts, image_px=32).save(path)
    return path


def scored(drawn, heldout):
    return score(drawn, heldout, drawn / "out", CONFIG, statistics=heldout / "statistics")


# ---- pairs -------------------------------------------------------------------------------------


def places(captions, everything, names=None):
    return measure._places(captions, [Path(name) for name in names or captions], everything)


def test_captions_of_several_pictures_have_these_in_their_order(heldout):
    everything = read_heldout(heldout)
    asked = ["one of two", "a red square", "one of two", "of no picture", "one of two"]
    assert places(asked, everything) == [6, 0, 7, None, 6]
    assert places(everything.captions, everything) == list(range(8))


def test_a_number_in_the_name_says_which_of_several_pictures_is_meant(heldout):
    everything = read_heldout(heldout)
    asked = ["one of two", "a red square", "one of two"]
    assert places(asked, everything, ["0.png", "7.png", "x_0006.png"]) == [7, 0, 6]


def test_blanks_and_ends_of_lines_do_not_tell_captions_apart(drawn, heldout):
    captions = read_heldout(heldout).captions
    spaced = [f"{captions[0]} ", f"\t{captions[1]}", captions[2].replace(" ", "  "), *captions[3:]]
    lines = "\r\n".join(spaced)
    for text in (lines, f"\ufeff{lines}\r\n", lines.replace(" ", "\u2028")):
        (drawn / "captions.txt").write_bytes(text.encode())
        assert read_drawn(drawn)[1] == captions


def test_a_caption_that_is_not_held_out_takes_no_other_along(drawn, heldout):
    whole = scored(drawn, heldout)
    lines = (drawn / "captions.txt").read_text().splitlines()
    (drawn / "captions.txt").write_text("\n".join([*lines[:3], "of something else", *lines[4:]]))
    results = scored(drawn, heldout)
    assert results["metrics"]["pixel_probe_median_rank"] == 1
    assert results["protocol"]["num_pairs"] == results["protocol"]["num_with_real"] == 7
    assert results["absent"] == whole["absent"]
    assert "7 of 8 captions have a real picture" in (drawn / "out/report.html").read_text()
    (drawn / "captions.txt").write_text("other\n" * 8)
    results = scored(drawn, heldout)
    assert "'other' and all others" in results["absent"]["pixel_probe_median_rank"]
    assert results["protocol"]["num_pairs"] == 0
    assert "fid" in results["metrics"]


def test_real_pictures_agreement_is_of_the_captions_that_have_one(drawn, heldout, aligner):
    """Beside what is drawn, among as many captions: the found ones keep their real pictures."""
    settings = {"aligner": aligner, "statistics": heldout / "statistics"}
    whole = score(drawn, heldout, drawn / "out", CONFIG, **settings)
    lines = (drawn / "captions.txt").read_text().splitlines()
    (drawn / "captions.txt").write_text("\n".join(["of something else", *lines[1:]]))
    part = score(drawn, heldout, drawn / "out", CONFIG, **settings)
    assert part["absent"] == whole["absent"]
    assert part["reference"]["real"].keys() == whole["reference"]["real"].keys()
    assert part["reference"]["chance"].keys() == whole["reference"]["chance"].keys()
    judge = Aligner.load(aligner)
    encoder = pretrained.text_encoder(judge.text_encoder)
    at = setting(CONFIG, drawn / "out")
    pictures = embedded(judge, read_heldout(heldout).pictures[1:], at)
    texts = judge.embed_texts(text_vectors(lines[1:], encoder))
    expected = mean_similarity(pictures, texts)
    assert part["reference"]["real"]["aligner_similarity"] == pytest.approx(expected)
    assert expected != pytest.approx(whole["reference"]["real"]["aligner_similarity"])


def test_recall_of_some_pictures_is_among_all_captions():
    texts = torch.eye(5)
    pictures = torch.stack([texts[3], texts[0] + 2 * texts[1]])
    assert recall_at(1, pictures, texts, [3, 0]) == 0.5
    assert recall_at(2, pictures, texts, [3, 0]) == 1
    with pytest.raises(ValueError, match="2 queries and 5 keys"):
        recall_at(1, pictures, texts)


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


PALETTE = {"red": [255, 0, 0], "teal": [0, 128, 128]}


@pytest.mark.parametrize(
    ("palette", "background", "why"),
    [
        ([255, 0, 0], "red", "info.palette of .* is not names with three values each"),
        ({"red": [255, 0]}, "red", "info.palette of .* is not names with three values each"),
        (PALETTE, "blue", "background 'blue' of annotation 1 .* choose one of red, teal"),
        (PALETTE, ["red"], r"background \['red'\] of annotation 1 .* choose one of red, teal"),
    ],
)
def test_backgrounds_of_no_known_colour_are_refused_when_read(tmp_path, palette, background, why):
    Image.new("RGB", (5, 3)).save(tmp_path / "a.png")
    notes = [{**NOTE, "background": background}]
    content = {"info": {"palette": palette}, "images": [IMAGE], "annotations": notes}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=why):
        read_heldout(tmp_path)


@pytest.mark.parametrize("info", [None, "COCO 2014", [], {"palette": None}])
def test_an_info_of_another_kind_is_none(tmp_path, info):
    Image.new("RGB", (5, 3)).save(tmp_path / "a.png")
    content = {"info": info, "images": [IMAGE], "annotations": [NOTE]}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    assert read_heldout(tmp_path).palette is None


def test_a_gallery_s_concept_that_is_no_text_is_named(tmp_path):
    Image.new("RGB", (5, 3)).save(tmp_path / "a.png")
    said = {"concept": ["cat"], "style": "flat", "background": "red", "split": "unseen"}
    content = {"images": [IMAGE], "annotations": [NOTE | said]}
    (tmp_path / "gallery.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"annotation 1 of .*gallery\.json lacks concept"):
        read_gallery(tmp_path)


# ---- files of the command line -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1}', "it has no mapping 'protocol'"), ("[]", "it has no mapping 'protocol'"),
        ('{"protocol": {', "line 1 column 15"),
        ('{"protocol": {}, "metrics": {"fid": "3"}, "intervals": {}}', "is no number"),
        ('{"protocol": {}, "metrics": {"fid": 3}, "intervals": {"fid": 1}}', "unpack"),
    ],
)  # fmt: skip
def test_a_foreign_or_damaged_file_to_compare_is_named(tmp_path, capsys, text, why):
    (tmp_path / "x.json").write_text(text)
    assert main(["evaluate", "--compare", str(tmp_path / "x.json")]) == 1
    error = capsys.readouterr().err
    assert f"error: {tmp_path / 'x.json'} is not a results.json of an evaluation (" in error
    assert why in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"num_image": 3}', "'evaluate.num_image', did you mean 'evaluate.num_images'?"),
        ('{"evaluate": {"batch_size": 0}}', "evaluate.batch_size = 0: Input should be greater"),
        ('{"seed": ', "line 1 column 10"),
    ],
)
def test_settings_of_an_evaluation_that_cannot_be_are_named(tmp_path, capsys, text, why):
    (tmp_path / "x.json").write_text(text)
    command = ["evaluate", "--config", str(tmp_path / "x.json"), "--out", str(tmp_path)]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert why in error
    assert "x.json" in error
    assert error.count("\n") == 1


# ---- seeds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7, 18_446_634, 20_261_127, 2**31, 2**63 - 1])
def test_every_seed_is_one_that_a_sampler_can_take(tmp_path, seed):
    config = CONFIG.model_copy(update={"seed": seed})
    asked = []

    def make(rows, seed):
        torch.Generator().manual_seed(derived(seed, 99_999))  # as the sampler does
        asked.append(seed)
        return [Image.new("RGB", (4, 4))] * (rows.stop - rows.start)

    drawing.draw(make, 9, setting(config, tmp_path))
    assert len({*asked}) == 3
    assert asked[1] == seed_of(config, 4)
    assert all(0 <= seed < 2**63 for seed in asked)


def test_a_set_is_measured_with_a_seed_of_today_s_date(heldout, tmp_path):
    def sample(captions, seed, truncation):
        torch.Generator().manual_seed(derived(seed, 0))
        noise = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
        return [Image.fromarray(noise)] * len(captions)

    update = {"seed": 20_261_127, "sweep": (0.5, 1.0), "sweep_captions": 2, "speed_batches": (1,)}
    config = CONFIG.model_copy(update={**update, "num_images": 4})
    results = evaluate(sample, heldout, tmp_path, config, statistics=heldout / "statistics")
    assert results["protocol"]["seed"] == 20_261_127
