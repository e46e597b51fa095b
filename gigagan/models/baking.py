"""A network for one style and one caption, as a plain convolutional network.

With w fixed, kernel selection, modulation and demodulation are constants: each adaptive layer is
an ordinary convolution, and what attention reads of the style and of the caption is a constant.
An exported upsampler is one. Here it pays only for large banks and many images of one style:
folding costs more than it saves where each picture has a style of its own.

Shape letters:
    B batch, S style, L tokens, T text width, O I maps, H W image, h w filter.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from gigagan.models.attention import CrossAttention, SelfAttention
from gigagan.models.base import BaseGenerator
from gigagan.models.generator import Generator
from gigagan.models.layers import (
    AdaptiveConv,
    EqualConv2d,
    EqualLinear,
    fold_filter,
)
from gigagan.models.stylegan_t import StyleGANT
from gigagan.models.text import Text
from gigagan.models.upsampler import Upsampler

Network = TypeVar("Network", bound=BaseGenerator | Upsampler)


class BakedConv(nn.Conv2d):
    """An ordinary convolution in the place of an adaptive one."""

    def forward(self, x_BIHW: Tensor, style_1S: Tensor | None = None) -> Tensor:
        """B I H W → B O H W; the style is in the weights."""
        return super().forward(x_BIHW)


class Constant(nn.Module):
    """A layer whose input is fixed."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.clone())

    def forward(self, fixed: Tensor | None) -> Tensor:
        """What the layer made of its only input."""
        return self.value


class Baked(nn.Module):
    """A baked network; it takes no style and no text."""

    style_1S: Tensor
    local_1LT: Tensor | None
    mask_1L: Tensor | None

    def __init__(self, network: BaseGenerator | Upsampler, style_1S: Tensor, text: Text) -> None:
        super().__init__()
        self.network = network
        # Handed through to layers that look at no more than the mask.
        self.register_buffer("style_1S", style_1S)
        self.register_buffer("local_1LT", text.local_BLT)
        self.register_buffer("mask_1L", text.mask_BL)

    def forward(self, *images_BCHW: Tensor) -> list[Tensor]:
        """For an upsampler small image and noise, for a generator nothing → pyramid."""
        text = Text(self.local_1LT, self.mask_1L)
        pyramid: list[Tensor] = self.network.synthesize(*images_BCHW, self.style_1S, text)  # type: ignore[call-arg, arg-type]
        return pyramid


@torch.no_grad()
def bake(network: Network, style_S: Tensor, text: Text) -> Baked:
    """Fix the style [S] and what was read of one caption; the network itself stays as it is.

    Raises:
        ValueError: style or text are of more than one sample.
    """
    rows = [len(style_S) if style_S.dim() > 1 else 1, *(len(x) for x in text if x is not None)]
    if set(rows) != {1}:
        raise ValueError(f"style and text of {max(rows)} samples: baking fixes those of one")
    style_1S = style_S.reshape(1, -1)
    text = _without_padding(text)
    baked = copy.deepcopy(network).eval().requires_grad_(False)
    baked.mapping, baked.text = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    if isinstance(baked, StyleGANT):
        baked.input = Constant(baked.input(style_1S))  # type: ignore[assignment]
    if isinstance(baked, Generator) and baked.style_input is not None:
        baked.style_input = Constant(baked.style_input(style_1S))  # type: ignore[assignment]
    for module in list(baked.modules()):
        for name, child in list(module.named_children()):
            plain = _plain(child, style_1S)
            if plain is not None:
                setattr(module, name, plain)
        if isinstance(module, SelfAttention) and module.style_token is not None:
            module.style_token = Constant(module.style_token(style_1S))  # type: ignore[assignment]
        if isinstance(module, CrossAttention):
            module.to_k = Constant(module.to_k(text.local_BLT))  # type: ignore[assignment]
            module.to_v = Constant(module.to_v(text.local_BLT))  # type: ignore[assignment]
    return Baked(baked, style_1S, text)


def _plain(layer: nn.Module, style_1S: Tensor) -> nn.Module | None:
    """The ordinary layer with the same output, or None for what stays."""
    if isinstance(layer, AdaptiveConv):
        filter_OIhw = fold_filter(
            layer.bank, *layer.read(style_1S), demodulate=layer.demodulate, gain=layer.gain
        )
        padding = filter_OIhw.shape[-1] // 2
        return _convolution(filter_OIhw, layer.bias * layer.gain, padding, BakedConv)
    if isinstance(layer, EqualConv2d):
        bias = None if layer.bias is None else layer.bias * layer.bias_gain
        return _convolution(layer.weight * layer.weight_gain, bias, layer.padding, nn.Conv2d)
    if isinstance(layer, EqualLinear):
        out_features, in_features = layer.weight.shape
        with torch.device("meta"):  # draws nothing
            linear = nn.Linear(in_features, out_features, bias=layer.bias is not None)
        bias = None if layer.bias is None else layer.bias * layer.bias_gain
        return _fill(linear, layer.weight * layer.weight_gain, bias)
    return None


def _convolution(
    weight_OIhw: Tensor, bias_O: Tensor | None, padding: int, kind: type[nn.Conv2d]
) -> nn.Module:
    """A convolution with these weights."""
    O, I, h, w = weight_OIhw.shape
    with torch.device("meta"):
        conv = kind(I, O, (h, w), padding=padding, bias=bias_O is not None)
    return _fill(conv, weight_OIhw, bias_O)


def _fill(
    layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None
) -> nn.Conv2d | nn.Linear:
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


def _without_padding(text: Text) -> Text:
    """The tokens of one caption alone."""
    if text.local_BLT is None or text.mask_BL is None:
        return text
    local_1LT = text.local_BLT[:, text.mask_BL[0]]
    return Text(local_1LT, text.mask_BL[:, text.mask_BL[0]], text.global_BT)
