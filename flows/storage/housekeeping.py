"""What lies in the store: listed, shown, verified, and deleted where nothing refers to it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flows.config import StageName
from flows.stage import BusyError, DamagedError, Manifest, StageError
from flows.storage.lease import holder
from flows.storage.place import Place
from flows.storage.store import Store
from flows.storage.upstream import only
from gigagan.common.progress import Progress, silent

KEY = re.compile(r"(?:(?P<stage>[a-z-]+)/)?(?P<key>[0-9a-f]{1,64})")
AGE = re.compile(r"(?P<count>\d+(?:\.\d+)?)(?P<unit>[mhdw])")
UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class HousekeepingError(StageError):
    """A command about the store cannot be done; the message says why."""


@dataclass(frozen=True)
class Item:
    """One output, finished or not."""

    stage: str
    key: str
    """As its folder shows it: 16 digits."""
    state: str
    """`complete`, `unfinished`, `in use` or `damaged`."""
    note: str
    """What is damaged, or who uses it."""
    bytes: int
    changed: datetime
    manifest: Manifest | None = field(repr=False)

    @property
    def name(self) -> str:
        """STAGE/KEY."""
        return f"{self.stage}/{self.key}"

    @property
    def age(self) -> timedelta:
        """Since it was completed, or last worked on."""
        return datetime.now(UTC) - self.changed


@dataclass(frozen=True)
class Record:
    """What the record of runs says; an output that it does not know is not for it to judge."""

    where: str
    """Its address, without credentials."""
    referred: Mapping[str, list[str]]
    """By key (16 digits), what refers to an output: runs that are not deleted, model versions."""
    runs: Collection[str]
    """Ids of all its runs, of deleted ones too."""
    keys: Collection[str]
    """Keys of what these runs made, or began."""

    def doubt(self, item: Item) -> str | None:
        """Why it cannot say whether an output is needed; None when it can."""
        remedy = "`store rm` deletes it"
        if item.manifest is None:
            return None if item.key in self.keys else f"the record has no run of it ({remedy})"
        run = item.manifest.mlflow_run_id
        is_known = run is None or run in self.runs
        return None if is_known else f"the record does not know its MLflow run {run} ({remedy})"


@dataclass(frozen=True)
class Verdict:
    """What `gc` does with an output."""

    item: Item
    kept: str | None
    """Why it stays; None when it goes."""


def items(store: Store) -> list[Item]:
    """Every output of the store."""
    return [_item(store, stage.value, key) for stage in StageName for key in store.keys(stage)]


def pick(found: Iterable[Item], name: str) -> Item:
    """The output whose key begins with `name`, or with what follows STAGE/ in it."""
    parts = KEY.fullmatch(name)
    if parts is None:
        raise HousekeepingError(f"{name!r} is not the beginning of a key: 1 to 64 digits of 0-9a-f")
    prefix, stage = parts["key"][:16], parts["stage"]
    by_name = {i.name: i for i in found if i.key.startswith(prefix) and stage in (None, i.stage)}
    return by_name[only(name, list(by_name), "output in the store")]


def used_by(found: Iterable[Item]) -> dict[str, list[str]]:
    """Names of the outputs that were made from each output."""
    found = list(found)
    users: dict[str, list[str]] = {item.name: [] for item in found}
    for item in found:
        read = set(item.manifest.origins.values()) if item.manifest else set()
        for name in read & users.keys():
            users[name].append(item.name)
    return users


def sweep(
    store: Store,
    record: Record,
    *,
    older_than: timedelta = timedelta(0),
    unfinished: bool = False,
    named: Collection[str] = (),
) -> list[Verdict]:
    """What would be deleted and what is kept, and why. Deletes nothing.

    Of outputs that are `named`, as STAGE/KEY, nothing else goes; the record need not know them.
    """
    found = items(store)
    kept = {
        item.name: "not named"
        if named and item.name not in named
        else _needed(item, record)
        or (None if named else _may_stay(item, record, older_than, unfinished))
        for item in found
    }
    users = used_by(found)
    # What a kept output was made from is kept, and what that was made from.
    waiting = [name for name, reason in kept.items() if reason]
    while waiting:
        keeper = waiting.pop()
        for name, by in users.items():
            if keeper in by and not kept[name]:
                kept[name] = f"input of {keeper}"
                waiting.append(name)
    return [Verdict(item, kept[item.name]) for item in found]


def delete(store: Store, item: Item) -> None:
    """Delete an output as it was looked at.

    Raises:
        BusyError: a run holds its lease by now, or it has changed.
    """
    with store.lease(item.stage, item.key, wait=False):
        place = store.place(item.stage, item.key)
        now = _item(store, item.stage, item.key)
        if (now.manifest, now.bytes, now.changed) != (item.manifest, item.bytes, item.changed):
            raise BusyError(f"{place} has changed since it was looked at: look again")
        place.discard()
        if place.folder.is_dir():
            place.folder.rmdir()


def verify(store: Store, item: Item, progress: Progress = silent) -> str | None:
    """Read every file of an output; the first that is not what it was, or None."""
    if item.manifest is None:
        return item.note if item.state == "damaged" else None
    return store.place(item.stage, item.key).damage(item.manifest, verify=True, progress=progress)


def parse_age(text: str) -> timedelta:
    """`7d` as seven days; m, h, d or w."""
    parts = AGE.fullmatch(text)
    if parts is None:
        raise HousekeepingError(f"--older-than {text!r}: write it as 90m, 12h, 7d or 2w")
    return timedelta(**{UNITS[parts["unit"]]: float(parts["count"])})


def _item(store: Store, stage: str, key: str) -> Item:
    place = store.place(stage, key)
    manifest, state, note = None, "unfinished", ""
    try:
        manifest = place.manifest()
        if manifest and manifest.name != f"{stage}/{key}":
            raise DamagedError(f"its manifest is that of {manifest.name}")
        if manifest:
            damage = place.damage(manifest)
            state, note = ("damaged", damage) if damage else ("complete", "")
    except DamagedError as error:
        manifest, state, note = None, "damaged", str(error)
    if there := holder(store.board(stage, key)):
        state, note = "in use", f"by {there}"
    size, changed = _measure(place)
    return Item(stage, key, state, note, size, manifest.created if manifest else changed, manifest)


def _measure(place: Place) -> tuple[int, datetime]:
    """Bytes, and when anything in it changed last."""
    if place.remote:
        about = place.remote.details()
        newest = max((changed for _, changed in about.values()), default=datetime.now(UTC))
        return sum(size for size, _ in about.values()), newest
    size, newest_s = 0, place.folder.stat().st_mtime
    for folder, _, names in os.walk(place.folder):
        for name in names:
            stat = (Path(folder) / name).lstat()
            size, newest_s = size + stat.st_size, max(newest_s, stat.st_mtime)
    return size, datetime.fromtimestamp(newest_s, UTC)


def _needed(item: Item, record: Record) -> str | None:
    """Who needs it, as far as the record knows."""
    if item.state == "in use":
        return f"in use {item.note}"
    if referred := record.referred.get(item.key):
        more = f" and {len(referred) - 1} more" if len(referred) > 1 else ""
        return referred[0] + more
    return None


def _may_stay(item: Item, record: Record, older_than: timedelta, unfinished: bool) -> str | None:
    """Why what nobody needs stays."""
    if doubt := record.doubt(item):
        return doubt
    if item.age < older_than:
        return "not old enough"
    if item.manifest is None and not unfinished:
        return "unfinished: a run may go on from it (--unfinished)"
    return None


def states(found: Iterable[Item]) -> str:
    """How many outputs are in which state, as text."""
    counts = Counter(item.state for item in found)
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "nothing"
