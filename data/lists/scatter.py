"""The out-of-core half of prepare: each list → its passing rows by digest → the rows of each part.

`scan` takes one list, `gather` one range of digests over all lists. Both hold a bounded number of
rows, and give the same when run again.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data import sql
from data.config import DownloadConfig
from data.lists.prefilter import BATCH_ROWS, columns_of, reasons, with_verdicts
from data.lists.sources import Source, connect
from data.schema import LIST, TYPES, MetadataError
from gigagan.common.files import PARTIAL, filled_aside, write_aside

DIGESTS = 1 << 64
ROW_GROUP = 50_000
"""Rows in a row group of a list."""
VECTOR = 2048
"""DuckDB's row groups are multiples of it."""


@dataclass(frozen=True)
class ScanJob:
    """One list to read."""

    source: Source
    number: int
    """Place among the lists, as names may repeat."""
    folder: Path
    """Where passing rows go: NNNNN.parquet, and then NNNNN.json."""
    config: DownloadConfig
    slice_rows: int
    """About how many of its rows one part takes: with row groups of so many, little more is read
    than is taken."""

    def __str__(self) -> str:
        return f"reading {self.source.path}"

    @property
    def done(self) -> Path:
        """Its marker: rows by verdict."""
        return self.folder / f"{self.number:05d}.json"


def scan(job: ScanJob) -> str | None:
    """Write the passing rows of one list, sorted by digest, and rows by verdict.

    Returns what is wrong with the list, if anything is.
    """
    try:
        try:
            counts = _scan(job, doubted=False)
        except _NotUTF8Error:
            counts = _scan(job, doubted=True)
    except MetadataError as error:
        return str(error)
    names = ["ok", *(reason for reason, _ in reasons(job.config))]
    commit(job.done, {names[verdict]: rows for verdict, rows in sorted(counts.items())})
    return None


class _NotUTF8Error(Exception):
    """Text of a Parquet list that DuckDB gave up at: its rows are read one by one instead."""


