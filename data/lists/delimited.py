"""CSV and TSV as Arrow batches: every row is there, and those that cannot be read are marked.

Both are UTF-8 with a header. A broken row costs itself only: reading goes on at the line after its
first. DuckDB's reader is faster, but drops such rows or refuses the file.

CSV quotes as RFC 4180 says, so a field in quotes may hold commas and ends of lines. A quote that
was never meant to open a field would swallow the rows up to the next one: so a field ends at a line
that is a row by itself, with an address in its place, and the row where it began is unreadable.

TSV does not quote: a line is a row, a tab ends a field, and a quote is a character as any other.
But a field that some CSV writer has put in quotes as a whole is taken out of them.
"""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import fsspec
import pyarrow as pa

LINE_CHARS = 1 << 20
"""A longer line, or field, makes its row unreadable."""
BATCH_ROWS = 50_000
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
"""Endings of packed files, which are unpacked while they are read."""


class _Lines:
    """Lines of a file; those taken since the last mark can be given back."""

    def __init__(self, text: io.TextIOBase) -> None:
        self._text = text
        self._again: deque[str] = deque()
        self._taken: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._text.readline(LINE_CHARS)
        if not line:
            raise StopIteration
        self._taken.append(line)
        if len(line) == LINE_CHARS and not line.endswith("\n"):
            self._skip()
            raise csv.Error("line too long")
        return line

    def _skip(self) -> None:
        """To the end of a line whose begin was too long already."""
        piece = "…"
        while piece and not piece.endswith(("\n", "\r")):
            piece = self._text.readline(LINE_CHARS)

    def mark(self) -> None:
        """A row begins here."""
        self._taken.clear()

    @property
    def swallowed(self) -> list[str]:
        """Lines since the mark but the first."""
        return self._taken[1:]

    def give_back(self) -> None:
        """These again: the row that began before them is unreadable."""
        self._again.extendleft(reversed(self.swallowed))


@contextmanager
def _opened(path: str) -> Iterator[_Lines]:
    is_zst = path.lower().endswith(".zst")  # fsspec infers that only with another package
    with fsspec.open(path, "rb", compression=None if is_zst else "infer") as file:
        plain = pa.CompressedInputStream(pa.PythonFile(file), "zstd") if is_zst else file
        text = io.TextIOWrapper(plain, "utf-8-sig", errors="surrogateescape", newline="")
        yield _Lines(text)


class _Shape(NamedTuple):
    """What every row of a file is like."""

    width: int
    """Fields."""
    url: int
    """Place of the one that holds the address."""


Rows = Iterator[list[str] | None]
"""Fields of each row, None for one that cannot be read; blank lines are no rows."""


def _rows(lines: _Lines, path: str, shape: _Shape | None = None) -> Rows:
    """Rows of that shape; without one, the first is well-formed whatever it has."""
    name = path.lower()
    is_tsv = name.endswith((".tsv", *(f".tsv{packed}" for packed in PACKED_SUFFIXES)))
    return _tabbed(lines, shape) if is_tsv else _quoted(lines, shape)


def _quoted(lines: _Lines, shape: _Shape | None) -> Rows:
    """Rows of a CSV."""
    csv.field_size_limit(LINE_CHARS)
    reader = csv.reader(lines, strict=True)
    while True:
        lines.mark()
        try:
            fields = next(reader)
            if shape and fields and len(fields) != shape.width:
                raise csv.Error("another number of fields")
            if shape and any(_is_row(line, shape) for line in lines.swallowed):
                raise csv.Error("an open quote")
        except StopIteration:
            return
        except csv.Error:
            lines.give_back()
            yield None
            continue
        if fields:
            yield fields


def _is_row(line: str, shape: _Shape) -> bool:
    """Whether a line within quotes looks like a row of its own."""
    try:
        fields = next(csv.reader([line]), [])
    except csv.Error:
        return False
    return len(fields) == shape.width and _ADDRESS.match(fields[shape.url]) is not None


_ADDRESS = re.compile(r"\s*https?://", re.IGNORECASE)


def _tabbed(lines: _Lines, shape: _Shape | None) -> Rows:
    """Rows of a TSV."""
    while True:
        lines.mark()
        try:
            line = next(lines).rstrip("\r\n")
        except StopIteration:
            return
        except csv.Error:
            yield None
            continue
        fields = [_unquoted(field) for field in line.split("\t")]
        if line:
            yield fields if shape is None or len(fields) == shape.width else None


def _unquoted(field: str) -> str:
    """A field without the quotes around it, if they are those of a CSV writer."""
    inner = field[1:-1]
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"'
    return inner.replace('""', '"') if is_quoted and '"' not in inner.replace('""', "") else field


def header(path: str) -> list[str]:
    """Names of the columns.

    Raises:
        ValueError: the first row is missing, malformed or not UTF-8.
    """
    with _opened(path) as lines:
        first = next(_rows(lines, path), None)
    if first is None:
        raise ValueError("no header")
    "".join(first).encode()
    return first


def batches(path: str, columns: list[str], url: str) -> Iterator[pa.RecordBatch]:
    """`columns` as text, with `row`, the place from 0, and `readable`, false beside nulls.

    A row is unreadable that has another number of fields than the header, breaks the rules of
    quoting, is not UTF-8, or has more than a million characters in a line or a field. `url` is the
    column of the addresses.
    """
    names = header(path)
    places = [names.index(column) for column in columns]
    with _opened(path) as lines:
        found = _rows(lines, path, _Shape(len(names), names.index(url)))
        next(found)
        start, rows = 0, []
        for fields in found:
            rows.append([fields[place] for place in places] if fields else None)
            if len(rows) == BATCH_ROWS:
                yield _batch(rows, columns, start)
                start, rows = start + len(rows), []
        yield _batch(rows, columns, start)


def _batch(rows: list[list[str] | None], columns: list[str], start: int) -> pa.RecordBatch:
    try:
        return _arrays(rows, columns, start)
    except UnicodeEncodeError:
        return _arrays([row if row and _is_text(row) else None for row in rows], columns, start)


def _arrays(rows: list[list[str] | None], columns: list[str], start: int) -> pa.RecordBatch:
    nothing = [None] * len(columns)
    cells = zip(*(row or nothing for row in rows), strict=True) if rows else [() for _ in columns]
    return pa.record_batch(
        [
            *(pa.array(column, pa.string()) for column in cells),
            pa.array(range(start, start + len(rows)), pa.int64()),
            pa.array([row is not None for row in rows], pa.bool_()),
        ],
        names=[*columns, "row", "readable"],
    )


def _is_text(row: list[str]) -> bool:
    """Whether the bytes were UTF-8: what was not came as lone surrogates."""
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return False
    return True
