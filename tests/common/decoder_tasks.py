"""What the tests of the decoders' processes let them do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from gigagan.common import pictures as decode


def doubled(data: bytes) -> bytes:
    print("codecs print, too")
    return data * 2


def pid() -> int:
    return os.getpid()


def refused() -> None:
    raise decode.UndecodableError("truncated", "ends early")


class UnsendableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def unsendable() -> None:
    raise UnsendableError(1, 2)


def busy() -> None:
    while True:
        pass


def crash(once: Path | None = None) -> str:
    if once is None or not once.exists():
        if once is not None:
            once.touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return "decoded"


def leave() -> None:
    os._exit(3)


def held_alone(seconds: float) -> tuple[float, float]:
    """From when to when it held what a great picture holds."""
    with decode.alone:
        begin = time.monotonic()
        time.sleep(seconds)
        return begin, time.monotonic()
