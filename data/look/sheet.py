"""Contact sheets: small pictures in rows with text below them. Knows nothing of shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from gigagan.common.lettering import wrapped, write

CELL_PX = 176
"""Side of the square that a picture is fitted into."""
MOST_LINES = 7
"""Lines of text below a picture, after wrapping; the rest is cut with an ellipsis."""
_GAP, _FONT_PX, _TITLE_PX = 12, 12, 17
_LINE_PX = 15
_INK, _MUTED, _PAPER, _MAT = "#1a1a1a", "#6b6b6b", "#ffffff", "#f1f1f1"
_MISSING, _MISSING_INK = "#d0d0d0", "#a8a8a8"


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet, of any size and mode, and what stands below it."""

    image: Image.Image | None
    """None draws a gray tile."""
    lines: list[str] = field(default_factory=list)
    """Each is wrapped to the tile's width. The first is set in ink, the others in gray."""


def contact_sheet(tiles: Sequence[Tile], *, columns: int = 8, title: str = "") -> Image.Image:
    """Draw the tiles row by row below a title; a row is as high as its longest text.

    Raises:
        ValueError: `columns` is not positive.
    """
    if columns < 1:
        raise ValueError(f"a contact sheet of {columns} columns: give at least one")
    columns = min(columns, max(len(tiles), 1))
    width = _GAP + columns * (CELL_PX + _GAP)
    heading = list(wrapped(title, _TITLE_PX, width - 2 * _GAP))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    texts = [[_text(tile) for tile in row] for row in rows]
    heights = [CELL_PX + _LINE_PX * max(map(len, row)) + 2 * _GAP for row in texts]
    top = _GAP + len(heading) * (_TITLE_PX + 6) + (_GAP if heading else 0)
    canvas = Image.new("RGB", (width, max(top + sum(heights), 1)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(heading):
        where = (_GAP, _GAP + number * (_TITLE_PX + 6))
        write(draw, where, line, _TITLE_PX, _INK)
    for row, lines, height in zip(rows, texts, heights, strict=True):
        for column, (tile, text) in enumerate(zip(row, lines, strict=True)):
            _draw_tile(canvas, draw, tile.image, text, (_GAP + column * (CELL_PX + _GAP), top))
        top += height
    return canvas


def _draw_tile(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    image: Image.Image | None,
    text: list[tuple[str, str]],
    corner: tuple[int, int],
) -> None:
    """Paste the picture in the middle of its square, and set its text below."""
    left, top = corner
    box = (left, top, left + CELL_PX - 1, top + CELL_PX - 1)
    if image is None:
        draw.rectangle(box, fill=_MISSING)
        draw.line(box, fill=_MISSING_INK, width=2)
        draw.line((box[0], box[3], box[2], box[1]), fill=_MISSING_INK, width=2)
    else:
        draw.rectangle(box, fill=_MAT)
        small = _fitted(image)
        where = (left + (CELL_PX - small.width) // 2, top + (CELL_PX - small.height) // 2)
        canvas.paste(small, where)
    for number, (line, colour) in enumerate(text):
        y = top + CELL_PX + 4 + number * _LINE_PX
        write(draw, (left, y), line, _FONT_PX, colour)


def _fitted(image: Image.Image) -> Image.Image:
    """Shrunk with antialiasing, or enlarged by a whole factor, so that no detail is invented."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    factor = CELL_PX // max(image.size)
    if factor >= 1:
        size = (image.width * factor, image.height * factor)
        return image.resize(size, Image.Resampling.NEAREST)
    scale = CELL_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _text(tile: Tile) -> list[tuple[str, str]]:
    """Wrapped lines with their colours, at most `MOST_LINES`.

    The first line gives way: what is said of a picture is short, its caption may be a page.
    """
    texts = [list(wrapped(line, _FONT_PX, CELL_PX)) for line in tile.lines]
    rest = [(line, _MUTED) for lines in texts[1:] for line in lines][: MOST_LINES - 1]
    room = MOST_LINES - len(rest)
    first = texts[0] if texts else []
    if len(first) > room:
        first = [*first[: room - 1], first[room - 1][:-1] + "…"]
    return [(line, _INK) for line in first] + rest
