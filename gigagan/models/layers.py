"""Layers shared by the networks: equalized learning rate, adaptive convolution, resampling.

Shape letters in this file:
    B batch, N filters of a bank, O output maps, I input maps, H W image, h w filter, S style.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable

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


def residual_weights(gain: float) -> tuple[float, float]:
    """Weights of trunk and branch in the ratio 1 : gain whose squares sum to 1.

    A sum weighted so keeps its variance however many follow each other (EDM2, equation 88). The
    branch's weight is multiplied into the branch's last layer.
    """
    norm = math.hypot(1, gain)
    return 1 / norm, gain / norm


def add_residual(trunk: Tensor, branch: Tensor, weight: float) -> Tensor:
    """weight · trunk + branch, in one pass over memory."""
    return torch.add(branch, trunk, alpha=weight)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Products of float32 stay in float32; the meta device, where layers are counted, has none."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def rms_normalize(x: Tensor, *, dim: int = -1, eps: float = 1e-8) -> Tensor:
    """Divide by the root mean square along `dim`, computed in float32."""
    scale = full_precision(x).square().mean(dim, keepdim=True).add(eps).rsqrt()
    return x * scale.to(x.dtype)


def upsample(x_BCHW: Tensor) -> Tensor:
    """Double the side with the [1, 3, 3, 1] / 4 filter."""
    if _has_unsteady_backward(x_BCHW):
        return resample(x_BCHW, doubling)
    return F.interpolate(x_BCHW, scale_factor=2.0, mode="bilinear", align_corners=False)


def downsample(x_BCHW: Tensor) -> Tensor:
    """Halve the side with the [1, 3, 3, 1] / 8 filter, the transpose of `upsample`."""
    if _has_unsteady_backward(x_BCHW):
        return resample(x_BCHW, halving)
    # CPUs lack this in half precision.
    wide = full_precision(x_BCHW) if x_BCHW.device.type == "cpu" else x_BCHW
    halved = F.interpolate(
        wide, scale_factor=0.5, mode="bilinear", align_corners=False, antialias=True
    )
    return halved.to(x_BCHW.dtype)


def _has_unsteady_backward(x: Tensor) -> bool:
    """On a GPU the gradient of `interpolate` is added up in whatever order threads come."""
    return x.device.type == "cuda" and x.requires_grad and torch.is_grad_enabled()


def resample(x_BCHW: Tensor, matrix: Callable[[int, torch.device], Tensor]) -> Tensor:
    """Rows and columns through `doubling` or `halving`: what `interpolate` does, and its gradients.

    Products, so that two runs on one device agree in every bit.
    """
    H, W = x_BCHW.shape[2:]
    rows, columns = (matrix(side, x_BCHW.device).to(x_BCHW.dtype) for side in (H, W))
    with without_autocast(x_BCHW.device):
        return rows @ (x_BCHW @ columns.T)


def doubling(side: int, device: torch.device) -> Tensor:
    """The matrix [2 · side, side] of `upsample` along one side, in float32."""
    place = (torch.arange(2 * side, device=device) / 2 - 0.25).clamp(0, side - 1)
    return (1 - (place[:, None] - torch.arange(side, device=device)).abs()).clamp(min=0)


def halving(side: int, device: torch.device) -> Tensor:
    """The matrix [side / 2, side] of `downsample` along one side, in float32: rows sum to 1."""
    centre = 2 * torch.arange(side // 2, device=device) + 0.5
    weights = (1 - (centre[:, None] - torch.arange(side, device=device)).abs() / 2).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def halve_by_mean(x_BCHW: Tensor) -> Tensor:
    """Halve the side by the mean of 2×2."""
    return F.avg_pool2d(x_BCHW, 2)


Halving = Callable[[Tensor], Tensor]


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
        bias: bool = True,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_maps, in_maps, size, size))
        self.bias = nn.Parameter(torch.zeros(out_maps)) if bias else None
        self.weight_gain = gain / math.sqrt(in_maps * size * size)
        self.bias_gain = gain
        self.padding = size // 2 if padding is None else padding

    def forward(self, x_BIHW: Tensor) -> Tensor:
        """B I H W → B O H W."""
        bias = None if self.bias is None else self.bias * self.bias_gain
        return F.conv2d(x_BIHW, self.weight * self.weight_gain, bias, padding=self.padding)


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
    output, which equals scaling the filters but never builds modulated filters per sample; with a
    bank of one it is an ordinary convolution, and where all images share a style (`select_BN` and
    `scale_BI` have one row). Then everything is folded into the filter if it is smaller than the
    maps. Demodulation is computed in float32.
    """
    if len(scale_BI) == 1 and x_BIHW.numel() > bank_NOIhw[0].numel():
        filter_OIhw = fold_filter(
            bank_NOIhw, select_BN, scale_BI, demodulate=demodulate, gain=gain, eps=eps
        ).to(x_BIHW.dtype)
        bias = None if bias_O is None else (bias_O * gain).to(x_BIHW.dtype)
        size = filter_OIhw.shape[2:]
        return F.conv2d(x_BIHW, filter_OIhw, bias, padding=(size[0] // 2, size[1] // 2))
    x_BIHW = x_BIHW * scale_BI[:, :, None, None].to(x_BIHW.dtype)
    filters_FOIhw = mix_filters(bank_NOIhw, select_BN)
    y_BOHW = _convolve(x_BIHW, filters_FOIhw.to(x_BIHW.dtype))
    bias = None if bias_O is None else (bias_O * gain)[:, None, None].to(y_BOHW.dtype)
    if not demodulate:
        return y_BOHW if bias is None else y_BOHW + bias
    factor_BO = gain * demodulation(filter_energy(bank_NOIhw, select_BN), scale_BI, eps=eps)
    factor = factor_BO[:, :, None, None].to(y_BOHW.dtype)
    return y_BOHW * factor if bias is None else torch.addcmul(bias, y_BOHW, factor)


def fold_filter(
    bank_NOIhw: Tensor,
    select_1N: Tensor,
    scale_1I: Tensor,
    *,
    demodulate: bool,
    gain: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    """One style's selection, modulation and demodulation as one filter O I h w; bias apart."""
    mixed_1OIhw = mix_filters(bank_NOIhw, select_1N)
    filter_OIhw = mixed_1OIhw[0] * scale_1I[0, :, None, None]
    if not demodulate:
        return filter_OIhw
    factor_1O = gain * demodulation(filter_energy(bank_NOIhw, select_1N), scale_1I, eps=eps)
    return filter_OIhw * factor_1O[0, :, None, None, None]


def mix_filters(bank_NOIhw: Tensor, select_BN: Tensor) -> Tensor:
    """K_b = Σ_n select_bn · bank_n by one matrix product; a bank of one is its only filter.

    F O I h w, with F = 1 where one filter serves every sample.
    """
    N, O, I, h, w = bank_NOIhw.shape
    if N == 1:
        return bank_NOIhw
    return (select_BN @ bank_NOIhw.reshape(N, -1)).reshape(-1, O, I, h, w)


def filter_energy(bank_NOIhw: Tensor, select_BN: Tensor) -> Tensor:
    """Σ_hw K_boihw² of the mixed filters without building them: F O I, in float32.

    = Σ_nm select_bn select_bm Σ_hw bank_noihw bank_moihw. Squares of mixed filters would be the
    largest tensor of a step: nine numbers for each of these.
    """
    with without_autocast(bank_NOIhw.device):
        N, O, I = bank_NOIhw.shape[:3]
        bank = full_precision(bank_NOIhw)
        if N == 1:
            return bank.square().sum((3, 4))
        select = full_precision(select_BN)
        products_NNOI = (bank[:, None] * bank).sum((4, 5))
        pairs_BNN = select[:, :, None] * select[:, None]
        energy_BOI = pairs_BNN.flatten(1) @ products_NNOI.flatten(2).flatten(0, 1)
        return energy_BOI.clamp(min=0).unflatten(1, (O, I))  # rounding may leave less than nothing


def demodulation(energy_FOI: Tensor, scale_BI: Tensor, *, eps: float = 1e-8) -> Tensor:
    """d_bo = (Σ_i energy_boi · s_bi² + ε)^−½ in float32: B O (StyleGAN2, equation 3)."""
    with without_autocast(scale_BI.device):
        power_BI = full_precision(scale_BI).square()
        if len(energy_FOI) == 1:
            return (power_BI @ energy_FOI[0].T + eps).rsqrt()
        return (torch.einsum("boi,bi->bo", energy_FOI, power_BI) + eps).rsqrt()


def _convolve(x_BIHW: Tensor, filters_FOIhw: Tensor) -> Tensor:
    """Same-padded convolution with one filter for all samples (F = 1) or one for each (F = B)."""
    B, I, H, W = x_BIHW.shape
    F_, O, _, h, w = filters_FOIhw.shape
    padding = (h // 2, w // 2)
    if F_ == 1:
        return F.conv2d(x_BIHW, filters_FOIhw[0], padding=padding)
    # One grouped convolution serves the whole batch: group b holds sample b's own filter.
    x_1GHW = x_BIHW.reshape(1, B * I, H, W)
    filters_GIhw = filters_FOIhw.reshape(B * O, I, h, w)
    return F.conv2d(x_1GHW, filters_GIhw, padding=padding, groups=B).reshape(B, O, H, W)


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
        # Without demodulation nothing else restores unit variance.
        self.scale_gain = 1.0 if demodulate else gain / math.sqrt(in_maps * size * size)

    def read(self, style_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Style → softmaxed selection B N and scales B I."""
        scale_BI = self.to_scale(style_BS) * self.scale_gain
        if self.to_select is None:
            return style_BS.new_ones(len(style_BS), 1), scale_BI
        return full_precision(self.to_select(style_BS)).softmax(dim=1), scale_BI

    def forward(self, x_BIHW: Tensor, style_BS: Tensor) -> Tensor:
        """B I H W and B S (or 1 S for all) → B O H W."""
        select_BN, scale_BI = self.read(style_BS)
        return adaptive_conv2d(
            x_BIHW,
            self.bank,
            select_BN,
            scale_BI,
            demodulate=self.demodulate,
            bias_O=self.bias,
            gain=self.gain,
        )


class AdaptiveBlock(nn.Module):
    """Two adaptive 3×3 convolutions with a residual branch of reduced gain.

    Where the number of maps changes, the first convolution changes it and the second is the
    residual branch; elsewhere both are. `is_first`, at the constant input, has the first only.
    """

    def __init__(
        self,
        in_maps: int,
        out_maps: int,
        *,
        style_dim: int,
        num_kernels: int,
        gain: float,
        is_first: bool = False,
    ) -> None:
        super().__init__()

        def convolution(maps: int, weight: float) -> AdaptiveConv:
            return AdaptiveConv(
                maps,
                out_maps,
                style_dim=style_dim,
                num_kernels=num_kernels,
                gain=ACTIVATION_GAIN * weight,
            )

        self.trunk_weight, branch_weight = residual_weights(gain)
        self.first = convolution(in_maps, 1.0)
        self.second = None if is_first else convolution(out_maps, branch_weight)
        self.keeps_maps = in_maps == out_maps

    def forward(self, x_BIHW: Tensor, style_BS: Tensor) -> Tensor:
        """B I H W → B O H W."""
        hidden = activate(self.first(x_BIHW, style_BS))
        if self.second is None:
            return hidden
        trunk = x_BIHW if self.keeps_maps else hidden
        return add_residual(trunk, activate(self.second(hidden, style_BS)), self.trunk_weight)


class ResidualBlock(nn.Module):
    """Two equalized 3×3 convolutions (without style) on a residual branch of reduced gain."""

    def __init__(self, maps: int, *, gain: float) -> None:
        super().__init__()
        self.trunk_weight, branch_weight = residual_weights(gain)
        self.first = EqualConv2d(maps, maps, 3, gain=ACTIVATION_GAIN)
        self.second = EqualConv2d(maps, maps, 3, gain=ACTIVATION_GAIN * branch_weight)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """B C H W → the same."""
        branch = activate(self.second(activate(self.first(x_BCHW))))
        return add_residual(x_BCHW, branch, self.trunk_weight)


class DownBlock(nn.Module):
    """A residual block that halves the side: low-pass between its convolutions, 1×1 on its trunk.

    StyleGAN2's discriminator block with a residual branch of reduced gain.
    """

    def __init__(
        self, in_maps: int, out_maps: int, *, gain: float, halve: Halving = downsample
    ) -> None:
        super().__init__()
        self.halve = halve
        trunk_weight, branch_weight = residual_weights(gain)
        self.first = EqualConv2d(in_maps, in_maps, 3, gain=ACTIVATION_GAIN)
        self.second = EqualConv2d(in_maps, out_maps, 3, gain=ACTIVATION_GAIN * branch_weight)
        self.trunk = EqualConv2d(in_maps, out_maps, 1, bias=False, gain=trunk_weight)

    def forward(self, x_BIHW: Tensor) -> Tensor:
        """B I H W → B O H/2 W/2."""
        branch = activate(self.second(self.halve(activate(self.first(x_BIHW)))))
        return self.trunk(self.halve(x_BIHW)) + branch


class MappingNetwork(nn.Module):
    """M: latent z and the global descriptor of text or class → style w (GigaGAN, section 3.3).

    Both inputs are normalised to the same total energy, so that neither drowns the other at
    any width; then z is weighted by `latent_gain`.
    """

    def __init__(self, config: StyleConfig) -> None:
        super().__init__()
        widths = [config.latent_dim + config.condition_width]
        widths += [config.style_dim] * config.mapping_layers
        self.layers = nn.ModuleList(
            EqualLinear(i, o, lr_multiplier=config.mapping_lr_multiplier, gain=ACTIVATION_GAIN)
            for i, o in itertools.pairwise(widths[: -1 if config.linear_style else None])
        )
        if config.linear_style:
            multiplier = config.mapping_lr_multiplier
            self.layers.append(EqualLinear(*widths[-2:], lr_multiplier=multiplier))
        self.is_linear = config.linear_style
        self.latent_gain = config.latent_gain

    def forward(self, z_BZ: Tensor, condition_BT: Tensor | None) -> Tensor:
        """B Z and B T (None if unconditional) → B S."""
        inputs = [z_BZ] if condition_BT is None else [z_BZ, condition_BT]
        width = sum(part.shape[1] for part in inputs)
        x = torch.cat(
            [rms_normalize(p) * math.sqrt(width / (len(inputs) * p.shape[1])) for p in inputs],
            dim=1,
        )
        if self.latent_gain != 1:
            x[:, : z_BZ.shape[1]] *= self.latent_gain
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x) if self.is_linear and number == len(self.layers) else activate(layer(x))
        return x
