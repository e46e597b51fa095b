"""A vetted fetch in the place of img2dataset's own, and the process that runs img2dataset with it.

Only http and https, only public addresses (each redirect vetted again, and connected to the very
address that was vetted), bodies and time bounded, opt-outs honoured, an honest User-Agent.
`python -m data.fetch JOB.json` is started by download.py; img2dataset's spawned workers import
this main module again, and so get the same fetch.
"""

from __future__ import annotations

import io
import ipaddress
import json
import os
import random
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import urllib3
from PIL import Image
from pydantic import BaseModel, ConfigDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import parse_url

SETTINGS = "DATA_FETCH_SETTINGS"
"""Environment variable that carries `FetchSettings` as JSON to img2dataset's workers."""
OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex"})
"""`X-Robots-Tag` directives that reserve a picture (img2dataset's list)."""


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
    user_agent: str
    connect_to: dict[str, str] = {}
    """Host → "address:port" to connect to instead, unvetted, like curl's `--connect-to`."""


Dial = Callable[[HTTPConnection], socket.socket]


class RefusedError(Exception):
    """A URL that gives no picture: `fate` is the class, the text its detail."""

    def __init__(self, fate: str, detail: str = "", *, may_recover: bool = False) -> None:
        super().__init__(detail)
        self.fate = fate
        self.may_recover = may_recover


