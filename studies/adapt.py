"""Ten, fifty or five hundred pictures of a third emoji style: low rank, modulation or everything?

The package's base learns Fluent's high-contrast emoji (Microsoft, MIT) under a style word of their
own, by the same number of images each. New captions are measured on concepts of which no picture in
that style was shown, old ones on the same concepts, which were not among those that were kept.
Cells that are measured already stay; without `--glyphs` the glyphs are fetched by `npm pack`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.concepts import STYLES, Concept, nameable
from data.demo import PALETTE, Picture, draw, render
from gigagan.config import AdaptConfig
from gigagan.evaluation import adapted
from gigagan.evaluation.heldout import Gallery, Work
from gigagan.evaluation.report.results import caption_grid
from gigagan.inference.sampler import PUBLISHED
from gigagan.models import adapters, snapshot
from gigagan.models.upsampler import Upsampler
from gigagan.training import adapt

PACKAGE = "@iconify-json/fluent-emoji-high-contrast@1.2.6"
STYLE = "silhouette"
BASE = PUBLISHED / "emoji-32.safetensors"
PX = 32
COUNTS = (10, 50, 500)
METHODS: dict[str, dict[str, Any]] = {
    "low rank": {"rank": 4},
    "modulation": {"rank": 4, "layers": ["modulation"]},
    "everything": {"rank": None},
}
HELD_OUT, KEPT, ASKED, SHOWN = 64, 1_500, 128, 4


@dataclass(frozen=True)
class Set:
    """Concepts with a glyph in the third style, some of them held out."""

    glyphs: Path
    out: Path
    seed: int

    @cached_property
    def concepts(self) -> list[tuple[Concept, Path]]:
        """Those that the base knows, each with its third glyph, in the seed's order."""
        icons = json.loads((self.glyphs / "icons.json").read_text())
        names = json.loads((self.glyphs / "chars.json").read_text())
        known = set(json.loads((PUBLISHED / "trained_on.json").read_text())["names"])
        found = []
        for concept in nameable():
            code = concept.glyphs[0].stem.lower()
            icon = names.get(code) or names.get(code.replace("-fe0f", ""))
            if concept.phrase in known and icon in icons["icons"]:
                side, body = icons["height"], icons["icons"][icon]["body"]
                head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">'
                path = self.out / "glyphs" / f"{code}.svg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{head}{body}</svg>".replace("currentColor", "#000"))
                found.append((concept, path))
        order = np.random.default_rng(self.seed).permutation(len(found))
        return [found[i] for i in order]

    def new_pictures(self, count: int) -> Path:
        """A folder of so many pictures of shown concepts, each on a colour of its own."""
        folder = self.out / f"new-{count}"
        (folder / "fake_images").mkdir(parents=True, exist_ok=True)
        shown = self.concepts[HELD_OUT:]
        colours = np.random.default_rng([self.seed, 1])
        captions = []
        for number in range(count):
            concept, glyph = shown[number % len(shown)]
            background = list(PALETTE)[colours.integers(len(PALETTE))]
            picture = draw(Picture(concept, 0, background), render(glyph, 128), (PX, PX))
            picture.save(folder / "fake_images" / f"{number:04d}.png")
            captions.append(worded(concept, STYLE, background))
        (folder / "captions.txt").write_text("\n".join(captions) + "\n")
        return folder

    def kept(self) -> list[str]:
        """Old captions of shown concepts: what training is told to keep."""
        shown = [concept for concept, _ in self.concepts[HELD_OUT:]]
        every = [worded(c, style, b) for c in shown for style in STYLES for b in PALETTE]
        return [every[i] for i in np.random.default_rng([self.seed, 2]).permutation(len(every))][
            :KEPT
        ]

    def gallery(self, styles: Sequence[str]) -> adapted.Asked:
        """Held-out concepts in these styles on all backgrounds, with their real pictures."""
        works, reals = [], []
        for concept, third in self.concepts[:HELD_OUT]:
            for style in styles:
                glyph = third if style == STYLE else concept.glyphs[STYLES.index(style)]
                rendered = render(glyph, 128)
                for colour in PALETTE:
                    caption = worded(concept, style, colour)
                    works.append(Work(caption, concept.name, style, colour, "trained", Path()))
                    picture = draw(Picture(concept, 0, colour), rendered, (PX, PX))
                    reals.append(np.asarray(picture))
        order = np.random.default_rng([self.seed, 3]).permutation(len(works))
        places = sorted(order[:ASKED].tolist())
        return adapted.Asked(Gallery(works), places, np.stack(reals))


def worded(concept: Concept, style: str, background: str) -> str:
    """A caption by the base's template."""
    return f"{style} emoji of {concept.phrase} on a {background} background"


