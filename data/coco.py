"""Captioned pictures in COCO's captions format: the held-out set, and COCO itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.web import archives
from data.web.archives import Archive
from gigagan.common.entries import entries
from gigagan.common.files import write_aside
from gigagan.common.progress import Progress, silent

Colour = tuple[int, int, int]

BASE_URL = "http://images.cocodataset.org"
"""COCO's own site: plain HTTP, and so every file is verified."""

ARCHIVES = {
    archive.name: archive
    for archive in (
        Archive(
            "annotations_trainval2014.zip",
            "annotations",
            252_872_794,
            "0a379cfc70b0e71301e0f377548639bd",
        ),
        Archive("val2014.zip", "zips", 6_645_013_297, "a3d79f5ed8d289b7a7554ce06a5782b3"),
        Archive("train2014.zip", "zips", 13_510_573_713, "0da8c0bd3d6becc4dcb32757491aca88"),
        Archive(
            "annotations_trainval2017.zip",
            "annotations",
            252_907_541,
            "f4bbac642086de4f52a3fdda2de5fa2c",
        ),
        Archive("val2017.zip", "zips", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80"),
        Archive("train2017.zip", "zips", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2"),
    )
}
"""md5 as in PaddleDetection's `dataset/coco/download_coco.py`, which COCO's storage gives as ETag
where it has one (both annotations); sizes as its servers state them."""

NUM_PICTURES = {"train2014": 82_783, "val2014": 40_504, "train2017": 118_287, "val2017": 5_000}
"""What each release holds."""


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
        ValueError: not in COCO's captions format, or listed pictures are not there.
    """
    folder = images or captions.parent / "images"
    document = _Document.load(captions)
    names = [document.files[note["image_id"]] for note in document.notes]
    _demand(captions, folder, dict.fromkeys(names))
    usual = ("id", "image_id", "caption")
    palette = document.info.get("palette")
    return CocoSet(
        [folder / name for name in names],
        [str(note["caption"]) for note in document.notes],
        [{k: v for k, v in note.items() if k not in usual} for note in document.notes],
        {name: (rgb[0], rgb[1], rgb[2]) for name, rgb in palette.items()} if palette else None,
    )


@dataclass(frozen=True)
class _Document:
    """What a captions file says, each entry checked."""

    info: dict[str, Any]
    images: list[dict[str, Any]]
    notes: list[dict[str, Any]]
    files: dict[int, str]
    """File name of each picture, by its id."""

    @classmethod
    def load(cls, captions: Path) -> _Document:
        try:
            document = json.loads(captions.read_text(encoding="utf-8"))
            images = entries(document, "images", {"id": int, "file_name": str})
            notes = entries(document, "annotations", {"image_id": int, "caption": str})
            files = {image["id"]: _plain(image["file_name"]) for image in images}
            if strays := [n for n, note in enumerate(notes) if note["image_id"] not in files]:
                raise ValueError(f"annotations[{strays[0]}] is of a picture that is not listed")
            return cls(document.get("info") or {}, images, notes, files)
        except ValueError as error:
            raise ValueError(
                f"{captions} is not in COCO's captions format ({error}); "
                "it needs images[id, file_name] and annotations[image_id, caption]"
            ) from error


def _plain(name: str) -> str:
    """The name, if it stays in its folder."""
    if name.startswith("/") or "\\" in name or {"", ".", ".."} & set(name.split("/")):
        raise ValueError(f"the file name {name!r} leaves its folder")
    return name


def _demand(captions: Path, folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError with number and first few of the pictures that are not in `folder`."""
    absent = _absent(folder, names)
    if not absent:
        return
    first = ", ".join(absent[:3]) + (f" and {len(absent) - 3:,} more" if len(absent) > 3 else "")
    verb, them = ("is", "it") if len(absent) == 1 else ("are", "them")
    raise ValueError(f"{captions} lists {first}, which {verb} not in {folder}: put {them} there")


def _absent(folder: Path, names: Iterable[str]) -> list[str]:
    return [name for name in names if not (folder / name).is_file()]


# ---- COCO as distributed -----------------------------------------------------------------------


def fetch(
    out: Path,
    year: int,
    split: str,
    *,
    base_url: str = BASE_URL,
    attempts: int = 6,
    pause_s: float = 1.0,
    progress: Progress = silent,
) -> Path:
    """Download, verify and unpack a release; return its captions file.

    Makes `out/annotations/captions_SPLITYEAR.json` and `out/SPLITYEAR/*.jpg`. A zip that lies in
    `out` is used, and kept. A release that is all there is left alone, with or without its zips.

    Raises:
        ArchiveError: a zip cannot be had, or is not as published.
        ValueError: no such release, or pictures are missing.
    """
    name = f"{split}{year}"
    if name not in NUM_PICTURES:
        raise ValueError(f"COCO has no {name}: choose {', '.join(NUM_PICTURES)}")
    captions = out / "annotations" / f"captions_{name}.json"
    if captions.is_file() and not _absent(out / name, _Document.load(captions).files.values()):
        check(captions, out / name, NUM_PICTURES[name])
        return captions
    settings: dict[str, Any] = {"attempts": attempts, "pause_s": pause_s, "progress": progress}
    if not captions.is_file():
        notes = f"annotations/{captions.name}"
        path = archives.obtain(
            ARCHIVES[f"annotations_trainval{year}.zip"], out, base_url, **settings
        )
        archives.unpack(path, out, lambda member: member == notes, progress=progress)
    path = archives.obtain(ARCHIVES[f"{name}.zip"], out, base_url, **settings)
    archives.unpack(path, out, lambda member: member.startswith(f"{name}/"), progress=progress)
    check(captions, out / name, NUM_PICTURES[name])
    return captions


def check(captions: Path, folder: Path, num_pictures: int) -> None:
    """See that a captions file lists so many pictures, and that all of them are there.

    Raises:
        ValueError: with the numbers, and the first few names of missing pictures.
    """
    files = _Document.load(captions).files
    if len(files) != num_pictures:
        raise ValueError(
            f"{captions} lists {len(files):,} pictures, not {num_pictures:,}: it is not the "
            "published file; remove it and fetch again"
        )
    _demand(captions, folder, files.values())


# ---- the captions of an evaluation -------------------------------------------------------------


@dataclass(frozen=True)
class Caption:
    """A caption to draw, and the picture that it describes."""

    image_id: int
    annotation_id: int
    file_name: str
    caption: str
    """The text, runs of blanks made one space."""


@dataclass(frozen=True)
class CaptionList:
    """The captions of an evaluation, by image: one of each picture."""

    seed: int
    captions: tuple[Caption, ...]

    def __len__(self) -> int:
        return len(self.captions)

    @cached_property
    def lines(self) -> bytes:
        """The list's one true form: compact JSON, a line a caption, UTF-8."""
        rows = (
            json.dumps(asdict(c), ensure_ascii=False, separators=(",", ":")) for c in self.captions
        )
        return "".join(f"{row}\n" for row in rows).encode()

    @property
    def sha256(self) -> str:
        """Of `lines`, and so of the file that `write` leaves."""
        return hashlib.sha256(self.lines).hexdigest()

    @property
    def text_sha256(self) -> str:
        """Of the captions alone, a line each: what an evaluation calls `captions_sha256`."""
        return hashlib.sha256("".join(f"{c.caption}\n" for c in self.captions).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write as JSON lines."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, self.lines)


def evaluation_captions(captions: Path, num: int = 30_000, seed: int = 0) -> CaptionList:
    """Choose `num` pictures by the seed, and one caption of each; in the order of image ids.

    A picture's place in the draw is sha256 of "SEED IMAGE", a caption's "SEED IMAGE ANNOTATION":
    the list depends on no library's random numbers, nor on the order of the file. One caption a
    picture is how "30 k captions of val2014" are drawn in the literature's evaluations.

    Raises:
        ValueError: not a captions file, annotations without id, or fewer than `num` pictures.
    """
    document = _Document.load(captions)
    by_image: dict[int, list[dict[str, Any]]] = {}
    for number, note in enumerate(document.notes):
        if not isinstance(note.get("id"), int):
            raise ValueError(f"{captions}: annotations[{number}] has no id, which the draw needs")
        by_image.setdefault(note["image_id"], []).append(note)
    if not 1 <= num <= len(by_image):
        raise ValueError(
            f"{captions} has {len(by_image):,} captioned pictures, so {num:,} cannot be drawn: "
            f"ask for 1 to {len(by_image):,}"
        )
    chosen = sorted(sorted(by_image, key=lambda image: _lot(seed, image))[:num])
    notes = [min(by_image[i], key=lambda note: _lot(seed, i, note["id"])) for i in chosen]
    return CaptionList(seed, tuple(_caption(note, document.files) for note in notes))


def write_heldout(captions: Path, chosen: CaptionList, path: Path) -> None:
    """Write the chosen captions as a captions file that lists every picture of the first one.

    So an evaluation draws exactly these, and compares with all the pictures.
    """
    document = _Document.load(captions)
    ids = {caption.annotation_id for caption in chosen.captions}
    content = {
        "info": {**document.info, "captions_sha256": chosen.sha256, "seed": chosen.seed},
        "images": document.images,
        "annotations": [note for note in document.notes if note.get("id") in ids],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, json.dumps(content, ensure_ascii=False))


def _caption(note: dict[str, Any], files: dict[int, str]) -> Caption:
    text = " ".join(note["caption"].split())
    return Caption(note["image_id"], note["id"], files[note["image_id"]], text)


def _lot(*numbers: int) -> bytes:
    return hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
