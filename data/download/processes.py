"""The processes of a download: what they are told, their signs of life, and how they are ended;
and who alone may write a folder.

The workers import this too: nothing heavy here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TextIO

import psutil
from pydantic import BaseModel, ConfigDict

from data.web.fetch import FetchSettings

VETTED = "vetted "
"""How each error of our fetch begins in img2dataset's tables: others are not ours."""
QUIET = {
    "NO_ALBUMENTATIONS_UPDATE": "1",  # these two phone out at import else
    "WANDB_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TQDM_MININTERVAL": "10",
}
"""Environment of every process of a download."""
WITHOUT = "DATA_COLLECT_WITHOUT"
"""Environment variable with the packages that a download's processes need not import."""
UNUSED = ("albumentations", "pandas", "ray", "torch", "wandb")
PULSE_S = 0.5
"""A worker shows life at most this often."""
STARTUP_S = 300.0
"""Longest time from the start of the processes to the first sign of life."""
END_S = 5.0
"""Processes asked to end are killed after this long."""
LOCK = ".lock"
"""Ends the name of a file that a writing command locks; the kernel lets go when it is gone."""


class Job(BaseModel):
    """One run of img2dataset, as a file tells it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: Path
    """Parquet with the column `request`: "EXPECTED URL"."""
    images: Path
    """Folder of the part's shards."""
    rows_per_shard: int
    processes: int
    threads: int
    """Threads of each process."""
    distributor: str
    fetch: FetchSettings
    pulses: Path
    """Folder of signs of life."""
    parent: int
    """Process without which this one ends."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables that every process needs, those on other machines as well."""
        without = " ".join(name for name in UNUSED if name != self.distributor)
        return {**QUIET, WITHOUT: without}


class Pulse:
    """A worker's sign of life: a file named by process, host and state, touched as it works."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        name = f"{os.getpid()}@{socket.gethostname()}"
        self._idle, self._busy = folder / f"{name}.idle", folder / f"{name}.busy"
        self._next = 0.0
        self._idle.touch()

    def begin(self) -> None:
        """A shard is in hand: from here on silence means trouble."""
        os.utime(self._idle)
        self._idle.rename(self._busy)  # as little as a full disk still does

    def end(self) -> None:
        """No shard is in hand."""
        self._busy.rename(self._idle)

    def beat(self) -> None:
        """A row was answered. Cheap enough for each of them, from any thread."""
        if (now := time.monotonic()) >= self._next:
            self._next = now + PULSE_S
            with suppress(FileNotFoundError):  # a thread that outlasted its shard
                os.utime(self._busy)

    def leave(self) -> None:
        """This process ends in an orderly way."""
        self._idle.unlink(missing_ok=True)
        self._busy.unlink(missing_ok=True)


class Sign(NamedTuple):
    """What a pulse's file says."""

    worker: str
    """Process and host."""
    busy: bool
    touched: int
    """Time of the last touch, on the clock of whoever touched."""

    @property
    def pid(self) -> int | None:
        """Process number, when it is on this machine."""
        pid, _, host = self.worker.partition("@")
        return int(pid) if host == socket.gethostname() else None


def signs(folder: Path) -> list[Sign]:
    """Every worker that has not left."""
    found = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # it changed its state just now
            found.append(Sign(path.stem, path.suffix == ".busy", path.stat().st_mtime_ns))
    return found


def killed(folder: Path) -> str | None:
    """A worker of this machine that is gone without having left."""
    gone = [s.worker for s in signs(folder) if s.pid is not None and not psutil.pid_exists(s.pid)]
    still = {sign.worker for sign in signs(folder)} if gone else set()
    return next((worker for worker in gone if worker in still), None)


