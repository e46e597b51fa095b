"""How a site owner reserves pictures: headers beside each of them, and a tdmrep.json for a host."""

from __future__ import annotations

import json
import re

from protego import Protego
from urllib3 import HTTPHeaderDict

from data.web.robots import Rules

MAX_RULES = 1000
"""Rules read of a tdmrep.json."""
OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""`X-Robots-Tag` directives that reserve a picture (img2dataset's list; `none` is Google's short
form of noindex and nofollow)."""
WITH_VALUES = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
)
"""Directives whose colon does not end the name of a crawler."""


class Reservations(Rules):
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
        """Whether it reserves the page."""
        matching = (kept for kept, rule in self._rules if not rule.can_fetch(url, "*"))
        return next(matching, False)


def _disallow(location: object) -> str:
    """A rule of robots.txt with this location; empty if it is none."""
    if not isinstance(location, str) or not location.strip():
        return ""
    return "Disallow: " + "".join(location.split()).replace("#", "%23")


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