class Fetcher:
    """Fetches pictures under one set of limits. One per process; its threads share it."""

    def __init__(self, settings: FetchSettings) -> None:
        self.settings = settings
        self.deadlines = Deadlines()
        self.pool = urllib3.PoolManager(num_pools=256, maxsize=64, retries=False)
        # A new connection goes through `_dial`; everything else of HTTP and TLS is urllib3's.
        self.pool.pool_classes_by_scheme = {
            "http": _pool_class(urllib3.HTTPConnectionPool, HTTPConnection, self._dial),
            "https": _pool_class(urllib3.HTTPSConnectionPool, HTTPSConnection, self._dial),
        }

    def fetch(self, url: str) -> bytes:
        """The bytes of the picture at `url`.

        Raises:
            RefusedError: with the class of what went wrong.
        """
        end = time.monotonic() + self.settings.total_deadline_s
        for attempt in range(self.settings.retries + 1):
            try:
                return self._follow(url, end)
            except RefusedError as refusal:
                pause = 0.5 * 2**attempt * random.uniform(0.5, 1.5)
                last = attempt == self.settings.retries
                if last or not refusal.may_recover or time.monotonic() + pause > end:
                    raise
                time.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _follow(self, url: str, end: float) -> bytes:
        for _ in range(self.settings.max_redirects + 1):
            body, location = self._get(_vetted(url), end)
            if location is None:
                return _checked(body, self.settings.max_pixels)
            url = urljoin(url, location)
        raise RefusedError("redirects", f"more than {self.settings.max_redirects}")

    def _get(self, url: str, end: float) -> tuple[bytes, str | None]:
        """Body, or the place it moved to, of one request."""
        left = end - time.monotonic()
        if left <= 0:
            raise RefusedError("deadline", f"{self.settings.total_deadline_s} s")
        timeout = urllib3.Timeout(min(self.settings.timeout_s, left))
        # No connection is kept: each is opened, vetted and timed by the request that uses it.
        headers = {
            "User-Agent": self.settings.user_agent,
            "Accept": "image/*",
            "Connection": "close",
        }
        try:
            with self.deadlines.until(end):
                response = self.pool.request(
                    "GET", url, headers=headers, timeout=timeout, redirect=False,
                    preload_content=False, decode_content=False,
                )  # fmt: skip
                try:
                    answer = self._read(response)
                finally:
                    response.close()
            if time.monotonic() < end:  # else the end of the body may be ours, not the server's
                return answer
            raise RefusedError("deadline", f"{self.settings.total_deadline_s} s")
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if refusal := _refusal_behind(error):
                raise refusal from None
            if time.monotonic() >= end:
                raise RefusedError("deadline", f"{self.settings.total_deadline_s} s") from error
            raise _classified(error) from error

    def _read(self, response: urllib3.BaseHTTPResponse) -> tuple[bytes, str | None]:
        if location := response.get_redirect_location():
            return b"", location
        if response.status != 200:
            may_recover = response.status in (408, 425, 429, 500, 502, 503, 504)
            raise RefusedError(f"http_{response.status}", may_recover=may_recover)
        if self.settings.honour_opt_outs and (directive := opt_out(response.headers)):
            raise RefusedError("opt_out", directive)
        limit, chunks, size = self.settings.max_bytes, [], 0
        if _length(response) > limit:
            raise RefusedError("too_many_bytes", f"{_length(response)} listed, {limit} allowed")
        while chunk := response.read1(1 << 16):
            chunks.append(chunk)
            size += len(chunk)
            if size > limit:
                raise RefusedError("too_many_bytes", f"more than {limit}")
        return b"".join(chunks), None

    def _dial(self, connection: HTTPConnection) -> socket.socket:
        """Connect to an address of the connection's host that may be asked."""
        timeout = connection.timeout if isinstance(connection.timeout, int | float) else None
        mapped = self.settings.connect_to.get(connection.host)
        if mapped is not None:
            address, _, port = mapped.rpartition(":")
            sock = socket.create_connection((address, int(port)), timeout)
        else:
            sock = self._dial_public(connection.host, connection.port or 80, timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.deadlines.watch(sock)
        return sock

    def _dial_public(self, host: str, port: int, timeout: float | None) -> socket.socket:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            again = getattr(error, "errno", None) == socket.EAI_AGAIN
            raise RefusedError("dns", str(error), may_recover=again) from error
        addresses = [str(entry[4][0]) for entry in found]
        allowed = [a for a in addresses if self.settings.allow_private_addresses or is_public(a)]
        if not allowed:
            raise RefusedError("private_address", f"{host} is {', '.join(sorted(set(addresses)))}")
        last: OSError | None = None
        for address in allowed:
            try:
                return socket.create_connection((address, port), timeout)
            except OSError as failure:
                last = failure
        raise last or OSError("no address")


class Deadlines:
    """Ends connections whose request outlasts its deadline, wherever it is stuck.

    A socket's own timeout restarts with each byte; a server that drips them would hold a thread
    for ever. One thread a process looks at all of them.
    """

    def __init__(self) -> None:
        self._here = threading.local()
        self._lock = threading.Lock()
        self._watched: dict[int, tuple[float, socket.socket]] = {}
        threading.Thread(target=self._sweep, daemon=True).start()

    @contextmanager
    def until(self, end: float) -> Iterator[None]:
        """Connections that this thread opens inside end at `end` (monotonic seconds)."""
        self._here.end = end
        self._here.opened = []
        try:
            yield
        finally:
            with self._lock:
                for key in self._here.opened:
                    self._watched.pop(key)[1].close()

    def watch(self, sock: socket.socket) -> None:
        """Put a new connection under the deadline of the block this thread is in."""
        with self._lock:
            duplicate = socket.socket(fileno=os.dup(sock.fileno()))  # outlives TLS wrapping
            self._watched[id(duplicate)] = (self._here.end, duplicate)
            self._here.opened.append(id(duplicate))

    def _sweep(self) -> None:
        while True:
            time.sleep(0.25)
            now = time.monotonic()
            with self._lock:
                for end, sock in self._watched.values():
                    if now > end:
                        with suppress(OSError):  # already closed by the other side
                            sock.shutdown(socket.SHUT_RDWR)


def is_public(address: str) -> bool:
    """Whether an address belongs to the open internet: not loopback, private, link-local, …"""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour  # an IPv4 address in IPv6 clothes
        ip = inner or ip
    return ip.is_global and not ip.is_multicast


def opt_out(headers: urllib3.HTTPHeaderDict) -> str | None:
    """The header by which a server reserves a picture, if it does.

    A directive addressed to another crawler by name (`otherbot: noai`) does not bind us.
    """
    for value in headers.getlist("X-Robots-Tag"):
        agent, _, rest = value.rpartition(":")
        for directive in rest.split(","):
            if not agent.strip() and directive.strip().lower() in OPT_OUTS:
                return f"X-Robots-Tag: {value}"
    if headers.get("TDM-Reservation", "").strip() == "1":
        return "TDM-Reservation: 1"
    return None


def _vetted(url: str) -> str:
    """The URL in ASCII, as a request needs it. Refuses other schemes than http and https."""
    scheme = urlsplit(url.strip()).scheme.lower()
    if scheme not in ("http", "https"):
        raise RefusedError("scheme", scheme or "none")
    try:
        parsed = parse_url(url.strip())  # percent-encodes, and IDNA for the host
    except urllib3.exceptions.HTTPError as error:
        raise RefusedError("bad_url", str(error)) from error
    if not parsed.host:
        raise RefusedError("bad_url", "no host")
    return parsed.url


def _checked(body: bytes, max_pixels: int) -> bytes:
    """The body, if its header is that of a picture of a bearable size; nothing is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(body)) as image:
                pixels = image.width * image.height
    except Image.DecompressionBombError as error:
        raise RefusedError("too_many_pixels", str(error)) from error
    except Exception as error:  # a hostile header may raise anything
        raise RefusedError("not_an_image", f"{len(body)} bytes") from error
    if pixels > max_pixels:
        raise RefusedError("too_many_pixels", f"{pixels}, {max_pixels} allowed")
    return body


def _length(response: urllib3.BaseHTTPResponse) -> int:
    """Listed length of the body; -1 where there is none."""
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdigit() else -1


def _refusal_behind(error: BaseException | None) -> RefusedError | None:
    """Our own refusal, where urllib3 has wrapped it."""
    while error is not None and not isinstance(error, RefusedError):
        error = error.__cause__ or error.__context__
    return error


def _classified(error: Exception) -> RefusedError:
    """The class of a failure on the wire, and whether another try could help."""
    text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    if isinstance(error, urllib3.exceptions.TimeoutError | TimeoutError):
        return RefusedError("timeout", text, may_recover=True)
    if isinstance(error, urllib3.exceptions.SSLError):
        return RefusedError("tls", text)
    if isinstance(error, urllib3.exceptions.LocationParseError | UnicodeError):
        return RefusedError("bad_url", text)
    return RefusedError("connection_lost", text, may_recover=True)


def _pool_class(pool: type, connection: type, dial: Dial) -> type:
    """A urllib3 pool whose connections are opened by `dial`."""

    def new_conn(self: HTTPConnection) -> socket.socket:
        try:
            return dial(self)
        except ConnectionRefusedError as error:
            refusal = RefusedError("connection_refused", str(error))
        except TimeoutError as error:
            refusal = RefusedError("timeout", str(error), may_recover=True)
        except RefusedError as error:
            refusal = error
        raise OSError(refusal.fate) from refusal  # urllib3 lets OSErrors pass, and no others

    vetted = type(connection.__name__, (connection,), {"_new_conn": new_conn})
    return type(pool.__name__, (pool,), {"ConnectionCls": vetted})


Fetched = tuple[int, io.BytesIO | None, str | None]


def download_image(row: tuple[int, str], fetcher: Fetcher) -> Fetched:
    """What img2dataset expects of its download: (key, stream or None, error or None)."""
    key, url = row
    try:
        return key, io.BytesIO(fetcher.fetch(url)), None
    except RefusedError as refusal:
        return key, None, f"{refusal.fate}: {refusal}"
    except Exception as error:
        return key, None, f"fault: {type(error).__name__}: {error}"


def install() -> None:
    """Put the vetted fetch in img2dataset's place, and end with the process that started us."""
    import img2dataset.downloader

    fetcher = Fetcher(FetchSettings.model_validate_json(os.environ[SETTINGS]))
    replacement = partial(_as_img2dataset_calls_it, fetcher=fetcher)
    img2dataset.downloader.download_image = replacement
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _as_img2dataset_calls_it(
    row: tuple[int, str],
    timeout: float,
    user_agent_token: str | None,
    disallowed_header_directives: object,
    *,
    fetcher: Fetcher,
) -> Fetched:
    return download_image(row, fetcher)  # its settings are ours already


def _end_with(parent: int) -> None:
    """img2dataset leaves orphans when it is killed: each process watches its parent."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    """Run img2dataset with the arguments in the JSON file named on the command line."""
    import img2dataset

    img2dataset.download(**json.loads(Path(sys.argv[1]).read_text()))


if __name__ in ("__main__", "__mp_main__"):
    install()
if __name__ == "__main__":
    main()
