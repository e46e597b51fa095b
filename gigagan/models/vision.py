"""The vision-aided discriminator: heads on the features of a frozen image encoder.

The encoder itself is passed features, never held here: it stays out of every state dict.

Shape letters in this file:
    B batch, C maps, H W image, T text width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigagan.models.layers import (
    ACTIVATION_GAIN,
    AdaptiveConv,
    EqualConv2d,
    activate,
    rms_normalize,
)


class VisionHead(nn.Module):
    """A fixed random projection, a 3×3 convolution and a logit modulated by text or class.

    With `text_width` 0 nothing modulates it.
    """

    projection: Tensor

    def __init__(self, in_maps: int, maps: int, *, text_width: int) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(maps, in_maps, 1, 1) / math.sqrt(in_maps))
        self.conv = EqualConv2d(maps, maps, 3, gain=ACTIVATION_GAIN)
        self.to_logit: AdaptiveConv | EqualConv2d
        if text_width:
            self.to_logit = AdaptiveConv(
                maps, 1, style_dim=text_width, num_kernels=1, size=1, demodulate=False
            )
        else:
            self.to_logit = EqualConv2d(maps, 1, 1)

    def forward(self, stage_BCHW: Tensor, text_BT: Tensor | None) -> Tensor:
        """Maps of one stage of the encoder and text → logits B H W."""
        x = F.conv2d(rms_normalize(stage_BCHW, dim=1), self.projection.to(stage_BCHW.dtype))
        given = () if text_BT is None else (text_BT,)
        logits_B1HW: Tensor = self.to_logit(activate(self.conv(x)), *given)
        return logits_B1HW.squeeze(1)


class VisionAidedDiscriminator(nn.Module):
    """One head per stage of the encoder (GigaGAN, section 3.4; Kumari et al. 2022)."""

    def __init__(self, stage_channels: Sequence[int], *, text_width: int, maps: int = 32) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            VisionHead(channels, maps, text_width=text_width) for channels in stage_channels
        )

    def forward(
        self, stages: Sequence[Tensor], text_BT: Tensor | None, *, num_sets: int = 1
    ) -> list[Tensor]:
        """Maps per stage and text → logits per stage; a picture's are the same in any set."""
        return [head(s, text_BT) for head, s in zip(self.heads, stages, strict=True)]
