from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image

import gigagan
from gigagan.inference.sampler import Sampler, _from_picture, _randomness
from gigagan.inference.tiles import (
    enlarge,
    keep_low_frequencies,
    reach,
    reflect,
    starts,
    usual_overlap,
    weights,
)
from gigagan.models.generator import Generator
from gigagan.models.upsampler import Upsampler

from . import small

TILE, FACTOR = 8, 2


def uneven(tiles_BCHW, noise_BCHW):
    """Enlarges, and is off towards the middle of a tile by what its own pixels hold: seams show."""
    large = F.interpolate(tiles_BCHW, scale_factor=FACTOR, mode="bilinear")
    return large + 0.2 * (20 * tiles_BCHW.mean(dim=(2, 3), keepdim=True)).tanh()


def gradient():
    y, x = torch.meshgrid(
        torch.linspace(-0.7, 0.7, 32), torch.linspace(-0.7, 0.7, 40), indexing="ij"
    )
    return torch.stack([x, y, -x])


def texture():
    random = torch.Generator().manual_seed(0)
    return F.avg_pool2d(torch.randn(3, 34, 42, generator=random), 3, stride=1) * 0.5


def seam(picture, begins):
    """How much larger steps at tiles' borders are than elsewhere, as a ratio of medians."""
    step = np.abs(np.diff(picture.numpy().astype(float), axis=2)).mean(axis=(0, 1))
    at = [b * FACTOR - 1 for b in begins if b]
    return np.median(step[at]) / np.median(np.delete(step, at))


@pytest.mark.parametrize("picture", [gradient(), texture()], ids=["gradient", "texture"])
def test_tiles_leave_no_seams_where_naive_ones_do(picture):
    noise = torch.zeros_like(picture)
    width = picture.shape[2]
    blended = enlarge(picture, noise, uneven, tile=TILE, factor=FACTOR, overlap=4)
    naive = enlarge(picture, noise, uneven, tile=TILE, factor=FACTOR, overlap=0)
    assert seam(blended, starts(width, TILE, 4)) < 1.2
    assert seam(naive, starts(width, TILE, 0)) > 1.5


@pytest.mark.parametrize(("length", "overlap"), [(8, 4), (9, 4), (37, 0), (37, 3), (37, 7), (3, 2)])
def test_shares_of_tiles_sum_to_one_over_every_pixel(length, overlap):
    begins = starts(length, TILE, overlap)
    length = max(length, TILE)
    total = np.zeros(length)
    for begin, share in zip(begins, weights(begins, TILE, length), strict=True):
        total[begin : begin + TILE] += share
    np.testing.assert_allclose(total, 1)
    assert all(b - a <= TILE - overlap for a, b in pairwise(begins))
    assert begins[-1] == length - TILE


def test_a_network_that_only_enlarges_gives_the_enlarged_picture_whatever_the_tiles():
    def nearest(tiles_BCHW, noise_BCHW):
        return F.interpolate(tiles_BCHW, scale_factor=FACTOR)

    for height, width in ((29, 37), (8, 8), (1, 1), (3, 20)):
        picture = torch.rand(3, height, width) * 2 - 1
        large = enlarge(picture, picture * 0, nearest, tile=TILE, factor=FACTOR, overlap=3)
        expected = ((picture + 1) * 127.5).round().byte()
        expected = expected.repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert large.shape == expected.shape
        assert (large.int() - expected.int()).abs().max() <= 1


def test_only_a_batch_of_tiles_is_in_flight_and_progress_counts_them():
    seen, told = [], []

    def network(tiles_BCHW, noise_BCHW):
        seen.append(len(tiles_BCHW))
        return uneven(tiles_BCHW, noise_BCHW)

    enlarge(
        gradient(), gradient(), network, tile=TILE, factor=FACTOR, overlap=4, batch_size=3,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert max(seen) == 3
    assert told[-1][0] == told[-1][1] == sum(seen) == len(starts(32, 8, 4)) * len(starts(40, 8, 4))


def test_a_wrong_overlap_is_refused():
    with pytest.raises(ValueError, match="overlap=8"):
        starts(20, TILE, 8)


# ---- through the sampler


@pytest.fixture(scope="module")
def sampler():
    torch.manual_seed(0)
    upsampler = Upsampler(small.UPSAMPLER).eval()
    for level in upsampler.levels:
        if level.to_rgb is not None:
            torch.nn.init.normal_(level.to_rgb.bank, std=0.3)
    return Sampler(Generator(small.GENERATOR).eval(), upsampler)


def picture(width, height, seed=0):
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


def levels(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (8, 8), (9, 8), (21, 30)])
def test_any_size_becomes_twice_that_size(sampler, size):
    assert sampler.upscale([picture(*size)], ["x"])[0].size == (size[0] * 2, size[1] * 2)


