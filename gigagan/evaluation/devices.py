"""Several devices: equal workers, one on each, that take pieces of work in turns."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

Device = torch.device | str
Member = TypeVar("Member")
Piece = TypeVar("Piece")
Result = TypeVar("Result")


def parse(names: str) -> tuple[str, ...]:
    """`cpu`, `cuda:1`, `cuda:0,cuda:3`, or `cuda`: every one there is.

    Raises ValueError for a name that torch does not know, or a device that is not there.
    """
    given = [name.strip() for name in names.split(",")]
    found: list[str] = []
    for name in given:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError(f"{name!r} is no device: give cpu, cuda or cuda:NUMBER") from None
        count = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= count:
            raise ValueError(f"{name!r} is not there: torch sees {count} CUDA devices")
        is_all = device.type == "cuda" and device.index is None
        found += [f"cuda:{i}" for i in range(count)] if is_all else [name]
    return tuple(found)


class Team(Generic[Member]):
    """The same thing on several devices; whoever asks gets one that is free, or waits."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.size = len(members)
        self._free: queue.SimpleQueue[Member] = queue.SimpleQueue()
        for member in members:
            self._free.put(member)

    @contextmanager
    def one(self) -> Iterator[Member]:
        """A free one, for the length of a block."""
        member = self._free.get()
        try:
            yield member
        finally:
            self._free.put(member)


def deal(work: Callable[[Piece], Result], pieces: Iterable[Piece], lanes: int) -> Iterator[Result]:
    """`work` of every piece in order, `lanes` of them at a time in threads, none far ahead."""
    with ThreadPoolExecutor(lanes) as pool:
        under_way: deque[Future[Result]] = deque()
        try:
            for piece in pieces:
                if len(under_way) == lanes:
                    yield under_way.popleft().result()
                under_way.append(pool.submit(work, piece))
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()
