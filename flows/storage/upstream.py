"""Outputs named by hand: what a stage reads instead of what its configuration leads to.

`--upstream filter=WHERE`, where WHERE is the beginning of a key in the store, the id of an MLflow
run, or a folder or URL that holds an output with its manifest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flows.config import StageName
from flows.stage import StageError
from flows.storage.objects import Remote
from flows.storage.place import Place
from flows.storage.store import Store, Upstream

KEY = re.compile(r"[0-9a-f]{1,64}")
SHOWN = 16
"""Digits of a key that a folder is named by."""


class UpstreamError(StageError):
    """An output that was named cannot be used; the message says what can."""


def parse(items: Sequence[str]) -> dict[str, str]:
    """`["filter=3fa9", …]` as a mapping."""
    found = {}
    for item in items:
        stage, sign, where = item.partition("=")
        if not sign or not where:
            raise UpstreamError(
                f"--upstream {item!r}: write it as STAGE=WHERE, as in filter=3fa9c1"
            )
        found[stage] = where
    return found


def locate(
    store: Store, named: Mapping[str, str], output_of: Callable[[str], tuple[str, str]]
) -> Upstream:
    """Where each named output lies; all are complete and of the right stage.

    `output_of` gives stage and key of an MLflow run's output.
    """
    found = {}
    for stage, where in named.items():
        if stage not in list(StageName):
            raise UpstreamError(f"upstream of {stage!r}: the stages are {', '.join(StageName)}")
        place = _locate(store, stage, where.strip(), output_of)
        manifest = place.manifest()
        if manifest is None:
            raise UpstreamError(
                f"upstream {stage}={where}: {place} has no manifest, so it is not complete: "
                f"finish it, or name another (`python -m flows store ls` lists them)"
            )
        if manifest.stage != stage:
            raise UpstreamError(f"upstream {stage}={where}: {place} is one of {manifest.stage}")
        if damage := place.damage(manifest):
            raise UpstreamError(f"upstream {stage}={where}: {damage}")
        found[stage] = place
    return found


def _locate(
    store: Store, stage: str, where: str, output_of: Callable[[str], tuple[str, str]]
) -> Place:
    if "://" in where or "/" in where or where.startswith((".", "~")):
        return _elsewhere(store, where)
    if not KEY.fullmatch(where):
        raise UpstreamError(
            f"upstream {stage}={where}: give the beginning of a key, the id of an MLflow run, or a "
            "folder or URL (with a slash)"
        )
    keys = [key for key in store.keys(stage) if key.startswith(where[:SHOWN])]
    if not keys and len(where) == 32:
        made, key = output_of(where)
        if made != stage:
            raise UpstreamError(f"upstream {stage}={where}: that run is one of {made}")
        return store.place(stage, key)
    return store.place(stage, only(where, keys, f"output of {stage} in {store}"))


def only(prefix: str, candidates: Sequence[str], what: str) -> str:
    """The one that begins with a prefix, as git has it."""
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise UpstreamError(
            f"no {what} has a key that begins with {prefix}: `python -m flows store ls` lists them"
        )
    raise UpstreamError(
        f"{prefix} is the beginning of more than one {what}: {', '.join(sorted(candidates))}"
    )


def _elsewhere(store: Store, where: str) -> Place:
    if "://" not in where or where.startswith("file://"):
        try:
            return Place(Path(where.removeprefix("file://")).expanduser().absolute())
        except RuntimeError as error:  # the home of nobody
            raise UpstreamError(f"upstream {where}: {error}") from error
    remote = Remote(where)
    manifest = Place(store.root, remote).manifest()
    # Without a manifest the folder does not matter: the caller refuses it.
    name = manifest.name if manifest else "none/none"
    return Place(store.root / ".upstream" / name, remote)
