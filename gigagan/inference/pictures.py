"""Pictures as files: any that people have, read as RGB; ours, written with where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from gigagan.common import pictures
from gigagan.common.files import filled_aside
from gigagan.common.pictures import UndecodableError

MAX_PIXELS = 2**26
"""Most pixels of a picture that is opened: 67 million, 8192 × 8192."""
ENTRY = "gigagan"
"""PNG text entry that holds prompt and provenance as JSON."""


class PictureError(ValueError):
    """A file that is no picture we can use; the message names it."""


def open_picture(path: Path) -> Image.Image:
    """A file as RGB: see `gigagan.common.pictures.open_picture`.

    Raises:
        PictureError: no picture, a damaged one, or more than `MAX_PIXELS`; the file is named.
    """
    try:
        return pictures.read(path, max_pixels=MAX_PIXELS)
    except FileNotFoundError:
        raise PictureError(f"{path}: there is no such file") from None
    except OSError as error:
        raise PictureError(f"{path} cannot be read ({error.strerror})") from error
    except UndecodableError as error:
        raise PictureError(f"{path} {_fault(error)}") from error


def _fault(error: UndecodableError) -> str:
    if error.kind == "not a picture":
        return "is not a picture that can be read"
    if error.kind.startswith("too many"):
        return (
            f"is too large ({error.args[1]}), the limit is {MAX_PIXELS:,} pixels: make it smaller "
            "or cut it into parts"
        )
    return f"is damaged ({error}): get it again"


def save_picture(path: Path, image: Image.Image, about: Mapping[str, Any]) -> None:
    """Write a PNG with prompt and provenance inside, whole or not at all."""
    entries = PngImagePlugin.PngInfo()
    entries.add_itxt(ENTRY, json.dumps(dict(about), ensure_ascii=False, sort_keys=True))
    if "prompt" in about:
        entries.add_itxt("Description", str(about["prompt"]))
    entries.add_text("Software", "gigagan")
    path.parent.mkdir(parents=True, exist_ok=True)
    with filled_aside(path) as partial:
        image.save(partial, "PNG", pnginfo=entries)


def read_about(path: Path) -> dict[str, Any] | None:
    """What `save_picture` was told; None for any other picture."""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(ENTRY)
        about = json.loads(text) if text is not None else None
    except Exception:  # codecs raise anything
        return None
    return about if isinstance(about, dict) else None
