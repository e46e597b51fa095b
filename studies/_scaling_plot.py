"""The plot of `scaling`: loss and KID over compute, and the law's best at each compute."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from studies import _law
from studies._scaling_tables import Reading, points

_COLOURS = ("#56b4e9", "#0072b2", "#e69f00", "#d55e00")
_LINES = ("-", "--", ":")


def draw(
    path: Path,
    loss: Sequence[Reading],
    kid: Sequence[Reading],
    law_7: np.ndarray,
    laws_R7: np.ndarray,
) -> None:
    """A colour a width, a line a number of pictures; the band is the middle 95 % of the laws."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullLocator

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    colours = dict(zip(sorted({one.width for one in loss}), _COLOURS, strict=False))
    lines = dict(zip(sorted({one.pictures for one in loss}, reverse=True), _LINES, strict=False))
    for axes, readings, scale in ((left, loss, 1.0), (right, kid, 1e3)):
        for name, group in groupby(readings, key=lambda one: one.training):
            own = [*group]
            axes.errorbar(
                [one.compute for one in own],
                [scale * one.y for one in own],
                yerr=None if axes is left else [scale * 1.96 * one.spread for one in own],
                color=colours[own[0].width],
                linestyle=lines[own[0].pictures],
                marker="s" if name.startswith("longer") else "o",
                markersize=4,
                linewidth=1.2,
            )
    _draw_best(left, loss, law_7, laws_R7)
    left.set_title("Regression alone: loss on held-out captions", fontsize=11)
    right.set_title("The whole game: distance to real pictures", fontsize=11)
    left.set(ylabel="L1 over the pyramid")
    right.set(ylabel="KID × 10³, 95 %")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="multiply-adds of training")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
    left.legend(handles=_marks(colours, lines), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_best(axes: Any, loss: Sequence[Reading], law_7: np.ndarray, laws_R7: np.ndarray) -> None:
    """The law's least loss at each compute with all pictures, and its band."""
    compute = [one.compute for one in loss]
    compute_K = np.geomspace(min(compute), max(compute), 40)
    best_RK = np.stack([best(law, loss, compute_K) for law in laws_R7])
    low_K, high_K = np.quantile(best_RK, [0.025, 0.975], axis=0)
    axes.fill_between(compute_K, low_K, high_K, color="#999999", alpha=0.35, linewidth=0)
    axes.plot(compute_K, best(law_7, loss, compute_K), color="black", linewidth=1.5)


def best(law_7: np.ndarray, loss: Sequence[Reading], compute_K: np.ndarray) -> np.ndarray:
    """The least loss at each compute, K, over sizes between the smallest and the largest."""
    x_P3, _ = points(loss)
    size_N, first = np.unique(x_P3[:, 0], return_index=True)
    each_N = np.array([loss[place].compute / loss[place].images for place in first])
    size_M = np.geomspace(size_N[0], size_N[-1], 40)
    each_M = np.exp(np.interp(np.log(size_M), np.log(size_N), np.log(each_N)))
    seen_KM = compute_K[:, None] / each_M
    pictures_KM = np.full(seen_KM.shape, x_P3[:, 1].max())
    x_KM3 = np.stack([np.broadcast_to(size_M, seen_KM.shape), pictures_KM, seen_KM], axis=-1)
    return np.asarray(_law.predicted(law_7, x_KM3).min(1))


def _marks(colours: dict[float, str], lines: dict[int, str]) -> list[Any]:
    """What colours and lines mean."""
    from matplotlib.lines import Line2D

    return [
        *(
            Line2D([], [], color=colour, marker="o", markersize=4, label=f"width × {width:g}")
            for width, colour in colours.items()
        ),
        *(
            Line2D([], [], color="#666666", linestyle=line, label=f"{pictures:,} pictures")
            for pictures, line in lines.items()
        ),
        Line2D([], [], color="#666666", marker="s", markersize=4, label="longer trainings"),
        Line2D([], [], color="black", label="the law's best, with 95 %"),
    ]
