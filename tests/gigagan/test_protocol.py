import json

import numpy as np
import pytest
import torch
from PIL import Image

from gigagan.config import EvaluateConfig
from gigagan.evaluation import protocol
from gigagan.evaluation.features import image_vectors, inception_features, square, text_vectors
from gigagan.evaluation.heldout import read_heldout, subset
from gigagan.evaluation.protocol import evaluate
from gigagan.evaluation.report import caption_grid, table, write_json
from gigagan.models import pretrained
from gigagan.models.aligner import fit_aligner

PALETTE = {"red": [220, 40, 40], "sky": [150, 200, 250], "white": [255, 255, 255]}
SHAPES = ["disc", "bar", "cross", "ring"]
PX = 32


def draw(shape, colour):
    y, x = np.mgrid[:PX, :PX] - PX / 2
    masks = {
        "disc": x**2 + y**2 < 100,
        "bar": abs(y) < 4,
        "cross": (abs(x) < 3) | (abs(y) < 3),
        "ring": abs(np.hypot(x, y) - 9) < 2,
    }
    inside = masks[shape] & (np.maximum(abs(x), abs(y)) < 13)
    return np.where(inside[..., None], 20, np.array(PALETTE[colour])).astype(np.uint8)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heldout")
    (folder / "images").mkdir()
    images, annotations = [], []
    pairs = [(shape, colour) for shape in SHAPES for colour in PALETTE]
    for i, (shape, colour) in enumerate(pairs):
        name = f"{i}.png"
        Image.fromarray(draw(shape, colour)).save(folder / "images" / name)
        images.append({"id": i, "file_name": name, "width": PX, "height": PX})
        caption = f"a {shape} on a {colour} background"
        annotations.append({"id": i, "image_id": i, "caption": caption, "background": colour})
    content = {"info": {"palette": PALETTE}, "images": images, "annotations": annotations}
    (folder / "captions.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def aligner(heldout, tmp_path_factory):
    real = read_heldout(heldout)
    encoder = pretrained.image_encoder("embedded:efficientnet-lite0")
    images = image_vectors(real.pictures, encoder, px=64)
    texts = text_vectors(real.captions, pretrained.text_encoder("embedded:minilm-l6"))
    path = tmp_path_factory.mktemp("aligner") / "aligner.safetensors"
    fit_aligner(images, texts, image_px=64).save(path)
    return path


def sampler(captions, seed):
    """The right shape on the right background, with a latent that adds noise, at twice the size."""
    rng = np.random.default_rng(seed)
    pictures = []
    for caption in captions:
        _, shape, _, _, colour, _ = caption.split()
        noisy = draw(shape, colour) + rng.normal(0, 5, (PX, PX, 3))
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        pictures.append(picture.resize((2 * PX, 2 * PX), Image.Resampling.NEAREST))
    return pictures


CONFIG = EvaluateConfig(
    batch_size=5, resolution=PX, diversity_prompts=2, diversity_seeds=3, kid_subset_size=6, seed=7
)


@pytest.fixture(scope="module")
def evaluated(heldout, aligner, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, evaluate(
        sampler, heldout, out, CONFIG, aligner=aligner, snapshots={"base": aligner}
    )


def test_a_good_sampler_scores_like_real_pictures(evaluated):
    _, results = evaluated
    metrics, real, chance = results["metrics"], *results["reference"].values()
    assert metrics["background_colour_accuracy"] == real["background_colour_accuracy"] == 1
    assert chance["background_colour_accuracy"] == pytest.approx(1 / 3)
    assert metrics["pixel_probe_median_rank"] == 1
    assert chance["pixel_probe_median_rank"] == 6.5
    assert metrics["aligner_recall_at_1"] > 3 * chance["aligner_recall_at_1"]
    assert metrics["aligner_similarity"] > chance["aligner_similarity"]
    assert 0 < metrics["lpips_diversity"] < 0.5
    assert metrics["z_sensitivity"] > 0
    assert metrics["seconds_per_image"] > 0


def test_all_metrics_are_finite_floats_and_none_is_missing_silently(evaluated):
    _, results = evaluated
    assert all(isinstance(v, float) and np.isfinite(v) for v in results["metrics"].values())
    assert not results["absent"]
    assert {"fid", "kid", "precision", "coverage"} <= results["metrics"].keys()
    assert {"fid", "kid"} <= results["reference"]["real"].keys()
    assert not [name for name in results["metrics"] if "clip" in name]


def test_the_result_file_says_how_the_numbers_came_about(evaluated, aligner):
    out, results = evaluated
    assert json.loads((out / "results.json").read_text()) == results
    rules = results["protocol"]
    assert rules["name"] == "embedded-heldout-32"
    assert (rules["num_generated"], rules["num_real"], rules["seed"]) == (12, 12, 7)
    assert rules["generated_size"] == [64, 64]
    assert rules["aligner"]["image_encoder"] == "embedded:efficientnet-lite0"
    assert rules["aligner"]["sha256"] == rules["snapshots_sha256"]["base"]
    assert "inception-2015-12-05" in rules["weights_sha256"]
    assert len(rules["captions_sha256"]) == 64


def test_pictures_and_captions_are_written_in_one_order(evaluated):
    out, _ = evaluated
    captions = (out / "captions.txt").read_text().splitlines()
    files = sorted((out / "images").iterdir())
    assert len(captions) == len(files) == 12
    expected = sampler(captions[5:10], CONFIG.seed * 1_000_003 + 5)[1]
    assert np.array_equal(np.asarray(Image.open(files[6])), np.asarray(expected))
    assert (out / "grid.png").is_file()
    assert (out / "latents.png").is_file()


def test_metrics_that_cannot_be_had_are_absent_with_a_reason(heldout, tmp_path):
    content = json.loads((heldout / "captions.json").read_text())
    del content["info"]
    (tmp_path / "captions.json").write_text(json.dumps(content))
    (tmp_path / "images").symlink_to(heldout / "images")
    config = CONFIG.model_copy(update={"num_images": 4, "diversity_prompts": 0})
    results = evaluate(sampler, tmp_path, tmp_path / "out", config)
    absent = results["absent"]
    assert absent.keys() == {
        "background_colour_accuracy",
        "aligner_similarity",
        "precision",
        "lpips_diversity",
    }
    assert not absent.keys() & results["metrics"].keys()
    assert results["protocol"]["name"] == "coco-captions-32"
    assert results["protocol"]["num_generated"] == 4
    assert results["protocol"]["num_real"] == 12
    assert "no aligner" in table(results)


def test_a_sampler_that_loses_pictures_is_an_error(heldout, tmp_path):
    with pytest.raises(ValueError, match="9 pictures for 12 captions"):
        evaluate(
            lambda captions, seed: sampler(captions[:4], seed)[: max(1, len(captions) - 1)],
            heldout,
            tmp_path,
            CONFIG,
        )


# ---- captions


def test_a_subset_is_drawn_from_the_seed_and_keeps_pairs(heldout):
    everything = read_heldout(heldout)
    part = subset(everything, 5, seed=1)
    assert part.captions == subset(everything, 5, seed=1).captions
    assert part.captions != subset(everything, 5, seed=2).captions
    for caption, picture, colour in zip(
        part.captions, part.pictures, part.backgrounds, strict=True
    ):
        at = everything.captions.index(caption)
        assert (picture, colour) == (everything.pictures[at], everything.backgrounds[at])
    assert part.all_pictures == everything.all_pictures


def test_the_layout_of_coco_is_read(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2014").mkdir()
    Image.new("RGB", (5, 3)).save(tmp_path / "val2014" / "a.png")
    content = {
        "images": [{"id": 9, "file_name": "a.png"}],
        "annotations": [
            {"id": 2, "image_id": 9, "caption": "second"},
            {"id": 1, "image_id": 9, "caption": " first \n line"},
        ],
    }
    file = tmp_path / "annotations" / "captions_val2014.json"
    file.write_text(json.dumps(content))
    read = read_heldout(file)
    assert read.captions == ["first line", "second"]
    assert read.all_pictures == [tmp_path / "val2014" / "a.png"]
    assert read.palette is None
    (tmp_path / "val2014" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        read_heldout(file)


# ---- features


def test_square_crops_the_centre_and_leaves_its_own_output_alone():
    wide = np.zeros((3, 9, 3), np.uint8)
    wide[:, 3:6] = 200
    assert (np.asarray(square(wide, 3)) == 200).all()
    once = square(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8), 12)
    assert np.array_equal(np.asarray(square(once, 12)), np.asarray(once))


def test_transparency_is_put_on_white():
    assert np.asarray(square(Image.new("RGBA", (2, 2), (9, 9, 9, 0)), 2)).min() == 255


def test_inception_features_are_the_same_from_files_arrays_and_cache(heldout, tmp_path):
    paths = read_heldout(heldout).pictures[:3]
    arrays = [np.asarray(Image.open(path)) for path in paths]
    from_files = inception_features(paths, batch_size=2, cache=tmp_path)
    np.testing.assert_allclose(inception_features(arrays), from_files, atol=1e-4)
    assert np.array_equal(inception_features(arrays, cache=tmp_path), from_files)
    assert len(list(tmp_path.iterdir())) == 1


def test_distinct_captions_are_encoded_once():
    class Counting:
        seen = 0

        def encode(self, captions):
            self.seen += len(captions)
            width = torch.tensor([[float(len(c))] for c in captions])
            return pretrained.TextFeatures(width, width, width)

    encoder = Counting()
    vectors = text_vectors(["bb", "a", "bb", "ccc"], encoder, batch_size=2)
    assert vectors.flatten().tolist() == [2, 1, 2, 3]
    assert encoder.seen == 3


# ---- report


def test_grid_has_room_for_every_picture_and_caption():
    picture = Image.new("RGB", (8, 8), "red")
    rows = [("short", [picture, picture]), ("a caption of many words " * 6, [picture, picture])]
    one, two = (caption_grid(rows, title="t", cell_px=40, columns=c) for c in (1, 2))
    assert one.height > two.height
    assert one.width < two.width
    red = (np.asarray(one) == (255, 0, 0)).all(axis=2).sum()
    assert red == 4 * 40 * 40


def test_json_is_replaced_whole_and_refuses_nan(tmp_path):
    write_json(tmp_path / "r.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "r.json", {"a": float("nan")})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}


def test_seeds_of_batches_and_variants_do_not_meet():
    starts = {protocol._seed(CONFIG, start) for start in range(0, 12, CONFIG.batch_size)}
    variants = {protocol._seed(CONFIG, 12 + number) for number in range(2)}
    assert not starts & variants
