"""One picture to judge a run by: every figure of its log over the images seen.

It reads the log and nothing else, so it works during a run and long after it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gigagan.common.files import filled_aside
from gigagan.config import HealthConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 4
WIDTH_PX, ROW_PX, DPI = 1400, 235, 100
HEAD_PX, TITLE_PX, TICKS_PX, EDGE_PX = 50, 22, 30, 20
LABELS_PX = 55
"""Left of every panel, for the numbers of its axis."""
# Okabe and Ito: told apart with any colour vision, and by lightness in grey. The same word has the
# same colour in every panel.
COLOURS = {
    "real": "#0072b2",
    "fake": "#d55e00",
    "mismatch": "#009e73",
    "vision": "#cc79a7",
    "contrastive": "#e69f00",
    "D": "#0072b2",
    "G": "#d55e00",
}
OTHER_COLOURS = ("#000000", "#56b4e9", "#e69f00", "#009e73", "#cc79a7")
GREY, LIMIT_COLOUR = "#555555", "#8b0000"
MANY_POINTS, FEW_POINTS = 120, 40
ROLLBACKS = "health/rollbacks"
_PLAIN = ("bilinear", "bicubic", "lanczos")
UNSHOWN = {ROLLBACKS, "cpu_seconds", "time"}  # the first is drawn in every panel


class Curve(NamedTuple):
    """Values over images seen, without gaps."""

    images: list[int]
    values: list[float]


@dataclass(frozen=True)
class Panel:
    """Figures that belong together, their scale and their limits."""

    title: str
    series: Mapping[str, str]
    """Label → name in the log; an empty label draws no legend."""
    limits: tuple[float, ...] = ()
    is_log: bool = False
    span: tuple[float, float] | None = None
    """The axis shows at least this."""
    is_smoothed: bool = True
    """A long curve is drawn as its median; false where a single spike is what matters."""
    dashed: Mapping[str, str] | None = None
    """Label of a series → name in the log of its limit, where that varies."""


def panels(limits: HealthConfig) -> list[Panel]:
    """What a person looks at, in the order of looking."""
    return [*_of_steps(limits), *_of_vital_signs(limits), *_OF_PROBES, *_OF_THE_RUN]


def _of_steps(limits: HealthConfig) -> list[Panel]:
    """Losses, logits, gradients, and steps that were skipped."""
    return [
        Panel(
            "D's losses",
            {"real": "d/real", "fake": "d/fake", "mismatch": "d/mismatch", "vision": "d/vision"},
            (limits.overconfident_loss,),
            span=(0, 0.5),
        ),
        Panel(
            "G's losses",
            {
                **{n: f"g/{n}" for n in ("adversarial", "mismatch", "vision", "contrastive")},
                "LPIPS": "g/lpips",
                **{n: f"g/{n}" for n in ("pixel", "regression")},
            },
            span=(0, 0.5),
        ),
        Panel(
            "D's mean logits",
            {"real": "d/logit_real", "fake": "d/logit_fake", "mismatch": "d/logit_mismatch"},
        ),
        Panel(
            "logit spread |real − fake|", {"": "spread"}, (limits.max_logit_spread,), is_log=True
        ),
        Panel("R1 penalty", {"": "d/r1"}, (limits.max_r1,), is_log=True),
        Panel(
            "gradient norms",
            {"D": "d/gradient_norm", "G": "g/gradient_norm"},
            is_log=True,
            dashed={"D": "health/norm_limit_d", "G": "health/norm_limit_g"},
        ),
        Panel(
            "share of steps skipped",
            _both("health/skipped_share"),
            (limits.max_bad_share,),
            span=(0, 1),
            is_smoothed=False,
        ),
        Panel("steps skipped so far", _both("health/skipped"), span=(0, 1), is_smoothed=False),
        Panel("learning rate factor", {"": "health/rate_factor"}, span=(0, 1), is_smoothed=False),
    ]


def _of_vital_signs(limits: HealthConfig) -> list[Panel]:
    """The networks' inside."""
    return [
        Panel(
            "kernel selection entropy / log N",
            {"": "health/selection_entropy"},
            (limits.min_selection_entropy,),
            span=(0, 1),
        ),
        Panel(
            "attention: weight on oneself",
            _both("health/attention_self"),
            (limits.max_self_weight,),
            span=(0, 1),
        ),
        Panel(
            "effect of z on a pixel",
            {"trained": "health/z_effect", "averaged": "probe/z_sensitivity"},
            (limits.min_z_effect,),
            span=(0, 0.05),
        ),
        Panel("root of summed squared weights", _both("health/weight_norm")),
    ]


def _both(name: str) -> dict[str, str]:
    """A figure of both networks."""
    return {"D": f"{name}_d", "G": f"{name}_g"}


