"""The embedded source: two emoji sets as real captioned pictures behind a local web server.

Listed as Parquet in the columns of LAION and of COYO, with planted defects whose kind stands in
`site/truth.parquet`: read by reports, never by a filter. Nothing is fetched from outside.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import zip_longest
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from data.concepts import STYLES, Concept, concepts, nameable
from data.config import EmbeddedConfig
from gigagan.common.progress import Progress, silent

HOST = "emoji.test"
"""Canonical host of every listed picture; the fetch maps it to the server's real address."""
PALETTE: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "light gray": (200, 200, 204),
    "pale blue": (165, 205, 250),
    "pale green": (170, 228, 172),
    "pale yellow": (252, 240, 150),
    "pink": (252, 178, 205),
    "lavender": (200, 178, 245),
    "teal": (70, 168, 170),
}
TEMPLATES = (
    "{style} emoji of {name} on a {background} background",
    "{name}, {style} emoji, {background} background",
    "{style} style picture of {name} on {background}",
    "an icon of {name} drawn in {style} style, {background} background",
)
"""The first one words every held-out caption; `name` comes with its article."""
TEMPLATE_SHARES = (0.7, 0.1, 0.1, 0.1)
"""How often each words a training caption."""
SCALE = 0.94
"""Side of a glyph ÷ side of its picture."""

DEFECTS = {
    "wrong_caption": 4,
    "missing": 2,
    "no_host": 1,
    "opt_out": 2,
    "robots": 1,
    "web_page": 1,
    "truncated": 2,
    "small": 2,
    "long": 2,
    "sixteen_bit": 2,
    "rotated": 2,
    "duplicate_row": 2,
    "same_bytes": 2,
    "near_duplicate": 2,
    "null_size": 1,
    "unsafe": 1,
    "watermark": 1,
}
"""Planted defects and how often each comes relative to the others."""
HARMLESS = frozenset({"none", "sixteen_bit", "rotated"})
"""Kinds that a good pipeline keeps: odd encodings of good pictures."""


@dataclass(frozen=True)
class Picture:
    """How one picture looks: a glyph of relative size `scale` at a relative place on a colour."""

    concept: Concept
    style: int
    background: str
    scale: float = SCALE
    place: tuple[float, float] = (0.5, 0.5)
    template: str = TEMPLATES[0]
    codec: str = "png"

    @property
    def caption(self) -> str:
        """What the picture shows, in words."""
        return self.template.format(
            style=STYLES[self.style], name=self.concept.phrase, background=self.background
        )

    @property
    def stem(self) -> str:
        """File name without suffix: unique in the source."""
        colour = self.background.replace(" ", "-")
        return f"{self.concept.glyphs[0].stem}-{STYLES[self.style]}-{colour}"

    @property
    def combination(self) -> tuple[str, int, str]:
        """What is told of it in words: concept, style and background."""
        return self.concept.name, self.style, self.background


@dataclass(frozen=True)
class Row:
    """One listed row. `path` is relative to the site; `file_of` draws its bytes, if it has any."""

    picture: Picture
    path: str
    caption: str
    label: str
    """Name of what the picture shows, whatever its caption says."""
    defect: str = "none"
    host: str = HOST
    width: int | None = None
    height: int | None = None
    unsafe: float = 0.01
    watermark: float = 0.05
    twin: str | None = None
    """URL of the row that this one repeats."""

    @property
    def url(self) -> str:
        """Canonical address."""
        return f"http://{self.host}/{self.path}"


def split(config: EmbeddedConfig) -> tuple[list[Concept], list[Concept]]:
    """Trained and unseen concepts, disjoint and seeded; the former in the order of the list.

    Raises:
        ValueError: fewer than two concepts would be left to train on.
    """
    chosen = nameable() if config.concepts == "nameable" else concepts()
    rng = np.random.default_rng([config.seed, 0])
    if config.concepts == "all":
        chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    chosen = chosen[: config.max_concepts]
    if config.unseen_concepts > len(chosen) - 2:
        raise ValueError(
            f"download.embedded.unseen_concepts is {config.unseen_concepts}, but there are "
            f"{len(chosen)} concepts, and two at least are trained on: lower it, or raise "
            "download.embedded.max_concepts"
        )
    unseen = set(rng.permutation(len(chosen))[: config.unseen_concepts].tolist())
    return (
        [concept for i, concept in enumerate(chosen) if i not in unseen],
        [concept for i, concept in enumerate(chosen) if i in unseen],
    )


