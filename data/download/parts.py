"""One part of a download on disk: its list, its image shards, and the fates of its rows.

Counts decide: a shard is done when its statistics, its table and its tar agree to the row.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.download.processes import VETTED
from data.layout import PART_DIGITS, SHARD_DIGITS, ImageShard, row_digits
from data.schema import FATES, with_label
from gigagan.common import tars
from gigagan.common.files import filled_aside

HOSTS = 1000
"""Hosts that a part's summary names; the seeded order spreads every host over all parts."""
OPT_OUTS = frozenset({"opt_out", "robots_txt"})
"""Fates by which a site owner's wish was followed."""


class UnvettedFetchError(RuntimeError):
    """img2dataset fetched by itself, without our limits."""


class DamagedShardError(ValueError):
    """Files of a shard that contradict one another."""


class Done(NamedTuple):
    """A shard that is done."""

    rows: int
    """Rows of its table: pictures and refusals."""
    num_bytes: int
    """Bytes of its pictures."""


@dataclass
class Summary:
    """What a report needs to know of a part; stands in the metadata of its fates."""

    fates: Counter[str] = field(default_factory=Counter)
    hosts: Counter[str] = field(default_factory=Counter)
    """Failures by host, opt-outs apart."""
    opt_outs: Counter[str] = field(default_factory=Counter)
    """Opt-outs by what said so: a file, or the name of a header."""
    num_bytes: int = 0

    def add(self, other: Summary) -> None:
        """Take in another part's; only the worst hosts are kept."""
        self.fates += other.fates
        self.opt_outs += other.opt_outs
        self.hosts = Counter(dict((self.hosts + other.hosts).most_common(HOSTS)))
        self.num_bytes += other.num_bytes

    def count(self, fates: pa.Table) -> None:
        """Take in a shard's rows."""
        columns = (fates[name].to_pylist() for name in ("url", "fate", "detail"))
        for url, fate, detail in zip(*columns, strict=True):
            self.fates[fate] += 1
            if fate in OPT_OUTS:
                self.opt_outs[_said(fate, detail or "")] += 1
            elif fate != "ok":
                self.hosts[_host(url)] += 1

    def dump(self) -> str:
        """As JSON."""
        hosts = dict(self.hosts.most_common(HOSTS))
        return json.dumps(
            {
                "fates": self.fates,
                "hosts": hosts,
                "opt_outs": self.opt_outs,
                "num_bytes": self.num_bytes,
            }
        )

    @classmethod
    def load(cls, path: Path) -> Summary:
        """The summary in the metadata of a part's fates."""
        found = json.loads((pq.read_metadata(path).metadata or {})[b"summary"])
        counters = {name: Counter(found[name]) for name in ("fates", "hosts", "opt_outs")}
        return cls(**counters, num_bytes=found["num_bytes"])


