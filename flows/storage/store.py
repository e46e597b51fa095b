"""The store: where the outputs of all stages are found by key, made, and kept.

Below one folder, or one fsspec URL that a folder of this machine mirrors. It runs nothing.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.config import PipelineConfig
from flows.stage import (
    MANIFEST,
    BusyError,
    Context,
    DamagedError,
    FileEntry,
    Manifest,
    MissingInputError,
    Need,
    Stage,
    StageError,
    StageOutput,
    content,
)
from flows.storage import lease as leases
from flows.storage.files import UnsafeNameError, digest, listing
from flows.storage.lease import Lease, LocalBoard
from flows.storage.objects import Remote, RemoteBoard
from flows.storage.place import Line, Place
from gigagan.common.files import sha256_of
from gigagan.common.progress import Progress, silent

LEASES = ".leases"
SHORT_KEY = re.compile(r"[0-9a-f]{16}")
LEGIBLE = (".png", ".json", ".html", ".md", ".txt")
LEGIBLE_BYTES = 16 * 2**20
"""Larger files are not fetched just to be looked at."""
BOARD_ATTEMPTS = 4
"""Of one request about a lease: a beat that comes late is worth less than the next one."""


@dataclass(frozen=True)
class Input:
    """An input that was found."""

    need: Need
    place: Place
    manifest: Manifest

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """What of it is read."""
        names = (self.need.under, *self.need.beside)
        return tuple(dict.fromkeys(entry for name in names for entry in self.manifest.below(name)))


@dataclass(frozen=True)
class Resolved:
    """A stage's key, and where its inputs are and what they hold."""

    key: str
    paths: dict[str, Path]
    contents: dict[str, str]
    inputs: dict[str, Input] = field(default_factory=dict, compare=False)

    @property
    def origins(self) -> dict[str, str]:
        """The output, as STAGE/KEY, that each input comes from."""
        return {name: found.manifest.name for name, found in self.inputs.items()}


Upstream = Mapping[str, Place]
"""Outputs by stage that are used instead of those that the configuration leads to."""


