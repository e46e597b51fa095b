"""The text-conditioned upsampler: an asymmetric U-Net from a small image to a larger one.

Shape letters in this file:
    B batch, Z latent, S style, C maps, H W image; o s pixels of a line before and after.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn

from gigagan.config import UpsamplerConfig
from gigagan.models.generator import SynthesisLevel
from gigagan.models.layers import (
    ACTIVATION_GAIN,
    DownBlock,
    EqualConv2d,
    MappingNetwork,
    activate,
    upsample,
)
from gigagan.models.text import Features, Text, condition_branch

LANCZOS_RADIUS = 3
"""Zero crossings of Lanczos' kernel on each side, as in Pillow."""


def shrink(images_BCHW: Tensor, side: int) -> Tensor:
    """Square images in [−1, 1] → `side` px by Lanczos: what an upsampler is given to enlarge.

    Pillow's antialiased filter to rounding. Training pictures, held-out ones and those of users are
    made small by it; the soft halvings of the discriminator's pyramid are another kind of picture.
    """
    matrix_so = _lanczos(images_BCHW.shape[-1], side).to(images_BCHW)
    narrow_BCHs = (images_BCHW @ matrix_so.T).clamp(-1, 1)
    return (matrix_so @ narrow_BCHs).clamp(-1, 1)


@functools.cache
def _lanczos(larger: int, smaller: int) -> Tensor:
    """Weights [smaller, larger] of a line's pixels in those of the smaller line; rows sum to 1."""
    scale = larger / smaller
    centre_s1 = (torch.arange(smaller)[:, None] + 0.5) * scale
    x_so = (torch.arange(larger) + 0.5 - centre_s1) / scale
    weights_so = torch.sinc(x_so) * torch.sinc(x_so / LANCZOS_RADIUS)
    weights_so[x_so.abs() >= LANCZOS_RADIUS] = 0
    return weights_so / weights_so.sum(1, keepdim=True)


class Upsampler(nn.Module):
    """Low-resolution image, text and z → a pyramid from the input's resolution upwards.

    The way down is convolutional; the way up has the generator's levels (adaptive convolution,
    attention) and takes the way down's maps of equal resolution beside its own. The RGB skip sum
    starts from the input itself, so the network adds what bilinear enlargement lacks.
    """

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.text = condition_branch(config, attends=any(config.attention))
        self.mapping = MappingNetwork(config)
        down, up = config.down_channels, config.up_channels
        self.from_rgb = EqualConv2d(3, down[0], 3, gain=ACTIVATION_GAIN)
        self.down_blocks = nn.ModuleList(
            DownBlock(i, o, gain=config.residual_gain) for i, o in itertools.pairwise(down)
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
                # Images start at the input's resolution.
                rgb_gain=0.5 if i >= len(down) - 1 else None,
            )
            for i in range(len(up))
        )
        for level in self.levels[len(down) - 1 :]:
            # The first output is the enlarged input itself.
            assert isinstance(level, SynthesisLevel)
            assert level.to_rgb is not None
            nn.init.zeros_(level.to_rgb.bank)

    def read(self, features: Features) -> Text:
        """Frozen features (or None) → t_local and t_global."""
        text: Text = self.text(features)
        return text

    def style(self, z_BZ: Tensor, text: Text) -> Tensor:
        """w = M(z, t_global): B Z → B S."""
        style_BS: Tensor = self.mapping(z_BZ, text.global_BT)
        return style_BS

    def synthesize(
        self, small_BCHW: Tensor, noise_BCHW: Tensor, style_BS: Tensor, text: Text
    ) -> list[Tensor]:
        """Small image in [−1, 1], N(0, 1) noise of its shape, style, text → images, largest first.

        Style and text of one row serve any number of images: the tiles of one picture, say.

        The last of the list has the input's resolution. The layers see the image with noise
        augmentation; the RGB skip sum starts from it without.
        """
        noisy_BCHW = small_BCHW + self.config.noise_augmentation * noise_BCHW
        if max(self.config.kernels) == 1:
            # Ordinary convolutions alone, which read this layout faster; banks would undo it.
            noisy_BCHW = noisy_BCHW.contiguous(memory_format=torch.channels_last)
        skips = [activate(self.from_rgb(noisy_BCHW))]
        for block in self.down_blocks:
            skips.append(block(skips[-1]))
        depth = len(skips)
        images: list[Tensor] = []
        x = skips.pop()
        for i, level in enumerate(self.levels):
            if i > 0:
                x = upsample(x)
            if i < depth:
                x = self.merges[i](torch.cat([x, skips.pop()], dim=1) if i else x)
            assert isinstance(level, SynthesisLevel)
            x = level(x, style_BS, text)
            if level.to_rgb is not None:
                rgb = level.to_rgb(x, style_BS)
                images.append((upsample(images[-1]) if images else small_BCHW) + rgb)
        return images[::-1]

    def forward(
        self, small_BCHW: Tensor, noise_BCHW: Tensor, z_BZ: Tensor, features: Features
    ) -> list[Tensor]:
        """Small image, noise, latents, text features or None → the pyramid, largest first."""
        text = self.read(features)
        return self.synthesize(small_BCHW, noise_BCHW, self.style(z_BZ, text), text)
