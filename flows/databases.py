"""Addresses of SQLite files: one is one place, wherever it is read and whatever signs it holds.

It opens none of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

_SQLITE = re.compile(r"sqlite(?P<driver>\+\w+)?:///(?P<path>[^?]*)(?P<query>\?.*)?", re.DOTALL)


def sqlite_uri(file: Path, driver: str = "") -> str:
    """The address of a database file, for SQLAlchemy (it reads %20 as a blank)."""
    quoted = str(file).replace("%", "%25").replace("?", "%3F")
    if quoted != str(file) and not driver:
        driver = "+pysqlite"  # without one MLflow makes a folder of the quoted name
    return f"sqlite{driver}:///{quoted}"


def sqlite_file(uri: str) -> Path | None:
    """The file that an address names; None where it is no SQLite file."""
    parts = _SQLITE.fullmatch(uri)
    path = unquote(parts["path"]) if parts else ""
    return None if path in ("", ":memory:") or path.startswith("file:") else Path(path)


def absolute(uri: str) -> str:
    """An address that means the same in any folder; it is relative to this one."""
    file, parts = sqlite_file(uri), _SQLITE.fullmatch(uri)
    if file is None or parts is None or file.is_absolute():
        return uri
    return sqlite_uri(file.absolute(), parts["driver"] or "") + (parts["query"] or "")
