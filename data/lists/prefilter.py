"""What a listed row must fulfil before it is asked for, as SQL, and how a list is judged by it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from data.config import DownloadConfig
from data.lists.columns import Column, Kind, column, expression, listed
from data.lists.sources import Source
from data.schema import (
    TYPES,
    MetadataError,
    has_fetch_status,
    is_withdrawn,
    resolve,
)

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
        ("control characters in caption", "NOT controls"),
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


ODD = r"\p{Cc}|[^ \P{Z}]|  |^ | $"
"""A control character, a blank that is not the usual one, or one too many."""
BLANK = r"\t-\r\x{85}\p{Z}"
"""Tabs, ends of lines and unicode's blanks, as part of a class."""
CONTROLS = r"[^\P{Cc}\t-\r\x{85}]"
"""Control characters but these."""


def tidied(rows: str) -> str:
    """SQL: the rows with single blanks in captions, and `controls`: there are other characters.

    Most captions have nothing odd, which one look tells; replacing costs ten times that.
    """
    single = f"trim(regexp_replace(caption, '[{BLANK}]+', ' ', 'g'))"
    return (
        f"(SELECT * REPLACE (CASE WHEN odd THEN {single} ELSE caption END AS caption), "
        f"odd AND regexp_matches(caption, '{CONTROLS}') AS controls "
        f"FROM (SELECT *, regexp_matches(caption, '{ODD}') AS odd FROM {rows}))"
    )


class Columns(NamedTuple):
    """How a source's columns become ours."""

    sql: dict[str, str]
    """SQL of each of our columns, and of `status`."""
    read: dict[str, Column]
    """The source's columns that this reads, by ours."""
    listed: dict[str, str]
    """SQL of `listed_md5` and the like: whether the source has such a hash, right or wrong."""
    in_doubt: bool
    """They are not what DuckDB would take them for."""


def columns_of(source: Source, config: DownloadConfig) -> Columns:
    """What to read of a source.

    Raises:
        MetadataError: the source is withdrawn, or lacks a column that is read, or has two for one,
            or has one of a type that it cannot be.
    """
    types = source.columns()
    is_ours = config.source == "embedded"
    found = resolve([*types], source.path, None if is_ours else config.columns)
    if not is_ours and not config.allow_withdrawn and is_withdrawn([*types], source.path):
        raise MetadataError(
            f"{source.path}: looks like a LAION release of before 2024 (columns or name), which "
            "its authors have withdrawn; use relaion2B-en-research-safe, or set "
            "download.allow_withdrawn to true if you know what you do"
        )
    for rule in rules(config):
        if lacking := [name for name in rule.read if name not in found]:
            raise MetadataError(
                f"{source.path}: no column for {' and '.join(lacking)}, which "
                f"download.{rule.setting} reads; set download.{rule.setting} to null or add the "
                f"column (found {', '.join(types)})"
            )
    status = [name for name in types if has_fetch_status([*types]) and name.lower() == "status"]
    if status:
        found["status"] = status[0]
    read = {
        ours: column(ours, theirs, types[theirs], source.path) for ours, theirs in found.items()
    }
    names = {one.theirs for one in read.values()}
    if len({name.lower() for name in names}) < len(names):
        raise MetadataError(
            f"{source.path}: of the columns {', '.join(sorted(names))} two that are read differ in "
            "case only: rename one of them"
        )
    ours = {
        name: expression(name, read[name]) if name in read else f"NULL::{kind}"
        for name, kind in {**TYPES, "status": "VARCHAR"}.items()
    }
    low = {name.lower() for name in types}
    are_bytes = any(one.kind is Kind.BYTES for one in read.values())
    return Columns(
        ours,
        read,
        listed(read),
        # DuckDB knows no upper case, and counts rows in a column of its own.
        in_doubt=are_bytes or len(low) < len(types) or "file_row_number" in low,
    )


def with_verdicts(
    db: Any, source: Source, config: DownloadConfig, *, doubted: bool = False
) -> Iterator[pa.RecordBatch]:
    """Each row with its `verdict`: 0, or the number from 1 of the first reason to drop it.

    Beside it stand our columns and `row`, which are null in dropped rows; and where the list has
    hashes as text, `listed_md5` and the like: whether there is one, right or wrong. One reading of
    the list serves both the counts and the rows that are kept.
    """
    ours = columns_of(source, config)
    relation = source.relation(db, ours.read, doubted=doubted or ours.in_doubt)
    tests = " ".join(
        f"WHEN ({claim}) IS NOT TRUE THEN {number}"
        for number, (_, claim) in enumerate(reasons(config), 1)
    )
    columns = ", ".join(f"{sql} AS {name}" for name, sql in {**ours.sql, **ours.listed}.items())
    kept = [f"CASE WHEN verdict = 0 THEN {name} END AS {name}" for name in [*TYPES, "row"]]
    query = (
        f"SELECT {', '.join(['verdict', *kept, *ours.listed])} "
        f"FROM (SELECT *, (CASE {tests} ELSE 0 END)::UTINYINT AS verdict "
        f"FROM {tidied(f'(SELECT {columns}, row, readable FROM {relation})')})"
    )
    yield from db.sql(query).to_arrow_reader(BATCH_ROWS)
