"""Files of an output: their list, its digest, and names that cannot lead out of a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from gigagan.common.files import is_unfinished


class UnsafeNameError(ValueError):
    """A name that leads out of the folder it is said to be in."""


def digest(value: Any) -> str:
    """sha256 of anything that JSON can say."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


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
    """Files below a folder in a fixed order, but for hidden, unfinished and some top-level ones.

    Raises:
        UnsafeNameError: a link leads out, or to a folder, whose files would be missed.
    """
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith(".") for part in parts)
        if is_hidden or parts[0] in leave_out or is_unfinished("/".join(parts)):
            continue
        if path.is_symlink() and path.is_dir():
            raise UnsafeNameError(f"{path} is a link to a folder: put the files themselves there")
        if path.is_file():
            yield "/".join(parts), inside(folder, "/".join(parts))
