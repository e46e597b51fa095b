"""Columns of every metadata source, and of our own tables. The one place that knows their names."""

from __future__ import annotations

import pyarrow as pa

ALIASES: dict[str, tuple[str, ...]] = {
    "url": ("url",),
    "caption": ("caption", "text"),
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    "similarity_b32": ("similarity", "clip_similarity_vitb32", "clip_b32_similarity_score"),
    "similarity_l14": ("clip_similarity_vitl14", "clip_l14_similarity_score"),
    "unsafe": ("punsafe", "nsfw_score_opennsfw2"),
    "watermark": ("pwatermark", "watermark_score"),
    "aesthetic": ("aesthetic", "aesthetic_score_laion_v2"),
}
"""Ours → theirs, in any case (LAION's first releases shout).

Re-LAION's `width` is what LAION's own 384 px resize left: `original_width` goes before it.
"""
REQUIRED = ("url", "caption")
PREFERRED = frozenset({"width", "height"})
"""Columns of which a source may carry several: the first alias wins."""

TYPES: dict[str, str] = {
    "url": "VARCHAR",
    "caption": "VARCHAR",
    "width": "INTEGER",
    "height": "INTEGER",
    "similarity_b32": "FLOAT",
    "similarity_l14": "FLOAT",
    "unsafe": "FLOAT",
    "watermark": "FLOAT",
    "aesthetic": "FLOAT",
}
"""DuckDB types of our metadata columns."""

FATES = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("fate", pa.string()),
        ("detail", pa.string()),
        ("sha256", pa.string()),
    ]
)
"""One row a URL asked for. `fate` is `ok` or the class of what went wrong."""


class MetadataError(ValueError):
    """A metadata file that cannot be used: which, why, and what to do about it."""


def resolve(columns: list[str], file: str) -> dict[str, str]:
    """Ours → the name in `file`, for each of our columns that it carries.

    Raises:
        MetadataError: no URL or caption column, or two that could be it.
    """
    found = {}
    for ours, aliases in ALIASES.items():
        matches = [c for alias in aliases for c in columns if c.lower() == alias]
        if len(matches) > 1 and (ours not in PREFERRED or matches[0].lower() == matches[1].lower()):
            raise MetadataError(
                f"{file}: columns {matches} could all be the {ours}; "
                "rename or drop all but one of them"
            )
        if matches:
            found[ours] = matches[0]
        elif ours in REQUIRED:
            raise MetadataError(
                f"{file}: no {ours} column; looked for {' or '.join(aliases)} (in any case), "
                f"found {', '.join(columns)}; rename the column that holds the {ours}"
            )
    return found
