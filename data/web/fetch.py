"""A vetted fetch: the bytes of one picture, or the class of what went wrong.

Only http and https, only public addresses (each redirect vetted again, and connected to the very
address that was vetted), bodies and time bounded, opt-outs and hosts' wishes honoured, an honest
User-Agent. Nothing is decoded, and nothing is written.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

from pydantic import BaseModel, ConfigDict, Field
from urllib3 import BaseHTTPResponse, HTTPHeaderDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import DecodeError, HTTPError, ProtocolError, SSLError
from urllib3.exceptions import TimeoutError as SilenceError

from data.config import DownloadConfig
from data.web.addresses import RefusedError, dial, vetted
from data.web.deadlines import Deadlines
from data.web.hosts import MAX_FILE_BYTES, Hosts, Store
from data.web.optout import opt_out
from data.web.turns import Turns
from gigagan.common.decoders import Decoders
from gigagan.common.pictures import UndecodableError, check

VERSION = "0.1"
FILE_REDIRECTS = 5
"""Followed on the way to a robots.txt; with more, it counts as not there (RFC 9309, 2.3.1.2)."""
HEADER_S = 5.0
"""Of a processor, to read the header of a picture: most take a thousandth of one."""
MAY_RECOVER = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which asking again can help."""

T = TypeVar("T")


class FetchSettings(BaseModel):
    """Limits of one fetch; see DownloadConfig for their meaning."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: int
    max_pixels: int
    timeout_s: float
    total_deadline_s: float
    max_redirects: int
    retries: int
    allow_private_addresses: bool
    honour_opt_outs: bool
    honour_robots_txt: bool
    host_connections: int
    host_delay_s: float
    user_agent: str = Field(pattern=r"^[A-Za-z_-]+$")
    contact: str | None = Field(default=None, pattern=r"^[\x20-\x7e]+$")
    connect_to: dict[str, str] = {}
    """Host → "address:port" to connect to instead, unvetted, like curl's `--connect-to`."""
    hosts_cache: str | None = None
    """SQLite file on a local disk, in which the machine's processes share what hosts said."""

    @classmethod
    def of(
        cls,
        config: DownloadConfig,
        connect_to: Mapping[str, str] | None = None,
        hosts_cache: str | None = None,
    ) -> FetchSettings:
        """The limits that a download's config has."""
        own = {"connect_to", "hosts_cache"}
        limits = {name: getattr(config, name) for name in cls.model_fields if name not in own}
        return cls(**limits, connect_to=dict(connect_to or {}), hosts_cache=hosts_cache)

    @property
    def agent(self) -> str:
        """Product token and version, by which robots.txt addresses us."""
        return f"{self.user_agent}/{VERSION}"

    @property
    def headers(self) -> dict[str, str]:
        """Sent with every request; no connection is kept, so that each is vetted and timed."""
        contact = f" (+{self.contact})" if self.contact else ""
        return {
            "User-Agent": self.agent + contact,
            "Accept-Encoding": "identity",
            "Connection": "close",
        }


_ENCODINGS = ("identity", "", "gzip", "x-gzip", "deflate")
"""Of bodies that are read, though none of the compressed ones is asked for."""


