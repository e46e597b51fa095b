"""Convolution in float32 and bf16 on this machine's CPU: what `precision: auto` decides by."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.timing import medians, show


def main() -> None:
    """Float32 against bf16, forward."""
    x, w = torch.randn(8, 128, 16, 16), torch.randn(128, 128, 3, 3)
    half_x, half_w = x.bfloat16(), w.bfloat16()
    times = medians(
        {
            "float32": lambda: F.conv2d(x, w, padding=1),
            "bf16": lambda: F.conv2d(half_x, half_w, padding=1),
        },
        rounds=3,
    )
    show("8 × 128 maps, 16 px", times)


if __name__ == "__main__":
    main()
