"""Who we are among the training processes, and what they tell each other.

Shape letters: B batch, E embedding.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gigagan.training.transfer import place

COLLECTIVE_TIMEOUT_S = 600.0
CORES = "GIGAGAN_CORES"
"""Variable with the core of each of this machine's ranks, as in `0,3`, or `off`."""


@dataclass(frozen=True)
class World:
    """Who we are among the training processes. `World()` is a plain single process."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shares_memory: bool = False
    """Whether all ranks compute on the CPUs of one machine."""

    @property
    def is_main(self) -> bool:
        """True in the one process that prints, logs and saves."""
        return self.rank == 0

    def rows(self, num_rows: int) -> range:
        """This rank's contiguous part of that many rows.

        Raises:
            ValueError: they cannot be shared equally.
        """
        if num_rows % self.size:
            raise ValueError(
                f"{num_rows} rows cannot be shared equally by {self.size} ranks: make batch_size "
                "a multiple of the number of ranks"
            )
        share = num_rows // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def share(self, batch: Tensor) -> Tensor:
        """This rank's rows of a tensor drawn for the whole batch."""
        rows = self.rows(len(batch))
        return place(batch[rows.start : rows.stop], self.device)

    def gather_with_gradient(self, x_BE: Tensor) -> Tensor:
        """All ranks' rows in rank order (as many from each), of which only our own have gradient.

        For a loss that compares all rows of a batch: every rank computes the same loss from the
        result and the mean of gradients over ranks is then that of one process. Each rank holds
        1 / size of the gradient, so that of our own rows is multiplied by size.
        """
        if self.size == 1:
            return x_BE
        own_BE = x_BE.detach().contiguous()
        parts = [torch.empty_like(own_BE) for _ in range(self.size)]
        dist.all_gather(parts, own_BE)
        parts[self.rank] = _ScaleGradient.apply(x_BE, self.size)
        return torch.cat(parts)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; every rank must ask. Waits for the device."""
        if self.size == 1:
            return flag
        vote = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(vote, dist.ReduceOp.MAX)
        return bool(vote.item())

    def mean(self, x: Tensor) -> Tensor:
        """The mean over ranks, detached, still on the device."""
        if self.size == 1:
            return x.detach()
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / self.size

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Take leave of the group, if there is one."""
        if self.size > 1:
            dist.destroy_process_group()


def join(timeout_s: float = COLLECTIVE_TIMEOUT_S) -> World:
    """Join the group that torchrun described in the environment, if it did.

    A collective that another rank does not answer within `timeout_s` seconds ends this process
    with an error: a rank that hangs does not hold the others for ever. One that dies is noticed
    at once where the connection breaks with it. What rank 0 does alone (pictures, probes,
    checkpoints) must take less.

    Without GPUs each rank keeps to a core of its own where it computes with one thread and there
    are as many cores as ranks, or GIGAGAN_CORES names some; `GIGAGAN_CORES=off` leaves them all.

    Raises:
        ValueError: GIGAGAN_CORES does not name a core for each rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    has_cuda = torch.cuda.is_available()
    if size == 1:
        return World(device=torch.device("cuda" if has_cuda else "cpu"))
    device, num_local = torch.device("cpu"), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if has_cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    elif num_local and torch.get_num_threads() == 1:
        _keep_to_core(int(os.environ["LOCAL_RANK"]), num_local)  # before threads are started
    dist.init_process_group(
        "nccl" if has_cuda else "gloo",
        timeout=timedelta(seconds=timeout_s),
        device_id=device if has_cuda else None,  # the communicator is made now, not in a step
    )
    return World(dist.get_rank(), size, device, shares_memory=not has_cuda and num_local == size)


def _keep_to_core(rank: int, num_ranks: int) -> None:
    """Pin the rank of this number on its machine, and the threads that it will start."""
    asked, allowed = os.environ.get(CORES, ""), sorted(os.sched_getaffinity(0))
    if asked == "off":
        return
    if asked:
        cores = [int(core) if core.strip().isdecimal() else -1 for core in asked.split(",")]
        if len(cores) != num_ranks or not {*cores} <= {*allowed}:
            raise ValueError(
                f"{CORES}={asked} does not name a core for each of {num_ranks} ranks: give as many "
                f"numbers, divided by commas, out of {','.join(map(str, allowed))}, or `off`"
            )
        os.sched_setaffinity(0, {cores[rank]})
    elif len(allowed) == num_ranks:
        os.sched_setaffinity(0, {allowed[rank]})


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a number: the values are not rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        """A view of x."""
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Times scale."""
        return gradient * ctx.scale, None
