"""Which pictures can be named: by pixels, by the judge, in an evaluation and at a tick."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from gigagan.config import EvaluateConfig
from gigagan.evaluation import naming
from gigagan.evaluation.heldout import Gallery, read_gallery, read_heldout, subset
from gigagan.evaluation.measure import evaluate, score
from gigagan.evaluation.protocol import differing
from gigagan.evaluation.setting import TEXT_ENCODER, seed_of
from gigagan.models import pretrained
from gigagan.models.generator import Generator
from gigagan.training.captions import CaptionFeatures
from gigagan.training.probes import GRID_Z, BaseProbe

from . import shapes, small

R1 = [
    f"naming_{how}_r1_{split}"
    for split in ("combination", "trained")
    for how in ("pixels", "judge")
]


@pytest.fixture(scope="module", autouse=True)
def quick_inception():
    """Also where a module's evaluation is made."""
    with small.quick_inception():
        yield


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    return shapes.write(tmp_path_factory.mktemp("shapes") / "heldout")


@pytest.fixture(scope="module")
def gallery(heldout):
    return read_gallery(heldout)


def real(gallery):
    return np.stack([np.asarray(Image.open(work.picture)) for work in gallery.works])


# ---- the gallery


def test_a_gallery_says_of_every_picture_what_it_shows_and_whether_it_was_trained(gallery, heldout):
    assert len(gallery.works) == 36
    assert Counter(work.split for work in gallery.works) == {
        "trained": 16,
        "combination": 8,
        "unseen": 12,
    }
    for place, work in enumerate(gallery.works):
        look = work.concept, work.style, work.background
        assert shapes.taken_apart(work.caption) == look
        assert work.picture.name == f"{'-'.join(look)}.png"
        assert gallery.places[work.caption] == place
    everything = read_heldout(heldout)
    assert everything.gallery == gallery
    assert subset(everything, 3, seed=0).gallery == gallery


def test_without_the_file_there_is_no_gallery(heldout, tmp_path):
    assert read_gallery(tmp_path) is None
    shutil.copytree(heldout, tmp_path / "set")
    (tmp_path / "set" / "gallery.json").unlink()
    assert read_heldout(tmp_path / "set").gallery is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "annotation 2 .* has split 'test'.*trained, combination, unseen"),
        ({"concept": None}, "annotation 2 .* lacks concept"),
        ({"caption": shapes.caption("disc", "flat", "red")}, "'flat emoji of a disc .*' twice"),
    ],
)
def test_a_gallery_that_says_too_little_is_refused(heldout, tmp_path, change, message):
    content = json.loads((heldout / "gallery.json").read_text())
    second = content["annotations"][1]
    second |= change
    content["annotations"][1] = {k: v for k, v in second.items() if v is not None}
    (tmp_path / "gallery.json").write_text(json.dumps(content))
    (tmp_path / "images").symlink_to(heldout / "images")
    with pytest.raises(ValueError, match=message):
        read_gallery(tmp_path)


# ---- who is told apart from whom


def test_every_concept_is_asked_for_once_before_one_is_twice(gallery):
    for count, each in ((4, [1, 1, 1, 1]), (6, [1, 1, 2, 2]), (99, [4, 4, 4, 4])):
        chosen = naming.choose(gallery, "trained", count=count)
        assert len(set(chosen)) == len(chosen)
        assert {gallery.works[i].split for i in chosen} == {"trained"}
        assert sorted(Counter(gallery.works[i].concept for i in chosen).values()) == each
    few = naming.choose(gallery, "unseen", among={3, 30, 35})
    assert sorted(few) == [30, 35]


def test_what_is_drawn_anyway_stands_for_its_split(gallery, heldout):
    anyway, beside = naming.plan(gallery, [*read_heldout(heldout).captions[:5], "something else"])
    assert [gallery.works[i].split for i in anyway] == ["combination"] * 5
    assert Counter(gallery.works[i].split for i in beside) == {"trained": 16, "unseen": 12}