def test_a_picture_is_enlarged_the_same_beside_others(sampler):
    own, large = picture(8, 8), picture(12, 9, seed=1)
    (alone,) = sampler.upscale([own], ["x"], seed=4)
    beside = sampler.upscale([own, large], ["x", "y"], seed=4)[0]
    assert levels(alone, beside) <= 1


def test_what_the_network_alone_makes_is_given_of_its_own_size_only(sampler):
    own = picture(8, 8)
    (raw,) = sampler.upscale([own], ["x"], seed=4, faithful=False)
    upsampler = sampler.upsampler
    z_1Z, noise_CHW = _randomness(5, (3, 8, 8), 4, 0)
    small_1CHW = _from_picture(own)[None]
    with torch.no_grad():
        made = upsampler(small_1CHW, noise_CHW[None], z_1Z, sampler.encoder.encode(["x"]))[0]
    expected = ((made[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0)
    assert levels(raw, expected) <= 1
    assert levels(raw, sampler.upscale([own], ["x"], seed=4)[0]) > 1
    with pytest.raises(ValueError, match="9×8 px, but faithful=False takes those of 8×8"):
        sampler.upscale([own, picture(9, 8)], ["x", "x"], faithful=False)


def test_tiles_in_other_batches_give_the_same_picture(sampler):
    image = picture(21, 30)
    (one,) = sampler.upscale([image], ["a cat"], seed=1, batch_size=1)
    (other,) = sampler.upscale([image], ["a cat"], seed=1, batch_size=7)
    assert levels(one, other) <= 1
    assert levels(one, sampler.upscale([image], ["a cat"], seed=2)[0]) > 1


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (8, 8), (21, 30), (90, 85)])
def test_an_enlarged_picture_made_small_again_is_the_picture(sampler, size):
    random = np.random.default_rng(1)
    soft = Image.fromarray(random.integers(90, 166, (size[1], size[0], 3), np.uint8))
    (large,) = sampler.upscale([soft], ["x"], seed=1)
    assert levels(large.resize(size, Image.Resampling.LANCZOS), soft) <= 1


@pytest.mark.parametrize("level", [0, 60, 128, 255])
def test_grey_stays_that_grey_everywhere(level):
    grey = Image.new("RGB", (41, 33), (level,) * 3)
    (large,) = gigagan.load().upscale([grey], ["a wall"])
    assert levels(large, np.full((132, 164, 3), level)) <= 1


@pytest.mark.parametrize("size", [(64, 44), (32, 32)])
def test_a_photograph_keeps_its_colours_and_gains_by_its_details(size):
    photograph = load_sample_image("flower.jpg")  # 640 × 427
    real = Image.fromarray(photograph).resize((size[0] * 4, size[1] * 4), Image.Resampling.LANCZOS)
    small = real.resize(size, Image.Resampling.LANCZOS)
    (large,) = gigagan.load().upscale([small], ["a flower"])
    again = np.asarray(large.resize(size, Image.Resampling.LANCZOS)).astype(int)
    lost = np.abs(again - np.asarray(small))
    assert np.percentile(lost, 99) <= 1  # petals end at 255: what lies beyond is clamped
    bicubic = small.resize(real.size, Image.Resampling.BICUBIC)
    assert psnr(large, real) > psnr(bicubic, real) + 0.5