def _looks(concept: Concept, config: EmbeddedConfig) -> tuple[list[Picture], list[Picture]]:
    """What is trained on of a concept, and its never-trained combinations, styles alternating."""
    seed = int.from_bytes(hashlib.sha256(concept.cldr.encode()).digest()[:4], "big")
    rng = np.random.default_rng([config.seed, 1, seed])
    num_unseen = _num_unseen(config)
    first = int(rng.integers(len(STYLES)))
    trained: list[Picture] = []
    aside: list[list[Picture]] = [[], []]
    for style in range(len(STYLES)):
        turn = (style - first) % len(STYLES)
        num_aside = (num_unseen + 1 - turn) // len(STYLES)
        num_trained = min(len(PALETTE) - num_aside, config.pictures_per_style)
        backgrounds = [list(PALETTE)[i] for i in rng.permutation(len(PALETTE))]
        looks = [Picture(concept, style, background) for background in backgrounds]
        trained += [_varied(look, config, rng) for look in looks[:num_trained]]
        aside[turn] = looks[num_trained:]
    return trained, _in_turn(aside)


def _num_unseen(config: EmbeddedConfig) -> int:
    """Combinations of one concept that are set aside; each style keeps one at least."""
    if not config.unseen_combinations:
        return 0
    every = len(STYLES) * len(PALETTE)
    return min(max(1, round(config.unseen_combinations * every)), every - len(STYLES))


def _varied(look: Picture, config: EmbeddedConfig, rng: np.random.Generator) -> Picture:
    """A picture to train on: worded, encoded and, if asked, sized and placed by chance."""
    less, across, down = rng.random(3)
    return replace(
        look,
        scale=SCALE - config.jitter * 0.2 * less,
        place=(0.5 + config.jitter * (across - 0.5), 0.5 + config.jitter * (down - 0.5)),
        template=TEMPLATES[rng.choice(len(TEMPLATES), p=TEMPLATE_SHARES)],
        codec=str(rng.choice(["png", "png", "png", "png", "jpg", "webp"])),
    )


def _rows(pictures: list[Picture], config: EmbeddedConfig) -> list[Row]:
    """One row a picture, with defects planted in `defect_fraction` of them; some bring a second."""
    rng = np.random.default_rng([config.seed, 2])
    weights = np.array(list(DEFECTS.values()), float)
    num_defects = round(len(pictures) * config.defect_fraction)
    kinds = ["none"] * (len(pictures) - num_defects) + [
        str(kind) for kind in rng.choice(list(DEFECTS), num_defects, p=weights / weights.sum())
    ]
    rows: list[Row] = []
    for picture, kind in zip(pictures, rng.permutation(kinds), strict=True):
        other = pictures[rng.integers(len(pictures))]
        while other.concept == picture.concept:
            other = pictures[rng.integers(len(pictures))]
        rows += _plant(picture, str(kind), other, config.size_px, rng)
    return rows


def _plant(
    picture: Picture, kind: str, other: Picture, side: int, rng: np.random.Generator
) -> list[Row]:
    """The row or rows of a picture with a defect. The listed size of every second one lies."""
    row = Row(
        picture=picture,
        path=f"pictures/{picture.stem}.{picture.codec}",
        caption=picture.caption,
        label=picture.concept.name,
        width=side,
        height=side,
        unsafe=float(rng.beta(1, 40)),
        watermark=float(rng.beta(1, 10) * 0.7),
    )
    if kind == "none":
        return [row]
    row = replace(row, defect=kind)
    honest = bool(rng.integers(2))
    match kind:
        case "wrong_caption":
            return [replace(row, caption=other.caption)]
        case "no_host":
            return [replace(row, host="gone.invalid")]
        case "opt_out":
            return [replace(row, path=row.path.replace("pictures/", "reserved/"))]
        case "robots":
            return [replace(row, path=row.path.replace("pictures/", "private/"))]
        case "small":
            listed = _SMALL if honest else side
            return [replace(row, width=listed, height=listed)]
        case "long":
            return [replace(row, width=side * _LONG if honest else side)]
        case "sixteen_bit":
            phrase = f"{picture.concept.phrase} in black and white"
            gray = replace(picture, concept=replace(picture.concept, phrase=phrase), codec="png")
            return [replace(row, picture=gray, path=_png(row.path), caption=gray.caption)]
        case "rotated":
            return [replace(row, path=row.path.rsplit(".", 1)[0] + ".jpg")]
        case "duplicate_row":
            return [replace(row, defect="none"), row]
        case "same_bytes":
            first = replace(row, defect="none")
            path = row.path.replace("pictures/", "mirror/")
            return [first, replace(row, path=path, twin=first.url)]
        case "near_duplicate":
            path = f"copies/{picture.stem}.jpg"
            return [replace(row, defect="none"), replace(row, path=path, twin=row.url)]
        case "null_size":
            return [replace(row, width=None, height=None)]
        case "unsafe":
            return [replace(row, unsafe=float(rng.uniform(0.8, 1)))]
        case "watermark":
            return [replace(row, watermark=float(rng.uniform(0.9, 1)))]
    return [row]


