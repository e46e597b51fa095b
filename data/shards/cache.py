"""A folder of shards, on this machine or behind a URL, as files of this machine.

What comes from afar is kept in a cache that the processes of a node share. Files there are named by
their sha256, so that none is ever stale, and none that is damaged on the way gets in.
"""

from __future__ import annotations

import fcntl
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data.shards.manifest import AGAIN, INDEX, Entry, ManifestError
from gigagan.common.files import filled_aside, is_unfinished, sha256_of
from gigagan.common.retrying import pauses, retry

Result = TypeVar("Result")

ATTEMPTS = 8
"""Of one file, before a store that does not answer is an error."""
PAUSE_S = 0.5
"""Before the second attempt; each further pause is twice as long."""
FETCHERS = 4
"""Files fetched at once, ahead of their use."""
ABANDONED_S = 3600.0
"""Age at which an unfinished file counts as one that a killed process left."""


class LostError(Exception):
    """A tar is not what it was when it was indexed: it is gone, was cut short, or is another."""


class RemoteError(OSError):
    """A store that still failed after several attempts."""


class Folder(Protocol):
    """Where one resolution's shards are."""

    def index(self) -> bytes:
        """The index."""

    def check(self, entries: Sequence[Entry]) -> None:
        """Refuse what can be seen at once to be other than its index says."""

    def sidecar(self, entry: Entry) -> bytes:
        """The sidecar of a tar."""

    def open(self, entry: Entry) -> int:
        """A file descriptor of a tar."""

    def expect(self, entries: Sequence[Entry]) -> None:
        """Say that these will be wanted soon, and that all others will not."""

    def place(self, name: str) -> str:
        """How messages name a file."""


def folder(shards: Path | str, cache_dir: Path | None, cache_gb: float) -> Folder:
    """The folder that a path or an fsspec URL (`s3://…`) names."""
    where = str(shards)
    if where.startswith("file://"):
        where = where.removeprefix("file://")
    if "://" not in where:
        return LocalFolder(Path(where))
    return RemoteFolder(where.rstrip("/"), cache_dir or default_cache(), cache_gb)


def default_cache() -> Path:
    """`shards` in `GIGAGAN_CACHE`, or in a folder of the user's own cache; all in it may go."""
    if chosen := os.environ.get("GIGAGAN_CACHE"):
        return Path(chosen) / "shards"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gigagan" / "shards"


class LocalFolder:
    """Shards of this machine or of a mounted file system."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def index(self) -> bytes:
        """The index."""
        try:
            return (self._path / INDEX).read_bytes()
        except OSError as error:
            raise ManifestError(
                f"{self._path / INDEX} cannot be read ({error.strerror}): give a folder of one "
                "resolution that the filter stage has written, such as shards/032"
            ) from error

    def check(self, entries: Sequence[Entry]) -> None:
        """Compare the files' sizes."""
        with os.scandir(self._path) as found:
            sizes = {file.name: file.stat().st_size for file in found if file.is_file()}
        for entry in entries:
            for name, size in ((entry.name, entry.bytes), (entry.sidecar, entry.index_bytes)):
                if sizes.get(name) != size:
                    raise ManifestError(
                        f"{self._path / name} has {sizes.get(name, 'no')} bytes, its index says "
                        f"{size}: {AGAIN}"
                    )

    def sidecar(self, entry: Entry) -> bytes:
        """The sidecar of a tar."""
        path = self._path / entry.sidecar
        try:
            return path.read_bytes()
        except OSError as error:
            raise ManifestError(f"{path} cannot be read ({error.strerror}): {AGAIN}") from error

    def open(self, entry: Entry) -> int:
        """A file descriptor of a tar."""
        try:
            return os.open(f"{self._path}/{entry.name}", os.O_RDONLY)
        except OSError as error:
            raise LostError(f"can no longer be read ({error.strerror})") from error

    def expect(self, entries: Sequence[Entry]) -> None:
        """Nothing to do: the operating system reads ahead."""

    def place(self, name: str) -> str:
        """How messages name a file."""
        return str(self._path / name)


