"""One image shard → its rows of scores: one decode of each picture, joined by the sample's key.

Encoders are arguments, so this module knows no model.

Shape letters: N pictures, M decodable ones, K distinct captions, D image features, E text features.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from data import originals
from data.config import ScoreConfig
from data.filter.duplicates import fingerprint
from data.layout import ImageShard
from data.schema import SCORES
from data.score.language import language
from gigagan.common import decoders
from gigagan.common.files import filled_aside
from gigagan.common.pictures import JPEG, UndecodableError, open_picture

ImageFeatures = Callable[[list[Image.Image]], np.ndarray]
"""Pictures → features [N, D], float32."""
TextFeatures = Callable[[list[str]], np.ndarray]
"""Captions → features [N, E], float32."""
PairSimilarity = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Features of pictures [N, D] and of their captions [N, E], float32 → how well each fits, [N]."""
FitSimilarity = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""The same of all pairs at once; float16, as they are stored, because all are in memory."""
Aesthetic = Callable[[np.ndarray], np.ndarray]
"""Features of pictures [N, D], float32 → scores [N]."""
Judge = Callable[[list[Image.Image]], np.ndarray]
"""Pictures → probability of being unsafe, or made by a network, [N]."""

AT_LEAST = 384
"""Short side to which great pictures are reduced while they are decoded, px. No encoder of ours
takes more; one value for all, so that hashes do not hang on the encoder."""
MAX_SIDE = 4 * AT_LEAST
"""Longest side that encoders are given, px: bounds a batch of very long pictures."""


CARRIED = (
    "key", "url", "caption", "label", "source", "row", "sha256", "asked_from", "asked_until",
)  # fmt: skip
"""What is taken from the fates as it is."""
DAMAGED = "damaged"
"""How the error of a picture begins that is not the one that was downloaded."""


@dataclass(frozen=True)
class Encoders:
    """The models that judge pictures. What is None is not scored."""

    image_features: ImageFeatures | None = None
    text_features: TextFeatures | None = None
    similarity: PairSimilarity | None = None
    """Judges each pair for itself …"""
    fit_similarity: FitSimilarity | None = None
    """… or all pairs at once, because it is fitted to them: at most MAX_FITTED."""
    aesthetic: Aesthetic | None = None
    unsafe: Judge | None = None
    generated: Judge | None = None

    def __post_init__(self) -> None:
        judges = [self.similarity, self.fit_similarity]
        if self.image_features is not None and (
            self.text_features is None or judges.count(None) != 1
        ):
            raise ValueError(
                "encoders with image_features need text_features, and either similarity or "
                "fit_similarity"
            )


def path_of(out: Path, table: str, shard: ImageShard) -> Path:
    """Where a shard's `scores` or `embeddings` are."""
    return out / table / shard.stem.parent.name / f"{shard.stem.name}.parquet"


def write(table: pa.Table, path: Path) -> None:
    """Write aside, for another worker may do the same, and then in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with filled_aside(path, has_rivals=True) as partial:
        pq.write_table(table, partial, compression="zstd")


class Summary(NamedTuple):
    """What became of a shard."""

    rows: int
    is_fitted: bool
    """Its similarity is still missing."""


class _Look(NamedTuple):
    """What pixels say of one picture, or why it has none."""

    width: int | None = None
    height: int | None = None
    phash: int | None = None
    miniature: bytes | None = None
    colourfulness: float | None = None
    error: str | None = None


@dataclass
class _Seen:
    """What is known of a shard's pictures so far; all lists are of the decodable ones."""

    looks: dict[str, _Look] = field(default_factory=dict)
    """What pixels say of every picture, by key."""
    keys: list[str] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    unsafe: list[np.ndarray] = field(default_factory=list)
    generated: list[np.ndarray] = field(default_factory=list)

    def places(self, keys: list[str]) -> list[int]:
        """Where these keys are in `keys`."""
        place = {key: position for position, key in enumerate(self.keys)}
        return [place[key] for key in keys]


