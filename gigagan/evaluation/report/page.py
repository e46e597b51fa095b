"""An evaluation as one HTML file that holds everything: no script and no request."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from gigagan.evaluation.judges.neighbours import Memorisation
from gigagan.evaluation.protocol import PROTOCOLS
from gigagan.evaluation.report.categories import CategoryRow
from gigagan.evaluation.report.results import unpaired
from gigagan.evaluation.report.sweeps import CurvePoint, Speed

_CELL = 128
_HEADLINES = 6
_STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:#1d2330;background:#fff;margin:0 auto;
max-width:1080px;padding:16px}
h1{font-size:1.5rem;line-height:1.25;margin:.3em 0}h2{font-size:1.15rem;margin:2em 0 .4em;
border-bottom:1px solid #dde1e8;padding-bottom:.2em}
p{max-width:46em}.muted{color:#5b6474;font-size:.9rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.card{border:1px solid #dde1e8;border-radius:8px;padding:10px 12px}
.card b{display:block;font-size:1.5rem;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;
font-variant-numeric:tabular-nums}
th,td{padding:4px 12px 4px 0;text-align:right;border-bottom:1px solid #eceff3;white-space:nowrap}
th:first-child,td:first-child{text-align:left}td.wrap{white-space:normal;overflow-wrap:anywhere;
text-align:left;min-width:10em}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:14px}
.wide{grid-template-columns:repeat(auto-fill,minmax(290px,1fr))}
figure{margin:0}figcaption{font-size:.8rem;line-height:1.3;overflow-wrap:anywhere}
figure div{display:flex;gap:2px}figure img{width:100%;min-width:0;flex:1 1 0;aspect-ratio:1;
object-fit:contain;image-rendering:auto;background:#f4f5f8}
svg{max-width:100%;height:auto}
@media print{h2{break-after:avoid}figure{break-inside:avoid}}
"""


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
    categories: Sequence[CategoryRow] | None = field(default=None)
    worst: Sequence[tuple[str, str, Image.Image, float]] | None = None
    """Kind, caption, picture, agreement."""


def write_page(path: Path, results: Mapping[str, Any], figures: Figures) -> Path:
    """Write the page of an evaluation, atomically; `results` as in results.json."""
    rules = results["protocol"]
    body = [
        f"<h1>{escape(str(rules.get('name')))}</h1>",
        f"<p class=muted>{escape(_summary(rules))}</p>",
        _cards(results),
        _published(results),
        _naming(results),
        _grid(figures.title, figures.grid, "spread evenly over the captions, none chosen"),
        _grid("Concepts never trained", figures.unseen, "one of each in turn, none chosen"),
        _latents(figures),
        _curve(figures.curve),
        _speeds(figures.speeds),
        _neighbours(figures),
        _categories(figures),
        _metrics(results),
        _absent(results),
        _rules(rules),
    ]
    text = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; "
        "img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(str(rules.get('name')))}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(part for part in body if part)
        + "</body></html>\n"
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def _summary(rules: Mapping[str, Any]) -> str:
    parts = [f"{rules.get('num_generated'):,} pictures against {rules.get('num_real'):,} real ones"]
    if rules.get("truncation") is not None:
        parts.append(f"truncation {rules['truncation']}, seed {rules['seed']}")
    else:
        parts.append("pictures that were there already; truncation and seed are not known")
    return "; ".join([*parts, *unpaired(rules)]) + "."


def _cards(results: Mapping[str, Any]) -> str:
    reference = results["reference"]
    cards = []
    for name in list(results["metrics"])[:_HEADLINES]:
        notes = [
            f"{kind} {reference[kind][name]:.4g}"
            for kind in ("real", "chance")
            if name in reference[kind]
        ]
        pair = results.get("intervals", {}).get(name)
        if pair:
            notes.insert(0, f"95 %: {pair[0]:.4g} to {pair[1]:.4g}")
        cards.append(
            f"<div class=card>{escape(_title(name))}<b>{results['metrics'][name]:.4g}</b>"
            f"<span class=muted>{escape(', '.join(notes))}</span></div>"
        )
    return f"<div class=cards>{''.join(cards)}</div>"


def _title(name: str) -> str:
    if match := re.fullmatch(r"naming_(pixels|judge)_r1_(\w+)", name):
        return f"R@1 by {match[1]}: {_SPLITS[match[2]]}"
    return {"fid": "FID", "kid": "KID"}.get(name, name.replace("_", " "))


