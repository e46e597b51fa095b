"""Which process writes an MLflow run, as tags of the run, and whether it has died since."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Mapping

from mlflow.entities import Run

from flows.safety import processes


def me() -> dict[str, str]:
    """Tags that name this process: a process id alone is used again."""
    return {
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "process.start_ticks": str(processes.start_ticks() or ""),
        "process.machine": processes.here(),
    }


def process(tags: Mapping[str, str]) -> tuple[str | None, ...]:
    """Who wrote a run, by its tags."""
    return tuple(tags.get(key) for key in me())


def has_died(run: Run) -> bool:
    """Whether the process that a run names is known to be gone: it was one of this machine."""
    host, pid, ticks, machine = process(run.data.tags)
    if host != socket.gethostname() or not pid:
        return False
    if machine in (None, processes.here()):
        return not processes.is_alive(int(pid), int(ticks) if ticks else None)
    # Another boot of this host is over; another container on it may well live.
    return machine.split()[:2] != processes.here().split()[:2]


def user() -> str:
    """Name of the user, who may have none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())
