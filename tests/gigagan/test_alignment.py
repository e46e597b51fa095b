import numpy as np
import pytest
import torch

from gigagan.evaluation.judges.alignment import (
    background_colour_accuracy,
    clip_score_per_picture,
    lpips_diversity,
    mean_similarity,
    pixel_probe_rank,
    recall_at,
    shape_rank,
    z_sensitivity,
)

PALETTE = {"red": [220, 40, 40], "sky": [150, 200, 250], "white": [255, 255, 255]}


def unit_vectors(n, d, seed=0):
    return torch.nn.functional.normalize(
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def test_recall_is_one_for_own_captions_and_chance_for_unrelated_ones():
    texts = unit_vectors(200, 50)
    assert recall_at(1, 3 * texts, texts) == 1
    unrelated = unit_vectors(200, 50, seed=1)
    assert recall_at(1, unrelated, texts) <= 0.03
    assert recall_at(100, unrelated, texts) == pytest.approx(0.5, abs=0.12)
    assert recall_at(200, unrelated, texts) == 1


def test_recall_looks_from_picture_to_caption():
    texts = torch.eye(3)
    images = torch.tensor([[1.0, 0, 0], [1, 0.5, 0], [0, 0.1, 1]])
    assert recall_at(1, images, texts) == pytest.approx(2 / 3)
    assert recall_at(2, images, texts) == 1


def test_equal_captions_share_their_ranks():
    images, texts = unit_vectors(5, 4), torch.ones(5, 4)
    assert recall_at(2, images, texts) == 0  # all at rank 3 of 5
    assert recall_at(3, images, texts) == 1


def test_mean_similarity_is_the_mean_cosine_whatever_the_length():
    images, texts = unit_vectors(4, 3), unit_vectors(4, 3, seed=1)
    expected = (images * texts).sum(dim=1).mean().item()
    assert mean_similarity(5 * images, texts) == pytest.approx(expected, abs=1e-6)


def test_probe_finds_the_same_layout_under_noise_and_is_at_chance_for_unrelated_ones():
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (50, 8, 8, 3)).repeat(4, axis=1).repeat(4, axis=2)
    noisy = (real + rng.normal(0, 30, real.shape)).clip(0, 255).astype(np.uint8)
    real = real.astype(np.uint8)
    rank, chance = pixel_probe_rank(noisy, real)
    assert (rank, chance) == (1, 25.5)
    unrelated = rng.integers(0, 256, real.shape).astype(np.uint8)
    assert pixel_probe_rank(unrelated, real).median_rank == pytest.approx(chance, abs=8)


def test_probe_puts_one_picture_for_all_prompts_at_chance():
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (9, 16, 16, 3)).astype(np.uint8)
    collapsed = np.repeat(real[:1], 9, axis=0)
    rank, chance = pixel_probe_rank(collapsed, real)
    assert rank == chance == 5


def framed(names, h=32, w=48):
    images = np.stack([np.full((h, w, 3), PALETTE[name], np.uint8) for name in names])
    images[:, 6:-6, 6:-6] = (0, 90, 0)  # an object in the middle says nothing of the background
    return images


def test_background_colour_is_read_from_the_border():
    names = ["red", "sky", "white", "sky"]
    images = framed(names)
    assert background_colour_accuracy(images, names, PALETTE) == 1
    assert background_colour_accuracy(images, ["red", "red", "white", "white"], PALETTE) == 0.5


def test_background_colour_survives_noise_and_an_object_that_touches_the_border():
    images = framed(["sky", "red"]).astype(int)
    images[:, :8, 10:20] = (0, 90, 0)
    images += np.random.default_rng(0).integers(-15, 16, images.shape)
    images = images.clip(0, 255).astype(np.uint8)
    assert background_colour_accuracy(images, ["sky", "red"], PALETTE) == 1


def test_a_colour_outside_the_palette_is_named():
    with pytest.raises(ValueError, match="mauve"):
        background_colour_accuracy(framed(["red"]), ["mauve"], PALETTE)


def test_z_sensitivity_is_the_standard_deviation_over_latents():
    images = np.zeros((2, 2, 3, 5, 3), np.uint8)
    assert z_sensitivity(images) == 0
    images[:, 1] = 255  # -1 and 1: a standard deviation of 1
    assert z_sensitivity(images) == pytest.approx(1)


class MeanGap(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, a, b):
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)


def test_diversity_compares_pictures_of_one_prompt_only():
    images = np.zeros((2, 3, 4, 4, 3), np.uint8)
    images[1] = 255  # prompts differ, their pictures do not
    assert lpips_diversity(images, MeanGap()) == 0
    images[1, 2] = 0  # two of three pairs differ by 2
    assert lpips_diversity(images, MeanGap()) == pytest.approx((0 + 4 / 3) / 2)


def test_a_clip_score_needs_a_clip():
    with pytest.raises(ValueError, match="not a CLIP"):
        clip_score_per_picture([], [], "embedded:minilm-l6")


def test_shape_rank_is_blind_to_backgrounds_and_sees_shapes():
    rng = np.random.default_rng(0)
    backgrounds = ["red", "blue"] * 20
    shapes = rng.integers(0, 80, (40, 16, 16, 1)).repeat(3, axis=3)
    colours = np.array([[150, 0, 0] if b == "red" else [0, 0, 150] for b in backgrounds])
    real = (shapes + colours[:, None, None]).astype(np.uint8)
    one_shape = (shapes[:1] + colours[:, None, None] + rng.integers(0, 3, shapes.shape)).astype(
        np.uint8
    )
    assert shape_rank(real, real, backgrounds) == 0
    assert 0.35 < shape_rank(one_shape, real, backgrounds) < 0.65
    assert pixel_probe_rank(one_shape, real).median_rank < 14  # colour alone: 20.5 → 10
    with pytest.raises(ValueError, match="no two pictures share"):
        shape_rank(real[:2], real[:2], ["red", "blue"])
