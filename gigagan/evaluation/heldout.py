"""Captions with real pictures in COCO's format: what a generator is evaluated against."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from gigagan.common import tars
from gigagan.common.entries import entries
from gigagan.common.pictures import decode

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
SPLITS = ("trained", "combination", "unseen")
"""Of the gallery's captions: trained on; of a trained concept in a style on a background that it
was never trained in together; of a concept never trained."""


@dataclass(frozen=True)
class Work:
    """One picture of the gallery, with what its caption says."""

    caption: str
    concept: str
    style: str
    background: str
    split: str
    """One of `SPLITS`."""
    picture: Path


@dataclass(frozen=True)
class Gallery:
    """Every concept in every style on every background, each with its real picture."""

    works: list[Work]

    @cached_property
    def places(self) -> dict[str, int]:
        """Place in `works` of each caption."""
        return {work.caption: place for place, work in enumerate(self.works)}


Asks = Literal["text", "class", "nothing"]
"""What a network is told that is held against a set."""


@dataclass(frozen=True)
class Heldout:
    """Captions with the pictures that they describe; or names of classes with pictures of them."""

    captions: list[str]
    pictures: list[Path]
    """The picture of each caption, or of those in `rows`."""
    all_pictures: list[Path]
    """Every distinct picture of the set: the reference of FID and KID."""
    backgrounds: list[str] | None
    """Colour name of each picture's background, in sets that know it."""
    palette: dict[str, list[int]] | None
    gallery: Gallery | None = None
    """What the pictures are told apart from, in sets that know their concepts."""
    rows: list[int] | None = None
    """Which captions have pictures, in order, where some have none."""
    labels: list[str] | None = None
    """Name of the class of each of `pictures`, in sets that know it."""
    asks: Asks = "text"
    """What `captions` are: sentences; names of classes, of which a picture is one of many; or
    empty, for networks that read nothing."""

    @property
    def paired(self) -> list[int]:
        """Places in `captions` that `pictures` belong to."""
        return list(range(len(self.captions))) if self.rows is None else self.rows

    def told(self, asks: Asks, classes: Sequence[str]) -> Heldout:
        """The set for a network that is told this; raises ValueError as `by_class` does."""
        if asks == "text":
            return self
        return self.by_class(classes) if asks == "class" else self.without_captions()

    def by_class(self, names: Sequence[str]) -> Heldout:
        """The pictures of these classes, with the names of their classes for captions.

        Raises:
            ValueError: the set knows no classes, or none of these.
        """
        if self.labels is None:
            raise ValueError(
                f"the held-out pictures (first: {self.pictures[0]}) have no classes: each of "
                "their annotations needs a `label`"
            )
        known = set(names)
        classes = {
            picture: label
            for picture, label in zip(self.pictures, self.labels, strict=True)
            if label in known
        }
        if not classes:
            raise ValueError(
                f"no held-out picture is of a class that the network knows: they are of "
                f"{self.labels[0]!r} and others, it knows {names[0]!r} and others"
            )
        labels = list(classes.values())
        found = [*classes]
        return Heldout(labels, found, found, None, self.palette, labels=labels, asks="class")

    def without_captions(self) -> Heldout:
        """The pictures alone, each for one that is drawn without being told anything."""
        found = self.all_pictures
        of = dict(zip(self.pictures, self.labels, strict=True)) if self.labels else None
        return Heldout(
            *([""] * len(found), found, found, None, self.palette),
            labels=None if of is None else [of[picture] for picture in found],
            asks="nothing",
        )


def read_heldout(path: Path) -> Heldout:
    """Read a COCO captions file, or a folder with a captions.json; a gallery.json beside it, too.

    Pictures are looked for in `images/` beside the file, beside the file itself, and in COCO's own
    layout. Raises FileNotFoundError naming the first picture that is in none of them.
    """
    file = path / "captions.json" if path.is_dir() else path
    content, pictures, annotations = _read_coco(file)
    palette = _palette(content, annotations, file)
    has_backgrounds = palette and all("background" in a for a in annotations)
    return Heldout(
        captions=[" ".join(a["caption"].split()) for a in annotations],
        pictures=[pictures[a["image_id"]] for a in annotations],
        all_pictures=[pictures[key] for key in sorted(pictures)],
        backgrounds=[a["background"] for a in annotations] if has_backgrounds else None,
        palette=palette,
        gallery=read_gallery(file.parent),
        labels=_labels(annotations, file),
    )


