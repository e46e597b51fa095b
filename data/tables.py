"""What is in Parquet tables, as text: schema, nulls, first rows, and how often each fate occurs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

CLASSES = ("fate", "verdict", "status", "language", "source", "error")
"""Columns whose values are counted."""
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
        groups.setdefault(str(_open(path).schema_arrow.remove_metadata()), []).append(path)
    return "\n\n".join(_describe(group) for group in groups.values())


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet: {error}") from error


def _describe(paths: list[Path]) -> str:
    files = [_open(path) for path in paths]
    rows = sum(file.metadata.num_rows for file in files)
    groups = sum(file.metadata.num_row_groups for file in files)
    schema = files[0].schema_arrow
    nulls, classes = _count(files)
    name = str(paths[0]) + (f" and {len(paths) - 1:,} more" if len(paths) > 1 else "")
    width = max((len(field.name) for field in schema), default=0)
    lines = [f"{name}\n  {rows:,} rows in {groups:,} row groups"]
    for field in schema:
        share = f"  {nulls[field.name]:,} null" if nulls[field.name] else ""
        lines.append(f"  {_safe(field.name):<{width}}  {field.type}{share}")
    for column, counts in classes.items():
        lines.append(f"  {column}:")
        lines += [f"    {_safe(str(v)):<40} {n:>11,}" for v, n in counts.most_common(_MOST_VALUES)]
        if len(counts) > _MOST_VALUES:
            lines.append(f"    and {len(counts) - _MOST_VALUES:,} other values")
    return "\n".join([*lines, *_first_rows(files, width)])


def _count(files: list[pq.ParquetFile]) -> tuple[Counter[str], dict[str, Counter[Any]]]:
    """Nulls of each column and values of the classes, a batch at a time."""
    nulls: Counter[str] = Counter()
    names = [name for name in CLASSES if name in files[0].schema_arrow.names]
    classes: dict[str, Counter[Any]] = {name: Counter() for name in names}
    for file in files:
        for batch in file.iter_batches(batch_size=10_000):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                nulls[name] += column.null_count
                if name in classes and len(classes[name]) < _MOST_CLASSES:
                    for value in pc.value_counts(column).to_pylist():
                        classes[name][value["values"]] += value["counts"]
    return nulls, {name: counts for name, counts in classes.items() if set(counts) - {None}}


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
    """One cell, short."""
    if isinstance(value, bytes):
        return f"{value[:16].hex()}{'…' if len(value) > 16 else ''} ({len(value)} bytes)"
    if isinstance(value, list) and len(value) > 4:
        return f"[{', '.join(map(str, value[:3]))}, …] ({len(value)} values)"
    return "null" if value is None else _safe(str(value))


def _safe(text: str) -> str:
    shown = "".join(c if c.isprintable() else "�" for c in text[:100])
    return shown + ("…" if len(text) > 100 else "")
