"""The only module that talks to torch.distributed. Everything else takes a `World`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """Who we are among the training processes. `World()` is a plain single process."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True in the one process that prints, logs and saves."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This rank's part of a tensor drawn for the whole batch: every size-th row."""
        return batch[self.rank :: self.size].to(self.device)

    def mean_gradients(self, *modules: nn.Module) -> None:
        """Average gradients over processes with one collective, after backward.

        Parameters without a gradient take part with zeros, so that every rank sends as much.
        """
        if self.size == 1:
            return
        parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        )
        dist.all_reduce(flat)
        flat /= self.size
        sizes = [p.numel() for p in parameters]
        for parameter, piece in zip(parameters, flat.split(sizes), strict=True):
            parameter.grad = piece.view_as(parameter).clone()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Take leave of the group, if there is one."""
        if self.size > 1:
            dist.destroy_process_group()


def join() -> World:
    """Join the group that torchrun described in the environment, if it did."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    has_cuda = torch.cuda.is_available()
    if size == 1:
        return World(device=torch.device("cuda" if has_cuda else "cpu"))
    dist.init_process_group("nccl" if has_cuda else "gloo")
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if has_cuda else torch.device("cpu")
    return World(rank=dist.get_rank(), size=size, device=device)
