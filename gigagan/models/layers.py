"""Layers shared by the networks: equalized learning rate, adaptive convolution, resampling.

Shape letters in this file:
    B batch, N filters of a bank, O output maps, I input maps, H W image, h w filter, S style.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigagan.config import StyleConfig

ACTIVATION_GAIN = math.sqrt(2)
"""Restores the variance that leaky ReLU halves (StyleGAN2).

Leaky ReLU commutes with positive factors, so this gain and those of residual branches are
multiplied into the layer before it, where they cost nothing.
"""


def activate(x: Tensor) -> Tensor:
    """Leaky ReLU with slope 0.2; its gain belongs to the layer before."""
    return F.leaky_relu(x, 0.2)


def full_precision(x: Tensor) -> Tensor:
    """float32 for what overflows or loses its digits in half precision; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def rms_normalize(x: Tensor, *, dim: int = -1, eps: float = 1e-8) -> Tensor:
    """Divide by the root mean square along `dim`, computed in float32."""
    scale = full_precision(x).square().mean(dim, keepdim=True).add(eps).rsqrt()
    return x * scale.to(x.dtype)


def upsample(x_BCHW: Tensor) -> Tensor:
    """Double the side with the [1, 3, 3, 1] / 4 filter."""
    return F.interpolate(x_BCHW, scale_factor=2.0, mode="bilinear", align_corners=False)


def downsample(x_BCHW: Tensor) -> Tensor:
    """Halve the side with the [1, 3, 3, 1] / 8 filter, the transpose of `upsample`."""
    return F.interpolate(
        x_BCHW, scale_factor=0.5, mode="bilinear", align_corners=False, antialias=True
    )


def pyramid(x_BCHW: Tensor, num_levels: int) -> list[Tensor]:
    """The image and its halvings, largest first: what the discriminator sees of real images."""
    levels = [x_BCHW]
    for _ in range(num_levels - 1):
        levels.append(downsample(levels[-1]))
    return levels


