"""Members of a tar by its headers alone: many times as fast as tarfile, and past damage."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from io import FileIO
from typing import NamedTuple


class Member(NamedTuple):
    """A plain file in a tar."""

    name: str
    offset: int
    """Place of its first byte in the tar."""
    size: int


class DamagedTarError(ValueError):
    """A tar that is cut short, or has something else where a header should be."""


def members(file: FileIO, *, is_whole: bool = False) -> Iterator[Member]:
    """Plain files of a tar that is open without a buffer. Extended headers are passed over.

    A header that is damaged costs its own member: what is none is passed over until the next one.

    Raises:
        DamagedTarError: with `is_whole`, at a damaged header or where the end mark is missing.
    """
    place, end = 0, file.seek(0, os.SEEK_END)
    while place + tarfile.BLOCKSIZE <= end:
        block = os.pread(file.fileno(), tarfile.BLOCKSIZE, place)
        place += tarfile.BLOCKSIZE
        if is_whole and not any(block):  # the end mark
            return
        try:
            found = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if is_whole:
                raise DamagedTarError(f"no header before byte {place}: {error}") from error
            continue
        if not 0 <= found.size <= end - place:
            if is_whole:
                break
            continue
        if found.isreg():
            yield Member(found.name, place, found.size)
        place += -(-found.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if is_whole:
        raise DamagedTarError("cut short")


def read(file: FileIO, member: Member) -> bytes:
    """A member's bytes; fewer where the file ends early."""
    return os.pread(file.fileno(), member.size, member.offset)
