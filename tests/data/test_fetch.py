"""The vetted fetch against a hostile local web server."""

from __future__ import annotations

import io
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
import urllib3
from PIL import Image

from data.fetch import Fetcher, FetchSettings, RefusedError, is_public, opt_out


def png(size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


def huge_png(side: int) -> bytes:
    """A valid header of side² pixels over a few bytes."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    ihdr = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + ihdr + png()[33:]


class Hostile(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self):
        name = unquote(self.path).lstrip("/")
        self.asked.append(name)
        if name.isdigit():
            return self.answer(b"", status=int(name))
        return getattr(self, name.replace(" ", "_").replace("é", "e"))()

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def good(self):
        self.answer(png())

    def a_cafe(self):
        self.answer(png())

    def html(self):
        self.answer(b"<html>moved</html>")

    def svg(self):
        self.answer(b"<svg xmlns='http://www.w3.org/2000/svg'/>")

    def empty(self):
        self.answer(b"")

    def noai(self):
        self.answer(png(), X_Robots_Tag="noai, noimageai")

    def reserved(self):
        self.answer(png(), TDM_Reservation="1")

    def elsewhere(self):
        self.answer(b"", 302, Location="/good")

    def loop(self):
        self.answer(b"", 302, Location="/loop")

    def to_file(self):
        self.answer(b"", 302, Location="file:///etc/passwd")

    def to_private(self):
        self.answer(b"", 302, Location=f"http://127.0.0.1:{self.server.server_port}/good")

    def huge(self):
        self.answer(huge_png(30_000))

    def long(self):
        self.send_response(200)
        self.end_headers()  # no length is told
        self.wfile.write(bytes(1_000_000))

    def told_long(self):
        self.send_response(200)
        self.send_header("Content-Length", "200000000")
        self.end_headers()

    def drip(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(80):
            self.wfile.write(b"x")
            time.sleep(0.1)

    def drip_header(self):
        for _ in range(80):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.1)

    def mute(self):
        time.sleep(3)

    def once_503(self):
        first = self.asked.count("once_503") == 1
        self.answer(b"" if first else png(), 503 if first else 200)

    def log_message(self, *args):
        pass


@pytest.fixture
def site():
    handler = type("Handler", (Hostile,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # a client that hangs up is the point here
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetcher(site=None, **changes) -> Fetcher:
    settings = {
        "max_bytes": 100_000, "max_pixels": 1_000_000, "timeout_s": 1, "total_deadline_s": 1.5,
        "max_redirects": 3, "retries": 1, "allow_private_addresses": False,
        "honour_opt_outs": True, "user_agent": "test/0", "connect_to": {},
    }  # fmt: skip
    if site is not None:
        settings["connect_to"] = {"emoji.test": f"127.0.0.1:{site.server_port}"}
    return Fetcher(FetchSettings(**{**settings, **changes}))


def fate(fetch: Fetcher, url: str) -> str:
    with pytest.raises(RefusedError) as caught:
        fetch.fetch(url)
    return caught.value.fate


@pytest.mark.parametrize("path", ["good", "elsewhere", "a café"])
def test_pictures_are_fetched_also_behind_redirects_accents_and_spaces(site, path):
    assert fetcher(site).fetch(f"http://emoji.test/{path}") == png()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("404", "http_404"),
        ("html", "not_an_image"),
        ("svg", "not_an_image"),
        ("empty", "not_an_image"),
        ("noai", "opt_out"),
        ("reserved", "opt_out"),
        ("loop", "redirects"),
        ("to_file", "scheme"),
        ("to_private", "private_address"),
        ("huge", "too_many_pixels"),
        ("long", "too_many_bytes"),
        ("told_long", "too_many_bytes"),
    ],
)
def test_each_hostile_answer_ends_with_its_fate(site, path, expected):
    assert fate(fetcher(site), f"http://emoji.test/{path}") == expected


@pytest.mark.parametrize("path", ["drip", "drip_header"])
def test_a_drip_is_ended_by_the_total_deadline(site, path):
    begun = time.monotonic()
    assert fate(fetcher(site), f"http://emoji.test/{path}") == "deadline"
    assert time.monotonic() - begun < 3


def test_a_mute_server_is_a_timeout(site):
    assert fate(fetcher(site, timeout_s=0.3, retries=0), "http://emoji.test/mute") == "timeout"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("file:///etc/passwd", "scheme"),
        ("data:image/png;base64,AAAA", "scheme"),
        ("ftp://emoji.test/good", "scheme"),
        ("good.png", "scheme"),
        ("http://", "bad_url"),
        ("http://gone.invalid/1.png", "dns"),
        ("http://127.0.0.1/1.png", "private_address"),
        ("http://localhost/1.png", "private_address"),
        ("http://169.254.169.254/latest", "private_address"),
        ("http://[::1]/1.png", "private_address"),
        ("http://[::ffff:10.0.0.1]/1.png", "private_address"),
    ],
)
def test_what_must_not_be_asked_is_not(url, expected):
    assert fate(fetcher(), url) == expected


def test_private_addresses_can_be_allowed(site):
    url = f"http://127.0.0.1:{site.server_port}/good"
    assert fetcher(allow_private_addresses=True).fetch(url) == png()


def test_retries_happen_only_where_they_can_help(site):
    fetch = fetcher(site, total_deadline_s=5)
    assert fetch.fetch("http://emoji.test/once_503") == png()
    assert fate(fetch, "http://emoji.test/404") == "http_404"
    assert fate(fetch, "http://emoji.test/noai") == "opt_out"
    assert fate(fetch, "http://emoji.test/429") == "http_429"
    counts = {name: site.RequestHandlerClass.asked.count(name) for name in ("404", "noai", "429")}
    assert counts == {"404": 1, "noai": 1, "429": 2}


def test_a_refused_connection_has_its_own_fate(site):
    connect_to = {"emoji.test": "127.0.0.1:1"}
    assert fate(fetcher(connect_to=connect_to), "http://emoji.test/x") == "connection_refused"


@pytest.mark.parametrize(
    ("value", "binds"),
    [("noai", True), ("all", False), ("NoImageAI", True), ("otherbot: noai", False)],
)
def test_opt_outs_bind_when_they_are_addressed_to_all(value, binds):
    headers = urllib3.HTTPHeaderDict({"X-Robots-Tag": value})
    assert (opt_out(headers) is not None) == binds


@pytest.mark.parametrize(
    ("address", "public"),
    [("8.8.8.8", True), ("10.1.2.3", False), ("100.64.0.1", False), ("fe80::1%eth0", False),
     ("::ffff:192.168.0.1", False), ("224.0.0.1", False), ("0.0.0.0", False)],
)  # fmt: skip
def test_public_means_the_open_internet(address, public):
    assert is_public(address) == public
