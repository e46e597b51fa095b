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
from gigagan.models.layers import (
    ACTIVATION_GAIN,
    AdaptiveConv,
    DownBlock,
    EqualConv2d,
    Halving,
    ResidualBlock,
    activate,
    downsample,
    full_precision,
    halve_by_mean,
)
from gigagan.models.text import Features, Text, condition_branch

STD_GROUP = 4
"""Samples that share a minibatch standard deviation."""


class LevelMaps(NamedTuple):
    """Maps of one pyramid level after one stage."""

    level: int
    """The pyramid level of the image that the maps are of; 0 is the largest."""
    stage: int
    """Number of the trunk's stage that they left."""
    maps_BCHW: Tensor


class Stage(nn.Module):
    """Convolutions and attention at one resolution, then half of it (or 4 px → 1).

    Of n blocks the last is the one that halves; at 4 px a convolution over all of them is.
    """

    def __init__(self, config: DiscriminatorConfig, index: int) -> None:
        super().__init__()
        maps, gain = config.channels[index], config.residual_gain
        is_last = index == len(config.channels) - 1
        halve = {"low-pass": downsample, "mean": halve_by_mean}[config.halving]
        self.blocks = nn.ModuleList(
            ResidualBlock(maps, gain=gain) for _ in range(max(config.blocks[index] - 1, 0))
        )
        self.attention = nn.ModuleList(
            AttentionBlock(maps, config) for _ in range(config.attention[index])
        )
        self.minibatch_std = config.minibatch_std and is_last
        self.out: nn.Module
        if is_last:
            self.out = Reduce(maps + 1 if self.minibatch_std else maps, maps)
        elif config.blocks[index]:
            self.out = DownBlock(maps, config.channels[index + 1], gain=gain, halve=halve)
        else:
            self.out = DownConv(maps, config.channels[index + 1], halve=halve)

    def forward(self, x_BCHW: Tensor, num_groups: int, *, double_backward: bool) -> Tensor:
        """Maps at this resolution → maps at half of it, 1 px after the last stage."""
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        for attention in self.attention:
            x_BCHW = attention(x_BCHW, double_backward=double_backward)
        if self.minibatch_std:
            x_BCHW = append_minibatch_std(x_BCHW, num_groups=num_groups)
        reduced: Tensor = self.out(x_BCHW)
        return reduced


class DownConv(nn.Module):
    """One 3×3 convolution at half the side: the cheapest way down."""

    def __init__(self, in_maps: int, out_maps: int, *, halve: Halving = downsample) -> None:
        super().__init__()
        self.halve = halve
        self.conv = EqualConv2d(in_maps, out_maps, 3, gain=ACTIVATION_GAIN)

    def forward(self, x_BIHW: Tensor) -> Tensor:
        """B I H W → B O H/2 W/2."""
        return activate(self.conv(self.halve(x_BIHW)))


class Reduce(nn.Module):
    """One convolution that sees all of 4×4 px."""

    def __init__(self, in_maps: int, out_maps: int) -> None:
        super().__init__()
        self.conv = EqualConv2d(in_maps, out_maps, 4, padding=0, gain=ACTIVATION_GAIN)

    def forward(self, x_BIHW: Tensor) -> Tensor:
        """B I 4 4 → B O 1 1."""
        return activate(self.conv(x_BIHW))


def append_minibatch_std(x_BCHW: Tensor, *, num_groups: int) -> Tensor:
    """Append the mean standard deviation over each group of samples as one more map.

    The batch is `num_groups` sets of images laid end to end, which are never mixed; within each,
    every four samples are a group (StyleGAN2), so that ranks with a multiple of four samples see
    what one process would see. A set that does not divide by four is one group.
    """
    B, C, H, W = x_BCHW.shape
    samples_per_set = B // num_groups
    size = STD_GROUP if samples_per_set % STD_GROUP == 0 else samples_per_set
    groups_GNCHW = x_BCHW.reshape(-1, size, C, H, W)
    variance = full_precision(groups_GNCHW).var(dim=1, correction=0)
    std_G = (variance + 1e-8).sqrt().mean(dim=(1, 2, 3)).to(x_BCHW.dtype)
    per_sample_B = std_G.repeat_interleave(groups_GNCHW.shape[1])
    return torch.cat([x_BCHW, per_sample_B[:, None, None, None].expand(-1, 1, H, W)], dim=1)


