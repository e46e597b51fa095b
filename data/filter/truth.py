"""Verdicts against the defects that a source has planted itself. Never a rule's input."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from data import sql
from data.demo import HARMLESS
from data.filter.rules import SAME
from data.filter.select import score_files


def compare(out: Path, scores: Path, truth: Path) -> dict[str, dict[str, int]]:
    """Planted defect → verdict → rows, of the verdicts in `out`."""
    return against_truth(_verdicts(out, scores), truth)


def _verdicts(out: Path, scores: Path) -> pa.Table:
    """url, caption and verdict of every picture."""
    with duckdb.connect() as database:
        database.execute("SET enable_progress_bar = false")
        verdicts = sql.parquet([out / "verdicts.parquet"])
        query = (
            f"SELECT url, caption, verdict FROM {verdicts} AS verdicts "
            f"JOIN {sql.parquet(score_files(scores))} AS scores USING (key) ORDER BY key"
        )
        return database.sql(query).to_arrow_table()


def against_truth(verdicts: pa.Table, truth: Path) -> dict[str, dict[str, int]]:
    """Planted defect → verdict → rows, of verdicts with their url and caption.

    Which of two twins stays is chance: the one that went counts as the planted copy. The source is
    small, so its rows are in memory.
    """
    known: dict[tuple[str, str], dict[str, str]] = {}
    for row in pq.read_table(truth).to_pylist():
        known.setdefault((row["url"], row["caption"]), row)
    verdict_of = {(r["url"], r["caption"]): r["verdict"] for r in verdicts.to_pylist()}
    for place, row in known.items():
        twin = (row["twin"], row["caption"])
        if verdict_of.get(place) == "ok" and verdict_of.get(twin) in SAME:
            verdict_of[place], verdict_of[twin] = verdict_of[twin], verdict_of[place]
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for place, verdict in verdict_of.items():
        table[known[place]["defect"] if place in known else "unlisted"][verdict] += 1
    return {defect: dict(counts.most_common()) for defect, counts in sorted(table.items())}


def recall(planted: dict[str, dict[str, int]]) -> dict[str, float]:
    """Share of each planted defect that was dropped, and of good pictures (false alarms)."""
    first = ("wrong_caption", "none")  # what the similarity is for, and its price
    shares = {}
    for defect in sorted(planted, key=lambda name: (name not in first, name == "none", name)):
        verdicts = planted[defect]
        kind = "false_alarms" if defect in HARMLESS else "recall"
        shares[f"{kind}/{defect}"] = 1 - verdicts.get("ok", 0) / sum(verdicts.values())
    return shares
