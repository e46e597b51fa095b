"""How far something has come, in words: what is called, and the text that people read."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""What is being done, how much of it is done, out of how much (None: unknown)."""

LINE_EVERY_S = 10.0
BYTES = ", bytes"
"""How the name of something counted in bytes ends."""


def silent(what: str, done: int, total: int | None) -> None:
    """Progress that nobody sees."""


def amount(value: float, is_bytes: bool = False) -> str:
    """`12,800`, a rate as `0.31`, bytes as `1.2 GB` (decimal)."""
    if not is_bytes:
        return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def amounts(done: int, total: int | None, is_bytes: bool = False) -> str:
    """`12,800/40,000`, without a total `12,800`."""
    return amount(done, is_bytes) + (f"/{amount(total, is_bytes)}" if total is not None else "")


def clock(seconds: float) -> str:
    """`75` as `1:15`, from an hour on `2:00:05`, below ten seconds `4.2 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Lines:
    """A `Progress` for logs and pipes: now and then a line, with the rate and the time left."""

    def __init__(self, write: Callable[[str], object], every_s: float = LINE_EVERY_S) -> None:
        self._write, self._every_s = write, every_s
        self._last: dict[str, tuple[float, int]] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Write at most one line in `every_s` for each thing under way, the first after that."""
        now = time.monotonic()
        before, seen = self._last.setdefault(what, (now, done))
        if now <= before or now - before < self._every_s:
            return
        self._last[what] = (now, done)
        is_bytes, rate = what.endswith(BYTES), max(done - seen, 0) / (now - before)
        text = f"{what.removesuffix(BYTES)} {amounts(done, total, is_bytes)}"
        text += f" ({done / total:.0%})" if total else ""
        text += f", {amount(rate, is_bytes)}/s"
        text += f", {clock((total - done) / rate)} left" if total and rate else ""
        self._write(text)
