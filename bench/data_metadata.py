"""Reading and filtering a list as prepare does, against bare DuckDB with the same predicate."""

from __future__ import annotations

import tempfile
from pathlib import Path

import duckdb
import pyarrow.compute as pc

from bench.timing import medians
from data.config import DownloadConfig
from data.lists.prefilter import BATCH_ROWS, columns_of, reasons, tidied, with_verdicts
from data.lists.sources import Source, connect
from data.schema import TYPES

ROWS = 2_000_000


def make(path: Path, rows: int) -> None:
    """A list in the columns of Re-LAION: URLs of 50,021 hosts, nulls, all scores uniform."""
    with connect() as db:
        db.execute("SELECT setseed(0.5)")
        db.execute(
            f"""COPY (SELECT
                'https://cdn' || (i * 7919 % 50021) || '.example.com/' || md5(i::VARCHAR)
                    || '/photo-' || i || '.jpg' AS url,
                repeat('wonderful picture ', (hash(i) % 5)::INT) || 'of ' || i AS caption,
                if(hash(i + 1) % 20 = 0, 'failed_to_download', 'success') AS status,
                NULL::VARCHAR AS error_message,
                if(hash(i + 1) % 20 = 0, NULL, 20 + hash(i * 3) % 1500)::INT AS original_width,
                if(hash(i + 1) % 20 = 0, NULL, 20 + hash(i * 5) % 1500)::INT AS original_height,
                md5('x' || i) AS md5, 0.28 + random() * 0.1 AS similarity,
                if(hash(i + 9) % 50 = 0, NULL, random())::FLOAT AS punsafe,
                random()::FLOAT AS pwatermark
            FROM range({rows}) listed(i)) TO '{path}' (FORMAT parquet)"""
        )


def compare(rows: int = ROWS) -> dict[str, float]:
    """Rows/s of `ours`, of `bare` DuckDB on one thread, and the first ÷ the second."""
    config = DownloadConfig(source="metadata", metadata=("list",))
    with tempfile.TemporaryDirectory() as folder:
        source = Source(str(Path(folder) / "list.parquet"))
        make(Path(source.path), rows)
        columns = ", ".join(
            f"{sql} AS {name}" for name, sql in columns_of(source, config).sql.items()
        )
        claims = " AND ".join(f"({c})" for r, c in reasons(config) if r != "unreadable row")
        query = (
            f"SELECT {', '.join(TYPES)}, row FROM "
            + tidied(
                f"(SELECT {columns}, file_row_number AS row FROM "
                f"read_parquet('{source.path}', file_row_number = true))"
            )
            + f" WHERE {claims}"
        )

        def ours() -> int:
            with connect([source]) as db:
                batches = with_verdicts(db, source, config)
                return sum(
                    pc.sum(pc.equal(batch.column("verdict"), 0)).as_py() for batch in batches
                )

        def bare() -> int:
            with duckdb.connect(config={"threads": 1}) as db:
                return sum(len(batch) for batch in db.sql(query).to_arrow_reader(BATCH_ROWS))

        assert ours() == bare()
        times = medians({"bare": bare, "ours": ours}, rounds=5)
    rates = {name: rows / ms * 1e3 for name, ms in times.items()}
    return {**rates, "ratio": rates["ours"] / rates["bare"]}


def main() -> None:
    """Print both rates and their ratio."""
    found = compare()
    print(
        f"pre-filter of {ROWS:,} rows on one core: ours {found['ours'] / 1e6:.2f} M rows/s, bare "
        f"DuckDB {found['bare'] / 1e6:.2f} M rows/s, ratio {found['ratio']:.2f} (target 0.9)"
    )


if __name__ == "__main__":
    main()