def test_a_corrected_picture_keeps_what_a_small_one_cannot_hold():
    random = torch.Generator().manual_seed(0)
    small_CHW = torch.rand(3, 90, 7, generator=random) - 0.5
    checks = torch.ones(28).cumprod(0).neg_()
    checks[::2] = 1
    large_CHW = ((checks * 0.2 + 1) * 127.5).round().byte().expand(3, 360, 28).clone()
    kept_CHW = keep_low_frequencies(large_CHW, small_CHW).float() / 127.5 - 1
    stripes = (kept_CHW * checks)[:, 8:-8, 8:-8].mean()
    torch.testing.assert_close(stripes, torch.tensor(0.2), atol=0.01, rtol=0)


def test_the_reach_of_a_rim_is_that_of_the_layers():
    def network(tiles_BCHW, noise_BCHW):
        seen = F.conv2d(tiles_BCHW, torch.ones(3, 3, 5, 5), padding=2)
        return F.interpolate(seen, scale_factor=FACTOR)

    def attention(tiles_BCHW, noise_BCHW):
        return F.interpolate(tiles_BCHW + tiles_BCHW.mean(), scale_factor=FACTOR)

    assert reach(network, 32, FACTOR) == 3  # the first column and the two that see it
    assert reach(attention, 32, FACTOR) == 8


def test_a_picture_is_continued_by_its_mirror_image_however_small_it_is():
    line = torch.tensor([1.0, 2, 3]).expand(3, 1, 3)
    assert reflect(line, 4, 0)[0, 5].tolist() == [3, 3, 2, 1, 1, 2, 3, 3, 2, 1, 1]
    assert reflect(line, 0, 7).shape == (3, 7, 7)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.square(np.asarray(a).astype(float) - np.asarray(b)).mean())


def test_an_absurd_size_is_refused_before_it_is_drawn(sampler):
    class Huge:
        width = height = 20_000
        size = (20_000, 20_000)

    with pytest.raises(ValueError, match="20000×20000 px would become 1,600 megapixels"):
        sampler.upscale([Huge()], ["x"])


def test_the_packages_upsampler_leaves_no_seams_on_a_gradient():
    y, x = np.mgrid[:64, :96]
    image = Image.fromarray(np.stack([x * 2, y * 3, 128 + 0 * x], -1).astype(np.uint8))
    (large,) = gigagan.load().upscale([image], ["flat emoji of a sun on a white background"])
    columns = np.abs(np.diff(np.asarray(large).astype(float), axis=1)).mean(axis=(0, 2))
    begins = [b * 4 - 1 for b in starts(96, 32, 8) if b]
    assert columns[begins].max() < 2 * np.median(columns)


def grid(large, small, stride):
    """Peak to peak, in levels, of what repeats from tile to tile in `large` minus bicubic."""
    bicubic = small.resize(large.size, Image.Resampling.BICUBIC)
    rest = np.asarray(large).astype(float) - np.asarray(bicubic)
    profile = rest[100:-100, 100:-100].mean(axis=0)
    window = np.ones(stride) / stride
    smooth = np.stack([np.convolve(part, window, "same") for part in profile.T], axis=1)
    inner = (profile - smooth)[stride:-stride]
    folded = inner[: len(inner) // stride * stride].reshape(-1, stride, 3).mean(axis=0)
    coarse = folded.reshape(-1, 4, 3).mean(axis=1)  # a period of one small pixel is no seam
    return np.ptp(coarse, axis=0).max()


def test_a_trained_network_shows_no_grid_and_would_where_tiles_only_touch(monkeypatch):
    sampler = gigagan.load()
    tile = sampler.upsampler.config.input_resolution
    monkeypatch.setattr("gigagan.inference.tiles.reach", lambda *_: 0)  # for a known period

    def measured(overlap):
        stride = tile - overlap
        side = overlap + 200 // stride * stride
        y, x = np.mgrid[:side, :side] / (side - 1)
        small = Image.fromarray((np.stack([x, y, 0.4 * (x + y)], axis=2) * 255).astype(np.uint8))
        (large,) = sampler.upscale([small], ["a bell"], seed=1, overlap=overlap)
        return grid(large, small, stride * 4)

    corrected = measured(0), measured(usual_overlap(tile))
    monkeypatch.setattr("gigagan.inference.tiles.keep_low_frequencies", lambda large, small: large)
    assert corrected[0] < 1.25
    assert corrected[1] < 0.5
    assert measured(usual_overlap(tile)) < 1.25
    assert measured(0) > 2
