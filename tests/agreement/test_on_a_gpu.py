"""What can be known of a GPU without one: tensors that only say where they are and how large.

Such tensors refuse to be read (so that a step that would wait for the device fails), and refuse to
meet tensors of another device. Backward passes cannot run on them; on fake CPU tensors they can.
"""

import contextlib
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from gigagan.config import AugmentConfig, LossConfig, TrainBaseConfig, TrainUpsamplerConfig
from gigagan.config.presets import preset
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.layers import pyramid
from gigagan.models.upsampler import Upsampler
from gigagan.training import step
from gigagan.training.augment import Augment, Draws
from gigagan.training.inputs import Inputs
from gigagan.training.phases import Phase

B, TOKENS = 4, 20
EVERYTHING = TrainBaseConfig(
    loss=LossConfig(generator_matching=1.0, matching_images="both"),
    augment=AugmentConfig(diffaugment=("color", "translation", "cutout"), blur_sigma=2.0),
)
CONFIGS = {
    "small_32": TrainBaseConfig(),
    "everything": EVERYTHING,
    "upsampler": TrainUpsamplerConfig(),
    "paper_64": preset("paper_64"),
    "paper_64_to_512": preset("paper_64_to_512"),
}


def players_and_inputs(config):
    """On the current default device, but for what the host decides by."""
    is_base = isinstance(config, TrainBaseConfig)
    g = Generator(config.generator) if is_base else Upsampler(config.upsampler)
    d = Discriminator(config.discriminator)
    side, read = config.discriminator.resolution, g.config.text

    def text():
        return TextFeatures(
            torch.randn(B, TOKENS, read.encoder_width),
            torch.ones(B, TOKENS, dtype=torch.bool),
            torch.randn(B, read.pooled_width),
        )

    given = ()
    if not is_base:
        shape = (B, 3, g.config.input_resolution, g.config.input_resolution)
        given = (torch.randn(shape), torch.randn(shape))
    drawn = Draws(torch.rand(B) < 0.5, *torch.rand(3, B), *torch.rand(2, B, 2))
    is_augmented = bool(config.augment.diffaugment)
    inputs = Inputs(
        real=pyramid(torch.randn(B, 3, side, side), max(config.discriminator.levels, 3)),
        captions=[""] * B,
        text=text(),
        z_BZ=torch.randn(B, g.config.latent_dim),
        given=given,
        other_text=text(),
        has_other_B=(True, False, True, True),
        draws=(drawn if is_augmented else None,) * 3,
    )
    pairs = d.config.pairs
    weights = [1 / len(pairs)] * len(pairs)
    return step.Players(g, d, weights, None, None, Augment(config.augment)), inputs


def whole_step(config, players, inputs):
    """D's part, R1, and G's with the regression of a warm start beside it."""
    levels = len(inputs.real)
    fakes = step.synthesize(players.generator, inputs)
    settings = {"auxiliary_strength": 0.0}
    step.discriminator_loss(players, config, inputs, fakes, **settings).loss.backward()
    step.r1_loss(players, inputs).loss.backward()
    phase = Phase(adversarial=0.5, regression=1.0)
    fakes = step.synthesize(players.generator, inputs)[:levels]
    loss = step.generator_loss(players, config, inputs, fakes, phase=phase, **settings).loss
    loss.backward()


def no_gradients(outputs, inputs, **settings):
    """R1's inner gradients: of the inputs' shapes and places."""
    return [torch.empty_like(x) for x in inputs]


@contextlib.contextmanager
def pinned_as_it_is():
    """Fake tensors of the host cannot be pinned."""
    with mock.patch.object(torch.Tensor, "pin_memory", lambda x: x):
        yield


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_of_a_step_is_on_the_device_and_none_is_read(name):
    config = CONFIGS[name]
    with FakeTensorMode(), pinned_as_it_is():
        with torch.device("cuda"):
            players, inputs = players_and_inputs(config)
        assert inputs.real[0].device.type == "cuda"
        with (
            mock.patch.object(torch.Tensor, "backward", return_value=None),
            mock.patch.object(torch.autograd, "grad", no_gradients),
        ):
            whole_step(config, players, inputs)


@pytest.mark.parametrize("name", ["everything", "upsampler"])  # the default's terms among them
def test_backward_passes_read_nothing_either(name):
    config = CONFIGS[name]
    with FakeTensorMode():
        players, inputs = players_and_inputs(config)
        whole_step(config, players, inputs)
        networks = players.generator, players.discriminator
        found = [p.grad is not None for n in networks for p in n.parameters()]
    assert all(found)


def test_such_a_test_can_fail():
    with FakeTensorMode():
        x = torch.randn(4)
        with pytest.raises(DynamicOutputShapeException):
            x[x > 0]
        with pytest.raises(DataDependentOutputException):
            bool((x > 0).any())
        with pytest.raises(RuntimeError, match="device"):
            torch.ones(3, device="cuda") + torch.ones(3, device="cpu")
