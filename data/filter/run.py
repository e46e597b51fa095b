"""The filter stage: scores → verdicts → kept → shards, with a report of what went and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Literal

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from data import sql
from data.config import FilterConfig
from data.demo import HARMLESS
from data.filter import pictures, select
from data.filter.rules import SAME
from data.layout import image_shards
from data.report import Report, Step
from data.score.judge import path_of
from data.score.run import FITTED
from data.shards import write as shards
from gigagan.common.progress import Progress, silent


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
        ValueError: the scoring is not finished, or is that of another download.
        NothingKeptError, UnscoredError: see select.select.
    """
    num_shards = _demand_finished(scores, download)
    found = select.select(out, scores, config, workers=workers, progress=progress)
    lost = shards.write(
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
    report = _report(
        found, Counter(why.partition(":")[0] for why in lost.values()), planted, config
    )
    report.details["scored_shards"] = num_shards
    pictures.draw(report, out / "funnel.png")
    pictures.sheets(out, scores, download, progress=progress)
    report.save(out / "report.json")
    return report


def _demand_finished(scores: Path, download: Path) -> int:
    """How many shards the download has, all of which must be scored, and no others."""
    shards = [*image_shards(download)]
    if not shards:
        raise ValueError(f"{download} is not a finished download: it has no fates")
    wanted = [path_of(scores, "scores", shard) for shard in shards]
    files = {*select.score_files(scores)}
    done = [path for path in wanted if path in files]
    if done and (strange := files - {*wanted}):
        raise ValueError(
            f"{min(strange)} is of no shard of {download}: name the download that was scored"
        )
    if not (scores / FITTED).exists():  # nor is it beside scores that come from a store far away
        fitted = {
            path_of(scores, "scores", shard)
            for shard in shards
            if path_of(scores, "embeddings", shard).exists()
        }
        done = [path for path in done if path not in fitted or not _is_bare(path)]
    if len(done) < len(wanted):
        raise ValueError(
            f"{scores}: scoring is not finished: {len(done):,} of {len(wanted):,} shards; run "
            f"`python -m data score {scores} --download {download}` again"
        )
    return len(wanted)


def _is_bare(path: Path) -> bool:
    """Whether a score file waits for its similarities, by its footer."""
    rows = pq.read_metadata(path)
    place = rows.schema.names.index("similarity")
    counts = [rows.row_group(n).column(place).statistics for n in range(rows.num_row_groups)]
    return rows.num_rows == sum(count.null_count for count in counts)


def _report(
    found: select.Selection,
    lost: Counter[str],
    planted: dict[str, dict[str, int]],
    config: FilterConfig,
) -> Report:
    """`lost` are pictures that were kept and are not what was scored, by reason."""
    steps = select.funnel(found.counts, config)
    for why, rows in sorted(lost.items()):
        steps.append(Step(why, rows, steps[-1].rows - rows))
    counts = {**found.counts, "ok": steps[-1].rows, **lost}
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
    return Report(counts, steps, {k: float(v) for k, v in metrics.items()}, details)


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
