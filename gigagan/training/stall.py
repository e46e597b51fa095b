"""A process that hangs: ended after a while without a step, with the stacks of its threads."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path
from types import TracebackType
from typing import Self


class StallWatch:
    """Ends the process if no step ends in time, with the stacks of all threads in a file.

    The watching thread is written in C and needs no interpreter lock: it also ends a process
    that hangs in a kernel or a collective. It writes to one file only, so where it will is said
    beforehand. The status of such a process is 1.
    """

    def __init__(self, run_dir: Path, seconds: float, *, rank: int = 0) -> None:
        """Not armed before the first `beat()`; `seconds` = 0 is off."""
        self.seconds = seconds
        self.path = run_dir / ("stall.txt" if rank == 0 else f"stall-rank{rank}.txt")
        self._file = self.path.open("a") if seconds > 0 else None
        if self._file is not None and self.path.stat().st_size:
            print(f"an earlier attempt hung: see {self.path}", file=sys.stderr, flush=True)
        if self._file is not None and rank == 0:
            print(
                f"a step of more than {seconds:g} s ends this process with status 1 and the "
                f"stacks of its threads in {self.path}",
                file=sys.stderr,
                flush=True,
            )

    def beat(self) -> None:
        """A step has ended: the next one has the whole time again."""
        if self._file is not None:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=self._file)

    def pause(self) -> None:
        """Stop watching until the next beat: before what may take its time."""
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Stop watching for good, and leave no empty file behind."""
        self.pause()
        if self._file is not None:
            self._file.close()
            self._file = None
            if not self.path.stat().st_size:
                self.path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
