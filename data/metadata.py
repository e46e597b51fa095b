"""Any source's metadata → our columns: pre-filtered, without exact duplicates, in a seeded order.

DuckDB does the work and spills to disk; nothing here looks at a picture.
"""

from __future__ import annotations

import glob
import hashlib
import math
from pathlib import Path

import duckdb

from data.config import DownloadConfig
from data.report import Funnel, Step
from data.schema import TYPES, MetadataError, resolve

FOOTER_BYTES = 1 << 16


def prepare(files: tuple[str, ...], out: Path, config: DownloadConfig) -> Funnel:
    """Write the rows worth asking for to the Parquet `out`; return the funnel that led there.

    Columns: `key` (img2dataset's, from the position), `source` and those of `schema.TYPES`.

    Raises:
        MetadataError: a file that cannot be read or lacks a column that a rule needs, or no row
            left.
    """
    try:
        return _prepare(files, out, config)
    except MetadataError as error:
        # Frames in the traceback keep DuckDB's objects alive to the end, where it complains.
        error.__context__ = None
        raise error.with_traceback(None) from None


def _prepare(files: tuple[str, ...], out: Path, config: DownloadConfig) -> Funnel:
    paths = [path for pattern in files for path in _expand(pattern)]
    rules = _rules(config)
    with duckdb.connect() as db:
        selects = [_select(db, path, rules) for path in paths]
        verdict = " ".join(
            f"WHEN NOT coalesce({test}, false) THEN '{r}'" for r, test in _tests(rules)
        )
        db.execute(
            f"CREATE TABLE judged AS SELECT *, CASE {verdict} ELSE 'ok' END AS verdict "
            f"FROM ({' UNION ALL '.join(selects)})"
        )
        db.execute(
            "CREATE TABLE distinct_rows AS SELECT * FROM judged WHERE verdict = 'ok' "
            "QUALIFY row_number() OVER (PARTITION BY url, caption ORDER BY file, position) = 1"
        )
        funnel = _funnel(db, [name for name, _ in _tests(rules)])
        asked = _count(db, "distinct_rows")
        if asked == 0:
            worst = max(funnel[1:], key=lambda step: step.dropped)
            raise MetadataError(
                f"no row of {', '.join(paths)} is left to ask for; the rule {worst.step!r} "
                f"dropped most ({worst.dropped} of {funnel[0].rows}): loosen it in `download`"
            )
        if config.max_rows is not None and asked > config.max_rows:
            funnel.append(Step("max_rows", asked - config.max_rows, config.max_rows))
        _write(db, out, config)
    return funnel


def fingerprint(files: tuple[str, ...]) -> str:
    """sha256 over the names, sizes and last 64 KiB of the lists; patterns without a file count too.

    The end of a Parquet file holds its schema, the place and the statistics of every column
    chunk: another content has another end, and terabytes need not be read to see it.
    """
    digest = hashlib.sha256()
    for name in (name for pattern in files for name in _matches(pattern) or [pattern]):
        path = Path(name)
        if not path.is_file():
            digest.update(f"{name} is not there ".encode())
            continue
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - FOOTER_BYTES))
            digest.update(f"{path.name} {size} ".encode() + file.read())
    return digest.hexdigest()


