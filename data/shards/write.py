"""Kept rows → training shards: one set of webdataset tars per resolution, the same to the byte."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import re
import tarfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data import originals
from data.config import FilterConfig
from data.executor import each
from data.layout import shard_of
from data.shards.manifest import INDEX, KEY, SIDECAR, Entry, Index
from gigagan.common import decoders, tars
from gigagan.common.files import PARTIAL, flush, write_aside
from gigagan.common.pictures import UndecodableError, decode, square
from gigagan.common.progress import Progress, silent

FORMAT = 4
"""Goes up when the same rows give other bytes, so that no set mixes the two."""
COLUMNS = (
    "key", "url", "caption", "label", "source", "row", "sha256", "asked_from",
    "asked_until", "width", "height", "similarity", "aesthetic", "unsafe", "watermark", "phash",
    "language",
)  # fmt: skip
"""What is read of the kept rows."""
PROVENANCE = ("key", "label", "source", "row", "url", "sha256", "language")
SCORES = ("similarity", "aesthetic", "unsafe", "watermark")
RECIPE, BYTES, DIGEST, LACKS = b"recipe", b"tar_bytes", b"tar_sha256", b"lacks"
"""Metadata of a sidecar: what its shard was made from, what came of it, and of how many rows it
lacks the pictures."""
DAMAGED, UNDECODABLE = "damaged original", "undecodable original"
"""Why a kept row can be in no shard."""
ROWS_AT_ONCE = 4096


class ShardError(ValueError):
    """A training shard that cannot be written: which, and why."""


class Labels(NamedTuple):
    """What is labelled in a shard."""

    classes: frozenset[str]
    unlabelled: int
    """Samples that have no label."""


class Written(NamedTuple):
    """What became of one training shard."""

    entries: dict[int, Entry]
    """The shard's entry in the index by side; empty where no picture was left."""
    labels: dict[int, Labels]
    """What its samples are labelled by side; of the same sides."""
    lost: dict[str, str]
    """Key → why its picture is in no tar: `DAMAGED`, or `UNDECODABLE` with a reason."""


class Originals(Protocol):
    """Where the pictures of kept rows are; used as a context, by one process."""

    def __enter__(self) -> Originals: ...

    def __exit__(self, *_: object) -> None: ...

    def read(self, row: Mapping[str, Any]) -> bytes | None:
        """The bytes of a row's picture; None if they are gone, or others."""

    def honoured(self) -> dict[str, bool | None]:
        """Which reservations were asked for when they were fetched."""


@dataclass(frozen=True)
class ShardJob:
    """One training shard in all resolutions: kept rows [start, stop)."""

    kept: Path
    download: Path
    out: Path
    number: int
    start: int
    stop: int
    sides: tuple[int, ...]
    codec: Literal["png", "jpg"]
    opened: Callable[[Path], Originals] | None = None
    """Where the pictures are; of a download of ours when None."""

    def __str__(self) -> str:
        return f"{self.out}: training shard {self.name}"

    @property
    def name(self) -> str:
        """Name of its tars, without suffix."""
        return f"train-{self.number:05d}"

    def originals(self) -> Originals:
        """Where its pictures are."""
        return (self.opened or Downloaded)(self.download)

    def folder(self, side: int) -> Path:
        """Folder of the set with this side that it belongs to."""
        return self.out / f"{side:03d}"


def write(
    kept: Path,
    download: Path,
    out: Path,
    config: FilterConfig,
    *,
    workers: int = 1,
    backend: Literal["processes", "ray"] = "processes",
    progress: Progress = silent,
    opened: Callable[[Path], Originals] | None = None,
) -> dict[str, str]:
    """Write `out/RES/`: tars, their sidecars, and last `index.json`, one set per resolution.

    `kept` is Parquet with schema.SCORES, sorted by key. The download's order is a seeded shuffle,
    so that shard n is simply rows [n·S, (n+1)·S), and a fair sample. A second call writes only
    what is missing, was made from other rows, or lacks a picture. `opened` reads pictures that
    were not downloaded by us: it is given `download`.

    Returns key → why (`DAMAGED`, `UNDECODABLE: …`) of rows that are in no shard, because their
    pictures are not those that were scored.

    Raises:
        DamagedError: too many are damaged.
        TaskError: a shard cannot be written.
    """
    num_rows = pq.read_metadata(kept).num_rows
    for side in config.resolutions:
        (out / f"{side:03d}").mkdir(parents=True, exist_ok=True)
    jobs = _jobs(kept, download, out, config, num_rows, opened)
    found: dict[int, Written] = {}
    lost: dict[str, str] = {}
    done = 0
    for job, written in each(write_shard, jobs, workers=workers, backend=backend):
        found[job.number] = written
        lost |= written.lost
        if damaged := [key for key, why in lost.items() if why == DAMAGED]:
            originals.refuse_many(len(damaged), num_rows, min(damaged), download)
        done += job.stop - job.start
        progress("writing training shards", done, num_rows)
    for side in config.resolutions:
        write_index(out / f"{side:03d}", _index(side, config.codec, found))
    return lost


