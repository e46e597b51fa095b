"""The upsampler's inputs, its probe, and what it is held against."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gigagan.evaluation import enlarge
from gigagan.evaluation.heldout import read_heldout
from gigagan.models.encoders import TextFeatures
from gigagan.models.upsampler import Upsampler, shrink
from gigagan.training.probes import UpsamplerProbe
from tests.gigagan.small import UPSAMPLER

BILINEAR, LANCZOS = Image.Resampling.BILINEAR, Image.Resampling.LANCZOS
SMALL, LARGE = 8, 16


def pictures(count, side, seed=0):
    """Discs of random colours on random backgrounds: uint8 N H W C with edges."""
    rng = np.random.default_rng(seed)
    across = np.arange(side) - side / 2
    made = []
    for _ in range(count):
        radius, (inside, outside) = rng.uniform(0.2, 0.45) * side, rng.integers(0, 256, (2, 3))
        is_inside = (across**2 + (across**2)[:, None] < radius**2)[..., None]
        made.append(np.where(is_inside, inside, outside).astype(np.uint8))
    return np.stack(made)


class Words:
    """Features of captions, by their lengths."""

    def __init__(self):
        self.asked = []

    device = torch.device("cpu")

    def __call__(self, captions):
        self.asked += captions
        tokens = torch.stack([torch.full((3, 384), float(len(c))) for c in captions])
        return TextFeatures(tokens, torch.ones(len(captions), 3, dtype=torch.bool), tokens[:, 0])


class Distance(nn.Module):
    """Stands for LPIPS: the mean absolute difference."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x, y):
        return (x - y).abs().mean((1, 2, 3), keepdim=True)


# ---- its input


@pytest.mark.parametrize(("larger", "smaller"), [(128, 32), (60, 20), (50, 32)])
def test_pictures_are_made_small_as_pillow_does(larger, smaller):
    large = pictures(3, larger)
    images = torch.from_numpy(large).permute(0, 3, 1, 2) / 127.5 - 1
    small = (shrink(images, smaller) + 1) * 127.5
    pillow = [np.asarray(Image.fromarray(x).resize((smaller,) * 2, LANCZOS)) for x in large]
    gap = small.permute(0, 2, 3, 1).numpy() - np.stack(pillow)
    assert np.abs(gap).max() <= 1.6  # Pillow rounds twice


def test_rows_and_columns_are_made_small_alike():
    x = 0.1 * torch.randn(2, 3, 24, 24)
    assert torch.allclose(shrink(x, 8).mT, shrink(x.mT, 8), atol=1e-5)
    even = torch.full((1, 3, 12, 12), 0.5)
    assert torch.allclose(shrink(even, 4), even[..., :4, :4], atol=1e-5)


# ---- the network


def test_gradients_reach_every_parameter_of_an_upsampler_once_it_draws():
    network = Upsampler(UPSAMPLER)
    for level in network.levels:
        if level.to_rgb is not None:
            nn.init.normal_(level.to_rgb.bank)  # from zero the first step reaches nothing else
    small = torch.randn(2, 3, SMALL, SMALL)
    images = network(small, torch.randn_like(small), torch.randn(2, 5), Words()(["one", "three"]))
    sum(image.square().mean() for image in images).backward()
    assert not [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]


def test_banks_of_one_are_computed_with_channels_last_and_others_are_not():
    def layout(kernels):
        network = Upsampler(UPSAMPLER.model_copy(update={"kernels": kernels}))
        seen = []
        network.levels[0].register_forward_hook(lambda module, args, out: seen.append(out))
        small = torch.randn(2, 3, SMALL, SMALL)
        network(small, torch.randn_like(small), torch.randn(2, 5), Words()(["one", "two"]))
        return seen[0].is_contiguous(memory_format=torch.channels_last)

    assert layout((1, 1))
    assert not layout((1, 2))


# ---- what it is held against


