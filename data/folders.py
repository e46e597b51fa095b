"""Pictures of this machine, sorted into classes by folders or by a list → training shards.

    SRC/CLASS/…/picture.jpg    the folder directly in SRC is the class, or
    FILE                       CSV, TSV or Parquet: `path` in SRC, `label`, and perhaps `caption`

The pictures stay where they are. They are read twice, for their digest and for their shard, and
never trusted: decoders are bounded, and no link or path leads out of SRC.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from data.config import FilterConfig
from data.executor import each
from data.originals import DamagedError
from data.report import Report, Step
from data.schema import SCORES
from data.shards import write as shards
from data.shards.manifest import INDEX
from gigagan.common import decoders
from gigagan.common.files import filled_aside, write_aside
from gigagan.common.pictures import MAX_BYTES, UndecodableError, decode
from gigagan.common.progress import Progress, silent

CAPTION = "a photo of a {label}"
LEFT_OUT = "left-out.parquet"
"""Key, path and reason of each picture that is neither in a shard nor held out."""
PICTURES_AT_ONCE = 200
"""Pictures that a worker reads before it tells their digests."""
Left = dict[str, str]
"""Path in SRC → why nothing is learnt from what is there: `kind: why`."""


class FoldersError(ValueError):
    """What cannot become a training set: where, why, and what to do about it."""


class Picture(NamedTuple):
    """A file that is said to be a picture of a class."""

    path: str
    """In SRC, with slashes."""
    label: str
    caption: str
    row: int
    """Its place in the list, or in its class's folder."""


Keyed = Mapping[str, Picture]
"""Pictures by the keys of their samples, in the order of these."""


def shard(
    src: Path,
    out: Path,
    config: FilterConfig,
    *,
    listed: Path | None = None,
    caption: str = CAPTION,
    heldout: int = 0,
    seed: int = 0,
    workers: int = 1,
    progress: Progress = silent,
) -> Report:
    """Write `out/RES/` as the filter stage does, of the pictures in `src` in an order by the seed.

    A picture's class is the folder directly in `src`, or what the file `listed` says; `caption`
    names it, where that has no caption. `heldout` pictures of each class go to `out/heldout`
    instead, in COCO's captions format. A second call writes only the shards that are missing. Of
    `config` sides, codec and size of the shards are read.

    Raises:
        FoldersError: fewer than two classes, one without a readable picture, or a bad list.
    """
    src = src.resolve()
    if not src.is_dir():
        raise FoldersError(f"{src} is no folder: give the one that the pictures are in")
    if out.resolve().is_relative_to(src):
        raise FoldersError(f"{out} is in {src}, whose folders are classes: give one beside it")
    if "{label}" not in caption or _fault(caption):
        raise FoldersError(f"caption {caption!r}: write {{label}} where the class is to be named")
    pictures, classes, left = _listed(listed, src, caption) if listed else _found(src, caption)
    order = np.random.default_rng(seed).permutation(len(pictures)).tolist()
    keyed = {f"{place:010d}": pictures[number] for place, number in enumerate(order)}
    digests = _digests(src, keyed, left, workers, progress)
    aside = _held_out(src, keyed, digests, heldout, left, progress)
    known = {digests[key] for key in aside}
    copies = [key for key, digest in digests.items() if digest in known and key not in aside]
    left |= {keyed[key].path: "same bytes: as a held-out picture" for key in copies}
    kept = [key for key in digests if key not in aside and keyed[key].path not in left]
    _demand_classes(src, classes, keyed, kept, left)
    if heldout:
        _write_heldout(src, out / "heldout", keyed, aside)
    chosen = {key: digests[key] for key in kept}
    lost = _write_shards(src, out, config, keyed, chosen, workers, progress)
    left |= {keyed[key].path: why for key, why in lost.items()}
    kept = [key for key in kept if key not in lost]
    _write_left(out / LEFT_OUT, keyed, left)
    try:
        _demand_classes(src, classes, keyed, kept, left)
    except FoldersError:
        for side in config.resolutions:  # nobody shall train on it
            (out / f"{side:03d}" / INDEX).unlink(missing_ok=True)
        raise
    report = _report(left, len(aside), Counter(keyed[key].label for key in kept))
    report.save(out / "report.json")
    return report


