"""The command line: `python -m flows run | submit | ui | bootstrap | worker | store | …`."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape

from flows.commands import pipeline, record, services, store
from flows.commands.options import UsageError
from flows.config import StageName
from flows.serve import settings

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a known failure becomes one message and a status."""
    arguments = parser().parse_args(argv)
    settings.apply()
    console = Console(stderr=True)
    try:
        return int(arguments.command(arguments) or 0)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on where it stopped")
        return INTERRUPTED
    except Exception as error:
        if arguments.debug:
            raise
        console.print(f"[red]error:[/] {escape(explain(error))}", highlight=False, soft_wrap=True)
        return 1


def explain(error: Exception) -> str:
    """One clear message for an error, with what to do about it."""
    if isinstance(error, ModuleNotFoundError) and error.name is None:
        return str(error)  # one of ours: it knows the package
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the package of module {error.name!r} is not installed: `make demo` installs "
            "everything, or use `pip install --no-deps -r requirements.lock`"
        )
    if full := next((e for e in _causes(error) if _is_full_disk(e)), None):
        name = getattr(full, "filename", None)
        where = f" for {name}" if name else ""
        return f"no space left on the disk{where}: make room, then run the same command again"
    text = str(error)
    if isinstance(error, (RuntimeError, ValueError, UsageError)) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The innermost first: what is said last may be a consequence (a status not written)."""
    if error is not None:
        yield from _causes(error.__cause__ or error.__context__)
        yield error


def _is_full_disk(error: BaseException) -> bool:
    is_sqlite = "database or disk is full" in str(error)
    return is_sqlite or (isinstance(error, OSError) and error.errno == errno.ENOSPC)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="python -m flows",
        description="Download, score, filter, train, upsample, evaluate: one pipeline.",
        epilog=f"Stages: {', '.join(StageName)}. What commands leave goes to the folder that "
        "GIGAGAN_RUNS names, or to runs/ in the current folder.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for group in (pipeline, services, record, store):
        group.add_parsers(commands)
    return top


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