def test_trained_concepts_are_told_apart_from_trained_ones_and_unseen_ones_from_all(gallery):
    asked = [gallery.places[shapes.caption(*look)] for look in (
        ("bar", "flat", "sky"), ("disc", "outlined", "red"), ("dots", "flat", "red"),
    )]  # fmt: skip
    for place, rival_G in zip(asked, naming.rivals(gallery, asked), strict=True):
        own = gallery.works[place]
        found = [work for work, is_rival in zip(gallery.works, rival_G, strict=True) if is_rival]
        assert {(w.style, w.background) for w in found} == {(own.style, own.background)}
        expected = shapes.TRAINED + (shapes.UNSEEN if own.split == "unseen" else ())
        assert [w.concept for w in found] == list(expected)


def test_equally_near_ones_share_the_mean_of_their_ranks(gallery):
    asked = [gallery.places[shapes.caption("cross", "flat", "white")]]
    rivals = np.flatnonzero(naming.rivals(gallery, asked)[0])
    distance_NG = np.zeros(
        (1, len(gallery.works))
    )  # works of other looks are nearest, and no rivals
    distance_NG[0, rivals] = [3, 1, 3 + 1e-12, 4]
    ranks = naming.own_ranks(gallery, asked, distance_NG)
    assert ranks.rank_N.tolist() == [2.5]
    assert ranks.count_N.tolist() == [4]


# ---- by pixels


def test_a_real_picture_is_nearest_to_itself_and_one_picture_for_all_is_at_chance(gallery):
    everyone = list(range(len(gallery.works)))
    real_GD = naming.pooled(real(gallery))
    ranks = naming.pixel_ranks(gallery, everyone, real_GD, real_GD)
    assert (ranks.rank_N == 1).all()
    of_one = naming.pixel_ranks(gallery, everyone, real_GD[:1].repeat(36, axis=0), real_GD)
    own = [work.concept == "disc" for work in gallery.works]
    assert (of_one.rank_N[own][:1] == 1).all()
    assert of_one.rank_N.mean() == pytest.approx(((of_one.count_N + 1) / 2).mean(), abs=0.7)


