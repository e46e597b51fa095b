"""DuckDB: names, text and files as its SQL, and counts over bins."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

import duckdb

HISTOGRAMS = ("similarity", "aesthetic", "unsafe", "watermark", "generated")
BINS = 40


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


def histograms(database: duckdb.DuckDBPyConnection) -> dict[str, dict[str, list[float]]]:
    """Counts over equal bins of each of HISTOGRAMS in the table `scores`, to choose thresholds by.

    Of decodable pictures that have a finite one; a score without any is left out.
    """
    found = {}
    for name in HISTOGRAMS:
        finite = f"FROM scores WHERE error IS NULL AND isfinite({name})"
        row = database.execute(f"SELECT min({name}), max({name}) {finite}").fetchone()
        assert row is not None
        low, high = row
        if low is None:
            continue
        width = (high - low or 1.0) / BINS
        place = f"least(floor(({name} - {low!r}::DOUBLE) / {width!r}), {BINS - 1})::INTEGER"
        bins = dict(database.execute(f"SELECT {place}, count(*) {finite} GROUP BY 1").fetchall())
        edges = [round(low + width * number, 6) for number in range(BINS + 1)]
        found[name] = {"counts": [bins.get(number, 0) for number in range(BINS)], "edges": edges}
    return found