_SMALL = 28
_LONG = 5


def _png(path: str) -> str:
    return path.rsplit(".", 1)[0] + ".png"


def render(glyph: Path, side: int) -> Image.Image:
    """A glyph as RGBA of `side` × `side` px."""
    import resvg_py

    data = resvg_py.svg_to_bytes(
        svg_path=str(glyph), width=side, height=side, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA")


def draw(picture: Picture, glyph: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture as RGB of (width, height): the glyph scaled to the short side, and placed."""
    width, height = size
    side = max(8, round(min(size) * picture.scale))
    small = glyph.resize((side, side), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", size, PALETTE[picture.background])
    corner = (
        round((width - side) * picture.place[0]),
        round((height - side) * picture.place[1]),
    )
    canvas.paste(small, corner, small)
    return canvas


def _encode(image: Image.Image, codec: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    defaults: dict[str, dict[str, object]] = {
        "png": {"format": "PNG", "compress_level": 1},
        "jpg": {"format": "JPEG", "quality": 92},
        "webp": {"format": "WEBP", "quality": 90, "method": 0},
    }
    image.save(buffer, **{**defaults[codec], **options})  # type: ignore[arg-type]
    return buffer.getvalue()


def _bytes_of(row: Row, glyph: Image.Image, side: int) -> bytes | None:
    """What the server answers for a row; None where it has nothing."""
    picture, codec = row.picture, row.path.rsplit(".", 1)[1]
    image = draw(picture, glyph, (side, side))
    match row.defect:
        case "missing" | "no_host":
            return None
        case "web_page":
            return b"<!doctype html><title>Gone</title><p>This picture has moved."
        case "truncated":
            data = _encode(image, codec)
            return data[: len(data) * 6 // 10]
        case "small":
            return _encode(draw(picture, glyph, (_SMALL, _SMALL)), codec)
        case "long":
            return _encode(draw(picture, glyph, (side * _LONG, side)), codec)
        case "sixteen_bit":
            gray = np.asarray(ImageOps.grayscale(image), np.uint16) * 257
            return _encode(Image.fromarray(gray), "png")
        case "rotated":
            exif = Image.Exif()
            exif[0x0112] = 6  # the viewer turns it a quarter clockwise; so we turn it back first
            turned = image.transpose(Image.Transpose.ROTATE_90)
            return _encode(turned, "jpg", exif=exif)
        case "near_duplicate":
            smaller = image.resize((side * 4 // 5,) * 2, Image.Resampling.BICUBIC)
            return _encode(smaller, "jpg", quality=70)
    return _encode(image, codec)


@dataclass(frozen=True)
class Plan:
    """Everything that the source consists of: a pure function of its config."""

    rows: list[Row]
    gallery: dict[Picture, str]
    """Every combination of every concept → `trained`, `combination` or `unseen`."""
    heldout: list[Picture]
    """Those of the gallery that a model is measured on."""

    @classmethod
    def of(cls, config: EmbeddedConfig) -> Plan:
        """Draw concepts, looks, captions and defects."""
        trained, unseen = split(config)
        looks = [_looks(concept, config) for concept in trained]
        rows = _rows([look for some, _ in looks for look in some], config)
        taught = {row.picture.combination for row in rows if row.defect in HARMLESS}
        gallery = {
            look: "trained" if look.combination in taught else "combination"
            for concept in trained
            for look in _every_look(concept)
        }
        never = {look: "unseen" for concept in unseen for look in _every_look(concept)}
        aside = [some for _, some in looks]
        if not config.unseen_combinations:
            aside = [_every_look(concept, turn) for turn, concept in enumerate(unseen)]
        order = np.random.default_rng([config.seed, 4]).permutation(len(aside))
        heldout = _in_turn([aside[i] for i in order])[: config.heldout_pictures]
        return cls(rows, {**gallery, **never}, heldout)

    def by_glyph(self) -> dict[Path, list[Row | Picture]]:
        """What is drawn from each glyph, so that it is rendered once."""
        groups: dict[Path, list[Row | Picture]] = {}
        items: list[Row | Picture] = [*self.rows, *self.gallery]
        for item in items:
            picture = item.picture if isinstance(item, Row) else item
            groups.setdefault(picture.concept.glyphs[picture.style], []).append(item)
        return groups


def build(out: Path, config: EmbeddedConfig, *, progress: Progress = silent) -> None:
    """Write `site/` (files and lists) and `heldout/` below `out`; at once if they are there.

    `site/laion.parquet` and `site/coyo.parquet` list the rows, `site/truth.parquet` the defect of
    each URL, `site/files/` is what `serve` serves. `heldout/` holds pictures and two lists of them
    in COCO's captions format: `gallery.json` with every combination of concept, style and
    background, and `captions.json` with those never trained that a model is measured on.
    """
    site, marker = out / "site", out / "site" / "done.json"
    wanted = config.model_dump_json()
    if marker.exists() and marker.read_text() == wanted:
        return
    shutil.rmtree(site, ignore_errors=True)
    shutil.rmtree(out / "heldout", ignore_errors=True)
    for name in _FOLDERS:
        (out / name).mkdir(parents=True)
    plan = Plan.of(config)
    _render_all(out, config, len(plan.rows) + len(plan.gallery), progress)
    _write_captions(out / "heldout" / "gallery.json", plan.gallery, config.size_px)
    heldout = {look: plan.gallery[look] for look in plan.heldout}
    _write_captions(out / "heldout" / "captions.json", heldout, config.size_px)
    _write_lists(site, plan.rows, config.seed)
    marker.write_text(wanted)


_FOLDERS = (
    "heldout/images",
    *(f"site/files/{name}" for name in ("pictures", "reserved", "private", "mirror", "copies")),
)


def _every_look(concept: Concept, turn: int = 0) -> list[Picture]:
    """All combinations of a concept, styles in turn; `turn` decides where they begin."""
    backgrounds = list(PALETTE)
    return [
        Picture(concept, (turn + k) % len(STYLES), backgrounds[(turn + k // 2) % len(PALETTE)])
        for k in range(len(STYLES) * len(PALETTE))
    ]


def _in_turn(lists: list[list[Picture]]) -> list[Picture]:
    """The first of each list, then the second of each, …"""
    return [look for some in zip_longest(*lists) for look in some if look is not None]


def _render_all(out: Path, config: EmbeddedConfig, total: int, progress: Progress) -> None:
    """Draw every file, in processes: the renderer holds Python's lock.

    Each is `python -m data.demo`, which plans the same source and draws its share; a pool would
    import the main module of whoever called us once more.
    """
    num_parts = max(1, min(os.cpu_count() or 1, 16, total // 200))
    arguments = [str(out.resolve()), config.model_dump_json(), str(num_parts)]
    command = [sys.executable, "-m", "data.demo", *arguments]
    read_end, write_end = os.pipe()  # one for all: a line of theirs is one write
    parts = [subprocess.Popen([*command, str(part)], stdout=write_end) for part in range(num_parts)]
    os.close(write_end)
    try:
        done = 0
        with os.fdopen(read_end) as lines:
            for line in lines:
                done += int(line)
                progress("rendering pictures", done, total)
        failed = [part for part in parts if part.wait() != 0]
    finally:
        for process in parts:
            process.kill()
            process.wait()
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {num_parts} processes that render the embedded pictures failed; "
            "their errors are above; mend those and run again"
        )


def render_part(out: Path, config: EmbeddedConfig, num_parts: int, part: int) -> Iterator[int]:
    """Draw every `num_parts`-th glyph from number `part` on; yields the files done by each."""
    side = config.size_px
    for glyph, items in list(Plan.of(config).by_glyph().items())[part::num_parts]:
        raster = render(glyph, side)
        for item in items:
            if isinstance(item, Picture):
                data = _encode(draw(item, raster, (side, side)), "png")
                (out / "heldout" / "images" / f"{item.stem}.png").write_bytes(data)
            elif (body := _bytes_of(item, raster, side)) is not None:
                (out / "site" / "files" / item.path).write_bytes(body)
        yield len(items)


def _write_captions(path: Path, seen: dict[Picture, str], side: int) -> None:
    """COCO's captions format; beside each caption label, concept, style, background and split."""
    document = {
        "info": {"description": "emoji on named backgrounds", "palette": PALETTE},
        "images": [
            {"id": i, "file_name": f"{p.stem}.png", "width": side, "height": side}
            for i, p in enumerate(seen, 1)
        ],
        "annotations": [
            {
                "id": i,
                "image_id": i,
                "caption": p.caption,
                "label": p.concept.name,
                "concept": p.concept.name,
                "style": STYLES[p.style],
                "background": p.background,
                "split": split,
            }
            for i, (p, split) in enumerate(seen.items(), 1)
        ],
    }
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")


def _write_lists(site: Path, rows: list[Row], seed: int) -> None:
    """Half of the rows in LAION's columns, half in COYO's, three in a hundred in both."""
    rng = np.random.default_rng([seed, 3])
    draws = rng.random(len(rows))
    laion = [row for row, u in zip(rows, draws, strict=True) if u < 0.515]
    coyo = [row for row, u in zip(rows, draws, strict=True) if u > 0.485]
    pq.write_table(_laion(laion), site / "laion.parquet")
    pq.write_table(_coyo(coyo), site / "coyo.parquet")
    truth = [{"url": r.url, "caption": r.caption, "defect": r.defect, "twin": r.twin} for r in rows]
    pq.write_table(pa.Table.from_pylist(truth), site / "truth.parquet")


def _laion(rows: list[Row]) -> pa.Table:
    """Columns of laion2B-en joined. No CLIP has seen these pictures: its column is null."""
    return pa.table(
        {
            "URL": [r.url for r in rows],
            "TEXT": [r.caption for r in rows],
            "label": [r.label for r in rows],
            "WIDTH": pa.array([r.width for r in rows], pa.int32()),
            "HEIGHT": pa.array([r.height for r in rows], pa.int32()),
            "similarity": pa.nulls(len(rows), pa.float64()),
            "hash": pa.array([_number(r.url + r.caption) for r in rows], pa.int64()),
            "punsafe": pa.array([r.unsafe for r in rows], pa.float32()),
            "pwatermark": pa.array([r.watermark for r in rows], pa.float32()),
        }
    )


def _coyo(rows: list[Row]) -> pa.Table:
    """Columns of COYO-700M that a filter may read."""
    return pa.table(
        {
            "id": pa.array([_number(r.url) for r in rows], pa.int64()),
            "url": [r.url for r in rows],
            "text": [r.caption for r in rows],
            "label": [r.label for r in rows],
            "width": pa.array([r.width for r in rows], pa.int64()),
            "height": pa.array([r.height for r in rows], pa.int64()),
            "text_length": pa.array([len(r.caption) for r in rows], pa.int64()),
            "word_count": pa.array([len(r.caption.split()) for r in rows], pa.int64()),
            "clip_similarity_vitb32": pa.nulls(len(rows), pa.float64()),
            "clip_similarity_vitl14": pa.nulls(len(rows), pa.float64()),
            "nsfw_score_opennsfw2": pa.array([r.unsafe for r in rows], pa.float32()),
            "watermark_score": pa.array([r.watermark for r in rows], pa.float32()),
        }
    )


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET with files below `root`; pictures under `/reserved/` carry an opt-out.

    robots.txt disallows `/private/`.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer on a kept connection waits 40 ms
    root: Path

    def do_GET(self) -> None:
        """One file, or 404."""
        path = (self.root / unquote(urlsplit(self.path).path).lstrip("/")).resolve()
        inside = path.is_relative_to(self.root) and path.is_file()
        body = path.read_bytes() if inside else b"not found"
        if self.path == "/robots.txt":
            inside, body = True, b"User-agent: *\nDisallow: /private/\n"
        self.send_response(200 if inside else 404)
        self.send_header("Content-Length", str(len(body)))
        if self.path.startswith("/reserved/"):
            self.send_header("X-Robots-Tag", "noai, noimageai")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the fetch keeps the log that counts."""


@contextmanager
def serve(site: Path) -> Iterator[int]:
    """Serve `site/files` on a free loopback port, which is yielded, until the block ends."""
    handler = type("Handler", (_Handler,), {"root": (site / "files").resolve()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def main(arguments: list[str]) -> None:
    """Draw one part of the source: OUT CONFIG_JSON NUM_PARTS PART; a count a line on stdout."""
    out, config, num_parts, part = arguments
    chosen = EmbeddedConfig.model_validate_json(config)
    for count in render_part(Path(out), chosen, int(num_parts), int(part)):
        os.write(sys.stdout.fileno(), f"{count}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1:])
