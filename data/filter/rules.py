"""Thresholds as SQL over one row of scores, in the order in which they are tried."""

from __future__ import annotations

from typing import NamedTuple

import duckdb
import pyarrow as pa

from data import sql
from data.config import FilterConfig
from data.filter import influence
from data.lists.prefilter import BLANK, CONTROLS
from data.schema import SCORES

RULES = (
    "undecodable", "broken caption", "labels", "min_side", "max_aspect", "max_unsafe",
    "max_watermark", "max_generated", "min_caption_words", "max_caption_words", "min_caption_chars",
    "max_caption_chars", "min_distinct_words", "languages",
    "max_phash_change", "min_aesthetic", "top_aesthetic", "min_similarity", "top_similarity",
    "drop_influence", "contaminated", "same bytes", "near duplicate", "near duplicate (embedding)",
)  # fmt: skip
"""Every verdict but `ok`, in the order they are tried."""
SAME = frozenset(RULES[-3:])
"""Verdicts on a picture that another of ours stands for."""
SETTINGS = {
    "contaminated": "decontaminate",
    "near duplicate": "max_phash_distance",
    "near duplicate (embedding)": "min_duplicate_cosine",
}
"""The setting behind a verdict that does not bear its name."""
REMEDIES = {
    "similarity": "name an encoder in score.encoder, or a similarity in score.take_over",
    "aesthetic": "set score.aesthetic, or name aesthetic in score.take_over",
    "unsafe": "set score.nsfw, or name unsafe in score.take_over",
    "watermark": "name watermark in score.take_over, for lists that bring it",
    "label": "name the lists' column that holds it in download.columns.label",
    "generated": "set score.generated",
    "language": "set score.language",
    "phash": "score the pictures anew",
    "caption_words": "score the download anew",
    "caption_chars": "score the download anew",
}
BROKEN_CAPTION = (
    rf"caption IS NULL OR NOT regexp_matches(caption, '[^{BLANK}]') "
    rf"OR regexp_matches(caption, '{CONTROLS}')"
)
"""SQL: there is nothing but blanks, or a control character that is none."""
_WORDS = "string_split(lower(caption), ' ')"
DISTINCT_WORDS = f"list_unique({_WORDS}) / len({_WORDS})::FLOAT"
"""SQL: share of the words that differ."""
MISSING = 100
"""Added to a rule's number where a null broke it."""


class UnscoredError(ValueError):
    """A rule reads a score that was never made; the text names the setting and the remedy."""


class Rule(NamedTuple):
    """One threshold, as SQL over a row of scores."""

    name: str
    reads: tuple[str, ...]
    """A null in one of these columns, or not a number, breaks the rule."""
    holds: str
    threshold: float | int | str


def rules(database: duckdb.DuckDBPyConnection, config: FilterConfig) -> list[Rule]:
    """The rules that `config` asks for, strictest about the file itself first."""
    size = ("width", "height")
    asked = [
        Rule("undecodable", (), "error IS NULL", ""),
        Rule("broken caption", (), "NOT broken_caption", ""),
        *([Rule("labels", ("label",), "true", "require")] if config.labels == "require" else []),
        Rule("min_side", size, f"least(width, height) >= {config.min_side}", config.min_side),
        Rule(
            "max_aspect",
            size,
            f"greatest(width, height) <= {config.max_aspect!r}::DOUBLE * least(width, height)",
            config.max_aspect,
        ),
    ]
    for name in ("max_unsafe", "max_watermark", "max_generated"):
        if (limit := getattr(config, name)) is not None:
            asked.append(_bound(name, "<=", limit))
    for column in ("caption_words", "caption_chars"):
        for bound, sign in (("min", ">="), ("max", "<=")):
            if (limit := getattr(config, f"{bound}_{column}")) is not None:
                asked.append(_bound(f"{bound}_{column}", sign, limit))
    if (share := config.min_distinct_words) is not None:
        asked.append(Rule("min_distinct_words", (), f"distinct_words >= {share!r}::FLOAT", share))
    if config.languages is not None:
        known = ", ".join(sql.text(language) for language in config.languages)
        spoken = f"language IN ({known})" if known else "false"
        asked.append(Rule("languages", ("language",), spoken, ", ".join(config.languages)))
    if (bits := config.max_phash_change) is not None:
        same = f"listed_phash IS NULL OR bit_count(xor(phash, listed_phash)) <= {bits}"
        asked.append(Rule("max_phash_change", ("phash",), same, bits))
    for score in ("aesthetic", "similarity"):
        if (least := getattr(config, f"min_{score}")) is not None:
            asked.append(_bound(f"min_{score}", ">=", least))
        if (share := getattr(config, f"top_{score}")) is not None:
            asked.append(_bound(f"top_{score}", ">=", _least_of_top(database, score, share)))
    if (share := config.drop_influence) is not None:
        most = influence.limit(database, config.influence, share)
        kept = f"influence IS NULL OR influence <= {most!r}::DOUBLE"
        asked.append(Rule("drop_influence", (), kept, most))
    _assert_scored(database, asked, config)
    return asked


