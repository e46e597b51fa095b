"""From the host to the device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def place(x: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on the device; on a GPU by way of pinned memory, so that nothing waits.

    The allocator of pinned memory keeps it until the copy is done.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
