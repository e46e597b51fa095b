"""What a stage reads from outside the store: whether it is there is known before anything starts.

Days of other stages may come before the one that misses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.config import PipelineConfig, StageName

PLACED = ("open_clip:", "dino:", "dinov2:", "univfd:")
"""How names of models begin whose weights no package has."""


def lacking(config: PipelineConfig, stage: StageName) -> list[str]:
    """Settings and files without which a stage is sure to fail, each with its remedy."""
    found: list[str] = []
    if stage == StageName.DOWNLOAD and config.download.source == "metadata":
        from data.lists.sources import find

        if config.download.contact is None:
            found.append(
                "download.contact is null: give an e-mail address, or a page that has one, for "
                "site owners"
            )
        try:
            find(config.download.metadata)
        except ValueError as error:
            found.append(str(error))
    files: list[tuple[str, str | None]] = []
    if stage == StageName.FILTER:
        files = [("filter.decontaminate", name) for name in config.filter.decontaminate]
        files.append(("filter.influence", config.filter.influence))
    if stage == StageName.EVALUATE:
        files = [("evaluate.captions", config.evaluate.captions)]
    if stage == StageName.ADAPT:
        adapt = config.adapt
        if adapt.pictures is None and adapt.unlearn is None:
            found.append("adapt.pictures and adapt.unlearn are null: give one of them")
        for setting in ("base", "pictures", "measure_pictures", "old_captions"):
            path = getattr(adapt, setting)
            if path and not Path(path).exists():
                found.append(f"adapt.{setting}: {path!r} is not there (seen from {Path.cwd()})")
    for setting, name in files:
        if name and not Path(name).is_file():
            found.append(f"{setting}: there is no file {name!r} (seen from {Path.cwd()})")
    return found


def weights(config: PipelineConfig, stage: StageName) -> list[str]:
    """Models that a stage names and whose weights are not on this machine, where it would run."""
    section = stage.replace("-", "_")
    if getattr(getattr(config.resources, section), "is_remote", False):
        return []
    found = []
    for name in sorted(set(_names(getattr(config, section).model_dump()))):
        from gigagan.models import pretrained  # imports torch, which most plans do without

        try:
            pretrained.locate(name)
        except FileNotFoundError as error:
            found.append(str(error))
    return found


def _names(tree: Any) -> Iterator[str]:
    """Models that a tree of settings names."""
    if isinstance(tree, str):
        yield from [tree] if tree.startswith(PLACED) else []
    elif isinstance(tree, dict | list | tuple):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _names(branch)
