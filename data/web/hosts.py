"""What hosts say of themselves in robots.txt and tdmrep.json: may a page be asked for, how often.

Each file is asked for once in a process, and once on a machine whose processes share a `Store`:
rows of one host are spread over all of them.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from urllib.parse import urlsplit

from data.web.addresses import RefusedError
from data.web.optout import Reservations
from data.web.robots import SILENT, Robots, Rules

MAX_FILE_BYTES = 500 * 1024
"""Read of a robots.txt or tdmrep.json, and no further (RFC 9309, 2.5)."""
LIFE_S = 86_400.0
"""How long what a host said counts (RFC 9309, 2.4: a day)."""
FAILURE_LIFE_S = 600.0
"""How long a host that could not be asked is taken as such."""
MEMORY_CHARS = 2_000_000
"""Of parsed files, kept in memory; some 30 times as many bytes."""
MEMORY_FILES = 50_000
"""Files kept in memory, most of them not there at all."""
UNREACHABLE = frozenset({"dns", "private_address", "connection_refused", "tls", "bad_port"})
"""Fates of robots.txt that are the page's as well: nobody answers there."""

Ask = Callable[[str, float], str]
"""Text of a host's file, asked for until a time (monotonic seconds); empty where there is none."""

log = logging.getLogger(__name__)


class Hosts:
    """The files of hosts: whether they let us have a page, and how often."""

    def __init__(
        self, ask: Ask, *, agent: str, robots: bool, opt_outs: bool, store: Store | None
    ) -> None:
        self.robots, self.opt_outs = robots, opt_outs
        self._robots = _Files(ask, store, lambda text: Robots(text, agent))
        self._reserved = _Files(ask, store, Reservations)

    def vet(self, url: str, end: float) -> float:
        """Seconds between two requests that the host of `url` asks for; 0 where it does not.

        Raises:
            RefusedError: `robots_txt` or `opt_out`, or why the host cannot be asked by `end`.
        """
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        rules = self._robots.get(f"{origin}/robots.txt", end) if self.robots else SILENT
        if rules.forbid(url):
            raise RefusedError("robots_txt", rules.detail)
        if self.opt_outs and self._reserved_by(f"{origin}/.well-known/tdmrep.json", url, end):
            raise RefusedError("opt_out", f"{origin}/.well-known/tdmrep.json")
        return rules.delay_s

    def _reserved_by(self, file: str, url: str, end: float) -> bool:
        try:
            return self._reserved.get(file, end).forbid(url)
        except RefusedError as refusal:
            if refusal.fate == "deadline":  # ours, not the file's: the page has no time left either
                raise
            return False  # a file that cannot be read reserves nothing


@dataclass(frozen=True)
class Said:
    """What came of asking for a host's file: a text, or why there is none."""

    text: str
    """Empty where the host has no such file, and so allows all."""
    fate: str
    """Why the host could not be asked; empty if it could."""
    detail: str
    until: float
    """When to ask again, seconds since the epoch."""