_OF_PROBES = (
    Panel(
        "probe: pictures one can name (R@1 by pixels)",
        {
            **{s: f"probe/naming_r1_{s}" for s in ("trained", "combination", "unseen")},
            "chance": "probe/naming_chance",
        },
        span=(0, 1),
    ),
    Panel("probe: colour accuracy", {"": "probe/colour_accuracy"}, span=(0, 1)),
    Panel("probe: shape rank (0.5 = chance)", {"": "probe/shape_rank"}, span=(0, 0.5)),
    Panel(
        "probe: median rank of the own picture",
        {"model": "probe/pixel_median_rank", "chance": "probe/pixel_chance_rank"},
        span=(0, 1),
    ),
    Panel(
        "probe: LPIPS to unseen pictures",
        {"model": "probe/lpips", **{m: f"probe/lpips_{m}" for m in _PLAIN}},
    ),
    Panel("probe: PSNR in dB", {"model": "probe/psnr", **{m: f"probe/psnr_{m}" for m in _PLAIN}}),
)
_OF_THE_RUN = (
    Panel(
        "learning rate",
        {"D": "phase/learning_rate_d", "G": "learning_rate"},
        span=(0, 0),
        is_smoothed=False,
    ),
    Panel(
        "phase: weights of G's loss",
        {"adversarial": "phase/adversarial", "regression": "phase/regression"},
        span=(0, 1),
        is_smoothed=False,
    ),
    Panel("half-life of the average, images", {"": "ema/half_life"}, span=(0, 1)),
    Panel("share of images augmented", {"": "augment/probability"}, span=(0, 1)),
    Panel("mean sign of D at real images", {"": "d/sign_real"}, span=(0, 1)),
    Panel("checkpoints not written", {"": "health/failed_checkpoints"}, span=(0, 1)),
    Panel("images per second", {"": "images_per_second"}, span=(0, 1)),
)


