"""Where one output lies: a folder of this machine, and perhaps the URL that it mirrors.

Behind a URL the objects are the truth. Files of the folder are trusted as far as `.mirror.json`
says which ones they are; anything else is compared by its digest, or fetched.
"""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from flows.stage import MANIFEST, DamagedError, FileEntry, Manifest
from flows.storage.files import UnsafeNameError, inside, listing, safe
from flows.storage.objects import Remote, each
from gigagan.common.files import sha256_of, write_aside
from gigagan.common.progress import Progress, silent

RECORD = ".mirror.json"
WORK = ".work.json"
"""Lists the files of unfinished work that were sent; it is written after them."""
LINE = ".line.json"
"""Of a stage whose runs have a length: which run this is, and how long."""
TAKEN = ".taken"
"""Where the work of another output is brought to, before it takes its place."""


class Record(BaseModel):
    """What is known of the files of a mirror."""

    model_config = ConfigDict(extra="ignore")

    known: dict[str, tuple[str, int, int]] = {}
    """By name: digest (or commit, for a file without one), size, time of change."""
    sent: dict[str, tuple[int, int]] = {}
    """By name: size and time of change of unfinished work when it was sent."""
    work: str | None = None
    """Which state of the unfinished work this folder goes on from."""


class Line(BaseModel):
    """Which run this is, whatever its length, and how long it shall be."""

    id: str
    length: int


class Work(BaseModel):
    """The list of unfinished work behind a URL."""

    id: str
    files: dict[str, int]


