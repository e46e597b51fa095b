"""Results as files: one JSON, grids of pictures with their captions, a table to print."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from gigagan.common.files import write_aside
from gigagan.common.lettering import wrapped, write

_MARGIN = 8
_FONT_PX = 13
_LEADING_PX = 5
_INK = "#202020"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write as people read it, whole or not at all."""
    write_aside(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """What an evaluation wrote.

    Raises:
        ValueError: the file is damaged, or another one.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        for part in ("protocol", "metrics", "intervals"):
            if not isinstance(results, dict) or not isinstance(results.get(part), dict):
                raise ValueError(f"it has no mapping {part!r}")
        numbers = list(results["metrics"].values())
        for low, high in results["intervals"].values():
            numbers += [low, high]
        if not all(isinstance(value, int | float) for value in numbers):
            raise ValueError("a metric or an end of an interval is no number")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not a results.json of an evaluation ({error}): give files that "
            "`python -m gigagan evaluate` wrote"
        ) from error
    return results


def caption_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    title: str,
    cell_px: int = 128,
    columns: int = 1,
    font_px: int = _FONT_PX,
) -> Image.Image:
    """Draw each caption, whole, above its row of pictures; rows are set in `columns`.

    All rows have the same number of pictures; each is brought to `cell_px` by nearest neighbour
    where it is smaller, so that no detail is invented.
    """
    line_px = font_px + _LEADING_PX
    row_width = max((len(pictures) for _, pictures in rows), default=1) * (cell_px + 2) - 2
    texts = [list(wrapped(caption, font_px, row_width)) for caption, _ in rows]
    text_px = max((len(lines) for lines in texts), default=1) * line_px
    step_x, step_y = row_width + 2 * _MARGIN, text_px + cell_px + _MARGIN
    height = _MARGIN * 2 + line_px + step_y * -(-len(rows) // columns)
    canvas = Image.new("RGB", (step_x * columns + _MARGIN, height), "white")
    draw = ImageDraw.Draw(canvas)
    write(draw, (_MARGIN, _MARGIN), title, font_px, _INK)
    for index, ((_, pictures), lines) in enumerate(zip(rows, texts, strict=True)):
        left = _MARGIN + step_x * (index % columns)
        top = 2 * _MARGIN + line_px + step_y * (index // columns)
        for number, line in enumerate(lines):
            write(draw, (left, top + number * line_px), line, font_px, _INK)
        for number, picture in enumerate(pictures):
            where = (left + number * (cell_px + 2), top + text_px)
            canvas.paste(_cell(picture, cell_px), where)
    return canvas


def table(results: Mapping[str, Any]) -> str:
    """The metrics beside those of real pictures and of chance, as aligned text."""
    reference = results["reference"]
    lines = [("metric", "generated", "real", "chance")]
    for name, value in results["metrics"].items():
        others = [reference[kind].get(name) for kind in ("real", "chance")]
        lines.append((name, *("" if v is None else f"{v:.4g}" for v in (value, *others))))
    lines += [(name, "—", "", reason) for name, reason in results["absent"].items()]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip()
        for a, b, c, d in lines
    )


def unpaired(rules: Mapping[str, Any]) -> list[str]:
    """What is to be said, if anything, of captions that have no real picture."""
    drawn, found = rules.get("num_generated"), rules.get("num_with_real")
    if found is None or found == drawn:
        return []
    return [f"{found:,} of {drawn:,} captions have a real picture: what needs one is of these"]


Differing = Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[str, Any, Any] | None]
"""Of the rules of two results the first that differs and decides, with both values; or None."""


def compare(
    results: Sequence[Mapping[str, Any]], names: Sequence[str], differing: Differing
) -> str:
    """The metrics of several results side by side, as aligned text.

    Raises:
        ValueError: two results are by different rules: the field and both its values.
    """
    for name, other in zip(names[1:], results[1:], strict=True):
        found = differing(results[0]["protocol"], other["protocol"])
        if found is not None:
            field, first, second = found
            raise ValueError(
                f"{names[0]} and {name} are by different protocols, their numbers do not compare: "
                f"{field} is {first!r} and {second!r}. Evaluate both by the same one"
            )
    metrics = dict.fromkeys(metric for result in results for metric in result["metrics"])
    rows = [("", *names)]
    for field in ("truncation", "seed"):
        values = [result["protocol"].get(field) for result in results]
        rows.append((field, *("not known" if value is None else str(value) for value in values)))
    for metric in metrics:
        rows.append((metric, *(_with_interval(result, metric) for result in results)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    )


def _with_interval(result: Mapping[str, Any], metric: str) -> str:
    value = result["metrics"].get(metric)
    if value is None:
        return "—"
    pair = result.get("intervals", {}).get(metric)
    return f"{value:.4g}" + (f" [{pair[0]:.3g}, {pair[1]:.3g}]" if pair else "")


def _cell(picture: Image.Image, px: int) -> Image.Image:
    is_smaller = max(picture.size) < px
    how = Image.Resampling.NEAREST if is_smaller else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize((px, px), how)
