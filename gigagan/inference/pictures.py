"""Pictures as files: any that people have, read as RGB; ours, written with where they come from."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

MAX_PIXELS = 2**26
"""Of a picture that is opened: 67 million, 8192 × 8192."""
ENTRY = "gigagan"
"""PNG text entry that holds prompt and provenance as JSON."""


class PictureError(ValueError):
    """A file that is no picture we can use; the message names it."""


def open_picture(path: Path) -> Image.Image:
    """A file as RGB: turned as its EXIF says, 16 bits scaled, transparency put on white.

    Raises:
        PictureError: no picture, a damaged one, or one of more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have our own limit
            image = Image.open(path)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise PictureError(
                    f"{path} is {width}×{height} px, the limit is {MAX_PIXELS:,} pixels: make it "
                    "smaller or cut it into parts"
                )
            image.load()
    except FileNotFoundError:
        raise PictureError(f"{path}: there is no such file") from None
    except UnidentifiedImageError:
        raise PictureError(f"{path} is not a picture that can be read") from None
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"{path} is far beyond the limit of {MAX_PIXELS:,} pixels: make it smaller or cut it "
            f"into parts ({error})"
        ) from error
    except (OSError, SyntaxError, EOFError) as error:
        raise PictureError(f"{path} is damaged ({error}): get it again") from error
    return as_rgb(ImageOps.exif_transpose(image))


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        # 16 bits are the only integers beyond 8 that formats have; floats have no agreed range.
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1e-12)
        return Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def save_picture(path: Path, image: Image.Image, about: Mapping[str, Any]) -> None:
    """Write a PNG with prompt and provenance inside, whole or not at all."""
    entries = PngImagePlugin.PngInfo()
    entries.add_itxt(ENTRY, json.dumps(dict(about), ensure_ascii=False, sort_keys=True))
    if "prompt" in about:
        entries.add_itxt("Description", str(about["prompt"]))
    entries.add_text("Software", "gigagan")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, "PNG", pnginfo=entries)
    partial.replace(path)


def read_about(path: Path) -> dict[str, Any] | None:
    """What `save_picture` was told; None for any other picture."""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(ENTRY)
        about = json.loads(text) if text is not None else None
    except (OSError, SyntaxError, ValueError):
        return None
    return about if isinstance(about, dict) else None
