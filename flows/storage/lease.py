"""One writer of an output at a time, on any store that can create a file exclusively.

    STORE/.leases/<stage>/<key[:16]>/00000001, 00000002, …

The holder is who created the highest number. It rewrites its file while it lives; a file that
stands still for long enough, or whose process is known to be dead, is outbid by creating the next
number, which only one can. Numbers are never used again and nothing is deleted, so that who comes
back from standing still finds its successor. No clocks are compared between machines.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from flows.safety import processes
from flows.stage import BusyError
from gigagan.common.files import write_aside
from gigagan.common.progress import Progress

STALE_S = 30.0
"""After so long without a sign of life a holder elsewhere counts as dead."""
TELL_EVERY_S = 60.0
BEATS = 6
"""Signs of life within the time after which one counts as dead."""


class Board(Protocol):
    """Numbered small files in one place."""

    def newest(self) -> int:
        """The highest number; 0 when there is none."""

    def read(self, number: int) -> bytes | None:
        """What a file says; None when it is not there."""

    def create(self, number: int, body: bytes) -> bool:
        """Make a file, unless it is there: then False."""

    def rewrite(self, number: int, body: bytes) -> None:
        """Replace what a file says."""


class LocalBoard:
    """Files of a folder, which machines may share (NFS)."""

    def __init__(self, folder: Path):
        self.folder = folder

    def newest(self) -> int:
        """See `Board`."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return max((int(name) for name in names if name.isdigit()), default=0)

    def read(self, number: int) -> bytes | None:
        """See `Board`."""
        try:
            return self._path(number).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return b""  # NFS: replaced while it was read

    def create(self, number: int, body: bytes) -> bool:
        """See `Board`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with self._path(number).open("xb") as file:
                file.write(body)
        except FileExistsError:
            return False
        return True

    def rewrite(self, number: int, body: bytes) -> None:
        """See `Board`."""
        write_aside(self._path(number), body, fsync=True, has_rivals=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}"


class Holder(BaseModel):
    """What a file of a lease says."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    host: str
    space: str
    """Where `pid` means this process; see `processes.here`."""
    pid: int
    start_ticks: int | None = None
    """See `processes.start_ticks`."""
    since: str
    token: str
    beat: int = 0
    is_released: bool = False

    @classmethod
    def me(cls) -> Holder:
        """This process."""
        return cls(
            host=socket.gethostname(),
            space=processes.here(),
            pid=os.getpid(),
            start_ticks=processes.start_ticks(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            token=uuid.uuid4().hex,
        )

    @classmethod
    def read(cls, body: bytes | None) -> Holder | None:
        """Who wrote this; None when it cannot be told (yet)."""
        try:
            return cls.model_validate_json(body or b"")
        except ValidationError:
            return None

    @property
    def is_here(self) -> bool:
        """Whether we can see if its process lives."""
        return self.space == processes.here()

    @property
    def is_gone(self) -> bool:
        """Whether it is known to hold nothing any more."""
        dead = self.is_here and not processes.is_alive(self.pid, self.start_ticks)
        return self.is_released or dead

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def holder(board: Board) -> Holder | None:
    """Who holds a lease, as far as one look can tell: None when it is free."""
    found = Holder.read(board.read(board.newest()))
    return None if found is None or found.is_gone else found


class Lease:
    """The right to write one output."""

    def __init__(
        self,
        board: Board,
        what: str,
        *,
        stale_s: float = STALE_S,
        on_wait: Callable[[str], None] = lambda message: None,
    ):
        self.board = board
        self.what = what
        """The output, as messages name it."""
        self.stale_s = stale_s
        self.on_wait = on_wait
        self.is_lost = False
        """Whether a beat has found that another run took over."""
        self._me = Holder.me()
        self._number = 0
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)

    def acquire(self, *, wait: bool = True) -> None:
        """Return as the holder, once whoever holds it has released it or is dead.

        Raises:
            BusyError: only without `wait`, when its holder lives.
        """
        highest, seen, since, told = 0, None, 0.0, None
        while True:
            highest = max(highest, self.board.newest())
            body = self.board.read(highest) if highest else None
            now = time.monotonic()
            is_first, is_moving = seen is None, seen != (highest, body)
            if is_moving:
                seen, since = (highest, body), now
            there = Holder.read(body)
            if not highest or (there and there.is_gone) or now - since > self.stale_s:
                if self._take(highest + 1):
                    return
                highest += 1
                continue
            if not wait and (bool(there and there.is_here) or (is_moving and not is_first)):
                raise BusyError(f"{self.what} is being written by {there or 'another run'}")
            if told is None or now - told > TELL_EVERY_S:
                told = now
                self.on_wait(f"{self.what} is being written by {there or 'another run'}: waiting")
            time.sleep(min(2.0, self.stale_s / 10))

    def check(self) -> None:
        """Stay the holder for another while, or raise `BusyError` if another run took over.

        Takes the next number instead of looking for it: that cannot be answered from a cache.
        """
        with self._turn:
            if self.is_lost or not self._create(self._number + 1):
                self.is_lost = True
                raise BusyError(
                    f"{self.what} was taken over by another run while this one stood still "
                    "(suspended machine, store out of reach?): its output is not committed here"
                )
            self._number += 1

    def watched(self, progress: Progress) -> Progress:
        """The same progress, which ends the work by `BusyError` once the lease is lost."""

        def report(what: str, done: int, total: int | None) -> None:
            if self.is_lost:
                self.check()
            progress(what, done, total)

        return report

    def release(self) -> None:
        """Let the next one in, if we are the holder."""
        self._stop.set()
        if self._heart.is_alive():
            self._heart.join()
        there = Holder.read(self.board.read(self._number)) if self._number else None
        if there and there.token == self._me.token:
            self._say(is_released=True)

    def _take(self, number: int) -> bool:
        self._number = number  # first: an interrupt from here on still leads to a release
        if self._create(number):
            self._heart.start()
            return True
        self._number = 0
        return False

    def _create(self, number: int) -> bool:
        if self.board.create(number, self._me.model_dump_json().encode()):
            return True
        # A request that was answered by silence, then repeated, finds its own first attempt.
        there = Holder.read(self.board.read(number))
        return there is not None and there.token == self._me.token

    def _beat(self) -> None:
        while not self._stop.wait(self.stale_s / BEATS):
            with suppress(Exception), self._turn:  # out of reach? The next beat tries again
                if self.board.read(self._number + 1) is not None:
                    self.is_lost = True
                    return
                self._say(beat=self._me.beat + 1)

    def _say(self, **changes: object) -> None:
        self._me = self._me.model_copy(update=changes)
        self.board.rewrite(self._number, self._me.model_dump_json().encode())
