"""Scores per sample: one row of scores and one of embeddings for every downloaded picture.

Each image shard is a piece of work of its own (shard.py); a rerun does only the missing ones.
Only a similarity that is fitted to all pairs needs them all at once, and comes at the end.

Shape letters: N pictures, M of one shard, D features.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data import originals, sql
from data.config import ScoreConfig
from data.executor import Backend, each
from data.layout import PART_DIGITS, SHARD_DIGITS, ImageShard, image_shards
from data.report import Report, Step
from data.schema import SCORES
from data.score.shard import DAMAGED, Encoders, path_of, score_shard, write
from gigagan.common.files import PARTIAL, write_aside
from gigagan.common.progress import Progress, silent

MAX_FITTED = 1_000_000
"""Most pictures that a fitted similarity is fitted to: all their embeddings are in memory then."""
FITTED = "similarity.json"
"""Written when every score file has its similarity."""


def run(
    out: Path,
    download: Path,
    config: ScoreConfig,
    make_encoders: Callable[[int], Encoders],
    *,
    workers: int = 1,
    backend: Backend = "processes",
    gpus: float = 0.0,
    progress: Progress = silent,
) -> Report:
    """Score every downloaded picture; what is done already is not done again, but for shards with
    damaged pictures, which may have been fetched again.

    `make_encoders(worker)` is called once in each worker. `gpus` is each worker's on a Ray cluster.

    Raises:
        ValueError: the download is not finished, or too large for a fitted similarity.
        DamagedError: too many of its pictures are not those that were downloaded.
        TaskError: a shard could not be scored: an encoder's own error, as text.
    """
    shards = _finished(download)
    _clear(out)
    _forget_damage(out, shards)
    missing = [shard for shard in shards if not _is_scored(shard, out)]
    if missing:
        (out / FITTED).unlink(missing_ok=True)
    task = partial(score_shard, config=config, out=out)
    done, num_pictures, is_fitted = len(shards) - len(missing), 0, None
    progress("scoring shards", done, len(shards))
    for _, summary in each(
        task, missing, workers=workers, backend=backend, setup=make_encoders, gpus=gpus
    ):
        done, num_pictures, is_fitted = done + 1, num_pictures + summary.rows, summary.is_fitted
        if is_fitted:
            _refuse_above_limit(num_pictures)
        progress("scoring shards", done, len(shards))
    is_done = (out / FITTED).exists()
    if not is_done and is_fitted is not False:
        _fit(out, shards, make_encoders(0), progress)
    report = _report(out)
    report.save(out / "report.json")
    if found := report.details.get(DAMAGED):
        pictures = int(report.metrics["pictures"])
        originals.refuse_many(report.counts[DAMAGED], pictures, found["first"], download)
    if not is_done:
        write_aside(out / FITTED, json.dumps({"shards": len(shards)}))
    return report


def _forget_damage(out: Path, shards: list[ImageShard]) -> None:
    """Remove the scores of shards in which an earlier run found damaged pictures."""
    path = out / "report.json"
    told = json.loads(path.read_text(encoding="utf-8"))["details"] if path.exists() else {}
    damaged = set(told.get(DAMAGED, {}).get("shards", ()))
    for shard in shards if damaged else ():
        if shard.name in damaged:
            for table in ("scores", "embeddings"):
                path_of(out, table, shard).unlink(missing_ok=True)


def _finished(download: Path) -> list[ImageShard]:
    """All shards of a download, if it is finished."""
    shards = list(image_shards(download))
    index = download / "lists" / "index.json"
    parts = len(json.loads(index.read_text())["parts"]) if index.exists() else None
    finished = len(list((download / "fates").glob("*.parquet")))
    if not shards or (parts is not None and finished < parts):
        of = "" if parts is None else f" of {parts}"
        raise ValueError(
            f"{download} is not a finished download: {finished}{of} parts have their fates; run "
            "the download stage again, it goes on where it stopped"
        )
    return shards


def _clear(out: Path) -> None:
    """Remove what a killed run left half written."""
    for name in ("scores", "embeddings"):
        (out / name).mkdir(parents=True, exist_ok=True)
        for path in (out / name).glob(f"*/*{PARTIAL}"):
            path.unlink()


def _is_scored(shard: ImageShard, out: Path) -> bool:
    """The scores are written last."""
    return path_of(out, "scores", shard).exists()


# ---- a similarity that is fitted to all pairs --------------------------------------------------


def _refuse_above_limit(num_pictures: int) -> None:
    if num_pictures > MAX_FITTED:
        raise ValueError(
            f"score.encoder is fitted to all pictures at once, which holds their embeddings in "
            f"memory: at most {MAX_FITTED:,}, and this download has more. Choose "
            "open_clip:ARCHITECTURE/WEIGHTS, or download.max_rows"
        )


def _fit(out: Path, shards: list[ImageShard], encoders: Encoders, progress: Progress) -> None:
    """Put the similarity into every score file; done anew as a whole if it is interrupted."""
    if encoders.fit_similarity is None:
        return
    paths = {shard: path_of(out, "embeddings", shard) for shard in shards}
    paths = {shard: path for shard, path in paths.items() if path.exists()}
    rows = [pq.read_metadata(path).num_rows for path in paths.values()]
    _refuse_above_limit(sum(rows))
    if not sum(rows):
        return
    progress("comparing pictures with captions", 0, len(paths))
    pairs = (_stacked(list(paths.values()), sum(rows), name) for name in ("image", "text"))
    similarity_N = np.asarray(encoders.fit_similarity(*pairs), np.float32)
    ends = np.cumsum(rows)
    for done, (shard, end) in enumerate(zip(paths, ends, strict=True), 1):
        keys = pq.read_table(paths[shard], columns=["key"])["key"]
        _fill_in(path_of(out, "scores", shard), keys, similarity_N[end - len(keys) : end])
        progress("comparing pictures with captions", done, len(paths))


def _stacked(paths: list[Path], num_rows: int, name: str) -> np.ndarray:
    """One column of all embeddings, [N, D] in float16."""
    stacked_ND: np.ndarray | None = None
    start = 0
    for path in paths:
        column = pq.read_table(path, columns=[name])[name].combine_chunks()
        values_ND = column.flatten().to_numpy().reshape(len(column), -1)
        if stacked_ND is None:
            stacked_ND = np.empty((num_rows, values_ND.shape[1]), np.float16)
        stacked_ND[start : start + len(column)] = values_ND
        start += len(column)
    assert stacked_ND is not None
    return stacked_ND


def _fill_in(path: Path, keys: pa.ChunkedArray, similarity_M: np.ndarray) -> None:
    """Rewrite a score file with the similarities of these keys."""
    table = pq.read_table(path)
    place = pc.index_in(table["key"], value_set=keys.combine_chunks())
    similarity = pa.array(similarity_M, from_pandas=True).take(place.combine_chunks())
    at = table.schema.get_field_index("similarity")
    write(table.set_column(at, SCORES.field("similarity"), similarity), path)


# ---- report ------------------------------------------------------------------------------------


def _report(out: Path) -> Report:
    """Counted over the score files as a stream, so that a resumed run counts the same."""
    with duckdb.connect() as connection:
        files = sorted((out / "scores").glob("*/*.parquet"))
        connection.sql(f"FROM {sql.parquet(files)}").create_view("scores")
        kinds = connection.execute(
            "SELECT split_part(error, ':', 1), count(*) FROM scores GROUP BY 1 ORDER BY 2 DESC, 1"
        ).fetchall()
        languages = connection.execute(
            "SELECT coalesce(language, ''), count(*) FROM scores GROUP BY 1 ORDER BY 2 DESC, 1"
        ).fetchall()
        damaged = connection.execute(
            f"SELECT substr(key, 1, {PART_DIGITS + SHARD_DIGITS}), count(*), min(key) FROM scores "
            f"WHERE error LIKE '{DAMAGED}: %' GROUP BY 1 ORDER BY 1"
        ).fetchall()
        histograms = sql.histograms(connection)
    lost = {DAMAGED: sum(rows for _, rows, _ in damaged)} if damaged else {}
    undecodable = {f"undecodable: {k}": rows for k, rows in kinds if k not in (None, DAMAGED)}
    scored, dropped = dict(kinds).get(None, 0), sum(undecodable.values())
    rows = scored + dropped + sum(lost.values())
    where = {"shards": [shard for shard, _, _ in damaged], "first": damaged[0][2]} if lost else None
    return Report(
        counts={"scored": scored, **lost, **undecodable},
        funnel=[
            Step("downloaded", 0, rows),
            *(Step(DAMAGED, count, rows - count) for count in lost.values()),
            Step("undecodable", dropped, scored),
        ],
        metrics={"pictures": float(rows), "scored": float(scored)},
        details={
            **({DAMAGED: where} if where else {}),
            "histograms": histograms,
            "languages": dict(languages),
        },
    )