class _Passing:
    """Batches of the rows that pass; counts all, and remembers what ended the reading."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self.counts: Counter[int] = Counter()
        self.hashes: Counter[str] = Counter()
        """Listed hashes of rows that pass, by column …"""
        self.fitting: Counter[str] = Counter()
        """… and those of them that are one."""
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        try:
            for batch in self._batches:
                for value in batch.column("verdict").value_counts():
                    self.counts[value["values"].as_py()] += value["counts"].as_py()
                kept = batch.filter(pc.equal(batch.column("verdict"), 0))
                listed = [name for name in kept.schema.names if name.startswith("listed_")]
                for name in listed:
                    ours = name.removeprefix("listed_")
                    self.hashes[ours] += pc.sum(kept.column(name)).as_py() or 0
                    self.fitting[ours] += len(kept) - kept.column(ours).null_count
                yield kept.drop_columns(["verdict", *listed])
        except Exception as error:
            self.error = error
            raise


def _scan(job: ScanJob, *, doubted: bool) -> dict[int, int]:
    """Rows by verdict."""
    target = job.done.with_suffix(".parquet")
    with filled_aside(target, has_rivals=True) as partial:
        passing = _sort_passing(job, partial, doubted=doubted)
        _demand_hashes(job, passing)
    return dict(passing.counts)


def _sort_passing(job: ScanJob, partial: Path, *, doubted: bool) -> _Passing:
    """Write the passing rows by digest."""
    spill = job.folder / f"spill-{os.getpid()}{PARTIAL}"
    with connect([job.source]) as reader, connect(spill=spill) as sorter:
        passing = _Passing(with_verdicts(reader, job.source, job.config, doubted=doubted))
        schema = pa.schema([*(LIST.field(name) for name in TYPES), ("row", pa.int64())])
        sorter.register("passing", pa.RecordBatchReader.from_batches(schema, iter(passing)))
        try:
            sorter.execute(_sorted(job, partial))
        except Exception as error:
            cause = passing.error
            if cause is None:
                raise
            if isinstance(cause, MetadataError):
                raise cause from None
            if not doubted and not job.source.is_text and "UTF" in str(cause).upper():
                raise _NotUTF8Error from error
            raise MetadataError(
                f"{job.source.path}: cannot be read to its end ({str(cause).splitlines()[0]}); "
                "fetch it again or take it out of download.metadata"
            ) from error
    return passing


def _demand_hashes(job: ScanJob, passing: _Passing) -> None:
    """Refuse a column of hashes of which none is one."""
    for name, rows in passing.hashes.items():
        if rows and not passing.fitting[name]:
            theirs = columns_of(job.source, job.config).read[name].theirs
            raise MetadataError(
                f"{job.source.path}: the column {theirs!r} holds no {name}: none of its {rows} "
                f"values is one in hexadecimal or bytes; name another one in "
                f"download.columns.{name}, or set that to null to do without"
            )


def _sorted(job: ScanJob, target: Path) -> str:
    """SQL that writes `passing` by digest. `pick` decides which of equal rows stays.

    What a fragment (#…) names is for who shows a page: URLs that differ in it ask for the same.
    """
    groups = max(VECTOR, min(60 * VECTOR, job.slice_rows // VECTOR * VECTOR))
    seeded = f"'{job.config.seed} ' || url"
    return (
        f"COPY (SELECT *, {sql.text(job.source.stem)} AS source, {job.number} AS list, "
        f"md5_number_upper({seeded}) AS digest, "
        f"md5_number_upper({seeded} || ' ' || caption) AS pick "
        "FROM (SELECT * REPLACE (split_part(url, '#', 1) AS url) FROM passing) ORDER BY digest) "
        f"TO {sql.text(str(target))} (FORMAT parquet, ROW_GROUP_SIZE {groups})"
    )


@dataclass(frozen=True)
class GatherJob:
    """The rows of one range of digests."""

    number: int
    """Which of `count` equal ranges."""
    count: int
    folder: Path
    lists: int
    """How many were scanned."""
    unique: tuple[str, ...]
    """Columns by which rows are equal."""
    limit: int | None = None
    """Stop after so many kept rows."""

    def __str__(self) -> str:
        return f"sorting part {self.number} of {self.count}"

    @property
    def done(self) -> Path:
        """Its marker: rows kept, and rows dropped as equal to one of them."""
        limit = "" if self.limit is None else f"-{self.limit}"
        return self.folder / f"part-{self.number:05d}{limit}.json"

    @property
    def target(self) -> Path:
        """What it writes."""
        return self.done.with_suffix(".parquet")


def gather(job: GatherJob, db: Any) -> None:
    """Write one part's rows in the order of their digests, each once."""
    result = db.sql(_ranged(job)).to_arrow_reader(BATCH_ROWS)
    distinct = _Distinct(result, job.unique, job.limit)
    with (
        filled_aside(job.target, has_rivals=True) as partial,
        pq.ParquetWriter(partial, LIST) as writer,
    ):
        for group in _regrouped(distinct):
            writer.write_table(group, row_group_size=ROW_GROUP)
    commit(job.done, {"rows": distinct.rows, "same": distinct.same})


def opened(folder: Path, number: int) -> duckdb.DuckDBPyConnection:
    """A worker's DuckDB for `gather`: it keeps what it learnt of the scanned files' footers."""
    return connect(spill=folder / f"spill-{os.getpid()}-{number}{PARTIAL}")


def _ranged(job: GatherJob) -> str:
    """SQL of the range in an order that hinges on nothing but the rows.

    Equal URLs are neighbours, and among them equal captions; the first of equal rows is the one
    that stays. Where only hashes, sizes or scores differ, these decide, and at last the place.
    """
    files = sql.parquet(job.folder / f"{n:05d}.parquet" for n in range(job.lists))
    start, stop = (DIGESTS * n // job.count for n in (job.number, job.number + 1))
    rest = [name for name in TYPES if name not in ("url", "caption")]
    return (
        f"SELECT {', '.join(LIST.names)} FROM {files} "
        f"WHERE digest BETWEEN {start}::UBIGINT AND {stop - 1}::UBIGINT "
        f"ORDER BY digest, url, pick, caption, {', '.join(rest)}, list, row"
    )


class _Distinct:
    """Batches without rows that equal the one before; up to `limit` rows that are kept."""

    def __init__(
        self, batches: Iterator[pa.RecordBatch], unique: tuple[str, ...], limit: int | None
    ) -> None:
        self._batches, self._unique, self._limit = batches, unique, limit
        self.rows = 0
        self.same = 0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        last: pa.RecordBatch | None = None
        for batch in self._batches:
            if not len(batch):
                continue
            new = self._differs(batch, last)
            last = batch.slice(len(batch) - 1)
            end = self._end(new)
            kept = batch.slice(0, end).filter(new.slice(0, end))
            self.rows += len(kept)
            self.same += end - len(kept)
            yield kept
            if end < len(batch):
                return

    def _differs(self, batch: pa.RecordBatch, last: pa.RecordBatch | None) -> pa.Array:
        """True where a row equals none before."""
        differs = pa.array([last is None] + [False] * (len(batch) - 1))
        for name in self._unique:
            column = batch.column(name)
            before = pa.concat_arrays([(last or batch).column(name).slice(0, 1), column])
            differs = pc.or_(differs, pc.not_equal(column, before.slice(0, len(batch))))
        return differs

    def _end(self, new: pa.Array) -> int:
        """How many rows of a batch are before the first that is too much."""
        if self._limit is None:
            return len(new)
        places = pc.indices_nonzero(new)
        room = self._limit - self.rows
        return int(places[room].as_py()) if len(places) > room else len(new)


def _regrouped(batches: _Distinct) -> Iterator[pa.Table]:
    """The same rows in tables of ROW_GROUP, so that files hinge on no size of batches."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) >= ROW_GROUP:
            table = pa.Table.from_batches(held).cast(LIST)
            whole = len(table) // ROW_GROUP * ROW_GROUP
            for start in range(0, whole, ROW_GROUP):
                yield table.slice(start, ROW_GROUP).combine_chunks()
            held = table.slice(whole).to_batches()
    if held:
        yield pa.Table.from_batches(held).cast(LIST).combine_chunks()


def commit(path: Path, document: dict[str, Any]) -> None:
    """Write JSON."""
    write_aside(path, json.dumps(document, ensure_ascii=False), has_rivals=True)
