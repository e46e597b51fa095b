"""The filter stage: scores → verdicts → kept → shards, with a report of what went and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Literal

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from data import pictures, select, shards, sql
from data.config import FilterConfig
from data.demo import HARMLESS
from data.report import Progress, Report, silent
from data.rules import SAME


def run(
    out: Path,
    scores: Path,
    download: Path,
    config: FilterConfig,
    *,
    workers: int = 1,
    backend: Literal["processes", "ray"] = "processes",
    progress: Progress = silent,
) -> Report:
    """Choose among the pictures scored in `scores`, and write shards of those in `download`.

    Nothing is scored here, so another threshold costs seconds and new shards. Run again after an
    interruption, it makes what is missing.

    Raises:
        NothingKeptError, UnscoredError: see select.select.
    """
    found = select.select(out, scores, config, workers=workers, progress=progress)
    shards.write(
        out / "kept.parquet",
        download,
        out / "shards",
        config,
        workers=workers,
        backend=backend,
        progress=progress,
    )
    truth = download / "site" / "truth.parquet"
    planted = against_truth(_verdicts(out, scores), truth) if truth.exists() else {}
    report = _report(found, planted, config)
    pictures.draw(report, out / "funnel.png")
    pictures.sheets(out, scores, download, progress=progress)
    report.save(out / "report.json")
    return report


def _report(
    found: select.Selection, planted: dict[str, dict[str, int]], config: FilterConfig
) -> Report:
    steps = select.funnel(found.counts, config)
    metrics = {"pictures": steps[0].rows, "kept": steps[-1].rows, **_recall(planted)}
    nulls = {
        rule: {"dropped": found.counts[rule], "without a value": missing}
        for rule, missing in found.missing.items()
    }
    details = {
        "thresholds": found.thresholds,
        "nulls": nulls,
        "histograms": found.histograms,
        "planted": planted,
    }
    return Report(found.counts, steps, {k: float(v) for k, v in metrics.items()}, details)


def _verdicts(out: Path, scores: Path) -> pa.Table:
    """url, caption and verdict of every picture."""
    with duckdb.connect() as database:
        database.execute("SET enable_progress_bar = false")
        verdicts = sql.parquet([out / "verdicts.parquet"])
        query = (
            f"SELECT url, caption, verdict FROM {verdicts} AS verdicts "
            f"JOIN {sql.parquet(select.score_files(scores))} AS scores USING (key) ORDER BY key"
        )
        return database.sql(query).to_arrow_table()


def against_truth(verdicts: pa.Table, truth: Path) -> dict[str, dict[str, int]]:
    """Planted defect → verdict → rows, of a source that knows its defects. Never a rule's input.

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


def _recall(planted: dict[str, dict[str, int]]) -> dict[str, float]:
    """Share of each planted defect that was dropped, and of good pictures (false alarms)."""
    first = ("wrong_caption", "none")  # what the similarity is for, and its price
    shares = {}
    for defect in sorted(planted, key=lambda name: (name not in first, name == "none", name)):
        verdicts = planted[defect]
        kind = "false_alarms" if defect in HARMLESS else "recall"
        shares[f"{kind}/{defect}"] = 1 - verdicts.get("ok", 0) / sum(verdicts.values())
    return shares
