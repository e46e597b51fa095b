"""Training shards → batches from a position: the order is a pure function of (seed, epoch, place).

Shapes: B batch, C channels (3), H = W side of the pictures.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from data.shards.cache import Folder, LostError, RemoteError, folder
from data.shards.manifest import (
    AGAIN,
    INDEX,
    Entry,
    ManifestError,
    Sidecar,
    Text,
    parse_index,
    parse_sidecar,
)
from data.shards.order import Order, Recent, Window

os.environ.setdefault("WDS_SECURE", "1")  # for whoever reads our shards with webdataset

DECODERS = {"png": PngImageFile, "jpg": JpegImageFile}
"""The only decoders that ever see a training picture, by codec."""
SMALL = 128
"""Side in px up to which numpy takes colours apart faster than Pillow does."""


class Batch(NamedTuple):
    """What this rank sees of one global batch."""

    images_BCHW: torch.Tensor
    """uint8."""
    captions: list[str]
    keys: list[str]
    planned_captions: list[str]
    """Of the whole global batch, in its order, whether the pictures turned out readable or not."""


class _Sample(NamedTuple):
    """One sample: number of its shard, and place in it."""

    shard: int
    place: int


class _Planned(NamedTuple):
    """A batch that is being decoded."""

    images_BCHW: np.ndarray
    parts: list[Future[list[_Sample]]]
    """The samples whose pictures it shows, a few a task."""
    planned_captions: list[str]


class CorruptShardsError(RuntimeError):
    """More unreadable pictures than chance explains."""


class _Tars:
    """Tars that one thread has open for a moment: not longer, so that one that goes is noticed."""

    def __init__(self, where: Folder, shards: Sequence[Entry]) -> None:
        self._folder, self._shards = where, shards
        self._open: dict[int, int] = {}
        self._ready: dict[_Sample, bytes] = {}

    def __enter__(self) -> _Tars:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def prepare(self, sample: _Sample, sidecar: Sidecar) -> None:
        """Read what will be asked for soon; who asks will meet the errors."""
        with suppress(LostError, ValueError):
            self._ready[sample] = self.read(sample, sidecar)

    def read(self, sample: _Sample, sidecar: Sidecar) -> bytes:
        """The bytes of one picture, as they were written.

        Raises:
            LostError: the tar is gone or cut short.
            ValueError: they are others.
        """
        if sample in self._ready:
            return self._ready.pop(sample)
        shard, place = sample
        if shard not in self._open:
            self._open[shard] = self._folder.open(self._shards[shard])
        size = int(sidecar.sizes[place])
        try:
            data = os.pread(self._open[shard], size, int(sidecar.offsets[place]))
        except OSError as error:
            raise LostError(f"can no longer be read ({error.strerror})") from error
        if len(data) < size:
            raise LostError("was cut short since it was indexed")
        if hashlib.sha256(data).hexdigest() != sidecar.sha256(place):
            raise ValueError("its bytes are not those that were written")
        return data


class ShardLoader:
    """Batches of one folder of shards for one rank, without end and resumable at any position."""

    WINDOW = 4
    """Shards whose samples are mixed with each other, so that reading stays nearly sequential."""
    CORRUPT_SHARE = 0.01
    """Share of the samples that may be unreadable before it is an error (one always may)."""
    AHEAD = 2
    """Batches that are decoded before they are asked for."""
    TASK = 16
    """Pictures that one thread decodes at a time."""

    def __init__(
        self,
        shards: Path | str,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
        cache_mb: int = 512,
        cache_dir: Path | None = None,
        cache_gb: float = 50.0,
        reads: Text = "caption",
    ) -> None:
        """Read the index of `shards`; `batch_size` is global, and the ranks share it.

        Decoded pictures are kept as uint8 until `cache_mb` megabytes are full. `shards` may be a
        URL that fsspec reads: its files are brought to `cache_dir` (default: cache.default_cache)
        some time before they are needed, and the oldest are deleted beyond `cache_gb`. With `reads`
        "label", all that is called a caption here is the sample's label: the name of its class.

        Raises:
            ValueError: a batch that ranks cannot share, shards that are missing or cut short, or
                labels that some samples lack.
            RemoteError: a store that does not answer; also later, of tars.
        """
        if batch_size < 1 or batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size} over {world_size} ranks (this is rank {rank}): "
                "give a multiple of the number of ranks"
            )
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self._folder = folder(shards, cache_dir, cache_gb)
        index = parse_index(self._folder.index(), self._folder.place(INDEX))
        if index.samples == 0:
            raise ManifestError(f"{shards} holds no sample: {AGAIN}")
        if reads == "label" and index.unlabelled:
            raise ManifestError(
                f"{shards}: {index.unlabelled:,} of {index.samples:,} samples have no label, and "
                "labels are what is to be read: filter with filter.labels set to require, from "
                "lists whose column of labels is known (download.columns.label)"
            )
        self.classes, self._reads = index.classes, reads
        self.resolution, self.num_samples = index.resolution, index.samples
        self._codec, self._shards = index.codec, index.shards
        self._folder.check(self._shards)
        self._order = Order([e.samples for e in self._shards], seed=seed, window=self.WINDOW)
        self._sidecar = Recent(self._read_sidecar, 4 * self.WINDOW)
        self._window: Window | None = None
        self.corrupt: set[str] = set()
        """Keys of the pictures that could not be read, each replaced by its successor."""
        self._lost: set[int] = set()
        """Shards whose tars went away or were cut short since they were indexed."""
        self._pool = ThreadPoolExecutor(threads, "decode")
        self._threads = threads
        self._lock = threading.Lock()
        self._cache: dict[_Sample, np.ndarray] = {}
        self._room = cache_mb * 2**20

    def captions(self, limit: int | None = None) -> list[str] | None:
        """Distinct captions, sorted; None if there are more samples than `limit`. Labels are known
        from the index, and so always told."""
        if self._reads == "label":
            return list(self.classes)
        if limit is not None and self.num_samples > limit:
            return None
        sidecars = map(self._sidecar, range(len(self._shards)))
        return sorted({caption for sidecar in sidecars for caption in sidecar.captions()})

    def captions_between(self, start: int, stop: int) -> list[str]:
        """Captions at these global positions; no picture is read."""
        places = self._order.places(start, stop)
        return [self._sidecar(shard).caption(place) for shard, place in places]

    def batches(self, images_seen: int = 0) -> Iterator[Batch]:
        """Batches from the global position `images_seen` on; an epoch runs into the next.

        Each global batch takes the next `batch_size` samples of the order, and rank r the r-th
        part of them: whatever the number of ranks, together they see the same pictures.
        """
        ahead: deque[_Planned] = deque()
        position = images_seen
        try:
            while True:
                while len(ahead) <= self.AHEAD:
                    ahead.append(self._begin(position))
                    position += self.batch_size
                yield self._finish(ahead.popleft())
        finally:
            tasks = [task for planned in ahead for task in planned.parts]
            wait([task for task in tasks if not task.cancel()])

    # Batches --------------------------------------------------------------------------------

    def _begin(self, position: int) -> _Planned:
        """Let the threads decode this rank's part of the global batch at a position."""
        self._look_ahead(position)
        stop = position + self.batch_size
        samples = [_Sample(*place) for place in self._order.places(position, stop)]
        planned = [self._sidecar(shard).caption(place) for shard, place in samples]
        local = self.batch_size // self.world_size
        own = samples[self.rank * local : (self.rank + 1) * local]
        images_BCHW = np.empty((local, 3, self.resolution, self.resolution), np.uint8)
        size = min(self.TASK, -(-local // self._threads))
        parts = [
            self._pool.submit(self._fill, images_BCHW[i : i + size], own[i : i + size])
            for i in range(0, local, size)
        ]
        return _Planned(images_BCHW, parts, planned)

    def _finish(self, planned: _Planned) -> Batch:
        samples = [sample for part in planned.parts for sample in part.result()]
        sidecars = [(self._sidecar(shard), place) for shard, place in samples]
        return Batch(
            torch.from_numpy(planned.images_BCHW),
            [sidecar.caption(place) for sidecar, place in sidecars],
            [sidecar.key(place) for sidecar, place in sidecars],
            planned.planned_captions,
        )

    def _look_ahead(self, position: int) -> None:
        """On entering a window, say which shards it and the next one are made of."""
        if self._window is None or not self._window.start <= position < self._window.stop:
            self._window = self._order.window(position)
            following = self._order.window(self._window.stop)
            shards = dict.fromkeys(self._window.shards + following.shards)
            self._folder.expect([self._shards[shard] for shard in shards])

    def _read_sidecar(self, shard: int) -> Sidecar:
        entry = self._shards[shard]
        data = self._folder.sidecar(entry)
        place = self._folder.place(entry.sidecar)
        sidecar = parse_sidecar(data, entry, place, self._reads)
        if self._reads == "label" and (strange := {*sidecar.captions()} - {*self.classes}):
            raise ManifestError(f"{place}: label {min(strange)!r} is not in its index: {AGAIN}")
        return sidecar

    # Pictures -------------------------------------------------------------------------------

    def _fill(self, images_BCHW: np.ndarray, samples: list[_Sample]) -> list[_Sample]:
        """Decode into the array; returns the samples that are really there."""
        with _Tars(self._folder, self._shards) as tars:
            for sample in samples:  # first read, then decode: taking turns costs a tenth more
                if sample not in self._cache:
                    tars.prepare(sample, self._sidecar(sample.shard))
            return [
                self._load(image_CHW, sample, tars)
                for image_CHW, sample in zip(images_BCHW, samples, strict=True)
            ]

    def _load(self, image_CHW: np.ndarray, sample: _Sample, tars: _Tars) -> _Sample:
        """Decode a sample, or the next readable one where it is corrupt; returns which."""
        for candidate in self._successors(sample):
            if self._picture(image_CHW, candidate, tars):
                return candidate
        entry = self._shards[sample.shard]
        raise CorruptShardsError(
            f"{self._folder.place(entry.name)}: no readable picture in it, nor in any other: the "
            f"shards are damaged, {AGAIN}"
        )

    def _successors(self, sample: _Sample) -> Iterator[_Sample]:
        """The sample, all others of its shard, and those of the shards after it."""
        count = len(self._shards)
        for shard in ((sample.shard + i) % count for i in range(count)):
            begin, size = (sample.place, 0)[shard != sample.shard], self._shards[shard].samples
            for i in range(size):
                yield _Sample(shard, (begin + i) % size)

    def _picture(self, image_CHW: np.ndarray, sample: _Sample, tars: _Tars) -> bool:
        """Whether the picture is readable, and then it is in the array."""
        cached = self._cache.get(sample)
        if cached is not None:
            image_CHW[:] = cached
            return True
        sidecar = self._sidecar(sample.shard)
        if self.corrupt and sidecar.key(sample.place) in self.corrupt:
            return False
        try:
            decode_into(image_CHW, tars.read(sample, sidecar), self._codec)
        except RemoteError:
            raise
        except Exception as error:  # codecs raise anything on corrupt bytes
            self._note_corrupt(sample, sidecar, error)
            return False
        self._remember(sample, image_CHW)
        return True

    def _remember(self, sample: _Sample, image_CHW: np.ndarray) -> None:
        with self._lock:
            if self._room < image_CHW.nbytes or sample in self._cache:
                return
            self._room -= image_CHW.nbytes
            self._cache[sample] = image_CHW.copy()

    def _note_corrupt(self, sample: _Sample, sidecar: Sidecar, error: Exception) -> None:
        key, tar = sidecar.key(sample.place), self._folder.place(self._shards[sample.shard].name)
        with self._lock:
            self.corrupt.add(key)
            count, allowed = len(self.corrupt), max(1, self.CORRUPT_SHARE * self.num_samples)
            is_known = sample.shard in self._lost
            if isinstance(error, LostError):
                self._lost.add(sample.shard)
        if isinstance(error, LostError) and not is_known:  # not once per picture of the tar
            warnings.warn(f"{tar}: {error}: others take its pictures' place", stacklevel=2)
        elif not is_known:
            warnings.warn(f"{tar}: skipped {key}.{self._codec}: {error}", stacklevel=2)
        if count > allowed:
            raise CorruptShardsError(
                f"{count} of {self.num_samples} pictures are unreadable (last: {key} of {tar}): "
                f"the shards are damaged, {AGAIN}"
            )


def decode_into(image_CHW: np.ndarray, data: bytes, codec: str) -> None:
    """Decode a training picture into an array of its size. Nothing but its codec's decoder runs.

    Raises:
        ValueError: of another size. Pillow's errors where it is broken.
    """
    _, H, W = image_CHW.shape
    image: Image.Image = DECODERS[codec](io.BytesIO(data))
    if image.size != (W, H):  # before a pixel of it is decoded
        raise ValueError(f"is {image.width}×{image.height}, not {W} px square")
    if image.mode != "RGB":
        image = image.convert("RGB")
    if SMALL >= W:
        image_CHW[:] = np.asarray(image).transpose(2, 0, 1)
        return
    for channel_HW, band in zip(image_CHW, "RGB", strict=True):
        channel_HW[:] = np.frombuffer(image.tobytes("raw", band), np.uint8).reshape(H, W)
