"""Save and restore everything that a run needs to go on as if it had not stopped.

A checkpoint is `images-N.pt`, with `images-N.json` beside it that says what it is: position,
configuration, size and sha256. The JSON is written first and the weights take their name last, so a
reader sees a whole checkpoint or none, whenever the writer dies.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from gigagan.common.files import PARTIAL, filled_aside, sha256_of, write_aside
from gigagan.config import FREE_TO_CHANGE

FULL_BYTES = 2**20
"""A disk with less room counts as full: what failed there took all of it but scraps."""

_NAME = re.compile(r"images-(\d{10})\.pt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the run."""


class UnreadableError(CheckpointError):
    """A checkpoint whose bytes are not those that were written."""


class WriteError(RuntimeError):
    """A checkpoint that could not be written; those before it are untouched."""


class Stateful(Protocol):
    """Anything with the usual pair of methods."""

    def state_dict(self) -> Mapping[str, Any]:
        """Everything that must survive a stop."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Take it back."""


def save(
    directory: Path,
    images_seen: int,
    parts: Mapping[str, Stateful],
    about: Mapping[str, Any],
    *,
    keep: int,
    is_milestone: bool = False,
) -> Path:
    """Write one checkpoint atomically; of those before it stay the newest `keep` and milestones.

    Raises:
        WriteError: the disk is full, or refuses; nothing that was there is lost.
    """
    path = directory / f"images-{images_seen:010d}.pt"
    is_full = False
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left_over in directory.glob(f"*{PARTIAL}"):  # of a writer that was killed
            left_over.unlink()
        with filled_aside(path, fsync=True) as partial:
            try:
                _write(partial, path, images_seen, parts, {**about, "is_milestone": is_milestone})
            except (OSError, RuntimeError):
                is_full = shutil.disk_usage(directory).free < FULL_BYTES  # before it makes room
                raise
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into RuntimeError
        reason = f"{os.strerror(errno.ENOSPC)}; {error}" if is_full else str(error)
        raise WriteError(f"{path} could not be written ({reason})") from error
    for old in [p for p in _all(directory) if not _described(p).get("is_milestone")][:-keep]:
        old.unlink()
        old.with_suffix(".json").unlink(missing_ok=True)
    return path


def _write(
    partial: Path,
    path: Path,
    images_seen: int,
    parts: Mapping[str, Stateful],
    about: Mapping[str, Any],
) -> None:
    """The weights under the unfinished name, and the JSON that is to stand beside them."""
    with partial.open("wb") as file:
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    size, sha256 = partial.stat().st_size, sha256_of(partial)
    described = {"images_seen": images_seen, **about, "bytes": size, "sha256": sha256}
    write_aside(path.with_suffix(".json"), json.dumps(described, indent=2), fsync=True)


def latest(directory: Path, *, until: int | None = None) -> Path | None:
    """The newest checkpoint, of those at most at `until` images; or None."""
    return max((p for p in _all(directory) if until is None or _at(p) <= until), default=None)


def discard(
    directory: Path,
    *,
    after: int,
    but: Callable[[Mapping[str, Any]], bool] = lambda about: False,
) -> None:
    """Delete the checkpoints beyond `after` images, `but` those whose description says so."""
    for path in _all(directory):
        if _at(path) > after and not but(_described(path)):
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)


def restore_newest(
    directory: Path,
    parts: Mapping[str, Stateful],
    config: Mapping[str, Any],
    *,
    warn: Callable[[str], None] = print,
    is_preferred: Callable[[Mapping[str, Any]], bool] = lambda about: True,
) -> dict[str, Any] | None:
    """Load the newest readable checkpoint and return its description; None if there is none.

    One whose bytes are not those that were written is passed over with a warning, for the one
    before it. Those whose description `is_preferred` go before the others.

    Raises:
        CheckpointError: all are unreadable, or the newest readable one is of another configuration.
    """
    paths = sorted(_all(directory), reverse=True)
    for path in sorted(paths, key=lambda p: not is_preferred(_described(p))):
        try:
            return restore(path, parts, config)
        except UnreadableError as error:
            warn(f"warning: {error}; trying the checkpoint before it")
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {directory} can be used: move the folder "
            "away to start again"
        )
    return None


def restore(
    path: Path, parts: Mapping[str, Stateful], config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Load every part in place and return the checkpoint's description.

    Raises:
        UnreadableError: the bytes are not those that were written.
        CheckpointError: it is of another configuration (every difference is named), or lacks a
            part.
    """
    about = _verified(path)
    if config is not None:
        changed = differences(about.get("config", {}), config)
        if changed:
            raise CheckpointError(
                f"{path} was written with other settings:\n"
                + "\n".join(f"  {line}" for line in changed)
                + "\nput them back, or train into another folder"
            )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything on damaged files
        raise UnreadableError(f"{path} is not a readable checkpoint ({error})") from error
    if missing := sorted(parts.keys() - saved.keys()):
        raise CheckpointError(f"{path} lacks {missing}: it is of another version, start again")
    for name, part in parts.items():
        try:
            part.load_state_dict(saved[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: its {name!r} does not fit: {error}") from error
    return about


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Settings that differ and are not free to change, as `a.b: old → new`, sorted."""
    before, after = dict(_flat(old)), dict(_flat(new))
    return [
        f"{key}: {_shown(before, key)} → {_shown(after, key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
        and key.partition(".")[0] not in FREE_TO_CHANGE
    ]


_ABSENT = object()


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted key; sequences are leaves, and tuples equal lists (JSON knows one)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _verified(path: Path) -> dict[str, Any]:
    """The description beside a checkpoint, once its bytes have been found to fit it."""
    about = _described(path)
    if not about:
        raise UnreadableError(f"{path.with_suffix('.json')} is missing or damaged")
    try:
        size = path.stat().st_size
        if size != about["bytes"]:
            raise UnreadableError(f"{path} has {size:,} bytes instead of {about['bytes']:,}")
        if sha256_of(path) != about["sha256"]:
            raise UnreadableError(f"{path} is damaged: its sha256 is not the one it was given")
    except (OSError, KeyError) as error:
        raise UnreadableError(f"{path} cannot be read ({error})") from error
    return about


def _described(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.with_suffix(".json").read_text()))
    except (OSError, ValueError):
        return {}


def _at(path: Path) -> int:
    """Images seen, by its name."""
    return int(path.stem.removeprefix("images-"))


def _all(directory: Path) -> list[Path]:
    return sorted(p for p in directory.glob("images-*.pt") if _NAME.fullmatch(p.name))
