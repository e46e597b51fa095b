"""The multi-scale input and output discriminator.

One trunk works on all pyramid levels: level i enters at its own resolution and is predicted on
after every later stage j, independently of the other levels. The text enters only the predictors,
so one trunk pass serves any number of captions.

Shape letters in this file:
    B batch, C maps, H W image, T text width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gigagan.config import DiscriminatorConfig
from gigagan.models.attention import AttentionBlock
from gigagan.models.encoders import TextFeatures
from gigagan.models.layers import (
    ACTIVATION_GAIN,
    AdaptiveConv,
    EqualConv2d,
    ResidualBlock,
    activate,
    downsample,
    rms_normalize,
)
from gigagan.models.text import TextBranch


class Features(NamedTuple):
    """Maps of one pyramid level after one stage."""

    level: int
    """Which level entered, 0 the largest."""
    stage: int
    """After which stage of the trunk."""
    maps_BCHW: Tensor


class Stage(nn.Module):
    """Attention and convolutions at one resolution, then half of it (or 4 px → 1)."""

    def __init__(self, config: DiscriminatorConfig, index: int) -> None:
        super().__init__()
        maps = config.channels[index]
        self.is_last = index == len(config.channels) - 1
        out_maps = maps if self.is_last else config.channels[index + 1]
        self.blocks = nn.ModuleList(
            ResidualBlock(maps, gain=config.residual_gain) for _ in range(config.blocks[index])
        )
        self.attention = nn.ModuleList(
            AttentionBlock(maps, config) for _ in range(config.attention[index])
        )
        self.minibatch_std = config.minibatch_std and self.is_last
        in_maps = maps + 1 if self.minibatch_std else maps
        # Low-pass, then a 3×3 convolution at half the side; the last one sees all 4×4 at once.
        self.out = (
            EqualConv2d(in_maps, out_maps, 4, padding=0, gain=ACTIVATION_GAIN)
            if self.is_last
            else EqualConv2d(in_maps, out_maps, 3, gain=ACTIVATION_GAIN)
        )

    def forward(self, x_BCHW: Tensor, num_groups: int, *, double_backward: bool) -> Tensor:
        """Maps at this resolution → maps at half of it, 1 px after the last stage."""
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        for attention in self.attention:
            x_BCHW = attention(x_BCHW, double_backward=double_backward)
        if self.minibatch_std:
            x_BCHW = append_minibatch_std(x_BCHW, num_groups=num_groups)
        if not self.is_last:
            x_BCHW = downsample(x_BCHW)
        return activate(self.out(x_BCHW))


def append_minibatch_std(x_BCHW: Tensor, *, num_groups: int) -> Tensor:
    """Append the mean standard deviation over each group of the batch as one more map.

    The batch is `num_groups` groups laid end to end; statistics never mix levels or sets.
    """
    _, C, H, W = x_BCHW.shape
    groups_GNCHW = x_BCHW.reshape(num_groups, -1, C, H, W)
    variance = groups_GNCHW.float().var(dim=1, correction=0)
    std_G = (variance + 1e-8).sqrt().mean(dim=(1, 2, 3)).to(x_BCHW.dtype)
    per_sample_B = std_G.repeat_interleave(groups_GNCHW.shape[1])
    return torch.cat([x_BCHW, per_sample_B[:, None, None, None].expand(-1, 1, H, W)], dim=1)


class Predictor(nn.Module):
    """ψ_j(φ, t_D) + Conv1×1(φ): modulated 1×1 convolutions and an unconditional logit."""

    def __init__(self, maps: int, *, text_width: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            AdaptiveConv(
                maps, maps, style_dim=text_width, num_kernels=1, size=1, gain=ACTIVATION_GAIN
            )
            for _ in range(num_layers)
        )
        self.to_logit = AdaptiveConv(
            maps, 1, style_dim=text_width, num_kernels=1, size=1, demodulate=False
        )
        self.unconditional = EqualConv2d(maps, 1, 1)

    def forward(self, maps_BCHW: Tensor, text_BT: Tensor) -> Tensor:
        """Maps and text → logits B H W."""
        x = maps_BCHW
        for layer in self.layers:
            x = activate(layer(x, text_BT))
        return (self.to_logit(x, text_BT) + self.unconditional(maps_BCHW)).squeeze(1)


class Discriminator(nn.Module):
    """D_ij(x, c) = ψ_j(φ_{i→j}(x_i), t_D) + Conv1×1(φ_{i→j}(x_i)) (GigaGAN, equation 6)."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.text = TextBranch(config.text)
        self.from_rgb = nn.ModuleList(
            EqualConv2d(3, config.channels[i], 1, gain=ACTIVATION_GAIN)
            for i in range(config.levels)
        )
        self.stages = nn.ModuleList(Stage(config, i) for i in range(len(config.channels)))
        self.predictors = nn.ModuleList(
            Predictor(
                config.channels[min(i + 1, len(config.channels) - 1)],
                text_width=config.text.width,
                num_layers=config.head_layers,
            )
            for i in range(len(config.channels))
        )

    def read(self, features: TextFeatures) -> Tensor:
        """Frozen features → t_D, B T."""
        text = self.text(features.tokens_BLD, features.mask_BL, features.pooled_BD)
        return rms_normalize(text.global_BT)

    def trunk(
        self, pyramid: list[Tensor], *, num_sets: int = 1, double_backward: bool = False
    ) -> list[Features]:
        """Pyramid, largest first (more levels than `config.levels` are ignored) → all φ_{i→j}.

        The batch may be `num_sets` sets laid end to end (real and generated): statistics over
        the batch are taken within each.
        """
        if len(pyramid) < self.config.levels:
            raise ValueError(f"{len(pyramid)} pyramid levels for {self.config.levels} entries")
        B = len(pyramid[0])
        found: list[Features] = []
        x: Tensor | None = None
        for index, stage in enumerate(self.stages):
            if index < self.config.levels:
                entering = activate(self.from_rgb[index](pyramid[index]))
                x = entering if x is None else torch.cat([x, entering])
            assert x is not None
            num_groups = num_sets * len(x) // B
            x = stage(x, num_groups, double_backward=double_backward)
            found += [Features(i, index, maps) for i, maps in enumerate(x.split(B))]
        return found

    def predict(self, features: list[Features], text_BT: Tensor) -> list[Tensor]:
        """φ_{i→j} and t_D → one map of logits B H W per pair (i, j), in the order of `features`.

        Levels that leave after the same stage share one pass of its predictor.
        """
        logits: list[Tensor] = []
        for index, predictor in enumerate(self.predictors):
            maps = [f.maps_BCHW for f in features if f.stage == index]
            together = predictor(torch.cat(maps), text_BT.repeat(len(maps), 1))
            logits += together.split(len(text_BT))
        return logits

    def forward(
        self, pyramid: list[Tensor], features: TextFeatures, *, double_backward: bool = False
    ) -> list[Tensor]:
        """Image pyramid and frozen text features → logits of every (i, j)."""
        maps = self.trunk(pyramid, double_backward=double_backward)
        return self.predict(maps, self.read(features))
