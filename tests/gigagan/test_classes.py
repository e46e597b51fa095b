"""Pictures of classes, and of nothing in particular, measured."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.metric_isc import isc_features_to_metric

from gigagan.config import EvaluateConfig
from gigagan.evaluation import classes, enlarge, protocol
from gigagan.evaluation.heldout import read_heldout
from gigagan.evaluation.judges.inception_score import inception_score
from gigagan.evaluation.measure import evaluate
from gigagan.evaluation.protocol import ProtocolError
from gigagan.evaluation.setting import setting
from gigagan.models import pretrained

from .small import quick_inception

PX = 32
SHADES = {"black": 20, "grey": 128, "white": 235, "never trained": 60}
NAMES = ("black", "grey", "white")
CONFIG = EvaluateConfig(
    batch_size=4, resolution=PX, diversity_prompts=2, diversity_seeds=2, kid_subset_size=6,
    kid_subsets=3, resamples=0, sweep=(), speed_batches=(), neighbours=0,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_inception():
        yield


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    """Three pictures of each of four classes."""
    folder, random = tmp_path_factory.mktemp("heldout"), np.random.default_rng(0)
    (folder / "images").mkdir()
    images, notes = [], []
    for number in range(12):
        name = list(SHADES)[number % 4]
        picture(name, random).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
        note = {"id": number, "image_id": number, "caption": f"a {name} square", "label": name}
        notes.append(note)
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return folder


def picture(name, random):
    noisy = SHADES[name] + random.normal(0, 4, (PX, PX, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def sampler(prompts, seed, truncation=1.0):
    """The right shade, but for white, which is drawn grey; of nothing black."""
    random = np.random.default_rng(seed)
    drawn = {"black": "black", "grey": "grey", "white": "grey", "": "black"}
    return [picture(drawn[prompt], random) for prompt in prompts]


def test_classes_are_drawn_for_the_held_out_pictures_of_classes_that_the_network_knows(
    heldout, tmp_path
):
    results = evaluate(sampler, heldout, tmp_path, CONFIG, asks="class", classes=NAMES)
    lines = (tmp_path / "captions.txt").read_text().splitlines()
    assert sorted(lines) == sorted(NAMES * 3)
    assert results["protocol"]["num_real"] == 9
    found, real = results["metrics"], results["reference"]["real"]
    assert found["class_accuracy_nearest_mean"] == pytest.approx(2 / 3)
    assert real["class_accuracy_nearest_mean"] == 1
    assert results["reference"]["chance"]["class_accuracy_nearest_mean"] == pytest.approx(1 / 3)
    assert found["class_accuracy_nearest_mean_pixels"] == pytest.approx(2 / 3)
    assert found["classes_covered"] == pytest.approx(2 / 3)
    assert 0 < found["intra_class_lpips"] < 0.5
    assert real["intra_class_lpips"] > 0
    assert {"fid", "kid", "precision", "recall", "lpips_diversity"} <= found.keys()
    for name in ("naming", "aligner_similarity", "pixel_probe_median_rank", "clip_score"):
        assert results["absent"][name] == "the network reads no captions"
    assert "inception_score" in results["absent"] | found
    page = (tmp_path / "report.html").read_text()
    assert "By the names of classes" in page


def test_an_unconditional_network_draws_as_many_as_there_are_held_out(heldout, tmp_path):
    results = evaluate(sampler, heldout, tmp_path, CONFIG, asks="nothing")
    assert results["protocol"]["num_generated"] == results["protocol"]["num_real"] == 12
    assert results["metrics"]["classes_covered"] == 1 / 4
    for name in ("class_accuracy_nearest_mean", "intra_class_lpips"):
        assert results["absent"][name].startswith("the network is unconditional")
    assert (tmp_path / "grid.png").exists()


def test_captions_are_drawn_as_before_where_there_are_labels(heldout):
    found = read_heldout(heldout)
    assert found.labels[:3] == ["black", "grey", "white"]
    assert found.captions[0] == "a black square"
    assert found.asks == "text"


def test_a_set_without_labels_is_refused_for_classes_and_said_to_lack_them(heldout, tmp_path):
    content = json.loads((heldout / "captions.json").read_text())
    for note in content["annotations"]:
        del note["label"]
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(content))
    (tmp_path / "images").symlink_to(heldout / "images")
    with pytest.raises(ValueError, match=r"0\.png\) have no classes: .* needs a `label`"):
        evaluate(sampler, plain, tmp_path / "out", CONFIG, asks="class", classes=NAMES)
    results = evaluate(sampler, plain, tmp_path / "out", CONFIG, asks="nothing")
    assert results["absent"]["classes_covered"] == "the held-out pictures have no labels"
    content["annotations"][5]["label"] = "grey"
    plain.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"annotation 0 of .* has the label None, others have"):
        read_heldout(plain)


def test_a_network_of_other_classes_is_refused(heldout, tmp_path):
    with pytest.raises(ValueError, match="no held-out picture is of a class that the network"):
        evaluate(sampler, heldout, tmp_path, CONFIG, asks="class", classes=("red", "blue"))


@pytest.mark.parametrize("asks", ["class", "nothing"])
def test_a_papers_protocol_for_captions_is_not_measured_without(heldout, tmp_path, asks):
    config = CONFIG.model_copy(update={"protocol": "coco2017-512", "resolution": None})
    with pytest.raises(ProtocolError, match=f"measures 'text', not '{asks}'"):
        evaluate(sampler, heldout, tmp_path, config, asks=asks, classes=NAMES)


def test_the_protocol_for_classes_draws_all_in_equal_shares(heldout, tmp_path, monkeypatch):
    rules = protocol.named("imagenet-256")
    small = replace(rules, num_generated=7, num_real=9, num_classes=3, resolution=PX)
    monkeypatch.setitem(protocol.PROTOCOLS, "imagenet-256", small)
    config = CONFIG.model_copy(update={"protocol": "imagenet-256", "resolution": None})
    results = evaluate(sampler, heldout, tmp_path, config, asks="class", classes=NAMES)
    assert (tmp_path / "captions.txt").read_text().split() == [*NAMES, *NAMES, "black"]
    assert results["protocol"]["name"] == "imagenet-256"
    assert "GigaGAN (paper)" in (tmp_path / "report.html").read_text()
    with pytest.raises(ProtocolError, match="measures 'class', not 'text'"):
        evaluate(sampler, heldout, tmp_path, config)
    at = setting(config, tmp_path)
    with pytest.raises(ProtocolError, match="is of 3 classes, the network knows 2"):
        classes.in_equal_shares(NAMES[:2], at)


@pytest.mark.parametrize(("asks", "told"), [("class", {*NAMES}), ("nothing", {""})])
def test_an_upsampler_is_told_what_it_reads(heldout, tmp_path, monkeypatch, asks, told):
    rules = protocol.named("imagenet-64-256")
    count = 9 if asks == "class" else 12
    small = replace(
        rules, num_generated=count, num_real=count, resolution=PX, input_resolution=PX // 2
    )
    monkeypatch.setitem(protocol.PROTOCOLS, "imagenet-64-256", small)
    config = CONFIG.model_copy(update={"protocol": "imagenet-64-256", "resolution": None})
    met = set()

    def upscale(images, prompts, seed):
        met.update(prompts)
        return [image.resize((PX, PX)) for image in images]

    results = enlarge.evaluate(
        upscale, heldout, tmp_path, config, asks=asks, classes=NAMES * (asks == "class")
    )
    assert met == told
    assert results["metrics"]["psnr"] > 20


def test_imagenets_rules_are_fifty_of_each_of_a_thousand_classes():
    rules = protocol.named("imagenet-256")
    assert (rules.num_generated, rules.num_classes, rules.task) == (50_000, 1_000, "class")
    assert protocol.named("imagenet-64-256").task == "upsample"


# ---- measures against their definitions ----------------------------------------------------------


def test_the_inception_score_is_torch_fidelitys_and_within_its_bounds():
    logits = np.random.default_rng(1).normal(0, 3, (70, 5))
    ours = inception_score(logits, splits=7)
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=7, shuffle=False)
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-9)
    assert inception_score(np.zeros((20, 5))).mean == pytest.approx(1)
    sure = np.tile(np.eye(5) * 1e4, (10, 1))
    assert inception_score(sure, splits=5).mean == pytest.approx(5)
    with pytest.raises(ValueError, match="3 pictures in 10 parts"):
        inception_score(logits[:3])


def test_the_inception_score_is_measured_once_the_classifier_is_placed(
    heldout, tmp_path, monkeypatch
):
    monkeypatch.setenv(pretrained.WEIGHTS_VARIABLE, str(tmp_path))
    with pytest.raises(pretrained.MissingWeightsError, match=r"inception-2015-12-05\.safetensors"):
        pretrained.inception_classifier()
    torch.save({"fc.weight": torch.randn(7, 2048)}, tmp_path / "inception-2015-12-05.pt")
    with pytest.raises(pretrained.WrongWeightsError, match=r"no fc\.weight of 1008"):
        pretrained.inception_classifier()
    torch.save({"fc.weight": torch.randn(1008, 2048)}, tmp_path / "inception-2015-12-05.pt")
    results = evaluate(sampler, heldout, tmp_path / "out", CONFIG, asks="nothing")
    assert 1 <= results["metrics"]["inception_score"] <= 1008
    assert results["reference"]["real"]["inception_score"] >= 1


def test_real_pictures_are_told_by_the_means_of_the_others():
    random = np.random.default_rng(2)
    x_MD, class_M = random.normal(size=(11, 3)), np.array([0, 1, 2] * 3 + [0, 3])

    def naive(m):
        others = [i for i in range(11) if i != m]
        distance = {
            k: np.linalg.norm(x_MD[m] - x_MD[[i for i in others if class_M[i] == k]].mean(0))
            for k in {class_M[i] for i in others}
        }
        return min(distance, key=distance.get)

    told = classes.told_as(x_MD, x_MD, class_M, without_own=True)
    assert told[-1] == -1  # the only one of its class
    # Of the others the class of one picture is a rival, as it is where one is drawn.
    assert told[:-1].tolist() == [naive(m) for m in range(10)]


def test_pairs_are_of_one_class_and_every_class_before_a_second_pair_of_any():
    found = classes.pairs_of(["a", "b", "a", "a", "b", "a", "c"])
    assert found == [(0, 2), (1, 4), (3, 5)]
    assert classes.pairs_of(["a", "b", "a", "a", "b", "a", "c"], most=2) == found[:2]
