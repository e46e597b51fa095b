"""Scores → a verdict on every picture: `ok`, or the first rule that it breaks. It never scores.

DuckDB reads the score files where they lie and spills to disk, so that no table of the pictures is
in memory but what `duplicates` compares: rows that pass every rule before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data import sql
from data.config import FilterConfig
from data.filter import duplicates, influence, rules
from data.filter.rules import (
    BROKEN_CAPTION,
    DISTINCT_WORDS,
    MISSING,
    RULES,
    SETTINGS,
    UnscoredError,
)
from data.look.tables import opened
from data.report import Funnel, Step
from data.schema import MINIATURE, SCORES
from gigagan.common.files import filled_aside, write_aside
from gigagan.common.progress import Progress, silent

JUDGED = (
    "key", "error", "width", "height", "similarity", "aesthetic", "unsafe", "watermark", "language",
    "label", "phash", "listed_phash", "miniature", "sha256", "caption_words", "caption_chars",
    "generated",
)  # fmt: skip
"""Columns that decide; of captions it is what is counted in them."""
MEMORY = "1GB"
"""What DuckDB takes before it spills."""
ROWS = 100_000
"""Rows in memory at once where they are streamed."""


class NothingKeptError(ValueError):
    """The thresholds leave nothing to learn from."""


@dataclass(frozen=True)
class Selection:
    """What select found, and wrote as JSON when all else was written."""

    counts: dict[str, int]
    """Verdict → pictures."""
    missing: dict[str, int]
    """Rule → pictures that it dropped because a column that it reads was null."""
    thresholds: dict[str, Any]
    """Setting → its threshold; of a share also what it came to."""
    histograms: dict[str, dict[str, list[float]]]
    """Score → counts over equal bins and their edges, of all decodable pictures."""
    state: str
    """Digest of the settings and of the files that were read."""


def select(
    out: Path,
    scores: Path,
    config: FilterConfig,
    *,
    workers: int = 1,
    progress: Progress = silent,
) -> Selection:
    """Judge every picture that is scored below `scores`; a finished selection is not made again.

    Writes verdicts.parquet (key, verdict), twins.parquet (key, twin: who a duplicate yields to)
    and kept.parquet (schema.SCORES), sorted by key. A null in a column that a rule reads breaks
    the rule, but for `listed_phash`: most lists have none. Thresholds are rounded to float32, as
    scores are, so that a score equal to one passes. `workers` are DuckDB's threads.

    Raises:
        NothingKeptError: no row passes; names the rule that dropped most.
        UnscoredError: a rule reads what no picture has.
    """
    out.mkdir(parents=True, exist_ok=True)
    done, state = out / "selection.json", _state(scores, config)
    written = all((out / f"{name}.parquet").exists() for name in ("kept", "twins", "verdicts"))
    if written and done.exists() and (found := json.loads(done.read_text()))["state"] == state:
        return Selection(**found)
    with _connect(out, workers) as database:
        _open(database, scores, config)
        selection = _decide(database, out, scores, config, state, workers, progress)
    write_aside(done, json.dumps(asdict(selection), indent=1))
    return selection


def funnel(counts: dict[str, int], config: FilterConfig) -> Funnel:
    """Pictures left after each rule that `config` asks for."""
    rows = sum(counts.values())
    steps = [Step("downloaded", 0, rows)]
    for rule in RULES:
        dropped = counts.get(rule, 0)
        if dropped or getattr(config, SETTINGS.get(rule, rule), True) not in (None, (), "keep"):
            rows -= dropped
            steps.append(Step(rule, dropped, rows))
    return steps


def score_files(scores: Path, kind: str = "scores") -> list[Path]:
    """The files of scores, or embeddings, in the order of their keys."""
    return sorted((scores / kind).glob("*/*.parquet"))


def _state(scores: Path, config: FilterConfig) -> str:
    """Digest of all that decides a selection: settings, and sizes and times of the files."""
    of_shards = {"resolutions", "samples_per_shard", "codec"}
    digest = hashlib.sha256(config.model_dump_json(exclude=of_shards).encode())
    files = score_files(scores) + [Path(name) for name in config.decontaminate]
    files += [Path(config.influence)] if config.influence else []
    if config.min_duplicate_cosine is not None:
        files += score_files(scores, "embeddings")
    for path in filter(Path.exists, files):
        stat = path.stat()
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _connect(out: Path, workers: int) -> duckdb.DuckDBPyConnection:
    spill = out / "spill.partial"
    database = duckdb.connect(
        config={"memory_limit": MEMORY, "threads": workers, "temp_directory": str(spill)}
    )
    database.execute("SET enable_progress_bar = false")
    return database


def _open(database: duckdb.DuckDBPyConnection, scores: Path, config: FilterConfig) -> None:
    """Name the score files `files`, and copy the columns that are judged by into `scores`.

    The copy is read many times. Also, DuckDB takes the statistics of Parquet, which leave out
    what is not a number, for proof that there is none.
    """
    files = score_files(scores)
    if not files:
        raise UnscoredError(f"no scores in {scores / 'scores'}: score the download first")
    absent = {*SCORES.names} - {*opened(files[0]).schema_arrow.names}
    if absent:
        raise UnscoredError(f"{files[0]} has no column {min(absent)}: score the download anew")
    database.sql(f"FROM {sql.parquet(files)}").create_view("files")
    counted = "NULL" if config.min_distinct_words is None else DISTINCT_WORDS
    of_captions = f"{BROKEN_CAPTION} AS broken_caption, {counted} AS distinct_words"
    influence.read(database, config.influence)
    database.execute(
        f"CREATE TABLE scores AS SELECT {', '.join(JUDGED)}, {of_captions}, influence "
        f"FROM files LEFT JOIN {influence.TABLE} USING (key)"
    )


def _decide(
    database: duckdb.DuckDBPyConnection,
    out: Path,
    scores: Path,
    config: FilterConfig,
    state: str,
    workers: int,
    progress: Progress,
) -> Selection:
    progress("judging by scores", 0, None)
    asked = rules.rules(database, config)
    code = rules.code(asked)
    database.execute(f"CREATE TABLE judged AS SELECT key, {code} AS code FROM scores")
    database.execute(
        "CREATE TABLE passing AS SELECT key, sha256, phash, miniature, "
        f"width::DOUBLE * height AS area FROM scores WHERE {code} = 0"
    )
    database.execute("CREATE TABLE late (key VARCHAR, code UTINYINT, twin VARCHAR)")
    if config.decontaminate:
        _drop_contaminated(database, config, workers, progress)
    _drop_same_bytes(database, progress)
    if config.max_phash_distance is not None:
        _drop_near(database, config, progress)
    if config.min_duplicate_cosine is not None:
        _drop_near_embeddings(database, out, scores, config, progress)
    progress("writing verdicts", 0, None)
    database.execute(
        "CREATE VIEW verdicts AS SELECT key, greatest(judged.code, coalesce(late.code, 0)) AS code "
        "FROM judged LEFT JOIN late USING (key)"
    )
    counts, missing = _counts(database)
    _assert_something_is_kept(counts)
    _write(database, out)
    thresholds: dict[str, Any] = {
        rule.name: rule.threshold for rule in asked if rule.threshold != ""
    }
    for share in ("top_similarity", "top_aesthetic"):
        if share in thresholds:
            thresholds[share] = {"share": getattr(config, share), "least": thresholds[share]}
    if "drop_influence" in thresholds:
        thresholds["drop_influence"] = {
            "share": config.drop_influence,
            "most": thresholds["drop_influence"],
            "kept without one": _num_without_influence(database),
        }
    return Selection(counts, missing, thresholds, sql.histograms(database), state)


def _num_without_influence(database: duckdb.DuckDBPyConnection) -> int:
    """Pictures that are kept and have none."""
    row = database.execute(
        "SELECT count(*) FROM scores JOIN verdicts USING (key) WHERE code = 0 AND influence IS NULL"
    ).fetchone()
    assert row is not None
    return int(row[0])


# ---- rules on pairs of rows --------------------------------------------------------------------

LEFT = "passing ANTI JOIN late USING (key)"
"""Rows that no rule has dropped so far."""


def _drop(
    database: duckdb.DuckDBPyConnection,
    rule: str,
    keys: pa.ChunkedArray,
    twins: pa.Array | pa.ChunkedArray | None,
) -> None:
    """Note the verdict; without twins a null is to blame."""
    number = RULES.index(rule) + 1 + (MISSING if twins is None else 0)
    twins = pa.nulls(len(keys), pa.string()) if twins is None else twins
    database.register("found", pa.table({"key": keys, "twin": twins}))
    database.execute(f"INSERT INTO late SELECT key, {number}, twin FROM found")
    database.unregister("found")


def _drop_lookless(database: duckdb.DuckDBPyConnection, rule: str) -> None:
    """Rows without hash or miniature break a rule that compares them."""
    number = RULES.index(rule) + 1 + MISSING
    lookless = f"phash IS NULL OR octet_length(miniature) IS DISTINCT FROM {3 * MINIATURE**2}"
    database.execute(f"INSERT INTO late SELECT key, {number}, NULL FROM {LEFT} WHERE {lookless}")


def _drop_contaminated(
    database: duckdb.DuckDBPyConnection, config: FilterConfig, workers: int, progress: Progress
) -> None:
    """Rows near to an evaluation picture, by the limits of near duplicates."""
    assert config.max_phash_distance is not None, "its config is refused without"
    known = duplicates.references(config.decontaminate, workers=workers, progress=progress)
    _drop_lookless(database, "contaminated")
    names = pa.array([str(path) for path in known.paths], pa.string())
    found = []
    query = f"SELECT key, phash, miniature FROM {LEFT} ORDER BY key"
    for block in database.sql(query).to_arrow_reader(ROWS):
        rows = pa.table(block)
        limits = config.max_phash_distance, config.max_colour_distance
        near_N = duplicates.contaminated(*_looks(rows), known, *limits)
        hit = np.flatnonzero(near_N >= 0)
        found.append((rows["key"].take(pa.array(hit)), names.take(pa.array(near_N[hit]))))
        progress("comparing with evaluation pictures", 0, None)
    for keys, twins in found:
        _drop(database, "contaminated", keys, twins)


def _drop_same_bytes(database: duckdb.DuckDBPyConnection, progress: Progress) -> None:
    """Of equal bytes the smallest key stays."""
    progress("looking for equal bytes", 0, None)
    number = RULES.index("same bytes") + 1
    database.execute(
        f"INSERT INTO late SELECT key, {number + MISSING}, NULL FROM {LEFT} WHERE sha256 IS NULL"
    )
    database.execute(
        f"CREATE TEMP TABLE twice AS SELECT sha256, min(key) AS first FROM {LEFT} "
        "GROUP BY sha256 HAVING count(*) > 1"
    )
    database.execute(
        f"INSERT INTO late SELECT l.key, {number}, first "
        f"FROM (SELECT key, sha256 FROM {LEFT}) l JOIN twice USING (sha256) WHERE l.key > first"
    )


def _drop_near(
    database: duckdb.DuckDBPyConnection, config: FilterConfig, progress: Progress
) -> None:
    progress("looking for near duplicates", 0, None)
    _drop_lookless(database, "near duplicate")
    assert config.max_phash_distance is not None
    rows = database.sql(
        f"SELECT key, phash, miniature, area FROM {LEFT} ORDER BY key"
    ).to_arrow_table()
    keeper = duplicates.near_duplicates(
        *_looks(rows),
        rows["area"].to_numpy(),
        config.max_phash_distance,
        config.max_colour_distance,
    )
    _drop_yielding(database, "near duplicate", rows["key"], keeper)


def _drop_yielding(
    database: duckdb.DuckDBPyConnection, rule: str, keys: pa.ChunkedArray, keeper: np.ndarray
) -> None:
    gone = np.flatnonzero(keeper >= 0)
    _drop(database, rule, keys.take(pa.array(gone)), keys.take(pa.array(keeper[gone])))


def _looks(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Hashes [N] and miniatures [N, D] of rows that have them."""
    size = 3 * MINIATURE**2
    blocks = [
        np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, size)[
            chunk.offset : chunk.offset + len(chunk)
        ]
        for chunk in rows["miniature"].cast(pa.binary(size)).chunks
        if len(chunk)
    ]
    miniature_ND = np.concatenate(blocks) if blocks else np.empty((0, size), np.uint8)
    return rows["phash"].to_numpy(), miniature_ND


