"""Before the first step nothing vanishes and nothing explodes, at any depth."""

import functools

import pytest

from gigagan.config import DiscriminatorConfig, GeneratorConfig
from gigagan.config.presets import LADDER, ladder, preset
from studies.initial import measure, pink_images
from tests.gigagan.narrow import width_scaled


def small():
    config = preset("small_32")
    return config.generator, config.discriminator


def twin_of_the_paper():
    return (
        width_scaled(GeneratorConfig.paper_64(), 16),
        width_scaled(DiscriminatorConfig.paper_64(), 16),
    )


def first_and_last_rung():
    g, d = ladder(next(iter(LADDER))), ladder("scale-up")
    return g.generator, d.discriminator


@functools.cache  # each is looked at twice
def measured(networks):
    return measure(*networks(), batch=8, seed=0)


@pytest.mark.parametrize("networks", [small, twin_of_the_paper, first_and_last_rung])
def test_activations_and_logits_are_of_order_one_through_depth(networks):
    found = measured(networks)
    for spread in found.generator + found.discriminator:
        if spread.name.endswith("to_rgb"):
            continue  # a share of the image, which is looked at below
        # T's residual sums grow with its depth; what leaves it is normalised.
        upper = 4 if spread.name.startswith("text") else 2
        assert 0.15 < spread.activation < upper, spread
    assert 0.2 < found.image < 1
    assert all(0.1 < std < 2.5 for std in found.logits)


@pytest.mark.parametrize("networks", [small, twin_of_the_paper])
def test_gradients_reach_every_block_with_like_norms(networks):
    found = measured(networks)
    for spreads in (found.generator, found.discriminator):
        # The mapping network's learning rate, and so its gradient, is scaled down on purpose.
        norms = [s.gradient for s in spreads if s.name != "mapping"]
        assert min(norms) > 0
        assert max(norms) / min(norms) < 100


def test_pink_images_are_smooth_pictures_of_half_the_range():
    images = pink_images(3, 32)
    assert images.shape == (3, 3, 32, 32)
    assert 0.3 < images.std() < 0.6
    neighbours = (images[..., 1:] - images[..., :-1]).std() / images.std()
    assert neighbours < 0.9  # of white noise it is √2
