"""Columns of every metadata source, and of our own tables. The one place that knows their names."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pyarrow as pa

from data.config import ListColumn

ALIASES: dict[str, tuple[str, ...]] = {
    "url": ("url",),
    "caption": ("caption", "text"),
    "label": ("label", "class", "class_name", "wnid"),
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    "similarity_b32": ("similarity", "clip_similarity_vitb32", "clip_b32_similarity_score"),
    "similarity_l14": ("clip_similarity_vitl14", "clip_l14_similarity_score"),
    "unsafe": ("punsafe", "nsfw_score_opennsfw2"),
    "watermark": ("pwatermark", "watermark_score"),
    "aesthetic": ("aesthetic", "aesthetic_score_laion_v2"),
    "md5": ("md5",),
    "sha256": ("sha256",),
    "phash": ("image_phash",),
}
"""Ours → theirs, in any case (LAION's first releases shout).

Re-LAION's `width` is what LAION's own 384 px resize left: `original_width` goes before it. LAION's
`hash` is no hash of the picture but a join key, murmur3 of URL and text: it is never read.
"""
REQUIRED = ("url", "caption")
PREFERRED = frozenset({"width", "height"})
"""Columns of which a source may carry several: the first alias wins."""

TYPES: dict[str, str] = {
    "url": "VARCHAR",
    "caption": "VARCHAR",
    "label": "VARCHAR",
    "width": "INTEGER",
    "height": "INTEGER",
    "similarity_b32": "FLOAT",
    "similarity_l14": "FLOAT",
    "unsafe": "FLOAT",
    "watermark": "FLOAT",
    "aesthetic": "FLOAT",
    "md5": "VARCHAR",
    "sha256": "VARCHAR",
    "phash": "UBIGINT",
}
"""DuckDB types of our metadata columns."""

SHOUTED = frozenset({"URL", "TEXT"})
WITHDRAWN_COLUMNS = frozenset(
    {"similarity", "hash", "punsafe", "pwatermark", "aesthetic", "nsfw", "license", "sample_id"}
)
RELEASED_COLUMNS = frozenset({"md5", "original_width", "original_height"})
WITHDRAWN_NAME = re.compile(
    r"(?<![a-z])laion[-_]?(\d+(\.\d+)?[mb]|aesthetic|art|coco|high[-_]?res)", re.IGNORECASE
)

LIST = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("label", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("similarity_b32", pa.float32()),
        ("similarity_l14", pa.float32()),
        ("unsafe", pa.float32()),
        ("watermark", pa.float32()),
        ("aesthetic", pa.float32()),
        ("md5", pa.string()),
        ("sha256", pa.string()),
        ("phash", pa.uint64()),
        ("source", pa.string()),
        ("row", pa.int64()),
    ]
)
"""One row a URL to ask for. `label` is the name of the picture's class, where it has one. `md5`,
`sha256` (lower-case hex) and `phash` are what the source says of the picture, `source` the name of
its file without suffix and `row` the place in it."""

FATES = pa.schema(
    [
        ("key", pa.string()),
        *((field.name, field.type) for field in LIST if field.name != "sha256"),
        ("fate", pa.string()),
        ("detail", pa.string()),
        ("sha256", pa.string()),
        ("asked_from", pa.timestamp("ms", tz="UTC")),
        ("asked_until", pa.timestamp("ms", tz="UTC")),
    ]
)
"""One row a URL asked for: what was listed, and what became of it. `fate` is `ok` or the class of
what went wrong, `sha256` that of the bytes we have, and the two times enclose the request, with
its opt-out checks."""

MINIATURE = 4
"""Side of the miniature that near duplicates are compared by, px."""

SCORES = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("label", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("sha256", pa.string()),
        ("asked_from", pa.timestamp("ms", tz="UTC")),
        ("asked_until", pa.timestamp("ms", tz="UTC")),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("similarity", pa.float32()),
        ("aesthetic", pa.float32()),
        ("unsafe", pa.float32()),
        ("watermark", pa.float32()),
        ("phash", pa.uint64()),
        ("listed_phash", pa.uint64()),
        ("miniature", pa.binary(3 * MINIATURE**2)),
        ("language", pa.string()),
        ("caption_words", pa.int32()),
        ("caption_chars", pa.int32()),
        ("error", pa.string()),
        ("generated", pa.float32()),
    ]
)
"""One row a downloaded picture. `width` and `height` are those of the decoded picture; they and all
that pixels tell are null where `error` says why it cannot be decoded."""


def with_label(table: pa.Table) -> pa.Table:
    """Rows of a list or of fates; those of a download that knew of no labels yet have none."""
    if "label" in table.column_names:
        return table
    place = table.column_names.index("caption") + 1
    return table.add_column(place, LIST.field("label"), pa.nulls(len(table), pa.string()))


class MetadataError(ValueError):
    """A metadata file that cannot be used: which, why, and what to do about it."""


def resolve(
    columns: list[str], file: str, chosen: Mapping[ListColumn, str | None] | None = None
) -> dict[str, str]:
    """Ours → the name in `file`, for each of our columns that it carries.

    What is `chosen` goes before the names that are known; null there is a column to do without.

    Raises:
        MetadataError: no URL or caption column, two that could be it, or a chosen one is not there.
    """
    chosen = chosen or {}
    if missing := [theirs for theirs in chosen.values() if theirs and theirs not in columns]:
        name = next(ours for ours, theirs in chosen.items() if theirs == missing[0])
        raise MetadataError(
            f"{file}: no column {missing[0]!r}, which download.columns.{name} names; found "
            f"{', '.join(columns)}"
        )
    found: dict[str, str] = {ours: theirs for ours, theirs in chosen.items() if theirs}
    for ours, aliases in ALIASES.items():
        if ours in chosen:
            continue
        matches = [c for alias in aliases for c in columns if c.lower() == alias]
        if len(matches) > 1 and (ours not in PREFERRED or matches[0].lower() == matches[1].lower()):
            raise MetadataError(
                f"{file}: columns {matches} could all be the {ours}; "
                f"name one of them in download.columns.{ours}"
            )
        if matches:
            found[ours] = matches[0]
        elif ours in REQUIRED:
            raise MetadataError(
                f"{file}: no {ours} column; looked for {' or '.join(aliases)} (in any case), "
                f"found {', '.join(columns)}; name the one that holds it in "
                f"download.columns.{ours}"
            )
    return found


def is_withdrawn(columns: list[str], file: str) -> bool:
    """Whether a list looks like one of LAION's releases of 2021 to 2023, since withdrawn.

    They shout `URL` and `TEXT` beside scores or a join key, or have `laion400m`, `laion2B-en` and
    the like in their path. Re-LAION, which replaced them, is told by its `md5` or `original_*`
    columns, which no withdrawn release has, whatever its path. A copy under other names in other
    columns cannot be told: this guards against mistakes and not against intent.
    """
    low = {column.lower() for column in columns}
    if low & RELEASED_COLUMNS:
        return False
    shouts = {*columns} >= SHOUTED and bool(low & WITHDRAWN_COLUMNS)
    return shouts or WITHDRAWN_NAME.search(file) is not None


def has_fetch_status(columns: list[str]) -> bool:
    """Whether `status` says if the list's authors got the picture, as img2dataset writes it."""
    return {"status", "error_message"} <= {column.lower() for column in columns}
