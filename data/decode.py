"""Bytes of any picture that the web sends → RGB as its author saw it."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps


class UndecodableError(ValueError):
    """Bytes that are not a whole picture; the text says why."""


def decode(data: bytes) -> Image.Image:
    """Decode to mode RGB, turned as EXIF says, 16 bits scaled to 8, transparency on white.

    Raises:
        UndecodableError: broken, truncated, of unbearable size or of a kind Pillow does not know.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # codecs raise anything on hostile bytes
        raise UndecodableError(f"{type(error).__name__}: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(image, np.float64))).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values_HW: np.ndarray) -> np.ndarray:
    """Deep gray to uint8: 16-bit values by their range, floats in [0, 1] by theirs.

    Pillow's own conversion clips at 255, which turns a 16-bit picture white.
    """
    top = values_HW.max(initial=0)
    scale = 255.0 if top <= 1 else 1.0 if top <= 255 else 255 / 65535
    return np.rint(np.clip(values_HW * scale, 0, 255)).astype(np.uint8)


def square(image: Image.Image, side: int) -> Image.Image:
    """Centre-crop to the short side and resize to `side` px, antialiased (Lanczos)."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    middle = image.crop((left, top, left + short, top + short))
    return middle.resize((side, side), Image.Resampling.LANCZOS)
