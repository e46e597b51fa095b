"""Where a download keeps its parts and shards, and how samples are keyed.

    OUT/lists/PPPPP.parquet                schema.LIST: the rows of one part, in their order
    OUT/images/PPPPP/SSSSS.tar             original bytes, members SSSSSIII.jpg whatever the codec
    OUT/images/PPPPP/SSSSS.parquet         what img2dataset says of each row
    OUT/images/PPPPP/SSSSS_stats.json      written last: the shard is done
    OUT/fates/PPPPP.parquet                schema.FATES: one row group a shard; the part is done

Beside them: `work/`, which holds what a running download needs and goes with it, and
`img2dataset.log`.

A key is PPPPPSSSSSIII: part, shard in the part, row in the shard. Keys ascend in the lists' order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.schema import with_label

PART_DIGITS = 5
SHARD_DIGITS = 5


def row_digits(rows_per_shard: int) -> int:
    """Digits of a row's number in its shard, as img2dataset counts them."""
    return len(str(rows_per_shard - 1)) if rows_per_shard > 1 else 0


@dataclass(frozen=True, order=True)
class ImageShard:
    """One shard of downloaded pictures: the unit of scoring."""

    root: Path
    """The download's folder."""
    part: int
    number: int
    """The shard's number in its part."""

    @property
    def name(self) -> str:
        """PPPPPSSSSS: what every key in it begins with."""
        return f"{self.part:0{PART_DIGITS}d}{self.number:0{SHARD_DIGITS}d}"

    @property
    def stem(self) -> Path:
        """Its path without suffix."""
        folder = self.root / "images" / f"{self.part:0{PART_DIGITS}d}"
        return folder / f"{self.number:0{SHARD_DIGITS}d}"

    @property
    def tar(self) -> Path:
        """The pictures."""
        return self.stem.with_suffix(".tar")

    def key(self, member: str) -> str:
        """Key of the sample whose tar member has this name."""
        return f"{self.part:0{PART_DIGITS}d}{member.partition('.')[0]}"

    def member(self, key: str) -> str:
        """Name of the tar member with this key's picture."""
        return f"{key[PART_DIGITS:]}.jpg"

    def fates(self) -> pa.Table:
        """Its rows of the fates: every URL of the shard that was asked for."""
        path = self.root / "fates" / f"{self.part:0{PART_DIGITS}d}.parquet"
        with pq.ParquetFile(path) as file:
            return with_label(file.read_row_group(self.number))


def image_shards(root: Path) -> Iterator[ImageShard]:
    """Every shard of a finished download, in the order of keys."""
    for path in sorted((root / "fates").glob("*.parquet")):
        for number in range(pq.read_metadata(path).num_row_groups):
            yield ImageShard(root, int(path.stem), number)


def shard_of(root: Path, key: str) -> ImageShard:
    """The shard that holds a key."""
    shard = key[PART_DIGITS : PART_DIGITS + SHARD_DIGITS]
    return ImageShard(root, int(key[:PART_DIGITS]), int(shard))