class _Files:
    """Files of one kind, each asked for by one thread at a time and then kept."""

    def __init__(self, ask: Ask, store: Store | None, parse: Callable[[str], Rules]) -> None:
        self._ask, self._store, self._parse = ask, store, parse
        self._lock = threading.Lock()
        self._asking: dict[str, Future[None]] = {}
        self._kept: OrderedDict[str, tuple[Said, Rules]] = OrderedDict()
        self._chars = 0

    def get(self, url: str, end: float) -> Rules:
        """What the file at `url` says.

        Raises:
            RefusedError: it could not be asked, now or some minutes ago.
        """
        while True:
            with self._lock:
                if known := self._fresh(url):
                    break
                asking = self._asking.get(url)
                if asking is None:
                    mine = self._asking[url] = Future()
            if asking is None:
                known = self._look_up(url, end, mine)
                break
            wait([asking], max(0.0, end - time.monotonic()))
            if time.monotonic() >= end:
                raise RefusedError("deadline", f"{url} is being asked for")
        said, rules = known
        if said.fate:
            raise RefusedError(said.fate, said.detail)
        return rules

    def _fresh(self, url: str) -> tuple[Said, Rules] | None:
        known = self._kept.get(url)
        if known is None or known[0].until < time.time():
            return None
        self._kept.move_to_end(url)
        return known

    def _look_up(self, url: str, end: float, mine: Future[None]) -> tuple[Said, Rules]:
        """Ask for the file while others wait; what our own deadline cut short is not kept."""
        try:
            said = self._store.get(url) if self._store else None
            if said is None:
                said = self._asked(url, end)
                if self._store:
                    self._store.put(url, said)
            known = said, self._parse(said.text) if said.text else SILENT
            with self._lock:
                self._keep(url, known)
            return known
        finally:
            with self._lock:
                del self._asking[url]
            mine.set_result(None)

    def _asked(self, url: str, end: float) -> Said:
        try:
            return Said(self._ask(url, end), "", "", time.time() + LIFE_S)
        except RefusedError as refusal:
            if refusal.fate == "deadline":
                raise
            fate = refusal.fate if refusal.fate in UNREACHABLE else "robots_txt"
            detail = f"{url.rpartition('/')[2]} unreachable: {refusal.fate} {refusal}".strip()
            return Said("", fate, detail, time.time() + FAILURE_LIFE_S)

    def _keep(self, url: str, known: tuple[Said, Rules]) -> None:
        """The least recently used go first, when there are too many or they are too long."""
        if old := self._kept.pop(url, None):
            self._chars -= len(old[0].text)
        self._kept[url] = known
        self._chars += len(known[0].text)
        while len(self._kept) > MEMORY_FILES or self._chars > MEMORY_CHARS:
            _, (said, _) = self._kept.popitem(last=False)
            self._chars -= len(said.text)


class Store:
    """What hosts said, for all processes of a machine: an SQLite file, on a disk of its own.

    It only saves requests: when it fails later on, that is logged, and the host is asked anew.
    """

    def __init__(self, path: str) -> None:
        self._lock = threading.Lock()
        self._puts = 0
        try:
            self._file = self._opened(path)
        except sqlite3.Error as error:
            raise ValueError(
                f"hosts_cache {path!r} cannot be opened ({error}): name a file in a folder that "
                "exists on a local disk, or delete it"
            ) from error

    @staticmethod
    def _opened(path: str) -> sqlite3.Connection:
        file = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
        for attempt in range(50):
            try:
                file.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:  # does not wait for another who sets it
                if "locked" not in str(error) or attempt == 49:
                    raise
                time.sleep(0.1)
        file.execute("PRAGMA synchronous=OFF")  # a cache: a crash of the machine may take its end
        file.execute(
            "CREATE TABLE IF NOT EXISTS said (url TEXT PRIMARY KEY, text BLOB, fate TEXT, "
            "detail TEXT, until REAL) WITHOUT ROWID"
        )
        return file

    def get(self, url: str) -> Said | None:
        """What the file at `url` said, if that still counts."""
        query = "SELECT text, fate, detail, until FROM said WHERE url = ? AND until > ?"
        rows = self._execute(query, (url, time.time()))
        if not rows:
            return None
        text, fate, detail, until = rows[0]
        try:
            return Said(zlib.decompress(text).decode() if text else "", fate, detail, until)
        except (zlib.error, UnicodeError) as error:  # a damaged page of the file
            log.warning("hosts_cache: %s; the host is asked instead", error)
            return None

    def put(self, url: str, said: Said) -> None:
        """Keep what the file at `url` said; now and then, forget what no longer counts."""
        text = zlib.compress(said.text.encode()) if said.text else b""
        row = (url, text, said.fate, said.detail, said.until)
        self._execute("INSERT OR REPLACE INTO said VALUES (?, ?, ?, ?, ?)", row)
        self._puts += 1
        if self._puts % 10_000 == 0:
            self._execute("DELETE FROM said WHERE until < ?", (time.time(),))

    def _execute(self, query: str, values: tuple[object, ...]) -> list[tuple]:
        try:
            with self._lock:
                return self._file.execute(query, values).fetchall()
        except sqlite3.Error as error:
            log.warning("hosts_cache: %s; the host is asked instead", error)
            return []

    def close(self) -> None:
        """Close the file."""
        self._file.close()
