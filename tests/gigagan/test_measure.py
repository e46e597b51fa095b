import json
import shutil
import tarfile
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gigagan.config import EvaluateConfig
from gigagan.evaluation import enlarge, protocol
from gigagan.evaluation.heldout import read_drawn, read_heldout, subset, training_pictures
from gigagan.evaluation.judges.alignment import clip_score_per_picture
from gigagan.evaluation.judges.features import (
    extract,
    extractor,
    image_vectors,
    open_rgb,
    square,
    text_vectors,
)
from gigagan.evaluation.measure import evaluate, score
from gigagan.evaluation.protocol import ProtocolError, differing
from gigagan.evaluation.report.results import caption_grid, compare, table, write_json
from gigagan.evaluation.setting import seed_of
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


def sampler(captions, seed, truncation=1.0):
    """The right shape on the right background, with a latent that adds noise, at twice the size."""
    rng = np.random.default_rng(seed)
    pictures = []
    for caption in captions:
        _, shape, _, _, colour, _ = caption.split()
        noisy = draw(shape, colour) + rng.normal(0, 5 * truncation, (PX, PX, 3))
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        pictures.append(picture.resize((2 * PX, 2 * PX), Image.Resampling.NEAREST))
    return pictures


CONFIG = EvaluateConfig(
    batch_size=5,
    resolution=PX,
    diversity_prompts=2,
    diversity_seeds=3,
    kid_subset_size=6,
    seed=7,
    resamples=10,
    sweep=(0.5, 1.0),
    sweep_captions=6,
    speed_batches=(1, 2),
    neighbours=3,
)
QUICK = CONFIG.model_copy(
    update={"sweep": (), "speed_batches": (), "diversity_prompts": 0, "resamples": 0}
)


@pytest.fixture(scope="module")
def shards(heldout, tmp_path_factory):
    """The held-out pictures themselves, as if trained on, in two tars."""
    folder = tmp_path_factory.mktemp("shards")
    pictures = read_heldout(heldout).pictures
    for number in range(2):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for picture in pictures[number::2]:
                tar.add(picture, arcname=picture.name)
    return folder