def _matches(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 — patterns may be absolute


def _expand(pattern: str) -> list[str]:
    paths = _matches(pattern)
    if not paths:
        raise MetadataError(
            f"download.metadata: no file matches {pattern!r} (seen from {Path.cwd()}); "
            "give a Parquet file or a glob that exists"
        )
    return paths


def _rules(config: DownloadConfig) -> dict[str, tuple[tuple[str, ...], str]]:
    """Setting → (columns it reads, SQL claim that a kept row fulfils), for the settings in use."""
    rules = {
        "min_side": (("width", "height"), "least(width, height) >= {0}"),
        "max_aspect": (
            ("width", "height"),
            "greatest(width, height) <= {0} * least(width, height) AND least(width, height) > 0",
        ),
        "max_unsafe": (("unsafe",), "unsafe <= {0}"),
        "max_watermark": (("watermark",), "watermark <= {0}"),
        "min_similarity_b32": (("similarity_b32",), "similarity_b32 >= {0}"),
        "min_similarity_l14": (("similarity_l14",), "similarity_l14 >= {0}"),
        "min_aesthetic": (("aesthetic",), "aesthetic >= {0}"),
    }
    used = {name: getattr(config, name) for name in rules}
    chosen = {n: (rules[n][0], rules[n][1].format(v)) for n, v in used.items() if v is not None}
    words = f"len(string_split_regex(trim(caption), '\\s+')) >= {config.min_caption_words}"
    chars = f"len(trim(caption)) >= {config.min_caption_chars}"
    return {**chosen, "caption too short": (("caption",), f"{words} AND {chars}")}


def _tests(rules: dict[str, tuple[tuple[str, ...], str]]) -> list[tuple[str, str]]:
    """Every reason to drop a row with the claim it breaks, in the order they are tried.

    DuckDB's `least` skips nulls, so nulls are tried before the rules that would read them.
    """
    columns = dict.fromkeys(column for read, _ in rules.values() for column in read)
    return [
        ("no url", "url IS NOT NULL AND trim(url) <> ''"),
        *((f"null {column}", f"{column} IS NOT NULL") for column in columns),
        *((name, claim) for name, (_, claim) in rules.items()),
    ]


def _select(
    db: duckdb.DuckDBPyConnection, path: str, rules: dict[str, tuple[tuple[str, ...], str]]
) -> str:
    """SQL that reads one file in our columns. Numbers that do not fit theirs become null."""
    literal = "'" + path.replace("'", "''") + "'"
    try:
        listed = db.execute(f"DESCRIBE SELECT * FROM read_parquet({literal})").fetchall()
    except duckdb.Error as error:
        raise MetadataError(
            f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); "
            "fetch it again or take it out of download.metadata"
        ) from error
    columns = resolve([row[0] for row in listed], path)
    for setting, (read, _) in rules.items():
        if lacking := [column for column in read if column not in columns]:
            raise MetadataError(
                f"{path}: no column for {' and '.join(lacking)}, which download.{setting} reads; "
                f"set download.{setting} to null or add the column"
            )
    casts = []
    for ours, kind in TYPES.items():
        theirs = '"' + columns[ours].replace('"', '""') + '"' if ours in columns else "NULL"
        casts.append(f"TRY_CAST({theirs} AS {kind}) AS {ours}")
    name = "'" + Path(path).stem.replace("'", "''") + "'"
    return (
        f"SELECT {', '.join(casts)}, {name} AS source, {literal} AS file, "
        f"file_row_number AS position FROM read_parquet({literal}, file_row_number=true)"
    )


def _funnel(db: duckdb.DuckDBPyConnection, reasons: list[str]) -> Funnel:
    dropped = dict(db.execute("SELECT verdict, count(*) FROM judged GROUP BY verdict").fetchall())
    left = _count(db, "judged")
    funnel: Funnel = [Step("listed", 0, left)]
    for reason in reasons:
        left -= dropped.get(reason, 0)
        funnel.append(Step(reason, dropped.get(reason, 0), left))
    unique = _count(db, "distinct_rows")
    return [*funnel, Step("same url and caption", left - unique, unique)]


def _count(db: duckdb.DuckDBPyConnection, table: str) -> int:
    row = db.execute(f"SELECT count(*) FROM {table}").fetchone()
    return int(row[0]) if row else 0


def _write(db: duckdb.DuckDBPyConnection, out: Path, config: DownloadConfig) -> None:
    """The seeded order is that of a digest, so it does not hinge on a library's generator."""
    index_digits = math.ceil(math.log10(config.rows_per_shard))
    limit = f"LIMIT {config.max_rows}" if config.max_rows is not None else ""
    partial = out.with_suffix(".partial")
    target = str(partial).replace("'", "''")
    db.execute(
        f"""COPY (
            WITH ordered AS (
                SELECT *, row_number() OVER (ORDER BY digest, url, caption) - 1 AS place
                FROM (SELECT *, md5('{config.seed} ' || url || ' ' || caption) AS digest
                    FROM distinct_rows)),
            placed AS (
                SELECT *, place // {config.rows_per_shard} AS shard,
                    place % {config.rows_per_shard} AS slot FROM ordered)
            SELECT
                lpad((shard * {10**index_digits} + slot)::VARCHAR, {5 + index_digits}, '0') AS key,
                {", ".join(TYPES)}, source
            FROM placed ORDER BY place {limit}
        ) TO '{target}' (FORMAT parquet)"""
    )
    partial.replace(out)
