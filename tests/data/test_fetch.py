"""The vetted fetch against a hostile local web server."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import ipaddress
import socket
import ssl
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import urllib3
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.config import DownloadConfig
from data.web import addresses
from data.web.addresses import MAX_URL, RefusedError, is_public, vetted
from data.web.fetch import Fetcher, FetchSettings, _checked, _failed
from gigagan.common.decoders import Decoders

spec = importlib.util.spec_from_file_location("hostile", Path(__file__).with_name("hostile.py"))
hostile = importlib.util.module_from_spec(spec)
sys.modules["hostile"] = hostile
spec.loader.exec_module(hostile)
sys.path.append(str(Path(__file__).parent))  # several folders are called `tests`
import bombs  # noqa: E402

SLOW_PAGES = {"/drip", "/drip-header", "/mute"}


@pytest.fixture(scope="module")
def site():
    with hostile.serve() as server:
        yield server


def fetcher(site=None, **changes) -> Fetcher:
    settings = {
        "max_bytes": 300_000, "max_pixels": 100_000_000, "timeout_s": 2, "total_deadline_s": 6,
        "max_redirects": 3, "retries": 1, "host_connections": 40, "contact": "https://example.org",
    }  # fmt: skip
    own = {key: changes.pop(key) for key in ("connect_to", "hosts_cache") if key in changes}
    if site is not None:
        own.setdefault("connect_to", site.connect_to())
    config = DownloadConfig(**{**settings, **changes})
    return Fetcher(FetchSettings.of(config, **own))


@pytest.fixture(scope="module")
def patient(site):
    """One fetch for many pages, as a worker has it."""
    return fetcher(site)


def fate(fetch: Fetcher, url: str, expected: str | None = None) -> str:
    try:
        fetch.fetch(url, expected)
    except RefusedError as refusal:
        return refusal.fate
    return "ok"


def refusal(fetch: Fetcher, url: str) -> str:
    with pytest.raises(RefusedError) as caught:
        fetch.fetch(url)
    return f"{caught.value.fate}: {caught.value}"


def url_of(path: str, number: int = 1) -> str:
    numbered = path.endswith("/") and path != "/"
    return f"http://{hostile.HOST}{path}" + (f"{number}.png" if numbered else "")


# Every page of the site


@pytest.mark.parametrize("path", sorted(set(hostile.PAGES) - SLOW_PAGES))
def test_each_page_of_the_hostile_site_ends_with_its_fate(patient, path):
    assert fate(patient, url_of(path)) == hostile.PAGES[path][0]


def test_slow_pages_end_with_their_fates_at_the_deadline(site):
    fetch = fetcher(site, timeout_s=0.5, total_deadline_s=1.2, retries=0)
    with ThreadPoolExecutor(3) as pool:
        fates = pool.map(lambda path: fate(fetch, url_of(path)), sorted(SLOW_PAGES))
    assert [*fates] == [hostile.PAGES[path][0] for path in sorted(SLOW_PAGES)]


def test_a_header_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr("data.web.fetch._headers", lambda: few)
    few = Decoders(seconds=0.3, at_once=2)
    with pytest.raises(RefusedError, match=r"more than 0\.3 s of a processor") as caught:
        _checked(bombs.gif_of_comments(400_000), 100)
    few.close()
    assert caught.value.fate == "too_slow"


def test_a_jpeg_of_thousands_of_scans_is_refused_from_its_markers():
    with pytest.raises(RefusedError, match="101, at most 100 are decoded") as caught:
        _checked(bombs.progressive_bomb(16, 8, 101), 1000)
    assert caught.value.fate == "too_many_scans"
    data = bombs.progressive_bomb(16, 8, 100)
    assert _checked(data, 1000) == data


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "avif"])
def test_good_pictures_of_two_numbers_differ_in_every_codec(patient, suffix):
    bodies = [patient.fetch(f"http://{hostile.HOST}/good/{n}.{suffix}") for n in (5, 7)]
    assert bodies[0] != bodies[1]
    assert Image.open(io.BytesIO(bodies[0])).size == (96, 80)


def test_a_compressed_body_arrives_as_the_picture(patient):
    assert patient.fetch(url_of("/gzip")) == hostile.png()


def test_a_bomb_of_200_mb_is_held_to_the_limit(site, monkeypatch):
    monkeypatch.setattr("data.web.fetch._checked", pytest.fail)  # it never gets that far
    assert fate(fetcher(site, retries=0), url_of("/gzip-bomb")) == "too_many_bytes"


# Who asks


def test_requests_say_who_asks_and_for_what(site):
    fetcher(site).fetch(url_of("/same/"))
    assert site.headers["User-Agent"] == "gigagan-pipeline/0.1 (+https://example.org)"
    assert site.headers["Accept"] == "image/*"
    assert site.headers["Accept-Encoding"] == "identity"


def test_a_contact_cannot_smuggle_a_header():
    smuggled = "me@example.org\r\nX: y"
    with pytest.raises(ValueError, match="contact"):
        DownloadConfig(contact=smuggled)
    unchecked = DownloadConfig().model_copy(update={"contact": smuggled})
    with pytest.raises(ValueError, match="contact"):
        FetchSettings.of(unchecked)


# Hashes


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_bytes_are_held_to_their_listed_hash(patient, kind):
    right = hashlib.new(kind, hostile.png()).hexdigest()
    assert patient.fetch(url_of("/same/"), f"{kind}:{right.upper()}") == hostile.png()
    assert fate(patient, url_of("/same/"), f"{kind}:{right[::-1]}") == "hash_mismatch"


def test_a_hash_of_another_kind_is_our_mistake(patient):
    with pytest.raises(ValueError, match="give md5:HEX or sha256:HEX"):
        patient.fetch(url_of("/same/"), "crc32:00")


# Retries


def test_retries_happen_only_where_they_can_help(site):
    fetch = fetcher(site)
    asked = {"/404": 1, "/429": 2, "/503": 2, "/noai/2.png": 1, "/truncated": 2, "/hang-up": 2}
    before = {path: site.asked[path] for path in asked}
    for path in asked:
        fate(fetch, f"http://{hostile.HOST}{path}")
    assert {path: site.asked[path] - before[path] for path in asked} == asked


def test_a_far_retry_after_is_refused_at_once(site):
    before = site.asked["/503-for-an-hour"]
    assert refusal(fetcher(site), url_of("/503-for-an-hour")) == "http_503: Retry-After: 3600 s"
    assert site.asked["/503-for-an-hour"] == before + 1


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [("7", 7, 7), ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0), ("soon", None, None), ("", None, None)],
)
def test_retry_after_is_seconds_or_a_date(value, low, high):
    response = urllib3.HTTPResponse(status=429, headers={"Retry-After": value})
    after = _failed(response).retry_after_s
    assert after is None if low is None else low <= after <= high


# Redirects and addresses


def test_more_redirects_than_allowed_are_not_followed(site):
    assert fate(fetcher(site, max_redirects=2), url_of("/elsewhere/")) == "redirects"
    assert fate(fetcher(site, max_redirects=3), url_of("/elsewhere/")) == "ok"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("file:///etc/passwd", "scheme"),
        ("data:image/png;base64,AAAA", "scheme"),
        ("ftp://hostile.test/good/1.png", "scheme"),
        ("javascript:alert(1)", "scheme"),
        ("good.png", "scheme"),
        ("//hostile.test/good/1.png", "scheme"),
        ("", "scheme"),
        ("http://", "bad_url"),
        ("http:///path", "bad_url"),
        ("http://a..b/", "bad_url"),
        (f"http://{'a' * 64}.test/", "bad_url"),
        ("http://💩.test/", "bad_url"),
        ("http://xn--\u00e9.test/", "bad_url"),
        ("http://user:secret@hostile.test/", "bad_url"),
        ("http://hostile.test/a\r\nX-Header: b", "bad_url"),
        ("http://hostile.test/\x00a", "bad_url"),
        ("http://hostile.test:99999/", "bad_url"),
        ("http://[::1%25eth0]/", "bad_url"),
        ("http://[::1/", "bad_url"),
        ("http://1.2.3.4.5/", "bad_url"),
        ("http://hostile.test/" + "x" * MAX_URL, "bad_url"),
        ("http://hostile.test/" + "é" * (MAX_URL // 3), "bad_url"),
        ("http://hostile.test:22/", "bad_port"),
        ("http://hostile.test:25/", "bad_port"),
        ("http://hostile.test:6000/", "bad_port"),
        ("http://hostile.test:0/", "bad_port"),
        ("http://gone.invalid/1.png", "dns"),
        ("http://127.0.0.1/1.png", "private_address"),
        ("http://127.1/1.png", "private_address"),
        ("http://2130706433/1.png", "private_address"),
        ("http://0x7f.1/1.png", "private_address"),
        ("http://0177.0.0.1/1.png", "private_address"),
        ("http://%31%32%37.0.0.1/1.png", "private_address"),
        ("http://localhost/1.png", "private_address"),
        ("http://localhost./1.png", "private_address"),
        ("http://169.254.169.254/latest", "private_address"),
        ("http://0.0.0.0/1.png", "private_address"),
        ("http://[::1]/1.png", "private_address"),
        ("http://[::ffff:10.0.0.1]/1.png", "private_address"),
        ("http://[64:ff9b::7f00:1]/1.png", "private_address"),
        ("http://[2002:7f00:1::]/1.png", "private_address"),
        ("http://[fe80::1]/1.png", "private_address"),
    ],
)
def test_what_must_not_be_asked_is_not(url, expected):
    assert fate(fetcher(), url) == expected


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("  HTTP://Hostile.TEST./a b/é?q=ü#part ", "http://hostile.test/a%20b/%C3%A9?q=%C3%BC"),
        ("https://München.example:443", "https://xn--mnchen-3ya.example:443/"),
        ("http://hostile.test/100%/%41%zz", "http://hostile.test/100%25/%41%25zz"),
        ("http://hostile.test/../a/./b", "http://hostile.test/a/b"),
        ("http://hostile.test\\@10.0.0.1/", "http://hostile.test/%5C@10.0.0.1/"),
        ("http://[2606:4700::0001]:8080/", "http://[2606:4700::1]:8080/"),
    ],
)
def test_odd_urls_are_asked_for_in_one_spelling(url, asked):
    assert vetted(url) == asked


def test_private_addresses_can_be_allowed(site):
    url = f"http://127.0.0.1:{site.server_port}/same/1.png"
    assert fetcher(allow_private_addresses=True).fetch(url) == hostile.png()
    assert fate(fetcher(), url) == "private_address"


def test_a_name_that_changes_its_address_gains_nothing(site, monkeypatch):
    """What was vetted is connected to, without asking the resolver again."""
    answers = iter(["93.184.216.34", "127.0.0.1"])
    dialled = []

    def getaddrinfo(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    def create_connection(address, timeout):
        dialled.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(addresses.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(addresses.socket, "create_connection", create_connection)
    fetch = fetcher(honour_robots_txt=False, honour_opt_outs=False)
    assert fate(fetch, "http://rebinding.example:8080/") == "connection_refused"
    assert fate(fetch, "http://rebinding.example:8080/") == "private_address"
    assert dialled == [("93.184.216.34", 8080)]


def test_a_mute_resolver_is_left_behind(monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(addresses.socket, "getaddrinfo", lambda *_, **__: answer.wait(20) and [])
    with pytest.raises(RefusedError) as caught:
        addresses.resolved("slow.example", 80, 0.2)
    answer.set()
    assert caught.value.fate == "dns"


def test_a_refused_connection_has_its_own_fate():
    fetch = fetcher(connect_to={"x.test": "127.0.0.1:1"})
    assert fate(fetch, "http://x.test/x") == "connection_refused"


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    path = tmp_path_factory.mktemp("tls") / "own.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    subject = ["-subj", "/CN=secure.test", "-addext", "subjectAltName=DNS:secure.test"]
    made = [*command.split(), *subject, "-keyout", str(path), "-out", str(path.with_suffix(".crt"))]
    try:
        subprocess.run(made, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return path.with_suffix(".crt"), path


@pytest.fixture
def secure_site(certificate):
    with hostile.serve() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        yield server


def test_only_certificates_that_are_trusted_for_the_name_are_good(secure_site, certificate):
    names = ("secure.test", "other.test")
    fetch = fetcher(secure_site, connect_to=secure_site.connect_to(*names))
    assert fate(fetch, "https://secure.test/same/1.png") == "tls"
    fetch = fetcher(secure_site, connect_to=secure_site.connect_to(*names))
    fetch._tls.load_verify_locations(certificate[0])
    assert fetch.fetch("https://secure.test/same/1.png") == hostile.png()
    assert fate(fetch, "https://other.test/same/1.png") == "tls"


def test_plain_http_on_the_port_of_tls_is_a_tls_fault(site):
    assert fate(fetcher(site), f"https://{hostile.HOST}/good/1.png") == "tls"


def test_a_slow_handshake_is_under_the_deadline():
    listener = socket.create_server(("127.0.0.1", 0))
    settings = {"timeout_s": 0.3, "total_deadline_s": 0.8, "retries": 0, "honour_robots_txt": False}
    connect_to = {"slow.test": f"127.0.0.1:{listener.getsockname()[1]}"}
    with listener:
        fetch = fetcher(connect_to=connect_to, honour_opt_outs=False, **settings)
        assert fate(fetch, "https://slow.test/1.png") == "timeout"


# Properties

URLS = st.one_of(
    st.text(),
    st.text().map("http://".__add__),
    st.builds(
        "{}://{}{}/{}?{}#{}".format,
        st.sampled_from(["http", "https", "HTTP", "ftp", "file"]),
        st.one_of(
            st.text(min_size=1, max_size=20),
            st.ip_addresses().map(lambda ip: f"[{ip}]" if ip.version == 6 else str(ip)),
            st.integers(0, 2**33).map(str),
            st.from_regex(r"[a-zäß0-9.%@:-]{1,20}", fullmatch=True),
        ),
        st.one_of(st.just(""), st.integers(0, 70_000).map(":{}".format)),
        st.text(),
        st.text(),
        st.text(),
    ),
)


@given(URLS)
def test_any_text_is_refused_or_becomes_a_plain_url(text):
    try:
        url = vetted(text)
    except RefusedError:
        return
    assert url.isascii()
    assert url.isprintable()
    assert " " not in url
    assert "#" not in url
    parsed = urllib3.util.parse_url(url)
    assert parsed.scheme in ("http", "https")
    assert parsed.host
    assert parsed.auth is None
    assert urlsplit(url).hostname == parsed.host.strip("[]")  # no two readers see two hosts
    assert vetted(url) == url


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_as_public_in_any_clothes(ip):
    public = is_public(str(ip))
    assert not public or (ip.is_global and not ip.is_multicast)
    number = int(ip)
    nat64 = ipaddress.IPv6Address((0x64FF9B << 96) | number)
    six_to_four = ipaddress.IPv6Address((0x2002 << 112) | (number << 80))
    for clothes in (ip, f"::ffff:{ip}", nat64, six_to_four):
        assert is_public(str(clothes)) == public, clothes


@given(st.ip_addresses(v=6))
def test_what_ipaddress_calls_private_is_not_public(ip):
    inner = ip.ipv4_mapped or ip.sixtofour
    if is_public(str(ip)):
        assert (inner or ip).is_global
        assert not (inner or ip).is_multicast
        assert inner or ip in addresses.NAT64 or not (ip.is_reserved or ip.is_site_local)


@pytest.mark.parametrize(
    ("address", "public"),
    [("8.8.8.8", True), ("2606:4700::1", True), ("10.1.2.3", False), ("100.64.0.1", False),
     ("fe80::1%eth0", False), ("fec0::1", False), ("::ffff:192.168.0.1", False),
     ("::7f00:1", False), ("3fff::1", False), ("3fff:fff::1", False),
     ("224.0.0.1", False), ("0.0.0.0", False), ("255.255.255.255", False), ("2001:0:1::", False),
     # of which ipaddress knows more with each version of Python
     ("192.0.0.0", False), ("192.0.0.9", False), ("192.0.0.192", False), ("192.0.0.255", False),
     ("191.255.255.255", True), ("192.0.1.0", True), ("192.88.99.1", False), ("198.19.0.1", False),
     ("168.63.129.16", False), ("168.63.129.17", True), ("::ffff:192.0.0.192", False),
     ("64:ff9b::192.0.0.192", False), ("64:ff9b:1::808:808", False), ("2002:c000:c0::", False),
     ("100::1", False), ("2001:1::1", False), ("2001:20::1", False), ("2001:200::1", True),
     ("5f00::1", False), ("ff0e::1", False), ("fd00:ec2::254", False), ("::8.8.8.8", False)],
)  # fmt: skip
def test_public_means_the_open_internet(address, public):
    assert is_public(address) == public


def test_what_the_cluster_s_network_policy_keeps_from_a_download_is_not_public():
    policy = Path(__file__).parents[2] / "infra" / "k8s" / "base" / "network.yaml"
    blocks = [line.split()[1] for line in policy.read_text().splitlines() if "/" in line
              and line.strip().startswith("- ") and line.split()[1][0].isdigit()]  # fmt: skip
    assert "192.0.0.0/24" in blocks
    assert {*blocks} <= {str(block) for block in addresses.SPECIAL}
