"""Tables and curves of the study of memorisation, from its records and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies import _queue

QUANTILES = [i / 40 for i in range(41)]
"""Of the distances that a record holds."""
KINDS = {
    "trained": "captions trained on",
    "combination": "never-trained combinations",
    "unseen": "concepts never trained",
}
_REAL = {
    "unseen": "real pictures of concepts never trained",
    "combination": "real pictures of never-trained combinations",
    "half": "half of training in the other half",
}
_OWN = {
    "trained": "nearest: its own training picture",
    "combination": "nearer to its own, never seen, than to any of training",
    "unseen": "nearer to its own, never seen, than to any of training",
}
_NETWORKS = {
    "stylegan2": "#999999",
    "matching-gd": "#56b4e9",
    "vision": "#0072b2",
    "warm-start": "#009e73",
    "projected": "#d55e00",
    "package": "#cc79a7",
}
Record = dict[str, Any]


def report(results: Path, images: Path) -> dict[str, str]:
    """Tables as Markdown, by the block of docs/paper.md; draws memorisation.png into `images`.

    Raises:
        ValueError: nothing was measured yet.
    """
    file = results / "real.json"
    records = sorted(_queue.records(results), key=_order)
    if not file.exists() or not records:
        raise ValueError(
            f"no records in {results}: `python -m studies.memorisation run` makes them"
        )
    real = json.loads(file.read_text())["encoders"]
    draw(images / "memorisation.png", real, records)
    tables = {f"memorisation-{kind}": _table(kind, records) for kind in KINDS}
    return {
        "memorisation-detector": _detector(real),
        **tables,
        "memorisation-latents": _latents(records),
        "memorisation-agreement": _agreement(records),
    }


def _order(record: Record) -> tuple[int, str, int]:
    row, seed = record["about"]["row"], record["about"]["seed"]
    known = list(_NETWORKS)
    return known.index(row) if row in known else len(known), row, seed


def _name(record: Record) -> str:
    about = record["about"]
    return f"`{about['row']}`, seed {about['seed']}, {about['images']:,} images"


def _cell(interval: Sequence[float]) -> str:
    """A share with its interval, in percent."""
    value, low, high = (f"{100 * x:.0f}" for x in interval)
    return f"{value} [{low}, {high}]"


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _detector(real: Record) -> str:
    """What is called a near-copy of pictures of which one knows whether they are."""
    rows = [
        [name, *[_cell(one["near"][kind]) for one in real.values()], *["–"] * len(real)]
        for kind, name in _REAL.items()
    ]
    for change in next(iter(real.values()))["planted"]:
        found = [one["planted"][change] for one in real.values()]
        rows.append([f"planted: {change}", *[_cell(f["near"]) for f in found]])
        rows[-1] += [_cell(f["source"]) for f in found]
    heads = ["", *[f"near-copies by {name}, %" for name in real]]
    return _rows([*heads, *[f"source is nearest by {name}, %" for name in real]], rows)


def _table(kind: str, records: Sequence[Record]) -> str:
    names = list(records[0]["splits"][kind]["encoders"])
    heads = ["", *[f"near-copies by {name}, %" for name in names]]
    heads += [f"{what} by {names[0]}, %" for what in ("nearest: the same drawing", _OWN[kind])]
    heads.append(f"nearer to training than a real one by {names[0]}, % of pairs")
    rows = []
    for record in records:
        encoders = record["splits"][kind]["encoders"]
        first = encoders[names[0]]
        cells = [_cell(one["near"]) for one in encoders.values()]
        cells += [_cell(first[key]) for key in ("drawing", "own", "copying")]
        rows.append([_name(record), *cells])
    return _rows(heads, rows)


def _latents(records: Sequence[Record]) -> str:
    """By the first encoder: does the second latent draw another picture, with another answer?"""
    name = next(iter(records[0]["splits"]["trained"]["encoders"]))
    heads = ["", *[f"same answer: {what}, %" for what in KINDS.values()]]
    heads += [f"near-copies of each other: {what}, %" for what in KINDS.values()]
    rows = []
    for record in records:
        found = [record["splits"][kind]["encoders"][name] for kind in KINDS]
        cells = [_cell(f[key]) for key in ("latents_agree", "latents_near") for f in found]
        rows.append([_name(record), *cells])
    return _rows(heads, rows)


def _agreement(records: Sequence[Record]) -> str:
    """Of captions trained on, where near-copies are."""
    pairs = list(records[0]["splits"]["trained"]["agreement"])
    heads = ["", *[f"{pair}: {what}" for pair in pairs for what in ("same answer, %", "κ")]]
    rows = []
    for record in records:
        cells = [_name(record)]
        for pair in pairs:
            found = record["splits"]["trained"]["agreement"][pair]
            k = found["kappa"]
            cells += [_cell(found["same"]), "–" if k is None else f"{k:.2f}"]
        rows.append(cells)
    return _rows(heads, rows)


def draw(path: Path, real: Record, records: Sequence[Record]) -> None:
    """Share of pictures within each distance of training, ÷ the limit; black: real ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3 * len(real) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(real), len(KINDS), sharex="row", sharey=True, squeeze=False)
    for line, (encoder, one) in zip(panels, real.items(), strict=True):
        for axes, (kind, title) in zip(line, KINDS.items(), strict=True):
            for record in records:
                row, seed = record["about"]["row"], record["about"]["seed"]
                far = record["splits"][kind]["encoders"][encoder]["spread"]
                label = row if not seed else None
                axes.plot(far, QUANTILES, color=_NETWORKS.get(row, "#555555"), label=label)
            far = one["spread"]["unseen" if kind == "unseen" else "combination"]
            axes.plot(far, QUANTILES, color="black", linestyle="--", label="real")
            axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
            axes.set_title(f"{encoder}: {title}", fontsize=11)
            axes.grid(alpha=0.25)
    panels[0][0].legend(frameon=False, fontsize=9)
    figure.supxlabel("distance to the nearest training picture ÷ limit of near-copies")
    figure.supylabel("share of pictures within it")
    figure.savefig(path, dpi=110)
