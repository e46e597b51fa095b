"""The filter stage: score → select → shards, with a report of what went and why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data import score, select, shards
from data.config import FilterConfig
from data.demo import HARMLESS
from data.report import Progress, Report, silent


def run(
    out: Path,
    download: Path,
    config: FilterConfig,
    encoders: score.Encoders,
    *,
    progress: Progress = silent,
) -> Report:
    """Filter what the download stage left in `download`; write scores, kept keys and shards.

    Raises:
        NothingKeptError: see select.select.
    """
    out.mkdir(parents=True, exist_ok=True)
    scores = pq.read_table(
        score.score(download / "images", out, encoders, config, progress=progress)
    )
    verdicts = select.select(scores, config)
    pq.write_table(verdicts, out / "verdicts.parquet")
    ok = np.asarray(verdicts["verdict"]) == "ok"
    kept = scores.filter(pa.array(ok))
    pq.write_table(kept, out / "kept.parquet")
    shards.write(kept, download / "images", out / "shards", config, progress=progress)

    truth = download / "site" / "truth.parquet"
    planted = select.against_truth(verdicts, truth) if truth.exists() else {}
    details = {"histograms": _histograms(scores), "planted": planted}
    steps = select.funnel(verdicts)
    counts = dict(Counter(verdicts["verdict"].to_pylist()).most_common())
    metrics = {"pictures": steps[0].rows, "kept": steps[-1].rows, **_recall(planted)}
    report = Report(counts, steps, {k: float(v) for k, v in metrics.items()}, details)
    draw(report, out / "funnel.png", config)
    report.save(out / "report.json")
    return report


def _recall(planted: dict[str, dict[str, int]]) -> dict[str, float]:
    """Share of each planted defect that was dropped, and of good pictures (false alarms)."""
    shares = {}
    first = ("wrong_caption", "none")  # what the similarity is for, and its price
    for defect in sorted(
        planted, key=lambda name: (name not in first, name not in first[:1], name)
    ):
        verdicts = planted[defect]
        dropped = 1 - verdicts.get("ok", 0) / sum(verdicts.values())
        name = f"false_alarms/{defect}" if defect in HARMLESS else f"recall/{defect}"
        shares[name] = dropped
    return shares


def _histograms(scores: pa.Table) -> dict[str, dict[str, list[float]]]:
    """Counts over 40 bins of each score, to choose thresholds by."""
    found = {}
    for name in ("similarity", "aesthetic", "unsafe"):
        values = scores[name].drop_null().to_numpy()
        if len(values):
            counts, edges = np.histogram(values, bins=40)
            found[name] = {"counts": counts.tolist(), "edges": np.round(edges, 4).tolist()}
    return found


def draw(report: Report, path: Path, config: FilterConfig) -> None:
    """The funnel and the histograms with their thresholds, as one PNG."""
    from matplotlib.figure import Figure

    histograms = report.details["histograms"]
    figure = Figure(figsize=(9, 3.2 + 2.2 * len(histograms)), layout="constrained")
    axes = figure.subplots(1 + len(histograms), 1, squeeze=False)[:, 0]
    names = [step.step for step in report.funnel]
    bars = axes[0].barh(names, [step.rows for step in report.funnel], color="#4878a8")
    labels = [f"{s.rows:,}" + (f"  (−{s.dropped:,})" if s.dropped else "") for s in report.funnel]
    axes[0].bar_label(bars, labels, padding=3)
    axes[0].invert_yaxis()
    axes[0].margins(x=0.2)
    axes[0].set_title("pictures left after each rule")
    limits = {
        "similarity": config.min_similarity,
        "aesthetic": config.min_aesthetic,
        "unsafe": config.max_unsafe,
    }
    for axis, (name, histogram) in zip(axes[1:], histograms.items(), strict=True):
        axis.stairs(histogram["counts"], histogram["edges"], fill=True, color="#8fb08c")
        axis.set_title(f"{name}: pictures per bin, threshold in red")
        if (limit := limits[name]) is not None:
            axis.axvline(limit, color="#b03030")
    figure.savefig(path, dpi=110)