class Session:
    """A command in a session of its own, with all its descendants."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    @property
    def runs(self) -> bool:
        """Whether the command itself has not ended."""
        return self.process.poll() is None

    def members(self) -> list[psutil.Process]:
        """Every living process of the session, orphans and other process groups included."""
        found = []
        for pid in psutil.pids():
            with suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
                if os.getsid(pid) == self.process.pid:
                    process = psutil.Process(pid)
                    # A zombie's first thread has ended; others may still be busy with a write.
                    if process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1:
                        found.append(process)
        return found

    def memory(self, enough: int = 0) -> int:
        """Bytes in use by the session; pages that several share count once.

        That costs the kernel some work, so at or below `enough` it may be an overestimate.
        """
        members = self.members()
        simple = sum(_memory(process, exact=False) for process in members)
        return simple if simple <= enough else sum(_memory(p, exact=True) for p in members)

    def wait_briefly(self) -> None:
        """Let the command end by itself, if it is quick: its work is done."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)

    def end(self) -> None:
        """End every process of the session: asked first, then killed, stopped ones too."""
        for number, patience in ((signal.SIGTERM, END_S), (signal.SIGKILL, END_S)):
            members = self.members()
            for process in members:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            end = time.monotonic() + patience
            while time.monotonic() < end and self.members():
                self.process.poll()
                time.sleep(0.02)
        self.process.wait()


def _memory(process: psutil.Process, *, exact: bool) -> int:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        if not exact:
            return int(process.memory_info().rss)
        full = process.memory_full_info()
        return int(getattr(full, "pss", full.uss))
    return 0


@contextmanager
def session(job: Job, path: Path, log: Path) -> Iterator[Session]:
    """`python -m data.download.collect PATH`, ended with its descendants when the block is left."""
    path.write_text(job.model_dump_json(indent=1), encoding="utf-8")
    with log.open("ab") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "data.download.collect", str(path)],
            env={**os.environ, **job.environment},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    started = Session(process)
    try:
        yield started
    finally:
        started.end()


class Watch:
    """Tells from outside what ails a session."""

    def __init__(self, session: Session, job: Job, *, stall_s: float, max_memory_gb: float) -> None:
        self.session = session
        self.job = job
        self.stall_s = stall_s
        self.max_bytes = int(max_memory_gb * 1e9)
        self.peak = 0
        self._seen: dict[str, tuple[Sign, float]] = {}
        self._grown: tuple[object, float] = (None, time.monotonic() + STARTUP_S)

    def trouble(self, grown: object) -> str | None:
        """Why the session should be ended, if it should. `grown` differs whenever files grew."""
        now = time.monotonic()
        if self.job.distributor == "multiprocessing" and (worker := killed(self.job.pulses)):
            return f"worker {worker} was killed"  # its pool waits for its shard for ever
        if silence := self._silence(grown, now):
            return silence
        memory = self.session.memory(self.max_bytes)
        self.peak = max(self.peak, memory)
        if memory > self.max_bytes:
            return f"{TOO_MUCH_MEMORY}{memory / 1e9:.2f} GB, {self.max_bytes / 1e9:.2f} allowed"
        return None

    def _silence(self, grown: object, now: float) -> str | None:
        present = {sign.worker: sign for sign in signs(self.job.pulses)}
        for worker, sign in present.items():
            if worker not in self._seen or self._seen[worker][0] != sign:
                self._seen[worker] = (sign, now)
        if grown != self._grown[0] and (present or self._grown[0] is not None):
            self._grown = (grown, now)
        if self.job.distributor == "multiprocessing":
            for worker, (sign, since) in self._seen.items():
                if worker in present and sign.busy and now - since > self.stall_s:
                    return f"worker {worker} has answered no row in {now - since:.0f} s"
        latest = max([self._grown[1], *(since for _, since in self._seen.values())])
        if now - latest > self.stall_s:
            return f"no sign of life in {now - latest:.0f} s"
        return None


TOO_MUCH_MEMORY = "the processes use "
"""How a trouble begins that fewer threads may cure."""


@contextmanager
def only_writer(out: Path, *, is_file: bool = False) -> Iterator[None]:
    """Be the only command that writes a folder, or a file; says for whom it waits, and waits."""
    lock = out.with_name(f".{out.name}{LOCK}") if is_file else out / LOCK
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lock, out) as file:
        file.truncate(0)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
        file.flush()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _locked(path: Path, out: Path) -> TextIO:
    """The lock's file, locked: the one that lies there now, for each holder removes its own."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file, out)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: TextIO, out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        writer = file.read() or "another process"
        print(f"{out} is being written by {writer}: waiting", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        print(f"{out} cannot be locked ({error}): let one command write it", file=sys.stderr)