def test_plain_enlargements_are_pillows():
    small = [Image.fromarray(x) for x in pictures(2, SMALL)]
    made = enlarge.plainly(small, LARGE, "bilinear")
    assert made.shape == (2, LARGE, LARGE, 3)
    assert np.array_equal(made[1], np.asarray(small[1].resize((LARGE, LARGE), BILINEAR)))


def heldout_folder(folder, real, splits):
    """Pictures as a held-out folder: captions.json has all, gallery.json their splits."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i, (picture, split) in enumerate(zip(real, splits, strict=True), start=1):
        Image.fromarray(picture).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png"})
        annotations.append(
            {"id": i, "image_id": i, "caption": f"flat emoji of a {'x' * i} on white",
             "concept": "x" * i, "style": "flat", "background": "white", "split": split}
        )  # fmt: skip
    for name in ("captions", "gallery"):
        content = {"info": {}, "images": images, "annotations": annotations}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return read_heldout(folder)


def probe(heldout, fallback=None, perceptual=None):
    return UpsamplerProbe(
        Words(),
        heldout,
        perceptual,
        resolution=LARGE,
        input_resolution=SMALL,
        fallback=fallback or (pictures(3, LARGE), ["a", "b", "c"]),
    )


def test_an_untrained_upsampler_is_measured_like_bilinear_enlargement(tmp_path):
    heldout = heldout_folder(tmp_path, pictures(5, LARGE), ["combination"] * 5)
    found = probe(heldout, perceptual=Distance()).look(Upsampler(UPSAMPLER).eval()).scalars
    methods = ["", *(f"_{name}" for name in enlarge.PLAIN)]
    assert sorted(found) == sorted(f"probe/{m}{p}" for m in ("psnr", "lpips") for p in methods)
    assert found["probe/psnr"] == pytest.approx(found["probe/psnr_bilinear"], abs=0.1)
    assert found["probe/lpips"] == pytest.approx(found["probe/lpips_bilinear"], rel=0.02)
    assert found["probe/psnr_lanczos"] > found["probe/psnr_bilinear"]


def test_concepts_that_were_never_trained_are_measured_apart(tmp_path):
    easy, hard = np.full((2, LARGE, LARGE, 3), 90, np.uint8), pictures(2, LARGE)
    splits = ["combination", "combination", "unseen", "unseen"]
    heldout = heldout_folder(tmp_path, np.concatenate([easy, hard]), splits)
    made = probe(heldout)
    assert made.sets["_unseen"].captions == heldout.captions[2:]
    assert np.array_equal(made.sets["_unseen"].real_NHWC, hard)
    found = made.look(Upsampler(UPSAMPLER).eval()).scalars
    only_unseen = probe(None, fallback=(hard, heldout.captions[2:]))
    assert found["probe/psnr_unseen_bicubic"] == only_unseen._plain["probe/psnr_bicubic"]
    assert found["probe/psnr_bicubic"] > found["probe/psnr_unseen_bicubic"]


def test_the_probes_picture_shows_plain_ours_and_original(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "gigagan.training.probes.caption_grid",
        lambda rows, **kwargs: shown.extend(rows) or Image.new("RGB", (2, 2)),
    )
    real = pictures(3, LARGE)
    made = probe(None, fallback=(real, ["a", "b", "c"]))
    made.look(Upsampler(UPSAMPLER).eval())
    caption, (plain, _, original) = shown[1]
    assert caption == "b"
    assert np.array_equal(np.asarray(original), real[1])
    small = Image.fromarray(real[1]).resize((SMALL, SMALL), LANCZOS)
    assert plain.tobytes() == small.resize((LARGE, LARGE), Image.Resampling.BICUBIC).tobytes()


def test_plain_enlargements_are_measured_once():
    judge = Distance()
    made, network = probe(None, perceptual=judge), Upsampler(UPSAMPLER).eval()
    calls = []
    judge.register_forward_hook(lambda *args: calls.append(1))
    first = made.look(network).scalars
    assert len(calls) == 1 + len(enlarge.PLAIN)
    assert made.look(network).scalars == first
    assert len(calls) == 2 + len(enlarge.PLAIN)
