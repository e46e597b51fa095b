"""What `auto` stands for: ranks, threads and cores, from a network's size and what is free here."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from flows.config import Resources
from gigagan.config import TrainBaseConfig, TrainUpsamplerConfig
from gigagan.config.stylegan_t import START, StyleTConfig

CORES = "GIGAGAN_CORES"
"""Variable that gives each rank a core of its own, as in `0,1`; `off` leaves that to the kernel."""
SMALL = 1e9
"""Multiply-adds a picture up to which every free core gets a rank instead of a thread: above what
a CPU trains (45 M for `small_32`, 490 M for the largest of the ladder), far below the paper's."""
SHARE = 4
"""A rank's pictures come in fours: fewer cost more each, and the discriminator's minibatch
standard deviation takes four together, so that ranks train on what one process would."""
MOST_RANKS = 16
"""Each holds all networks, frozen ones included."""
LOOK_S = 0.5
GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Where there is none of them there is no GPU, and torch, which takes seconds, is not asked."""
COUNT_GPUS = "import torch; print(torch.cuda.device_count())"


@dataclass(frozen=True)
class Machine:
    """What a process that starts now may use."""

    cores: int
    """Cores that it is allowed at all."""
    free: tuple[int, ...]
    """Numbers of those that nobody else uses; one at least."""
    gpus: int = 0
    """CUDA devices that it would see."""


@dataclass(frozen=True)
class Plan:
    """Resources without `auto`."""

    resources: Resources
    reason: str = ""
    """What was chosen and why, in a line; empty where it was not asked for."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What was chosen for a training, beside whose images per second it belongs."""


def plan(resources: Resources, config: Any) -> Plan:
    """What a stage with this section of the configuration runs on; looks at this machine."""
    if resources.backend != "auto":
        return Plan(resources)
    return choose(resources, config, look(resources.env))


def choose(resources: Resources, config: Any, machine: Machine) -> Plan:
    """The rule; what `resources` give a number for stays as it is."""
    cores = f"{len(machine.free)} of {_count(machine.cores, 'core')} free"
    if not isinstance(config, TrainBaseConfig | TrainUpsamplerConfig):
        threads = resources.threads or (None if machine.gpus else len(machine.free))
        return Plan(_filled(resources, 1, threads), f"{_said(1, threads)}: {cores}")
    if machine.gpus:
        ranks, threads, pinned = _on_gpus(resources, config, machine)
        why = f"{_count(machine.gpus, 'GPU')}, batches of {config.batch_size}"
    else:
        ranks, threads, pinned = _on_cores(resources, config, machine)
        millions = multiply_adds(config) / 1e6
        why = f"{cores}, {millions:,.0f} M multiply-adds a picture, batches of {config.batch_size}"
    figures = {"ranks": float(ranks)} | ({"threads": float(threads)} if threads else {})
    resources = _filled(resources, ranks, threads, pinned)
    return Plan(resources, f"{_said(ranks, threads, pinned)}: {why}", figures)


_Choice = tuple[int, int | None, Sequence[int]]
"""Ranks, threads of each (None: shared out evenly), and the core of each (empty: any)."""


def _on_gpus(
    resources: Resources, config: TrainBaseConfig | TrainUpsamplerConfig, machine: Machine
) -> _Choice:
    """A rank on each GPU, as far as they can share a batch."""
    ranks = _ranks(resources, config.batch_size, machine.gpus)
    return ranks, resources.threads, ()


