"""Asking again, ever less often, where that can help."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Result = TypeVar("Result")


def pauses(
    first_s: float,
    *,
    attempts: int | None = None,
    growth: float = 2.0,
    longest_s: float = float("inf"),
    spread: tuple[float, float] = (1.0, 1.0),
) -> Iterator[float]:
    """Seconds between `attempts` (None: endlessly many), each `growth` times the one before it.

    Each is multiplied by a random factor from `spread`, so that machines do not return in step.
    """
    pause, left = first_s, attempts
    while left is None or left > 1:
        yield min(pause, longest_s) * random.uniform(*spread)
        pause = min(pause * growth, longest_s)
        left = None if left is None else left - 1


def retry(
    ask: Callable[[], Result],
    waits: Iterable[float],
    *,
    may_help: Callable[[Exception], bool],
    patience_s: float = float("inf"),
    on_retry: Callable[[Exception, float], None] = lambda error, pause_s: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Result:
    """What `ask` returns, asked again after each of `waits` while it raises what asking may help.

    `on_retry` is told each error and the pause that follows. The last error is raised as it is:
    when the waits are used up, when `may_help` says no, or `patience_s` after the first question.
    """
    end, left = time.monotonic() + patience_s, iter(waits)
    while True:
        try:
            return ask()
        except Exception as error:
            pause_s = next(left, None) if may_help(error) else None
            if pause_s is None or time.monotonic() > end:
                raise
            on_retry(error, pause_s)
        sleep(pause_s)
