"""Tables and pictures of the ladder, from its records and nothing else."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gigagan.config.presets import LADDER
from gigagan.evaluation.heldout import read_heldout
from gigagan.evaluation.report.results import caption_grid
from studies import _compare, _queue
from studies.learning import drawn_in

READINGS = {"images": "equal images", "time": "equal time"}
OURS = {"warm-start": "`vision` + warm start", "projected": "`vision`'s G, projected critic"}


class Published(NamedTuple):
    """A row of Table 1 (64 px, batch 256, 100 k steps; the last row longer)."""

    fid: float
    """FID-10k on COCO."""
    clip: float
    """CLIP score, ViT-B/32."""


PAPER = {
    "stylegan2": Published(29.91, 0.222),
    "larger": Published(34.07, 0.223),
    "tuned": Published(28.11, 0.228),
    "attention": Published(23.87, 0.235),
    "matching-d": Published(27.29, 0.250),
    "matching-gd": Published(21.66, 0.254),
    "adaptive": Published(19.97, 0.261),
    "deeper": Published(19.18, 0.263),
    "clip": Published(14.88, 0.280),
    "multi-scale": Published(14.92, 0.300),
    "vision": Published(13.67, 0.287),
    "scale-up": Published(9.18, 0.307),
}
"""Kang et al. 2023 (arXiv:2303.05511), Table 1."""


class Metric(NamedTuple):
    """How a metric of a results.json is shown."""

    title: str
    show: Callable[[float], str]
    is_better_up: bool


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


METRICS = {
    "kid": Metric("KID × 10³", lambda v: f"{1e3 * v:.0f}", False),
    "fid": Metric("FID", lambda v: f"{v:.0f}", False),
    "naming_pixels_r1_combination": Metric("R@1 by pixels, %", _percent, True),
    "naming_pixels_rank_combination": Metric("… median rank", lambda v: f"{v:.0f}", False),
    "naming_judge_r1_combination": Metric("R@1 by the judge, %", _percent, True),
    "aligner_recall_at_10": Metric("aligner's R@10, %", _percent, True),
    "background_colour_accuracy": Metric("background, %", _percent, True),
    "pixel_probe_median_rank": Metric("layout, median rank of 256", lambda v: f"{v:.0f}", False),
    "shape_rank": Metric("shape rank", lambda v: f"{v:.2f}", False),
    "precision": Metric("precision", lambda v: f"{v:.2f}", True),
    "recall": Metric("recall", lambda v: f"{v:.2f}", True),
}
ON_LOG_SCALE = ("kid", "fid")
"""With an interval: seeds move these by a share of their size."""
Found = dict[str, dict[str, dict[int, Any]]]
"""Reading → row → seed → what was measured then."""
LONGER = "longer"
"""Of the results: some rows again, with terms of their own."""


class Looks(NamedTuple):
    """What a row is like, whatever it draws."""

    parameters: int
    ms: str
    """Milliseconds of an image."""
    peak_mb: float


def report(results: Path, images: Path) -> dict[str, str]:
    """Tables as Markdown, by the block of docs/paper.md; draws ladder.png into `images`.

    Raises:
        ValueError: nothing was measured yet.
    """
    found, looks = _read(results)
    draw(images / "ladder.png", found)
    tables = {f"ladder-{reading}": _table(reading, found, looks) for reading in READINGS}
    tables |= {"ladder-steps": _steps(found), "ladder-agreement": _agreement(found)}
    if (results / LONGER).is_dir():
        longer, looks = _read(results / LONGER)
        tables |= {f"ladder-longer-{reading}": _table(reading, longer, looks) for reading in longer}
        tables["ladder-longer-agreement"] = _agreement(longer)
    return tables


def _read(results: Path) -> tuple[Found, dict[str, Looks]]:
    records = _queue.records(results)
    if not records:
        raise ValueError(f"no records in {results}: `python -m studies.ladder run` makes them")
    found: Found = {
        reading: defaultdict(dict) for reading in READINGS if reading in records[0]["readings"]
    }
    peaks: dict[str, list[float]] = defaultdict(list)
    for record in records:
        row, seed = record["about"]["row"], record["about"]["seed"]
        for reading in found:
            one = record["readings"][reading]
            found[reading][row][seed] = one
            if "peak_mb" in one:  # of the reading that came first
                peaks[row].append(one["peak_mb"])
    cost = json.loads((results / "cost.json").read_text())["milliseconds"]
    ms = {row: f"{cost[row]:.0f}" for row in peaks}
    if "warm-start" in ms:
        ms["warm-start"] += f", {cost['vision']:.0f}"
    parameters = {record["about"]["row"]: record["parameters"] for record in records}
    looks = {r: Looks(parameters[r], ms[r], float(np.mean(peak))) for r, peak in peaks.items()}
    return found, looks


def values(
    rows: Mapping[str, Mapping[int, Any]], metric: str, *, log: bool
) -> dict[str, list[float]]:
    """Of every row, by seed; KID can come out below 0, which has no logarithm."""
    taken = {
        row: [seeds[seed]["metrics"][metric] for seed in sorted(seeds)]
        for row, seeds in rows.items()
    }
    return {r: [math.log(max(v, 1e-4)) for v in vs] if log else vs for r, vs in taken.items()}


def _order(rows: Mapping[str, Any]) -> list[str]:
    return [row for row in (*LADDER, *OURS) if row in rows]


def _with_interval(row: str, rows: Mapping[str, Mapping[int, Any]], metric: str) -> str:
    """Over seeds; over the pictures of one network where no row has a second seed."""
    if all(len(seeds) == 1 for seeds in rows.values()):
        (only,) = rows[row].values()
        numbers = (only["metrics"][metric], *only["intervals"][metric])
    else:
        logs = values(rows, metric, log=True)
        middle = _compare.mean_of(logs[row], _compare.spread(logs))
        numbers = tuple(math.exp(x) for x in middle)
    value, low, high = (METRICS[metric].show(x) for x in numbers)
    return f"{value} [{low}, {high}]"


def _table(reading: str, found: Found, looks: Mapping[str, Looks]) -> str:
    rows = found[reading]
    heads = ["", "seeds", "images", *(metric.title for metric in METRICS.values())]
    if reading == "images":
        heads[2:3] = ["G, M", "ms an image", "peak MB"]
    lines = [_line(heads), "|---|" + "---:|" * (len(heads) - 1)]
    for row in _order(rows):
        seeds, look = rows[row], looks[row]
        some = next(iter(seeds.values()))
        cells = [OURS.get(row, f"`{row}`"), str(len(seeds))]
        if reading == "images":
            cells += [f"{look.parameters / 1e6:.1f}", look.ms, f"{look.peak_mb:,.0f}"]
        else:
            cells.append(f"{some['images']:,}")
        for name, metric in METRICS.items():
            if name in ON_LOG_SCALE:
                cells.append(_with_interval(row, rows, name))
            else:
                mean = float(np.mean([s["metrics"][name] for s in seeds.values()]))
                cells.append(metric.show(mean))
        lines.append(_line(cells))
    for kind in ("real", "chance"):
        cells = [kind, *[""] * (heads.index("KID × 10³") - 1)]
        known = some["reference"][kind]
        cells += [m.show(known[name]) if name in known else "–" for name, m in METRICS.items()]
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _steps(found: Found) -> str:
    """What each row does to the row before it, beside the paper's."""
    heads = ["", "paper: FID", "KID at equal images", "KID at equal time", "paper: CLIP"]
    heads += ["background right at equal images", "the paper's sign, in KID"]
    lines = [_line(heads), "|---|" + "---:|" * (len(heads) - 2) + "---|"]
    names = list(PAPER)
    for before, after in itertools.pairwise(names):
        if not all(row in found[reading] for row in (before, after) for reading in READINGS):
            continue
        theirs = math.log(PAPER[after].fid / PAPER[before].fid)
        cells = [f"`{after}`", _share(theirs)]
        verdicts = []
        for reading in READINGS:
            logs = values(found[reading], "kid", log=True)
            change = _compare.difference(logs[after], logs[before], _compare.spread(logs))
            cells.append(f"{_share(change.value)} [{_share(change.low)}, {_share(change.high)}]")
            verdicts.append(verdict(change, theirs))
        cells.append(f"{PAPER[after].clip - PAPER[before].clip:+.3f}")
        agrees = values(found["images"], "background_colour_accuracy", log=False)
        change = _compare.difference(agrees[after], agrees[before], _compare.spread(agrees))
        cells.append(
            f"{100 * change.value:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
        )
        cells.append(" · ".join(verdicts))
        lines.append(_line(cells))
    return "\n".join(lines)