class EqualLinear(nn.Module):
    """Linear layer with N(0, 1) weights scaled at run time by 1/√fan_in (equalized lr).

    `lr_multiplier` slows its learning without changing what it computes at the start.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: float | None = 0.0,
        lr_multiplier: float = 1.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = (
            None
            if bias is None
            else nn.Parameter(torch.full((out_features,), bias / lr_multiplier))
        )
        self.weight_gain = gain * lr_multiplier / math.sqrt(in_features)
        self.bias_gain = gain * lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        """Last dimension in_features → out_features."""
        bias = None if self.bias is None else self.bias * self.bias_gain
        return F.linear(x, self.weight * self.weight_gain, bias)


class EqualConv2d(nn.Module):
    """Convolution with equalized learning rate; `same` padding unless told otherwise."""

    def __init__(
        self,
        in_maps: int,
        out_maps: int,
        size: int,
        *,
        padding: int | None = None,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_maps, in_maps, size, size))
        self.bias = nn.Parameter(torch.zeros(out_maps))
        self.weight_gain = gain / math.sqrt(in_maps * size * size)
        self.bias_gain = gain
        self.padding = size // 2 if padding is None else padding

    def forward(self, x_BIHW: Tensor) -> Tensor:
        """B I H W → B O H W."""
        weight, bias = self.weight * self.weight_gain, self.bias * self.bias_gain
        return F.conv2d(x_BIHW, weight, bias, padding=self.padding)


def adaptive_conv2d(
    x_BIHW: Tensor,
    bank_NOIhw: Tensor,
    select_BN: Tensor,
    scale_BI: Tensor,
    *,
    demodulate: bool = True,
    bias_O: Tensor | None = None,
    gain: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    """Sample-adaptive kernel selection, modulation, demodulation, convolution with same padding.

    K_b = Σ_n select_bn · bank_n;  y_b = conv(x_b, K_b · s_b · d_b) with
    d_bo = gain · (Σ_ihw (K_boihw · s_bi)² + ε)^−½   (GigaGAN, equation 3; StyleGAN2, 1–3),
    plus gain · bias. Without demodulation d = 1: put a gain into the scales there.

    `select_BN` is already softmaxed. Modulation is applied to the input and demodulation to the
    output, which equals scaling the filters but never builds modulated filters per sample; a bank
    of one filter then is one ordinary convolution. Demodulation is computed in float32.
    """
    B, I, H, W = x_BIHW.shape
    N, O, _, h, w = bank_NOIhw.shape
    x_BIHW = x_BIHW * scale_BI[:, :, None, None].to(x_BIHW.dtype)
    power_BI = full_precision(scale_BI).square()
    if N == 1:
        filter_OIhw = bank_NOIhw[0]
        y_BOHW = F.conv2d(x_BIHW, filter_OIhw.to(x_BIHW.dtype), padding=(h // 2, w // 2))
        energy_BO = (
            power_BI @ full_precision(filter_OIhw).square().sum((2, 3)).T if demodulate else None
        )
    else:
        mixed_BOIhw = (select_BN @ bank_NOIhw.reshape(N, -1)).reshape(B, O, I, h, w)
        # One grouped convolution serves the whole batch: group b holds sample b's own filter.
        y_BOHW = F.conv2d(
            x_BIHW.reshape(1, B * I, H, W),
            mixed_BOIhw.to(x_BIHW.dtype).reshape(B * O, I, h, w),
            padding=(h // 2, w // 2),
            groups=B,
        ).reshape(B, O, H, W)
        energy_BO = (
            torch.einsum("boi,bi->bo", full_precision(mixed_BOIhw).square().sum((3, 4)), power_BI)
            if demodulate
            else None
        )
    bias = None if bias_O is None else (bias_O * gain)[:, None, None].to(y_BOHW.dtype)
    if energy_BO is None:
        return y_BOHW if bias is None else y_BOHW + bias
    factor = ((energy_BO + eps).rsqrt() * gain)[:, :, None, None].to(y_BOHW.dtype)
    return y_BOHW * factor if bias is None else torch.addcmul(bias, y_BOHW, factor)


class AdaptiveConv(nn.Module):
    """Convolution whose filter is selected from a bank and modulated by the style."""

    def __init__(
        self,
        in_maps: int,
        out_maps: int,
        *,
        style_dim: int,
        num_kernels: int,
        size: int = 3,
        demodulate: bool = True,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.randn(num_kernels, out_maps, in_maps, size, size))
        self.bias = nn.Parameter(torch.zeros(out_maps))
        self.to_scale = EqualLinear(style_dim, in_maps, bias=1.0)
        self.to_select = EqualLinear(style_dim, num_kernels) if num_kernels > 1 else None
        self.demodulate = demodulate
        self.gain = gain
        # Demodulation makes the filters' scale irrelevant. Without it they need 1/√fan_in, and
        # another 1/√2 because the scales 1 + N(0, 1) have a mean square of 2.
        self.scale_gain = 1.0 if demodulate else gain / math.sqrt(2 * in_maps * size * size)

    def forward(self, x_BIHW: Tensor, style_BS: Tensor) -> Tensor:
        """B I H W → B O H W."""
        if self.to_select is None:
            select_BN = style_BS.new_ones(len(style_BS), 1)
        else:
            select_BN = self.to_select(style_BS).float().softmax(dim=1)
        return adaptive_conv2d(
            x_BIHW,
            self.bank,
            select_BN,
            self.to_scale(style_BS) * self.scale_gain,
            demodulate=self.demodulate,
            bias_O=self.bias,
            gain=self.gain,
        )


class AdaptiveBlock(nn.Module):
    """Two adaptive 3×3 convolutions with a residual branch of reduced gain.

    Where the number of maps changes, the first convolution changes it and the second is the
    residual branch; elsewhere both are.
    """

    def __init__(
        self, in_maps: int, out_maps: int, *, style_dim: int, num_kernels: int, gain: float
    ) -> None:
        super().__init__()
        self.first = AdaptiveConv(
            in_maps,
            out_maps,
            style_dim=style_dim,
            num_kernels=num_kernels,
            gain=ACTIVATION_GAIN,
        )
        self.second = AdaptiveConv(
            out_maps,
            out_maps,
            style_dim=style_dim,
            num_kernels=num_kernels,
            gain=ACTIVATION_GAIN * gain,
        )
        self.keeps_maps = in_maps == out_maps

    def forward(self, x_BIHW: Tensor, style_BS: Tensor) -> Tensor:
        """B I H W → B O H W."""
        hidden = activate(self.first(x_BIHW, style_BS))
        trunk = x_BIHW if self.keeps_maps else hidden
        return trunk + activate(self.second(hidden, style_BS))


class ResidualBlock(nn.Module):
    """Two equalized 3×3 convolutions (without style) on a residual branch of reduced gain."""

    def __init__(self, maps: int, *, gain: float) -> None:
        super().__init__()
        self.first = EqualConv2d(maps, maps, 3, gain=ACTIVATION_GAIN)
        self.second = EqualConv2d(maps, maps, 3, gain=ACTIVATION_GAIN * gain)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """B C H W → the same."""
        return x_BCHW + activate(self.second(activate(self.first(x_BCHW))))


class MappingNetwork(nn.Module):
    """M: latent z and the text's global descriptor → style w (GigaGAN, section 3.3).

    Both inputs are normalised to the same total energy, so that neither drowns the other at
    any width.
    """

    def __init__(self, config: StyleConfig) -> None:
        super().__init__()
        widths = [config.latent_dim + config.text.width]
        widths += [config.style_dim] * config.mapping_layers
        self.layers = nn.ModuleList(
            EqualLinear(i, o, lr_multiplier=config.mapping_lr_multiplier, gain=ACTIVATION_GAIN)
            for i, o in itertools.pairwise(widths)
        )

    def forward(self, z_BZ: Tensor, text_BT: Tensor) -> Tensor:
        """B Z and B T → B S."""
        width = z_BZ.shape[1] + text_BT.shape[1]
        parts = [
            rms_normalize(part) * math.sqrt(width / (2 * part.shape[1])) for part in (z_BZ, text_BT)
        ]
        x = torch.cat(parts, dim=1)
        for layer in self.layers:
            x = activate(layer(x))
        return x