def _labels(annotations: Sequence[Mapping[str, Any]], file: Path) -> list[str] | None:
    """The classes of a set of which all annotations have one; None where none has."""
    labels = [note.get("label") for note in annotations]
    if not any(label is not None for label in labels):
        return None
    for note, label in zip(annotations, labels, strict=True):
        if not isinstance(label, str) or not label.strip():
            raise ValueError(
                f"annotation {note['id']} of {file} has the label {label!r}, others have names of "
                "classes: give each one"
            )
    return [" ".join(str(label).split()) for label in labels]


def read_gallery(folder: Path) -> Gallery | None:
    """The gallery.json of a held-out folder, in the order of its pictures; None without one.

    Its annotations are COCO's with `concept`, `style`, `background` and `split` beside the caption.

    Raises:
        ValueError: an annotation lacks one of them, or two have one caption.
        FileNotFoundError: a picture is not there.
    """
    file = folder / "gallery.json"
    if not file.is_file():
        return None
    _, pictures, annotations = _read_coco(file)
    works = [_work(annotation, pictures, file) for annotation in annotations]
    gallery = Gallery(works)
    if len(gallery.places) < len(works):
        twice = next(w.caption for i, w in enumerate(works) if gallery.places[w.caption] != i)
        raise ValueError(f"{file} has the caption {twice!r} twice: give each concept its own name")
    return gallery


def _work(annotation: dict[str, Any], pictures: Mapping[int, Path], file: Path) -> Work:
    fields = ("concept", "style", "background", "split")
    missing = [name for name in fields if not isinstance(annotation.get(name), str)]
    if missing or annotation["split"] not in SPLITS:
        what = f"lacks {', '.join(missing)}" if missing else f"has split {annotation['split']!r}"
        raise ValueError(
            f"annotation {annotation.get('id')} of {file} {what}: write the gallery anew by the "
            f"download stage (splits are {', '.join(SPLITS)})"
        )
    caption = " ".join(annotation["caption"].split())
    said = {name: annotation[name] for name in fields}
    return Work(caption=caption, picture=pictures[annotation["image_id"]], **said)