def _share(log_ratio: float) -> str:
    return f"{100 * (math.exp(log_ratio) - 1):+.0f} %"


def verdict(ours: _compare.Interval, theirs: float) -> str:
    """Whether a change has the sign of another, if its interval knows one."""
    if ours.low <= 0 <= ours.high:
        return "undecided"
    return "yes" if (ours.value > 0) == (theirs > 0) else "no"


_RANKED = (
    *("kid", "fid", "background_colour_accuracy", "pixel_probe_median_rank", "shape_rank"),
    *("naming_pixels_rank_combination", "aligner_recall_at_10"),
)


def _agreement(found: Found) -> str:
    """Spearman's ρ beside both columns of the paper; 1 is the paper's order."""
    heads = ["", "rows"]
    for reading in found:
        heads += [f"paper's {column}, {READINGS[reading]}" for column in ("FID", "CLIP score")]
    lines = [_line(heads), "|---|" + "---:|" * (len(heads) - 1)]
    for name in _RANKED:
        metric, cells = METRICS[name], []
        for rows in found.values():
            sign = -1 if metric.is_better_up else 1
            ours = {r: [sign * v for v in vs] for r, vs in values(rows, name, log=False).items()}
            for theirs in (
                {row: published.fid for row, published in PAPER.items()},
                {row: -published.clip for row, published in PAPER.items()},
            ):
                (value, low, high), p = _compare.agreement(ours, theirs)
                shown = f"{value:+.2f} [{low:+.2f}, {high:+.2f}], p {p:.3f}"
                cells.append("–" if math.isnan(value) else shown)
        num = sum(row in found["images"] for row in PAPER)
        lines.append(_line([metric.title.removesuffix(", %"), str(num), *cells]))
    return "\n".join(lines)


