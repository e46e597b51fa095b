"""Damaged pictures of a download, asked for again: what fits is put back into its tar.

Of what cannot be had again the fates say why, as if it had been asked for only now.
"""

from __future__ import annotations

import io
import tarfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data import originals
from data.download.parts import Summary
from data.layout import PART_DIGITS, ImageShard
from data.originals import Damage
from data.schema import FATES, with_label
from data.web.addresses import RefusedError
from data.web.fetch import Fetcher, FetchSettings
from gigagan.common import tars
from gigagan.common.files import filled_aside
from gigagan.common.progress import Progress, silent


def mend(
    root: Path,
    damaged: Iterable[Damage],
    settings: FetchSettings,
    *,
    threads: int = 32,
    progress: Progress = silent,
) -> Counter[str]:
    """Fetch damaged pictures again; `damaged` is sorted, as originals.verify returns it.

    A tar is in place before its fates are. Pictures that are whole are not asked for. Returns their
    fates: `ok` is mended.
    """
    asker = _Asker(Fetcher(settings), threads)
    counts: Counter[str] = Counter()
    shards = [shard for shard, _ in groupby(damaged, key=lambda one: one.shard)]
    done = 0
    for part, of_part in groupby(shards, key=lambda shard: shard.part):
        changed: dict[int, pa.Table] = {}
        for shard in of_part:
            fates = shard.fates()
            asked_from = datetime.now(UTC)
            answers = _refill(shard, fates, asker)
            counts.update(fate for fate, _ in answers.values())
            if any(fate != "ok" for fate, _ in answers.values()):
                changed[shard.number] = _with(fates, answers, asked_from)
            done += 1
            progress("fetching damaged pictures again, shards", done, len(shards))
        if changed:
            _rewrite(root, part, changed)
    return counts


class _Asker:
    """Fetches what has known bytes."""

    def __init__(self, fetcher: Fetcher, threads: int) -> None:
        self.fetcher, self.threads = fetcher, threads

    def ask(self, row: dict[str, Any]) -> tuple[str, str | None, bytes]:
        """(fate, detail, bytes) of the picture of a row of fates."""
        try:
            return "ok", None, self.fetcher.fetch(row["url"], f"sha256:{row['sha256']}")
        except RefusedError as refusal:
            return refusal.fate, str(refusal) or None, b""
        except Exception as error:  # as when it is asked for the first time
            return "fault", f"{type(error).__name__}: {error}", b""


def _refill(shard: ImageShard, fates: pa.Table, asker: _Asker) -> dict[str, tuple[str, str | None]]:
    """Write the tar anew, of what is whole and what is fetched; (fate, detail) by key of these."""
    wanted = {row["key"]: row for row in fates.to_pylist() if row["fate"] == "ok"}
    answers: dict[str, tuple[str, str | None]] = {}
    shard.tar.parent.mkdir(parents=True, exist_ok=True)
    with (
        filled_aside(shard.tar, fsync=True) as partial,
        tarfile.open(partial, "w") as tar,
        ThreadPoolExecutor(asker.threads) as pool,
    ):
        digests = {key: row["sha256"] for key, row in wanted.items()}
        for key, data in originals.whole(shard, digests):
            _add(tar, shard.member(key), data)
            del wanted[key]
        for key, (fate, detail, data) in zip(
            wanted, pool.map(asker.ask, wanted.values()), strict=True
        ):
            answers[key] = fate, detail
            if fate == "ok":
                _add(tar, shard.member(key), data)
    return answers


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o444
    member.mtime = int(time.time()) + 0.5  # a fraction: as long a header as img2dataset's
    tar.addfile(member, io.BytesIO(data))


def _with(
    fates: pa.Table, answers: dict[str, tuple[str, str | None]], asked_from: datetime
) -> pa.Table:
    """The fates of a shard, with the answers for pictures that could not be had again."""
    rows = fates.to_pylist()
    for row in rows:
        fate, detail = answers.get(row["key"], ("ok", None))
        if fate != "ok":
            row |= {"fate": fate, "detail": detail, "sha256": None}
            row |= {"asked_from": asked_from, "asked_until": datetime.now(UTC)}
    return pa.Table.from_pylist(rows, FATES)


def _rewrite(root: Path, part: int, changed: dict[int, pa.Table]) -> None:
    """Put changed shards into a part's fates."""
    path = root / "fates" / f"{part:0{PART_DIGITS}d}.parquet"
    summary = Summary()
    with (
        filled_aside(path) as partial,
        pq.ParquetFile(path) as file,
        pq.ParquetWriter(partial, FATES, compression="zstd") as writer,
    ):
        for number in range(file.num_row_groups):
            fates = (
                changed[number] if number in changed else with_label(file.read_row_group(number))
            )
            writer.write_table(fates, row_group_size=fates.num_rows)
            summary.count(fates)
            with ImageShard(root, part, number).tar.open("rb", buffering=0) as tar:
                summary.num_bytes += sum(member.size for member in tars.members(tar))
        writer.add_key_value_metadata({"summary": summary.dump()})
