"""Captioned pictures in COCO's captions format: the held-out set, and COCO itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class CocoSet:
    """One entry a caption, in the order of the file's annotations; lists are parallel."""

    paths: list[Path]
    captions: list[str]
    extras: list[dict[str, str]]
    """Whatever else an annotation says; for the embedded set concept, style and background."""
    palette: dict[str, Colour] | None
    """Named background colours, where the file tells them."""

    def __len__(self) -> int:
        return len(self.captions)


def read(captions: Path, images: Path | None = None) -> CocoSet:
    """Read a captions file; pictures lie in `images`, by default the folder `images` beside it.

    Raises:
        ValueError: not in COCO's captions format, or a listed picture is not there.
    """
    folder = images or captions.parent / "images"
    try:
        document = json.loads(captions.read_text(encoding="utf-8"))
        files = {image["id"]: folder / image["file_name"] for image in document["images"]}
        notes = document["annotations"]
        paths = [files[note["image_id"]] for note in notes]
        texts = [str(note["caption"]) for note in notes]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{captions} is not in COCO's captions format ({type(error).__name__}: {error}); "
            "it needs images[id, file_name] and annotations[image_id, caption]"
        ) from error
    if absent := next((path for path in paths if not path.is_file()), None):
        raise ValueError(f"{captions} lists {absent.name}, which is not in {folder}: put it there")
    usual = ("id", "image_id", "caption")
    extras = [{k: v for k, v in note.items() if k not in usual} for note in notes]
    palette = document.get("info", {}).get("palette")
    return CocoSet(
        paths,
        texts,
        extras,
        {name: (rgb[0], rgb[1], rgb[2]) for name, rgb in palette.items()} if palette else None,
    )