# ---- pictures ----------------------------------------------------------------------------------

_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#555555"


def draw(path: Path, found: Found) -> None:
    """KID of every row, a point a seed, a bar the interval of the mean; the paper's FID above."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    rows = _order(found["images"])
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    top, *panels = figure.subplots(1 + len(READINGS), 1, sharex=True)
    theirs = [(x, PAPER[row].fid) for x, row in enumerate(rows) if row in PAPER]
    top.plot(*zip(*theirs, strict=True), color=_GREY, marker="o")
    top.set_title("the paper: FID-10k, 64 px, 25.6 M images a row", fontsize=11)
    for axes, (reading, title) in zip(panels, READINGS.items(), strict=True):
        logs = values(found[reading], "kid", log=True)
        common = _compare.spread(logs)
        for x, row in enumerate(rows):
            colour = _BLUE if row in PAPER else _ORANGE
            middle = [1e3 * math.exp(v) for v in _compare.mean_of(logs[row], common)]
            axes.plot([x, x], middle[1:], color=colour, linewidth=2)
            axes.plot(x, middle[0], color=colour, marker="_", markersize=16)
            seeds = [1e3 * math.exp(v) for v in logs[row]]
            axes.plot([x] * len(seeds), seeds, color=colour, marker="o", linestyle="", alpha=0.45)
        images = {s["images"] for seeds in found[reading].values() for s in seeds.values()}
        span = f"{min(images):,}" if len(images) == 1 else f"{min(images):,} to {max(images):,}"
        axes.set_title(f"ours at {title}: KID × 10³, 32 px, {span} images a row", fontsize=11)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 6)))
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_minor_formatter("")
    for axes in (top, *panels):
        axes.grid(alpha=0.25)
    panels[-1].set_xticks(range(len(rows)), rows, rotation=30, ha="right")
    figure.savefig(path, dpi=110)


NUM_COLUMNS, CELL_PX = 8, 80


def draw_grid(path: Path, heldout: Path, evaluations: Path, reading: str) -> None:
    """The same captions by every row with the first seed, and the real pictures last."""
    gallery = read_heldout(heldout).gallery
    assert gallery is not None
    folders = {row: evaluations / f"{row}-seed-0-{reading}" for row in (*LADDER, *OURS)}
    drawn = {row: drawn_in(folder) for row, folder in folders.items() if folder.exists()}
    real = {w.caption: w.picture for w in gallery.works if w.split == "combination"}
    captions = [c for c in real if all(c in pictures for pictures in drawn.values())]
    captions = captions[:: max(len(captions) // NUM_COLUMNS, 1)][:NUM_COLUMNS]
    sets = [*drawn.items(), ("real", real)]
    rows = [(row, [Image.open(files[c]) for c in captions]) for row, files in sets]
    title = "the same captions, never trained, by every row; the last row is real"
    caption_grid(rows, title=title, cell_px=CELL_PX, columns=2, font_px=11).save(path)
