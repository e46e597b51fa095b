"""A folder behind an fsspec URL (`s3://bucket/prefix`): whole objects, patiently. No caching.

What fails for a moment is tried again with growing pauses; what fails for good is an error that
names the URL and what to do.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from flows.stage import DamagedError, StageError
from flows.storage.files import UnsafeNameError, safe
from gigagan.common.files import filled_aside, sha256_of
from gigagan.common.progress import Progress, silent
from gigagan.common.retrying import pauses, retry

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

ATTEMPTS = 12
PAUSE_S = 0.5
"""Before the second attempt; each further pause is twice as long, up to `LONGEST_PAUSE_S`."""
LONGEST_PAUSE_S = 20.0
TRANSFERS = 8
"""Files on their way at once."""
FOR_GOOD = (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENAMETOOLONG, errno.ENOSPC)
CREDENTIALS = ("NoCredentials", "PartialCredentials", "ProfileNotFound", "TokenRetrieval")
"""Beginnings of the names of errors that a client raises before it asks anybody."""
COMPLAIN_EVERY_S = 30.0
_complained: dict[str, float] = {}
"""When each URL was last said to be out of reach."""
CHANGED = ("LastModified", "last_modified", "updated", "mtime", "created")
"""How protocols call the time of an object's last change."""
NETWORK = ("botocore", "aiobotocore", "aiohttp", "urllib3", "google", "gcsfs", "azure")
"""Packages whose errors, as far as they are not understood, are a network's."""


class RemoteError(StageError):
    """A store behind a URL cannot be used; the message says which, why and what to do."""


def redacted(url: str) -> str:
    """A URL as it may be shown."""
    return re.sub(r"//[^@/]*@", "//", url)