@pytest.fixture(scope="module")
def evaluated(heldout, aligner, shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, evaluate(
        sampler,
        heldout,
        out,
        CONFIG,
        aligner=aligner,
        shards=shards,
        snapshots={"base": aligner},
        is_cut=lambda caption: "cross" in caption,
    )


@pytest.mark.usefixtures("quick_inception")
def test_two_devices_draw_at_a_time_what_one_draws(heldout, tmp_path):
    config = QUICK.model_copy(update={"batch_size": 3})  # four batches
    alone = evaluate(sampler, heldout, tmp_path / "one", config)
    together = threading.Barrier(2)

    def sample(captions, seed, truncation):
        together.wait(30)  # breaks unless another batch is under way
        return sampler(captions, seed, truncation)

    both = evaluate(sample, heldout, tmp_path / "two", config, devices=("cpu", "cpu"))
    assert both["protocol"] == alone["protocol"]
    for name in sorted(p.name for p in (tmp_path / "one" / "images").iterdir()):
        one, two = (tmp_path / which / "images" / name for which in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    for name in set(alone["metrics"]) - {"seconds_per_image"}:
        assert both["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-3, abs=1e-6)


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
    assert results["absent"].keys() == {"naming", "dissection"}  # a set without a gallery
    assert {"fid", "kid", "precision", "coverage"} <= results["metrics"].keys()
    assert {"fid", "kid"} <= results["reference"]["real"].keys()
    assert not [name for name in results["metrics"] if "clip" in name]


def test_the_result_file_says_how_the_numbers_came_about(evaluated, aligner):
    out, results = evaluated
    assert json.loads((out / "results.json").read_text()) == results
    rules = results["protocol"]
    assert rules["name"] == "embedded-heldout-32"
    assert rules["captions_cut"] == 3
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
    expected = sampler(captions[5:10], seed_of(CONFIG, 5))[1]
    assert np.array_equal(np.asarray(Image.open(files[6])), np.asarray(expected))
    assert (out / "grid.png").is_file()
    assert (out / "latents.png").is_file()


@pytest.mark.usefixtures("quick_inception")
def test_metrics_that_cannot_be_had_are_absent_with_a_reason(heldout, tmp_path):
    content = json.loads((heldout / "captions.json").read_text())
    del content["info"]
    (tmp_path / "captions.json").write_text(json.dumps(content))
    (tmp_path / "images").symlink_to(heldout / "images")
    config = QUICK.model_copy(update={"num_images": 4})
    results = evaluate(sampler, tmp_path, tmp_path / "out", config)
    absent = results["absent"]
    assert absent.keys() == {
        "naming",
        "dissection",
        "background_colour_accuracy",
        "aligner_similarity",
        "precision",
        "lpips_diversity",
        "truncation_curve",
        "speed",
        "memorisation",
    }
    assert not absent.keys() & results["metrics"].keys()
    assert results["protocol"]["name"] == "coco-captions-32"
    assert results["protocol"]["num_generated"] == 4
    assert results["protocol"]["num_real"] == 12
    assert "no aligner" in table(results)


def test_a_sampler_that_loses_pictures_is_an_error(heldout, tmp_path):
    with pytest.raises(ValueError, match="4 pictures came back for 5 captions"):
        evaluate(
            lambda captions, seed, psi: sampler(captions[:4], seed)[: max(1, len(captions) - 1)],
            heldout,
            tmp_path,
            CONFIG,
        )


# ---- what one looks at


def test_the_curve_the_speed_and_the_neighbours_are_of_this_sampler(evaluated):
    out, results = evaluated
    curve = {point["truncation"]: point for point in results["truncation_curve"]}
    assert curve.keys() == {0.5, 1.0}
    assert curve[0.5]["distance"] < curve[1.0]["distance"]  # less noise at smaller truncation
    assert [speed["batch_size"] for speed in results["speed"]] == [1, 2]
    memory = results["memorisation"]
    assert memory["sample_median"] < memory["real_median"] == pytest.approx(1, abs=1e-5)
    page = (out / "report.html").read_text()
    assert "embedded-heldout-32" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert not (out / "features").exists()


def test_a_curve_that_belongs_to_the_rules_is_of_fid_and_at_their_truncations(
    heldout, aligner, tmp_path, monkeypatch
):
    curve = protocol.Curve((0.2, 0.6), num_captions=4)
    ours = replace(protocol.PROTOCOLS["embedded-heldout"], curve=curve)
    monkeypatch.setitem(protocol.PROTOCOLS, "embedded-heldout", ours)
    drawn = {}

    def sample(captions, seed, psi):
        drawn[psi] = drawn.get(psi, 0) + len(captions)
        return sampler(captions, seed, psi)

    config = QUICK.model_copy(update={"sweep": (0.9,)})
    results = evaluate(sample, heldout, tmp_path, config, aligner=aligner)
    assert [point["truncation"] for point in results["truncation_curve"]] == [0.2, 0.6]
    assert (drawn[0.2], drawn[0.6], 0.9 in drawn) == (4, 4, False)
    assert results["truncation_metric"] == "fid"
    assert "FID (lower is better)" in (tmp_path / "report.html").read_text()
    for name in ("stylegan-t-coco-256", "stylegan-t-coco-64"):
        assert protocol.PROTOCOLS[name].curve.truncations[-1] == 1


def test_intervals_hold_the_values_that_they_are_of(evaluated):
    _, results = evaluated
    assert {"kid", "aligner_similarity", "aligner_recall_at_1"} <= results["intervals"].keys()
    for name in ("aligner_similarity", "aligner_recall_at_1"):
        low, high = results["intervals"][name]
        assert low <= results["metrics"][name] <= high


# ---- protocols


def test_fewer_captions_than_the_protocol_asks_for_are_refused_before_drawing(heldout, tmp_path):
    config = QUICK.model_copy(update={"protocol": "gigagan-coco2014-256", "resolution": None})
    with pytest.raises(ProtocolError, match=r"asks for 30,000 generated .* there are 12"):
        evaluate(lambda *_: pytest.fail("drawn"), heldout, tmp_path / "out", config)
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_fixed_protocol_refuses_other_settings(heldout, tmp_path):
    for change in ({"resolution": 128}, {"resolution": None, "num_images": 100}):
        config = QUICK.model_copy(update={"protocol": "stylegan-t-coco-256"} | change)
        with pytest.raises(ProtocolError, match=r"stylegan-t-coco-256 says"):
            evaluate(sampler, heldout, tmp_path, config)


def test_an_upsamplers_protocol_is_not_measured_on_captions(heldout, tmp_path):
    config = QUICK.model_copy(update={"protocol": "imagenet-64-256", "resolution": None})
    with pytest.raises(ProtocolError, match="upsample"):
        evaluate(sampler, heldout, tmp_path, config)


@pytest.mark.usefixtures("quick_inception")
def test_an_unreadable_reference_is_an_error_and_leaves_no_result(heldout, tmp_path):
    broken = tmp_path / "set"
    shutil.copytree(heldout, broken)
    (broken / "images" / "3.png").write_bytes(b"not a picture")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"3\.png"):
        evaluate(sampler, broken, out, QUICK)
    assert not (out / "results.json").exists()


def test_the_authors_layout_is_scored_as_it_is(evaluated, heldout, aligner, tmp_path):
    out, drawn_by_us = evaluated
    theirs = tmp_path / "theirs"
    (theirs / "fake_images").mkdir(parents=True)
    for number, picture in enumerate(sorted((out / "images").iterdir())):
        shutil.copy(picture, theirs / "fake_images" / f"{number}.png")  # 10 follows 9, not 1
    shutil.copy(out / "captions.txt", theirs)
    settings = {"aligner": aligner, "statistics": out / "statistics"}
    results = score(theirs, heldout, tmp_path / "scored", CONFIG, **settings)
    for name in ("fid", "kid", "aligner_similarity", "background_colour_accuracy", "precision"):
        assert results["metrics"][name] == pytest.approx(drawn_by_us["metrics"][name]), name
    assert results["protocol"]["truncation"] is None
    assert "sampler" in results["absent"]["seconds_per_image"]
    assert "truncation_curve" in results["absent"]
    assert differing(results["protocol"], drawn_by_us["protocol"]) is None
    assert "theirs" in compare([drawn_by_us, results], ["ours", "theirs"], differing)


def test_a_folder_with_other_counts_of_captions_and_pictures_is_refused(tmp_path):
    (tmp_path / "fake_images").mkdir()
    with pytest.raises(FileNotFoundError, match=r"captions\.txt"):
        read_drawn(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "fake_images" / "0.png")
    (tmp_path / "captions.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"1 pictures in .* 2 lines"):
        read_drawn(tmp_path)


def test_results_of_different_protocols_are_not_put_into_one_table(evaluated):
    _, results = evaluated
    other = {**results, "protocol": {**results["protocol"], "resize": "something else"}}
    with pytest.raises(ValueError, match="resize"):
        compare([results, other], ["a", "b"], differing)


@pytest.mark.usefixtures("quick_inception")
def test_an_upsampler_is_held_against_the_pictures_it_was_given_small(
    heldout, tmp_path, monkeypatch
):
    small = replace(
        protocol.PROTOCOLS["upsampler-128-1024"],
        num_generated=12,
        num_real=12,
        resolution=PX,
        input_resolution=PX // 4,
        patch=16,
    )
    monkeypatch.setitem(protocol.PROTOCOLS, small.name, small)
    config = QUICK.model_copy(update={"protocol": small.name, "resolution": None})

    def bicubic(images, captions, seed):
        assert {image.size for image in images} == {(PX // 4, PX // 4)}
        return [image.resize((PX, PX), Image.Resampling.BICUBIC) for image in images]

    results = enlarge.evaluate(bicubic, heldout, tmp_path / "out", config)
    metrics = results["metrics"]
    assert {"fid", "kid", "patch_fid", "lpips", "psnr", "ssim"} <= metrics.keys()
    for name in ("lpips", "psnr", "ssim"):
        assert metrics[name] == pytest.approx(metrics[f"bicubic_{name}"]), name
    assert results["protocol"]["input_resolution"] == PX // 4


def test_training_pictures_are_spread_over_the_tars(shards):
    assert len(training_pictures(shards, 100)) == 12
    assert [key for key, _ in training_pictures(shards, 4)] == ["0", "6", "1", "7"]
    assert training_pictures(shards / "nowhere", 4) == []


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


@pytest.mark.usefixtures("quick_inception")
def test_features_are_the_same_from_files_and_arrays(heldout, tmp_path):
    paths = read_heldout(heldout).pictures[:3]
    arrays = [np.asarray(Image.open(path)) for path in paths]
    judge = extractor("inception-2015-12-05/clean")
    found = [
        extract(kind, [judge], transform=open_rgb, folder=tmp_path / str(number), batch_size=2)
        for number, kind in enumerate((paths, arrays))
    ]
    assert np.array_equal(found[0][judge.name], found[1][judge.name])
    assert len(list(tmp_path.rglob("*.*"))) == 2


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


def test_grids_show_captions_of_every_script():
    rows = [[(caption, [Image.new("RGB", (8, 8))])] for caption in ("猫", "犬")]
    one, other = (np.asarray(caption_grid(row, title="t")) for row in rows)
    assert not np.array_equal(one, other)


def test_json_is_replaced_whole_and_refuses_nan(tmp_path):
    write_json(tmp_path / "r.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "r.json", {"a": float("nan")})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}


def test_seeds_of_batches_and_variants_do_not_meet():
    starts = {seed_of(CONFIG, start) for start in range(0, 12, CONFIG.batch_size)}
    variants = {seed_of(CONFIG, 12 + number) for number in range(2)}
    assert not starts & variants


# ---- CLIP

NARROW_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32, "patch_size": 8, "layers": 4, "width": 64, "head_width": 32,
    },
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 4,
    },
}  # fmt: skip


@pytest.mark.usefixtures("quick_inception")
def test_a_clip_judges_by_its_own_name_with_scores_and_recall(heldout, tmp_path, monkeypatch):
    import open_clip
    from safetensors.torch import save_file

    file = tmp_path / "narrow-ViT.json"
    file.write_text(json.dumps(NARROW_CLIP))
    open_clip.add_model_config(file)
    torch.manual_seed(0)
    model = open_clip.create_model("narrow-ViT").eval()
    save_file(model.state_dict(), tmp_path / "narrow-ViT-measured.safetensors")
    monkeypatch.setenv(pretrained.WEIGHTS_VARIABLE, str(tmp_path))
    clip = "open_clip:narrow-ViT/measured"
    config = QUICK.model_copy(update={"clip": clip, "cmmd": clip})
    results = evaluate(sampler, heldout, tmp_path / "out", config)
    name = "narrow-ViT_measured"
    metrics = results["metrics"]
    assert {f"clip_score_{name}", f"cmmd_{name}", f"clip_{name}_recall_at_1"} <= metrics.keys()
    images = sorted((tmp_path / "out" / "images").iterdir())
    captions = (tmp_path / "out" / "captions.txt").read_text().splitlines()
    expected = clip_score_per_picture(images, captions, clip).mean()
    assert metrics[f"clip_score_{name}"] == pytest.approx(expected)
    assert results["protocol"]["clip"] == {"model": clip, "prefix": "A photo depicts "}
    assert clip in results["protocol"]["weights_sha256"]
    assert results["categories"]  # agreement by kind of caption, by CLIP without an aligner

    # Of captions of which two are none of the set, real pictures are judged with the others.
    shutil.move(tmp_path / "out" / "images", tmp_path / "out" / "fake_images")
    (tmp_path / "out" / "captions.txt").write_text("\n".join([*captions[:-2], "one", "two"]))
    part = score(tmp_path / "out", heldout, tmp_path / "part", config)
    real = read_heldout(heldout).pictures[:-2]
    expected = clip_score_per_picture(real, captions[:-2], clip).mean()
    assert part["reference"]["real"][f"clip_score_{name}"] == pytest.approx(expected, abs=1e-5)
    assert part["reference"]["real"].keys() == results["reference"]["real"].keys()
    assert part["protocol"]["num_with_real"] == 10
    assert not [kind for kind in part["categories"] if kind["name"] == "background: None"]
