"""The base generator: latent z and text → a pyramid of images.

Shape letters in this file:
    B batch, Z latent, S style, C maps, H W image, L D P features of the frozen text encoder.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gigagan.config import GeneratorConfig, StyleConfig
from gigagan.models.attention import AttentionBlock
from gigagan.models.encoders import TextFeatures
from gigagan.models.layers import (
    AdaptiveBlock,
    AdaptiveConv,
    EqualLinear,
    MappingNetwork,
    activate,
    upsample,
)
from gigagan.models.text import Text, TextBranch


class SynthesisLevel(nn.Module):
    """All layers at one resolution: convolutions, then attention; and the RGB it contributes."""

    def __init__(
        self,
        config: StyleConfig,
        in_maps: int,
        out_maps: int,
        *,
        num_blocks: int,
        num_attention: int,
        num_kernels: int,
        rgb_gain: float,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            AdaptiveBlock(
                in_maps if i == 0 else out_maps,
                out_maps,
                style_dim=config.style_dim,
                num_kernels=num_kernels,
                gain=config.residual_gain,
            )
            for i in range(num_blocks)
        )
        self.attention = nn.ModuleList(
            AttentionBlock(
                out_maps,
                config,
                style_dim=config.style_dim,
                text_width=config.text.width,
            )
            for _ in range(num_attention)
        )
        self.to_rgb = AdaptiveConv(
            out_maps,
            3,
            style_dim=config.style_dim,
            num_kernels=1,
            size=1,
            demodulate=False,
            gain=rgb_gain,
        )

    def forward(self, x_BCHW: Tensor, style_BS: Tensor, text: Text) -> tuple[Tensor, Tensor]:
        """Maps at this resolution → new maps, RGB."""
        for block in self.blocks:
            x_BCHW = block(x_BCHW, style_BS)
        for attention in self.attention:
            x_BCHW = attention(x_BCHW, style_BS, text.local_BLT, text.mask_BL)
        return x_BCHW, self.to_rgb(x_BCHW, style_BS)


class Generator(nn.Module):
    """G: x = G̃(M(z, t_global), t_local) (GigaGAN, section 3.2)."""

    style_mean: Tensor
    """w̄ over latents and captions, for truncation; set when a snapshot is taken."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.text = TextBranch(config.text)
        self.mapping = MappingNetwork(config)
        self.register_buffer("style_mean", torch.zeros(config.style_dim))
        self.constant = nn.Parameter(torch.randn(config.channels[0], 4, 4))
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
            )
            for i in range(len(config.channels))
        )

    def read(self, features: TextFeatures) -> Text:
        """Frozen features → t_local and t_global."""
        return self.text(features.tokens_BLD, features.mask_BL, features.pooled_BD)

    def style(self, z_BZ: Tensor, text: Text) -> Tensor:
        """w = M(z, t_global): B Z → B S."""
        return self.mapping(z_BZ, text.global_BT)

    def synthesize(self, style_BS: Tensor, text: Text) -> list[Tensor]:
        """Style and text → images in [−1, 1] (roughly), largest first, down to 4 px."""
        B = len(style_BS)
        x = self.constant.expand(B, -1, -1, -1)
        if self.style_input is not None:
            x = activate(x + self.style_input(style_BS).reshape(x.shape))
        images: list[Tensor] = []
        for level in self.levels:
            if images:
                x = upsample(x)
            x, rgb = level(x, style_BS, text)
            images.append(upsample(images[-1]) + rgb if images else rgb)
        return images[::-1]

    def forward(self, z_BZ: Tensor, features: TextFeatures) -> list[Tensor]:
        """Latents and frozen text features → the image pyramid, largest first."""
        text = self.read(features)
        return self.synthesize(self.style(z_BZ, text), text)
