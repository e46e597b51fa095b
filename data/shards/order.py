"""The order of training: a pure function of (seed, epoch, position), worked out window by window.

Shards are shuffled, and then samples within windows of some shards, so that reading stays nearly
sequential. Only the shards' sizes are known here, and no list is as long as an epoch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """What was made of the last few keys; for any thread."""

    def __init__(self, make: Callable[[Key], Value], size: int) -> None:
        self._make, self._size = make, size
        self._known: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, key: Key) -> Value:
        """Made now, or remembered."""
        with self._lock:
            if key not in self._known:
                self._known[key] = self._make(key)
                if len(self._known) > self._size:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
            return self._known[key]


class Window(NamedTuple):
    """Shards whose samples are mixed: what positions [start, stop) are taken from."""

    start: int
    stop: int
    epoch: int
    number: int
    """The window's number in its epoch."""
    shards: tuple[int, ...]


class Order:
    """Which sample stands at a position, for ever: epoch e is positions [e·N, (e+1)·N)."""

    def __init__(self, sizes: Sequence[int], *, seed: int, window: int) -> None:
        """`sizes` are samples per shard, in the order of the index; `window` counts shards."""
        self._sizes = np.asarray(sizes, np.int64)
        self._seed, self._window = seed, window
        self.num_samples = int(self._sizes.sum())
        self._shuffled = Recent(self._shuffle, 2)
        self._mixed = Recent(self._mix, 4)

    def window(self, position: int) -> Window:
        """The window that a position lies in."""
        epoch, place = divmod(position, self.num_samples)
        shards, ends = self._shuffled(epoch)
        number = int(np.searchsorted(ends, place, side="right"))
        first = number * self._window
        begin, base = int(ends[number - 1]) if number else 0, epoch * self.num_samples
        members = tuple(shards[first : first + self._window].tolist())
        return Window(base + begin, base + int(ends[number]), epoch, number, members)

    def places(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(shard, place in it) of the samples at positions [start, stop)."""
        while start < stop:
            window = self.window(start)
            end = min(stop, window.stop)
            shards, places = self._mixed(window)
            part = slice(start - window.start, end - window.start)
            yield from zip(shards[part].tolist(), places[part].tolist(), strict=True)
            start = end

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards of an epoch in their order, and where in it each window ends."""
        shards = np.random.default_rng([self._seed, epoch]).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[shards])
        last = np.append(ends[self._window - 1 :: self._window], ends[-1:])
        return shards, np.unique(last)  # the last window may be whole, and so named twice

    def _mix(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Shard and place of each sample of a window, in their order."""
        members = np.array(window.shards)
        sizes = self._sizes[members]
        # Numbered from 1: a seed sequence ends in zeros, so that 0 would repeat the shards' draw.
        rng = np.random.default_rng([self._seed, window.epoch, window.number + 1])
        mixed = rng.permutation(int(sizes.sum()))
        ends = np.cumsum(sizes)
        which = np.searchsorted(ends, mixed, side="right")
        return members[which], mixed - (ends - sizes)[which]
