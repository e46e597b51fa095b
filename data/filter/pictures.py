"""The filter's report as pictures: funnel, histograms with thresholds, sheets of each verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import duckdb
from PIL import Image

from data import originals, sql
from data.filter.rules import RULES
from data.filter.select import score_files
from data.layout import PART_DIGITS, SHARD_DIGITS, shard_of
from data.look.sheet import Tile, contact_sheet
from data.report import Report
from gigagan.common import decoders
from gigagan.common.pictures import UndecodableError, decode
from gigagan.common.progress import Progress, silent

NUM_PICTURES = 48
"""Most pictures on a sheet."""
COLUMNS = 8
CAPTION_CHARS = 48
"""About two lines."""
SEED = "0"
"""Decides which pictures are shown."""

Row = dict[str, Any]


# ---- funnel and histograms ---------------------------------------------------------------------


def draw(report: Report, path: Path) -> None:
    """The funnel and the histograms with their thresholds, as one PNG."""
    from matplotlib.figure import Figure

    histograms = report.details["histograms"]
    heights = [0.8 + 0.32 * len(report.funnel), *[2.2] * len(histograms)]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_funnel(axes[0], report)
    for axis, (name, histogram) in zip(axes[1:], histograms.items(), strict=True):
        axis.stairs(histogram["counts"], histogram["edges"], fill=True, color="#8fb08c")
        axis.set_title(f"{name}: pictures per bin, thresholds in red", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        for setting, limit in _limits(report.details["thresholds"], name):
            axis.axvline(limit, color="#b03030")
            label = f" {setting} {limit:.3g}"
            axis.annotate(
                label, (limit, 0.97), xycoords=("data", "axes fraction"), color="#b03030",
                va="top", fontsize=8, rotation=90, ha="right",
            )  # fmt: skip
    figure.savefig(path, dpi=110)


def _draw_funnel(axis: Any, report: Report) -> None:
    steps = report.funnel
    bars = axis.barh([step.step for step in steps], [s.rows for s in steps], color="#4878a8")
    nulls = report.details["nulls"]
    labels = []
    for step in steps:
        without = nulls.get(step.step, {}).get("without a value")
        why = f", {without:,} of them without a value" if without else ""
        labels.append(f"{step.rows:,}" + (f"  (−{step.dropped:,}{why})" if step.dropped else ""))
    axis.bar_label(bars, labels, padding=4, fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.5, y=0.02)
    axis.set_title("pictures left after each rule", loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _limits(thresholds: dict[str, Any], score: str) -> Iterator[tuple[str, float]]:
    """(setting, value) of every threshold on this score."""
    for kind in ("min", "top", "max"):
        found = thresholds.get(f"{kind}_{score}")
        if found is not None:
            yield f"{kind}_{score}", found["least"] if isinstance(found, dict) else found


# ---- contact sheets ----------------------------------------------------------------------------


def sheets(out: Path, scores: Path, download: Path, *, progress: Progress = silent) -> None:
    """`out/sheets/kept.png` and one sheet for each reason, of pictures chosen by seed.

    A duplicate stands left of the picture that it yields to.
    """
    folder = out / "sheets"
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    with duckdb.connect() as database:
        database.execute("SET enable_progress_bar = false")
        chosen, counts = _chosen(database, out)
        twins = _twins(database, out, chosen)
        drawn = {key for keys in chosen.values() for key in keys}
        rows = _rows(database, scores, drawn | {*twins.values()})
    shown = {
        verdict: sorted(keys)[: NUM_PICTURES // 2] if keys[0] in twins else sorted(keys)
        for verdict, keys in sorted(chosen.items(), key=_order)
    }
    progress("reading pictures for the contact sheets", 0, None)
    asked = {key for keys in shown.values() for key in keys}
    asked |= {twins[key] for key in asked & {*twins}} & {*rows}
    images = _images(download, {key: rows[key]["sha256"] for key in asked})
    for done, (verdict, keys) in enumerate(shown.items(), 1):
        tiles = [
            tile
            for key in keys
            for tile in _tiles(verdict, rows[key], twins.get(key), rows, images)
        ]
        name = "kept" if verdict == "ok" else verdict
        title = f"{name}: {len(keys):,} of {counts[verdict]:,} pictures"
        title += ", each left of the one that it is too near to" if keys[0] in twins else ""
        picture = contact_sheet(tiles, columns=COLUMNS, title=title)
        picture.save(folder / f"{_file_name(name)}.png", compress_level=1)
        progress("contact sheets", done, len(shown))


def _order(item: tuple[str, list[str]]) -> int:
    return ("ok", *RULES).index(item[0])


def _file_name(verdict: str) -> str:
    return verdict.replace("(", "").replace(")", "").replace(" ", "_")


def _chosen(
    database: duckdb.DuckDBPyConnection, out: Path
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Verdict → keys that are shown, and how many there are.

    Drawn from as few image shards as will do, since finding a picture in a tar reads through it;
    each shard is a fair sample, for the download's order is a shuffle.
    """
    verdicts = sql.parquet([out / "verdicts.parquet"])
    shard = f"substr(key, 1, {PART_DIGITS + SHARD_DIGITS})"
    order = f"md5({shard} || '{SEED}') || md5(key || '{SEED}')"
    found = database.execute(
        f"SELECT verdict, min_by(key, {order}, {NUM_PICTURES}), count(*) "
        f"FROM {verdicts} GROUP BY verdict"
    ).fetchall()
    return {verdict: keys for verdict, keys, _ in found}, {name: num for name, _, num in found}


