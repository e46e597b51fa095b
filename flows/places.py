"""Where all that commands leave goes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class RunsError(RuntimeError):
    """What commands leave cannot be written; the message says what moves it."""


def runs() -> Path:
    """The folder of all that commands leave: `GIGAGAN_RUNS`, or runs/ in the current folder.

    The default store with its record, the mirrors of stores behind URLs, Prefect's home and the
    logs of servers lie in it, each unless its own variable or option names another place.
    """
    return Path(os.environ.get("GIGAGAN_RUNS") or "runs").expanduser().absolute()


def make(folder: Path) -> None:
    """Make a folder of `runs()`.

    Raises:
        RunsError: it cannot be written; the text says what moves it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunsError(
            f"{folder} cannot be written ({error.strerror}): set GIGAGAN_RUNS to a folder that can"
        ) from error