class RemoteFolder:
    """Shards behind an fsspec URL, brought to the node's cache window by window."""

    def __init__(self, url: str, cache_dir: Path, cache_gb: float) -> None:
        from fsspec.core import url_to_fs  # local shards do without

        try:
            self._fs, self._root = url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ManifestError(f"{url} is no place that can be read: {error}") from error
        self._url = url
        self._cache = Cache(cache_dir, int(cache_gb * 1e9))
        self._gone: dict[str, str] = {}
        self._wanted: queue.SimpleQueue[Entry] = queue.SimpleQueue()
        self._has_fetchers = False

    def index(self) -> bytes:
        """The index; never from the cache."""
        return self._read(INDEX)

    def check(self, entries: Sequence[Entry]) -> None:
        """Nothing to do: what is fetched is compared with the index."""

    def sidecar(self, entry: Entry) -> bytes:
        """The sidecar of a tar."""
        name, size, sha256 = entry.sidecar, entry.index_bytes, entry.index_sha256
        try:
            descriptor = self._open(name, size, sha256)
        except LostError as error:
            raise ManifestError(f"{self.place(name)} {error}: {AGAIN}") from error
        with os.fdopen(descriptor, "rb") as file:
            return file.read()

    def open(self, entry: Entry) -> int:
        """A file descriptor of a tar; fetches it unless it is here."""
        if entry.name in self._gone:
            raise LostError(self._gone[entry.name])
        try:
            return self._open(entry.name, entry.bytes, entry.sha256)
        except LostError as error:
            self._gone[entry.name] = str(error)
            raise

    def expect(self, entries: Sequence[Entry]) -> None:
        """Fetch these in the background, and keep them even where the cache is too small."""
        self._cache.keep = {
            digest for entry in entries for digest in (entry.sha256, entry.index_sha256)
        }
        if not self._has_fetchers:
            self._has_fetchers = True
            for number in range(FETCHERS):  # daemons: no run waits for them at its end
                name = f"fetch-{number}"
                threading.Thread(target=self._fetch_ahead, name=name, daemon=True).start()
        for entry in entries:
            self._wanted.put(entry)

    def place(self, name: str) -> str:
        """How messages name a file."""
        return f"{self._url}/{name}"

    def _fetch_ahead(self) -> None:
        while True:
            entry = self._wanted.get()
            try:
                self.sidecar(entry)
                os.close(self.open(entry))
                self._cache.touch(entry.index_sha256)
                self._cache.touch(entry.sha256)
            except Exception:  # whoever comes to need the file will meet the error
                continue

    def _open(self, name: str, size: int, sha256: str) -> int:
        def fetch(partial: Path) -> None:
            self._attempt(name, lambda: self._fetch(name, partial, size, sha256))

        return self._cache.open(sha256, fetch)

    def _fetch(self, name: str, partial: Path, size: int, sha256: str) -> None:
        self._fs.get_file(f"{self._root}/{name}", str(partial))
        digest = sha256_of(partial)
        if partial.stat().st_size != size or digest != sha256:
            raise LostError(
                f"came as {partial.stat().st_size} bytes of sha256 {digest[:12]}…, "
                f"its index says {size} of {sha256[:12]}…"
            )

    def _read(self, name: str) -> bytes:
        try:
            return self._attempt(name, lambda: bytes(self._fs.cat_file(f"{self._root}/{name}")))
        except LostError as error:
            raise ManifestError(
                f"{self.place(name)} cannot be read ({error}): give a folder of one resolution "
                "that the filter stage has written, such as s3://bucket/shards/032"
            ) from error

    def _attempt(self, name: str, ask: Callable[[], Result]) -> Result:
        """Ask again, ever more slowly, where that can help; a file that is not there stays away.

        Raises:
            LostError: it is gone, or still other bytes than the index means.
            RemoteError: the store failed to the last.
        """
        hopeless = (FileNotFoundError, IsADirectoryError, PermissionError)
        waits = pauses(PAUSE_S, attempts=ATTEMPTS)
        try:
            return retry(ask, waits, may_help=lambda error: not isinstance(error, hopeless))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise LostError("can no longer be read (no such file)") from error
        except LostError:
            raise
        except Exception as error:  # each store has its own kinds
            attempts = 1 if isinstance(error, hopeless) else ATTEMPTS
            raise RemoteError(
                f"{self.place(name)} could not be fetched in {attempts} attempts "
                f"({type(error).__name__}: {error}): look after the store or the network, and "
                "run the same command again"
            ) from error


class Cache:
    """Files by sha256 in a folder of this node, of which the least recently used go first."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path, self._max_bytes = path, max_bytes
        self.keep: set[str] = set()
        """Files that this process needs now: it does not delete them."""
        (path / "locks").mkdir(parents=True, exist_ok=True)

    def open(self, sha256: str, fetch: Callable[[Path], None]) -> int:
        """A file descriptor of a file; `fetch` writes and verifies it, once for all processes."""
        path = self._path / sha256
        with suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY)
        with self._locked(sha256):
            try:
                descriptor = os.open(path, os.O_RDONLY)  # another process may have been first
            except FileNotFoundError:
                with filled_aside(path) as partial:
                    fetch(partial)
                    # Now: as soon as it has its name, another process may make room of it.
                    descriptor = os.open(partial, os.O_RDONLY)
        self._make_room({*self.keep, sha256})
        return descriptor

    def touch(self, sha256: str) -> None:
        """Note that a file is in use."""
        with suppress(FileNotFoundError):
            os.utime(self._path / sha256)

    @contextmanager
    def _locked(self, sha256: str) -> Iterator[None]:
        """One of 4096 locks: enough that files hardly ever wait for each other."""
        with (self._path / "locks" / sha256[:3]).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, keep: set[str]) -> None:
        """Delete what has not been used for longest. Who has a file open can go on reading it."""
        files: list[tuple[float, int, Any]] = []
        with os.scandir(self._path) as found:
            for file in found:
                try:
                    state = file.stat()
                except FileNotFoundError:  # another process makes room as well
                    continue
                if file.is_file() and not _is_being_written(file.name, state.st_mtime):
                    files.append((state.st_mtime, state.st_size, file.path))
        excess = sum(size for _, size, _ in files) - self._max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            if Path(path).name not in keep:
                Path(path).unlink(missing_ok=True)
                excess -= size


def _is_being_written(name: str, changed: float) -> bool:
    return is_unfinished(name) and time.time() - changed < ABANDONED_S