def score_shard(
    shard: ImageShard, encoders: Encoders, *, config: ScoreConfig, out: Path
) -> Summary:
    """Score one shard's pictures; write its embeddings and then, as done-marker, its scores.

    A picture that is gone, or has not the bytes of its fate, is a row with the error DAMAGED.
    """
    similarity = _taken_over(config)
    features = encoders.image_features if similarity is None else None
    if similarity is None and features is None:
        raise ValueError(
            "the encoders have no image_features, and score.take_over names no similarity: "
            "one of them must give it"
        )
    fates = shard.fates()
    fates = fates.filter(pc.equal(fates["fate"], "ok")).sort_by("key")
    wanted = dict(zip(fates["key"].to_pylist(), fates["sha256"].to_pylist(), strict=True))
    seen = _look_at_all(shard, wanted, encoders, features, config)
    keys = [key for key in fates["key"].to_pylist() if seen.looks[key].error is None]
    columns = _of_pixels(fates, seen, keys, encoders, config) | _of_captions(fates, config)
    if similarity is not None:
        columns["similarity"] = fates[similarity]
    elif keys:
        columns["similarity"] = _compare(shard, out, fates, seen, keys, columns, encoders)
    rows = {name: columns.get(name, pa.nulls(len(fates))) for name in SCORES.names}
    write(pa.table(rows).cast(SCORES), path_of(out, "scores", shard))
    return Summary(fates.num_rows, similarity is None and encoders.similarity is None)


def _taken_over(config: ScoreConfig) -> str | None:
    """The listed column that stands for the similarity."""
    return next((name for name in config.take_over if name.startswith("similarity")), None)


def _look_at_all(
    shard: ImageShard,
    wanted: dict[str, str],
    encoders: Encoders,
    features: ImageFeatures | None,
    config: ScoreConfig,
) -> _Seen:
    """Look at every picture of the shard; a batch is encoded while the next one is decoded."""
    seen = _Seen()
    unsafe = None if "unsafe" in config.take_over else encoders.unsafe
    with ThreadPoolExecutor(_num_threads(), "decode") as pool:
        pictures = _pictures(shard, wanted, pool, config, seen.looks)
        while batch := list(islice(pictures, config.batch_size)):
            images = [image for _, image in batch]
            seen.keys += [key for key, _ in batch]
            if features is not None:
                seen.features.append(np.asarray(features(images), np.float16))
            if unsafe is not None:
                seen.unsafe.append(np.asarray(unsafe(images), np.float32))
            if encoders.generated is not None:
                seen.generated.append(np.asarray(encoders.generated(images), np.float32))
    for key in wanted.keys() - seen.looks.keys():
        seen.looks[key] = _Look(error=f"{DAMAGED}: gone, or not the bytes that were downloaded")
    return seen


def _num_threads() -> int:
    """This process's share of the cores."""
    share = os.environ.get("OMP_NUM_THREADS", "")
    return min(16, int(share) if share.isdecimal() else len(os.sched_getaffinity(0)))


def _pictures(
    shard: ImageShard,
    wanted: dict[str, str],
    pool: ThreadPoolExecutor,
    config: ScoreConfig,
    looks: dict[str, _Look],
) -> Iterator[tuple[str, Image.Image]]:
    """Key and picture of the decodable ones, decoded ahead by one batch; fills `looks` of all that
    are not damaged."""
    ahead: deque[tuple[str, Future[tuple[_Look, Image.Image | None]]]] = deque()

    def finished() -> Iterator[tuple[str, Image.Image]]:
        key, future = ahead.popleft()
        looks[key], image = future.result()
        if image is not None:
            yield key, image

    with_colours = config.aesthetic == "colourfulness"
    for key, data in originals.whole(shard, wanted):
        ahead.append((key, pool.submit(_bounded_look, data, with_colours)))
        if len(ahead) > config.batch_size:
            yield from finished()
    while ahead:
        yield from finished()


def _bounded_look(data: bytes, colours: bool) -> tuple[_Look, Image.Image | None]:
    """What is seen in a picture; in a thread, so encoders need not wait for it.

    A JPEG whose header the fetch has read in time takes no more than its pixels and scans allow,
    some 10 s. To have its pixels from another process costs half as much again as to decode it.
    """
    try:
        if data.startswith(JPEG):
            return _look(data, colours)
        return decoders.shared().run(_look, data, colours)
    except UndecodableError as error:
        return _Look(error=str(error)), None


def _look(data: bytes, colours: bool) -> tuple[_Look, Image.Image]:
    """One decode, and what is seen in it."""
    picture = open_picture(data, at_least=AT_LEAST)
    small = picture.image.copy()
    small.thumbnail((256, 256))  # once: both would do it, and it is most of their cost
    phash, miniature = fingerprint(small)
    colour = colourfulness(small) if colours else None
    if max(picture.image.size) > MAX_SIDE:
        picture.image.thumbnail((MAX_SIDE, MAX_SIDE))
    look = _Look(picture.width, picture.height, phash, miniature, colour)
    picture.image.info = {}  # profiles and texts, which nobody reads any more
    return look, picture.image


