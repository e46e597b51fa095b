"""Images of the networks, in [−1, 1], to and from bytes.

Shape letters: B batch, C colour, H W image.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor


def to_uint8(images_BCHW: Tensor) -> np.ndarray:
    """Images in [−1, 1] → uint8 B H W C."""
    scaled = (images_BCHW.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(images_BCHW: Tensor) -> Tensor:
    """uint8 → float32 in [−1, 1]."""
    return images_BCHW.float() / 127.5 - 1
