"""Training shards → batches from a position: the order is a pure function of (seed, epoch, place).

Shapes: B batch, C channels (3), H = W side of the pictures.
"""

from __future__ import annotations

import io
import json
import tarfile
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image


class Batch(NamedTuple):
    """What this rank sees of one global batch."""

    images_BCHW: torch.Tensor
    """uint8."""
    captions: list[str]
    keys: list[str]
    planned_captions: list[str]
    """Of the whole global batch, in its order, whether the pictures turned out readable or not."""


@dataclass(frozen=True)
class _Sample:
    """Where one sample lies: `place` in the list of its shard, `size` bytes from `offset`."""

    shard: int
    place: int
    key: str
    caption: str
    tar: Path
    offset: int
    size: int


class CorruptShardsError(RuntimeError):
    """More unreadable pictures than chance explains."""


class _LostError(Exception):
    """A tar is not what it was when it was indexed: it is gone, or was cut short."""


class ShardLoader:
    """Batches of one folder of shards for one rank, without end and resumable at any position."""

    WINDOW = 4
    """Shards whose samples are mixed with each other, so that reading stays nearly sequential."""
    CORRUPT_SHARE = 0.01
    """Share of the samples that may be unreadable before it is an error (one always may)."""

    def __init__(
        self,
        shards: Path,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
        cache_mb: int = 512,
    ) -> None:
        """Index the tars below `shards`; `batch_size` is global, and the ranks share it.

        Decoded pictures are kept as uint8 until `cache_mb` megabytes are full.

        Raises:
            ValueError: a batch that ranks cannot share, or shards that are missing or cut short.
        """
        if batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size} over {world_size} ranks (this is rank {rank}): "
                "give a multiple of the number of ranks"
            )
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        index = _index(shards)
        self.resolution = int(index["resolution"])
        self._shards = [
            _read_tar(shards / entry["name"], entry, number)
            for number, entry in enumerate(index["shards"])
        ]
        self.num_samples = sum(len(samples) for samples in self._shards)
        if self.num_samples == 0:
            raise ValueError(f"{shards} holds no sample: run the filter stage again")
        self.corrupt: set[str] = set()
        """Keys of the pictures that could not be read, each replaced by its successor."""
        self._lost: set[Path] = set()
        """Tars that went away or were cut short since they were indexed."""
        self._memo: tuple[int, list[_Sample]] = (-1, [])
        self._pool = ThreadPoolExecutor(threads)
        self._lock = threading.Lock()
        self._cache: dict[str, np.ndarray] = {}
        self._room = cache_mb * 2**20

    def captions(self) -> list[str]:
        """Distinct captions, sorted."""
        return sorted({sample.caption for samples in self._shards for sample in samples})

    def batches(self, images_seen: int = 0) -> Iterator[Batch]:
        """Batches from the global position `images_seen` on; an epoch runs into the next.

        Each global batch takes the next `batch_size` samples of the order, and rank r the r-th
        part of them: whatever the number of ranks, together they see the same pictures.
        """
        local = self.batch_size // self.world_size
        own = slice(self.rank * local, (self.rank + 1) * local)
        position = images_seen
        while True:
            samples = [self._sample(position + i) for i in range(self.batch_size)]
            yield self._batch(samples[own], [sample.caption for sample in samples])
            position += self.batch_size

    def captions_between(self, start: int, stop: int) -> list[str]:
        """Captions at these global positions; no picture is read."""
        return [self._sample(position).caption for position in range(start, stop)]

    def _batch(self, samples: list[_Sample], planned_captions: list[str]) -> Batch:
        got = list(self._pool.map(self._load, samples))
        images_BHWC = np.stack([image for _, image in got])
        return Batch(
            torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).contiguous(),
            [sample.caption for sample, _ in got],
            [sample.key for sample, _ in got],
            planned_captions,
        )

    # The order ------------------------------------------------------------------------------

    def _sample(self, position: int) -> _Sample:
        epoch, place = divmod(position, self.num_samples)
        return self._order(epoch)[place]

    def _order(self, epoch: int) -> list[_Sample]:
        """Samples of an epoch: shards shuffled, then samples within windows of shards."""
        if self._memo[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            shuffled = [self._shards[i] for i in rng.permutation(len(self._shards))]
            order: list[_Sample] = []
            for start in range(0, len(shuffled), self.WINDOW):
                window = [s for shard in shuffled[start : start + self.WINDOW] for s in shard]
                order += [window[i] for i in rng.permutation(len(window))]
            self._memo = (epoch, order)
        return self._memo[1]

    # Pictures -------------------------------------------------------------------------------

    def _load(self, sample: _Sample) -> tuple[_Sample, np.ndarray]:
        """The sample with its picture [H, W, C]; the next readable one where it is corrupt."""
        own = self._shards[sample.shard]
        later = self._shards[sample.shard + 1 :] + self._shards[: sample.shard]
        for siblings in (own[sample.place :] + own[: sample.place], *later):
            for other in siblings:
                if (image := self._picture(other)) is not None:
                    return other, image
        raise CorruptShardsError(
            f"{sample.tar}: no readable picture in it, nor in any other: the shards are damaged, "
            "run the filter stage again"
        )

    def _picture(self, sample: _Sample) -> np.ndarray | None:
        image = self._cache.get(sample.key)
        if image is not None or sample.key in self.corrupt:
            return image
        try:
            image = _decoded(sample, self.resolution)
        except Exception as error:  # codecs raise anything on corrupt bytes
            self._note_corrupt(sample, error)
            return None
        with self._lock:
            if self._room >= image.nbytes:
                self._room -= image.nbytes
                self._cache[sample.key] = image
        return image

    def _note_corrupt(self, sample: _Sample, error: Exception) -> None:
        with self._lock:
            self.corrupt.add(sample.key)
            count, allowed = len(self.corrupt), max(1, self.CORRUPT_SHARE * self.num_samples)
            is_known = sample.tar in self._lost
            if isinstance(error, _LostError):
                self._lost.add(sample.tar)
        if isinstance(error, _LostError) and not is_known:  # not once per picture of the tar
            warnings.warn(f"{sample.tar}: {error}: others take its pictures' place", stacklevel=2)
        elif not is_known:
            warnings.warn(f"{sample.tar}: skipped {sample.key}.png: {error}", stacklevel=2)
        if count > allowed:
            raise CorruptShardsError(
                f"{count} of {self.num_samples} pictures are unreadable (last: {sample.key} of "
                f"{sample.tar}): the shards are damaged, run the filter stage again"
            )


def _index(shards: Path) -> dict:
    path = shards / "index.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): give a folder of one resolution that the filter "
            "stage has written, such as shards/032"
        ) from error