class Remote:
    """Objects below one URL."""

    def __init__(self, url: str, *, attempts: int = ATTEMPTS):
        self.url = url.rstrip("/")
        self.attempts = attempts
        if redacted(url) != url:
            raise RemoteError(
                f"{redacted(url)}: a store's URL must not hold a user or password: "
                "give them in the environment (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            )
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            raise RemoteError(
                f"{self.url} needs a package that is not installed: {error}"
            ) from error
        except ValueError as error:
            raise RemoteError(
                f"{self.url}: {error}: give a folder, or a URL such as s3://bucket/prefix"
            ) from error

    def below(self, name: str, *, attempts: int | None = None) -> Remote:
        """The folder of that name in here."""
        return Remote(f"{self.url}/{safe(name)}", attempts=attempts or self.attempts)

    def prepare(self) -> None:
        """Raise `RemoteError` unless objects can be made here, and each only once."""
        probe = f".probe-{uuid.uuid4().hex}"
        if not self.create(probe, b"") or self.create(probe, b""):
            raise RemoteError(
                f"{self.url} overwrites where it was asked to create (no conditional writes): "
                "two runs could write one output, so use another store or a newer server"
            )
        self.delete([probe])

    def read(self, name: str) -> bytes | None:
        """An object's content; None when it is not there."""
        try:
            return bytes(self._ask("read", name, self.fs.cat_file, self._path(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Make or replace an object."""
        self._ask("write", name, self.fs.pipe_file, self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Make an object, unless it is there: then False."""
        try:
            path = self._path(name)
            self._ask("create", name, self._create, path, data)
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise RemoteError(
                f"{self.url} cannot be written ({error}): create the bucket, or correct `store`"
            ) from error
        return True

    def sizes(self) -> dict[str, int]:
        """Bytes of every object below here, by name."""
        return {name: size for name, (size, _) in self.details().items()}

    def details(self) -> dict[str, tuple[int, datetime]]:
        """Bytes and last change of every object; what cannot be a file's name is left out."""
        try:
            found = self._ask("list", "", self.fs.find, self.root, detail=True)
        except FileNotFoundError:
            return {}
        details = {}
        for path, about in found.items():
            name = path.removeprefix(f"{self.root}/")
            if _is_safe(name):
                details[name] = int(about["size"] or 0), _changed(about)
        return details

    def folders(self) -> list[str]:
        """Names of the folders that are directly in here."""
        try:
            found = self._ask("list", "", self.fs.ls, self.root, detail=True)
        except FileNotFoundError:
            return []
        names = [Path(entry["name"]).name for entry in found if entry["type"] == "directory"]
        return sorted(name for name in names if _is_safe(name))

    def upload(self, path: Path, name: str) -> None:
        """Copy a file to an object."""
        self._ask("write", name, self.fs.put_file, str(path), self._path(name))

    def download(
        self, name: str, path: Path, *, size: int | None = None, digest: str | None = None
    ) -> None:
        """Copy an object to a file, which appears when it is whole and what it should be.

        Raises:
            DamagedError: the object is not there, or has another size or sha256.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        where = f"{self.url}/{name}"
        with filled_aside(path, has_rivals=True) as aside:
            try:
                self._ask("read", name, self.fs.get_file, self._path(name), str(aside))
            except FileNotFoundError as error:
                raise DamagedError(f"{where} is missing") from error
            if size is not None and aside.stat().st_size != size:
                raise DamagedError(f"{where} has {aside.stat().st_size} bytes instead of {size}")
            if digest and sha256_of(aside) != digest:
                raise DamagedError(f"{where} has another sha256 than when it was written")

    def sha256(self, name: str) -> str:
        """Digest of an object, read piece by piece."""

        def read() -> str:
            with self.fs.open(self._path(name), "rb") as file:
                made = hashlib.sha256()
                while piece := file.read(2**23):
                    made.update(piece)
            return made.hexdigest()

        return str(self._ask("read", name, read))

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that are gone already are no error."""

        def remove(name: str) -> None:
            with suppress(FileNotFoundError):
                self._ask("delete", name, self.fs.rm_file, self._path(name))

        each("deleting", remove, [*names], silent)

    def _create(self, path: str, data: bytes) -> None:
        try:
            self.fs.pipe_file(path, data, mode="create")
        except OSError as error:  # not every S3 says which precondition it was
            answer = getattr(error.__cause__, "response", None) or {}
            if answer.get("Error", {}).get("Code") == "PreconditionFailed":
                raise FileExistsError(path) from error
            raise

    def _path(self, name: str) -> str:
        return f"{self.root}/{safe(name)}"

    def _ask(
        self, verb: str, name: str, function: Callable[..., Any], *args: Any, **options: Any
    ) -> Any:
        where = f"{self.url}/{name}" if name else self.url
        waits = pauses(
            PAUSE_S, attempts=self.attempts, longest_s=LONGEST_PAUSE_S, spread=(0.5, 1.0)
        )
        ask, tell = partial(function, *args, **options), partial(_complain, self.url)
        try:
            return retry(ask, waits, may_help=_may_help, on_retry=tell)
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            if not isinstance(error, OSError) and not _is_network(error):
                raise
            tried = self.attempts if _may_help(error) else 1
            raise RemoteError(_message(verb, where, error, tried)) from error


class RemoteBoard:
    """The files of a lease as objects; see `lease.Board`."""

    def __init__(self, remote: Remote):
        self.remote = remote

    def newest(self) -> int:
        """See `Board`."""
        return max((int(name) for name in self.remote.sizes() if name.isdigit()), default=0)

    def read(self, number: int) -> bytes | None:
        """See `Board`."""
        return self.remote.read(f"{number:08d}")

    def create(self, number: int, body: bytes) -> bool:
        """See `Board`."""
        return self.remote.create(f"{number:08d}", body)

    def rewrite(self, number: int, body: bytes) -> None:
        """See `Board`."""
        self.remote.write(f"{number:08d}", body)


def each(
    what: str, function: Callable[[Item], Result], items: list[Item], progress: Progress
) -> list[Result]:
    """The function of every item, several at once; the first error ends it all."""
    done, lock = 0, threading.Lock()
    results: dict[int, Result] = {}
    pool = ThreadPoolExecutor(TRANSFERS, thread_name_prefix="store")
    try:
        numbers = {pool.submit(function, item): number for number, item in enumerate(items)}
        for future in as_completed(numbers):
            results[numbers[future]] = future.result()
            with lock:
                done += 1
            progress(what, done, len(items))
    finally:
        pool.shutdown(cancel_futures=True)
    return [results[number] for number in range(len(items))]


def _changed(about: Mapping[str, Any]) -> datetime:
    """When an object changed; now, where its protocol does not tell."""
    told = (about.get(key) for key in CHANGED)
    times = [time for time in told if isinstance(time, datetime) and time.tzinfo]
    return times[0] if times else datetime.now(UTC)


def _is_safe(name: str) -> bool:
    try:
        return bool(safe(name))
    except UnsafeNameError:
        return False


def _is_network(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in NETWORK or isinstance(error, TimeoutError)


def _may_help(error: Exception) -> bool:
    """Whether asking again may help."""
    if isinstance(error, FileNotFoundError | FileExistsError) or _is_for_good(error):
        return False
    return isinstance(error, OSError) or _is_network(error)


def _is_for_good(error: Exception) -> bool:
    if isinstance(error, PermissionError) or type(error).__name__.startswith(CREDENTIALS):
        return True
    return isinstance(error, OSError) and error.errno in FOR_GOOD


def _complain(url: str, error: Exception, pause_s: float) -> None:
    """A warning, but not one for every object that waits."""
    now = time.monotonic()
    if now - _complained.get(url, -COMPLAIN_EVERY_S) >= COMPLAIN_EVERY_S:
        _complained[url] = now
        said = f"{type(error).__name__}: {error}"
        log.warning("the store at %s does not answer (%s): trying again", url, redacted(said))


def _message(verb: str, where: str, error: Exception, attempts: int) -> str:
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, PermissionError) or type(error).__name__.startswith(CREDENTIALS):
        remedy = (
            "check the credentials in the environment (for S3: AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY or a profile or role) and what they may do there"
        )
    elif attempts > 1:
        remedy = (
            f"tried {attempts} times: check the network and the store's endpoint, then run again"
        )
    else:
        remedy = "correct `store`, or the object store's settings"
    return f"cannot {verb} {redacted(where)} ({said}): {remedy}"