def _twins(
    database: duckdb.DuckDBPyConnection, out: Path, chosen: dict[str, list[str]]
) -> dict[str, str]:
    keys = [key for keys in chosen.values() for key in keys]
    twins = sql.parquet([out / "twins.parquet"])
    query = f"SELECT key, twin FROM {twins} WHERE key IN (SELECT unnest(?))"
    return dict(database.execute(query, [keys]).fetchall())


def _rows(database: duckdb.DuckDBPyConnection, scores: Path, keys: Iterable[str]) -> dict[str, Row]:
    listed = f"SELECT * EXCLUDE (asked_from, asked_until) FROM {sql.parquet(score_files(scores))}"
    query = f"{listed} WHERE key IN (SELECT unnest(?))"
    cursor = database.execute(query, [list(keys)])
    names = [column[0] for column in cursor.description or ()]
    return {row[0]: dict(zip(names, row, strict=True)) for row in cursor.fetchall()}


def _images(download: Path, wanted: dict[str, str]) -> dict[str, Image.Image | str]:
    """Pictures by key (of key → sha256), or why there is none."""
    found: dict[str, Image.Image | str] = {}
    for shard, keys in groupby(sorted(wanted), key=lambda key: shard_of(download, key)):
        for key, data in originals.whole(shard, {key: wanted[key] for key in keys}):
            try:
                found[key] = decoders.shared().run(_miniature, data)
            except UndecodableError as error:
                found[key] = str(error)
    return found


def _miniature(data: bytes) -> Image.Image:
    image = decode(data)
    image.thumbnail((256, 256))
    image.info = {}
    return image


def _tiles(
    verdict: str,
    row: Row,
    twin: str | None,
    rows: dict[str, Row],
    images: dict[str, Image.Image | str],
) -> Iterator[Tile]:
    """The picture, and beside it the one that it yields to."""
    other = rows.get(twin or "")
    yield _tile(
        images.get(row["key"], "gone, or damaged"), row["caption"], _why(verdict, row, other)
    )
    if other is not None:
        yield _tile(images.get(other["key"], "gone, or damaged"), other["caption"], _size(other))
    elif twin is not None:
        path = Path(twin)
        yield _tile(decode(path.read_bytes()), path.name, "evaluation picture")


def _tile(image: Image.Image | str, caption: str | None, why: str) -> Tile:
    text = caption or "(no caption)"
    text = text if len(text) <= CAPTION_CHARS else text[: CAPTION_CHARS - 1] + "…"
    if isinstance(image, str):
        return Tile(None, [text, image[:100]])
    return Tile(image, [text, why])


def _why(verdict: str, row: Row, other: Row | None) -> str:
    """The value that decided."""
    value = _VALUES.get(verdict)
    if value is not None:
        try:
            return value(row)
        except TypeError:  # a null decided
            return "no value"
    if other is None or verdict == "same bytes":
        return _size(row)
    if None in (row["phash"], other["phash"]):
        return _size(row)
    return f"{_size(row)}, {_bits_apart(row['phash'], other['phash'])} apart"


def _bits_apart(left: int, right: int) -> str:
    return f"{(left ^ right).bit_count()} bits"


def _size(row: Row) -> str:
    return f"{row['width']}×{row['height']} px"


_VALUES: dict[str, Callable[[Row], str]] = {
    "ok": lambda row: (
        f"{_size(row)}, similarity {row['similarity']:.3f}"
        if row["similarity"] is not None
        else _size(row)
    ),
    "min_side": _size,
    "max_aspect": lambda row: f"{_size(row)}, {_aspect(row):.1f} : 1",
    "max_unsafe": lambda row: f"unsafe {row['unsafe']:.3f}",
    "max_watermark": lambda row: f"watermark {row['watermark']:.3f}",
    "max_generated": lambda row: f"generated {row['generated']:.3f}",
    "languages": lambda row: f"language {row['language']}",
    "max_phash_change": lambda row: (
        f"{(row['phash'] ^ row['listed_phash']).bit_count()} bits from listed"
    ),
    "min_aesthetic": lambda row: f"aesthetic {row['aesthetic']:.2f}",
    "top_aesthetic": lambda row: f"aesthetic {row['aesthetic']:.2f}",
    "min_similarity": lambda row: f"similarity {row['similarity']:.3f}",
    "top_similarity": lambda row: f"similarity {row['similarity']:.3f}",
}
"""Verdict → the value behind it. A null raises TypeError."""


def _aspect(row: Row) -> float:
    return max(row["width"], row["height"]) / min(row["width"], row["height"])