def draw_health(
    metrics_jsonl: Path,
    out_png: Path,
    limits: HealthConfig = HealthConfig(),  # noqa: B008 - frozen
) -> None:
    """Draw small multiples of every figure in a log; dashed lines are limits.

    Figures that no panel knows get one of their own. A torn last line is skipped.

    Raises:
        ValueError: the log holds no figure.
    """
    # The object interface: no global state, and no display asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = read_curves(metrics_jsonl)
    drawn = _present(panels(limits), curves)
    if not drawn:
        raise ValueError(f"{metrics_jsonl} holds no figure yet: draw it after the first line")
    num_rows = math.ceil(len(drawn) / COLUMNS)
    height_px = ROW_PX * num_rows + HEAD_PX
    figure = Figure(figsize=(WIDTH_PX / DPI, height_px / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    # Fixed margins: a layout engine draws everything a second time, while training waits.
    figure.subplots_adjust(
        left=LABELS_PX / WIDTH_PX,
        right=1 - EDGE_PX / WIDTH_PX,
        bottom=TICKS_PX / height_px,
        top=1 - (HEAD_PX + TITLE_PX) / height_px,
        wspace=_share(WIDTH_PX - EDGE_PX, COLUMNS, LABELS_PX),
        hspace=_share(ROW_PX * num_rows, num_rows, TITLE_PX + TICKS_PX),
    )
    last = max(curve.images[-1] for curve in curves.values())
    rollbacks = rollback_positions(curves)
    for index, panel in enumerate(drawn):
        axes = figure.add_subplot(num_rows, COLUMNS, index + 1)
        _draw_panel(axes, panel, curves)
        for position in rollbacks:
            axes.axvline(position, color=GREY, linewidth=1, linestyle=":")
        axes.set_xlim(0, last * 1.02 or 1)
    title = _title(metrics_jsonl.resolve().parent.name, last, curves)
    figure.suptitle(title, fontsize=12, y=1 - HEAD_PX / 2 / height_px, va="center")
    out_png.parent.mkdir(parents=True, exist_ok=True)
    with filled_aside(out_png) as partial:
        figure.savefig(partial, format="png")


def _share(room: int, count: int, gap: int) -> float:
    """A gap in front of each of `count` panels, as matplotlib wants it: in panels' sizes."""
    return gap / (room / count - gap)


def read_curves(metrics_jsonl: Path) -> dict[str, Curve]:
    """Name → its finite values in the order of the log; the logit spread is added."""
    curves: dict[str, Curve] = {}
    for line in _lines(metrics_jsonl):
        images = int(line["images"])
        if "d/logit_real" in line and "d/logit_fake" in line:
            line = line | {"spread": abs(line["d/logit_real"] - line["d/logit_fake"])}
        for name, value in line.items():
            if name != "images" and isinstance(value, int | float) and math.isfinite(value):
                curve = curves.setdefault(name, Curve([], []))
                curve.images.append(images)
                curve.values.append(value)
    return curves


def rollback_positions(curves: Mapping[str, Curve]) -> list[int]:
    """Where the count of rollbacks is seen to rise."""
    curve = curves.get(ROLLBACKS, Curve([], []))
    before = [0.0, *curve.values]
    return [
        images
        for images, old, new in zip(curve.images, before, curve.values, strict=False)
        if new > old
    ]


def rolling_median(values: Sequence[float], width: int) -> list[float]:
    """The median of up to `width` values around each."""
    half = width // 2
    medians = []
    for i in range(len(values)):
        window = sorted(values[max(i - half, 0) : i + half + 1])
        medians.append(window[len(window) // 2])
    return medians


def _lines(path: Path) -> Iterable[dict[str, float]]:
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # torn
            continue
        if isinstance(line, dict) and "images" in line:
            yield line


def _present(known: Sequence[Panel], curves: Mapping[str, Curve]) -> list[Panel]:
    """Panels with something to show, then one for each figure that none of them has."""
    shown = [p for p in known if any(name in curves for name in p.series.values())]
    claimed = {name for p in known for name in p.series.values()}
    claimed |= {name for p in known for name in (p.dashed or {}).values()} | UNSHOWN
    return shown + [Panel(name, {"": name}) for name in curves if name not in claimed]


def _draw_panel(axes: Axes, panel: Panel, curves: Mapping[str, Curve]) -> None:
    """One small chart: curves, limits, legend, scale."""
    present = [curves[name] for name in panel.series.values() if name in curves]
    is_log = panel.is_log and any(v > 0 for curve in present for v in curve.values)
    if is_log:
        axes.set_yscale("log")
    spare = iter(OTHER_COLOURS)
    for label, name in panel.series.items():
        if name not in curves:
            continue
        colour = COLOURS.get(label) or next(spare)
        curve = _positive(curves[name]) if is_log else curves[name]
        _draw_curve(axes, curve, colour, label, is_smoothed=panel.is_smoothed)
        limit = (panel.dashed or {}).get(label, "")
        if limit in curves:
            axes.plot(*curves[limit], color=colour, linestyle="--", linewidth=1)
    for value in panel.limits:
        axes.axhline(value, color=LIMIT_COLOUR, linestyle="--", linewidth=1)
    if panel.span is not None:
        low, high = axes.get_ylim()
        room = 0.04 * (panel.span[1] - panel.span[0])
        axes.set_ylim(min(low, panel.span[0] - room), max(high, panel.span[1] + room))
    if is_log:
        _label_log(axes)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.xaxis.set_major_formatter(_short)
    axes.tick_params(labelsize=8)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if any(panel.series):
        axes.legend(fontsize=8, frameon=False, loc="best", handlelength=1.2, labelspacing=0.2)


def _positive(curve: Curve) -> Curve:
    """What a logarithmic axis can show; the rest would only warn."""
    shown = [(i, v) for i, v in zip(*curve, strict=True) if v > 0]
    return Curve([i for i, _ in shown], [v for _, v in shown])


def _draw_curve(axes: Axes, curve: Curve, colour: str, label: str, *, is_smoothed: bool) -> None:
    """Dots where there are few; where there are many, their median over a pale band."""
    count = len(curve.values)
    if count <= MANY_POINTS or not is_smoothed:
        marker = "o" if count <= FEW_POINTS else None
        axes.plot(*curve, color=colour, linewidth=1.4, marker=marker, markersize=2.5, label=label)
        return
    axes.plot(*curve, color=colour, linewidth=0.6, alpha=0.3)
    axes.plot(
        curve.images,
        rolling_median(curve.values, count // 40),
        color=colour,
        linewidth=1.5,
        label=label,
    )


def _label_log(axes: Axes) -> None:
    """A logarithmic axis labelled 0.5, 1, 2 and not with powers; over many decades 0.1, 1, 10."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")


def _short(images: float, _position: float | None = None) -> str:
    """12000 → 12k, 2500000 → 2.5M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(images) >= size:
            return f"{images / size:g}{letter}"
    return f"{images:g}"


def _title(run_name: str, last: int, curves: Mapping[str, Curve]) -> str:
    """Which run, how far, and what happened to it."""
    parts = [f"{run_name}: {last:,} images seen"]
    if "images_per_second" in curves:
        parts.append(f"{curves['images_per_second'].values[-1]:.1f} images/s")
    if ROLLBACKS in curves:
        skipped = sum(
            curves[name].values[-1]
            for name in ("health/skipped_d", "health/skipped_g")
            if name in curves
        )
        parts += [
            f"{skipped:g} steps skipped",
            f"{curves[ROLLBACKS].values[-1]:g} rollbacks (dotted)",
        ]
    return "  ·  ".join([*parts, "dashed = limit"])