def test_pixels_are_averaged_and_read_at_the_size_of_what_was_drawn(gallery):
    pictures = np.zeros((2, 32, 32, 3), np.uint8)
    pictures[1, :2, :2] = [[[255, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]
    pooled = naming.pooled(pictures).reshape(2, 3, 16, 16)
    assert pooled[1, 0, 0, 0] == 0.25
    assert pooled.sum() == 0.25
    paths = [work.picture for work in gallery.works[:3]]
    expected = naming.pooled(real(gallery)[:3])
    assert np.array_equal(naming.read_pooled(paths, 32), expected)
    assert naming.read_pooled(paths, 64).shape == (3, 768)


# ---- by the judge


def test_the_judge_sees_each_concept_in_each_style_on_two_backgrounds_at_least(gallery):
    known = [5, 1, 5]
    fitted = naming.fitted_on(gallery, known)
    assert fitted[:2] == [5, 1]
    assert len(set(fitted)) == len(fitted)
    counts = Counter((gallery.works[i].concept, gallery.works[i].style) for i in fitted)
    assert set(counts.values()) == {2}
    assert len(counts) == 12


def ranks_by(gallery, features_GD):
    """Of real pictures with these features, all of which the judge may be fitted on."""
    everyone = list(range(len(gallery.works)))
    random = np.random.default_rng(3)
    words = {word: random.normal(size=7) for work in gallery.works for word in work.caption.split()}
    texts = [sum(words[word] for word in work.caption.split()) for work in gallery.works]
    texts_GE = torch.from_numpy(np.stack(texts)).float()
    return naming.Judge(gallery, everyone, features_GD, texts_GE).ranks(everyone, features_GD)


def test_a_picture_is_not_judged_by_whom_it_taught(gallery):
    random = np.random.default_rng(0)
    unlike = random.normal(size=(36, 50)).astype(np.float32)  # each can be learned by heart
    found = ranks_by(gallery, unlike)
    assert (found.rank_N == 1).mean() < 0.45
    codes = {name: random.normal(size=50) for name in shapes.TRAINED + shapes.UNSEEN}
    like = np.stack([codes[work.concept] for work in gallery.works]).astype(np.float32)
    assert (ranks_by(gallery, like + 0.1 * unlike).rank_N == 1).mean() > 0.9


# ---- in an evaluation

CONFIG = EvaluateConfig(
    batch_size=5,
    resolution=shapes.PX,
    diversity_prompts=0,
    kid_subset_size=4,
    resamples=20,
    sweep=(),
    speed_batches=(),
    neighbours=0,
)


def good(captions, seed, truncation=1.0):
    """The right picture with some noise, at twice the size."""
    random = np.random.default_rng(seed)
    pictures = []
    for text in captions:
        noisy = shapes.draw(*shapes.taken_apart(text)) + random.normal(
            0, 5, (shapes.PX,) * 2 + (3,)
        )
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        pictures.append(picture.resize((64, 64), Image.Resampling.NEAREST))
    return pictures


@pytest.fixture(scope="module")
def evaluated(heldout, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, evaluate(good, heldout, out, CONFIG, statistics=out / "statistics")


def test_a_good_sampler_is_named_in_every_split(evaluated):
    _, results = evaluated
    metrics, reference = results["metrics"], results["reference"]
    for split, chance in (("trained", 1 / 4), ("combination", 1 / 4), ("unseen", 1 / 6)):
        for how in ("pixels", "judge"):
            name = f"naming_{how}_r1_{split}"
            assert metrics[name] > (0.99 if how == "pixels" else 2 * chance), name
            assert reference["chance"][name] == pytest.approx(chance)
            low, high = results["intervals"][name]
            assert low <= metrics[name] <= high
            assert metrics[name] <= metrics[f"naming_{how}_r5_{split}"] <= 1
            assert 1 <= metrics[f"naming_{how}_rank_{split}"] < 2
            assert reference["chance"][f"naming_{how}_rank_{split}"] == (1 / chance + 1) / 2
        assert reference["real"][f"naming_pixels_r1_{split}"] == 1
        assert reference["real"][f"naming_judge_r1_{split}"] > 2 * chance
    assert list(metrics)[:4] == R1
    assert "naming" not in results["absent"]


def test_the_result_says_what_naming_hangs_on(evaluated):
    _, results = evaluated
    rules = results["protocol"]
    assert rules["naming_captions"] == {"trained": 16, "combination": 8, "unseen": 12}
    assert rules["naming"]["fitted"] == 24  # two of each concept in each style
    assert TEXT_ENCODER in rules["weights_sha256"]
    other = {**rules, "naming": {**rules["naming"], "gallery_sha256": "0" * 64}}
    assert differing(rules, other)[0] == "naming"


def test_what_is_drawn_beside_the_captions_lies_apart_with_its_captions(evaluated):
    out, _ = evaluated
    captions = (out / "naming" / "captions.txt").read_text().splitlines()
    files = sorted((out / "naming" / "images").iterdir())
    assert len(files) == len(captions) == 28
    assert Counter(shapes.split_of(*shapes.taken_apart(c)) for c in captions) == {
        "trained": 16,
        "unseen": 12,
    }
    expected = good(captions[5:10], seed_of(CONFIG, 8 + 5))[2]  # 8 captions came before
    assert np.array_equal(np.asarray(Image.open(files[7])), np.asarray(expected))
    assert len(list((out / "images").iterdir())) == 8


def test_grids_and_page_say_what_each_shows(evaluated):
    out, _ = evaluated
    page = (out / "report.html").read_text()
    for text in (
        "Can one name what was drawn?",
        "Never-trained combinations of concept, style and background",
        "Concepts never trained",
        "R@1 by pixels: never-trained combinations",
    ):
        assert text in page, text
    for caption in (shapes.caption("dots", "flat", "red"), shapes.caption("disc", "flat", "red")):
        assert caption in page
    assert Image.open(out / "grid.png").size != Image.open(out / "unseen.png").size


def test_drawn_folders_are_named_where_they_have_captions_of_the_gallery(
    evaluated, heldout, tmp_path
):
    out, ours = evaluated
    theirs = tmp_path / "theirs"
    shutil.copytree(out / "images", theirs / "fake_images")
    shutil.copy(out / "captions.txt", theirs)
    results = score(theirs, heldout, tmp_path / "scored", CONFIG, statistics=out / "statistics")
    for name in R1[:2]:
        assert results["metrics"][name] == pytest.approx(ours["metrics"][name]), name
    assert {"naming_trained", "naming_unseen"} <= results["absent"].keys()
    assert differing(results["protocol"], ours["protocol"]) is None
    assert not (tmp_path / "scored" / "unseen.png").exists()


def test_without_a_gallery_nothing_is_named_and_the_reason_is_said(evaluated, heldout, tmp_path):
    statistics = evaluated[0] / "statistics"
    shutil.copytree(heldout, tmp_path / "set")
    (tmp_path / "set" / "gallery.json").unlink()
    results = evaluate(good, tmp_path / "set", tmp_path / "out", CONFIG, statistics=statistics)
    assert "no gallery.json" in results["absent"]["naming"]
    assert not [name for name in results["metrics"] if name.startswith("naming")]
    assert not (tmp_path / "out" / "naming").exists()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Held-out captions" in page
    assert "Can one name" not in page


# ---- at a tick


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return Generator(small.GENERATOR).eval()


def probe(heldout, **changes):
    captions = CaptionFeatures(pretrained.text_encoder("embedded:minilm-l6"), torch.device("cpu"))
    settings = {"resolution": 16, "num_captions": 7, "prompts": ()}
    return BaseProbe(captions, heldout, **settings | changes)


def test_a_tick_tells_how_many_pictures_can_be_named(heldout, generator, monkeypatch):
    looker = probe(read_heldout(heldout), resolution=shapes.PX)

    def drawn(self, _, prompts, *, seed):
        return np.stack([shapes.draw(*shapes.taken_apart(prompt)) for prompt in prompts])

    monkeypatch.setattr(BaseProbe, "_draw", drawn)
    scalars = looker.look(generator).scalars
    for split in ("trained", "combination", "unseen"):
        assert scalars[f"probe/naming_r1_{split}"] == 1
    assert 1 / 6 < scalars["probe/naming_chance"] < 1 / 4
    assert scalars["probe/colour_accuracy"] == 1
    assert {"probe/shape_rank", "probe/z_sensitivity"} <= scalars.keys()
    assert not [name for name in scalars if "pixel" in name]


def test_an_untrained_generator_is_not_named_at_a_tick(heldout, generator):
    scalars = probe(read_heldout(heldout)).look(generator).scalars
    assert all(scalars[f"probe/naming_r1_{s}"] < 0.7 for s in ("trained", "combination", "unseen"))


def test_a_tick_without_a_gallery_tells_the_rank_of_the_own_picture(heldout, generator, tmp_path):
    shutil.copytree(heldout, tmp_path / "set")
    (tmp_path / "set" / "gallery.json").unlink()
    scalars = probe(read_heldout(tmp_path / "set")).look(generator).scalars
    assert scalars["probe/pixel_chance_rank"] == 4
    assert not [name for name in scalars if "naming" in name]
    assert probe(read_heldout(heldout), num_captions=0, prompts=("a disc",)).look(generator)


def test_the_picture_of_a_tick_shows_the_real_one_where_it_is_known(heldout, generator):
    known, unknown = shapes.caption("dots", "flat", "red"), "a disc"
    with_real = probe(read_heldout(heldout), prompts=(unknown, known)).look(generator).grid
    without = probe(None, prompts=(unknown, unknown)).look(generator).grid
    assert with_real.width - without.width == 2 * (96 + 2)  # a cell more in both columns
    last = with_real.crop((with_real.width - 8 - 98, 48, with_real.width - 16, 120))
    assert shapes.PALETTE["red"] in np.asarray(last).reshape(-1, 3).tolist()
    assert GRID_Z == 4


def test_a_gallery_has_a_place_for_every_caption():
    assert Gallery([]).places == {}
