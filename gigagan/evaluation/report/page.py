"""An evaluation as one HTML file that holds everything: no script and no request.

What it looks like is said in `report.html.j2`, what is in it here.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from gigagan.common.files import write_aside
from gigagan.evaluation.judges.neighbours import Memorisation
from gigagan.evaluation.protocol import PROTOCOLS
from gigagan.evaluation.report.categories import CategoryRow
from gigagan.evaluation.report.results import unpaired
from gigagan.evaluation.report.sweeps import CurvePoint, Speed
from gigagan.evaluation.report.units import TITLES, Looks

_CELL_PX = 128
_SPLITS = {
    "trained": "trained on",
    "combination": "never-trained combinations",
    "unseen": "concepts never trained",
}

Pair = tuple[str, Image.Image, Image.Image | None]
"""Caption, generated, real."""


@dataclass(frozen=True)
class Figures:
    """What a page shows beside the numbers; what is missing is left out."""

    grid: Sequence[Pair] = ()
    title: str = "Pictures"
    """What the grid shows."""
    unseen: Sequence[Pair] = ()
    """Concepts never trained."""
    latents: Sequence[tuple[str, Sequence[Image.Image]]] = ()
    curve: Sequence[CurvePoint] | None = None
    speeds: Sequence[Speed] | None = None
    neighbours: Sequence[tuple[str, Image.Image, Sequence[tuple[Image.Image, float]]]] | None = None
    """Caption, sample, its nearest training pictures with their cosines."""
    memorisation: Memorisation | None = None
    categories: Sequence[CategoryRow] | None = None
    worst: Sequence[tuple[str, str, Image.Image, float]] | None = None
    """Kind, caption, picture, agreement."""
    dissected: Looks | None = None


def write_page(path: Path, results: Mapping[str, Any], figures: Figures) -> Path:
    """Write the page of an evaluation, atomically; `results` as in results.json."""
    text = _template().render(
        rules=results["protocol"],
        summary=_summary(results["protocol"]),
        results=results,
        published=_published(results),
        naming=_naming(results["metrics"]),
        figures=figures,
        dissected=list(zip(TITLES, figures.dissected or (), strict=False)),
        curve=_curve(figures.curve or (), results.get("truncation_metric", "kid")),
    )
    write_aside(path, text)
    return path


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for function in (_number, _share, _title, _data_address):
        environment.filters[function.__name__.lstrip("_")] = function
    return environment.get_template("report.html.j2")


def _summary(rules: Mapping[str, Any]) -> str:
    parts = [f"{rules.get('num_generated'):,} pictures against {rules.get('num_real'):,} real ones"]
    if rules.get("truncation") is not None:
        parts.append(f"truncation {rules['truncation']}, seed {rules['seed']}")
    else:
        parts.append("pictures that were there already; truncation and seed are not known")
    return "; ".join([*parts, *unpaired(rules)]) + "."


def _published(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Source, names of metrics, and rows of a model with its numbers; None for rules of our own."""
    rules = PROTOCOLS.get(str(results["protocol"].get("name")))
    if rules is None or not rules.published:
        return None
    names = list(dict.fromkeys(name for _, numbers in rules.published for name in numbers))
    rows = [("this evaluation", results["metrics"]), *rules.published]
    return {"source": rules.source, "names": names, "rows": rows}


def _naming(metrics: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """Which captions, the judge, and the metrics of R@1 and of the median rank."""
    judges = {"pixels": "16×16 pixels", "judge": "the judge"}
    rows = [
        (captions, judge, f"naming_{how}_r1_{split}", f"naming_{how}_rank_{split}")
        for split, captions in _SPLITS.items()
        for how, judge in judges.items()
    ]
    return [row for row in rows if row[2] in metrics]


def _curve(points: Sequence[CurvePoint], metric: str) -> dict[str, Any]:
    """Places of the points in pixels of the drawing (560 × 320), and what stands at both axes."""
    xs, ys = [p.alignment for p in points], [p.distance for p in points]

    def scaled(value: float, values: Sequence[float], low: float, high: float) -> float:
        span = max(values) - min(values)
        part = (value - min(values)) / span if span else 0.5
        return round(low + part * (high - low), 1)

    def across(value: float) -> float:
        return scaled(value, xs, 100, 500)

    def up(value: float) -> float:
        return scaled(value, ys, 250, 24)

    return {
        "metric": _title(metric),
        "places": [(across(p.alignment), up(p.distance), p.truncation) for p in points],
        "across": [(value, across(value)) for value in sorted({min(xs), max(xs)})] if xs else [],
        "up": [(value, up(value)) for value in sorted({min(ys), max(ys)})] if ys else [],
    }


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _title(name: str) -> str:
    """A metric's name for people."""
    if match := re.fullmatch(r"naming_(pixels|judge)_r1_(\w+)", name):
        return f"R@1 by {match[1]}: {_SPLITS[match[2]]}"
    return {"fid": "FID", "kid": "KID"}.get(name, name.replace("_", " "))


def _data_address(picture: Image.Image) -> str:
    """The picture itself as an address, at most `_CELL_PX` wide and high."""
    picture = picture.convert("RGB")
    picture.thumbnail((_CELL_PX, _CELL_PX), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
