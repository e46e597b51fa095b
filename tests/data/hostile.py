"""A local web site of good pictures and of everything that goes wrong on the web.

`python tests/data/hostile.py --port 8000` serves it; `/` lists its pages. Every page is a method
of `Site` whose decorator says what a fetch must make of it, and whose docstring says why. Pages
under a folder take a number, so that a list of any length can be made of them.

Fates hold for a fetch with the default limits that reaches the site by a name of `connect_to` and
may not ask private addresses.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

import numpy as np
from PIL import Image

HOST = "hostile.test"
PAGES: dict[str, tuple[str, str]] = {}
"""Path → (fate of its fetch, what it does). A path that ends in `/` takes a number and a suffix,
as in `/good/123.png`."""
_METHODS: dict[str, Callable[[Site, str], None]] = {}

HOSTS = {
    "robots-404.test": ("ok", "has no robots.txt: all is allowed"),
    "robots-403.test": ("ok", "shows nobody its robots.txt: all is allowed (RFC 9309)"),
    "robots-503.test": ("robots_txt", "cannot show its robots.txt: nothing is allowed"),
    "robots-reset.test": ("robots_txt", "hangs up when asked for robots.txt"),
    "robots-mute.test": ("robots_txt", "never answers when asked for robots.txt"),
    "robots-drip.test": ("robots_txt", "sends its robots.txt a byte at a time"),
    "robots-all.test": ("robots_txt", "disallows everything for everybody"),
    "robots-us.test": ("robots_txt", "disallows everything for us"),
    "robots-them.test": ("ok", "disallows everything for another crawler"),
    "robots-long.test": ("ok", "forbids everything, but beyond 500 KiB of its robots.txt"),
    "robots-elsewhere.test": ("robots_txt", "keeps its robots.txt behind a redirect"),
    "robots-loop.test": ("ok", "redirects its robots.txt for ever: as if it had none"),
    "robots-private.test": ("private_address", "redirects its robots.txt to a private address"),
    "robots-garbage.test": ("ok", "has random bytes for a robots.txt"),
    "robots-slow.test": ("ok", "wants 0.3 s between two requests"),
    "robots-slowest.test": ("ok", "wants an hour between two requests"),
    "tdmrep.test": ("opt_out", "reserves everything in its tdmrep.json"),
    "tdmrep-other.test": ("ok", "reserves another folder in its tdmrep.json"),
    "tdmrep-garbage.test": ("ok", "has no JSON in its tdmrep.json"),
    "tdmrep-503.test": ("ok", "cannot show its tdmrep.json: it reserves nothing"),
}
"""Name → (fate of /good/1.png there, what it does): hosts that differ in what they say of
themselves. All are this server, which goes by the Host header."""


def page(path: str, fate: str) -> Callable:
    """Serve `path` with the method; a fetch of it ends with `fate`."""

    def register(method: Callable[[Site, str], None]) -> Callable:
        PAGES[path] = (fate, (method.__doc__ or "").strip())
        _METHODS[path] = method
        return method

    return register


# Pictures


def picture(number: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A small picture that looks like no other number's."""
    colours = np.random.default_rng(number).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, codec: str, **options: object) -> bytes:
    """The bytes of a file with this picture."""
    buffer = io.BytesIO()
    image.save(buffer, codec, **options)
    return buffer.getvalue()


CODECS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "avif": "AVIF"}


@cache
def png() -> bytes:
    """Picture 0: what pages show that are about something else."""
    return encoded(picture(0), "PNG")


