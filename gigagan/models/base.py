"""The base generators: networks that draw from a latent and a caption alone, of either recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from gigagan.config.networks import GeneratorConfig
from gigagan.config.stylegan_t import StyleTConfig
from gigagan.models import pretrained
from gigagan.models.encoders import TextEncoder
from gigagan.models.generator import Generator
from gigagan.models.stylegan_t import StyleGANT
from gigagan.models.text import Features
from gigagan.models.upsampler import Upsampler

BaseGenerator = Generator | StyleGANT


def text_encoder_of(
    network: BaseGenerator | Upsampler, device: torch.device | str = "cpu"
) -> TextEncoder:
    """The text encoder that a network was trained with: its own as it has learned, or the frozen.

    Raises:
        ValueError: the network is without text.
    """
    if isinstance(network, StyleGANT) and network.tower is not None:
        return network.tower.encoder()
    if network.config.text is None:
        raise ValueError("a network without text has no prompts to draw")
    return pretrained.text_encoder(network.config.text.encoder, device)


def features_of(
    generator: nn.Module, captions: Sequence[str], frozen: Callable[[Sequence[str]], Features]
) -> Features:
    """What a generator is given of captions: its own encoder's features, else the frozen one's."""
    tower = generator.tower if isinstance(generator, StyleGANT) else None
    return frozen(captions) if tower is None else tower(captions)


def base_generator(config: GeneratorConfig | StyleTConfig) -> BaseGenerator:
    """A new network of this section, with weights from torch's own random state."""
    return StyleGANT(config) if isinstance(config, StyleTConfig) else Generator(config)
