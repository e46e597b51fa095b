"""Pictures as files: any that people have, read as RGB; ours, written with where they come from."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from gigagan.evaluation.judges.features import as_rgb

__all__ = ["PictureError", "as_rgb", "open_picture", "read_about", "save_picture"]

MAX_PIXELS = 2**26
"""Of a picture that is opened: 67 million, 8192 × 8192."""
ENTRY = "gigagan"
"""PNG text entry that holds prompt and provenance as JSON."""


class PictureError(ValueError):
    """A file that is no picture we can use; the message names it."""


def open_picture(path: Path) -> Image.Image:
    """A file as RGB: turned as its EXIF says, 16 bits scaled, transparency put on white.

    Raises:
        PictureError: no picture, a damaged one, or more than `MAX_PIXELS`; the file is named.
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
    except PictureError:
        raise
    except FileNotFoundError:
        raise PictureError(f"{path}: there is no such file") from None
    except UnidentifiedImageError:
        raise PictureError(f"{path} is not a picture that can be read") from None
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"{path} is too large ({error}), the limit is {MAX_PIXELS:,} pixels: make it smaller "
            "or cut it into parts"
        ) from error
    except Exception as error:  # codecs raise anything
        raise PictureError(f"{path} is damaged ({error}): get it again") from error
    return as_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says. Broken EXIF says nothing: the picture itself may be whole."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


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
    except Exception:  # codecs raise anything
        return None
    return about if isinstance(about, dict) else None