class Store:
    """Outputs of all stages, below one local or shared folder, or one URL."""

    def __init__(self, root: Path, remote: Remote | None = None):
        self.root = root
        self.remote = remote

    @classmethod
    def of(cls, config: PipelineConfig) -> Store:
        """The store that a configuration names."""
        return cls(config.store_path, Remote(config.store_url) if config.store_url else None)

    def __str__(self) -> str:
        return self.remote.url if self.remote else str(self.root)

    def prepare(self) -> None:
        """Make the folder; raises `StageError` when it cannot be written."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise StageError(
                f"the store {self.root} cannot be written ({error.strerror}): "
                "set `store`, or GIGAGAN_RUNS for all of runs/, to a folder that can"
            ) from error
        if self.remote:
            self.remote.prepare()

    def place(self, stage: str, key: str) -> Place:
        """Where the output with this key is, there and here."""
        name = f"{stage}/{key[:16]}"
        return Place(self.root / name, self.remote.below(name) if self.remote else None)

    def keys(self, stage: str) -> list[str]:
        """Keys, as their folders show them, of all outputs of a stage, finished or not."""
        if self.remote:
            names = self.remote.below(stage).folders()
        else:
            folder = self.root / stage
            names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(name for name in names if SHORT_KEY.fullmatch(name))

    def key(self, stage: Stage, config: PipelineConfig, contents: Mapping[str, str]) -> str:
        """Identity of an output: all that decides what it holds."""
        section = getattr(config, stage.section).model_dump(mode="json")
        return _identity(stage, config, section, contents)

    def resolve(
        self,
        stage: Stage,
        config: PipelineConfig,
        *,
        upstream: Upstream | None = None,
        check: bool = False,
    ) -> Resolved:
        """Find the inputs of `stage` in the store, and with them its key.

        `check` compares the files of the inputs with their manifests, too. Raises
        `MissingInputError` naming the command that makes the first input that is not there.
        """
        resolved = self._resolve(stage, config, upstream or {}, {})
        makers = {found.need.stage.name: found for found in resolved.inputs.values()}
        for found in makers.values() if check else ():
            if damage := found.place.damage(found.manifest):
                raise MissingInputError(
                    f"{stage.name} needs the output of {found.need.stage.name}, but {damage}: "
                    f"run {found.need.stage.remedy} to make it again"
                )
        return resolved

    def _resolve(
        self,
        stage: Stage,
        config: PipelineConfig,
        upstream: Upstream,
        seen: dict[str, tuple[Place, Manifest]],
    ) -> Resolved:
        inputs: dict[str, Input] = {}
        contents = dict(stage.external(config))
        for name, need in stage.needs(config).items():
            maker = need.stage
            if maker.name not in seen:
                place = upstream.get(maker.name) or self.place(
                    maker.name, self._resolve(maker, config, upstream, seen).key
                )
                seen[maker.name] = place, _complete(stage, maker, place)
            place, manifest = seen[maker.name]
            found = manifest.content_of(need.under)
            if found is not None:
                inputs[name], contents[name] = Input(need, place, manifest), found
            elif not need.optional:
                there = sorted({str(Path(entry.path).parent) for entry in manifest.files})
                raise MissingInputError(
                    f"{stage.name} needs {need.under!r} from {maker.name}, but {place} "
                    f"holds only {', '.join(there[:12])}: make the settings of the two stages agree"
                )
        paths = {name: found.place.folder / found.need.under for name, found in inputs.items()}
        return Resolved(self.key(stage, config, contents), paths, contents, inputs)

    def shorter(
        self, stage: Stage, config: PipelineConfig, resolved: Resolved
    ) -> tuple[Place, int] | None:
        """Where the same run lies that was to be shorter and went furthest, and how far it is.

        None where the stage has no length, where the output has come some way by itself, or where
        no other has.
        """
        if stage.length is None:
            return None
        own = self.place(stage.name, resolved.key)
        if stage.length.reached(own.names()) > 0:
            return None
        wanted = _line(stage, config, resolved)
        found: list[tuple[int, str]] = []
        for key in self.keys(stage.name):
            place = self.place(stage.name, key)
            line = self._line_of(stage, config, place)
            if line and line.id == wanted.id and line.length < wanted.length:
                found.append((stage.length.reached(place.names()), key))
        reached, key = max(found, default=(0, ""))
        return (self.place(stage.name, key), reached) if reached > 0 else None

    def _line_of(self, stage: Stage, config: PipelineConfig, place: Place) -> Line | None:
        """Which run an output is of; of finished ones the manifest says it."""
        assert stage.length is not None
        try:
            manifest = place.manifest()
        except DamagedError:
            return None
        if manifest is None:
            return place.line()
        length = manifest.config.get(stage.length.setting)
        if manifest.version != stage.version or not isinstance(length, int):
            return None
        told = _identity(stage, config, manifest.config, manifest.inputs, stage.length.setting)
        return Line(id=told, length=length)

    def go_on(
        self,
        stage: Stage,
        config: PipelineConfig,
        resolved: Resolved,
        progress: Progress = silent,
    ) -> str | None:
        """Begin with what a shorter run of the same settings left, if there is one; says which.

        The caller holds the lease of this output; another that is being written is let alone.
        """
        if stage.length is None:
            return None
        own = self.place(stage.name, resolved.key)
        found = self.shorter(stage, config, resolved)
        own.mark(_line(stage, config, resolved))
        if found is None:
            return None
        other, reached = found
        setting, name = f"{stage.section}.{stage.length.setting}", other.folder.name
        try:
            with self.lease(stage, name, wait=False):
                own.take_over(other, stage.length.reached, progress)
        except BusyError as error:
            return f"begins anew, for the shorter run to go on from is in use: {error}"
        return f"goes on from {stage.name}/{name}, which came to {reached:,} of {setting}"

    def fetch(self, resolved: Resolved, progress: Progress = silent) -> None:
        """Bring what a stage reads to this machine."""
        for found in resolved.inputs.values():
            found.place.pull(found.manifest, found.files, progress)

    def fetch_legible(self, stage: Stage, key: str) -> None:
        """Bring what a person would look at of an output: its reports and pictures."""
        place = self.place(stage.name, key)
        if place.remote and (manifest := place.manifest()):
            legible = [e for e in manifest.files if e.path.endswith(LEGIBLE)]
            shallow = [e for e in legible if e.path.count("/") <= 1 and e.size < LEGIBLE_BYTES]
            wanted = [e for e in shallow if "/" not in e.path or e.path.startswith("sheets/")]
            place.pull(manifest, wanted)

    def manifest(self, stage: Stage, key: str) -> Manifest | None:
        """The manifest with this key, or None when the output was never completed."""
        place = self.place(stage.name, key)
        manifest = place.manifest()
        if manifest and manifest.name != f"{stage.name}/{key[:16]}":
            raise DamagedError(
                f"{place}/{MANIFEST} is that of {manifest.name}: "
                "delete it, and its stage runs again"
            )
        return manifest

    def lookup(self, stage: Stage, key: str, *, verify: bool = False) -> StageOutput | None:
        """The output with this key if it is complete and undamaged."""
        manifest = self.manifest(stage, key)
        if manifest is None or self.place(stage.name, key).damage(manifest, verify=verify):
            return None
        return self._output(manifest)

    def commit(
        self,
        stage: Stage,
        key: str,
        context: Context,
        *,
        inputs: Mapping[str, str],
        origins: Mapping[str, str] | None = None,
        mlflow_run_id: str | None = None,
        seconds: float = 0.0,
        check: Callable[[], None] = lambda: None,
    ) -> StageOutput:
        """List the files and write the manifest: from now on the stage is up to date.

        `check` is called last before that: it raises where the lease is lost.
        """
        files = _listed(stage, context)
        manifest = Manifest(
            stage=stage.name,
            version=stage.version,
            key=key,
            content=content(files) or digest([]),
            created=datetime.now(UTC),
            seconds=seconds,
            config=context.config.model_dump(mode="json"),
            inputs=dict(inputs),
            origins=dict(origins or {}),
            metrics=context.metrics,
            mlflow_run_id=mlflow_run_id,
            files=files,
        )
        place = self.place(stage.name, key)
        keep = stage.scratch if stage.length else ()  # a longer run may go on from it
        if keep:
            place.push(context.progress)
        place.publish(manifest, context.progress)
        check()
        place.seal(manifest, keep)
        return self._output(manifest)

    def _output(self, manifest: Manifest) -> StageOutput:
        place = self.place(manifest.stage, manifest.key)
        return StageOutput(
            stage=manifest.stage,
            key=manifest.key,
            path=place.folder,
            content=manifest.content,
            metrics=manifest.metrics,
            mlflow_run_id=manifest.mlflow_run_id,
            seconds=manifest.seconds,
            url=place.remote.url if place.remote else None,
        )

    def board(self, stage: str, key: str) -> leases.Board:
        """The files of the lease on an output."""
        name = f"{LEASES}/{stage}/{key[:16]}"
        if self.remote:
            return RemoteBoard(self.remote.below(name, attempts=BOARD_ATTEMPTS))
        return LocalBoard(self.root / name)

    @contextmanager
    def lease(
        self,
        stage: str | Stage,
        key: str,
        *,
        stale_s: float = leases.STALE_S,
        wait: bool = True,
        on_wait: Callable[[str], None] = lambda message: None,
    ) -> Iterator[Lease]:
        """Be the only writer of an output.

        Waits for who is writing it, telling `on_wait` for whom; a holder whose process has died
        on this host is replaced at once, any other that stands still after `stale_s` seconds.
        """
        name = stage if isinstance(stage, str) else stage.name
        what = str(self.place(name, key))
        lease = Lease(self.board(name, key), what, stale_s=stale_s, on_wait=on_wait)
        try:
            lease.acquire(wait=wait)
            yield lease
        finally:
            lease.release()


def _identity(
    stage: Stage,
    config: PipelineConfig,
    section: Mapping[str, Any],
    contents: Mapping[str, str],
    *without: str,
) -> str:
    """Digest of all that decides an output, `without` some settings."""
    left_out = {*stage.unkeyed(config), *without}
    settings = {name: value for name, value in section.items() if name not in left_out}
    return digest([stage.name, stage.version, settings, dict(contents)])


def _line(stage: Stage, config: PipelineConfig, resolved: Resolved) -> Line:
    """The run that a configuration leads to."""
    assert stage.length is not None
    setting = stage.length.setting
    section = getattr(config, stage.section).model_dump(mode="json")
    told = _identity(stage, config, section, resolved.contents, setting)
    return Line(id=told, length=section[setting])


def _complete(stage: Stage, maker: Stage, place: Place) -> Manifest:
    manifest = place.manifest()
    if manifest is None:
        raise MissingInputError(
            f"{stage.name} needs the output of {maker.name} for this configuration, "
            f"and {place} is not complete: run {maker.remedy} first, "
            "with the same preset and settings"
        )
    if manifest.stage != maker.name:
        raise DamagedError(
            f"{stage.name} needs the output of {maker.name}, and {place} is one of {manifest.stage}"
        )
    return manifest


def _listed(stage: Stage, context: Context) -> tuple[FileEntry, ...]:
    """The files of an output, with digests as far as nothing else vouches for them."""
    try:
        found = list(listing(context.path, (MANIFEST, *stage.scratch)))
    except UnsafeNameError as error:
        raise StageError(f"the output of {stage.name} cannot be committed: {error}") from error
    return tuple(
        FileEntry(
            path=name,
            size=path.stat().st_size,
            sha256=None
            if name.partition("/")[0] in stage.vouched
            else context.digests.get(name) or sha256_of(path),
        )
        for name, path in found
    )
