"""Save and restore everything that a run needs to go on as if it had not stopped."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

_NAME = re.compile(r"images-(\d{10})\.pt")


class CheckpointError(ValueError):
    """A checkpoint that does not fit the run."""


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
    about: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write one file atomically (a reader sees the old checkpoint or the new one, never half).

    A JSON beside it says what it is. Only the newest `keep` stay.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"images-{images_seen:010d}.pt"
    partial = path.with_suffix(".partial")
    torch.save(
        {name: part.state_dict() for name, part in parts.items()} | {"about": about}, partial
    )
    partial.replace(path)
    path.with_suffix(".json").write_text(json.dumps(about, indent=2))
    for old in _all(directory)[:-keep]:
        old.with_suffix(".json").unlink(missing_ok=True)
        old.unlink()
    return path


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return max(_all(directory), default=None)


def restore(path: Path, parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """Load every part in place and return what `save` was told.

    Raises:
        CheckpointError: the file is unreadable, or lacks a part, or holds other networks.
    """
    remedy = f"delete it to go on from the one before, or {path.parent} to start again"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable checkpoint ({error}): {remedy}") from error
    missing = parts.keys() - saved.keys()
    if missing:
        raise CheckpointError(f"{path} lacks {sorted(missing)}: {remedy}")
    for name, part in parts.items():
        try:
            part.load_state_dict(saved[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: its {name!r} does not fit: {error}") from error
    about: dict[str, Any] = saved["about"]
    return about


def _all(directory: Path) -> list[Path]:
    return sorted(p for p in directory.glob("images-*.pt") if _NAME.fullmatch(p.name))
