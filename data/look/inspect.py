"""What is in a shard or a table, as text and as a contact sheet. Trusts nothing, writes one sheet.

Names in a tar are shown, never used as paths; nothing is unpickled; a damaged tar is read as far as
it goes.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image, UnidentifiedImageError

from data.look.sheet import CELL_PX, Tile, contact_sheet
from data.look.tables import describe_tables
from data.look.tables import opened as opened_table
from gigagan.common import decoders
from gigagan.common.pictures import decode, opened
from gigagan.common.progress import Progress, amount, silent

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "avif", "bmp", "tif", "tiff")
"""Kinds of members that hold pictures."""
MOST_BYTES = 200_000_000
"""A longer member is not read."""
_MOST_NAMED = 5


def look(
    path: Path,
    *,
    sheet: Path | None = None,
    num: int = 48,
    seed: int = 0,
    quick: bool = False,
    progress: Progress = silent,
) -> str:
    """Describe a tar, a Parquet, or a folder of either; draw `num` pictures of tars on a sheet.

    `quick` decodes only the pictures of the sheet, so that damaged ones among the others, whose
    headers are good, go unseen.

    Raises:
        ValueError: nothing there that could be described, or no picture for the sheet.
    """
    tars, tables = _contents(path)
    if not tars:
        if sheet is not None:
            raise ValueError(f"{path} holds no pictures: a contact sheet needs a tar")
        return describe_tables(tables)
    seen = Findings(_Draw(num if sheet is not None else 0, seed), quick)
    for number, tar in enumerate(tars, start=1):
        seen.read(tar)
        progress("shards", number, len(tars))
    if not seen.samples and seen.broken:
        raise ValueError(f"{path} holds no sample: {seen.broken[0]}")
    if sheet is not None:
        title = f"{path.name}: {len(seen.draw)} of {seen.samples:,} samples"
        _save(contact_sheet(seen.draw.tiles(), columns=8, title=title), sheet)
    beside = [table for tar in tars if (table := tar.with_suffix(".parquet")).is_file()]
    return "\n".join([str(path), *seen.lines(len(tars)), *_beside(beside, seen.samples)])


def _contents(path: Path) -> tuple[list[Path], list[Path]]:
    """The tars and the tables that a path means."""
    if path.is_dir():
        tars, tables = sorted(path.rglob("*.tar")), sorted(path.rglob("*.parquet"))
    else:
        is_table = path.suffix == ".parquet"
        tars, tables = ([], [path]) if is_table else ([path], [])
    if not (tars or tables) or not path.exists():
        raise ValueError(f"{path}: no tar or Parquet is there")
    return tars, tables


def _save(picture: Image.Image, sheet: Path) -> None:
    if sheet.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"{sheet}: a contact sheet is a .png or .jpg")
    sheet.parent.mkdir(parents=True, exist_ok=True)
    picture.save(sheet)


def _beside(tables: list[Path], samples: int) -> Iterator[str]:
    """What the Parquets beside the tars say."""
    if not tables:
        return
    rows, status = 0, Counter[str]()
    for table in tables:
        with opened_table(table) as file:
            rows += file.metadata.num_rows
            if "status" in file.schema_arrow.names:
                status.update(map(str, file.read(["status"])["status"].to_pylist()))
    yield _row(
        "beside", f"{len(tables):,} Parquet, {rows:,} rows" + _differs(rows, samples, status)
    )
    if status:
        yield _row("", _counted(status))


def _differs(rows: int, samples: int, status: Counter[str]) -> str:
    expected = status.get("success", 0) if status else rows
    return "" if expected == samples else f": {expected:,} of them should be in the tars"


# ---- one tar -----------------------------------------------------------------------------------


@dataclass
class _Sample:
    """Members that share a key, as far as they could be read."""

    shard: str
    key: str
    picture: bytes | None = None
    kind: str = ""
    caption: str | None = None
    about: dict[str, Any] = field(default_factory=dict)


@dataclass
class Findings:
    """What was seen in the tars, summed up as they are read."""

    draw: _Draw
    quick: bool
    samples: int = 0
    num_bytes: int = 0
    members: Counter[str] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    """Lengths of the captions, in characters."""
    labels: Counter[str] = field(default_factory=Counter)
    without: Counter[str] = field(default_factory=Counter)
    damaged: list[str] = field(default_factory=list)
    """Members that cannot be read, with the reason."""
    duplicates: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Tars that end early, with the place."""
    strange: list[str] = field(default_factory=list)
    """Members that are no plain file, or whose name is a path."""
    _keys: set[int] = field(default_factory=set)
    """Hashes of keys: a folder may hold millions."""

    def read(self, path: Path) -> None:
        """Take in one tar."""
        self.num_bytes += path.stat().st_size
        sample = None
        for name, data in self._members(path):
            folder, slash, last = name.rpartition("/")
            stem, _, kind = last.partition(".")
            key = f"{folder}{slash}{stem}"
            if sample is None or key != sample.key:
                self._finish(sample)
                sample = self._begin(path, key)
            self._take(sample, kind.lower(), data, f"{path.name}:{_safe(name)}")
        self._finish(sample)

    def _members(self, path: Path) -> Iterator[tuple[str, bytes]]:
        """Plain files with their bytes, up to the first damage."""
        with path.open("rb") as file:
            reached = 0
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while (member := tar.next()) is not None:
                        reached = member.offset
                        if (data := self._bytes(path, tar, member)) is not None:
                            yield member.name, data
                        tar.members.clear()  # type: ignore[attr-defined]  # a list grows per shard
                    reached = tar.offset
                self._check_end(path, file, reached)
            except (tarfile.TarError, OSError, ValueError, EOFError) as error:
                self.broken.append(f"{path.name} breaks at byte {reached:,}: {error}")

    def _bytes(self, path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
        place = f"{path.name}:{_safe(member.name)}"
        if not member.isfile() or member.issparse():
            self.strange.append(f"{place} is not a plain file")
            return None
        if member.name.startswith("/") or ".." in member.name.split("/"):
            self.strange.append(f"{place} would leave its folder")
        if member.size > MOST_BYTES:
            self.strange.append(f"{place} has {member.size:,} bytes, and is not read")
            return None
        source = tar.extractfile(member)
        assert source is not None, "a plain file has bytes"
        data = source.read()
        if len(data) != member.size:
            raise tarfile.ReadError(f"{_safe(member.name)} is cut short")
        return data

    def _check_end(self, path: Path, file: Any, offset: int) -> None:
        """A whole tar ends in zeros; tarfile takes any wrong header for the end."""
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if not block:
            self.broken.append(f"{path.name} ends at byte {offset:,} without an end mark")
        elif block.strip(b"\0"):
            size = path.stat().st_size
            self.broken.append(
                f"{path.name} breaks at byte {offset:,} of {size:,}: no tar header is there"
            )

    def _begin(self, path: Path, key: str) -> _Sample:
        self.samples += 1
        if hash(key) in self._keys:
            self.duplicates.append(f"{path.name}:{_safe(key)}")
        self._keys.add(hash(key))
        return _Sample(path.name, key)

    def _take(self, sample: _Sample, kind: str, data: bytes, place: str) -> None:
        """Add a member to its sample."""
        self.members[kind or "(none)"] += 1
        if kind in PICTURES:
            if sample.picture is not None and sample.kind == kind:
                self.duplicates.append(place)
            sample.picture, sample.kind = data, kind
        elif kind == "txt":
            sample.caption = data.decode("utf-8", errors="replace")
            if "�" in sample.caption:
                self.damaged.append(f"{place} is not UTF-8")
        elif kind == "json":
            try:
                about = json.loads(data)
            except (ValueError, RecursionError) as error:
                self.damaged.append(f"{place} is not JSON ({_safe(str(error))})")
                return
            sample.about = about if isinstance(about, dict) else {}

    def _finish(self, sample: _Sample | None) -> None:
        """Take stock of a sample, and draw it perhaps."""
        if sample is None:
            return
        caption = sample.caption
        if caption is None and isinstance(sample.about.get("caption"), str):
            caption = sample.about["caption"]
        self.without["picture"] += sample.picture is None
        self.without["caption"] += not caption
        if caption:
            self.lengths.append(len(caption))
        if isinstance(label := sample.about.get("label"), str):
            self.labels[label] += 1
        lot = self.draw.lot(sample)
        image, fault, format_name = self._picture(sample, lot is not None)
        if lot is not None:
            self.draw.put(lot, sample, _tile(sample, caption or "", image, fault, format_name))

    def _picture(
        self, sample: _Sample, is_drawn: bool
    ) -> tuple[Image.Image | None, str | None, str]:
        """The picture where it is needed, what is wrong with it, and its size and codec."""
        if sample.picture is None:
            return None, "no picture", ""
        image, fault, described = None, None, ""
        try:
            codec, size = decoders.shared().run(_header, sample.picture)
            described = f"{size[0]}×{size[1]} {codec}, {amount(len(sample.picture), True)}"
            if is_drawn or not self.quick:
                image = decoders.shared().run(decode, sample.picture, at_least=CELL_PX)
        except UnidentifiedImageError:
            fault = "not a picture"
        except Exception as error:  # codecs raise anything on hostile bytes
            fault = _safe(str(error))
        else:
            self.codecs[codec] += 1
            self.sizes[size] += 1
        if fault is not None:
            self.damaged.append(f"{sample.shard}:{_safe(sample.key)}.{sample.kind}: {fault}")
        return image, fault, described

    def lines(self, num_tars: int) -> Iterator[str]:
        """The findings, a line each."""
        yield _row("tars", f"{num_tars:,}, {amount(self.num_bytes, True)}")
        yield _row("samples", f"{self.samples:,}")
        yield _row("members", _counted(self.members))
        yield _row("codecs", _counted(self.codecs))
        yield _row("sizes", _sizes(self.sizes))
        if self.lengths:
            low, high = min(self.lengths), max(self.lengths)
            text = f"{low:,} to {high:,} characters, median {median(self.lengths):,.0f}"
            yield _row("captions", f"{len(self.lengths):,}, {text}")
        if self.labels:
            yield _row("classes", f"{len(self.labels):,}: {_counted(self.labels)}")
        for what, count in self.without.items():
            if count:
                yield _row("", f"{count:,} samples without {what}")
        yield _row("duplicate keys", _named(self.duplicates))
        note = " (headers only: --quick)" if self.quick else ""
        yield _row("damaged", _named(self.damaged) + note)
        if self.strange:
            yield _row("strange", _named(self.strange))
        if self.broken:
            yield _row("broken tars", _named(self.broken))


def _header(picture: bytes) -> tuple[str, tuple[int, int]]:
    """Codec and size, px."""
    with opened(picture) as header:
        return str(header.format), header.size


def _tile(
    sample: _Sample, caption: str, image: Image.Image | None, fault: str | None, described: str
) -> Tile:
    if image is not None:
        image.thumbnail((CELL_PX, CELL_PX), Image.Resampling.LANCZOS)
    notes = [described] if described else []
    return Tile(
        image, [caption or "(no caption)", *notes, sample.key[-40:], *filter(None, [fault])]
    )


class _Draw:
    """A seeded choice of samples of which only the chosen are held."""

    def __init__(self, num: int, seed: int) -> None:
        self._num, self._seed = num, seed
        self._heap: list[tuple[int, str, str, int, Tile]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._heap)

    def lot(self, sample: _Sample) -> int | None:
        """The sample's place in the draw, if it is in so far."""
        text = f"{self._seed} {sample.shard} {sample.key}".encode(errors="surrogatepass")
        lot = -int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
        is_in = len(self._heap) < self._num or (self._num > 0 and lot > self._heap[0][0])
        return lot if is_in else None

    def put(self, lot: int, sample: _Sample, tile: Tile) -> None:
        """Hold the sample's tile, and let the last one go when there are too many."""
        self._count += 1
        heapq.heappush(self._heap, (lot, sample.shard, sample.key, self._count, tile))
        if len(self._heap) > self._num:
            heapq.heappop(self._heap)

    def tiles(self) -> list[Tile]:
        """The chosen ones, in the order of shards and keys."""
        return [entry[4] for entry in sorted(self._heap, key=lambda entry: entry[1:4])]


# ---- words -------------------------------------------------------------------------------------


def _row(name: str, text: str) -> str:
    return f"  {name:<15} {text}"


def _counted(counts: Counter[str]) -> str:
    common = [f"{_safe(name)} {count:,}" for name, count in counts.most_common(12)]
    rest = len(counts) - len(common)
    return ", ".join(common or ["none"]) + (f", and {rest:,} other kinds" if rest else "")


def _sizes(sizes: Counter[tuple[int, int]]) -> str:
    """The one size, or the most common with the extremes of the short side."""
    if len(sizes) <= 1:
        return "".join(f"{w}×{h} px" for w, h in sizes) or "none"
    short = sorted(min(size) for size in sizes.elements())
    common = ", ".join(f"{w}×{h} ({count:,})" for (w, h), count in sizes.most_common(3))
    text = f"short side {short[0]:,} to {short[-1]:,} px, median {median(short):,.0f}"
    return f"{text}; most often {common}"


def _named(items: list[str]) -> str:
    """How many, and the first few."""
    if not items:
        return "none"
    first: Iterable[str] = (f"\n{'':18}{item}" for item in items[:_MOST_NAMED])
    rest = len(items) - _MOST_NAMED
    return f"{len(items):,}" + "".join(first) + (f"\n{'':18}and {rest:,} more" if rest > 0 else "")


def _safe(text: str) -> str:
    """Someone else's text for a terminal: no control characters, not too long."""
    shown = "".join(c if c.isprintable() else "�" for c in text[:120])
    return shown + ("…" if len(text) > 120 else "")