def _drop_near_embeddings(
    database: duckdb.DuckDBPyConnection,
    out: Path,
    scores: Path,
    config: FilterConfig,
    progress: Progress,
) -> None:
    rule, least = "near duplicate (embedding)", config.min_duplicate_cosine
    assert least is not None
    rows = database.sql(f"SELECT key, area FROM {LEFT} ORDER BY key").to_arrow_table()
    if not rows.num_rows:
        return
    spool = out / "embeddings.partial"
    try:
        features_ND, has_N = _spooled(rows["key"], scores, spool, progress)
        if not has_N.any():
            raise UnscoredError(
                f"filter.min_duplicate_cosine is {least}, but {scores / 'embeddings'} has no "
                "embedding of a picture that is left: score with an encoder (no similarity in "
                "score.take_over), or set it to null"
            )
        _drop(database, rule, rows["key"].filter(pa.array(~has_N)), None)
        area_N = rows["area"].to_numpy()
        keeper_N = duplicates.embedding_duplicates(features_ND, area_N, least, progress=progress)
    finally:
        spool.unlink(missing_ok=True)
    _drop_yielding(database, rule, rows["key"], keeper_N)


def _spooled(
    keys: pa.ChunkedArray, scores: Path, spool: Path, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of these keys, which ascend, as a memory map [N, D], and which keys have one.

    The others stay zero, which is near to nothing.
    """
    files = score_files(scores, "embeddings")
    wanted_N = np.array(keys.to_pylist(), "S")
    has_N = np.zeros(len(wanted_N), bool)
    features_ND = np.empty((0, 0), np.float16)
    for done, path in enumerate(files, 1):
        for names, block_ND in _embeddings(path):
            if not features_ND.size:
                shape = (len(wanted_N), block_ND.shape[1])
                features_ND = np.memmap(spool, np.float16, "w+", shape=shape)
            if block_ND.shape[1] != features_ND.shape[1]:
                raise ValueError(
                    f"{path}: embeddings of {block_ND.shape[1]} numbers, others of "
                    f"{features_ND.shape[1]}: score the download anew"
                )
            place = np.minimum(np.searchsorted(wanted_N, names), len(wanted_N) - 1)
            use = (wanted_N[place] == names) & np.isfinite(block_ND).all(1)
            has_N[place[use]] = True
            features_ND[place[use]] = block_ND[use]
        progress("reading embeddings", done, len(files))
    return features_ND, has_N


def _embeddings(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(keys, embeddings [N, D]) in blocks of a file's rows."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS, columns=["key", "image"]):
            rows = batch.filter(pc.is_valid(batch["image"]))
            if rows.num_rows:
                values = rows["image"].flatten().to_numpy(zero_copy_only=False)
                yield np.array(rows["key"].to_pylist(), "S"), values.reshape(rows.num_rows, -1)


# ---- results -----------------------------------------------------------------------------------


def _counts(database: duckdb.DuckDBPyConnection) -> tuple[dict[str, int], dict[str, int]]:
    """Pictures by verdict, most first, and how many of them a null decided."""
    counts: dict[str, int] = {}
    missing: dict[str, int] = {}
    query = "SELECT code, count(*) FROM verdicts GROUP BY code ORDER BY count(*) DESC, code"
    for code, rows in database.execute(query).fetchall():
        verdict = ("ok", *RULES)[code % MISSING]
        counts[verdict] = counts.get(verdict, 0) + rows
        if code > MISSING:
            missing[verdict] = rows
    return dict(sorted(counts.items(), key=lambda item: -item[1])), missing


def _assert_something_is_kept(counts: dict[str, int]) -> None:
    if counts.get("ok"):
        return
    worst, dropped = next(iter(counts.items()), ("no rows", 0))
    setting = SETTINGS.get(worst, worst)
    is_setting = setting in FilterConfig.model_fields
    remedy = (
        f"loosen filter.{setting}" if is_setting else "look at the download's pictures and lists"
    )
    raise NothingKeptError(
        f"the filter keeps none of {sum(counts.values())} pictures; the rule {worst!r} dropped "
        f"most ({dropped}): {remedy}"
    )


def _write(database: duckdb.DuckDBPyConnection, out: Path) -> None:
    """kept, twins and verdicts."""
    _write_kept(database, out / "kept.parquet")
    names = ", ".join(sql.text(name) for name in ("ok", *RULES))
    for name, query in {
        "twins": "SELECT key, twin FROM late WHERE twin IS NOT NULL ORDER BY key",
        "verdicts": f"SELECT key, [{names}][code % {MISSING} + 1] AS verdict "
        "FROM verdicts ORDER BY key",
    }.items():
        with filled_aside(out / f"{name}.parquet") as partial:
            database.execute(f"COPY ({query}) TO {sql.text(str(partial))} (FORMAT parquet)")


def _write_kept(database: duckdb.DuckDBPyConnection, path: Path) -> None:
    columns = ", ".join(SCORES.names)
    query = (
        f"SELECT {columns} FROM files SEMI JOIN (SELECT key FROM verdicts WHERE code = 0) "
        "USING (key) ORDER BY key"
    )
    with filled_aside(path) as partial, pq.ParquetWriter(partial, SCORES) as writer:
        for block in database.sql(query).to_arrow_reader(ROWS):
            writer.write_table(pa.table(block).cast(SCORES), row_group_size=ROWS)
