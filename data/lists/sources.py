"""Lists of metadata as files: local paths, globs and fsspec URLs; Parquet, CSV and TSV."""

from __future__ import annotations

import glob
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data import sql
from data.lists import delimited
from data.lists.columns import Column, plain
from data.schema import MetadataError

FOOTER_BYTES = 1 << 16
TEXT_SUFFIXES = (".csv", ".tsv")
MEMORY_GB = 1
"""What each DuckDB may hold before it spills to disk."""


@dataclass(frozen=True)
class Source:
    """One list."""

    path: str
    """As matched: a local path, or a URL that fsspec reads."""

    @property
    def stem(self) -> str:
        """Name of the file without suffix, by which rows remember it."""
        name = PurePosixPath(self.path.replace("\\", "/"))
        return PurePosixPath(name.stem if name.suffix in delimited.PACKED_SUFFIXES else name).stem

    @property
    def is_text(self) -> bool:
        """CSV or TSV, packed or not; else it is Parquet."""
        suffixes = PurePosixPath(self.path.lower()).suffixes
        if suffixes and suffixes[-1] in delimited.PACKED_SUFFIXES:
            suffixes.pop()
        return bool(suffixes) and suffixes[-1] in TEXT_SUFFIXES

    @property
    def is_remote(self) -> bool:
        """Whether fsspec has to read it."""
        return "://" in self.path

    @property
    def absolute(self) -> str:
        """Path that means the same from any folder."""
        return absolute(self.path)

    @property
    def size(self) -> int:
        """Bytes."""
        filesystem, path = fsspec.url_to_fs(self.path)
        return int(filesystem.size(path) or 0)

    def columns(self) -> dict[str, pa.DataType]:
        """Type of each column.

        Raises:
            MetadataError: it cannot be opened, or is not what its suffix says.
        """
        try:
            if self.is_text:
                fields = [(name, pa.string()) for name in delimited.header(self.path)]
            else:
                with fsspec.open(self.path, "rb") as file:
                    schema = pq.read_schema(file)
                fields = [(field.name, field.type) for field in schema]
            names = [name for name, _ in fields]
            if len({*names}) < len(names):
                raise ValueError(f"two columns have one name in {', '.join(names)}")
            return dict(fields)
        except Exception as error:  # every fsspec implementation has errors of its own
            kind = "CSV or TSV in UTF-8 with a header" if self.is_text else "Parquet file"
            raise MetadataError(
                f"{self.path}: not a readable {kind} ({_first_line(error)}); {self._remedy()}, or "
                "take it out of download.metadata"
            ) from None

    def _remedy(self) -> str:
        """What to do about a list that cannot be opened, by how it begins."""
        try:
            with fsspec.open(self.path, "rb") as file:
                start = file.read(100).lstrip()
        except Exception:  # as above; this one is told already
            start = b""
        if start.startswith(b"version https://git-lfs"):
            return "it is a pointer of Git LFS: fetch the file itself with `git lfs pull`"
        if not self.is_text and start[:1] in (b"{", b"["):
            return "it looks like JSON, which is not read: convert it to Parquet, CSV or TSV"
        return "fetch it again, check its rights"

    def relation(
        self, db: duckdb.DuckDBPyConnection, columns: Mapping[str, Column], *, doubted: bool
    ) -> str:
        """SQL of a table with their `columns`, `row` (from 0) and `readable`.

        With `doubted`, values are converted and text is checked to be UTF-8 row by row, which is
        slow; without, DuckDB gives up at a Parquet file whose text is not.
        """
        if not self.is_text and not doubted:
            names = [sql.name(theirs) for theirs in _names(columns)]
            chosen = ", ".join([*names, "file_row_number AS row", "true AS readable"])
            options = "file_row_number = true", "binary_as_string = true"
            return f"(SELECT {chosen} FROM {sql.parquet([self.path], *options)})"
        batches = self._batches(columns)
        first = next(batches)
        db.register(
            "given", pa.RecordBatchReader.from_batches(first.schema, _chain(first, batches))
        )
        return "given"

    def _batches(self, columns: Mapping[str, Column]) -> Iterator[pa.RecordBatch]:
        if self.is_text:
            return delimited.batches(self.path, _names(columns), columns["url"].theirs)
        return _checked(self.path, columns)

    def fingerprint(self) -> bytes:
        """Name, size and what tells its content: all bytes of text, the footer of Parquet."""
        filesystem, path = fsspec.url_to_fs(self.path)
        size, digest = filesystem.size(path), hashlib.sha256()
        with filesystem.open(path, "rb") as file:
            if not self.is_text:
                file.seek(max(0, size - FOOTER_BYTES))
            while block := file.read(1 << 20):
                digest.update(block)
        return f"{PurePosixPath(path).name} {size} {digest.hexdigest()}".encode()