def _published(results: Mapping[str, Any]) -> str:
    rules = PROTOCOLS.get(str(results["protocol"].get("name")))
    if rules is None or not rules.published:
        return (
            "<p class=muted>These rules are our own: the numbers compare with those of other runs "
            "under the same rules, and with no paper's.</p>"
        )
    names = list(dict.fromkeys(name for _, numbers in rules.published for name in numbers))
    rows = [["this evaluation", *(_number(results["metrics"].get(n)) for n in names)]]
    rows += [
        [model, *(_number(numbers.get(n)) for n in names)] for model, numbers in rules.published
    ]
    return _section(f"Beside what is published ({rules.source})", _table(["", *names], rows))


def _naming(results: Mapping[str, Any]) -> str:
    metrics, reference = results["metrics"], results["reference"]
    rows = []
    for split, what in _SPLITS.items():
        for how, judge in (("pixels", "16×16 pixels"), ("judge", "the judge")):
            name = f"naming_{how}_r1_{split}"
            if name not in metrics:
                continue
            low, high = results.get("intervals", {}).get(name, ("", ""))
            row = [what, judge, f"{metrics[name]:.1%}"]
            row.append(f"{low:.1%} to {high:.1%}" if low != "" else "")
            for kind in ("real", "chance"):
                value = reference[kind].get(name)
                row.append("" if value is None else f"{value:.1%}")
            rows.append([*row, _number(metrics[name.replace("_r1_", "_rank_")])])
    if not rows:
        return ""
    note = (
        "R@1: how many of the drawn pictures are nearest to their own real picture (16×16 pixels) "
        "or to their own caption (the judge, a projection from Inception's features that has seen "
        "no picture on this background), among those of the same style on the same background."
    )
    head = ["captions", "by", "R@1", "95 %", "real pictures", "chance", "median rank"]
    shown = f"<p class=muted>{note}</p>{_table(head, rows)}"
    return _section("Can one name what was drawn?", shown)


_SPLITS = {
    "trained": "trained on",
    "combination": "never-trained combinations",
    "unseen": "concepts never trained",
}


def _grid(title: str, pairs: Sequence[Pair], how: str) -> str:
    if not pairs:
        return ""
    cells = [
        _figure(caption, [("generated", drawn), *([] if real is None else [("real", real)])])
        for caption, drawn, real in pairs
    ]
    note = f"Uncurated: {how}. Generated left, real right."
    return _section(title, f"<p class=muted>{note}</p><div class=grid>{''.join(cells)}</div>")


def _latents(figures: Figures) -> str:
    if not figures.latents:
        return ""
    cells = [
        _figure(caption, [(f"latent {i}", x) for i, x in enumerate(pictures[:4])])
        for caption, pictures in figures.latents
    ]
    shown = f'<div class="grid wide">{"".join(cells)}</div>'
    return _section("One caption, several latents", shown)


def _curve(points: Sequence[CurvePoint] | None) -> str:
    if not points:
        return ""
    W, H, left, bottom = 560, 320, 80, 50
    xs, ys = [p.alignment for p in points], [p.distance for p in points]

    def scaled(value: float, values: Sequence[float], low: float, high: float) -> float:
        span = max(values) - min(values)
        part = (value - min(values)) / span if span else 0.5
        return low + part * (high - low)

    places = [
        (scaled(p.alignment, xs, left + 20, W - 60), scaled(p.distance, ys, H - bottom - 20, 24))
        for p in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#2457a6"/>'
        f'<text x="{x + 7:.1f}" y="{y - 7:.1f}" font-size="12">ψ {p.truncation:g}</text>'
        for (x, y), p in zip(places, points, strict=True)
    )
    axes = (
        f'<path d="M{left} 10V{H - bottom}H{W - 10}" fill="none" stroke="#8a93a3"/>'
        f'<text x="{(left + W) / 2}" y="{H - 8}" font-size="13" text-anchor="middle">'
        "agreement with the caption (higher is better)</text>"
        f'<text transform="translate(16 {(H - bottom) / 2}) rotate(-90)" font-size="13" '
        'text-anchor="middle">KID (lower is better)</text>'
    )
    ticks = "".join(
        f'<text x="{scaled(v, xs, left + 20, W - 60):.1f}" y="{H - bottom + 18}" font-size="11" '
        f'text-anchor="middle">{v:.3g}</text>'
        for v in {min(xs), max(xs)}
    ) + "".join(
        f'<text x="{left - 6}" y="{scaled(v, ys, H - bottom - 20, 24) + 4:.1f}" font-size="11" '
        f'text-anchor="end">{v:.3g}</text>'
        for v in {min(ys), max(ys)}
    )
    drawn = (
        f'<svg viewBox="0 0 {W} {H}" width="{W}" role="img" aria-label="truncation curve">{axes}'
        f'{ticks}<polyline points="{line}" fill="none" stroke="#2457a6" stroke-width="1.5"/>'
        f"{marks}</svg>"
    )
    rows = [[f"{p.truncation:g}", f"{p.distance:.4g}", f"{p.alignment:.4g}"] for p in points]
    table = _table(["ψ", "KID", "agreement"], rows)
    return _section("Truncation: variety against typicality", drawn + table)


