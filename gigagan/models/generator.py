"""The base generator: latent z and text (or a class, or nothing) → a pyramid of images.

Shape letters in this file:
    B batch, Z latent, S style, C maps, H W image.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gigagan.config import GeneratorConfig, StyleConfig
from gigagan.models.attention import AttentionBlock
from gigagan.models.layers import (
    AdaptiveBlock,
    AdaptiveConv,
    EqualLinear,
    MappingNetwork,
    activate,
    upsample,
)
from gigagan.models.text import Features, Text, condition_branch

MEAN_LATENTS = 64
"""Latents over which the mean style of a caption is taken."""


class SynthesisLevel(nn.Module):
    """All layers at one resolution: convolutions, then attention; and `to_rgb`, for its image."""

    def __init__(
        self,
        config: StyleConfig,
        in_maps: int,
        out_maps: int,
        *,
        num_blocks: int,
        num_attention: int,
        num_kernels: int,
        rgb_gain: float | None,
        is_first: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            AdaptiveBlock(
                in_maps if i == 0 else out_maps,
                out_maps,
                style_dim=config.style_dim,
                num_kernels=num_kernels,
                gain=config.residual_gain,
                is_first=is_first and i == 0,
            )
            for i in range(num_blocks)
        )
        self.attention = nn.ModuleList(
            AttentionBlock(
                out_maps,
                config,
                style_dim=config.style_dim,
                text_width=config.text_width,
            )
            for _ in range(num_attention)
        )
        self.to_rgb: AdaptiveConv | None = None
        if rgb_gain is not None:
            self.to_rgb = AdaptiveConv(
                out_maps,
                3,
                style_dim=config.style_dim,
                num_kernels=1,
                size=1,
                demodulate=False,
                gain=rgb_gain,
            )

    def forward(self, x_BCHW: Tensor, style_BS: Tensor, text: Text) -> Tensor:
        """Maps at this resolution → new maps."""
        for block in self.blocks:
            x_BCHW = block(x_BCHW, style_BS)
        for attention in self.attention:
            x_BCHW = attention(x_BCHW, style_BS, text.local_BLT, text.mask_BL)
        return x_BCHW


class Late(NamedTuple):
    """Another style and text for the fine levels: style swapping and prompt mixing."""

    style_BS: Tensor
    text: Text
    level: int
    """The first level that takes this style and text; 0 is the coarsest."""


class Generator(nn.Module):
    """G: x = G̃(M(z, t_global), t_local) (GigaGAN, section 3.2)."""

    style_mean: Tensor
    """w̄ over latents and captions, for truncation; set when a snapshot is taken."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.text = condition_branch(config, attends=any(config.attention))
        self.mapping = MappingNetwork(config)
        self.register_buffer("style_mean", torch.zeros(config.style_dim))
        constant = torch.randn(config.channels[0], 4, 4)
        self.constant = nn.Parameter(constant) if config.constant_input else None
        self.style_input = (
            EqualLinear(config.style_dim, config.channels[0] * 16) if config.style_input else None
        )
        self.levels = nn.ModuleList(
            SynthesisLevel(
                config,
                config.channels[max(i - 1, 0)],
                config.channels[i],
                num_blocks=config.blocks[i],
                num_attention=config.attention[i],
                num_kernels=config.kernels[i],
                # The levels' sum has about the contrast of real images at the start.
                rgb_gain=0.5 / math.sqrt(len(config.channels)),
                is_first=i == 0,
            )
            for i in range(len(config.channels))
        )

    def read(self, features: Features) -> Text:
        """Frozen features (or class numbers B, or None) → t_local and t_global."""
        text: Text = self.text(features)
        return text

    def style(self, z_BZ: Tensor, text: Text) -> Tensor:
        """w = M(z, t_global): B Z → B S."""
        style_BS: Tensor = self.mapping(z_BZ, text.global_BT)
        return style_BS

    def truncate(self, style_BS: Tensor, text: Text, psi: float) -> Tensor:
        """w' = lerp(w̄, lerp(w̄|c, w, ψ), ψ): towards the caption's mean, then the global one.

        GigaGAN, section 3.6. The caption's mean is over the same latents each time.
        """
        random = torch.Generator().manual_seed(0)
        z_NZ = torch.randn(MEAN_LATENTS, self.config.latent_dim, generator=random)
        z_NZ = z_NZ.to(style_BS.device)
        of_caption = []
        for row in range(len(style_BS)):
            own = Text(global_BT=None if text.global_BT is None else text.global_BT[row : row + 1])
            of_caption.append(self.style(z_NZ, own.repeat_interleave(MEAN_LATENTS)).mean(0))
        towards_caption_BS = torch.stack(of_caption).lerp(style_BS, psi)
        return self.style_mean.expand_as(style_BS).lerp(towards_caption_BS, psi)

    def synthesize(
        self, style_BS: Tensor, text: Text, late: Late | None = None, *, side: int | None = None
    ) -> list[Tensor]:
        """Style and text → images in [−1, 1] (roughly), largest first, down to 4 px.

        With `side` no larger ones than of that side are drawn.
        """
        B = len(style_BS)  # text may be of one caption for all
        if late is not None and late.level == 0:  # the 4×4 input is of the first level
            style_BS, text = late.style_BS, late.text
        x = self._input(style_BS, B)
        images: list[Tensor] = []
        for number, level in enumerate(self.levels):
            if side is not None and 4 << number > side:
                break
            if late is not None and number >= late.level:
                style_BS, text = late.style_BS, late.text
            if images:
                x = upsample(x)
            assert isinstance(level, SynthesisLevel)
            assert level.to_rgb is not None
            x = level(x, style_BS, text)
            rgb = level.to_rgb(x, style_BS)
            images.append(upsample(images[-1]) + rgb if images else rgb)
        return images[::-1]

    def _input(self, style_BS: Tensor, B: int) -> Tensor:
        """4×4 maps: a constant, something of w, or their sum."""
        if self.style_input is None:
            assert self.constant is not None
            x_BCHW = self.constant.expand(B, -1, -1, -1)
        else:
            shift_BCHW = self.style_input(style_BS).unflatten(1, (-1, 4, 4)).expand(B, -1, -1, -1)
            x_BCHW = activate(shift_BCHW if self.constant is None else self.constant + shift_BCHW)
        if max(self.config.kernels) == 1:
            # Ordinary convolutions alone, which read this layout faster; banks would undo it.
            x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        return x_BCHW

    def forward(self, z_BZ: Tensor, features: Features) -> list[Tensor]:
        """Latents and what the network is conditioned on → the image pyramid, largest first."""
        text = self.read(features)
        return self.synthesize(self.style(z_BZ, text), text)
