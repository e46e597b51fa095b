"""Which URLs may be asked, and which addresses connected to: public ones, as they were vetted."""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from urllib3.exceptions import HTTPError
from urllib3.util import Url, parse_url

MAX_URL = 8192
"""Longest URL that is asked, in ASCII characters, as most servers take no more."""
PRIVILEGED_PORTS = (80, 443)
"""The only ports below 1024 that are asked: the others are mail, shells and the like."""
OTHER_SERVICES = frozenset(
    {1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, 10080}
    | {*range(6665, 6670), 6679, 6697}
)
"""Ports above 1023 that browsers refuse, too: a request could mean something to who listens."""
NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 prefix behind which a gateway answers for an IPv4 address (RFC 6052)."""
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
"""All of IPv6 that is assigned to the internet."""
SPECIAL = tuple(
    ipaddress.ip_network(block)
    for block in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        "168.63.129.16/32",  # Azure's host, as its machines see it
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
)
"""What is not the web's: all that IANA's registries of special-purpose addresses do not call
globally reachable, the blocks around exceptions too, and multicast. In full, because `ipaddress`
knows others in each version of Python; of IPv6 what is in GLOBAL_UNICAST."""


class RefusedError(Exception):
    """A URL that gives no picture: `fate` is the class, the text its detail.

    `may_recover` says whether asking again could help, `retry_after_s` when the server says so.
    """

    def __init__(
        self,
        fate: str,
        detail: str = "",
        *,
        may_recover: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.fate = fate
        self.may_recover = may_recover
        self.retry_after_s = retry_after_s


def vetted(url: str) -> str:
    """The URL in ASCII as a request needs it, without fragment; vetting it again changes nothing.

    Raises:
        RefusedError: `scheme`, `bad_port` or `bad_url`; nothing has been asked yet.
    """
    url = url.strip(_STRIPPED)
    if len(url) > MAX_URL:
        raise RefusedError("bad_url", f"longer than {MAX_URL} characters")
    if not re.match(r"https?:", url, re.IGNORECASE):
        scheme = re.match(r"[a-z][a-z0-9+.-]*(?=:)", url, re.IGNORECASE)
        raise RefusedError("scheme", scheme[0].lower() if scheme else "none")
    if control := _CONTROL.search(url):
        raise RefusedError("bad_url", f"control character {control[0]!r}")
    try:
        parsed = parse_url(_LONE_PERCENT.sub("%25", url))  # percent-encodes, and IDNA for the host
    except (HTTPError, ValueError) as error:  # UnicodeError is a ValueError
        raise RefusedError("bad_url", str(error)[:200]) from error
    if parsed.auth is not None:  # somebody's password, or a host that pretends to be another
        raise RefusedError("bad_url", "names a user")
    _vet_port(parsed.port)
    host = _vetted_host(parsed.host or "")
    plain = Url(parsed.scheme, None, host, parsed.port, parsed.path or "/", parsed.query).url
    if len(plain) > MAX_URL:
        raise RefusedError("bad_url", f"longer than {MAX_URL} characters")
    return plain


_STRIPPED = "".join(map(chr, range(0x21)))
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LONE_PERCENT = re.compile(r"%(?![0-9a-fA-F]{2})")
_LABEL = re.compile(r"[a-z0-9_-]{1,63}")
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")


def _vet_port(port: int | None) -> None:
    if port is None:
        return
    if port in OTHER_SERVICES or (port < 1024 and port not in PRIVILEGED_PORTS):
        raise RefusedError("bad_port", str(port))


def _vetted_host(host: str) -> str:
    """The host in its one spelling. 0x7f.1 and 2130706433 are addresses, and not names."""
    if host.startswith("["):
        try:
            return f"[{ipaddress.IPv6Address(host[1:-1])}]" if "%" not in host else _refuse(host)
        except ValueError:
            _refuse(host)
    host = host.removesuffix(".")
    labels = host.lower().split(".")
    if len(host) > 253 or not all(map(_LABEL.fullmatch, labels)):
        _refuse(host)
    if not _NUMBER.fullmatch(labels[-1]):
        return host.lower()
    try:
        return socket.inet_ntoa(socket.inet_aton(host.lower()))
    except OSError:
        _refuse(host)


def _refuse(host: str) -> NoReturn:
    raise RefusedError("bad_url", f"host {host[:100]!r}" if host else "no host")


def is_public(address: str) -> bool:
    """Whether an address belongs to the open internet: not loopback, private, link-local, …

    An IPv4 address in IPv6 clothes (mapped, 6to4, NAT64) is judged by what it is inside.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        last = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        inner = ip.ipv4_mapped or ip.sixtofour or (last if ip in NAT64 else None)
        if inner is None:
            return ip in GLOBAL_UNICAST and not _is_special(ip)
        ip = inner
    return not _is_special(ip)


def _is_special(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return any(ip in block for block in SPECIAL)


def resolved(host: str, port: int, within_s: float) -> list[str]:
    """Addresses of a host, in the resolver's order.

    Raises:
        RefusedError: `dns`, also when the resolver takes longer than `within_s` seconds.
    """
    literal = host.strip("[]")
    if ":" in literal or _NUMBER.fullmatch(literal.rpartition(".")[2]):
        return [literal]
    answer: list[list[str] | Exception] = []

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answer.append(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except (OSError, UnicodeError) as error:
            answer.append(error)

    # The resolver knows no time limit: it gets a thread, which is left to it when it is late.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(within_s)
    if not answer:
        raise RefusedError("dns", f"no answer within {within_s:.0f} s", may_recover=True)
    if isinstance(answer[0], Exception):
        again = getattr(answer[0], "errno", None) == socket.EAI_AGAIN
        raise RefusedError("dns", str(answer[0]), may_recover=again) from answer[0]
    return answer[0]


def dial(host: str, port: int, *, until: float, timeout_s: float, private: bool) -> socket.socket:
    """A connection to the first address of `host` that answers and may be asked.

    What was vetted is what is connected to: a name that changes its address gains nothing.

    Raises:
        RefusedError: `dns`, `private_address` (unless `private` are allowed).
        OSError: none of the addresses took the connection by `until` (monotonic seconds).
    """
    addresses = resolved(host, port, until - time.monotonic())
    allowed = [address for address in addresses if private or is_public(address)]
    if not allowed:
        raise RefusedError("private_address", f"{host} is {', '.join(sorted(addresses))}")
    last: OSError | None = None
    for seconds, address in zip(_shares(until, timeout_s), allowed, strict=False):
        try:
            return socket.create_connection((address, port), seconds)
        except OSError as failure:
            last = failure
    raise last or TimeoutError("no time left to connect")


def _shares(until: float, timeout_s: float) -> Iterator[float]:
    """Seconds that each further attempt to connect may take, until none are left."""
    while (left := until - time.monotonic()) > 0:
        yield min(left, timeout_s)
