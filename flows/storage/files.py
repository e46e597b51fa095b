"""Files of an output: digests, whole writes, and names that cannot lead out of a folder."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any


class UnsafeNameError(ValueError):
    """A name that leads out of the folder it is said to be in."""


def digest(value: Any) -> str:
    """sha256 of anything that JSON can say."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def safe(name: str) -> str:
    """The name, if it is a plain relative one with forward slashes.

    Raises:
        UnsafeNameError: it is absolute, has `..`, or is not in its simplest form.
    """
    plain = PurePosixPath(name)
    odd = name != str(plain) or ".." in plain.parts or any(ord(sign) < 32 for sign in name)
    if odd or plain.is_absolute() or name == "." or "\\" in name:
        raise UnsafeNameError(f"{name!r} is not the name of a file inside its folder")
    return name


def inside(folder: Path, name: str) -> Path:
    """The file of that name in `folder`.

    Raises:
        UnsafeNameError: the name, or a symbolic link on the way, leads elsewhere.
    """
    path = folder / safe(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UnsafeNameError(f"{path} is a link that leads out of {folder}")
    return path


def listing(folder: Path, leave_out: tuple[str, ...] = ()) -> Iterator[tuple[str, Path]]:
    """Files below a folder in a fixed order, without hidden ones and some top-level names.

    Raises:
        UnsafeNameError: a link leads out, or to a folder, whose files would be missed.
    """
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or parts[0] in leave_out:
            continue
        if path.is_symlink() and path.is_dir():
            raise UnsafeNameError(f"{path} is a link to a folder: put the files themselves there")
        if path.is_file():
            yield "/".join(parts), inside(folder, "/".join(parts))
