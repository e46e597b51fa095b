"""The text-conditioned upsampler: an asymmetric U-Net from a small image to a larger one.

Shape letters in this file:
    B batch, Z latent, S style, C maps, H W image.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from gigagan.config import UpsamplerConfig
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import SynthesisLevel
from gigagan.models.layers import (
    ACTIVATION_GAIN,
    EqualConv2d,
    MappingNetwork,
    ResidualBlock,
    activate,
    downsample,
    upsample,
)
from gigagan.models.text import Text, TextBranch


class Upsampler(nn.Module):
    """Low-resolution image, text and z → a pyramid from the input's resolution upwards.

    The way down is convolutional; the way up has the generator's levels (adaptive convolution,
    attention) and takes the way down's maps of equal resolution beside its own. The RGB skip sum
    starts from the input itself, so the network adds what bilinear enlargement lacks.
    """

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.text = TextBranch(config.text)
        self.mapping = MappingNetwork(config)
        down, up = config.down_channels, config.up_channels
        self.from_rgb = EqualConv2d(3, down[0], 3, gain=ACTIVATION_GAIN)
        self.down_blocks = nn.ModuleList(
            ResidualBlock(maps, gain=config.residual_gain) for maps in down
        )
        self.down_convs = nn.ModuleList(
            EqualConv2d(i, o, 1, gain=ACTIVATION_GAIN) for i, o in itertools.pairwise(down)
        )
        self.merges = nn.ModuleList(
            EqualConv2d((up[i - 1] if i else 0) + down[-1 - i], up[i], 1) for i in range(len(down))
        )
        self.levels = nn.ModuleList(
            SynthesisLevel(
                config,
                up[i] if i < len(down) else up[i - 1],
                up[i],
                num_blocks=config.blocks[i],
                num_attention=config.attention[i],
                num_kernels=config.kernels[i],
                rgb_gain=0.5,
            )
            for i in range(len(up))
        )
        for level in self.levels:
            # The first output is the enlarged input itself.
            assert isinstance(level, SynthesisLevel)
            nn.init.zeros_(level.to_rgb.bank)

    def read(self, features: TextFeatures) -> Text:
        """Frozen features → t_local and t_global."""
        return self.text(features.tokens_BLD, features.mask_BL, features.pooled_BD)

    def style(self, z_BZ: Tensor, text: Text) -> Tensor:
        """w = M(z, t_global): B Z → B S."""
        return self.mapping(z_BZ, text.global_BT)

    def synthesize(
        self, small_BCHW: Tensor, noise_BCHW: Tensor, style_BS: Tensor, text: Text
    ) -> list[Tensor]:
        """Small image in [−1, 1], N(0, 1) noise of its shape, style, text → images, largest first.

        The last of the list has the input's resolution. The layers see the image with noise
        augmentation; the RGB skip sum starts from it without.
        """
        noisy_BCHW = small_BCHW + self.config.noise_augmentation * noise_BCHW
        x = activate(self.from_rgb(noisy_BCHW))
        skips: list[Tensor] = []
        for i, block in enumerate(self.down_blocks):
            x = block(x)
            skips.append(x)
            if i < len(self.down_convs):
                x = activate(self.down_convs[i](downsample(x)))
        depth = len(skips)
        images: list[Tensor] = []
        x = skips.pop()
        for i, level in enumerate(self.levels):
            if i > 0:
                x = upsample(x)
            if i < depth:
                x = self.merges[i](torch.cat([x, skips.pop()], dim=1) if i else x)
            x, rgb = level(x, style_BS, text)
            if i >= depth - 1:
                images.append((upsample(images[-1]) if images else small_BCHW) + rgb)
        return images[::-1]

    def forward(
        self, small_BCHW: Tensor, noise_BCHW: Tensor, z_BZ: Tensor, features: TextFeatures
    ) -> list[Tensor]:
        """Small image, noise, latents, frozen text features → the pyramid, largest first."""
        text = self.read(features)
        return self.synthesize(small_BCHW, noise_BCHW, self.style(z_BZ, text), text)
