"""The base generators: networks that draw from a latent and a caption alone, of either recipe."""

from __future__ import annotations

from gigagan.config.networks import GeneratorConfig
from gigagan.config.stylegan_t import StyleTConfig
from gigagan.models.generator import Generator
from gigagan.models.stylegan_t import StyleGANT

BaseGenerator = Generator | StyleGANT


def base_generator(config: GeneratorConfig | StyleTConfig) -> BaseGenerator:
    """A new network of this section, with weights from torch's own random state."""
    return StyleGANT(config) if isinstance(config, StyleTConfig) else Generator(config)
