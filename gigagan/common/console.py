"""Progress for people, on stderr: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Live
from rich.text import Text

from gigagan.common.progress import BYTES, Lines, Progress, amount, amounts


@contextmanager
def shown(console: Console | None = None) -> Iterator[Progress]:
    """Progress that is seen while the block runs."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield Lines(lambda text: console.print(escape(text), soft_wrap=True))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), Amount(), TimeRemainingColumn(True))
    with Live(*columns, console=console, transient=True) as live:
        yield Bars(live)


class Bars:
    """A bar for each thing under way; one that is complete makes room."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Move the bar, which appears with the first call."""
        if what not in self._tasks:
            name = escape(what.removesuffix(BYTES))
            is_bytes = what.endswith(BYTES)
            self._tasks[what] = self._live.add_task(name, total=total, is_bytes=is_bytes)
        complete = total is not None and done >= total
        self._live.update(self._tasks[what], completed=done, total=total, visible=not complete)


class Amount(ProgressColumn):
    """How much of how much, and how fast."""

    def render(self, task: Task) -> Text:
        """Both, in bytes where the task's `is_bytes` says so."""
        is_bytes = bool(task.fields.get("is_bytes"))
        total = None if task.total is None else int(task.total)
        text = amounts(int(task.completed), total, is_bytes)
        return Text(text + (f"  {amount(task.speed, is_bytes)}/s" if task.speed else ""))