def _speeds(speeds: Sequence[Speed] | None) -> str:
    if not speeds:
        return ""
    rows = [
        [str(s.batch_size), f"{s.seconds_per_image * 1000:.1f} ms", f"{s.images_per_second:.1f}"]
        for s in speeds
    ]
    best = max(speeds, key=lambda s: s.images_per_second)
    note = f"From prompt to picture; best at batch {best.batch_size}, on this machine."
    table = _table(["batch", "per picture", "pictures/s"], rows)
    return _section("Speed", f"<p class=muted>{note}</p>{table}")


def _neighbours(figures: Figures) -> str:
    if not figures.neighbours:
        return ""
    memory, verdict = figures.memorisation, ""
    if memory is not None:
        verdict = (
            f"{memory.share_closer:.1%} of the samples are nearer to a training picture than 99 % "
            "of unseen real pictures are (1 % is what chance gives). Median cosine to the "
            f"nearest: samples {memory.sample_median:.3f}, unseen real pictures "
            f"{memory.real_median:.3f}."
        )
    cells = [
        _figure(
            f"{caption} (cosine {', '.join(f'{cosine:.2f}' for _, cosine in near)})",
            [("sample", sample), *(("training picture", picture) for picture, _ in near)],
        )
        for caption, sample, near in figures.neighbours
    ]
    note = "Sample left, then its nearest training pictures."
    return _section(
        "Does it repeat its training pictures?",
        f"<p>{escape(verdict)}</p><p class=muted>{note}</p>"
        f'<div class="grid wide">{"".join(cells)}</div>',
    )


def _categories(figures: Figures) -> str:
    if not figures.categories:
        return ""
    rows = [
        [
            *(row.name, str(row.count), f"{row.mean:.4g}"),
            "" if row.low is None else f"{row.low:.4g} to {row.high:.4g}",
        ]
        for row in figures.categories
    ]
    table = _table(["captions with", "number", "agreement", "95 %"], rows)
    cells = [
        _figure(f"{kind}: {caption} ({value:.3f})", [("generated", picture)])
        for kind, caption, picture, value in figures.worst or ()
    ]
    note = "<p class=muted>The worst of each kind, which is chosen to be.</p>" if cells else ""
    shown = f"<div class=grid>{''.join(cells)}</div>" if cells else ""
    return _section("Agreement by kind of caption, worst first", table + note + shown)


def _metrics(results: Mapping[str, Any]) -> str:
    reference = results["reference"]
    rows = []
    for name, value in results["metrics"].items():
        pair = results.get("intervals", {}).get(name)
        rows.append(
            [
                name,
                f"{value:.5g}",
                f"{pair[0]:.4g} to {pair[1]:.4g}" if pair else "",
                _number(reference["real"].get(name)),
                _number(reference["chance"].get(name)),
            ]
        )
    return _section("All metrics", _table(["", "value", "95 %", "real pictures", "chance"], rows))


def _absent(results: Mapping[str, Any]) -> str:
    if not results["absent"]:
        return ""
    items = "".join(
        f"<li>{escape(name)}: {escape(why)}</li>" for name, why in results["absent"].items()
    )
    return _section("Not measured", f"<ul>{items}</ul>")


def _rules(rules: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(str(name))}</td><td class=wrap>{escape(str(value))}</td></tr>"
        for name, value in rules.items()
    )
    return _section("The rules", f"<div class=scroll><table>{rows}</table></div>")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class=scroll><table><tr>{top}</tr>{lines}</table></div>"


def _figure(caption: str, pictures: Sequence[tuple[str, Image.Image]]) -> str:
    images = "".join(
        f'<img src="{_data(picture)}" alt="{escape(f"{what}: {caption}", quote=True)}">'
        for what, picture in pictures
    )
    return f"<figure><div>{images}</div><figcaption>{escape(caption)}</figcaption></figure>"


def _data(picture: Image.Image) -> str:
    picture = picture.convert("RGB")
    picture.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