def find(patterns: tuple[str, ...]) -> list[Source]:
    """Every file that the patterns name, once each, in their order.

    Raises:
        MetadataError: a pattern without a file, or whose place cannot be listed.
    """
    found: dict[str, Source] = {}
    for pattern in patterns:
        paths = _matches(pattern)
        if not paths and Path(pattern).is_dir():
            raise MetadataError(
                f"download.metadata: {pattern} is a folder: name the lists in it, for example "
                f"'{pattern.rstrip('/')}/*.parquet'"
            )
        if not paths:
            raise MetadataError(
                f"download.metadata: no file matches {pattern!r} (seen from {Path.cwd()}); "
                "give a Parquet, CSV or TSV file, or a glob, that exists"
            )
        for path in paths:
            found.setdefault(absolute(path), Source(path))
    return list(found.values())


def absolute(path: str) -> str:
    """The same from any folder; URLs are that already."""
    return path if "://" in path else str(Path(path).resolve())


def is_there(pattern: str) -> bool:
    """Whether any file matches."""
    return bool(_matches(pattern))


def fingerprint(files: tuple[str, ...]) -> str:
    """sha256 over the names, sizes and contents of the lists; patterns without a file count too.

    Of a Parquet file the last 64 KiB stand for its content: they hold its schema, the place and the
    statistics of every column chunk, so that another content has another end, and terabytes need
    not be read to see it.
    """
    digest = hashlib.sha256()
    for pattern in files:
        paths = _matches(str(pattern))
        if not paths:
            digest.update(f"{pattern} is not there ".encode())
        for path in paths:
            digest.update(Source(path).fingerprint() + b" ")
    return digest.hexdigest()


def connect(read: list[Source] | None = None, spill: Path | None = None) -> Any:
    """A DuckDB of one thread that reads these sources and spills to `spill`.

    Workers are the way to use more cores: each has one of these, so that memory is counted by them,
    and that what one thread writes is the same to the byte each time.
    """
    settings: dict[str, Any] = {
        "threads": 1,
        "memory_limit": f"{MEMORY_GB}GB",
        "autoinstall_known_extensions": False,
        "parquet_metadata_cache": True,
        "enable_external_file_cache": False,
    }
    if spill is not None:
        settings["temp_directory"] = str(spill)
    db = duckdb.connect(config=settings)
    db.execute("SET enable_progress_bar = false")
    for source in read or []:
        if source.is_remote:
            db.register_filesystem(fsspec.url_to_fs(source.path)[0])
    return db


def _matches(pattern: str) -> list[str]:
    """Sorted paths or URLs; a `file://` URL becomes a path."""
    if "://" in pattern and not pattern.startswith(("file://", "local://")):
        return _remote_matches(pattern)
    path = pattern.partition("://")[2] if "://" in pattern else pattern
    if Path(path).is_file():  # a name may hold what a pattern is made of
        return [path]
    found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 — patterns may be absolute
    return [path for path in found if Path(path).is_file()]


def _remote_matches(pattern: str) -> list[str]:
    protocol = pattern.partition("://")[0]
    try:
        filesystem, path = fsspec.url_to_fs(pattern)
    except (ImportError, ValueError) as error:
        raise MetadataError(
            f"download.metadata: {pattern!r} cannot be opened ({error}): install the package that "
            f"reads {protocol}://, or give a local copy"
        ) from None
    try:
        is_pattern = glob.has_magic(path) and not filesystem.isfile(path)
        paths = filesystem.glob(path) if is_pattern else [path]
        return sorted(filesystem.unstrip_protocol(p) for p in paths if filesystem.isfile(p))
    except Exception as error:  # every implementation has errors of its own
        raise MetadataError(
            f"download.metadata: {pattern!r} cannot be listed ({type(error).__name__}: "
            f"{_first_line(error)}): check the address, the credentials and your rights"
        ) from None


def _names(columns: Mapping[str, Column]) -> list[str]:
    """Theirs, once each: one column may serve as two of ours."""
    return list(dict.fromkeys(one.theirs for one in columns.values()))


def _checked(path: str, columns: Mapping[str, Column]) -> Iterator[pa.RecordBatch]:
    """Like delimited.batches, of Parquet; a row is unreadable if any of its text is not UTF-8."""
    names = _names(columns)
    ours = {one.theirs: name for name, one in columns.items()}
    with fsspec.open(path, "rb") as file, pq.ParquetFile(file) as parquet:
        start, schema = 0, parquet.schema_arrow
        last = pa.record_batch([pa.array([], schema.field(n).type) for n in names], names=names)
        batches = parquet.iter_batches(delimited.BATCH_ROWS, columns=names)
        for batch in itertools.chain(batches, [last]):  # one, too, where there are no rows
            read, readable = [], pa.repeat(True, len(batch))
            for name in names:
                values, whole = plain(ours[name], columns[ours[name]], batch.column(name))
                read.append(values)
                readable = pc.and_(readable, whole)
            rows = pa.array(range(start, start + len(batch)), pa.int64())
            start += len(batch)
            yield pa.record_batch([*read, rows, readable], names=[*names, "row", "readable"])


def _chain(first: pa.RecordBatch, rest: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield first
    yield from rest


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
