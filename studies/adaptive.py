"""Adaptive convolution, forward and backward: ours against its definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import medians, show
from gigagan.models.layers import adaptive_conv2d


def expand_and_modulate(x: Tensor, bank: Tensor, select: Tensor, scale: Tensor) -> Tensor:
    """One modulated and demodulated filter per sample, written out; then a grouped convolution."""
    B, I, H, W = x.shape
    kernel = torch.einsum("bn,noihw->boihw", select, bank) * scale[:, None, :, None, None]
    kernel = kernel * (kernel.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    y = F.conv2d(x.reshape(1, B * I, H, W), kernel.flatten(0, 1), padding=1, groups=B)
    return y.reshape(B, -1, H, W)


def main() -> None:
    """The shapes of the small generator."""
    for num_kernels, maps, side in ((1, 128, 4), (1, 128, 8), (4, 48, 16), (4, 24, 32)):
        torch.manual_seed(0)
        x = torch.randn(16, maps, side, side, requires_grad=True)
        bank = torch.randn(num_kernels, maps, maps, 3, 3, requires_grad=True)
        select, scale = torch.rand(16, num_kernels).softmax(1), torch.randn(16, maps)

        def step(function: object, inputs: tuple[Tensor, ...] = (x, bank, select, scale)) -> None:
            function(*inputs).square().sum().backward()  # type: ignore[operator]

        times = medians(
            {
                "ours": lambda step=step: step(adaptive_conv2d),
                "definition": lambda step=step: step(expand_and_modulate),
            }
        )
        show(f"N = {num_kernels}, {maps} maps, {side} px", times)


if __name__ == "__main__":
    main()