def _write_shards(
    src: Path,
    out: Path,
    config: FilterConfig,
    keyed: Keyed,
    digests: Mapping[str, str],
    workers: int,
    progress: Progress,
) -> dict[str, str]:
    """Key → why of the pictures that are in no shard after all."""
    kept = out / "kept.parquet"
    _write_kept(kept, src.name, keyed, digests)
    try:
        return shards.write(
            kept, src, out, config, workers=workers, progress=progress, opened=Files
        )
    except DamagedError as error:
        raise FoldersError(f"{src} changes while it is read: let it rest, and run again") from error


def _demand_classes(
    src: Path, classes: Sequence[str], keyed: Keyed, kept: Iterable[str], left: Left
) -> None:
    """Two classes at least, each with a picture to train on."""
    if len(classes) < 2:
        what = classes[0] if classes else "none"
        raise FoldersError(
            f"{src}: {len(classes)} class ({what}), and two at least are told apart: give a folder "
            "with a folder for each class directly in it, or a list with more labels"
        )
    if not (empty := sorted({*classes} - {keyed[key].label for key in kept})):
        return
    own = [picture.path for picture in keyed.values() if picture.label == empty[0]]
    why = next((f"{path}: {left[path]}" for path in own if path in left), left.get(empty[0]))
    others = f", nor have {len(empty) - 1:,} other classes" if empty[1:] else ""
    remedy = "mend or remove it, and run the same command again"
    if {*own} - {*left}:
        why, remedy = "what can be read of it is all held out", "lower --heldout"
    raise FoldersError(
        f"{src}: class {empty[0]!r} has no picture to train on{others} "
        f"({why or 'it holds no file'}): {remedy}"
    )


# ---- what is there -----------------------------------------------------------------------------


def _found(src: Path, caption: str) -> tuple[list[Picture], list[str], Left]:
    """Pictures by path, classes, and what is neither; hidden files (`.name`) are passed over."""
    pictures: list[Picture] = []
    classes: list[str] = []
    left: Left = {}
    for label in _names(src):
        if not (src / label).is_dir():
            left[_shown(label)] = "stray: in no folder of a class"
            continue
        if fault := _fault(label):
            raise FoldersError(f"{src}: the folder {label!r} has {fault}: give it another name")
        classes.append(label)
        worded = _worded(caption, label)
        for row, (path, is_file) in enumerate(_files(src, label)):
            if not is_file:
                left[_shown(path)] = "link: to a folder, which is not followed"
            elif fault := _fault(path):
                left[_shown(path)] = f"name: it has {fault}"
            else:
                pictures.append(Picture(path, label, worded, row))
    return pictures, classes, left


def _files(src: Path, path: str) -> Iterator[tuple[str, bool]]:
    """What is at a path and below, in an order by names, and whether it is no link to a folder."""
    if not (src / path).is_dir() or (src / path).is_symlink():
        yield path, not (src / path).is_dir()
        return
    for name in _names(src / path):
        yield from _files(src, f"{path}/{name}")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def _listed(file: Path, src: Path, caption: str) -> tuple[list[Picture], list[str], Left]:
    """Pictures and classes of a list.

    Raises:
        FoldersError: it cannot be read, or one of its rows cannot be what it should.
    """
    pictures: dict[str, Picture] = {}
    for number, row in enumerate(_rows(file), 1):
        texts = {name: " ".join((text or "").split()) for name, text in row.items()}
        path, label, worded = (row["path"] or "").strip(), texts["label"], texts.get("caption")
        where = f"{file}: row {number}"
        for name, text in (("path", path), ("label", label), ("caption", worded or "-")):
            if not text:
                raise FoldersError(f"{where} has no {name}: give it one, or take the row out")
            if fault := _fault(text) or ("a slash" if name == "label" and "/" in text else ""):
                raise FoldersError(f"{where}: {name} {text!r} has {fault}: write it without")
        inside = os.path.normpath(src / path)
        if inside == str(src) or not Path(inside).is_relative_to(src):
            raise FoldersError(f"{where}: path {path!r} leads out of {src}: take the row out")
        inside = Path(inside).relative_to(src).as_posix()
        if (before := pictures.get(inside)) is not None:
            raise FoldersError(
                f"{where}: path {path!r} is that of row {before.row}, and a picture is of one "
                "class: take one of them out"
            )
        pictures[inside] = Picture(inside, label, worded or _worded(caption, label), number)
    return [*pictures.values()], sorted({picture.label for picture in pictures.values()}), {}