class _Clock:
    """What is left of one fetch's time. Waiting for a host's turn is counted apart."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.patience_s = seconds

    def waited(self, seconds: float) -> None:
        self.end += seconds
        self.patience_s -= seconds


class Fetcher:
    """Fetches pictures under one set of limits. One per process; its threads share it."""

    def __init__(self, settings: FetchSettings) -> None:
        self.settings = settings
        self.deadlines = Deadlines()
        self.turns = Turns(settings.host_connections)
        self.hosts = Hosts(
            self._file,
            agent=settings.agent,
            robots=settings.honour_robots_txt,
            opt_outs=settings.honour_opt_outs,
            store=Store(settings.hosts_cache) if settings.hosts_cache else None,
        )
        self._tls = ssl.create_default_context()  # reading the certificates takes a while: once
        # It warns, with a traceback, of each answer that breaks a rule; the fate says it shorter.
        logging.getLogger("urllib3").setLevel(logging.ERROR)

    def fetch(self, url: str, expected: str | None = None) -> bytes:
        """The bytes of the picture at `url`; `expected` is the md5:HEX or sha256:HEX they have.

        Takes at most twice `total_deadline_s`: once for servers, once for waiting for its turns.

        Raises:
            RefusedError: with the class of what went wrong.
        """
        clock = _Clock(self.settings.total_deadline_s)
        body = self._persist(lambda: self._follow(url, clock), clock)
        if expected is not None:
            _verify(body, expected)
        return body

    def _persist(self, attempt: Callable[[], T], clock: _Clock) -> T:
        """What `attempt` returns, made again where that can help and there is time."""
        for number in range(self.settings.retries + 1):
            try:
                return attempt()
            except RefusedError as refusal:
                pause = refusal.retry_after_s
                if pause is None:
                    pause = 0.5 * 2**number * random.uniform(0.5, 1.5)
                last = number == self.settings.retries
                if last or not refusal.may_recover or time.monotonic() + pause > clock.end:
                    raise
                time.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _follow(self, url: str, clock: _Clock) -> bytes:
        seen = set()
        for _ in range(self.settings.max_redirects + 1):
            url = vetted(url)
            if url in seen:
                raise RefusedError("redirects", f"back to {url}")
            seen.add(url)
            body, location = self._ask(url, clock)
            if location is None:
                return body
            url = urljoin(url, location)
        raise RefusedError("redirects", f"more than {self.settings.max_redirects}")

    def _ask(self, url: str, clock: _Clock) -> tuple[bytes, str | None]:
        """Body, or the place it moved to, of one request that its host agrees to."""
        delay = max(self.settings.host_delay_s, self.hosts.vet(url, clock.end))
        host = urlsplit(url).hostname or ""
        with self.turns.taken(host, delay, clock.patience_s) as waited:
            clock.waited(waited)
            with self._answer(url, clock.end, "image/*") as response:
                try:
                    body, location = self._picture(response)
                except RefusedError as refusal:
                    if response.status == 429 and refusal.retry_after_s:
                        self.turns.pause(host, refusal.retry_after_s)
                    raise
        # Only now: a body that our own deadline has cut is none to judge.
        return (
            (_checked(body, self.settings.max_pixels), None)
            if location is None
            else (b"", location)
        )

    def _picture(self, response: BaseHTTPResponse) -> tuple[bytes, str | None]:
        if location := _location(response):
            return b"", location
        if response.status != 200:
            raise _failed(response)
        reserved = opt_out(response.headers, self.settings.user_agent)
        if self.settings.honour_opt_outs and reserved:
            raise RefusedError("opt_out", reserved)
        limit = self.settings.max_bytes
        if _length(response) > limit:
            raise RefusedError("too_many_bytes", f"{_length(response)} listed, {limit} allowed")
        body = _body(response, limit)
        if len(body) > limit or response.tell() > limit:
            raise RefusedError("too_many_bytes", f"more than {limit}")
        return body, None

    def _file(self, url: str, end: float) -> str:
        """Text of a host's robots.txt or tdmrep.json, for `Hosts`; empty where it has none."""
        clock = _Clock(end - time.monotonic())
        return self._persist(lambda: self._file_once(url, clock), clock)

    def _file_once(self, url: str, clock: _Clock) -> str:
        # A drip of a robots.txt must not take the page's whole time, nor be taken for its lack.
        end = min(clock.end, time.monotonic() + self.settings.timeout_s)
        for _ in range(FILE_REDIRECTS + 1):
            try:
                with self._answer(
                    vetted(url), end, "text/plain, application/json, */*;q=0.1"
                ) as response:
                    location = _location(response)
                    if location is None:
                        return _text(response)
            except RefusedError as refusal:
                silent = refusal.fate in ("deadline", "timeout") and end < clock.end
                if silent:  # once is enough, and to be remembered
                    raise RefusedError("timeout", f"{self.settings.timeout_s} s") from refusal
                raise
            url = urljoin(url, location)
        return ""

    @contextmanager
    def _answer(self, url: str, end: float, accept: str) -> Iterator[BaseHTTPResponse]:
        """The answer to one request, its body still to be read inside the block.

        Raises:
            RefusedError: also for what goes wrong inside the block.
        """
        late = RefusedError("deadline", f"{self.settings.total_deadline_s} s")
        if time.monotonic() >= end:
            raise late
        target = urlsplit(url)
        connection = self._connection(target, end)
        try:
            with self.deadlines.until(end):
                headers = {**self.settings.headers, "Accept": accept}
                connection.request("GET", _path(target), headers=headers, preload_content=False)
                with closing(connection.getresponse()) as response:
                    yield response
            if time.monotonic() >= end:  # the end of the body may be ours, not the server's
                raise late
        except (HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            raise (late if time.monotonic() >= end else _classified(error)) from error
        finally:
            connection.close()

    def _connection(self, target: SplitResult, end: float) -> HTTPConnection:
        """A connection, not yet open, to an address that may be asked."""
        host = target.hostname or ""
        timeout = min(self.settings.timeout_s, end - time.monotonic())
        if target.scheme == "https":
            secure = _Secure(host, target.port or 443, timeout=timeout, ssl_context=self._tls)
            secure.open = self._dial
            return secure
        plain = _Plain(host, target.port or 80, timeout=timeout)
        plain.open = self._dial
        return plain

    def _dial(self, host: str, port: int) -> socket.socket:
        mapped = self.settings.connect_to.get(host)
        if mapped is not None:
            address, _, mapped_port = mapped.rpartition(":")
            sock = socket.create_connection((address, int(mapped_port)), self.settings.timeout_s)
        else:
            sock = dial(
                host,
                port,
                until=self.deadlines.end,
                timeout_s=self.settings.timeout_s,
                private=self.settings.allow_private_addresses,
            )
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.deadlines.watch(sock)
        return sock


class _Response(http.client.HTTPResponse):
    """An answer, after any that announce it: 103 Early Hints is passed over as 100 Continue is."""

    def _read_status(self) -> tuple[str, int, str]:
        version, status, reason = super()._read_status()  # type: ignore[misc]
        return version, 100 if 101 < status < 200 else status, reason


class _Plain(HTTPConnection):
    """urllib3's connection, opened by `open`."""

    open: Callable[[str, int], socket.socket]
    response_class = _Response

    def _new_conn(self) -> socket.socket:
        return self.open(self.host, self.port)


class _Secure(HTTPSConnection):
    """urllib3's connection, opened by `open`; TLS is its own."""

    open: Callable[[str, int], socket.socket]
    response_class = _Response

    def _new_conn(self) -> socket.socket:
        return self.open(self.host, self.port)


def _path(target: SplitResult) -> str:
    """What a request line names: vetted, and so ASCII without spaces."""
    return f"{target.path}?{target.query}" if target.query else target.path


def _body(response: BaseHTTPResponse, limit: int) -> bytes:
    """The body, decoded where it came compressed, until it or what was sent exceeds the limit."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in _ENCODINGS:  # whether others could be undone hangs on what is installed
        raise RefusedError("bad_encoding", f"Content-Encoding is {encoding[:40]!r}")
    chunks, size = [], 0
    while size <= limit and response.tell() <= limit and (chunk := response.read1(1 << 16)):
        chunks.append(chunk)
        size += len(chunk)
    return b"".join(chunks)


def _text(response: BaseHTTPResponse) -> str:
    """A host's file as far as it is read; empty where there is none."""
    if response.status >= 500:
        raise _failed(response)
    if response.status != 200:
        return ""
    body = _body(response, MAX_FILE_BYTES)
    if len(body) > MAX_FILE_BYTES:
        body = body[:MAX_FILE_BYTES].rpartition(b"\n")[0]  # no half line, which may forbid more
    return body.decode("utf-8-sig", "replace")


def _location(response: BaseHTTPResponse) -> str | None:
    """Where an answer sends us. Headers arrive as Latin-1; who writes accents means UTF-8."""
    location = response.get_redirect_location()
    if not location:
        return None
    try:
        return location.encode("latin-1").decode()
    except UnicodeError:
        return location


def _failed(response: BaseHTTPResponse) -> RefusedError:
    """The fate of an answer that is no picture."""
    after = _retry_after(response.headers) if response.status in (429, 503) else None
    detail = "" if after is None else f"Retry-After: {after:.0f} s"
    return RefusedError(
        f"http_{response.status}",
        detail,
        may_recover=response.status in MAY_RECOVER,
        retry_after_s=after,
    )


def _retry_after(headers: HTTPHeaderDict) -> float | None:
    """Seconds after which the server wants to be asked again, if it says so."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError, OSError):
        return None


def _checked(body: bytes, max_pixels: int) -> bytes:
    """The body, if its header is that of a picture that can be borne; nothing is decoded."""
    try:
        _headers().run(check, body, max_pixels)
    except UndecodableError as error:
        if error.kind.startswith("too "):
            raise RefusedError(error.kind.replace(" ", "_"), error.args[1]) from error
        raise RefusedError("not_an_image", f"{len(body)} bytes: {_glimpse(body)}") from error
    return body


@cache
def _headers() -> Decoders:
    """Two for all threads of this process: what they do hardly takes longer than telling it."""
    return Decoders(HEADER_S, at_once=2)


def _glimpse(body: bytes) -> str:
    """How something begins that is no picture, printable."""
    return repr(body[:24])[2:-1]


def _verify(body: bytes, expected: str) -> None:
    kind, _, listed = expected.partition(":")
    if kind not in ("md5", "sha256"):
        raise ValueError(f"expected is {expected!r}: give md5:HEX or sha256:HEX")
    found = hashlib.new(kind, body, usedforsecurity=False).hexdigest()
    if found != listed.lower():
        raise RefusedError("hash_mismatch", f"{kind}:{found}")


def _length(response: BaseHTTPResponse) -> int:
    """Listed length of the body; -1 where there is none."""
    text = response.headers.get("Content-Length", "")
    return int(text[:20]) if text.isascii() and text.isdigit() else -1


def _classified(error: Exception) -> RefusedError:
    """The class of a failure on the wire, and whether another try could help."""
    text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    cause = error.__cause__ if isinstance(error, ProtocolError | SSLError) else error
    if isinstance(cause, SilenceError | TimeoutError):
        return RefusedError("timeout", text, may_recover=True)
    if isinstance(cause, ConnectionRefusedError):
        return RefusedError("connection_refused", text)
    if isinstance(error, DecodeError):
        return RefusedError("bad_encoding", text)
    if isinstance(cause, http.client.IncompleteRead):
        return RefusedError("truncated", text, may_recover=True)
    if isinstance(cause, ssl.SSLError) and not isinstance(
        cause, ssl.SSLEOFError | ssl.SSLZeroReturnError
    ):
        return RefusedError("tls", text)
    if isinstance(cause, OSError):
        return RefusedError("connection_lost", text, may_recover=True)
    return RefusedError("bad_http", text)
