"""What the executor's tests let workers do: imported by name in other processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def squared(item):
    return item * item


def with_state(item, state):
    return item, *state


def numbered(number):
    return number, os.getpid()


def logged(item: tuple[Path, int]) -> int:
    """Leaves one line a run, and kills its process on the runs that a file asks for."""
    folder, number = item
    with (folder / f"{number}.log").open("a") as log:
        log.write(f"{os.getpid()}\n")
    runs = len((folder / f"{number}.log").read_text().splitlines())
    kills = folder / f"{number}.kill"
    if kills.exists() and runs <= int(kills.read_text()):
        os.kill(os.getpid(), signal.SIGKILL)
    return runs


class TwoWordsError(Exception):
    """Cannot be unpickled: its constructor wants more than its text."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def fails_at_three(item):
    if item == 3:
        raise TwoWordsError("three", "sheep")
    return item


def a_function_is_no_result(item):
    return lambda: item


def bad_setup(number):
    raise ValueError("no weights here")


def omp(item):
    return os.environ["OMP_NUM_THREADS"]


def slow_and_marked(item: Path) -> None:
    (item.parent / f"{item.name}.pid").write_text(str(os.getpid()))
    time.sleep(60)
    item.touch()


def shard_of_work(item: tuple[Path, int]) -> str:
    """Writes a file as the stages do: aside, in place, done-marker last."""
    folder, number = item
    with (folder / f"{number:02d}.runs").open("a") as runs:
        runs.write("x")
    time.sleep(0.2)
    partial = folder / f"{number:02d}.{os.getpid()}.partial"
    partial.write_text(str(number) * 1000)
    partial.replace(folder / f"{number:02d}.txt")
    (folder / f"{number:02d}.done").touch()
    import ray

    return ray.get_runtime_context().get_node_id()