def _rows(file: Path) -> Iterator[dict[str, str | None]]:
    """Path, label and, where there is such a column, caption of each row."""
    texts = csv.ConvertOptions(
        column_types=dict.fromkeys(("path", "label", "caption"), pa.string())
    )
    delimiters = {".csv": ",", ".tsv": "\t"}
    try:
        if file.suffix == ".parquet":
            table = pq.read_table(file)
        else:
            how = csv.ParseOptions(
                delimiter=delimiters[file.suffix], newlines_in_values=file.suffix == ".csv"
            )
            table = csv.read_csv(file, parse_options=how, convert_options=texts)
        names = ["path", "label", *({"caption"} & {*table.column_names})]
        if pa.types.is_floating(table["label"].type):
            raise ValueError("its labels are broken numbers, not text or integers")
        chosen = table.select(names)
        for batch in chosen.cast(pa.schema([(name, pa.string()) for name in names])).to_batches():
            yield from batch.to_pylist()
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        if isinstance(error, FoldersError):
            raise
        why = " ".join(str(error).split())
        raise FoldersError(
            f"{file} is no list of pictures ({why}): give a .csv, .tsv or .parquet with the "
            "columns path and label, and perhaps caption"
        ) from error


def _worded(caption: str, label: str) -> str:
    return caption.replace("{label}", label.replace("_", " "))


def _fault(text: str) -> str:
    """What a name must not have."""
    kinds = {unicodedata.category(character) for character in text}
    if "Cs" in kinds:  # how Python shows what it cannot read
        return "bytes that are not UTF-8"
    return "control characters" if "Cc" in kinds else "" if text.strip() else "nothing but blanks"


def _shown(path: str) -> str:
    return path.encode(errors="backslashreplace").decode()


# ---- pictures ----------------------------------------------------------------------------------


def contents(src: Path, path: str) -> bytes:
    """The bytes of a file in `src`, which is resolved.

    Raises:
        ValueError: it is none, has more than MAX_BYTES, or a link leads out of `src`.
        OSError: it cannot be read.
    """
    try:
        file = (src / path).resolve()
    except RuntimeError as error:
        raise ValueError("link: to itself") from error
    if not file.is_relative_to(src):
        raise ValueError("link: leads out of the folder")
    if not file.is_file():
        raise ValueError("no file: nothing is there, or no plain file")
    if (size := file.stat().st_size) > MAX_BYTES:
        raise ValueError(f"too many bytes: {size:,}, at most {MAX_BYTES:,} are read")
    return file.read_bytes()


