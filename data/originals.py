"""Pictures as they were downloaded: only those whose bytes have the sha256 in their fate.

Disks and copies damage files. What is damaged is left out here, a picture at a time, and counted by
whoever asked; `python -m data download OUT --verify` fetches it again (mend.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pyarrow.compute as pc

from data.executor import each
from data.layout import ImageShard, image_shards
from gigagan.common import tars
from gigagan.common.progress import Progress, silent

MOST_DAMAGED = 0.01
"""Share of pictures that may be damaged (and one always may): with more, the disk is the matter."""


class DamagedError(ValueError):
    """More pictures of a download are damaged than one does without; the text has the remedy."""


class Damage(NamedTuple):
    """A picture that is gone, or has other bytes than were downloaded."""

    shard: ImageShard
    key: str


def verify(
    root: Path,
    shards: Iterable[ImageShard] | None = None,
    *,
    workers: int = 1,
    progress: Progress = silent,
) -> list[Damage]:
    """Every damaged picture of a finished download in `root`, or of some of its shards, by key.

    Reads all of their bytes. `images/` may lack whole tars: their pictures are damaged.

    Raises:
        TaskError: the fates of a shard cannot be read.
    """
    chosen = list(image_shards(root) if shards is None else shards)
    found: list[Damage] = []
    for done, (shard, keys) in enumerate(each(_damaged, chosen, workers=workers), 1):
        found += [Damage(shard, key) for key in keys]
        progress("verifying shards of pictures", done, len(chosen))
    return sorted(found)


def _damaged(shard: ImageShard) -> list[str]:
    wanted = digests(shard)
    return sorted({*wanted} - {key for key, _ in whole(shard, wanted)})


def digests(shard: ImageShard) -> dict[str, str]:
    """Key → sha256 of each picture that the shard should have."""
    fates = shard.fates()
    ok = fates.filter(pc.equal(fates["fate"], "ok"))
    return dict(zip(ok["key"].to_pylist(), ok["sha256"].to_pylist(), strict=True))


def whole(shard: ImageShard, wanted: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """(key, bytes) of each wanted picture (key → sha256) that is not damaged, as the tar has them.

    The tar is read no further than the last of them, and as far as it can be.
    """
    left = dict(wanted)
    with suppress(OSError), shard.tar.open("rb", buffering=0) as file:
        for member in tars.members(file) if left else ():
            key = shard.key(member.name)
            if key not in left or member.name != shard.member(key):
                continue
            data = b""
            with suppress(OSError):  # of a bad block of the disk
                data = tars.read(file, member)
            if hashlib.sha256(data).hexdigest() == left[key]:
                del left[key]
                yield key, data
            if not left:
                return


def refuse_many(damaged: int, pictures: int, first: str, download: Path) -> None:
    """Let a few of so many pictures be damaged; `first` is the key of one.

    Raises:
        DamagedError: they are more than MOST_DAMAGED.
    """
    if damaged > max(1, MOST_DAMAGED * pictures):
        raise DamagedError(
            f"{damaged:,} of {pictures:,} pictures in {download} are not those that were "
            f"downloaded (first: key {first}): `python -m data download {download} --verify` "
            "fetches them again; then run this again"
        )
