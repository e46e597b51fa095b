"""How far a run has come: bars on a terminal, plain lines elsewhere. Knows nothing of Prefect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Live
from rich.text import Text

from gigagan.common import progress
from gigagan.common.console import Amount

LOG_EVERY_S = 60.0
STATES = {"done": "green", "skipped": "cyan", "failed": "red"}


class Ending(NamedTuple):
    """How a stage ended."""

    stage: str
    state: str
    """One of `STATES`."""
    seconds: float


class Reporter:
    """Is told what happens; this one keeps silent."""

    def __init__(self) -> None:
        self.endings: list[Ending] = []

    def started(self, stage: str, note: str) -> None:
        """A stage begins."""

    def progress(self, stage: str, what: str, done: int, total: int | None) -> None:
        """Part of a stage is this far; `total` is None when unknown."""

    def ended(self, stage: str, state: str, seconds: float, note: str) -> None:
        """A stage is over; `state` is one of `STATES`."""
        self.endings.append(Ending(stage, state, seconds))


class Lines(Reporter):
    """A line now and then, for logs and pipes."""

    every_s = progress.LINE_EVERY_S

    def __init__(self, console: Console):
        super().__init__()
        self.console = console
        self._line = progress.Lines(lambda text: self.say(escape(text)), self.every_s)

    def say(self, markup: str) -> None:
        """Print a line."""
        self.console.print(markup, soft_wrap=True)

    def live(self) -> AbstractContextManager[object]:
        """Nothing to draw."""
        return nullcontext()

    def started(self, stage: str, note: str) -> None:
        """Print the start."""
        self.say(f"[bold]{stage}[/] started: {escape(note)}")

    def progress(self, stage: str, what: str, done: int, total: int | None) -> None:
        """Print at most one line in `every_s` for each part, with rate and time left."""
        self._line(f"{stage}: {what}", done, total)

    def ended(self, stage: str, state: str, seconds: float, note: str) -> None:
        """Print the end."""
        super().ended(stage, state, seconds, note)
        mark = f"[{STATES[state]}]{state}[/]"
        self.say(f"[bold]{stage}[/] {mark} in {progress.clock(seconds)}: {escape(note)}")


class Log(Lines):
    """Lines for the log of a run, beside what another reporter shows."""

    every_s = LOG_EVERY_S

    def __init__(self, log: Callable[[str], None], also: Reporter):
        super().__init__(Console(quiet=True))
        self.log, self.also = log, also

    def say(self, markup: str) -> None:
        """Log a line."""
        self.log(Text.from_markup(markup).plain)

    def started(self, stage: str, note: str) -> None:
        """Log the start."""
        self.also.started(stage, note)
        super().started(stage, note)

    def progress(self, stage: str, what: str, done: int, total: int | None) -> None:
        """Log at most a line in `every_s`."""
        self.also.progress(stage, what, done, total)
        super().progress(stage, what, done, total)

    def ended(self, stage: str, state: str, seconds: float, note: str) -> None:
        """Log the end."""
        self.also.ended(stage, state, seconds, note)
        super().ended(stage, state, seconds, note)


class Bars(Lines):
    """A live bar for each running part; starts and ends scroll by above."""

    def __init__(self, console: Console):
        self._live = Live(
            TextColumn("[bold]{task.fields[stage]}"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            Amount(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        super().__init__(self._live.console)
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def live(self) -> AbstractContextManager[object]:
        """Draw while the block runs."""
        return self._live

    def progress(self, stage: str, what: str, done: int, total: int | None) -> None:
        """Move the part's bar; a part that is complete makes room."""
        key = (stage, what)
        if key not in self._tasks:
            name, is_bytes = what.removesuffix(progress.BYTES), what.endswith(progress.BYTES)
            self._tasks[key] = self._live.add_task(
                name, stage=stage, total=total, is_bytes=is_bytes
            )
        complete = total is not None and done >= total
        self._live.update(self._tasks[key], completed=done, total=total, visible=not complete)

    def ended(self, stage: str, state: str, seconds: float, note: str) -> None:
        """Remove the stage's bars and print its end."""
        for key in [key for key in self._tasks if key[0] == stage]:
            self._live.remove_task(self._tasks.pop(key))
        super().ended(stage, state, seconds, note)


_current: ContextVar[Reporter] = ContextVar("reporter", default=Reporter())  # noqa: B039


def reporter() -> Reporter:
    """Who is listening here."""
    return _current.get()


@contextmanager
def reporting(console: Console) -> Iterator[Reporter]:
    """Report what the block does on `console`, in the way that suits it."""
    listener = Bars(console) if console.is_terminal else Lines(console)
    token = _current.set(listener)
    try:
        with listener.live():
            yield listener
    finally:
        _current.reset(token)


@contextmanager
def logged(log: Callable[[str], None]) -> Iterator[None]:
    """Report what the block does to a log as well."""
    token = _current.set(Log(log, _current.get()))
    try:
        yield
    finally:
        _current.reset(token)


def figures(metrics: dict[str, float], most: int = 4) -> str:
    """The first few headline figures on one line."""
    return ", ".join(f"{key} {value:.4g}" for key, value in list(metrics.items())[:most])
