"""Deep gray pictures as 8 bits: one rule for what is trained on, judged and drawn from."""

from __future__ import annotations

import numpy as np
from PIL import Image


def eight_bits(image: Image.Image) -> np.ndarray:
    """Deep gray to uint8: 16-bit values by their range, others by the range they seem to have.

    Pillow's own conversion clips at 255, which turns a 16-bit picture white.
    """
    deep_HW = np.asarray(image)
    top = float(np.max(deep_HW, initial=0, where=np.isfinite(deep_HW)))
    if image.mode.startswith("I;16"):
        top = 65535.0
    elif image.mode == "F" and top <= 1:
        top = 1.0
    elif top <= 65535:
        top = 255.0 if top <= 255 else 65535.0
    flat_HW = np.empty(deep_HW.shape, np.uint8)
    for start in range(0, len(deep_HW), 64):  # rows at a time: a whole one of floats is 8 × as big
        with np.errstate(invalid="ignore", over="ignore"):  # of floats that are no numbers
            rows = np.nan_to_num(deep_HW[start : start + 64] * (255 / top))
        flat_HW[start : start + 64] = np.rint(np.clip(rows, 0, 255))
    return flat_HW
