"""Text in pictures: lines that fit, in fonts that have the letters. Knows nothing of layouts."""

from __future__ import annotations

import importlib.util
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import ImageDraw, ImageFont

LONGEST = 2000
"""Characters of a text that are looked at: nothing drawn shows more."""
_REGULAR = 400
_JOINER = "\N{ZERO WIDTH JOINER}"
_CHINESE = 2
"""Place of the simplified forms in Noto's collection for Chinese, Japanese and Korean."""


class _Face(NamedTuple):
    file: Path
    number: int = 0
    """Its place in a file of several."""


def wrapped(text: str, px: int, width: int) -> Iterator[str]:
    """Lines of at most `width` pixels, broken at spaces; a word that is too long alone, too.

    Control and unassigned characters become `�`, any space a space.
    """
    line = ""
    for word in _printable(text[:LONGEST]).split():
        longer = f"{line} {word}" if line else word
        if length(longer, px) <= width:
            line = longer
            continue
        if line:
            yield line
        line = ""
        for letter in _letters(word):
            if line and length(line + letter, px) > width:
                yield line
                line = ""
            line += letter
    if line:
        yield line


def length(text: str, px: int) -> float:
    """Pixels that a line takes in `write`."""
    return sum(_font(face, px).getlength(part) for face, part in _runs(text))


def write(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, px: int, fill: str
) -> None:
    """Draw one line from its upper left corner, in letters of `px`.

    Within a font Pillow orders and joins the letters of scripts that are written to the left where
    the machine has FriBiDi; parts in several fonts are ordered by the first letter's direction.
    """
    runs = _runs(text)
    strong = (unicodedata.bidirectional(c) for c in text)
    if next((way for way in strong if way in ("L", "R", "AL")), "L") != "L":
        runs = runs[::-1]
    left, base = float(corner[0]), corner[1] + _font(_plain(), px).getmetrics()[0]
    for face, part in runs:
        font = _font(face, px)
        draw.text((left, base), part, fill=fill, font=font, anchor="ls")
        left += font.getlength(part)


# ---- letters -----------------------------------------------------------------------------------


def _printable(text: str) -> str:
    """What can be drawn."""
    return "".join(
        c if c.isprintable() or _is_known(c) else " " if c.isspace() else "�" for c in text
    )


def _is_known(letter: str) -> bool:
    """Whether it joins or orders others, or is newer than this Python but not than the fonts."""
    kind = unicodedata.category(letter)
    return kind == "Cf" or (kind == "Cn" and ord(letter) in _has(_face(letter)))


def _clings(letter: str) -> bool:
    """Whether it belongs to the letter before it: marks, joiners, variants."""
    return unicodedata.category(letter)[0] == "M" or unicodedata.category(letter) == "Cf"


def _letters(word: str) -> list[str]:
    """Letters with the marks on them."""
    found: list[str] = []
    for letter in word:
        if found and (_clings(letter) or found[-1].endswith(_JOINER)):
            found[-1] += letter
        else:
            found.append(letter)
    return found


# ---- fonts -------------------------------------------------------------------------------------


def _runs(text: str) -> list[tuple[_Face, str]]:
    """Parts of a line with a face that has their letters, the plain one where it does."""
    if text.isascii():
        return [(_plain(), text)]
    runs: list[tuple[_Face, str]] = []
    for letter in text:
        face = runs[-1][0] if runs else _plain()
        if not runs or not _clings(letter):
            face = _face(letter)
        if runs and runs[-1][0] == face:
            runs[-1] = (face, runs[-1][1] + letter)
        else:
            runs.append((face, letter))
    return runs


@cache
def _face(letter: str) -> _Face:
    """The first that has the letter; the plain one, which draws a box, where none has."""
    return next((face for face in _faces() if ord(letter) in _has(face)), _plain())


def _plain() -> _Face:
    """DejaVu Sans, which knows most alphabets."""
    return _faces()[0]


@cache
def _faces() -> tuple[_Face, ...]:
    """DejaVu Sans of matplotlib's package, and Noto's fonts; the largest of these comes last."""
    scripts = sorted(_folder("manimgx_fonts").glob("Noto*.ttf"))
    return (
        _Face(_folder("matplotlib") / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"),
        *(_Face(file) for file in scripts if "Italic" not in file.name),
        *(_Face(f, _CHINESE) for f in sorted(_folder("manimgx_fonts_cjk").glob("*.ttc"))),
    )


def _folder(package: str) -> Path:
    """Where a package lies; it is not imported, which is slow."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is a dependency"
    assert spec.submodule_search_locations, f"{package} is a package"
    return Path(spec.submodule_search_locations[0])


@cache
def _has(face: _Face) -> frozenset[int]:
    """Code points that a face has letters for."""
    from fontTools.ttLib import TTFont

    with TTFont(face.file, fontNumber=face.number, lazy=True) as font:
        return frozenset(font.getBestCmap())


@cache
def _font(face: _Face, px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(face.file, px, index=face.number)
    with suppress(OSError):  # one weight only
        font.set_variation_by_axes([_REGULAR])
    return font
