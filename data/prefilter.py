"""What a listed row must fulfil before it is asked for, as SQL, and how a list is judged by it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from data.config import DownloadConfig
from data.schema import (
    TYPES,
    MetadataError,
    expression,
    has_fetch_status,
    is_withdrawn,
    resolve,
)
from data.sources import Source

MAX_CAPTION_CHARS = 10_000
"""A longer caption is the text of a page, and no text encoder reads so far."""
MAX_PATTERN_WORDS = 1000
"""As often as the regular expressions of DuckDB repeat."""
BATCH_ROWS = 100_000


class Rule(NamedTuple):
    """A setting, the columns it reads, and the SQL claim that a kept row fulfils."""

    setting: str
    read: tuple[str, ...]
    claim: str


def rules(config: DownloadConfig) -> list[Rule]:
    """Those in use that read more than URL and caption."""
    sides = ("width", "height")
    aspect = "least(width, height) > 0 AND greatest(width, height) <= {0} * least(width, height)"
    known = [
        Rule("min_side", sides, "least(width, height) >= {0}"),
        Rule("max_aspect", sides, aspect),
        Rule("max_unsafe", ("unsafe",), "unsafe <= {0}::FLOAT"),
        Rule("max_watermark", ("watermark",), "watermark <= {0}::FLOAT"),
        Rule("min_similarity_b32", ("similarity_b32",), "similarity_b32 >= {0}::FLOAT"),
        Rule("min_similarity_l14", ("similarity_l14",), "similarity_l14 >= {0}::FLOAT"),
        Rule("min_aesthetic", ("aesthetic",), "aesthetic >= {0}::FLOAT"),
    ]
    limits = [(rule, getattr(config, rule.setting)) for rule in known]
    return [
        rule._replace(claim=rule.claim.format(limit)) for rule, limit in limits if limit is not None
    ]


def reasons(config: DownloadConfig) -> list[tuple[str, str]]:
    """Every reason to drop a row with the claim it breaks, in the order they are tried.

    Nulls are tried before the rules that would read them (`least` skips nulls), numbers before
    text, which costs more. Rows that the list's authors could not fetch have neither sizes nor a
    hash: whatever their address shows by now, nobody has vetted it.
    """
    used = rules(config)
    columns = dict.fromkeys(column for rule in used for column in rule.read)
    return [
        ("unreadable row", "readable"),
        ("not fetched by the source", "status = 'success' OR status IS NULL"),
        *((f"null {column}", f"{column} IS NOT NULL") for column in columns),
        *((rule.setting, rule.claim) for rule in used),
        ("no url", "url IS NOT NULL AND trim(url) <> ''"),
        ("null caption", "caption IS NOT NULL"),
        ("caption too short", _long_enough(config.min_caption_words, config.min_caption_chars)),
        ("caption too long", f"length(caption) <= {MAX_CAPTION_CHARS}"),
    ]


def _long_enough(words: int, chars: int) -> str:
    """Splitting a caption into words costs five times as much as finding this pattern in it."""
    if words > MAX_PATTERN_WORDS:
        raise MetadataError(
            f"download.min_caption_words is {words}: at most {MAX_PATTERN_WORDS} can be asked for"
        )
    claims = ["true"]
    if words > 0:
        claims.append(rf"regexp_matches(caption, '\S(?:\S*\s+\S){{{words - 1}}}')")
    if chars > 0:
        claims.append(f"length(trim(caption)) >= {chars}")
    return " AND ".join(claims)


class Columns(NamedTuple):
    """How a source's columns become ours."""

    sql: dict[str, str]
    """Of each of ours, and of `status`."""
    read: list[str]
    """The source's columns that this reads."""


def columns_of(source: Source, config: DownloadConfig) -> Columns:
    """What to read of a source.

    Raises:
        MetadataError: the source is withdrawn, or lacks a column that is read, or has two for one.
    """
    kinds = source.columns()
    found = resolve([*kinds], source.path)
    if (
        config.source == "metadata"
        and not config.allow_withdrawn
        and is_withdrawn([*kinds], source.path)
    ):
        raise MetadataError(
            f"{source.path}: looks like a LAION release of before 2024 (columns or name), which "
            "its authors have withdrawn; use relaion2B-en-research-safe, or set "
            "download.allow_withdrawn to true if you know what you do"
        )
    for rule in rules(config):
        if lacking := [column for column in rule.read if column not in found]:
            raise MetadataError(
                f"{source.path}: no column for {' and '.join(lacking)}, which "
                f"download.{rule.setting} reads; set download.{rule.setting} to null or add the "
                f"column (found {', '.join(kinds)})"
            )
    ours = {
        name: expression(name, found[name], kinds[found[name]])
        if name in found
        else f"NULL::{kind}"
        for name, kind in TYPES.items()
    }
    status = [name for name in kinds if has_fetch_status([*kinds]) and name.lower() == "status"]
    ours["status"] = f'"{status[0]}"::VARCHAR' if status else "NULL::VARCHAR"
    return Columns(ours, [*found.values(), *status])


def judged(
    db: Any, source: Source, config: DownloadConfig, *, doubted: bool = False
) -> Iterator[pa.RecordBatch]:
    """Each row with its `verdict`: 0, or the number from 1 of the first reason to drop it.

    Beside it stand our columns, `source` and `row`, which are null in dropped rows. One reading of
    the list serves both the counts and the rows that are kept.
    """
    ours = columns_of(source, config)
    relation = source.relation(db, ours.read, doubted=doubted)
    tests = " ".join(
        f"WHEN ({claim}) IS NOT TRUE THEN {number}"
        for number, (_, claim) in enumerate(reasons(config), 1)
    )
    columns = ", ".join(f"{sql} AS {name}" for name, sql in ours.sql.items())
    kept = ", ".join(f"CASE WHEN verdict = 0 THEN {name} END AS {name}" for name in [*TYPES, "row"])
    query = (
        f"SELECT verdict, {kept} FROM (SELECT *, (CASE {tests} ELSE 0 END)::UTINYINT AS verdict "
        f"FROM (SELECT {columns}, row, readable FROM {relation}))"
    )
    yield from db.sql(query).to_arrow_reader(BATCH_ROWS)
