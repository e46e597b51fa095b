"""Tables and picture of the trilemma, from its records and nothing else."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gigagan.config.presets import LADDER
from studies._ladder import OURS

MODELS, SPEED, PUBLISHED = "models", "speed.json", "published.json"
"""Among the results: a folder of records, and two files."""
REAL, REAL_128 = "real", "real-128"
PACKAGE, PAIR, ENLARGED = "package", "package-128", "package-enlarged"
TITLES = {row: f"`{row}`" for row in LADDER} | OURS
TITLES |= {
    "stylegan-t": "StyleGAN-T (`stylegan_t_small_32`)",
    "gigagan-pytorch": "gigagan-pytorch 0.3.0, unconditional",
    PACKAGE: "the package's base",
    ENLARGED: "the package's base, enlarged by Lanczos' filter",
    PAIR: "the package's base and upsampler",
    REAL: "real: training pictures",
    REAL_128: "real: training pictures",
}
"""How a table calls a model, and in which order; others by their names, behind."""
NAMING = "naming_pixels_r1_combination"


class Row(NamedTuple):
    """A model with what was measured of it."""

    name: str
    record: Mapping[str, Any]
    milliseconds: Mapping[str, float] | None
    """One picture, a batch, a caption; None for pictures that nothing draws."""
    batch: int

    def metric(self, name: str) -> float:
        """A metric of its evaluation."""
        return float(self.record["metrics"][name])

    @property
    def per_second(self) -> float:
        """Pictures of a batch a second, to the two digits in which equal networks agree."""
        assert self.milliseconds is not None
        return float(f"{1e3 * self.batch / self.milliseconds['batch']:.2g}")

    @property
    def losses(self) -> tuple[float, float, float]:
        """Quality, coverage, speed, of all of which less is better."""
        return self.metric("kid"), -self.metric("coverage"), -self.per_second


def front(points: Mapping[str, Sequence[float]]) -> set[str]:
    """Names of which no other is as good in everything and better in something (Pareto).

    Less is better in every coordinate.
    """

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)

    return {n for n, own in points.items() if not any(beats(p, own) for p in points.values())}


def report(results: Path, images: Path) -> dict[str, str]:
    """Tables as Markdown, by the block of docs/paper.md; draws trilemma.png into `images`.

    Raises:
        ValueError: nothing was measured yet, or not everything was timed.
    """
    rows = read_rows(results)
    speed = json.loads((results / SPEED).read_text())["milliseconds"]
    small, large = ([row for row in rows if row.record["about"]["px"] == px] for px in (32, 128))
    draw(images / "trilemma.png", small)
    return {
        "trilemma": _table(small),
        "trilemma-128": _table(large),
        "trilemma-upsamplers": _upsamplers(speed),
        "trilemma-published": _published(json.loads((results / PUBLISHED).read_text())),
    }


def read_rows(results: Path) -> list[Row]:
    """All that was measured here, in the order of `TITLES`; raises as `report` does."""
    files = {path.stem: path for path in (results / MODELS).glob("*.json")}
    if not files or not (results / SPEED).exists():
        raise ValueError(
            f"no records in {results}: `python -m studies.trilemma judge`, then `time`"
        )
    speed = json.loads((results / SPEED).read_text())
    rows = []
    for name in [n for n in TITLES if n in files] + sorted(files.keys() - TITLES.keys()):
        record, times = json.loads(files[name].read_text()), speed["milliseconds"].get(name)
        if times is None and name not in (REAL, REAL_128):
            raise ValueError(f"{name} was judged, but not timed: run `studies.trilemma time` anew")
        rows.append(Row(name, record, times, speed["batch"]))
    return rows


# ---- tables ------------------------------------------------------------------------------------

_HEADS = (
    *("", "G, M", "images", "CPU, min", "KID × 10³", "FID", "R@1 by pixels, %"),
    *("recall", "coverage", "pictures a second", "one picture, ms", "its caption, ms", "front"),
)


def _table(rows: Sequence[Row]) -> str:
    drawn = [row for row in rows if row.milliseconds is not None]
    best = front({row.name: row.losses for row in drawn})
    lines = [_line(_HEADS), "|---|" + "---:|" * (len(_HEADS) - 2) + ":-:|"]
    lines += [_line(_cells(row, is_best=row.name in best)) for row in rows]
    known = [row.record["reference"]["chance"] for row in rows]
    for chance in sorted({one[NAMING] for one in known if NAMING in one}):
        cells = dict.fromkeys(_HEADS, "")
        cells |= {"": "chance", "R@1 by pixels, %": f"{100 * chance:.1f}"}
        lines.append(_line(list(cells.values())))
    return "\n".join(lines)


def _cells(row: Row, *, is_best: bool) -> list[str]:
    about = row.record["about"]
    cells = [TITLES.get(row.name, row.name)]
    for key, unit, how in (
        ("parameters", 1e6, ".1f"),
        ("images", 1, ",.0f"),
        ("cpu_seconds", 60, ".1f"),
    ):
        cells.append("–" if about.get(key) is None else format(about[key] / unit, how))
    cells += [_with_interval(row, "kid", 1e3, "z.0f"), _with_interval(row, "fid", 1, ".0f")]
    cells.append(
        _with_interval(row, NAMING, 100, ".1f") if NAMING in row.record["metrics"] else "–"
    )
    cells += [f"{row.metric(name):.3f}" for name in ("recall", "coverage")]
    if row.milliseconds is None:
        return [*cells, "–", "–", "–", ""]
    caption = row.milliseconds.get("caption")
    cells += [f"{row.per_second:.0f}", f"{row.milliseconds['picture']:.1f}"]
    return [*cells, "–" if caption is None else f"{caption:.1f}", "●" if is_best else ""]


def _with_interval(row: Row, name: str, factor: float, how: str) -> str:
    low, high = row.record["intervals"][name]
    return f"{factor * row.metric(name):{how}} [{factor * low:{how}}, {factor * high:{how}}]"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _upsamplers(speed: Mapping[str, Mapping[str, float]]) -> str:
    lines = ["| 64 px to 256 px, one picture | M | ms |", "|---|---:|---:|"]
    titles = {"ours": "ours, as wide as aura-sr", "aura-sr": "aura-sr 0.0.4, its width scaled"}
    for name, title in titles.items():
        found = speed[name]
        cells = [title, f"{found['parameters'] / 1e6:.1f}", f"{found['enlarge']:.0f}"]
        lines.append(_line(cells))
    return "\n".join(lines)


def _published(content: Mapping[str, Any]) -> str:
    """What papers report, in the order of the file: nothing of it was measured here."""
    heads = ["published, not measured here", "family", "parameters, × 10⁹", "FID-30k"]
    heads += ["seconds a picture", "of, px", "on", "source"]
    lines = [_line(heads), "|---|---|---:|---:|---:|---:|---|---|"]
    for one in content["models"]:
        number = [f"{one[k]:g}" if one[k] is not None else "–" for k in ("billion", "seconds")]
        cells = [one["model"], one["family"], number[0], f"{one['fid']:.2f}", number[1]]
        cells += ["–" if one["seconds"] is None else str(one["px"])]
        cells += [one["device"] or "not said", "; ".join(one["source"])]
        lines.append(_line(cells))
    sources = [f"{name}: {where}" for name, where in content["sources"].items()]
    return "\n".join([*lines, "", f"{content['rules']}. Sources: {'; '.join(sources)}."])


# ---- the picture -------------------------------------------------------------------------------

_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#555555"
_COLOURS = {PACKAGE: _GREEN, "warm-start": _GREEN, "projected": _ORANGE, "stylegan-t": _ORANGE}
_COLOURS |= {"gigagan-pytorch": _GREY}
"""Begun by regression; before a projected critic; another's; GigaGAN's losses are blue."""
_MARKERS = "osD^v<>PXhp8*d"
_LEAST_KID = 1e-3
"""Less is drawn as this: an unbiased estimate may be below 0, which has no logarithm."""


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Quality and coverage over speed; dashes join the front of each panel, dots are real."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [row for row in rows if row.milliseconds is not None]
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("kid", 1e3, 1, "KID × 10³: less is better"), ("coverage", 1, -1, "coverage"))
    for axes, (name, factor, sign, title) in zip(figure.subplots(1, 2), panels, strict=True):
        least = _LEAST_KID if name == "kid" else 0.0
        at = {r.name: (r.per_second, factor * max(r.metric(name), least)) for r in drawn}
        for row, marker in zip(drawn, itertools.cycle(_MARKERS)):
            colour, (x, y) = _COLOURS.get(row.name, _BLUE), at[row.name]
            label = TITLES.get(row.name, row.name).replace("`", "")
            axes.plot(x, y, marker, color=colour, markersize=9, alpha=0.85, label=label)
            if name in row.record["intervals"]:
                ends = [factor * max(end, least) for end in row.record["intervals"][name]]
                axes.plot([x, x], ends, color=colour, linewidth=1.5, alpha=0.6)
        best = front({n: (-x, sign * y) for n, (x, y) in at.items()})
        line = sorted(at[n] for n in best)
        axes.plot(*zip(*line, strict=True), color=_GREY, linewidth=1, linestyle="--", zorder=0)
        for row in rows:
            if row.milliseconds is None:
                real = factor * max(row.metric(name), least)
                axes.axhline(real, color=_GREY, linestyle=":", label=TITLES[row.name])
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("pictures a second of one core")
        axes.margins(x=0.1)
        axes.grid(alpha=0.25)
        if name == "kid":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:.0f}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)
