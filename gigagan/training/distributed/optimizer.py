"""AdamW, whole on every rank or with its state divided over them.

Shape letters: N parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gigagan.training.distributed.reducer import BUCKET_MB, batched
from gigagan.training.distributed.world import World

_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(
    groups: Sequence[Mapping[str, Any]],
    world: World,
    *,
    lr: float,
    betas: tuple[float, float],
    shard: bool = False,
) -> torch.optim.Optimizer:
    """Fused AdamW; with `shard` each rank keeps the state of its part of the parameters only.

    To skip a step where gradients are not finite, set the attribute `found_inf` to a float32
    tensor on the device (1 to skip) before `step`, as `torch.amp.GradScaler` does.
    """
    # The fused step is one pass over each parameter instead of ten.
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "fused": True}
    if shard and world.size > 1:
        return ShardedAdamW(groups, world, **settings)
    optimizer = torch.optim.AdamW([dict(group) for group in groups], **settings)
    optimizer.register_load_state_dict_post_hook(_match_layout)
    return optimizer


def consolidate(*optimizers: torch.optim.Optimizer) -> None:
    """Bring divided optimizer state to rank 0 before it asks for a `state_dict`.

    Every rank must call this; it does nothing to optimizers that are not divided.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, ShardedAdamW):
            optimizer.consolidate()


class ShardedAdamW(torch.optim.Optimizer):
    """AdamW that keeps on each rank the moments of its own part of the parameters (ZeRO, stage 1).

    Every rank has all weights and mean gradients; it updates its own parameters and sends them to
    the others. Parameters are not split, so the result is AdamW's to the bit, and the largest
    parameter bounds how evenly the state is divided. Checkpoints have AdamW's own format, for any
    number of ranks and also for undivided runs.

    torch's ZeroRedundancyOptimizer does not serve: after loading it has the own state twice, and
    the step counters on the CPU, which the fused step on a GPU refuses.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], world: World, **settings: Any) -> None:
        whole = torch.optim.AdamW([dict(group) for group in groups], **settings)
        super().__init__(whole.param_groups, whole.defaults)
        self._world = world
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        self._owner = _owners(self._parameters, world.size)
        self._index = {p: i for i, p in enumerate(self._parameters)}
        self._inner = torch.optim.AdamW(
            [
                {**group, "params": [p for p in group["params"] if self._owner[p] == world.rank]}
                for group in self.param_groups
            ]
        )
        self._inner.register_load_state_dict_post_hook(_match_layout)
        self._whole_state: dict[str, Any] | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update our own parameters and exchange them."""
        self._settings_to(self._inner.param_groups)
        for name in ("grad_scale", "found_inf"):  # where the fused step looks for them
            setattr(self._inner, name, getattr(self, name, None))
        self._inner.step()
        for rank in range(self._world.size):
            own = (p for p in self._parameters if self._owner[p] == rank)
            for parameters in batched(own, BUCKET_MB):
                _broadcast(parameters, rank, self._world.rank)

    @torch.no_grad()
    def consolidate(self) -> None:
        """Bring all state to rank 0, in main memory; every rank must call it."""
        rank, device = self._world.rank, self._world.device
        # Never updated parameters have no state: every rank learns which.
        steps_N = torch.full((len(self._parameters),), -1.0, device=device)
        for p, state in self._inner.state.items():
            steps_N[self._index[p]] = state["step"]
        dist.all_reduce(steps_N, dist.ReduceOp.MAX)
        found: dict[int, dict[str, Tensor]] = {}
        for i, (p, step) in enumerate(zip(self._parameters, steps_N.tolist(), strict=True)):
            if step < 0 or rank not in (0, self._owner[p]):
                continue
            moments = {name: self._to_main(p, name) for name in _MOMENTS}
            if rank == 0:
                found[i] = {"step": torch.tensor(step), **moments}
        groups = self._inner.state_dict()["param_groups"]
        self._settings_to(groups)
        for packed, group in zip(groups, self.param_groups, strict=True):
            packed["params"] = [self._index[p] for p in group["params"]]
        self._whole_state = {"state": found, "param_groups": groups} if rank == 0 else None

    def state_dict(self) -> dict[str, Any]:
        """The consolidated state, once, on rank 0: it would be stale after another step.

        Raises:
            RuntimeError: `consolidate` was not called on all ranks just before.
        """
        if self._whole_state is None:
            raise RuntimeError(
                "optimizer state is divided over ranks: call consolidate() on every rank before "
                "state_dict() on rank 0"
            )
        state, self._whole_state = self._whole_state, None
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take our part of a whole AdamW state, which every rank is given.

        Raises:
            ValueError: it has other groups of parameters.
        """
        saved = state_dict["param_groups"]
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("optimizer state has other groups of parameters than the optimizer")
        saved_index = [i for group in saved for i in group["params"]]
        of_parameter = dict(zip(self._parameters, saved_index, strict=True))
        own_groups = [
            {**theirs, "params": [of_parameter[p] for p in own["params"]]}
            for theirs, own in zip(saved, self._inner.param_groups, strict=True)
        ]
        own_state = {
            i: state_dict["state"][i]
            for group in own_groups
            for i in group["params"]
            if i in state_dict["state"]
        }
        self._inner.load_state_dict({"state": own_state, "param_groups": own_groups})
        for group, theirs in zip(self.param_groups, saved, strict=True):
            group.update({key: value for key, value in theirs.items() if key != "params"})

    def _settings_to(self, groups: Iterable[dict[str, Any]]) -> None:
        """What the caller set on our groups (the learning rate of a step, say), on others."""
        for own, other in zip(self.param_groups, groups, strict=True):
            other.update({key: value for key, value in own.items() if key != "params"})

    def _to_main(self, p: nn.Parameter, name: str) -> Tensor:
        """One moment of one parameter, sent by its owner and received by rank 0."""
        if self._owner[p] == self._world.rank:
            moment: Tensor = self._inner.state[p][name]
            if self._world.rank > 0:
                dist.send(moment.contiguous(), dst=0)
        else:
            moment = torch.empty_like(p, memory_format=torch.contiguous_format)
            dist.recv(moment, src=self._owner[p])
        # A copy: steps may follow before the state is written.
        return moment.to("cpu", copy=True) if self._world.rank == 0 else moment


def _owners(parameters: Sequence[nn.Parameter], num_ranks: int) -> dict[nn.Parameter, int]:
    """Which rank updates which parameter: the largest first, each to whoever has least."""
    load = [0] * num_ranks
    owner: dict[nn.Parameter, int] = {}
    for p in sorted(parameters, key=torch.numel, reverse=True):
        owner[p] = load.index(min(load))
        load[owner[p]] += p.numel()
    return owner


def _broadcast(parameters: Sequence[nn.Parameter], source: int, rank: int) -> None:
    """Give the others one rank's parameters, in one message."""
    sizes = [p.numel() for p in parameters]
    if rank == source:
        flat = torch.cat([p.detach().flatten() for p in parameters])
    else:
        flat = parameters[0].new_empty(sum(sizes))
    dist.broadcast(flat, src=source)
    if rank != source:
        for p, piece in zip(parameters, flat.split(sizes), strict=True):
            p.copy_(piece.view(p.shape))


def _match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Let loaded moments lie in memory as their parameters do.

    A checkpoint keeps the layout of the run that wrote it; the fused step needs that of this run
    (on CPUs it would mix up elements without a word).
    """
    for p, state in optimizer.state.items():
        for name in _MOMENTS:
            if name in state and state[name].stride() != p.stride():
                state[name] = torch.empty_like(p).copy_(state[name])