def fetched(out: Path) -> Path:
    """The package's folder, by npm."""
    folder = out / "npm"
    if not (folder / "package" / "icons.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def cell(data: Set, method: str, count: int, images: int) -> dict[str, Any]:
    """One training, measured; as it stands in its folder if it is there."""
    out = folder_of(data, method, count)
    if (out / "cell.json").is_file():
        return dict(json.loads((out / "cell.json").read_text()))
    base, _ = snapshot.load(BASE)
    assert not isinstance(base, Upsampler)
    config = AdaptConfig.model_validate(
        {"total_images": images, "seed": data.seed, "pictures": str(data.new_pictures(count))}
        | METHODS[method]
    )
    taught = adapt.lessons(config, data.kept(), PX)
    before = adapt.Drawing(base)
    before.features.warm([*taught.asked, *taught.old])  # so that the seconds are training's
    adapter, seconds = adapt.train(config, before, taught, out)
    about = adapters.About(
        "adapter", adapters.digest(base), config.rank, config.layers, None, {"study": "adapt"}
    )
    adapters.save(out / "adapter.safetensors", adapter, about)
    after = partial(before, weights=adapters.merged(base, [(adapter, 1.0)]))
    found: dict[str, Any] = {
        "parameters": adapter.num_parameters,
        "bytes": (out / "adapter.safetensors").stat().st_size,
        "seconds": seconds,
    }
    for name, styles in {"new": [STYLE], "old": list(STYLES)}.items():
        asked = data.gallery(styles)
        pair = [
            adapted.drawn(one, asked.captions, base.config.latent_dim, seed=0)
            for one in (before, after)
        ]
        found[name] = adapted.compared(asked, pair[0], pair[1], None)
        np.save(out / f"{name}.npy", np.stack(pair))
    (out / "cell.json").write_text(json.dumps(found, indent=2))
    return found


Cells = dict[tuple[str, int], dict[str, Any]]
"""Figures by method and number of pictures."""


def add_kid(data: Set, cells: Cells) -> None:
    """KID of all cells, to real pictures whose features are taken once."""
    for name, styles in {"new": [STYLE], "old": list(STYLES)}.items():
        asked = data.gallery(styles)
        pairs = [np.load(folder_of(data, *key) / f"{name}.npy") for key in cells]
        sets = [pairs[0][0], *(pair[1] for pair in pairs)]
        reals = asked.reals_GHWC[asked.places]
        first, *others = adapted.kids(sets, reals, data.out / "features" / name)
        for found, after in zip(cells.values(), others, strict=True):
            found[name] |= {"kid_before": first, "kid_after": after}


def folder_of(data: Set, method: str, count: int) -> Path:
    """Where a cell lies."""
    return data.out / f"{method.replace(' ', '-')}-{count}"


def table(cells: Cells) -> str:
    """A row a cell, in Markdown; the first is the base as it is."""
    heads = ["", "pictures", "parameters", "file, kB", "minutes"]
    heads += ["new R@1", "new KID", "old R@1", "old KID", "old moved by"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    first = next(iter(cells.values()))
    rows = [(["the base", "–", "–", "–", "–"], first, "before")]
    for (method, count), found in cells.items():
        size = [f"{found['parameters']:,}", f"{found['bytes'] / 1000:,.0f}"]
        rows.append(([method, str(count), *size, f"{found['seconds'] / 60:.1f}"], found, "after"))
    for about, found, when in rows:
        new, old = found["new"], found["old"]
        moved = old["moved"] if when == "after" else 0.0
        figures = [f"{part[f'r1_{when}']:.3f} | {part[f'kid_{when}']:.4f}" for part in (new, old)]
        lines.append(f"| {' | '.join([*about, *figures, f'{moved:.1f}'])} |")
    chances = first["new"]["r1_chance"], first["old"]["r1_chance"]
    return "\n".join(lines) + f"\n\nChance: {chances[0]:.3f} new, {chances[1]:.3f} old.\n"


def sheet(data: Set, cells: Cells) -> Image.Image:
    """Rows of new and old captions: real, the base, then every cell."""
    rows = []
    for name, styles in {"new": [STYLE], "old": list(STYLES)}.items():
        asked = data.gallery(styles)
        pairs = [np.load(folder_of(data, *key) / f"{name}.npy") for key in cells]
        for i in range(0, ASKED, ASKED // SHOWN):
            place = asked.places[i]
            images = [asked.reals_GHWC[place], pairs[0][0, i], *(pair[1, i] for pair in pairs)]
            caption = asked.gallery.works[place].caption
            rows.append((caption, [Image.fromarray(image) for image in images]))
    methods = ", ".join(dict.fromkeys(method for method, _ in cells))
    counts = ", ".join(dict.fromkeys(str(count) for _, count in cells))
    title = f"real, base; {methods}: each by {counts} pictures"
    return caption_grid(rows, title=title, cell_px=64)


def main() -> None:
    """Do what was asked for."""
    root = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root.add_argument("--out", type=Path, required=True, help="folder of pictures and results")
    root.add_argument("--glyphs", type=Path, help=f"folder of {PACKAGE}, unpacked")
    root.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="pictures %(default)s")
    root.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    root.add_argument("--images", type=int, default=4_800, help="length in images (%(default)s)")
    root.add_argument("--seed", type=int, default=0)
    root.add_argument("--no-table", action="store_true", help="measure cells and stop")
    args = root.parse_args()
    data = Set(Path(), args.out, args.seed)
    data = replace(data, glyphs=args.glyphs or fetched(args.out))
    cells = {(m, n): cell(data, m, n, args.images) for m in args.methods for n in args.counts}
    if args.no_table:
        return
    add_kid(data, cells)
    (args.out / "adapt.md").write_text(table(cells))
    sheet(data, cells).save(args.out / "adapt.png")
    print(table(cells))


if __name__ == "__main__":
    main()