def huge_png(side: int) -> bytes:
    """A valid header of side² pixels over a few bytes."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    ihdr = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + ihdr + png()[33:]


def number_of(path: str) -> int:
    """123 of `/good/123.png`; 0 where there is none."""
    digits = path.rpartition("/")[2].partition(".")[0]
    return int(digits) if digits.isdigit() else 0


class Site(BaseHTTPRequestHandler):
    """One request. Each `@page` is one behaviour; its argument is the path without query."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        """Answer by path, or by host where a host is asked what it says of itself."""
        self.close_connection = True
        path = unquote(urlsplit(self.path).path)
        host = self.headers.get("Host", "").partition(":")[0]
        self.server.count(host, self.path, self.headers)
        if path in ("/robots.txt", "/.well-known/tdmrep.json"):
            return self.host_says(host, path)
        method = _METHODS.get(path) or _METHODS.get(path[: path.rfind("/") + 1])
        return method(self, path) if method else self.answer(b"", 404)

    def answer(self, body: bytes, status: int = 200, **headers: str | list[str]) -> None:
        """Send a whole answer; underscores in names of headers are hyphens."""
        self.head(status, **{"Content_Length": str(len(body)), **headers})
        self.wfile.write(body)

    def head(self, status: int = 200, **headers: str | list[str]) -> None:
        """Send status and headers, and only these."""
        self.send_response(status)
        for name, values in headers.items():
            for value in [values] if isinstance(values, str) else values:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send_to(self, location: str, status: int = 302) -> None:
        """Redirect."""
        self.answer(b"", status, Location=location)

    def drip(self, data: bytes, seconds: float = 60) -> None:
        """Send bytes ten a second, as long as somebody listens."""
        for number in range(int(seconds * 10)):
            self.wfile.write(data[number : number + 1] or b"x")
            time.sleep(0.1)

    def log_message(self, *args: object) -> None:
        """Silent."""

    # Good pictures

    @page("/", "not_an_image")
    def index(self, path: str) -> None:
        """This list."""
        lines = [f"{quote(p):30} {fate:20} {doc}" for p, (fate, doc) in sorted(PAGES.items())]
        self.answer("\n".join(lines).encode(), Content_Type="text/plain; charset=utf-8")

    @page("/good/", "ok")
    def good(self, path: str) -> None:
        """The picture of a number, as png, jpg, webp, gif or avif."""
        codec = CODECS.get(path.rpartition(".")[2], "PNG")
        self.answer(encoded(picture(number_of(path)), codec))

    @page("/same/", "ok")
    def same(self, path: str) -> None:
        """The same bytes for every number."""
        self.answer(png())

    @page("/a café/", "ok")
    def accented(self, path: str) -> None:
        """A path with an accent and a space."""
        self.answer(encoded(picture(number_of(path)), "PNG"))

    @page("/cmyk.jpg", "ok")
    def cmyk(self, path: str) -> None:
        """A picture made for print."""
        self.answer(encoded(picture(1).convert("CMYK"), "JPEG"))

    @page("/gray16.png", "ok")
    def gray16(self, path: str) -> None:
        """Sixteen bits a pixel."""
        gray = np.asarray(picture(2).convert("L"), np.uint16) * 257
        self.answer(encoded(Image.fromarray(gray), "PNG"))

    @page("/gray.jpg", "ok")
    def gray(self, path: str) -> None:
        """No colours."""
        self.answer(encoded(picture(3).convert("L"), "JPEG"))

    @page("/rotated.jpg", "ok")
    def rotated(self, path: str) -> None:
        """Lies on its side, as EXIF says."""
        exif = Image.Exif()
        exif[0x0112] = 6
        sideways = picture(4).transpose(Image.Transpose.ROTATE_90)
        self.answer(encoded(sideways, "JPEG", exif=exif))

    @page("/alpha.png", "ok")
    def alpha(self, path: str) -> None:
        """Half transparent."""
        image = picture(5).convert("RGBA")
        image.putalpha(128)
        self.answer(encoded(image, "PNG"))

    @page("/palette.png", "ok")
    def palette(self, path: str) -> None:
        """Colours from a palette."""
        self.answer(encoded(picture(6).quantize(32), "PNG"))

    @page("/cut.jpg", "ok")
    def cut(self, path: str) -> None:
        """Half a picture, told as a whole: only decoding finds out."""
        body = encoded(picture(7), "JPEG", quality=95)
        self.answer(body[: len(body) // 2])

    # No pictures

    @page("/html", "not_an_image")
    def html(self, path: str) -> None:
        """A web page where a picture was."""
        self.answer(b"<!doctype html><p>moved", Content_Type="image/jpeg")

    @page("/svg", "not_an_image")
    def svg(self, path: str) -> None:
        """A drawing without pixels."""
        self.answer(b"<svg xmlns='http://www.w3.org/2000/svg'/>", Content_Type="image/svg+xml")

    @page("/empty", "not_an_image")
    def empty(self, path: str) -> None:
        """No bytes."""
        self.answer(b"")

    @page("/random", "not_an_image")
    def random(self, path: str) -> None:
        """Noise."""
        self.answer(random.Random(0).randbytes(5000))

    @page("/pickle", "not_an_image")
    def pickle(self, path: str) -> None:
        """A pickle, which would run a command."""
        self.answer(b"cos\nsystem\n(S'false'\ntR.")

    @page("/144mpx.png", "too_many_pixels")
    def mpx144(self, path: str) -> None:
        """A header of 144 megapixels."""
        self.answer(huge_png(12_000))

    @page("/900mpx.png", "too_many_pixels")
    def mpx900(self, path: str) -> None:
        """A header of 900 megapixels, beyond what Pillow opens."""
        self.answer(huge_png(30_000))

    @page("/long", "too_many_bytes")
    def long(self, path: str) -> None:
        """200 MB of body, of no told length."""
        self.head(Connection="close")
        for _ in range(200):
            self.wfile.write(bytes(1_000_000))

    @page("/told-long", "too_many_bytes")
    def told_long(self, path: str) -> None:
        """Tells a length of 200 MB."""
        self.head(Content_Length="200000000")

    # Statuses

    @page("/503-once/", "ok")
    def once_503(self, path: str) -> None:
        """503 when asked first, and then a picture."""
        first = self.server.asked[self.path] == 1
        self.answer(b"", 503) if first else self.answer(png())

    @page("/503-for-a-second/", "ok")
    def retry_after(self, path: str) -> None:
        """503 with Retry-After: 1 when asked first, and then a picture."""
        first = self.server.asked[self.path] == 1
        self.answer(b"", 503, Retry_After="1") if first else self.answer(png())

    @page("/503-for-an-hour", "http_503")
    def retry_later(self, path: str) -> None:
        """503 with Retry-After: 3600, which no fetch waits for."""
        self.answer(b"", 503, Retry_After="3600")

    @page("/206", "http_206")
    def partial(self, path: str) -> None:
        """A part that nobody asked for."""
        self.answer(png()[:50], 206, Content_Range=f"bytes 0-49/{len(png())}")

    # Opt-outs

    @page("/noai/", "opt_out")
    def noai(self, path: str) -> None:
        """Reserved for all."""
        self.answer(png(), X_Robots_Tag="noai, noimageai")

    @page("/noindex", "opt_out")
    def noindex(self, path: str) -> None:
        """Reserved in the second of two headers, in capitals."""
        self.answer(png(), X_Robots_Tag=["nofollow", "NoImageIndex"])

    @page("/noai-for-us", "opt_out")
    def noai_us(self, path: str) -> None:
        """Reserved for us by name."""
        self.answer(png(), X_Robots_Tag="gigagan-pipeline: noai")

    @page("/noai-for-them", "ok")
    def noai_them(self, path: str) -> None:
        """Reserved for another crawler."""
        self.answer(png(), X_Robots_Tag="otherbot: noai, noindex")

    @page("/unavailable-after", "ok")
    def unavailable_after(self, path: str) -> None:
        """A directive with a date, which reserves nothing."""
        self.answer(png(), X_Robots_Tag="unavailable_after: Wed, 25 Jun 2031 15:00:00 GMT")

    @page("/tdm-reservation", "opt_out")
    def tdm(self, path: str) -> None:
        """Reserved by the TDM protocol's header."""
        self.answer(png(), TDM_Reservation="1")

    @page("/forbidden/", "robots_txt")
    def forbidden(self, path: str) -> None:
        """A folder that robots.txt disallows."""
        self.answer(png())

    @page("/reserved/", "opt_out")
    def reserved(self, path: str) -> None:
        """A folder that tdmrep.json reserves."""
        self.answer(png())

    # Redirects

    @page("/elsewhere/", "ok")
    def elsewhere(self, path: str) -> None:
        """Three redirects: to a path, to a place beside, and to a host without scheme."""
        number = number_of(path)
        if "b" not in self.path:
            return self.send_to(f"/elsewhere/{number}.b")
        if "bb" not in self.path:
            return self.send_to(f"{number}.bb", 301)
        return self.send_to(f"//{self.headers['Host']}/good/{number}.png", 307)

    @page("/to-accents", "ok")
    def to_accents(self, path: str) -> None:
        """A Location with an accent and a space in raw UTF-8."""
        self.send_to("/a café/5.png".encode().decode("latin-1"))

    @page("/loop", "redirects")
    def loop(self, path: str) -> None:
        """Redirects to itself."""
        self.send_to("/loop")

    @page("/chain/", "redirects")
    def chain(self, path: str) -> None:
        """Redirects to the next number for ever."""
        self.send_to(f"/chain/{number_of(path) + 1}")

    @page("/to-nowhere", "http_302")
    def to_nowhere(self, path: str) -> None:
        """A redirect with an empty Location."""
        self.send_to("")

    @page("/to-file", "scheme")
    def to_file(self, path: str) -> None:
        """A redirect into the file system."""
        self.send_to("file:///etc/passwd")

    @page("/to-data", "scheme")
    def to_data(self, path: str) -> None:
        """A redirect to a picture in the URL."""
        self.send_to("data:image/png;base64,AAAA")

    @page("/to-loopback", "private_address")
    def to_loopback(self, path: str) -> None:
        """A redirect to this machine's own address."""
        self.send_to(f"http://127.0.0.1:{self.server.server_port}/good/1.png")

    @page("/to-hex-loopback", "private_address")
    def to_hex_loopback(self, path: str) -> None:
        """The same in another spelling."""
        self.send_to("http://0x7f.1:8080/good/1.png")

    @page("/to-metadata", "private_address")
    def to_metadata(self, path: str) -> None:
        """A redirect to where clouds keep their machines' secrets."""
        self.send_to("http://169.254.169.254/latest/meta-data")

    @page("/to-mail", "bad_port")
    def to_mail(self, path: str) -> None:
        """A redirect to a mail server's port."""
        self.send_to(f"http://{HOST}:25/")

    @page("/to-crlf", "bad_url")
    def to_crlf(self, path: str) -> None:
        """A redirect whose host has a control character in it."""
        self.send_to("http://hostile\x0b.test/")

    # The wire

    @page("/truncated", "truncated")
    def truncated(self, path: str) -> None:
        """Less body than was told."""
        self.head(Content_Length=str(len(png()) + 100))
        self.wfile.write(png())

    @page("/longer", "ok")
    def longer(self, path: str) -> None:
        """More body than was told: what was told is the picture."""
        self.head(Content_Length=str(len(png())))
        self.wfile.write(png() + b"and more")

    @page("/unlimited", "ok")
    def unlimited(self, path: str) -> None:
        """A body that ends with the connection."""
        self.head(Connection="close")
        self.wfile.write(png())

    @page("/chunked", "ok")
    def chunked(self, path: str) -> None:
        """A body in chunks."""
        self.head(Transfer_Encoding="chunked")
        for part in (png()[:33], png()[33:]):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    @page("/early-hints", "ok")
    def early_hints(self, path: str) -> None:
        """Two answers that announce the one that counts."""
        self.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </x.css>; rel=preload\r\n\r\n")
        self.wfile.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        self.answer(png())

    @page("/chunked-cut", "truncated")
    def chunked_cut(self, path: str) -> None:
        """A body in chunks, without the last."""
        self.head(Transfer_Encoding="chunked")
        self.wfile.write(b"%x\r\n%b\r\n" % (33, png()[:33]))

    @page("/gzip", "ok")
    def gzip(self, path: str) -> None:
        """Compressed, though nobody asked for that."""
        self.answer(gzip.compress(png()), Content_Encoding="gzip")

    @page("/gzip-bomb", "too_many_bytes")
    def gzip_bomb(self, path: str) -> None:
        """200 MB of zeros in 200 kB."""
        self.answer(_bomb(), Content_Encoding="gzip")

    @page("/gzip-lie", "bad_encoding")
    def gzip_lie(self, path: str) -> None:
        """Not compressed, though it says so."""
        self.answer(png(), Content_Encoding="gzip")

    @page("/brotli", "bad_encoding")
    def brotli(self, path: str) -> None:
        """Compressed in a way that we do not undo, and have not asked for."""
        self.answer(b"\x0b\x02\x80" + bytes(100), Content_Encoding="br")

    @page("/two-lengths", "bad_http")
    def two_lengths(self, path: str) -> None:
        """Two lengths that differ."""
        self.head(Content_Length=["5", "7"])
        self.wfile.write(bytes(7))

    @page("/no-status", "bad_http")
    def no_status(self, path: str) -> None:
        """Something else than HTTP."""
        self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")

    @page("/long-header", "bad_http")
    def long_header(self, path: str) -> None:
        """A header of 100 kB."""
        self.head(X_Long="x" * 100_000)

    @page("/many-headers", "bad_http")
    def many_headers(self, path: str) -> None:
        """A thousand headers."""
        self.head(X_Many=["x"] * 1000)

    @page("/hang-up", "connection_lost")
    def hang_up(self, path: str) -> None:
        """Ends the connection without a word."""

    @page("/reset", "connection_lost")
    def reset(self, path: str) -> None:
        """Resets the connection in the middle of the body."""
        self.head(Content_Length="100000")
        self.wfile.write(png())
        self.connection.setsockopt(_SOCKET, _LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.wfile.close()
        self.connection.close()

    @page("/drip", "deadline")
    def drip_body(self, path: str) -> None:
        """A picture a few bytes a second."""
        self.head(Connection="close")
        self.drip(png())

    @page("/drip-header", "deadline")
    def drip_header(self, path: str) -> None:
        """A status line a few bytes a second."""
        self.drip(b"HTTP/1.1 200 O")

    @page("/mute", "timeout")
    def mute(self, path: str) -> None:
        """Never answers."""
        self.server.closing.wait(60)

    # What hosts say of themselves

    def host_says(self, host: str, path: str) -> None:
        """robots.txt or tdmrep.json of this host; the site's own where the name means nothing."""
        kind, _, rest = host.removesuffix(".test").partition("-")
        if path != "/robots.txt":
            return self.tdmrep(rest) if kind == "tdmrep" else self.own_tdmrep()
        if kind != "robots":
            return self.answer(b"User-agent: *\nDisallow: /forbidden/\n")
        return self.robots(rest)

    def own_tdmrep(self) -> None:
        """Reserves a folder."""
        rules = [{"location": "/reserved/", "tdm-reservation": 1}]
        self.answer(json.dumps(rules).encode(), Content_Type="application/json")

    def tdmrep(self, kind: str) -> None:
        """The tdmrep.json of a host called tdmrep-KIND.test."""
        if kind == "503":
            return self.answer(b"", 503)
        rules = {
            "": [
                {"location": "/elsewhere", "tdm-reservation": 0},
                {"location": "/*.png$", "tdm-reservation": 1, "tdm-policy": "https://x.test/"},
            ],
            "other": [{"location": "/elsewhere", "tdm-reservation": 1}],
        }
        text = json.dumps(rules[kind]) if kind in rules else "[{]"
        return self.answer(text.encode(), Content_Type="application/json")

    def robots(self, kind: str) -> None:
        """The robots.txt of a host called robots-KIND.test."""
        texts = {
            "all": "User-agent: *\nDisallow: /\n",
            "us": "User-agent: *\nAllow: /\n\nUser-agent: GigaGAN-Pipeline\nDisallow: /good\n",
            "them": "User-agent: otherbot\nDisallow: /\n\nUser-agent: *\nDisallow: /private\n",
            "long": "User-agent: *\n" + "# not yet\n" * 52_000 + "Disallow: /\n",
            "slow": "User-agent: *\nCrawl-delay: 0.3\n",
            "slowest": "User-agent: *\nCrawl-delay: 3600\n",
        }
        targets = {"loop": "/robots.txt", "private": "http://10.1.2.3/", "elsewhere": "/robots-2"}
        if kind.isdigit():
            self.answer(b"Disallow", int(kind))
        elif kind == "reset":
            return
        elif kind == "mute":
            self.server.closing.wait(60)
        elif kind == "drip":
            self.head(Connection="close")
            self.drip(b"User-agent: *")
        elif kind in targets:
            self.send_to(targets[kind])
        elif kind == "garbage":
            self.answer(random.Random(1).randbytes(3000))
        else:
            self.answer(texts[kind].encode(), Content_Type="text/plain")

    @page("/robots-2", "not_an_image")
    def robots_2(self, path: str) -> None:
        """Where robots-elsewhere.test keeps its robots.txt."""
        self.answer(b"\xef\xbb\xbfUser-agent: *\r\nDisallow: /\r\n")


def _status_page(status: int) -> None:
    def answer(self: Site, path: str) -> None:
        self.answer(b"", status)

    answer.__doc__ = f"Answers {status}."
    page(f"/{status}", f"http_{status}")(answer)


for _status in (204, 304, 400, 401, 403, 404, 410, 429, 451, 500, 502, 503):
    _status_page(_status)

_SOCKET, _LINGER = 1, 13  # SOL_SOCKET and SO_LINGER


@cache
def _bomb() -> bytes:
    return gzip.compress(bytes(20_000_000)) * 10


class Server(ThreadingHTTPServer):
    """The site, and what it was asked."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Site)
        self.asked: Counter[str] = Counter()
        """How often each path was asked for, as it was sent."""
        self.asked_hosts: Counter[tuple[str, str]] = Counter()
        """The same by host and path."""
        self.headers: dict[str, str] = {}
        """Of the last request."""
        self.closing = threading.Event()
        self._lock = threading.Lock()

    def count(self, host: str, path: str, headers: object) -> None:
        """Note a request."""
        with self._lock:
            self.asked[path] += 1
            self.asked_hosts[host, path] += 1
            self.headers = dict(headers)

    def connect_to(self, *names: str) -> dict[str, str]:
        """For FetchSettings: the site's names, and others, lead here."""
        here = f"127.0.0.1:{self.server_port}"
        return dict.fromkeys((HOST, *HOSTS, *names), here)

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is the point here."""


@contextmanager
def serve(port: int = 0) -> Iterator[Server]:
    """Serve the site on loopback until the block ends."""
    server = Server(port)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    with serve(parser.parse_args().port) as server:
        for path, (fate, doc) in sorted(PAGES.items()):
            print(f"http://127.0.0.1:{server.server_port}{quote(path):24} {fate:18} {doc}")
        for name, (fate, doc) in HOSTS.items():
            print(f"Host: {name:40} {fate:18} {doc}")
        server.closing.wait()


if __name__ == "__main__":
    main()
