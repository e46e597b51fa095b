"""Scores → the keys we keep, and a funnel that says why each other one went."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.config import FilterConfig
from data.report import Funnel, Step


class NothingKeptError(ValueError):
    """The thresholds leave nothing to learn from."""


def select(scores: pa.Table, config: FilterConfig) -> pa.Table:
    """Key, url, caption and verdict of every row: `ok`, or the first rule that it breaks.

    A null in a column that a rule reads breaks the rule. Duplicates are looked for among the rows
    that pass every other rule, so that a wrong caption never pushes out the right one.

    Raises:
        NothingKeptError: no row passes; names the rule that dropped most.
    """
    verdict = np.full(scores.num_rows, "ok", dtype=object)
    for name, claim in _rules(scores, config).items():
        holds = np.asarray(pc.fill_null(claim, False))
        verdict[(verdict == "ok") & ~holds] = name
    for name, doubles in (("same bytes", _same_bytes), ("near duplicate", _near_duplicates)):
        left = np.flatnonzero(verdict == "ok")
        verdict[doubles(scores, left, config)] = name
    if not (verdict == "ok").any():
        worst, dropped = Counter(verdict).most_common(1)[0] if len(verdict) else ("no rows", 0)
        raise NothingKeptError(
            f"the filter keeps none of {scores.num_rows} pictures; the rule {worst!r} dropped most "
            f"({dropped}): loosen filter.{worst}"
        )
    return scores.select(["key", "url", "caption"]).append_column("verdict", pa.array(verdict))


def _rules(scores: pa.Table, config: FilterConfig) -> dict[str, pa.ChunkedArray]:
    """Setting → whether each row fulfils it, strictest about the file itself first."""
    width, height = scores["width"], scores["height"]
    short = pc.min_element_wise(width, height, skip_nulls=False)
    long = pc.max_element_wise(width, height, skip_nulls=False)
    aspect = pc.divide(pc.cast(long, pa.float64()), pc.cast(short, pa.float64()))
    rules = {
        "undecodable": pc.is_null(scores["error"]),
        "min_side": pc.greater_equal(short, config.min_side),
        "max_aspect": pc.less_equal(aspect, config.max_aspect),
    }
    if config.max_unsafe is not None:
        rules["max_unsafe"] = pc.less_equal(scores["unsafe"], config.max_unsafe)
    if config.min_aesthetic is not None:
        rules["min_aesthetic"] = pc.greater_equal(scores["aesthetic"], config.min_aesthetic)
    if config.min_similarity is not None:
        rules["min_similarity"] = pc.greater_equal(scores["similarity"], config.min_similarity)
    return rules


def _same_bytes(scores: pa.Table, rows: np.ndarray, config: FilterConfig) -> list[int]:
    """Rows whose bytes an earlier row has."""
    digests = scores["sha256"].to_pylist()
    seen: set[str] = set()
    doubles = []
    for row in rows:
        if digests[row] in seen:
            doubles.append(int(row))
        seen.add(digests[row])
    return doubles


def _near_duplicates(scores: pa.Table, rows: np.ndarray, config: FilterConfig) -> list[int]:
    """Rows that look like one we keep; of a group the largest picture stays.

    64 bits cut into d + 1 bands: two hashes at most d bits apart share a band (pigeonhole), so
    only rows that share one are compared.
    """
    limit = config.max_phash_distance
    if limit is None:
        return []
    phash = scores["phash"].to_numpy()
    mini_ND = np.frombuffer(
        b"".join(m or bytes(48) for m in scores["miniature"].to_pylist()), np.uint8
    ).reshape(scores.num_rows, -1)
    area = (
        scores["width"].to_numpy().astype(np.float64) * scores["height"].to_numpy()
    )  # as floats: nulls of undecodable rows become NaN
    order = sorted(rows.tolist(), key=lambda row: (-area[row], row))
    edges = [64 * band // (limit + 1) for band in range(limit + 2)]
    kept: dict[tuple[int, int], list[int]] = defaultdict(list)
    doubles = []
    for row in order:
        bits = int(phash[row])
        bands = [
            (band, bits >> low & ((1 << high - low) - 1))
            for band, (low, high) in enumerate(pairwise(edges))
        ]
        near = np.array([other for band in bands for other in kept[band]], int)
        apart = np.bitwise_count(phash[near].astype(np.uint64) ^ np.uint64(bits))
        near = near[apart <= limit]
        colours = np.abs(mini_ND[near].astype(np.int16) - mini_ND[row]).mean(1)
        if (colours <= config.max_colour_distance).any():
            doubles.append(row)
            continue
        for band in bands:
            kept[band].append(row)
    return doubles


RULES = (
    "undecodable", "min_side", "max_aspect", "max_unsafe", "min_aesthetic", "min_similarity",
    "same bytes", "near duplicate",
)  # fmt: skip
"""Every verdict but `ok`, in the order they are tried."""


def funnel(verdicts: pa.Table) -> Funnel:
    """Pictures left after each rule."""
    counts = Counter(verdicts["verdict"].to_pylist())
    rows = verdicts.num_rows
    steps = [Step("downloaded", 0, rows)]
    for rule in RULES:
        rows -= counts[rule]
        steps.append(Step(rule, counts[rule], rows))
    return steps


def against_truth(verdicts: pa.Table, truth: Path) -> dict[str, dict[str, int]]:
    """Planted defect → verdict → rows, of a source that knows its defects. Never a filter's input.

    Which of two twins stays is chance: the one that went counts as the planted copy.
    """
    known: dict[tuple[str, str], dict[str, str]] = {}
    for row in pq.read_table(truth).to_pylist():
        known.setdefault((row["url"], row["caption"]), row)
    verdict_of = {(r["url"], r["caption"]): r["verdict"] for r in verdicts.to_pylist()}
    for place, row in known.items():
        twin = (row["twin"], row["caption"])
        if verdict_of.get(place) == "ok" and verdict_of.get(twin) in ("same bytes", RULES[-1]):
            verdict_of[place], verdict_of[twin] = verdict_of[twin], verdict_of[place]
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for place, verdict in verdict_of.items():
        table[known[place]["defect"] if place in known else "unlisted"][verdict] += 1
    return {defect: dict(counts.most_common()) for defect, counts in sorted(table.items())}
