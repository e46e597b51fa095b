"""Progress for people: bars on a terminal, a line now and then elsewhere. Both on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Live
from rich.text import Text

from data.report import Progress

LINE_EVERY_S = 10.0
BYTES = ", bytes"
"""How the name of something counted in bytes ends."""


@contextmanager
def shown(console: Console | None = None) -> Iterator[Progress]:
    """Progress that is seen while the block runs."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), _Amount(), TimeRemainingColumn(True))
    with Live(*columns, console=console, transient=True) as live:
        yield _Bars(live)


class _Bars:
    """A bar for each thing under way; one that is complete makes room."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if what not in self._tasks:
            name = escape(what.removesuffix(BYTES))
            is_bytes = what.endswith(BYTES)
            self._tasks[what] = self._live.add_task(name, total=total, is_bytes=is_bytes)
        complete = total is not None and done >= total
        self._live.update(self._tasks[what], completed=done, total=total, visible=not complete)


class _Lines:
    """At most one line in `LINE_EVERY_S` for each thing under way, with its rate and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, tuple[float, int]] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        before, seen = self._last.setdefault(what, (now, done))
        if now <= before or now - before < LINE_EVERY_S:
            return
        self._last[what] = (now, done)
        is_bytes = what.endswith(BYTES)
        rate = max(done - seen, 0) / (now - before)
        text = f"{what.removesuffix(BYTES)} {_amounts(done, total, is_bytes)}"
        text += f", {amount(rate, is_bytes)}/s"
        if total and rate:
            text += f", {clock((total - done) / rate)} left"
        self._console.print(escape(text), soft_wrap=True)


class _Amount(ProgressColumn):
    """How much of how much, and how fast."""

    def render(self, task: Task) -> Text:
        is_bytes = bool(task.fields["is_bytes"])
        total = None if task.total is None else int(task.total)
        text = _amounts(int(task.completed), total, is_bytes)
        return Text(text + (f"  {amount(task.speed, is_bytes)}/s" if task.speed else ""))


def _amounts(done: int, total: int | None, is_bytes: bool) -> str:
    return amount(done, is_bytes) + (f"/{amount(total, is_bytes)}" if total is not None else "")


def amount(value: float, is_bytes: bool = False) -> str:
    """`12,800`, a rate as `0.31`, bytes as `1.2 GB` (decimal)."""
    if not is_bytes:
        return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def clock(seconds: float) -> str:
    """`1:15`, or `2:00:05` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
