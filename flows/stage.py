"""The stage contract: a name, a config and inputs lead to one directory with a manifest.

    key      = sha256(stage, version, config without resources, {input: content digest})
    dir      = STORE/<stage>/<key[:16]>/, the same after a crash: stages resume in it
    commit   = manifest.json, written last and atomically
    skip     = manifest present and its files match
    content  = digest of a file list; of a sub-folder when a need names one

Neither Prefect nor MLflow in here.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from flows.config import PipelineConfig, Resources

MANIFEST = "manifest.json"
LEASE = ".lease"

Progress = Callable[[str, int, int | None], None]
"""Called with (what, done, total or None) by everything that takes long."""


class StageError(RuntimeError):
    """A stage cannot start or cannot commit; the message says what to do."""


class MissingInputError(StageError):
    """What a stage needs is not in the store."""


class BusyError(StageError):
    """Another live run is writing the same output."""


class FileEntry(BaseModel):
    """One file of an output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int
    sha256: str | None
    """None where other files of the output vouch for its content."""


class StageOutput(BaseModel):
    """What is passed between flows: small, and without the list of files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    key: str
    path: Path
    content: str
    metrics: dict[str, float] = {}
    mlflow_run_id: str | None = None
    seconds: float = 0.0


class Manifest(BaseModel):
    """The commit mark of an output; its presence means that every file is there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    version: int
    key: str
    content: str
    created: datetime
    seconds: float
    config: dict[str, Any]
    inputs: dict[str, str]
    metrics: dict[str, float]
    mlflow_run_id: str | None
    files: tuple[FileEntry, ...]

    def content_of(self, under: str = "") -> str | None:
        """Digest of the files at or below `under`; None when there are none."""
        return _content(
            entry
            for entry in self.files
            if not under or entry.path == under or entry.path.startswith(f"{under}/")
        )


@dataclass(frozen=True)
class Need:
    """An input: the output of another stage, or one file or folder of it.

    Only what lies `under` counts for the key, so a changed log upstream reruns nothing.
    """

    stage: Stage
    under: str = ""
    optional: bool = False


@dataclass
class Context:
    """What a running stage may touch."""

    path: Path
    """Write here. Survives crashes: the next attempt at the same key finds it again."""
    config: Any
    """The stage's section of the configuration."""
    inputs: Mapping[str, Path] = field(default_factory=dict)
    """Where each need lies; an optional one that does not exist is left out."""
    resources: Resources = field(default_factory=Resources)
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables for child processes (the MLflow run to log to)."""
    progress: Progress = lambda what, done, total: None
    log: Callable[[str], None] = lambda line: None
    metrics: dict[str, float] = field(default_factory=dict)
    """Headline figures; the stage fills them in."""
    digests: dict[str, str] = field(default_factory=dict)
    """sha256 by relative path where the writer knows it: terabytes are not read again."""


def _no_needs(config: PipelineConfig) -> dict[str, Need]:
    return {}


def _no_external(config: PipelineConfig) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline."""

    name: str
    version: int
    """Raise it when the code makes other output from the same config."""
    run: Callable[[Context], None]
    needs: Callable[[PipelineConfig], Mapping[str, Need]] = _no_needs
    external: Callable[[PipelineConfig], Mapping[str, str]] = _no_external
    """Digests by name of what it reads from outside the store: they enter the key."""
    scratch: tuple[str, ...] = ()
    """Top-level names that only serve to resume: not part of the output, free to delete."""
    vouched: tuple[str, ...] = ()
    """Top-level folders whose files are listed by size alone: other files of the output hold
    digests of what is in them, and terabytes need not be read again."""
    gpu: bool = False
    """Whether runs of it queue for the `gpu` concurrency limit."""
    unkeyed: tuple[str, ...] = ()
    """Settings of its section that, like resources, do not decide what the output is."""

    @property
    def section(self) -> str:
        """Its attribute in `PipelineConfig`."""
        return self.name.replace("-", "_")

    @property
    def remedy(self) -> str:
        """The commands that produce this stage's output."""
        return (
            f"`python -m flows run --stages {self.name}` or "
            f"`prefect deployment run {self.name}/{self.name}`"
        )


@dataclass(frozen=True)
class Resolved:
    """A stage's key, and where its inputs are and what they hold."""

    key: str
    paths: dict[str, Path]
    contents: dict[str, str]


