"""The filter stage: scores → verdicts → kept → shards, with a report of what went and why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq

from data.config import FilterConfig
from data.filter import pictures, select, truth
from data.layout import image_shards
from data.report import Report, Step
from data.score.run import FITTED
from data.score.shard import path_of
from data.shards import write as shards
from data.shards.manifest import INDEX, parse_index
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
    known = download / "site" / "truth.parquet"  # the embedded source knows its defects
    planted = truth.compare(out, scores, known) if known.exists() else {}
    report = _report(
        found, Counter(why.partition(":")[0] for why in lost.values()), planted, config
    )
    report.details["scored_shards"] = num_shards
    _add_classes(report, out / "shards" / f"{config.resolutions[0]:03d}" / INDEX)
    pictures.draw(report, out / "funnel.png")
    pictures.sheets(out, scores, download, progress=progress)
    report.save(out / "report.json")
    return report


def _add_classes(report: Report, path: Path) -> None:
    """How many classes the shards have, and samples of none; nothing where all are of none."""
    index = parse_index(path.read_bytes(), str(path))
    if index.classes:
        report.metrics["classes"] = float(len(index.classes))
        report.metrics["unlabelled"] = float(index.unlabelled)


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
    metrics = {"pictures": steps[0].rows, "kept": steps[-1].rows, **truth.recall(planted)}
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