def _index(side: int, codec: Literal["png", "jpg"], found: dict[int, Written]) -> Index:
    """The index of one resolution, of what was written by number of the shard."""
    made = [found[number] for number in sorted(found) if side in found[number].entries]
    shards = tuple(written.entries[side] for written in made)
    labels = [written.labels[side] for written in made]
    return Index(
        resolution=side,
        codec=codec,
        samples=sum(entry.samples for entry in shards),
        classes=tuple(sorted({name for label in labels for name in label.classes})),
        unlabelled=sum(label.unlabelled for label in labels),
        shards=shards,
    )


def _jobs(
    kept: Path,
    download: Path,
    out: Path,
    config: FilterConfig,
    num_rows: int,
    opened: Callable[[Path], Originals] | None,
) -> Iterator[ShardJob]:
    size = config.samples_per_shard
    for number, start in enumerate(range(0, num_rows, size)):
        stop = min(start + size, num_rows)
        sides = config.resolutions
        yield ShardJob(kept, download, out, number, start, stop, sides, config.codec, opened)


def write_index(folder: Path, index: Index) -> None:
    """Write the index, unless it is there already, after removing what it does not name."""
    path, text = folder / INDEX, index.text()
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    path.unlink(missing_ok=True)
    named = {name for entry in index.shards for name in (entry.name, entry.sidecar)}
    for stray in folder.glob("train-*"):
        if stray.name not in named and stray.suffix in (".tar", ".parquet", PARTIAL):
            stray.unlink()
    write_aside(path, text)


# One shard --------------------------------------------------------------------------------------


def write_shard(job: ShardJob) -> Written:
    """Write one shard in each resolution that lacks it.

    Each picture is decoded once, by a process of its own. One picture and the table of rows is all
    this one keeps in memory. Files appear whole, the sidecar after its tar.

    Raises:
        ShardError: the rows are none of ours.
    """
    honoured = job.originals().honoured()
    rows = [row | {"honoured": honoured} for row in _rows(job)]
    recipes = {side: _recipe(rows, side, job.codec) for side in job.sides}
    found = {side: _finished(job, side, recipes[side]) for side in job.sides}
    todo = [side for side, entry in found.items() if entry is None]
    made, lost = _make(job, rows, {side: recipes[side] for side in todo}) if todo else ({}, {})
    entries = {side: entry for side, entry in found.items() if entry is not None} | made
    return Written(entries, {side: _labels(job.folder(side) / job.name) for side in entries}, lost)


def _make(
    job: ShardJob, rows: list[dict[str, Any]], recipes: Mapping[int, str]
) -> tuple[dict[int, Entry], dict[str, str]]:
    """Write the shard in these resolutions: its entries, and the rows that are in none."""
    sets = {side: ShardWriter(job.folder(side), job.name) for side in recipes}
    lost: dict[str, str] = {}
    try:
        with job.originals() as pictures:
            for row in rows:
                data = pictures.read(row)
                if data is None:
                    lost[row["key"]] = DAMAGED
                    continue
                try:
                    made = decoders.shared().run(drawn, data, tuple(recipes), job.codec)
                except UndecodableError as error:
                    lost[row["key"]] = f"{UNDECODABLE}: {error}"
                    continue
                for side, picture in made.items():
                    sets[side].add(row, picture, job.codec)
        if len(lost) == len(rows):
            return {}, lost
        return {n: sets[n].commit(recipes[n], lacks=len(lost)) for n in recipes}, lost
    finally:
        for one in sets.values():
            one.discard()


