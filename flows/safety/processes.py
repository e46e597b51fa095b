"""Which process is meant, on which machine, and whether it still lives."""

from __future__ import annotations

import socket
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

SAME_START_S = 1.0
"""How far two readings of one process's start may lie apart."""


def is_alive(pid: int, started: float | None = None) -> bool:
    """Whether a process of this machine is running.

    `started`, seconds since the epoch, tells it from a later one with the same number.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return started is None or abs(process.create_time() - started) < SAME_START_S
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def started(pid: int | None = None) -> float:
    """When a process (this one) began, seconds since the epoch."""
    return psutil.Process(pid).create_time()


@cache
def here() -> str:
    """Where process numbers mean the same: a host's name, this boot of it, this container."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # these are Linux's
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)
