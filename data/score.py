"""Scores per sample: one decode of each picture, one row of scores keyed by the sample's key.

Encoders are arguments, so this module knows no model. Each image shard commits its own Parquet
below `scores/`; a rerun does only the missing ones. What needs all pictures at once (a
cross-fitted aligner) comes at the end.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.config import FilterConfig
from data.decode import UndecodableError, decode
from data.report import Progress, silent

ImageFeatures = Callable[[list[Image.Image]], np.ndarray]
"""Pictures → features [N, D], float32."""
TextFeatures = Callable[[list[str]], np.ndarray]
"""Captions → features [N, E], float32."""
PairSimilarity = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Features of pictures [N, D] and of their captions [N, E] → how well each pair fits, [N]."""
Unsafe = Callable[[list[Image.Image]], np.ndarray]
"""Pictures → probability of being unsafe, [N]."""


@dataclass(frozen=True)
class Encoders:
    """The models that judge pictures; `unsafe` may be missing."""

    image_features: ImageFeatures
    text_features: TextFeatures
    similarity: PairSimilarity
    unsafe: Unsafe | None = None


MINIATURE = 4
"""Side of the miniature that near duplicates are compared by, px."""


def score(
    images: Path,
    out: Path,
    encoders: Encoders,
    config: FilterConfig,
    *,
    progress: Progress = silent,
) -> Path:
    """Score every downloaded picture below `images`; returns `out/scores.parquet`, sorted by key.

    Columns: key, url, caption, sha256, width, height (null where undecodable), aesthetic, unsafe,
    phash, miniature, error, similarity. `embeddings.parquet` holds the features in float16.
    """
    target = out / "scores.parquet"
    if target.exists():
        return target
    parts = out / "scores"
    parts.mkdir(parents=True, exist_ok=True)
    shards = sorted(stats.name.removesuffix("_stats.json") for stats in images.glob("*_stats.json"))
    total = sum(_num_ok(images / f"{name}.parquet") for name in shards)
    done = 0
    for name in shards:
        part = parts / f"{name}.parquet"
        if not part.exists():
            _write(_score_shard(images / name, encoders, config, done, total, progress), part)
        done += pq.read_metadata(part).num_rows
        progress("scoring", done, total)
    table = pa.concat_tables(pq.read_table(parts / f"{name}.parquet") for name in shards)
    _write(_with_similarity(table.sort_by("key"), out, encoders, progress), target)
    return target


def _num_ok(path: Path) -> int:
    return pq.read_table(path, filters=[("status", "=", "success")], columns=["key"]).num_rows


def _write(table: pa.Table, path: Path) -> None:
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial)
    partial.replace(path)


def members(tar: Path) -> Iterator[tuple[str, bytes]]:
    """(key, original bytes) of each picture in one of img2dataset's tars."""
    with tarfile.open(tar) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".jpg"):  # whatever the codec is
                file = archive.extractfile(member)
                assert file is not None
                yield member.name.removesuffix(".jpg"), file.read()


def _score_shard(
    stem: Path,
    encoders: Encoders,
    config: FilterConfig,
    done: int,
    total: int,
    progress: Progress,
) -> pa.Table:
    """Rows of one image shard, features among them."""
    listed = pq.read_table(stem.with_suffix(".parquet")).to_pylist()
    known = {row["key"]: row for row in listed if row["status"] == "success"}
    rows: list[dict[str, object]] = []
    pictures = members(stem.with_suffix(".tar"))
    while batch := list(islice(pictures, config.batch_size)):
        images: list[Image.Image] = []
        seen: list[dict[str, object]] = []
        for key, data in batch:
            row = {name: known[key][name] for name in ("key", "url", "caption", "sha256")}
            try:
                images.append(decode(data))
                seen.append(row)
            except UndecodableError as error:
                row["error"] = str(error)
            rows.append(row)
        _judge(images, seen, encoders)
        progress("scoring", done + len(rows), total)
    return pa.Table.from_pylist(rows, _PART)


_PART = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("aesthetic", pa.float32()),
        ("unsafe", pa.float32()),
        ("phash", pa.uint64()),
        ("miniature", pa.binary(3 * MINIATURE**2)),
        ("error", pa.string()),
        ("features", pa.list_(pa.float16())),
    ]
)


def _judge(images: list[Image.Image], rows: list[dict[str, object]], encoders: Encoders) -> None:
    """Put the scores of each picture into its row."""
    if not images:
        return
    features_ND = np.asarray(encoders.image_features(images), np.float16)
    unsafe_N = encoders.unsafe(images) if encoders.unsafe else [None] * len(images)
    for image, row, features_D, unsafe in zip(images, rows, features_ND, unsafe_N, strict=True):
        small = image.copy()
        small.thumbnail((256, 256))
        row["width"], row["height"] = image.size
        row["aesthetic"] = colourfulness(np.asarray(small))
        row["unsafe"] = None if unsafe is None else float(unsafe)
        row["phash"] = int(str(imagehash.phash(small)), 16)
        row["miniature"] = small.resize((MINIATURE, MINIATURE), Image.Resampling.BOX).tobytes()
        row["features"] = features_D


def colourfulness(image_HWC: np.ndarray) -> float:
    """M = σ_rgyb + 0.3 μ_rgyb of Hasler and Süsstrunk (2003), for uint8 RGB; 0 is gray."""
    red, green, blue = np.moveaxis(image_HWC.astype(np.float32), -1, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def _with_similarity(
    table: pa.Table, out: Path, encoders: Encoders, progress: Progress
) -> pa.Table:
    """Add `similarity`, from all pairs at once; move the features to `embeddings.parquet`.

    Each distinct caption is encoded once. Undecodable pictures get null.
    """
    whole = np.flatnonzero(np.asarray(table["error"].is_null()))
    similarity_N = np.full(table.num_rows, np.nan, np.float32)
    if len(whole):
        progress("comparing pictures with captions", 0, None)
        images_ND = np.stack(table["features"].take(whole).to_numpy(zero_copy_only=False))
        captions = table["caption"].take(whole).to_pylist()
        distinct = sorted(set(captions))
        place = {caption: position for position, caption in enumerate(distinct)}
        texts_KE = np.asarray(encoders.text_features(distinct), np.float32)
        texts_NE = texts_KE[[place[caption] for caption in captions]]
        similarity_N[whole] = encoders.similarity(images_ND.astype(np.float32), texts_NE)
        embeddings = {
            "key": table["key"].take(whole),
            "image": list(images_ND),
            "text": list(texts_NE.astype(np.float16)),
        }
        _write(pa.table(embeddings), out / "embeddings.parquet")
    column = pa.array(similarity_N, from_pandas=True)  # NaN → null
    return table.drop_columns("features").append_column("similarity", column)
