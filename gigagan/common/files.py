"""Whole files or none: writing beside, hashes, and how an unfinished file is called."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""How the name of every unfinished file and folder ends."""


@contextmanager
def filled_aside(path: Path, *, fsync: bool = False, has_rivals: bool = False) -> Iterator[Path]:
    """`NAME.partial` for the block to write, which takes its name when the block is through.

    An error removes it; what a killed writer left is written over. With `fsync` file and name
    survive a loss of power. Several processes that may write one file at once are rivals: each
    gets a name of its own.
    """
    own = f".{uuid.uuid4().hex[:8]}" if has_rivals else ""
    partial = path.with_name(f"{path.name}{own}{PARTIAL}")
    try:
        yield partial
        if fsync:
            flush(partial)
        partial.replace(path)
        if fsync:
            flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_aside(
    path: Path, content: str | bytes, *, fsync: bool = False, has_rivals: bool = False
) -> None:
    """Write a text (UTF-8) or bytes so that nobody ever sees half of it; see `filled_aside`."""
    data = content.encode() if isinstance(content, str) else content
    with filled_aside(path, fsync=fsync, has_rivals=has_rivals) as partial:
        partial.write_bytes(data)


def flush(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_unfinished(name: str) -> bool:
    """Whether a file (a relative name with slashes) is being written, or lies in such a folder."""
    return any(part.endswith(PARTIAL) for part in name.split("/"))


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
