"""The only module that talks to torch.distributed. Everything else takes a `World`.

Networks stay plain modules: gradients are averaged, and optimizer state divided, from outside.

Shape letters: B batch, E embedding, N parameters.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gigagan.training.transfer import place

BUCKET_MB = 25.0
SHARED_MB = 256.0
"""Gradients of networks beyond that do not go through shared memory, of which they would need
twice as much on every rank."""
COLLECTIVE_TIMEOUT_S = 600.0
CORES = "GIGAGAN_CORES"
"""Variable with the core of each of this machine's ranks, as in `0,3`, or `off`."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


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

    def mean_gradients(self, *modules: nn.Module) -> None:
        """Average gradients over ranks after backward, without overlap."""
        GradientReducer(self, *modules, overlaps=False).finish()

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

    def __init__(
        self,
        world: World,
        *modules: nn.Module,
        bucket_mb: float = BUCKET_MB,
        overlaps: bool = True,
    ) -> None:
        self._world = world
        self._buckets: list[_Bucket] = []
        self._ready: set[nn.Parameter] = set()
        self._num_launched = 0
        self._is_armed = False
        if world.size == 1:
            return
        unique = dict.fromkeys(p for m in modules for p in m.parameters() if p.requires_grad)
        mb = sum(p.nbytes for p in unique) / 1e6
        shares = world.shares_memory and overlaps and mb <= SHARED_MB  # not for a single use
        for parameters in _batched(reversed(unique), bucket_mb):
            bucket = _Bucket(parameters, world, shares=shares)
            self._buckets.append(bucket)
            for p in parameters if overlaps else ():
                p.register_post_accumulate_grad_hook(lambda p, b=bucket: self._take(p, b))

    @contextlib.contextmanager
    def last_backward(self) -> Iterator[None]:
        """Around the one backward that completes a step's gradients; they are means afterwards.

        Gradients of earlier backward calls, outside, are included.
        """
        self.arm()
        try:
            yield
        except BaseException:
            self._reset()
            raise
        self.finish()

    def arm(self) -> None:
        """The next backward is the last of the step."""
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
                "a second backward inside last_backward(): the gradients of the first may be on "
                "their way already; call all but the last backward outside"
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
            for parameters in _batched(own, BUCKET_MB):
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

    def state_bytes(self) -> int:
        """Bytes of the moments that this rank holds."""
        states = self._inner.state.values()
        return sum(state[name].nbytes for state in states for name in _MOMENTS)

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


def _batched(parameters: Iterable[nn.Parameter], mb: float) -> Iterator[list[nn.Parameter]]:
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
