"""No secret leaves for the record: values under telling names, URLs with credentials, our own keys.

It hides; it never decides what is recorded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<hidden>"
MIN_SECRET = 8
"""Shorter values of secret variables are not searched for: they occur in any text."""

_WORDS = "password|passwd|passphrase|secret|token|credentials?|auth|authorization|apikey"
_PAIRS = "api[_-]?key|access[_-]?key|private[_-]?key|signing[_-]?key|auth[_-]?(?:string|token)"
_NAME = re.compile(rf"(?:^|[^a-z])(?:{_WORDS})(?:$|[^a-z])|{_PAIRS}", re.IGNORECASE)
_USERINFO = re.compile(r"([a-zA-Z][\w+.-]*://)[^/@\s\"'<>]*@")
_QUERY = re.compile(
    r"([?&][\w.-]*(?:token|signature|sig|key|secret|password|credential)[\w.-]*=)[^&\s\"'<>]+",
    re.IGNORECASE,
)
_JSON_ENTRY = re.compile(r'("([^"\\]{1,200})"\s*:\s*)"((?:[^"\\]|\\.)+)"')


def is_secret_name(name: str) -> bool:
    """Whether what stands under this name is better not shown: `DB_PASSWORD`, `hf.token`."""
    # Camel case counts as separate words.
    return _NAME.search(re.sub(r"([a-z])([A-Z])", r"\1_\2", name)) is not None


def value(name: str, content: Any) -> str:
    """The text to record for a setting: hidden by its name, or cleaned of what it quotes."""
    if content not in (None, "", [], {}) and not isinstance(content, bool) and is_secret_name(name):
        return HIDDEN
    return text(str(content))


def text(content: str) -> str:
    """A text without credentials in URLs, without values of telling JSON keys or our variables."""
    content = _USERINFO.sub(r"\1", content)
    content = _QUERY.sub(rf"\1{HIDDEN}", content)
    content = _JSON_ENTRY.sub(_hide_entry, content)
    for secret in _our_secrets(os.environ):
        content = content.replace(secret, HIDDEN)
    return content


def _hide_entry(match: re.Match[str]) -> str:
    return f'{match[1]}"{HIDDEN}"' if is_secret_name(match[2]) else match[0]


def _our_secrets(environment: Mapping[str, str]) -> list[str]:
    """Values of secret variables, the longest first: one may hold another."""
    found = {
        content
        for name, content in environment.items()
        if len(content) >= MIN_SECRET and is_secret_name(name) and not content.startswith("/")
    }
    return sorted(found, key=len, reverse=True)