def colourfulness(image: Image.Image) -> float:
    """M = σ_rgyb + 0.3 μ_rgyb of Hasler and Süsstrunk (2003), at no more than 256 px; 0 is gray."""
    small = image
    if max(image.size) > 256:
        small = image.copy()
        small.thumbnail((256, 256))
    red, green, blue = np.moveaxis(np.asarray(small, np.float32), -1, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


Columns = dict[str, pa.Array | pa.ChunkedArray]


def _of_pixels(
    fates: pa.Table, seen: _Seen, keys: list[str], encoders: Encoders, config: ScoreConfig
) -> Columns:
    """What pictures say, and what the metadata said of them; `keys` are the decodable ones."""
    looks = [seen.looks[key] for key in fates["key"].to_pylist()]
    columns: Columns = {
        name: pa.array([getattr(look, name) for look in looks], SCORES.field(name).type)
        for name in ("width", "height", "phash", "miniature", "error")
    }
    for name in CARRIED:
        columns[name] = fates[name]
    columns["listed_phash"] = fates["phash"]
    places = seen.places(keys)
    is_seen_N = np.array([look.error is None for look in looks])
    if config.aesthetic == "colourfulness":
        columns["aesthetic"] = pa.array([look.colourfulness for look in looks], pa.float32())
    elif config.aesthetic is not None and encoders.aesthetic is not None and keys:
        features_ND = np.concatenate(seen.features)[places].astype(np.float32)
        columns["aesthetic"] = _spread(encoders.aesthetic(features_ND), is_seen_N)
    if seen.unsafe:
        columns["unsafe"] = _spread(np.concatenate(seen.unsafe)[places], is_seen_N)
    if seen.generated:
        columns["generated"] = _spread(np.concatenate(seen.generated)[places], is_seen_N)
    for name in ("unsafe", "watermark", "aesthetic"):
        if name in config.take_over:
            columns[name] = fates[name]
    return columns


def _spread(values_M: np.ndarray, is_seen_N: np.ndarray) -> pa.Array:
    """Scores of the decodable pictures as a column of all: null elsewhere and for NaN."""
    column_N = np.full(len(is_seen_N), np.nan, np.float32)
    column_N[is_seen_N] = values_M
    return pa.array(column_N, from_pandas=True)


def _of_captions(fates: pa.Table, config: ScoreConfig) -> Columns:
    captions = [caption or "" for caption in fates["caption"].to_pylist()]
    languages = [language(caption) if config.language else None for caption in captions]
    return {
        "language": pa.array(languages, pa.string()),
        "caption_words": pa.array([len(caption.split()) for caption in captions], pa.int32()),
        "caption_chars": pa.array([len(caption) for caption in captions], pa.int32()),
    }


def _compare(
    shard: ImageShard,
    out: Path,
    fates: pa.Table,
    seen: _Seen,
    keys: list[str],
    columns: Columns,
    encoders: Encoders,
) -> pa.Array:
    """Write the embeddings, and return the similarities; null as yet where they are fitted."""
    assert encoders.text_features is not None
    is_seen_N = np.asarray(pc.is_null(columns["error"]))
    captions = [caption or "" for caption in fates["caption"].filter(is_seen_N).to_pylist()]
    distinct = sorted(set(captions))
    place = {caption: position for position, caption in enumerate(distinct)}
    texts_KE = np.asarray(encoders.text_features(distinct), np.float16)
    texts_NE = texts_KE[[place[caption] for caption in captions]]
    images_ND = np.concatenate(seen.features)[seen.places(keys)]
    table = {"key": pa.array(keys), "image": _lists(images_ND), "text": _lists(texts_NE)}
    write(pa.table(table), path_of(out, "embeddings", shard))
    if encoders.similarity is None:
        return pa.nulls(fates.num_rows, pa.float32())
    pairs = images_ND.astype(np.float32), texts_NE.astype(np.float32)
    return _spread(encoders.similarity(*pairs), is_seen_N)


def _lists(rows_ND: np.ndarray) -> pa.Array:
    N, D = rows_ND.shape
    return pa.ListArray.from_arrays(np.arange(N + 1, dtype=np.int32) * D, rows_ND.reshape(-1))
