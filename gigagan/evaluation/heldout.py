"""Captions with real pictures in COCO's format: what a generator is evaluated against.

The format is read here once more, because this room does not know the data half.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Heldout:
    """Captions with the pictures that they describe."""

    captions: list[str]
    pictures: list[Path]
    """The picture of each caption."""
    all_pictures: list[Path]
    """Every distinct picture of the set: the reference of FID and KID."""
    backgrounds: list[str] | None
    """Colour name of each background, in sets that know it."""
    palette: dict[str, list[int]] | None


def read_heldout(path: Path) -> Heldout:
    """Read a COCO captions file, or a folder with a captions.json.

    Pictures are looked for in `images/` beside the file, beside the file itself, and in COCO's own
    layout. Raises FileNotFoundError naming the first picture that is in none of them.
    """
    file = path / "captions.json" if path.is_dir() else path
    content = json.loads(file.read_text())
    images = {image["id"]: image["file_name"] for image in content["images"]}
    annotations = sorted(content["annotations"], key=lambda a: (a["image_id"], a["id"]))
    if not annotations:
        raise ValueError(f"{file} holds no captions")
    folder = _picture_folder(file, next(iter(images.values())))
    pictures = {key: folder / name for key, name in images.items()}
    missing = next((p for p in pictures.values() if not p.is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"{missing} is listed in {file} but is not there: place it")
    palette = content.get("info", {}).get("palette")
    has_backgrounds = palette and all("background" in a for a in annotations)
    return Heldout(
        captions=[" ".join(a["caption"].split()) for a in annotations],
        pictures=[pictures[a["image_id"]] for a in annotations],
        all_pictures=[pictures[key] for key in sorted(pictures)],
        backgrounds=[a["background"] for a in annotations] if has_backgrounds else None,
        palette=palette,
    )


def _picture_folder(file: Path, name: str) -> Path:
    coco = re.sub(r"^captions_", "", file.stem)  # annotations/captions_val2014.json → val2014/
    candidates = [file.parent / "images", file.parent, file.parent.parent / coco]
    folder = next((c for c in candidates if (c / name).is_file()), None)
    if folder is None:
        places = ", ".join(map(str, candidates))
        raise FileNotFoundError(f"{name} of {file} is in none of {places}: place the pictures")
    return folder


def subset(heldout: Heldout, num_images: int | None, seed: int) -> Heldout:
    """`num_images` captions drawn from the seed, in order; the reference pictures stay all."""
    total = len(heldout.captions)
    if num_images is None or num_images >= total:
        return heldout
    chosen = np.sort(np.random.default_rng(seed).choice(total, num_images, replace=False))

    def pick(items: list[Any]) -> list[Any]:
        return [items[i] for i in chosen]

    backgrounds = heldout.backgrounds
    return Heldout(
        captions=pick(heldout.captions),
        pictures=pick(heldout.pictures),
        all_pictures=heldout.all_pictures,
        backgrounds=None if backgrounds is None else pick(backgrounds),
        palette=heldout.palette,
    )
