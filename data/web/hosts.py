"""What a host says of itself, in robots.txt, tdmrep.json and headers, and whose turn it is to ask.

Each file is asked for once in a process, and once on a machine whose processes share a `Store`:
rows of one host are spread over all of them.
"""

from __future__ import annotations

import json
import logging
import re
import sqlite3
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from protego import Protego
from urllib3 import HTTPHeaderDict

from data.web.addresses import RefusedError

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
MAX_RULES = 1000
"""Rules read of a tdmrep.json."""
OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""`X-Robots-Tag` directives that reserve a picture (img2dataset's list; `none` is Google's short
form of noindex and nofollow)."""
WITH_VALUES = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
)
"""Directives whose colon does not end the name of a crawler."""
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
        self._robots = _Files(ask, store, lambda text: _Robots(text, agent))
        self._reserved = _Files(ask, store, _Reservations)

    def vet(self, url: str, end: float) -> float:
        """Seconds between two requests that the host of `url` asks for; 0 where it does not.

        Raises:
            RefusedError: `robots_txt` or `opt_out`, or why the host cannot be asked by `end`.
        """
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        rules = self._robots.get(f"{origin}/robots.txt", end) if self.robots else _SILENT
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


class _Rules:
    """What a file says of the URLs of its host. This one says nothing."""

    delay_s = 0.0
    detail = ""

    def forbid(self, url: str) -> bool:
        return False


_SILENT = _Rules()


class _Robots(_Rules):
    """A robots.txt, as it addresses our product token."""

    def __init__(self, text: str, agent: str) -> None:
        self._rules = Protego.parse(text)
        self._agent = agent
        self.delay_s = self._rules.crawl_delay(agent) or 0.0
        self.detail = "disallowed by robots.txt"

    def forbid(self, url: str) -> bool:
        return not self._rules.can_fetch(url, self._agent)


class _Reservations(_Rules):
    """A tdmrep.json. Of the rules whose location matches, the first counts."""

    def __init__(self, text: str) -> None:
        try:
            rules = json.loads(text)
        except (ValueError, RecursionError):
            rules = None
        self._rules = [
            # A location is a pattern as robots.txt has them, so its reader is the matcher.
            (str(rule.get("tdm-reservation")) == "1", Protego.parse(f"User-agent: *\n{disallow}"))
            for rule in (rules if isinstance(rules, list) else [])[:MAX_RULES]
            if isinstance(rule, dict) and (disallow := _disallow(rule.get("location")))
        ]

    def forbid(self, url: str) -> bool:
        matching = (kept for kept, rule in self._rules if not rule.can_fetch(url, "*"))
        return next(matching, False)


def _disallow(location: object) -> str:
    """A rule of robots.txt with this location; empty if it is none."""
    if not isinstance(location, str) or not location.strip():
        return ""
    return "Disallow: " + "".join(location.split()).replace("#", "%23")


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

    def __init__(self, ask: Ask, store: Store | None, parse: Callable[[str], _Rules]) -> None:
        self._ask, self._store, self._parse = ask, store, parse
        self._lock = threading.Lock()
        self._asking: dict[str, Future[None]] = {}
        self._kept: OrderedDict[str, tuple[Said, _Rules]] = OrderedDict()
        self._chars = 0

    def get(self, url: str, end: float) -> _Rules:
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

    def _fresh(self, url: str) -> tuple[Said, _Rules] | None:
        known = self._kept.get(url)
        if known is None or known[0].until < time.time():
            return None
        self._kept.move_to_end(url)
        return known

    def _look_up(self, url: str, end: float, mine: Future[None]) -> tuple[Said, _Rules]:
        """Ask for the file while others wait; what our own deadline cut short is not kept."""
        try:
            said = self._store.get(url) if self._store else None
            if said is None:
                said = self._asked(url, end)
                if self._store:
                    self._store.put(url, said)
            known = said, self._parse(said.text) if said.text else _SILENT
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

    def _keep(self, url: str, known: tuple[Said, _Rules]) -> None:
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


@dataclass
class _Turn:
    """One host, as those see it who want to ask it."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    asking: int = 0
    wanting: int = 0
    """Threads that ask or wait to."""
    free_from: float = 0.0
    """When the next request may start, monotonic seconds."""


class Turns:
    """Lets a few ask one host at once, and none too soon after another."""

    def __init__(self, connections: int) -> None:
        self.connections = connections
        self._lock = threading.Lock()
        self._hosts: dict[str, _Turn] = {}

    @contextmanager
    def taken(self, host: str, delay_s: float, patience_s: float) -> Iterator[float]:
        """A turn to ask `host`, with the seconds that were waited for it.

        Raises:
            RefusedError: `host_busy`, when the turn would not come within `patience_s` seconds.
        """
        with self._lock:
            turn = self._hosts.setdefault(host, _Turn())
            turn.wanting += 1
        try:
            begun = time.monotonic()
            self._enter(turn, delay_s, begun + patience_s)
            try:
                yield time.monotonic() - begun
            finally:
                with turn.changed:
                    turn.asking -= 1
                    turn.changed.notify()
        finally:
            self._leave(host, turn)

    def pause(self, host: str, seconds: float) -> None:
        """The host says that it was asked too often: none asks it for so long."""
        with self._lock:
            turn = self._hosts.setdefault(host, _Turn())
            turn.free_from = max(turn.free_from, time.monotonic() + seconds)

    def _enter(self, turn: _Turn, delay_s: float, latest: float) -> None:
        with turn.changed:
            start = max(turn.free_from, time.monotonic())
            if start > latest:  # known beforehand: nobody waits in vain
                wait_s = start - time.monotonic()
                raise RefusedError("host_busy", f"its turn would come in {wait_s:.0f} s")
            turn.free_from = start + delay_s if delay_s else turn.free_from
        if (early := start - time.monotonic()) > 0:
            time.sleep(early)
        with turn.changed:
            free = turn.changed.wait_for(
                lambda: turn.asking < self.connections, latest - time.monotonic()
            )
            if not free:
                raise RefusedError("host_busy", f"{self.connections} connections in use")
            turn.asking += 1

    def _leave(self, host: str, turn: _Turn) -> None:
        with self._lock:
            turn.wanting -= 1
            if not turn.wanting and turn.free_from <= time.monotonic():
                self._hosts.pop(host, None)
            if len(self._hosts) > 10_000:
                now = time.monotonic()
                idle = [h for h, t in self._hosts.items() if not t.wanting and t.free_from <= now]
                for name in idle:
                    del self._hosts[name]


def opt_out(headers: HTTPHeaderDict, agent: str) -> str | None:
    """The header by which a server reserves a picture, if it does.

    `otherbot: noai` binds another crawler, and `agent: noai` us; a name holds for the rest of its
    header. Dates of `unavailable_after` have commas and colons, too, and are passed over.
    """
    for value in headers.getlist("X-Robots-Tag"):
        if _binds(value, agent.lower()):
            return f"X-Robots-Tag: {value[:200]}"
    if any(value.strip() == "1" for value in headers.getlist("TDM-Reservation")):
        return "TDM-Reservation: 1"
    return None


_AGENT = re.compile(r"\s*([\w.*/-]+)\s*:(.*)", re.DOTALL)


def _binds(value: str, agent: str) -> bool:
    for_us = True
    for part in value[:8192].lower().split(","):
        directive = part.strip()
        while (named := _AGENT.fullmatch(directive)) and named[1] not in WITH_VALUES:
            for_us = named[1].partition("/")[0] in ("*", agent)
            directive = named[2].strip()
        if for_us and directive in OPT_OUTS:
            return True
    return False