@dataclass(frozen=True)
class Part:
    """One list, one run of img2dataset, one folder of shards."""

    root: Path
    number: int
    rows: int
    rows_per_shard: int

    @property
    def name(self) -> str:
        """PPPPP."""
        return f"{self.number:0{PART_DIGITS}d}"

    @property
    def images(self) -> Path:
        """Folder of its shards."""
        return self.root / "images" / self.name

    @property
    def fates(self) -> Path:
        """Written last: the part is done."""
        return self.root / "fates" / f"{self.name}.parquet"

    @property
    def num_shards(self) -> int:
        """Number of shards, the last of which may be short."""
        return -(-self.rows // self.rows_per_shard)

    def shard(self, number: int) -> ImageShard:
        """One of its shards."""
        return ImageShard(self.root, self.number, number)

    def rows_of(self, number: int) -> int:
        """Rows of one shard."""
        return min(self.rows_per_shard, self.rows - number * self.rows_per_shard)

    def keys(self, number: int) -> list[str]:
        """Of the rows of one shard, as img2dataset forms them."""
        digits = row_digits(self.rows_per_shard)
        shard = f"{number:0{SHARD_DIGITS}d}"
        rows = range(self.rows_of(number))
        return [shard + (f"{row:0{digits}d}" if digits else "") for row in rows]

    def listed(self) -> Iterator[pa.Table]:
        """The part's list, a shard's rows at a time."""
        held: list[pa.Table] = []
        with pq.ParquetFile(self.root / "lists" / f"{self.name}.parquet") as file:
            for batch in file.iter_batches(self.rows_per_shard):
                table = pa.concat_tables([*held, pa.Table.from_batches([batch])])
                while table.num_rows >= self.rows_per_shard:
                    yield table.slice(0, self.rows_per_shard)
                    table = table.slice(self.rows_per_shard)
                held = [table] if table.num_rows else []
        yield from held

    def write_requests(self, path: Path, *, verify_hashes: bool) -> None:
        """What img2dataset is given in the place of URLs."""
        schema = pa.schema([("request", pa.string())])
        with pq.ParquetWriter(path, schema) as writer:
            for listed in self.listed():
                writer.write_table(pa.table({"request": requests(listed, verify_hashes)}, schema))

    def write_fates(self, done: dict[int, Done]) -> None:
        """One row group a shard, in order.

        Raises:
            DamagedShardError: a shard is not that of these rows.
            UnvettedFetchError: see there.
        """
        self.fates.parent.mkdir(exist_ok=True)
        summary = Summary(num_bytes=sum(shard.num_bytes for shard in done.values()))
        with filled_aside(self.fates) as partial:
            with pq.ParquetWriter(partial, FATES, compression="zstd") as writer:
                for number, listed in enumerate(self.listed()):
                    fates = fates_of(self.shard(number), self.keys(number), listed)
                    writer.write_table(fates, row_group_size=fates.num_rows)
                    summary.count(fates)
                writer.add_key_value_metadata({"summary": summary.dump()})
            found = summary.fates.total()
            assert found == self.rows, f"{self.name}: {summary.fates} of {self.rows}"


class Shelf:
    """Which shards of a part are done, learnt as they appear; each is looked into once."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.done: dict[int, Done] = {}
        self.broken: dict[int, str] = {}
        """Why shards that call themselves done are not."""
        self.rows = 0
        """Rows in shards that are done."""
        part.images.mkdir(parents=True, exist_ok=True)

    @property
    def missing(self) -> int:
        """Shards that are not done."""
        return self.part.num_shards - len(self.done)

    def look(self) -> tuple[int, int]:
        """(rows done, bytes of what is not done yet): one of them grows while anything does."""
        growing = 0
        for entry in os.scandir(self.part.images):
            number = _shard_number(entry.name)
            if number is None or number in self.done:
                continue
            if entry.name.endswith("_stats.json") and number not in self.broken:
                self._look_into(number)
            with suppress(FileNotFoundError):
                growing += entry.stat().st_size
        return self.rows, growing

    def _look_into(self, number: int) -> None:
        try:
            found = check(self.part.shard(number), self.part.keys(number))
        except DamagedShardError as error:
            self.broken[number] = str(error)
            return
        if found is not None:
            self.done[number] = found
            self.rows += found.rows

    def clear(self) -> None:
        """Delete everything that belongs to no shard that is done. Nothing may run meanwhile."""
        self.look()
        rmtree(self.part.images / "_tmp", ignore_errors=True)
        for entry in os.scandir(self.part.images):
            if _shard_number(entry.name) not in self.done:
                Path(entry.path).unlink()
        self.broken = {}


def requests(listed: pa.Table, verify_hashes: bool) -> pa.ChunkedArray:
    """ "EXPECTED URL" of each row: the listed hash by which its bytes are known, or "-"."""
    expected = pa.chunked_array([pa.nulls(listed.num_rows, pa.string())])
    for name in ("sha256", "md5") if verify_hashes else ():
        expected = pc.coalesce(expected, pc.binary_join_element_wise(name, listed[name], ":"))
    return pc.binary_join_element_wise(expected.fill_null("-"), listed["url"], " ")


def check(shard: ImageShard, wanted: list[str]) -> Done | None:
    """The shard of these keys, if it is done; None while its statistics are being written.

    Raises:
        DamagedShardError: its statistics are whole, and its files contradict them.
    """
    try:
        stats = _stats(shard)
    except ValueError:
        return None
    table = _results(shard, ["key", "status"])
    keys = table["key"].to_pylist()
    if stats["count"] != len(wanted) or keys != wanted:
        raise DamagedShardError(
            f"{shard.stem}: {len(wanted)} rows were asked for, its statistics say "
            f"{stats['count']}, its table has {len({*keys} & {*wanted})} of them in {len(keys)}"
        )
    ok = table.filter(pc.equal(table["status"], "success"))["key"].to_pylist()
    sizes = sizes_in(shard.tar)
    if sorted(sizes) != [f"{key}.jpg" for key in ok] or len(ok) != stats["successes"]:
        raise DamagedShardError(
            f"{shard.tar} holds {len(sizes)} pictures, its table lists {len(ok)}, its statistics "
            f"{stats['successes']}"
        )
    return Done(len(wanted), sum(sizes.values()))


def sizes_in(tar: Path) -> dict[str, int]:
    """Bytes of each picture in a tar, by its name.

    Raises:
        DamagedShardError: it is cut short, or no tar.
    """
    try:
        with tar.open("rb", buffering=0) as file:
            return {member.name: member.size for member in tars.members(file, is_whole=True)}
    except (OSError, tars.DamagedTarError) as error:
        raise DamagedShardError(f"{tar} is missing, cut short or no tar") from error


def fates_of(shard: ImageShard, keys: list[str], listed: pa.Table) -> pa.Table:
    """What was listed of a shard's rows, and what became of them.

    Raises:
        DamagedShardError: the shard is not of these rows.
        UnvettedFetchError: an error is not one of our fetch's.
    """
    results = _results(shard, ["url", "key", "status", "error_message", "sha256"])
    asked = [request.partition(" ")[2] for request in results["url"].to_pylist()]
    if results["key"].to_pylist() != keys or asked != listed["url"].to_pylist():
        raise DamagedShardError(
            f"{shard.stem}.parquet has other rows than its list; delete both that table and the "
            "statistics beside it, and run again"
        )
    listed, stats = with_label(listed), _stats(shard)
    columns = (results[name].to_pylist() for name in ("status", "error_message"))
    fates = [_fate(shard, *row) for row in zip(*columns, strict=True)]
    times = {
        "asked_from": math.floor(stats["start_time"] * 1000),
        "asked_until": math.ceil(stats["end_time"] * 1000),
    }
    found = {
        **{name: listed[name] for name in listed.column_names},
        "key": [f"{shard.part:0{PART_DIGITS}d}{key}" for key in keys],
        "fate": [fate for fate, _ in fates],
        "detail": [detail for _, detail in fates],
        "sha256": results["sha256"],
        **{
            name: pa.array([time] * len(keys), FATES.field(name).type)
            for name, time in times.items()
        },
    }
    return pa.table({name: found[name] for name in FATES.names}).cast(FATES)


def _fate(shard: ImageShard, status: str, error: str | None) -> tuple[str, str | None]:
    """(class, detail) of one row of img2dataset's table."""
    if status == "success":
        return "ok", None
    if not (error or "").startswith(VETTED):
        raise UnvettedFetchError(
            f"{shard.stem}: img2dataset says {error!r}, which is not from our fetch; its version "
            "may have changed how it calls it: use the one in requirements.lock"
        )
    fate, _, detail = (error or "").removeprefix(VETTED).partition(": ")
    return fate, detail or None


def _stats(shard: ImageShard) -> dict[str, Any]:
    """What img2dataset wrote last of the shard; ValueError while it is being written."""
    path = shard.stem.with_name(f"{shard.stem.name}_stats.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _results(shard: ImageShard, columns: list[str]) -> pa.Table:
    """img2dataset's table in the order of keys; it is written in that of completion."""
    path = shard.stem.with_suffix(".parquet")
    try:
        return pq.read_table(path, columns=columns).sort_by("key")
    except (OSError, pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise DamagedShardError(f"{path}: {error}") from error


def _shard_number(name: str) -> int | None:
    """Number of the shard that a file belongs to."""
    digits = name[:SHARD_DIGITS]
    return int(digits) if len(digits) == SHARD_DIGITS and digits.isdecimal() else None


def _said(fate: str, detail: str) -> str:
    """By what a site owner opted out: a file, or the name of a header."""
    if fate == "robots_txt":
        return "robots.txt"
    return "tdmrep.json" if detail.endswith("/tdmrep.json") else detail.partition(":")[0]


def _host(url: str) -> str:
    try:
        return urlsplit(url.strip()).hostname or "none"
    except ValueError:
        return "none"
