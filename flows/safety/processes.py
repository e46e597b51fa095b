"""Which process is meant, on which machine, and whether it still lives.

Told by the kernel's own counts, never by a clock: clocks are set while processes run.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

STARTTIME = 19
"""Place of a process's start in /proc/PID/stat, counted from behind its name."""


def is_alive(pid: int, ticks: int | None = None) -> bool:
    """Whether a process of this machine is running, or any thread of it.

    `ticks`, its `start_ticks`, tell it from a later one with the same number. A process that was
    killed shows as a zombie when its first thread has ended; until its last one has, files are
    open, locks are held and a write that was under way may still be done.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1:
            return False
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
    found = start_ticks(pid)
    return ticks is None or found is None or found == ticks


def start_ticks(pid: int | None = None) -> int | None:
    """Clock ticks from the boot of this machine to the start of a process (this one).

    None where /proc does not say.
    """
    try:
        stat = Path(f"/proc/{pid or 'self'}/stat").read_text(errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[STARTTIME])  # a name may hold blanks and brackets


@cache
def here() -> str:
    """Where process numbers and ticks mean the same: a host's name, this boot, this container."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # these are Linux's
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)