class Predictor(nn.Module):
    """ψ_j(φ, t_D) + Conv1×1(φ): modulated 1×1 convolutions and an unconditional logit.

    In an unconditional network (`condition_width` 0) there is no ψ_j.
    """

    def __init__(
        self, maps: int, *, condition_width: int, num_layers: int, caption_std: float = 1.0
    ) -> None:
        super().__init__()
        self.unconditional = EqualConv2d(maps, 1, 1)
        self.layers = nn.ModuleList()
        self.to_logit: AdaptiveConv | None = None
        if condition_width:
            self.layers.extend(
                AdaptiveConv(
                    maps,
                    maps,
                    style_dim=condition_width,
                    num_kernels=1,
                    size=1,
                    gain=ACTIVATION_GAIN,
                )
                for _ in range(num_layers)
            )
            self.to_logit = AdaptiveConv(
                maps, 1, style_dim=condition_width, num_kernels=1, size=1, demodulate=False
            )
            for layer in (*self.layers, self.to_logit):
                layer.to_scale.weight.data *= caption_std

    def forward(self, maps_BCHW: Tensor, text_BT: Tensor | None) -> Tensor:
        """Maps and text → logits B H W."""
        logits: Tensor = self.unconditional(maps_BCHW)
        if self.to_logit is not None:
            x = maps_BCHW
            for layer in self.layers:
                x = activate(layer(x, text_BT))
            logits = logits + self.to_logit(x, text_BT)
        return logits.squeeze(1)


class Discriminator(nn.Module):
    """D_ij(x, c) = ψ_j(φ_{i→j}(x_i), t_D) + Conv1×1(φ_{i→j}(x_i)) (GigaGAN, equation 6)."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.options: nn.Module | None = None  # what options of training learn beside it
        self.text = condition_branch(config, attends=False)
        self.from_rgb = nn.ModuleList(
            EqualConv2d(3, config.channels[i], 1, gain=ACTIVATION_GAIN)
            for i in range(config.levels)
        )
        self.stages = nn.ModuleList(Stage(config, i) for i in range(len(config.channels)))
        # A dictionary: without `every_stage` only the last stage has one.
        self.predictors = nn.ModuleDict(
            {
                str(j): Predictor(
                    config.channels[min(j + 1, len(config.channels) - 1)],
                    condition_width=config.condition_width,
                    num_layers=config.head_layers,
                    caption_std=config.caption_std,
                )
                for j in sorted({j for _, j in config.pairs})
            }
        )

    def read(self, features: Features) -> Tensor | None:
        """Frozen features (or class numbers B) → t_D, B T; None if unconditional."""
        text: Text = self.text(features)
        return text.global_BT

    def trunk(
        self, pyramid: list[Tensor], *, num_sets: int = 1, double_backward: bool = False
    ) -> list[LevelMaps]:
        """Pyramid, largest first (more levels than `config.levels` are ignored) → all φ_{i→j}.

        The batch may be `num_sets` sets laid end to end (real and generated): statistics over
        the batch are taken within each.
        """
        if len(pyramid) < self.config.levels:
            raise ValueError(f"{len(pyramid)} pyramid levels for {self.config.levels} entries")
        B = len(pyramid[0])
        found: list[LevelMaps] = []
        x: Tensor | None = None
        for index, stage in enumerate(self.stages):
            if index < self.config.levels:
                # Nearly all work is in ordinary convolutions, which read this layout faster.
                image = pyramid[index].contiguous(memory_format=torch.channels_last)
                entering = activate(self.from_rgb[index](image))
                x = entering if x is None else torch.cat([x, entering])
            assert x is not None
            num_groups = num_sets * len(x) // B
            x = stage(x, num_groups, double_backward=double_backward)
            if str(index) in self.predictors:
                found += [LevelMaps(i, index, maps) for i, maps in enumerate(x.split(B))]
        return found

    def predict(self, features: list[LevelMaps], text_BT: Tensor | None) -> list[Tensor]:
        """φ_{i→j} and t_D → one map of logits B H W per pair (i, j), in the order of `features`.

        Levels that leave after the same stage share one pass of its predictor.
        """
        logits: list[Tensor] = []
        for index, predictor in self.predictors.items():
            maps = [f.maps_BCHW for f in features if f.stage == int(index)]
            text = None if text_BT is None else text_BT.repeat(len(maps), 1)
            logits += predictor(torch.cat(maps), text).split(len(maps[0]))
        return logits

    def forward(
        self, pyramid: list[Tensor], features: Features, *, double_backward: bool = False
    ) -> list[Tensor]:
        """Image pyramid and what D is conditioned on → logits of every (i, j)."""
        maps = self.trunk(pyramid, double_backward=double_backward)
        return self.predict(maps, self.read(features))