class Place:
    """One output's folder."""

    def __init__(self, folder: Path, remote: Remote | None = None):
        self.folder = folder
        self.remote = remote

    def __str__(self) -> str:
        return self.remote.url if self.remote else str(self.folder)

    def manifest(self) -> Manifest | None:
        """The manifest, or None when the output was never completed."""
        try:
            data = self._read(MANIFEST)
            return None if data is None else Manifest.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise DamagedError(
                f"{self}/{MANIFEST} is not one of ours ({where}: {first['msg']}): "
                "delete it, and its stage runs again"
            ) from error

    def damage(
        self, manifest: Manifest, *, verify: bool = False, progress: Progress = silent
    ) -> str | None:
        """What is wrong with the output: None, or the first file that does not match.

        Sizes are always compared; `verify` reads every file again and compares sha256.
        """
        names = [entry.path for entry in manifest.files]
        try:
            sizes = self.remote.sizes() if self.remote else _sizes(self.folder, names)
        except UnsafeNameError as error:
            return str(error)
        total = sum(entry.size for entry in manifest.files)
        done = 0
        for entry in manifest.files:
            path, size = f"{self}/{entry.path}", sizes.get(entry.path)
            if size is None:
                return f"{path} is missing"
            if size != entry.size:
                return f"{path} has {size} bytes instead of {entry.size}"
            if verify and entry.sha256 and self._sha256(entry.path) != entry.sha256:
                return f"{path} has another sha256 than when it was written"
            done += entry.size
            if verify:
                progress("verifying bytes", done, total)
        return None

    def has_work(self) -> bool:
        """Whether something is there, finished or not."""
        if self.remote and self.remote.read(WORK) is not None:
            return True
        return self.folder.is_dir() and any(self.folder.iterdir())

    def line(self) -> Line | None:
        """What `mark` wrote; None where nothing is known."""
        try:
            return Line.model_validate_json(self._read(LINE) or b"")
        except ValidationError:
            return None

    def mark(self, line: Line) -> None:
        """Write down which run this is."""
        text = line.model_dump_json()
        if self.remote:
            self.remote.write(LINE, text.encode())
        _write(self.folder / LINE, text)

    def names(self) -> list[str]:
        """Names of the files that are here, or behind the URL, without hidden ones."""
        if self.remote:
            found = self.remote.sizes()
            return sorted(n for n in found if not any(p.startswith(".") for p in n.split("/")))
        return [name for name, _ in listing(self.folder)] if self.folder.is_dir() else []

    def take_over(
        self, other: Place, reached: Callable[[Iterable[str]], int], progress: Progress = silent
    ) -> None:
        """Bring the work of another output into this folder.

        All of it is brought aside first. What tells how far it is takes its place last, and whole:
        whoever is interrupted before does it again.
        """
        names = [name for name in other.names() if name != MANIFEST]
        aside = self.folder / TAKEN
        shutil.rmtree(aside, ignore_errors=True)

        def bring(name: str) -> None:
            target = inside(aside, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if other.remote:
                other.remote.download(name, target)
            else:
                shutil.copy2(inside(other.folder, name), target)

        each("taking over earlier work", bring, names, progress)
        tops: dict[str, list[str]] = {}
        for name in names:
            tops.setdefault(name.partition("/")[0], []).append(name)
        for top in sorted(tops, key=lambda top: (reached(tops[top]), top)):
            _remove(self.folder / top)
            (aside / top).replace(self.folder / top)
        shutil.rmtree(aside, ignore_errors=True)

    def discard(self, keep: Sequence[str] = ()) -> None:
        """Delete everything, manifest first, but the top-level names in `keep`."""
        if self.remote:
            self.remote.delete([MANIFEST, WORK])
            self.remote.delete(self.remote.sizes())
        self._clear(keep)

    # Everything below is for a mirror: a folder that stands for a URL.

    def pull(
        self, manifest: Manifest, wanted: Iterable[FileEntry], progress: Progress = silent
    ) -> int:
        """Fetch those files of a finished output that are not here; returns how many."""
        if self.remote is None:
            return 0
        remote = self.remote
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self._record()
        missing = [entry for entry in wanted if not self._has(entry, manifest, record)]

        def fetch(entry: FileEntry) -> None:
            path = inside(self.folder, entry.path)
            remote.download(entry.path, path, size=entry.size, digest=entry.sha256)

        if missing:
            each(f"fetching from {manifest.stage}", fetch, missing, progress)
            for entry in missing:
                record.known[entry.path] = _known(entry, manifest, self.folder)
            self._save(record)
        return len(missing)

    def resume(self, progress: Progress = silent) -> int:
        """Make the folder, equal to the unfinished work behind the URL; returns what was fetched.

        What lies in it is kept where nobody else has worked since.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.remote is None:
            return 0
        remote, record = self.remote, self._record()
        data = remote.read(WORK)
        there = Work.model_validate_json(data) if data else None
        # A folder with `known` files mirrors a finished output, which is discarded by now.
        if (there.id if there else None) == record.work and not record.known:
            return 0
        self._clear(())
        names = [safe(name) for name in there.files] if there else []
        targets = [(name, inside(self.folder, name)) for name in names]
        each("fetching unfinished work", lambda pair: remote.download(*pair), targets, progress)
        sent = {name: _stamp(path) for name, path in targets}
        self._save(Record(work=there.id if there else None, sent=sent))
        return len(names)

    def push(self, progress: Progress = silent) -> int:
        """Send what changed of unfinished work, then the list of it; returns how many files."""
        if self.remote is None:
            return 0
        record = self._record()
        found = listing(self.folder, (MANIFEST,))
        now = {name: (path, _stamp(path)) for name, path in found}
        changed = [name for name in now if record.sent.get(name) != now[name][1]]
        gone = [name for name in record.sent if name not in now]
        if not changed and not gone:
            return 0
        # What a file that changes speaks of must be there before it.
        for group in (
            [n for n in changed if n not in record.sent],
            record.sent.keys() & {*changed},
        ):
            each("saving unfinished work", lambda n: self._send(n, now[n][0]), [*group], progress)
        sent = {name: stamp for name, (path, stamp) in now.items() if path.exists()}
        work = Work(id=uuid.uuid4().hex, files={name: size for name, (size, _) in sent.items()})
        self.remote.write(WORK, work.model_dump_json().encode())
        self.remote.delete(gone)
        record.sent, record.work = sent, work.id
        self._save(record)
        return len(changed)

    @contextmanager
    def pushing(
        self, every_s: float, *, may: Callable[[], bool], log: Callable[[str], None]
    ) -> Iterator[None]:
        """Send unfinished work now and then during the block, and when it fails."""
        if self.remote is None:
            yield
            return
        stop = threading.Event()

        def once() -> None:
            try:
                if may():
                    self.push()
            except Exception as error:  # the work itself goes on; the next turn tries again
                log(f"unfinished work was not saved to {self}: {error}")

        def loop() -> None:
            while not stop.wait(every_s):
                once()

        thread = threading.Thread(target=loop, name="store-push", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            stop.set()
            thread.join()
            once()
            raise
        stop.set()
        thread.join()

    def publish(self, manifest: Manifest, progress: Progress = silent) -> None:
        """Send all files of a finished output; the manifest is not among them."""
        if self.remote is None:
            return
        record = self._record()
        sent = record.sent
        stamps = {e.path: _stamp(inside(self.folder, e.path)) for e in manifest.files}
        changed = [name for name, stamp in stamps.items() if sent.get(name) != stamp]
        each(
            f"storing the output of {manifest.stage}",
            lambda name: self._send(name, self.folder / name),
            changed,
            progress,
        )
        record.sent |= stamps
        self._save(record)

    def seal(self, manifest: Manifest, keep: Sequence[str] = ()) -> None:
        """Write the manifest, then remove what only served to get here, but the names in `keep`."""
        text = manifest.model_dump_json(indent=1)
        if self.remote:
            self.remote.write(MANIFEST, text.encode())
            named = {MANIFEST, *(entry.path for entry in manifest.files)}
            rest = [
                n for n in self.remote.sizes() if n not in named and n.split("/")[0] not in keep
            ]
            self.remote.delete([WORK, *rest])
            known = {e.path: _known(e, manifest, self.folder) for e in manifest.files}
            self._save(Record(known=known))
        _write(self.folder / MANIFEST, text)

    def _has(self, entry: FileEntry, manifest: Manifest, record: Record) -> bool:
        if _size(self.folder, entry.path) != entry.size:
            return False
        if record.known.get(entry.path) == _known(entry, manifest, self.folder):
            return True
        return entry.sha256 is not None and sha256_of(self.folder / entry.path) == entry.sha256

    def _send(self, name: str, path: Path) -> None:
        assert self.remote is not None
        try:
            self.remote.upload(path, name)
        except FileNotFoundError:
            if path.exists():
                raise  # else: a checkpoint that made room for a newer one

    def _read(self, name: str) -> bytes | None:
        if self.remote:
            return self.remote.read(name)
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError as error:
            raise DamagedError(
                f"{self.folder / name} is a folder: delete it, and its stage runs again"
            ) from error

    def _sha256(self, name: str) -> str:
        return self.remote.sha256(name) if self.remote else sha256_of(self.folder / name)

    def _record(self) -> Record:
        try:
            return Record.model_validate_json((self.folder / RECORD).read_bytes())
        except (FileNotFoundError, ValidationError):
            return Record()

    def _save(self, record: Record) -> None:
        _write(self.folder / RECORD, record.model_dump_json())

    def _clear(self, keep: Sequence[str]) -> None:
        if not self.folder.is_dir():
            return
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name not in keep:
                _remove(path)


def _write(path: Path, text: str) -> None:
    write_aside(path, text, fsync=True, has_rivals=True)


def _remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Sizes of those files that are there; each folder is searched for links once."""
    sizes: dict[str, int] = {}
    known: set[Path] = set()
    for name in names:
        path = folder / name
        if path.parent not in known or path.is_symlink():
            inside(folder, name)
            known.add(path.parent)
        if path.is_file():
            sizes[name] = path.stat().st_size
    return sizes


def _size(folder: Path, name: str) -> int | None:
    path = inside(folder, name)
    return path.stat().st_size if path.is_file() else None


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _known(entry: FileEntry, manifest: Manifest, folder: Path) -> tuple[str, int, int]:
    identity = entry.sha256 or manifest.created.isoformat()
    return identity, *_stamp(folder / entry.path)