def _read_tar(path: Path, entry: dict, shard: int) -> list[_Sample]:
    """Where the samples of one tar lie, with their captions. Names never become paths."""
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        found = path.stat().st_size if path.is_file() else "no"
        raise ValueError(
            f"{path} has {found} bytes, its index says {entry['bytes']}: run the filter stage again"
        )
    pictures: dict[str, tuple[int, int]] = {}
    captions: dict[str, str] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            key, _, kind = member.name.rpartition(".")
            if kind == "png":
                pictures[key] = (member.offset_data, member.size)
            elif kind == "txt":
                file = archive.extractfile(member)
                captions[key] = file.read().decode() if file else ""
    return [
        _Sample(shard, place, key, captions[key], path, *pictures[key])
        for place, key in enumerate(pictures)
    ]


def _decoded(sample: _Sample, side: int) -> np.ndarray:
    """The picture as uint8 [H, W, C]."""
    try:
        with sample.tar.open("rb") as file:
            file.seek(sample.offset)
            data = file.read(sample.size)
    except OSError as error:
        raise _LostError(f"can no longer be read ({error.strerror})") from error
    if len(data) < sample.size:
        raise _LostError("was cut short since it was indexed")
    image_HWC = np.array(Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGB"))
    if image_HWC.shape != (side, side, 3):
        raise ValueError(f"is {image_HWC.shape}, not {side} px square")
    return image_HWC
