"""EfficientNet-Lite0: ImageNet features that are cheap enough to sit inside a training step.

Batch norms are folded into the convolutions. Nothing here trains.
Shape letters: B batch, C channels, H W image, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigagan.models.encoders import ImageEncoder, ImageFeatures


class _Group(NamedTuple):
    """Blocks of one resolution: only the first has the stride."""

    repeats: int
    kernel: int
    stride: int
    channels: int


_GROUPS = (
    _Group(1, 3, 1, 16),
    _Group(2, 3, 2, 24),
    _Group(2, 5, 2, 40),
    _Group(3, 3, 2, 80),
    _Group(3, 5, 1, 112),
    _Group(4, 5, 2, 192),
    _Group(1, 3, 1, 320),
)
STAGE_ENDS = (2, 4, 6)
"""Groups behind which stages are: the last at strides 8, 16 and 32."""
CRITIC_STAGE_ENDS = (1, *STAGE_ENDS)
"""Those of a critic, which sees stride 4 as well (Projected GAN)."""
_BN_EPS = 1e-3


class _Conv(nn.Module):
    """Convolution with TensorFlow's SAME padding and its batch norm folded in."""

    weight: Tensor
    bias: Tensor

    def __init__(
        self, weights: Mapping[str, Tensor], conv: str, norm: str, *, stride: int = 1
    ) -> None:
        super().__init__()
        scale = weights[f"{norm}.weight"] * (weights[f"{norm}.running_var"] + _BN_EPS).rsqrt()
        weight = weights[f"{conv}.weight"] * scale[:, None, None, None]
        bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
        # Buffers that are not persistent follow .to() and stay out of every state dict.
        # Channels last halves the time of depthwise convolutions on a CPU.
        weight = weight.contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.stride = stride
        self.is_depthwise = "depthwise" in conv

    def forward(self, x_BCHW: Tensor) -> Tensor:
        kernel = self.weight.shape[-1]
        padding = kernel // 2
        if (
            self.stride == 2
        ):  # SAME pads less before than after, by an amount that hangs on the size
            needed = [max((-(-n // 2) - 1) * 2 + kernel - n, 0) for n in x_BCHW.shape[-2:]]
            (top, left), padding = [n // 2 for n in needed], 0
            x_BCHW = F.pad(x_BCHW, (left, needed[1] - left, top, needed[0] - top))
        groups = x_BCHW.shape[1] if self.is_depthwise else 1
        return F.conv2d(x_BCHW, self.weight, self.bias, self.stride, padding, groups=groups)


class _Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow; residual where shapes allow."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, *, stride: int) -> None:
        super().__init__()
        expands = f"{prefix}._expand_conv.weight" in weights
        self.expand = (
            _Conv(weights, f"{prefix}._expand_conv", f"{prefix}._bn0") if expands else None
        )
        self.filter = _Conv(weights, f"{prefix}._depthwise_conv", f"{prefix}._bn1", stride=stride)
        self.project = _Conv(weights, f"{prefix}._project_conv", f"{prefix}._bn2")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = x_BCHW if self.expand is None else F.relu6(self.expand(x_BCHW))
        h_BCHW = self.project(F.relu6(self.filter(h_BCHW)))
        return x_BCHW + h_BCHW if h_BCHW.shape == x_BCHW.shape else h_BCHW


class EfficientNetLite0(ImageEncoder):
    """Pooled: the 1280 features before the classifier; stages: maps at strides 8, 16 and 32.

    `stage_ends` are other groups, behind which the stages shall be.
    """

    class_weight: Tensor
    class_bias: Tensor
    name = "embedded:efficientnet-lite0"
    width = 1280
    image_size = None

    def __init__(
        self, weights: Mapping[str, Tensor], stage_ends: Sequence[int] = STAGE_ENDS
    ) -> None:
        super().__init__()
        self.stage_ends = tuple(stage_ends)
        self.stage_channels = tuple(_GROUPS[i].channels for i in self.stage_ends)
        self.stem = _Conv(weights, "_conv_stem", "_bn0", stride=2)
        self.groups = nn.ModuleList()
        index = 0
        for group in _GROUPS:
            blocks = []
            for repeat in range(group.repeats):
                stride = group.stride if repeat == 0 else 1
                blocks.append(_Block(weights, f"_blocks.{index}", stride=stride))
                index += 1
            self.groups.append(nn.Sequential(*blocks))
        self.head = _Conv(weights, "_conv_head", "_bn1")
        self.register_buffer("class_weight", weights["_fc.weight"], persistent=False)
        self.register_buffer("class_bias", weights["_fc.bias"], persistent=False)

    def forward(self, x_BCHW: Tensor) -> ImageFeatures:
        """Return features of images in [-1, 1], from 32 px upwards."""
        if min(x_BCHW.shape[-2:]) < 32:
            raise ValueError(
                f"{self.name} was given {tuple(x_BCHW.shape)}: resize images to 32 px or more"
            )
        # The model was trained on (value - 127) / 128 of values in [0, 255].
        h_BCHW = ((x_BCHW * 127.5 + 0.5) / 128).contiguous(memory_format=torch.channels_last)
        h_BCHW = F.relu6(self.stem(h_BCHW))
        stages = []
        for i, group in enumerate(self.groups):
            h_BCHW = group(h_BCHW)
            if i in self.stage_ends:
                stages.append(h_BCHW)
        pooled_BD = F.relu6(self.head(h_BCHW)).mean(dim=(2, 3))
        return ImageFeatures(pooled_BD, stages)

    def classify(self, pooled_BD: Tensor) -> Tensor:
        """Logits of the 1000 ImageNet classes: tells whether weights and input scale are right."""
        return F.linear(pooled_BD, self.class_weight, self.class_bias)
