"""CSV and TSV as Arrow batches: every row is there, and those that cannot be read are marked.

RFC 4180 in UTF-8 with a header. A broken row costs itself only: reading goes on at the line after
its first. DuckDB's reader is faster, but drops such rows or refuses the file.
"""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pyarrow as pa

LINE_CHARS = 1 << 20
"""A longer line, or field, makes its row unreadable."""
BATCH_ROWS = 50_000


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

    def give_back(self) -> None:
        """All since the mark but the first line: the row that began there is unreadable."""
        self._again.extendleft(reversed(self._taken[1:]))


@contextmanager
def _opened(path: str) -> Iterator[_Lines]:
    with fsspec.open(path, "rb", compression="infer") as file:
        text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
        yield _Lines(text)


def _records(lines: _Lines, delimiter: str) -> Iterator[list[str] | None]:
    """Fields of each row, None for one that is not well-formed; blank lines are no rows."""
    csv.field_size_limit(LINE_CHARS)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.mark()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error:
            lines.give_back()
            yield None
            continue
        if fields:
            yield fields


def _delimiter(path: str) -> str:
    return "\t" if ".tsv" in path.lower().rpartition("/")[2] else ","


def header(path: str) -> list[str]:
    """Names of the columns.

    Raises:
        ValueError: the first row is missing, malformed or not UTF-8.
    """
    with _opened(path) as lines:
        first = next(_records(lines, _delimiter(path)), None)
    if first is None:
        raise ValueError("no header")
    first[0] = first[0].removeprefix("\ufeff")
    "".join(first).encode()
    return first


def batches(path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """`columns` as text, with `row`, the place from 0, and `readable`, false beside nulls.

    A row is unreadable that has another number of fields than the header, breaks the rules of
    quoting, is not UTF-8, or has more than a million characters in a line or a field.
    """
    names = header(path)
    places = [names.index(column) for column in columns]
    with _opened(path) as lines:
        records = _records(lines, _delimiter(path))
        next(records)
        start, rows = 0, []
        for fields in records:
            fits = fields is not None and len(fields) == len(names)
            rows.append([fields[place] for place in places] if fields and fits else None)
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
