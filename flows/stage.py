"""The stage contract: a name, a config and inputs lead to one directory with a manifest.

    key      = sha256(stage, version, settings that decide the output, {input: content digest})
    dir      = STORE/<stage>/<key[:16]>/, the same after a crash: stages resume in it
    length   = the setting that says how long a run is: the same run, further, goes on from what a
               shorter one of otherwise equal settings and inputs left
    commit   = manifest.json, written last and atomically
    skip     = manifest present and its files match
    content  = digest of a file list; of a sub-folder when a need names one

What the words mean; `store.py` does it. Neither Prefect nor MLflow in here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from flows.config import PipelineConfig, Resources
from flows.storage.files import digest, safe
from gigagan.common.progress import Progress, silent

MANIFEST = "manifest.json"


class StageError(RuntimeError):
    """A stage cannot start or cannot commit; the message says what to do."""


class MissingInputError(StageError):
    """What a stage needs is not in the store."""


class DamagedError(StageError):
    """An output, or its manifest, is not what was written."""


class BusyError(StageError):
    """Another run writes the same output: it took over while this one stood still."""


class FileEntry(BaseModel):
    """One file of an output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int = Field(ge=0)
    sha256: str | None
    """None where other files of the output vouch for its content."""

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        return safe(path)


class StageOutput(BaseModel):
    """What is passed between flows: small, and without the list of files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    key: str
    path: Path
    """Its folder on this machine; of a store behind a URL it may hold only part of the files."""
    content: str
    metrics: dict[str, float] = {}
    mlflow_run_id: str | None = None
    seconds: float = 0.0
    url: str | None = None
    """Where all of it lies when the store is behind a URL."""


class Manifest(BaseModel):
    """The commit mark of an output; its presence means that every file is there."""

    # A figure may be NaN, of which JSON's own word is not a number when it is read again.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    stage: str = Field(pattern=r"^[a-z-]+$")
    version: int
    key: str = Field(pattern=r"^[0-9a-f]{64}$")
    content: str
    created: datetime
    seconds: float
    config: dict[str, Any]
    inputs: dict[str, str]
    """Content digest of each input, and of what was read from outside the store."""
    origins: dict[str, str]
    """The output, as STAGE/KEY, that each input came from."""
    metrics: dict[str, float]
    mlflow_run_id: str | None
    files: tuple[FileEntry, ...]

    @property
    def name(self) -> str:
        """STAGE/KEY, as its folder is called."""
        return f"{self.stage}/{self.key[:16]}"

    def below(self, under: str) -> tuple[FileEntry, ...]:
        """The files at or below `under`; all when it is empty."""
        return tuple(
            entry
            for entry in self.files
            if not under or entry.path == under or entry.path.startswith(f"{under}/")
        )

    def content_of(self, under: str = "") -> str | None:
        """Digest of the files at or below `under`; None when there are none."""
        return content(self.below(under))


def content(entries: tuple[FileEntry, ...]) -> str | None:
    """Digest of a list of files; None of an empty one."""
    listed = [(entry.path, entry.sha256) for entry in entries]
    return digest(listed) if listed else None


@dataclass(frozen=True)
class Need:
    """An input: the output of another stage, or one file or folder of it.

    Only what lies `under` counts for the key, so a changed log upstream reruns nothing.
    """

    stage: Stage
    under: str = ""
    optional: bool = False
    beside: tuple[str, ...] = ()
    """What else of that output is read, where it exists: what lies `under` vouches for it."""

    def __post_init__(self) -> None:
        for name in (self.under, *self.beside):
            if name:
                safe(name)


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
    progress: Progress = silent
    log: Callable[[str], None] = lambda line: None
    metrics: dict[str, float] = field(default_factory=dict)
    """Headline figures; the stage fills them in."""
    digests: dict[str, str] = field(default_factory=dict)
    """sha256 by relative path where the writer knows it: terabytes are not read again."""


@dataclass(frozen=True)
class Length:
    """How a stage's runs may differ and yet be one run, of which one went further."""

    setting: str
    """Of its section: how long a run is."""
    reached: Callable[[Iterable[str]], int]
    """Names of files of unfinished or finished work → how far it is, in the setting's unit."""


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline."""

    name: str
    version: int
    """Raise it when the code makes other output from the same config."""
    run: Callable[[Context], None]
    needs: Callable[[PipelineConfig], Mapping[str, Need]] = lambda config: {}
    external: Callable[[PipelineConfig], Mapping[str, str]] = lambda config: {}
    """Digests by name of what it reads from outside the store: they enter the key."""
    scratch: tuple[str, ...] = ()
    """Top-level names that only serve to resume: not part of the output, free to delete."""
    vouched: tuple[str, ...] = ()
    """Top-level folders whose files are listed by size alone: other files of the output hold
    digests of what is in them, and terabytes need not be read again."""
    harm: Callable[[Path, Progress], str | None] | None = None
    """Reads what is `vouched` whole: what is wrong with it and the remedy, or None."""
    gpu: bool = False
    """Whether runs of it queue for the `gpu` concurrency limit."""
    unkeyed: Callable[[PipelineConfig], Collection[str]] = lambda config: ()
    """Settings of its section that, like resources, do not decide what the output is: those under
    which unfinished work goes on, and those that are not read."""
    length: Length | None = None
    """What makes a longer run of a shorter one; null where there is no such thing."""
    registers: bool = False
    """Whether it measures a pair of networks, which then stands in MLflow's registry."""

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
