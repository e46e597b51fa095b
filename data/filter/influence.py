"""Scores of what a trained network learned from each picture, from a file: which ones, how many."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from data import sql

TABLE = "influences"
AGAIN = "write it by `python -m gigagan influence`, of shards that these scores made"


class InfluenceError(ValueError):
    """A file of influences that cannot be used: which, and why."""


def read(database: duckdb.DuckDBPyConnection, path: str | None) -> None:
    """The table `influences` of key and influence, in double precision; empty without a file.

    Raises:
        InfluenceError: the file is missing or no Parquet, lacks a column, or has a key twice or a
            score that is no number.
    """
    if path is None:
        database.execute(f"CREATE TABLE {TABLE} (key VARCHAR, influence DOUBLE)")
        return
    place = f"filter.influence {path}"
    if not Path(path).is_file():
        raise InfluenceError(f"{place}: there is no such file; {AGAIN}")
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise InfluenceError(f"{place} is no Parquet file ({error}); {AGAIN}") from error
    kinds = {field.name: field.type for field in schema}
    strings = (pa.string(), pa.large_string())
    if kinds.get("key") not in strings or not _is_float(kinds.get("influence")):
        raise InfluenceError(
            f"{place} needs the columns key, of text, and influence, of floats; it has "
            f"{', '.join(kinds)}; {AGAIN}"
        )
    database.execute(
        f"CREATE TABLE {TABLE} AS SELECT key, influence::DOUBLE AS influence "
        f"FROM {sql.parquet([path])}"
    )
    row = database.execute(
        "SELECT count(*) - count(DISTINCT key), count(*) FILTER (influence IS NULL OR NOT "
        f"isfinite(influence)) FROM {TABLE}"
    ).fetchone()
    assert row is not None
    if any(row):
        raise InfluenceError(
            f"{place}: {row[0]} of its rows repeat a key and {row[1]} have no number; {AGAIN}"
        )


def _is_float(kind: pa.DataType | None) -> bool:
    return kind is not None and pa.types.is_floating(kind)


def limit(database: duckdb.DuckDBPyConnection, path: str | None, share: float) -> float:
    """The influence above which lies the worst `share` of the pictures that have one.

    Ties stay, so that at most the share goes.

    Raises:
        InfluenceError: no picture has one.
    """
    scored = "FROM scores WHERE error IS NULL AND influence IS NOT NULL"
    row = database.execute(f"SELECT count(*) {scored}").fetchone()
    assert row is not None
    if not row[0]:
        raise InfluenceError(
            f"filter.influence {path} has the key of no picture that is scored here: {AGAIN}"
        )
    rank = min(round(share * row[0]), row[0] - 1)
    found = database.execute(
        f"SELECT influence {scored} ORDER BY influence DESC LIMIT 1 OFFSET {rank}"
    ).fetchone()
    assert found is not None
    return float(found[0])
