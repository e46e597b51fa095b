"""Sees to it that processes do not outlive the flow or the command that started them.

`python -m flows.safety.guardian MARK` waits until its standard input ends, which the kernel sees
to when the flow's process is gone, however it went; then it ends every process whose environment
carries the mark. With a file as well it waits until nobody holds a lock of that file, too.
Knows nothing of Prefect. A job that is meant to live on its own (in a cluster's queue) starts
without `MARK` in its environment.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

MARK = "PIPELINE_STAGE_PROCESS"
"""Variable that all processes of a stage inherit (its output's folder), or of a service of ours."""
GRACE_S = 20.0
"""From SIGTERM, on which training saves its state, to SIGKILL."""


@contextmanager
def watching(mark: str) -> Iterator[None]:
    """End what carries the mark, should this process die in this block."""
    guardian = start(mark)
    try:
        yield
    finally:
        guardian.kill()
        guardian.communicate()


def start(mark: str, users: Path | None = None) -> subprocess.Popen[bytes]:
    """A guardian of this process; with `users` what it ends outlives us while others lock it."""
    command = [sys.executable, "-m", "flows.safety.guardian", mark]
    # A session of its own, and no mark: what ends us must not end it before its work is done.
    return subprocess.Popen(
        [*command, str(users)] if users else command,
        stdin=subprocess.PIPE,
        # It may live on, and whoever reads what we say waits for its end else.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name != MARK},
        start_new_session=True,
    )


@contextmanager
def guarding(mark: str) -> Iterator[None]:
    """Mark what is started in this block, and end it should this process die."""
    before = os.environ.get(MARK)
    with watching(mark):
        os.environ[MARK] = mark
        try:
            yield
        finally:
            if before is None:
                del os.environ[MARK]
            else:
                os.environ[MARK] = before


def end_left_behind(mark: str) -> list[int]:
    """End what a dead run left with this mark, but nothing that this process started.

    The caller holds the lease of the output, so that nobody else's is alive by right.
    """
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    return end(mark, but=ours)


def end(mark: str, grace_s: float = GRACE_S, but: Collection[int] = ()) -> list[int]:
    """End the processes with this mark, politely at first; returns their ids."""
    left = [process for process in marked(mark) if process.pid not in but]
    for process in left:
        _signal(process, "terminate")
    _, alive = psutil.wait_procs(left, grace_s)
    since = [process for process in marked(mark) if process.pid not in but]
    for process in {*alive, *since}:
        _signal(process, "kill")
    psutil.wait_procs([*alive, *since], grace_s)
    return [process.pid for process in left]


def marked(mark: str) -> list[psutil.Process]:
    """Other processes of this machine that were started with the mark."""
    return [
        process
        for process in psutil.process_iter()
        if process.pid != os.getpid() and _mark_of(process) == mark
    ]


def _mark_of(process: psutil.Process) -> str | None:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.environ().get(MARK)
    except (psutil.Error, OSError):  # gone, or somebody else's
        return None


def _signal(process: psutil.Process, how: str) -> None:
    with suppress(psutil.Error):
        getattr(process, how)()


if __name__ == "__main__":
    sys.stdin.buffer.read()
    with ExitStack() as held:
        for name in sys.argv[2:]:  # kept, so that who comes now waits for the end
            fcntl.flock(held.enter_context(Path(name).open("ab")), fcntl.LOCK_EX)
        end(sys.argv[1])
