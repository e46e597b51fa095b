"""What a part finds: lines of JSON and pictures, each on disk as soon as it is known."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from PIL import Image

RESULTS = "results.jsonl"
LOG = "log.txt"
SECONDS, PACK, OUT, SIZE = "GPU_PART_SECONDS", "GPU_PART_PACK", "GPU_PART_OUT", "GPU_PART_SIZE"
"""Variables with which `run` starts a part."""


class Record:
    """The file of results as one part sees it."""

    def __init__(self, part: str, out: Path, seconds: float) -> None:
        self.part, self.out, self.seconds = part, out, seconds
        self.started = time.monotonic()

    @classmethod
    def of_environment(cls, part: str) -> Record:
        """As `run` started this process."""
        return cls(part, Path(os.environ[OUT]), float(os.environ[SECONDS]))

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.seconds - (time.monotonic() - self.started)

    def line(self, name: str, **figures: object) -> None:
        """Append one result."""
        at = round(time.monotonic() - self.started, 2)
        append(self.out / RESULTS, {"part": self.part, "name": name, "at": at, **figures})

    def picture(self, name: str, image: Image.Image) -> None:
        """Write a picture, or a newer state of it."""
        partial = self.out / f"{name}.partial.png"
        image.save(partial)
        partial.replace(self.out / f"{name}.png")

    def attempt(
        self, name: str, call: Callable[[], Mapping[str, object]], *, needs: float = 0.0
    ) -> bool:
        """Run one check or measurement; what it returns is its line. Whether it came to its end.

        What fails is a result as well, and the part goes on. `needs`: seconds without which it is
        not begun.
        """
        if self.left < needs:
            self.line(name, status="left out", why=f"{self.left:.0f} s left, {needs:.0f} needed")
            return False
        began = time.monotonic()
        try:
            found = call()
        except Exception as error:  # whatever it is, the other results are worth having
            said = f"{type(error).__name__}: {error}"
            where = "".join(traceback.format_exception(error)[-4:])
            self.line(name, status="error", error=said[:2000], traceback=where[-3000:])
            return False
        self.line(name, status="ok", seconds=round(time.monotonic() - began, 2), **found)
        return True


def append(path: Path, line: dict[str, object]) -> None:
    """One line of JSON, on disk when this returns."""
    text = json.dumps(line, default=str)
    with path.open("a") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(text[:400], flush=True)


def leave(status: int) -> NoReturn:
    """End the process at once: tearing down networks and threads can take longer than is left."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
