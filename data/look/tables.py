"""What is in Parquet tables, as text: schema, nulls, first rows, and how often each fate occurs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.lists.prefilter import CONTROLS

CLASSES = ("fate", "verdict", "status", "language", "source", "error")
"""Columns whose values are counted."""
SPANNED = ("width", "height", "caption_words", "caption_chars")
"""Columns of which the smallest and the greatest value are told."""
CAPTIONS = ("caption", "text", "TEXT")
_FIRST_ROWS = 3
_MOST_VALUES = 20
_MOST_CLASSES = 10_000


def describe_tables(paths: list[Path]) -> str:
    """Describe the tables one by one; those of one schema are taken together.

    Raises:
        ValueError: a file that is not Parquet.
    """
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(str(opened(path).schema_arrow.remove_metadata()), []).append(path)
    return "\n\n".join(_describe(group) for group in groups.values())


def opened(path: Path) -> pq.ParquetFile:
    """A table to read.

    Raises:
        ValueError: it is no Parquet.
    """
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet: {error}") from error


def _describe(paths: list[Path]) -> str:
    files = [opened(path) for path in paths]
    rows = sum(file.metadata.num_rows for file in files)
    groups = sum(file.metadata.num_row_groups for file in files)
    schema = files[0].schema_arrow
    nulls, classes, notes = _count(files)
    name = str(paths[0]) + (f" and {len(paths) - 1:,} more" if len(paths) > 1 else "")
    width = max((len(field.name) for field in schema), default=0)
    lines = [f"{name}\n  {rows:,} rows in {groups:,} row groups"]
    for field in schema:
        share = f"  {nulls[field.name]:,} null" if nulls[field.name] else ""
        note = f"  {notes[field.name]}" if field.name in notes else ""
        lines.append(f"  {_safe(field.name):<{width}}  {field.type}{share}{note}")
    for column, counts in classes.items():
        lines.append(f"  {column}:")
        lines += [f"    {_safe(str(v)):<40} {n:>11,}" for v, n in counts.most_common(_MOST_VALUES)]
        if len(counts) > _MOST_VALUES:
            lines.append(f"    and {len(counts) - _MOST_VALUES:,} other values")
    return "\n".join([*lines, *_first_rows(files, width)])


def _count(
    files: list[pq.ParquetFile],
) -> tuple[Counter[str], dict[str, Counter[Any]], dict[str, str]]:
    """Nulls of each column, values of the classes, and what else is noted of a column.

    A batch at a time.
    """
    spans: dict[str, tuple[Any, Any]] = {}
    broken: Counter[str] = Counter()
    nulls: Counter[str] = Counter()
    names = [name for name in CLASSES if name in files[0].schema_arrow.names]
    classes: dict[str, Counter[Any]] = {name: Counter() for name in names}
    for file in files:
        for batch in file.iter_batches(batch_size=10_000):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                nulls[name] += column.null_count
                if name in SPANNED and column.null_count < len(column):
                    low, high = pc.min_max(column).as_py().values()
                    before = spans.get(name, (low, high))
                    spans[name] = min(low, before[0]), max(high, before[1])
                if name in CAPTIONS and pa.types.is_string(column.type):
                    found = pc.match_substring_regex(column, f"^$|{CONTROLS}")
                    broken[name] += pc.sum(found).as_py() or 0
                if name in classes and len(classes[name]) < _MOST_CLASSES:
                    for value in pc.value_counts(column).to_pylist():
                        classes[name][value["values"]] += value["counts"]
    notes = {name: f"{low:,} to {high:,}" for name, (low, high) in spans.items()}
    notes |= {name: f"{n:,} empty or with control characters" for name, n in broken.items() if n}
    return nulls, {name: counts for name, counts in classes.items() if set(counts) - {None}}, notes


def _first_rows(files: list[pq.ParquetFile], width: int) -> list[str]:
    file = next((file for file in files if file.metadata.num_rows), None)
    if file is None:
        return []
    batch = next(file.iter_batches(batch_size=_FIRST_ROWS))
    lines = []
    for number, row in enumerate(batch.to_pylist()):
        lines.append(f"  row {number}:")
        lines += [f"    {_safe(name):<{width}}  {_value(value)}" for name, value in row.items()]
    return lines


def _value(value: Any) -> str:
    """A cell's value as text, shortened."""
    if isinstance(value, bytes):
        return f"{value[:16].hex()}{'…' if len(value) > 16 else ''} ({len(value)} bytes)"
    if isinstance(value, list) and len(value) > 4:
        return f"[{', '.join(map(str, value[:3]))}, …] ({len(value)} values)"
    return "null" if value is None else _safe(str(value))


def _safe(text: str) -> str:
    shown = "".join(c if c.isprintable() else "�" for c in text[:100])
    return shown + ("…" if len(text) > 100 else "")
