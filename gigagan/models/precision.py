"""Which precisions a device computes in by itself."""

from __future__ import annotations

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively.

    A CPU without the instructions emulates them at a tenth of the speed of float32 or less.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