def drawn(data: bytes, sides: tuple[int, ...], codec: str) -> dict[int, bytes]:
    """The training pictures of an original by their sides, each resized once from it.

    Raises:
        UndecodableError: it is not a whole picture.
    """
    image = decode(data)
    return {side: encoded(square(image, side), codec) for side in sides}


def encoded(image: Image.Image, codec: str) -> bytes:
    """A training picture as it goes into a tar."""
    buffer = io.BytesIO()
    if codec == "png":
        image.save(buffer, "PNG", compress_level=6)
    else:
        image.save(buffer, "JPEG", quality=95, subsampling=0)  # 4:4:4: every pixel its own colour
    return buffer.getvalue()


# Rows -------------------------------------------------------------------------------------------


def _rows(job: ShardJob) -> list[dict[str, Any]]:
    """The kept rows of the shard; no more of the table is ever in memory."""
    with pq.ParquetFile(job.kept) as file:
        groups, first = _row_groups(file, job.start, job.stop)
        rows: list[dict[str, Any]] = []
        for batch in file.iter_batches(ROWS_AT_ONCE, groups, columns=[*COLUMNS]):
            begin, end = max(job.start - first, 0), min(job.stop - first, batch.num_rows)
            if begin < end:
                rows += batch.slice(begin, end - begin).to_pylist()
            first += batch.num_rows
            if first >= job.stop:
                break
    _check_keys(job, [row["key"] for row in rows])
    return rows