class Files:
    """The originals of shards that are files of the user's; a row's `url` is its path."""

    def __init__(self, src: Path) -> None:
        self._src = src

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open."""

    def honoured(self) -> dict[str, bool | None]:
        """Nobody was asked."""
        return {}

    def read(self, row: Mapping[str, Any]) -> bytes | None:
        """The bytes that the digest is of; None if they are gone, or others."""
        try:
            data = contents(self._src, row["url"])
        except (OSError, ValueError):
            return None
        return data if hashlib.sha256(data).hexdigest() == row["sha256"] else None


@dataclass(frozen=True)
class _Chunk:
    """Some pictures, by key."""

    src: Path
    paths: dict[str, str]

    def __str__(self) -> str:
        return f"{self.src}: pictures from {next(iter(self.paths.values()))} on"


def _read(chunk: _Chunk) -> tuple[dict[str, str], Left]:
    """sha256 by key of the pictures that can be read, and why others cannot."""
    digests: dict[str, str] = {}
    left: Left = {}
    for key, path in chunk.paths.items():
        try:
            digests[key] = hashlib.sha256(contents(chunk.src, path)).hexdigest()
        except OSError as error:
            left[path] = f"unreadable: {error.strerror}"
        except ValueError as error:
            left[path] = str(error)
    return digests, left


def _digests(
    src: Path, keyed: Keyed, left: Left, workers: int, progress: Progress
) -> dict[str, str]:
    """sha256 of what can be read, in the order of keys."""
    paths = [(key, picture.path) for key, picture in keyed.items()]
    starts = range(0, len(paths), PICTURES_AT_ONCE)
    chunks = [_Chunk(src, dict(paths[start : start + PICTURES_AT_ONCE])) for start in starts]
    digests: dict[str, str] = {}
    done = 0
    for chunk, (read, lost) in each(_read, chunks, workers=workers):
        digests |= read
        left |= lost
        done += len(chunk.paths)
        progress("reading pictures", done, len(paths))
    return dict(sorted(digests.items()))


# ---- held out ----------------------------------------------------------------------------------


def _held_out(
    src: Path, keyed: Keyed, digests: Iterable[str], num: int, left: Left, progress: Progress
) -> dict[str, tuple[int, int]]:
    """The first `num` decodable pictures of each class by key, and their sizes, px."""
    chosen: dict[str, tuple[int, int]] = {}
    counts: Counter[str] = Counter()
    for key in digests if num else ():
        picture = keyed[key]
        if counts[picture.label] == num:
            continue
        try:
            chosen[key] = decoders.shared().run(_size, contents(src, picture.path))
        except (OSError, ValueError) as error:
            is_broken = isinstance(error, UndecodableError)
            left[picture.path] = f"{shards.UNDECODABLE}: {error}" if is_broken else str(error)
            continue
        counts[picture.label] += 1
        progress("looking at held-out pictures", len(chosen), None)
    return chosen


def _size(data: bytes) -> tuple[int, int]:
    return decode(data).size


def _write_heldout(
    src: Path, folder: Path, keyed: Keyed, sizes: Mapping[str, tuple[int, int]]
) -> None:
    """Copies of the pictures, and then COCO's captions format with each one's label."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, notes = [], []
    for number, (key, (width, height)) in enumerate(sizes.items(), 1):
        picture = keyed[key]
        suffix = Path(picture.path).suffix.lower()
        name = key + (suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else "")
        write_aside(folder / "images" / name, contents(src, picture.path))
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        said = {"caption": picture.caption, "label": picture.label}
        notes.append({"id": number, "image_id": number, **said})
    document = {"info": {"description": src.name}, "images": images, "annotations": notes}
    write_aside(folder / "captions.json", json.dumps(document, indent=1, ensure_ascii=False))


# ---- tables ------------------------------------------------------------------------------------


def _write_kept(path: Path, source: str, keyed: Keyed, digests: Mapping[str, str]) -> None:
    """What the shards are made of."""
    pictures = [keyed[key] for key in digests]
    known: dict[str, list[Any]] = {
        "key": [*digests],
        "url": [picture.path for picture in pictures],
        "caption": [picture.caption for picture in pictures],
        "label": [picture.label for picture in pictures],
        "source": [_shown(source)] * len(pictures),
        "row": [picture.row for picture in pictures],
        "sha256": [*digests.values()],
    }
    nothing = [None] * len(pictures)
    columns = [pa.array(known.get(field.name, nothing), field.type) for field in SCORES]
    path.parent.mkdir(parents=True, exist_ok=True)
    with filled_aside(path) as partial:
        table = pa.table(columns, schema=SCORES)
        pq.write_table(table, partial, row_group_size=shards.ROWS_AT_ONCE)


def _write_left(path: Path, keyed: Keyed, left: Left) -> None:
    keys = {picture.path: key for key, picture in keyed.items() if picture.path in left}
    rows = [{"key": keys.get(p), "path": p, "reason": left[p]} for p in sorted(left)]
    schema = pa.schema([(name, pa.string()) for name in ("key", "path", "reason")])
    with filled_aside(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema), partial)


def _report(left: Left, num_heldout: int, trained: Counter[str]) -> Report:
    kinds = Counter(why.partition(":")[0] for why in left.values())
    counts = {"ok": trained.total(), "held out": num_heldout, **kinds}
    funnel = [Step("found", 0, sum(counts.values()))]
    for name in (*sorted(kinds), "held out"):
        funnel.append(Step(name, counts[name], funnel[-1].rows - counts[name]))
    metrics = {"pictures": funnel[0].rows, "kept": funnel[-1].rows, "classes": len(trained)}
    details = {"classes": dict(sorted(trained.items()))}
    return Report(counts, funnel, {name: float(n) for name, n in metrics.items()}, details)