def _on_cores(
    resources: Resources, config: TrainBaseConfig | TrainUpsamplerConfig, machine: Machine
) -> _Choice:
    """A rank of one thread on each free core for small networks, else one rank with all of them."""
    free = len(machine.free)
    is_small = multiply_adds(config) <= SMALL
    threads = resources.threads or (1 if is_small else max(1, free // resources.processes))
    fours, rest = divmod(config.batch_size, SHARE * config.system.accumulate)
    pieces = 1 if rest else fours
    ranks = _ranks(resources, pieces, min(free // threads, MOST_RANKS) if is_small else 1)
    return ranks, threads, machine.free[:ranks] if threads == 1 < ranks <= free else ()


def _ranks(resources: Resources, pieces: int, most: int) -> int:
    """The number asked for, or the largest up to `most` that shares the pieces equally."""
    if resources.processes > 1:
        return resources.processes
    return max((n for n in range(1, most + 1) if pieces % n == 0), default=1)


def _filled(
    resources: Resources, ranks: int, threads: int | None, pinned: Sequence[int] = ()
) -> Resources:
    env = {CORES: ",".join(map(str, pinned))} if pinned else {}
    changes = {
        "backend": "torchrun" if ranks > 1 else "inline",
        "processes": ranks,
        "threads": threads,
        "env": {**env, **resources.env},
    }
    return resources.model_copy(update=changes)


def _said(ranks: int, threads: int | None, pinned: Sequence[int] = ()) -> str:
    text = f"{ranks} ranks" if ranks > 1 else "1 process"
    text += f" of {_count(threads, 'thread')}" if threads else ""
    return f"{text} on cores {','.join(map(str, pinned))}" if pinned else text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def multiply_adds(config: TrainBaseConfig | TrainUpsamplerConfig) -> int:
    """Of drawing a picture, roughly: two 3×3 convolutions a block and nothing else."""
    if isinstance(config, TrainUpsamplerConfig):
        upsampler = config.upsampler
        side, widths, blocks = upsampler.bottom, upsampler.up_channels, upsampler.blocks
    elif isinstance(generator := config.generator, StyleTConfig):
        side, widths = START, generator.channels
        blocks = (generator.blocks,) * len(widths)
    else:
        side, widths, blocks = 4, generator.channels, generator.blocks
    levels = enumerate(zip(widths, blocks, strict=True))
    return sum(depth * 2 * 9 * (width * side << i) ** 2 for i, (width, depth) in levels)


# This machine.


def look(env: Mapping[str, str]) -> Machine:
    """See for half a second what is free; `env` is what is set for the process beside our own."""
    allowed = sorted(os.sched_getaffinity(0))
    return Machine(len(allowed), tuple(free_cores(allowed)), _num_gpus(env))


def free_cores(allowed: Sequence[int]) -> list[int]:
    """The least busy of these cores: as many as others leave, within the container's quota."""
    ours = _seconds_of_ours()
    busy = dict(enumerate(psutil.cpu_percent(LOOK_S, percpu=True)))
    # What this pipeline does itself at its start (its server, say) it does not do all the time.
    ours = _seconds_of_ours() - ours
    taken = round(sum(busy.get(core, 0.0) for core in allowed) / 100 - ours / LOOK_S)
    room = min(len(allowed) - max(taken, 0), quota())
    return sorted(sorted(allowed, key=lambda core: busy.get(core, 0.0))[: max(int(room), 1)])


def _seconds_of_ours() -> float:
    """Processor time of this process and of those below it."""
    process = psutil.Process()
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # gone
            times = each.cpu_times()
            total += times.user + times.system
    return total


def quota(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """How many cores' time this process's control groups are given; infinite without a limit."""
    found = [math.inf]
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A limit of those above counts as well; in a container they are often all that one sees.
        place = root / controllers / path.lstrip("/")
        folders = (place, *place.parents)
        found += [_limit(folder) for folder in folders if folder.is_relative_to(root)]
    return min(found)


def _limit(folder: Path) -> float:
    """Of one control group, in cores: version 2 has it in one file, version 1 in two."""
    with contextlib.suppress(OSError, ValueError):
        return _cores(*(folder / "cpu.max").read_text().split())
    with contextlib.suppress(OSError, ValueError):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        return _cores(*((folder / name).read_text().strip() for name in names))
    return math.inf


def _cores(allowed: str, period: str) -> float:
    return math.inf if allowed in ("max", "-1") else int(allowed) / int(period)


def _num_gpus(env: Mapping[str, str]) -> int:
    """As torch counts them, in a process of its own: `env` may hide some of them."""
    if not any(Path(name).exists() for name in GPU_FILES):
        return 0
    command = [sys.executable, "-c", COUNT_GPUS]
    counted = subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    return int(counted.stdout) if counted.stdout.strip().isdecimal() else 0
