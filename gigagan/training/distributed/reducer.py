"""Means of gradients over ranks, sent in buckets while the last backward still runs.

Shape letters: N parameters.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gigagan.training.distributed.world import World

BUCKET_MB = 25.0
SHARED_MB = 256.0
"""Gradients of networks beyond that do not go through shared memory, of which they would need
twice as much on every rank."""


class _Bucket:
    """Parameters whose gradients travel together, as views of one flat buffer.

    `shared`, where all ranks see the same memory: turn, rank, N. Through it a mean takes about
    half the processor time of a network's loopback. Rows are used in turns: when every rank has
    said that its row of one turn is complete, every rank has read those of the turn before.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], world: World, *, shares: bool) -> None:
        self.parameters = parameters
        self.num_missing = len(parameters)
        # Each begins at 16 bytes, or kernels that read four numbers at once cannot.
        self._sizes = [math.ceil(p.numel() / 4) * 4 for p in parameters]
        self._length = math.ceil((sum(self._sizes) + len(parameters)) / 16) * 16
        self._shared = _shared(world, 2, self._length, parameters[0].dtype) if shares else None
        self._rank, self._turn = world.rank, 0
        self._flat: Tensor | None = None
        self._mean: Tensor | None = None
        self._work: dist.Work | None = None
        self._without: list[int] = []

    @torch.no_grad()
    def launch(self) -> None:
        """Move the gradients into one buffer and begin to sum it over ranks.

        From here on each `.grad` is a view of the buffer: nothing is copied back, and the
        gradients are in memory twice for one bucket at a time only. Last in the buffer is, for
        each parameter, on how many ranks it has a gradient.
        """
        if self._shared is None:
            flat = self.parameters[0].new_empty(self._length)
        else:
            self._turn = 1 - self._turn
            flat = self._shared[self._turn, self._rank]
        flat[sum(self._sizes) :] = 1
        self._without = [i for i, p in enumerate(self.parameters) if p.grad is None]
        for i, piece in enumerate(self._pieces(flat)):
            p = self.parameters[i]
            if p.grad is None:
                piece.zero_()
                flat[sum(self._sizes) + i] = 0
            else:
                piece.copy_(p.grad)
            p.grad = piece
        self._flat = flat
        told = flat if self._shared is None else flat.new_zeros(1)
        self._work = dist.all_reduce(told, async_op=True)

    def finish(self, num_ranks: int) -> None:
        """Wait for the sum and make a mean of it."""
        assert self._flat is not None
        assert self._work is not None
        self._work.wait()
        mean = self._flat
        if self._shared is not None:
            mean = self._mean = torch.empty_like(mean) if self._mean is None else self._mean
            rows = self._shared[self._turn]
            torch.add(rows[0], rows[1], out=mean)
            for row in rows[2:]:
                mean += row
            for p, piece in zip(self.parameters, self._pieces(mean), strict=True):
                p.grad = piece
        mean /= num_ranks
        if self._without:  # reading waits for the device: only where there is something to ask
            flags = mean[sum(self._sizes) :].tolist()
            for i in self._without:
                if flags[i] == 0:
                    self.parameters[i].grad = None
        self.forget()

    def forget(self) -> None:
        """Be ready for the next step."""
        self.num_missing = len(self.parameters)
        self._flat = self._work = None

    def _pieces(self, flat: Tensor) -> Iterator[Tensor]:
        """The parts of a buffer, each as its parameter lies in memory: fused optimizers want it."""
        start = 0
        for p, size in zip(self.parameters, self._sizes, strict=True):
            yield flat.as_strided(p.shape, p.stride(), flat.storage_offset() + start)
            start += size


def _shared(world: World, num_turns: int, length: int, dtype: torch.dtype) -> Tensor | None:
    """Memory that every rank maps: turn, rank, N. None where the system does not let us.

    It has no name, so that nothing is left of it, and is not bounded as /dev/shm often is.
    """
    own, where = -1, [""]
    if world.is_main:
        with contextlib.suppress(OSError, AttributeError):  # not every system has it
            own = os.memfd_create("gradients")
            where = [f"/proc/{os.getpid()}/fd/{own}"]
    dist.broadcast_object_list(where)
    found: Tensor | None = None
    with contextlib.suppress(OSError, RuntimeError):
        size = num_turns * world.size * length
        found = torch.from_file(where[0], shared=True, size=size, dtype=dtype)
    is_refused = world.any(found is None)
    if own >= 0:
        os.close(own)
    return None if is_refused or found is None else found.view(num_turns, world.size, length)


class GradientReducer:
    """Averages the gradients of networks over ranks while the last backward still runs.

    Buckets hold parameters in reverse order of registration, about the order in which gradients
    become ready, and are sent in that order on every rank, each as soon as it and those before it
    are full. A parameter without gradient on this rank takes part with zeros; where no rank has
    one there is none afterwards either, as in one process: AdamW leaves such a parameter alone.
    Parameters that do not require gradients when this is made never take part; freezing the others
    for a while is harmless.
    """

    def __init__(self, world: World, *modules: nn.Module, bucket_mb: float = BUCKET_MB) -> None:
        self._world = world
        self._buckets: list[_Bucket] = []
        self._ready: set[nn.Parameter] = set()
        self._num_launched = 0
        self._is_armed = False
        if world.size == 1:
            return
        unique = dict.fromkeys(p for m in modules for p in m.parameters() if p.requires_grad)
        mb = sum(p.nbytes for p in unique) / 1e6
        shares = world.shares_memory and mb <= SHARED_MB
        for parameters in batched(reversed(unique), bucket_mb):
            bucket = _Bucket(parameters, world, shares=shares)
            self._buckets.append(bucket)
            for p in parameters:
                p.register_post_accumulate_grad_hook(lambda p, b=bucket: self._take(p, b))

    def arm(self) -> None:
        """The next backward is the last of the step; what earlier ones accumulated is included."""
        self._reset()
        self._is_armed = True

    def finish(self) -> None:
        """Send what is not on its way, and wait until every gradient is the mean over ranks."""
        self._is_armed = False
        for bucket in self._buckets[self._num_launched :]:
            bucket.launch()
        for bucket in self._buckets:
            bucket.finish(self._world.size)
        self._reset()

    def _take(self, parameter: nn.Parameter, bucket: _Bucket) -> None:
        """A gradient has been accumulated."""
        if not self._is_armed:
            return
        if parameter in self._ready:
            raise RuntimeError(
                "a second backward after arm(): the gradients of the first may be on their way "
                "already; call all but the last backward before"
            )
        self._ready.add(parameter)
        bucket.num_missing -= 1
        # In the same order on every rank, or ranks would add up different buckets.
        while self._num_launched < len(self._buckets):
            following = self._buckets[self._num_launched]
            if following.num_missing:
                break
            following.launch()
            self._num_launched += 1

    def _reset(self) -> None:
        self._is_armed = False
        self._ready.clear()
        self._num_launched = 0
        for bucket in self._buckets:
            bucket.forget()


def batched(parameters: Iterable[nn.Parameter], mb: float) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one type, a batch at most `mb` megabytes unless it is only one."""
    batch: list[nn.Parameter] = []
    for p in parameters:
        num_bytes = sum(q.nbytes for q in batch) + p.nbytes
        if batch and (num_bytes > mb * 1e6 or p.dtype != batch[0].dtype):
            yield batch
            batch = []
        batch.append(p)
    if batch:
        yield batch
