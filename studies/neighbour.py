"""Training beside a busy neighbour: threads of one process against ranks with a core each.

Two cores, made-up pictures, the training loop itself; the neighbour spins on the second core.
Ratios are to one process of two threads, alone. Anything else that runs here disturbs them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import training
from flows.launch.auto import CORES, free_cores
from flows.serve.services import free_port
from flows.serve.settings import DEFAULTS
from gigagan.training import loop
from gigagan.training.captions import CaptionFeatures
from gigagan.training.distributed.world import join
from gigagan.training.logs import Log

WARM_STEPS = 3
SECONDS = 8.0
TICK = "step"
RANK = "rank"
"""The argument of the processes that train."""


@dataclass(frozen=True)
class Case:
    """A way to use two cores."""

    ranks: int
    threads: int
    pinning: str = ""
    """GIGAGAN_CORES of the ranks; empty: a core each."""


CASES = {
    "one process of two threads": Case(1, 2),
    "one process of one thread": Case(1, 1),
    "two ranks, a core each": Case(2, 1),
    "two ranks on any core": Case(2, 1, "off"),
}


# A rank.


class _Ticking:
    """A loader that says when a step begins."""

    def __init__(self, batches: Iterator[object]) -> None:
        self._batches = batches

    def batches(self, images_seen: int = 0) -> Iterator[object]:
        for batch in self._batches:
            print(TICK, flush=True)
            yield batch

    def captions_between(self, start: int, stop: int) -> list[str]:
        return [f"caption {i}" for i in range(start, stop)]


def child() -> None:
    """Train without end; the parent watches and ends it."""
    world, config = join(), training.endless(training.PROFILED)
    noise = training.Noise(config.generator.resolution, config.batch_size, world)
    captions = CaptionFeatures(training.Encoder(), torch.device("cpu"))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        loop.train(
            config,
            training.players(config),
            captions,
            _Ticking(noise.batches()),  # type: ignore[arg-type]
            training.NoProbe(),
            Path(folder),
            Log(Path(folder), config.total_images, is_main=False),
            world,
        )


# The process that starts the others and prints.


def main() -> None:
    """Images per second of every case, alone and beside a neighbour."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        print(f"  left out: it takes two cores, and there is {len(allowed)}")
        return
    two = sorted(allowed)[:2]
    os.sched_setaffinity(0, two)  # for all children
    try:
        _compare(two)
    finally:
        os.sched_setaffinity(0, allowed)


def _compare(two: list[int]) -> None:
    idle = free_cores(two)
    note = "" if idle == two else f"; disturbed: only {len(idle)} of them free when it began"
    print(f"\ntraining beside a neighbour, cores {two[0]} and {two[1]}{note}")
    print(f"  {'images/s':28} {'alone':>14} {'beside it':>16}")
    unit = None
    for name, case in CASES.items():
        shown = []
        for spins in (False, True):
            rate = _rate(case, two, two[1] if spins else None)
            unit = unit or rate
            shown.append(f"{rate:6.1f} (×{rate / unit:.2f})")
        print(f"  {name:28} {shown[0]:>14} {shown[1]:>16}", flush=True)


def _rate(case: Case, cores: list[int], neighbour: int | None) -> float:
    """Images per second, over all ranks."""
    with ExitStack() as stack:
        if neighbour is not None:
            stack.enter_context(_spinning(neighbour))
        first, *_ = [
            stack.enter_context(_started(environment)) for environment in _environments(case, cores)
        ]
        assert first.stdout is not None
        ticks: list[float] = []
        for line in first.stdout:
            if line.strip() != TICK:
                continue
            ticks.append(time.perf_counter())
            steps = len(ticks) - 1 - WARM_STEPS
            if steps > 1 and ticks[-1] - ticks[WARM_STEPS] > SECONDS:
                batch = training.endless(training.PROFILED).batch_size
                return steps * batch / (ticks[-1] - ticks[WARM_STEPS])
    raise RuntimeError(f"a rank of {case} ended: `python -m studies neighbour {RANK}` says why")


def _environments(case: Case, cores: list[int]) -> Iterator[dict[str, str]]:
    """As torchrun gives them to its ranks."""
    port = str(free_port())
    for rank in map(str, range(case.ranks)):
        yield {
            **DEFAULTS,
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(case.threads),
            CORES: case.pinning or ",".join(map(str, cores)),
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(case.ranks)),
            **dict.fromkeys(("RANK", "LOCAL_RANK"), rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }


@contextmanager
def _started(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "studies", "neighbour", RANK]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _spinning(core: int) -> Iterator[None]:
    """A neighbour that never rests, on this core."""
    code = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    child() if sys.argv[1:] == [RANK] else main()