def _bound(name: str, sign: str, threshold: float | None) -> Rule:
    column = name.partition("_")[2]
    value = "NULL" if threshold is None else f"{float(threshold)!r}::FLOAT"
    return Rule(name, (column,), f"{column} {sign} {value}", threshold or 0.0)


def _least_of_top(database: duckdb.DuckDBPyConnection, score: str, share: float) -> float | None:
    """The score that the best `share` of all scored pictures reach, exactly.

    All pictures of just this score pass, so ties may keep more than the share. None: none is
    scored.
    """
    scored = f"FROM scores WHERE error IS NULL AND NOT ({is_missing(score)})"
    row = database.execute(f"SELECT count(*) {scored}").fetchone()
    assert row is not None
    rank = max(round(share * row[0]), 1)
    found = database.execute(
        f"SELECT {score} {scored} ORDER BY {score} DESC LIMIT 1 OFFSET {rank - 1}"
    ).fetchone()
    return found[0] if found else None


def is_missing(column: str) -> str:
    """SQL: null, or not a number, which DuckDB takes for the greatest of all."""
    is_float = pa.types.is_floating(SCORES.field(column).type)
    return f"{column} IS NULL OR isnan({column})" if is_float else f"{column} IS NULL"


def code(asked: list[Rule]) -> str:
    """SQL: number of the first rule that a row breaks, + MISSING where a null broke it, or 0."""
    cases = []
    for rule in asked:
        number = RULES.index(rule.name) + 1
        if missing := " OR ".join(map(is_missing, rule.reads)):
            cases.append(f"WHEN {missing} THEN {number + MISSING}")
        cases.append(f"WHEN NOT ({rule.holds}) THEN {number}")
    return f"CASE {' '.join(cases)} ELSE 0 END::UTINYINT"


def _assert_scored(
    database: duckdb.DuckDBPyConnection, asked: list[Rule], config: FilterConfig
) -> None:
    """Every score that a rule reads was made for at least one picture."""
    columns = list(REMEDIES)
    counted = ", ".join(f"count(*) FILTER (NOT ({is_missing(name)}))" for name in columns)
    row = database.execute(f"SELECT count(*), {counted} FROM scores WHERE error IS NULL").fetchone()
    assert row is not None
    scored = dict(zip(columns, row[1:], strict=True))
    for rule in asked:
        for column in rule.reads:
            if row[0] and scored.get(column) == 0:
                what, off = ("a", "keep") if column == "label" else ("the score", "null")
                raise UnscoredError(
                    f"filter.{rule.name} is {getattr(config, rule.name)}, but none of the {row[0]} "
                    f"decodable pictures has {what} {column!r}: {REMEDIES[column]}; or set "
                    f"filter.{rule.name} to {off}"
                )