def _row_groups(file: pq.ParquetFile, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that hold rows [start, stop), and the number of the first row of the first."""
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    begins = [0, *itertools.accumulate(sizes)]
    groups = [g for g in range(len(sizes)) if begins[g] < stop and begins[g + 1] > start]
    return groups, begins[groups[0]]


def _check_keys(job: ShardJob, keys: list[str]) -> None:
    for key in keys:
        if not re.match(KEY, key):
            raise ShardError(f"{job.kept}: key {key!r} is none of ours")
    if any(a >= b for a, b in itertools.pairwise(keys)) or len(keys) != job.stop - job.start:
        raise ShardError(f"{job.kept}: its keys do not ascend: sort it by key")


def _provenance(row: dict[str, Any]) -> dict[str, Any]:
    """What is known of one sample, as it goes beside its picture."""
    known = {name: row[name] for name in PROVENANCE}
    asked = {"checked_from": _iso(row["asked_from"]), "checked_until": _iso(row["asked_until"])}
    return {
        **known,
        "width": row["width"],
        "height": row["height"],
        "phash": None if row["phash"] is None else f"{row['phash']:016x}",
        **{name: _short(row[name]) for name in SCORES},
        "opt_out": {**asked, **row["honoured"]},
    }


def _short(value: float | None) -> float | None:
    """The shortest decimal that is this float32; JSON knows no NaN."""
    if value is None or not math.isfinite(value):
        return None
    return float(str(np.float32(value)))


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="milliseconds")


def _recipe(rows: list[dict[str, Any]], side: int, codec: str) -> str:
    """Digest of all that decides the bytes of a shard."""
    told = [[row["caption"], _provenance(row)] for row in rows]
    return hashlib.sha256(_json([FORMAT, side, codec, told])).hexdigest()


def _json(document: object) -> bytes:
    return json.dumps(document, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()


# Originals --------------------------------------------------------------------------------------


class Downloaded:
    """Downloaded pictures by key. Asked in the order of keys, it opens each tar once."""

    def __init__(self, download: Path) -> None:
        self._download = download
        self._tar: Path | None = None
        self._file: io.FileIO | None = None
        self._members: dict[str, tars.Member] = {}

    def __enter__(self) -> Downloaded:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def honoured(self) -> dict[str, bool | None]:
        """Which reservations the download asked for; it keeps no picture that has one of them."""
        plan = self._download / "plan.json"
        said = json.loads(plan.read_text(encoding="utf-8")) if plan.exists() else {}
        return {name: said.get(name) for name in ("honour_opt_outs", "honour_robots_txt")}

    def read(self, row: Mapping[str, Any]) -> bytes | None:
        """The bytes as they were downloaded; None if they are gone, or others."""
        key, sha256 = row["key"], row["sha256"]
        shard = shard_of(self._download, key)
        if shard.tar != self._tar:
            self._open(shard.tar)
        if self._file is None or (member := self._members.get(shard.member(key))) is None:
            return None
        data = b""
        with suppress(OSError):  # of a bad block of the disk
            data = tars.read(self._file, member)
        return data if hashlib.sha256(data).hexdigest() == sha256 else None

    def _open(self, tar: Path) -> None:
        self._close()
        self._tar, self._members = tar, {}
        with suppress(OSError):
            self._file = tar.open("rb", buffering=0)
            for member in tars.members(self._file):
                self._members.setdefault(member.name, member)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._tar = None, None


# Tars and sidecars ------------------------------------------------------------------------------


class ShardWriter:
    """One tar of one resolution with its sidecar, written aside until committed."""

    def __init__(self, folder: Path, name: str) -> None:
        self._stem = folder / name
        self._index = folder / INDEX
        self._partial = folder / f"{name}.{uuid.uuid4().hex}{PARTIAL}"
        self._file = self._partial.open("wb")
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any], picture: bytes, codec: str) -> None:
        """Append a sample: picture, caption and provenance."""
        key, caption = row["key"], row["caption"]
        digest = hashlib.sha256(picture).hexdigest()
        offset = self._member(f"{key}.{codec}", picture)
        self._member(f"{key}.txt", caption.encode())
        self._member(f"{key}.json", _json({**_provenance(row), "picture_sha256": digest}))
        values = (key, caption, row["label"], offset, len(picture), digest)
        self._rows.append(dict(zip(SIDECAR.names, values, strict=True)))

    def _member(self, name: str, data: bytes) -> int:
        """Where its bytes begin. The header has no times, owners or modes of this machine."""
        header = tarfile.TarInfo(name)
        header.size = len(data)
        self._put(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._bytes
        self._put(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def commit(self, recipe: str, *, lacks: int = 0) -> Entry:
        """Put tar, then sidecar in place. There is no index from before until after."""
        self._put(bytes(2 * tarfile.BLOCKSIZE))
        self._put(bytes(-self._bytes % tarfile.RECORDSIZE))
        self._file.close()
        flush(self._partial)
        digest = self._digest.hexdigest()
        told = {RECIPE: recipe, BYTES: str(self._bytes), DIGEST: digest}
        told |= {LACKS: str(lacks)} if lacks else {}
        table = pa.Table.from_pylist(self._rows, SIDECAR.with_metadata(told))

        tar, sidecar = _tar(self._stem), _sidecar(self._stem)
        self._index.unlink(missing_ok=True)
        sidecar.unlink(missing_ok=True)
        self._partial.replace(tar)
        pq.write_table(table, self._partial, compression="zstd")
        flush(self._partial)
        self._partial.replace(sidecar)
        return _entry(self._stem, len(self._rows), self._bytes, digest)

    def discard(self) -> None:
        """Leave nothing that was not committed."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


def _tar(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.tar")


def _sidecar(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.parquet")


def _entry(stem: Path, samples: int, num_bytes: int, digest: str) -> Entry:
    data = _sidecar(stem).read_bytes()
    return Entry(
        name=_tar(stem).name,
        samples=samples,
        bytes=num_bytes,
        sha256=digest,
        index_bytes=len(data),
        index_sha256=hashlib.sha256(data).hexdigest(),
    )


def _labels(stem: Path) -> Labels:
    """By the sidecar of a shard that is done."""
    labels = pq.read_table(_sidecar(stem), columns=["label"])["label"]
    return Labels(frozenset(labels.drop_null().unique().to_pylist()), labels.null_count)


def _finished(job: ShardJob, side: int, recipe: str) -> Entry | None:
    """The shard's entry, if an earlier call has written it from these very rows."""
    stem = job.folder(side) / job.name
    try:
        told = pq.read_schema(_sidecar(stem)).metadata or {}
        num_bytes, digest = int(told[BYTES]), told[DIGEST].decode()
        if told[RECIPE].decode() != recipe or _tar(stem).stat().st_size != num_bytes:
            return None
        if LACKS in told:  # what was damaged may have been fetched again
            return None
    except (OSError, KeyError, ValueError, pa.ArrowException):  # none, or of another format
        return None
    return _entry(stem, job.stop - job.start, num_bytes, digest)