class Store:
    """Outputs of all stages, below one local or shared folder."""

    def __init__(self, root: Path):
        self.root = root

    def prepare(self) -> None:
        """Make the folder; raises `StageError` when it cannot be written."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise StageError(
                f"the store {self.root} cannot be written ({error.strerror}): "
                "set `store` to a folder that can"
            ) from error

    def directory(self, stage: Stage, key: str) -> Path:
        """Where the output with this key is made and kept."""
        return self.root / stage.name / key[:16]

    def key(self, stage: Stage, config: PipelineConfig, contents: Mapping[str, str]) -> str:
        """Identity of an output: all that decides what it holds."""
        section = getattr(config, stage.section).model_dump(mode="json", exclude={*stage.unkeyed})
        return _digest([stage.name, stage.version, section, dict(contents)])

    def resolve(self, stage: Stage, config: PipelineConfig, *, check: bool = False) -> Resolved:
        """Find the inputs of `stage` in the store, and with them its key.

        `check` compares the files of the inputs with their manifests, too. Raises
        `MissingInputError` naming the command that makes the first input that is not there.
        """
        paths: dict[str, Path] = {}
        contents: dict[str, str] = dict(stage.external(config))
        for name, need in stage.needs(config).items():
            upstream = self.resolve(need.stage, config).key
            folder = self.directory(need.stage, upstream)
            manifest = self.manifest(need.stage, upstream)
            if manifest and check and (damage := self.damage(need.stage, upstream)):
                raise MissingInputError(
                    f"{stage.name} needs the output of {need.stage.name}, but {damage}: "
                    f"run {need.stage.remedy} to make it again"
                )
            if manifest is None:
                raise MissingInputError(
                    f"{stage.name} needs the output of {need.stage.name} for this configuration, "
                    f"and {folder} is not complete: run {need.stage.remedy} first, "
                    "with the same preset and settings"
                )
            content = manifest.content_of(need.under)
            if content is not None:
                paths[name], contents[name] = folder / need.under, content
            elif not need.optional:
                there = sorted({str(Path(entry.path).parent) for entry in manifest.files})
                raise MissingInputError(
                    f"{stage.name} needs {need.under!r} from {need.stage.name}, but {folder} "
                    f"holds only {', '.join(there[:12])}: make the settings of the two stages agree"
                )
        return Resolved(self.key(stage, config, contents), paths, contents)

    def manifest(self, stage: Stage, key: str) -> Manifest | None:
        """The manifest with this key, or None when the output was never completed."""
        try:
            text = (self.directory(stage, key) / MANIFEST).read_text()
        except FileNotFoundError:
            return None
        return Manifest.model_validate_json(text)

    def damage(self, stage: Stage, key: str, *, verify: bool = False) -> str | None:
        """What is wrong with a completed output: None, or the first file that does not match.

        Sizes are always compared; `verify` reads every file again and compares sha256.
        """
        manifest = self.manifest(stage, key)
        assert manifest is not None, "only a completed output can be damaged"
        folder = self.directory(stage, key)
        for entry in manifest.files:
            path = folder / entry.path
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != entry.size:
                return f"{path} has {path.stat().st_size} bytes instead of {entry.size}"
            if verify and entry.sha256 and _sha256(path) != entry.sha256:
                return f"{path} has another sha256 than when it was written"
        return None

    def lookup(self, stage: Stage, key: str, *, verify: bool = False) -> StageOutput | None:
        """The output with this key if it is complete and undamaged."""
        manifest = self.manifest(stage, key)
        if manifest is None or self.damage(stage, key, verify=verify):
            return None
        return self._output(stage, manifest)

    def discard(self, stage: Stage, key: str, *, keep: tuple[str, ...] = ()) -> None:
        """Delete an output, manifest first, but the top-level names in `keep`."""
        folder = self.directory(stage, key)
        (folder / MANIFEST).unlink(missing_ok=True)
        for path in folder.iterdir():
            if path.name in keep or path.name.startswith(LEASE):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def commit(
        self,
        stage: Stage,
        key: str,
        context: Context,
        *,
        inputs: Mapping[str, str],
        mlflow_run_id: str | None = None,
        seconds: float = 0.0,
    ) -> StageOutput:
        """List the files and write the manifest: from now on the stage is up to date."""
        files = tuple(
            FileEntry(
                path=name,
                size=path.stat().st_size,
                sha256=None
                if name.partition("/")[0] in stage.vouched
                else context.digests.get(name) or _sha256(path),
            )
            for name, path in _files(context.path, stage.scratch)
        )
        manifest = Manifest(
            stage=stage.name,
            version=stage.version,
            key=key,
            content=_content(files) or _digest([]),
            created=datetime.now(UTC),
            seconds=seconds,
            config=context.config.model_dump(mode="json"),
            inputs=dict(inputs),
            metrics=context.metrics,
            mlflow_run_id=mlflow_run_id,
            files=files,
        )
        _write_atomically(context.path / MANIFEST, manifest.model_dump_json(indent=1))
        return self._output(stage, manifest)

    def _output(self, stage: Stage, manifest: Manifest) -> StageOutput:
        return StageOutput(
            stage=manifest.stage,
            key=manifest.key,
            path=self.directory(stage, manifest.key),
            content=manifest.content,
            metrics=manifest.metrics,
            mlflow_run_id=manifest.mlflow_run_id,
            seconds=manifest.seconds,
        )

    @contextmanager
    def lease(self, stage: Stage, key: str, *, stale_s: float = 30.0) -> Iterator[Lease]:
        """Be the only writer of an output.

        A lease whose process has died on this host is taken over at once; any other that is
        found must stand still for `stale_s` seconds first. Raises `BusyError` when its holder
        is alive.
        """
        folder = self.directory(stage, key)
        folder.mkdir(parents=True, exist_ok=True)
        lease = Lease(folder / LEASE, stale_s)
        lease.acquire()
        try:
            yield lease
        finally:
            lease.release()


class Lease:
    """A file that one run holds and keeps touching while it lives."""

    def __init__(self, path: Path, stale_s: float):
        self.path = path
        self.stale_s = stale_s
        self._mine = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
                "token": uuid.uuid4().hex,
            }
        )
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)

    def acquire(self) -> None:
        """Take the lease, waiting at most `stale_s` for a silent holder to prove alive."""
        silent: tuple[str, int] | None = None
        since = time.monotonic()
        while True:
            with self._mutex():
                held = self._read()
                if held is None or _died_here(held) or self._expired(held, silent, since):
                    _write_atomically(self.path, self._mine)
                    break
                beat = self._last_beat()
            if silent is None:
                silent, since = (held, beat), time.monotonic()
            elif silent != (held, beat):
                holder = json.loads(held)
                raise BusyError(
                    f"{self.path.parent} is being written by process {holder['pid']} on "
                    f"{holder['host']} since {holder['since']}: wait for that run, or stop it"
                )
            time.sleep(min(1.0, self.stale_s / 10))
        self._heart.start()

    def check(self) -> None:
        """Raise `BusyError` if another run took over while this one was not heard of."""
        if self._read() != self._mine:
            raise BusyError(
                f"{self.path.parent} was taken over by another run while this one stood still "
                "(suspended machine?): its output is not committed here"
            )

    def release(self) -> None:
        """Give the lease back if it is still ours."""
        self._stop.set()
        self._heart.join()
        with self._mutex():
            if self._read() == self._mine:
                self.path.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(self.stale_s / 5):
            if self._read() == self._mine:
                os.utime(self.path)

    def _expired(self, held: str, silent: tuple[str, int] | None, since: float) -> bool:
        waited = time.monotonic() - since
        return silent == (held, self._last_beat()) and waited > self.stale_s

    def _last_beat(self) -> int:
        return self.path.stat().st_mtime_ns

    def _read(self) -> str | None:
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return None

    @contextmanager
    def _mutex(self) -> Iterator[None]:
        """One process at a time decides who holds the lease; the kernel frees it on death."""
        with self.path.with_name(f"{LEASE}.mutex").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _died_here(held: str) -> bool:
    holder = json.loads(held)
    return holder["host"] == socket.gethostname() and not is_alive(holder["pid"])


def is_alive(pid: int) -> bool:
    """Whether a process of this machine is running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _files(folder: Path, scratch: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Files of an output in a fixed order; hidden ones and the manifest are not part of it."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.is_file() and not hidden and parts[0] not in (MANIFEST, *scratch):
            yield "/".join(parts), path


def _content(entries: Iterator[FileEntry] | tuple[FileEntry, ...]) -> str | None:
    listed = [(entry.path, entry.sha256) for entry in entries]
    return _digest(listed) if listed else None


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
