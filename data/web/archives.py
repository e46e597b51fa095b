"""Big zip files from the web: downloaded with resume, verified, unpacked safely."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests
from urllib3.exceptions import HTTPError

from gigagan.common.files import PARTIAL, filled_aside, is_unfinished
from gigagan.common.progress import Progress, silent

_CHUNK = 1 << 20
_TIMEOUTS_S = (10, 60)
"""Longest time to connect, and longest silence after that."""
_HOPELESS = range(400, 500)
"""HTTP statuses after which asking again does not help …"""
_BUSY = (408, 429)
"""… but for these."""


class ArchiveError(RuntimeError):
    """An archive that cannot be had, or is not what it should be; the text names the remedy."""


class _InterruptedError(Exception):
    """A transfer that ended early, for a reason that may pass."""


@dataclass(frozen=True)
class Archive:
    """A zip file as its authors publish it."""

    name: str
    """File name."""
    folder: str
    """Where it lies below the site's address."""
    size: int
    """Bytes."""
    md5: str
    """md5 of the file's content, lower-case hex."""


def obtain(
    archive: Archive,
    out: Path,
    base_url: str,
    *,
    attempts: int = 6,
    pause_s: float = 1.0,
    progress: Progress = silent,
) -> Path:
    """The verified file below `out`: the one that is there already, or else downloaded.

    A transfer that breaks goes on where it stopped, also in another process, with pauses that
    double from `pause_s`; `attempts` bounds the transfers in a row that bring nothing.

    Raises:
        ArchiveError: the site is out of reach or has not got it, or the bytes are others.
    """
    path = out / archive.name
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        partial = out / f"{archive.name}{PARTIAL}"
        _transfer(archive, partial, base_url, attempts, pause_s, progress)
        verify(archive, partial, progress)
        partial.replace(path)
    else:
        verify(archive, path, progress)
    return path


def verify(archive: Archive, path: Path, progress: Progress = silent) -> None:
    """Compare size and md5 with the published ones.

    Raises:
        ArchiveError: they differ; a file of our own making (`.partial`) is removed.
    """
    size = path.stat().st_size
    found = _md5(path, progress) if size == archive.size else None
    if found == archive.md5:
        return
    is_ours = is_unfinished(path.name)
    if is_ours:
        path.unlink()
    what = f"{size:,} bytes, not {archive.size:,}" if found is None else f"md5 {found}"
    remedy = "it is removed: run again" if is_ours else "remove it, so that it is downloaded anew"
    raise ArchiveError(
        f"{path} is not {archive.name} as published ({what}; expected md5 {archive.md5}): {remedy}"
    )


def _md5(path: Path, progress: Progress) -> str:
    total, done = path.stat().st_size, 0
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
            done += len(block)
            progress(f"verify {path.name}, bytes", done, total)
    return digest.hexdigest()


# ---- transfer ----------------------------------------------------------------------------------


def _transfer(
    archive: Archive,
    partial: Path,
    base_url: str,
    attempts: int,
    pause_s: float,
    progress: Progress,
) -> None:
    """Bring `partial` to the archive's size."""
    url = f"{base_url.rstrip('/')}/{archive.folder}/{archive.name}"
    failures = 0
    while (have := _size(partial)) != archive.size:
        try:
            _receive(url, archive, partial, progress)
        except (_InterruptedError, requests.RequestException, HTTPError) as error:
            failures = 0 if _size(partial) > have else failures + 1
            if failures >= attempts:
                raise ArchiveError(_advice(url, archive, partial, str(error))) from error
            time.sleep(pause_s * 2 ** max(failures - 1, 0))


def _receive(url: str, archive: Archive, partial: Path, progress: Progress) -> None:
    """Ask for what is missing and append it; begin anew where the server cannot go on."""
    have = _size(partial)
    headers = {"Accept-Encoding": "identity"}
    if 0 < have < archive.size:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUTS_S) as response:
        start = _start(url, response, archive, partial)
        with partial.open("ab" if start else "wb") as file:
            done = start
            # What has come, not whole chunks: a break then costs no byte.
            while block := response.raw.read1(_CHUNK):
                file.write(block)
                done += len(block)
                progress(f"{archive.name}, bytes", done, archive.size)
                if done > archive.size:
                    break  # not our archive; verification says so
    if done < archive.size:
        raise _InterruptedError(f"the connection ended after {done:,} of {archive.size:,} bytes")


def _start(url: str, response: requests.Response, archive: Archive, partial: Path) -> int:
    """Where the answer's first byte belongs."""
    status = response.status_code
    if status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if found and int(found[1]) == _size(partial) and found[2] in ("*", str(archive.size)):
            return int(found[1])
        partial.unlink(missing_ok=True)
        raise _InterruptedError("the server resumed elsewhere, or another file")
    if status == 416:
        partial.unlink(missing_ok=True)
        raise _InterruptedError("the server refused to resume")
    if status in _HOPELESS and status not in _BUSY:
        raise ArchiveError(_advice(url, archive, partial, f"HTTP {status}"))
    if status != 200:
        raise _InterruptedError(f"HTTP {status}")
    return 0


def _advice(url: str, archive: Archive, partial: Path, reason: str) -> str:
    return (
        f"{url} cannot be downloaded ({reason}): run again to resume, or place {archive.name} "
        f"({archive.size:,} bytes, md5 {archive.md5}) in {partial.parent} by hand"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


# ---- unpacking ---------------------------------------------------------------------------------


def unpack(
    path: Path, out: Path, wanted: Callable[[str], bool], *, progress: Progress = silent
) -> int:
    """Unpack the wanted members below `out`; those there with the right size stay. Their number.

    Each is written aside and then put in place, so an interrupted run goes on.

    Raises:
        ArchiveError: not a readable zip file, or a wanted member would leave `out`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.is_dir() and wanted(m.filename)]
            targets = [_target(path, member, out) for member in members]
            for number, (member, target) in enumerate(zip(members, targets, strict=True), start=1):
                if not target.is_file() or _size(target) != member.file_size:
                    _extract(archive, member, target)
                progress(f"unpack {path.name}", number, len(members))
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ArchiveError(
            f"{path} cannot be unpacked ({error}): remove it, so that it is downloaded anew"
        ) from error
    return len(members)


def _target(path: Path, member: zipfile.ZipInfo, out: Path) -> Path:
    """Where a member goes, if that is below `out`."""
    parts = member.filename.split("/")
    is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
    if is_link or "\\" in member.filename or {"", ".", ".."} & set(parts):
        raise ArchiveError(
            f"{path} has a member {member.filename!r} that is a link or leaves the folder: "
            "it is not the archive that its name says, remove it"
        )
    return out.joinpath(*parts)


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        filled_aside(target) as partial,
        archive.open(member) as source,
        partial.open("wb") as file,
    ):
        shutil.copyfileobj(source, file, _CHUNK)