def _read_coco(file: Path) -> tuple[dict[str, Any], dict[int, Path], list[dict[str, Any]]]:
    """A file's content, its pictures by their ids, and its annotations in their order."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        listed = entries(content, "images", {"id": int, "file_name": str})
        notes = entries(content, "annotations", {"id": int, "image_id": int, "caption": str})
        images = {image["id"]: image["file_name"] for image in listed}
        for note in notes:
            _check_note(note, images)
    except ValueError as error:
        raise ValueError(
            f"{file} is not in COCO's captions format ({error}); it needs images[id, file_name] "
            "and annotations[id, image_id, caption]"
        ) from error
    if not notes:
        raise ValueError(f"{file} holds no captions")
    annotations = sorted(notes, key=lambda a: (a["image_id"], a["id"]))
    folder = _picture_folder(file, next(iter(images.values())))
    pictures = {key: folder / name for key, name in images.items()}
    missing = next((p for p in pictures.values() if not p.is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"{missing} is listed in {file} but is not there: place it")
    return content, pictures, annotations


def _palette(
    content: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], file: Path
) -> dict[str, list[int]] | None:
    """The colours that backgrounds are of, in sets that know them."""
    info = content.get("info")
    palette = info.get("palette") if isinstance(info, dict) else None
    if palette is None:
        return None
    if not isinstance(palette, dict) or not all(_is_colour(colour) for colour in palette.values()):
        raise ValueError(
            f"info.palette of {file} is not names with three values each: leave it out"
        )
    for note in annotations:
        if "background" in note and note["background"] not in list(palette):
            raise ValueError(
                f"background {note['background']!r} of annotation {note['id']} of {file} is none "
                f"of info.palette: choose one of {', '.join(palette)}"
            )
    return palette


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and [isinstance(v, int | float) for v in value] == [True] * 3


def _check_note(note: Mapping[str, Any], images: Mapping[int, str]) -> None:
    if note["image_id"] not in images:
        raise ValueError(f"annotation {note['id']} is of a picture that is not listed")
    try:
        note["caption"].encode()
    except UnicodeEncodeError as error:  # half of a character, which no tokenizer takes
        raise ValueError(f"the caption of annotation {note['id']} is no text: {error}") from error


def _picture_folder(file: Path, name: str) -> Path:
    coco = re.sub(r"^captions_", "", file.stem)  # annotations/captions_val2014.json → val2014/
    candidates = [file.parent / "images", file.parent, file.parent.parent / coco]
    folder = next((c for c in candidates if (c / name).is_file()), None)
    if folder is None:
        places = ", ".join(map(str, candidates))
        raise FileNotFoundError(f"{name} of {file} is in none of {places}: place the pictures")
    return folder


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which 10.png follows 9.png."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def read_drawn(folder: Path) -> tuple[list[Path], list[str]]:
    """Pictures in natural-sorted order and their captions, of the GigaGAN authors' layout.

    That is `fake_images/` beside `captions.txt`, a caption a line, with single blanks as held-out
    captions have them. Raises FileNotFoundError for a missing part and ValueError for other counts
    of pictures and captions.
    """
    images, listed = folder / "fake_images", folder / "captions.txt"
    for part in (images, listed):
        if not part.exists():
            raise FileNotFoundError(
                f"{part} is not there: {folder} needs fake_images/ and captions.txt"
            )
    captions = _lines(listed)
    pictures = sorted(pictures_in(images), key=lambda path: natural(path.name))
    if len(pictures) != len(captions):
        raise ValueError(
            f"{len(pictures)} pictures in {images} but {len(captions)} lines in {listed}: one "
            "caption belongs to each picture, in natural-sorted order of the file names"
        )
    if not pictures:
        raise ValueError(f"{images} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    return pictures, captions


def _lines(file: Path) -> list[str]:
    """Lines of a text, which nothing but an end of line ends, with single blanks."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): save it as such") from error
    lines = text.removesuffix("\n").split("\n") if text else []
    return [" ".join(line.split()) for line in lines]


def pictures_in(folder: Path) -> list[Path]:
    """All files of pictures in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def training_pictures(shards: Path, count: int) -> list[tuple[str, Image.Image]]:
    """Up to `count` pictures of a folder of tars with their keys, evenly spread, in order."""
    shard_paths = sorted(shards.glob("*.tar"))
    each = -(-count // max(1, len(shard_paths)))
    found: list[tuple[str, Image.Image]] = []
    for path in shard_paths:
        with path.open("rb", buffering=0) as file:
            members = [m for m in tars.members(file) if Path(m.name).suffix.lower() in SUFFIXES]
            step = max(1, len(members) // each)
            for member in members[::step][:each]:
                found.append((Path(member.name).stem, decode(tars.read(file, member))))
    return found[:count]


def subset(heldout: Heldout, num_images: int | None, seed: int) -> Heldout:
    """`num_images` captions drawn from the seed, in order; the reference pictures stay all."""
    total = len(heldout.captions)
    if num_images is None or num_images >= total:
        return heldout
    chosen = np.sort(np.random.default_rng(seed).choice(total, num_images, replace=False))

    def pick(items: list[Any]) -> list[Any]:
        return [items[i] for i in chosen]

    backgrounds = heldout.backgrounds
    return replace(
        heldout,
        captions=pick(heldout.captions),
        pictures=pick(heldout.pictures),
        backgrounds=None if backgrounds is None else pick(backgrounds),
        labels=None if heldout.labels is None else pick(heldout.labels),
    )
