"""What a process tells the one that started it: an exit status, and facts as lines of JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

FAILED = 1
"""Exit status of a process whose last line says why."""
PREEMPTED = 75
"""Exit status (EX_TEMPFAIL) of one that was asked to stop and has saved its state: the same command
goes on from there."""
STOPPED = "stopped"
"""Key of the fact that goes with it, since torchrun has an exit status of its own."""
PROGRESS = "progress"
"""Key of the fact `[what, done, total]`; the total is null where it is unknown."""
HARDWARE = "hardware"
"""Key of the fact what a process computes on, in words."""


def _print(line: str) -> None:
    print(line, flush=True)


def tell(name: str, value: Any, say: Callable[[str], object] = _print) -> None:
    """Print a fact for the program that reads our output, not on a person's terminal."""
    if not sys.stdout.isatty():
        say(fact(name, value))


def fact(name: str, value: Any) -> str:
    """A line that programs read: `{"progress": ["images", 128, 1000]}`."""
    return json.dumps({name: value}, ensure_ascii=False)


def read_fact(line: str) -> tuple[str, Any] | None:
    """Name and value of a line that `fact` made; None for any other line."""
    line = line.strip()
    if not line.startswith('{"'):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return next(iter(found.items())) if len(found) == 1 else None
