"""Names, text and files as DuckDB's SQL."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path


def text(value: str) -> str:
    """A string."""
    return "'" + value.replace("'", "''") + "'"


def name(column: str) -> str:
    """A column, whatever it is called."""
    return '"' + column.replace('"', '""') + '"'


def parquet(paths: Iterable[Path | str], *options: str) -> str:
    """A table of exactly these Parquet files.

    DuckDB takes every path for a pattern, and a folder called `key=value` for a column.
    """
    files = ", ".join(text(glob.escape(str(path))) for path in paths)
    return f"read_parquet({', '.join([f'[{files}]', 'hive_partitioning = false', *options])})"
