"""What MLflow's record of runs says of outputs: those that it refers to are not deleted.

It reads a record that is there and makes none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Run, ViewType
from mlflow.exceptions import MlflowException

from flows.databases import sqlite_file
from flows.record import outages, scrub
from flows.record.outages import TrackingError
from flows.record.tracking import Tracker, found_by, tracking_uri
from flows.storage.housekeeping import Record

KEYS = re.compile(r"\b([0-9a-f]{16})(?:[0-9a-f]{48})?\b")
"""Keys, whole or as folders show them, in a text."""


def ask(store: Path, *, needed: bool = True) -> Record:
    """What the record of a store's runs knows and refers to.

    Where it is not `needed`, one that is missing or empty knows nothing.

    Raises:
        TrackingError: there is none, it holds no run, or it cannot be asked.
    """
    record = Record("no record", {}, (), ())
    try:
        where = known(store)
    except TrackingError as error:
        if needed:
            raise TrackingError(_nothing_deleted(str(error))) from error
        return record
    try:
        record = _read(Tracker("gigagan", store).client, where)
    except (MlflowException, OSError, TrackingError) as error:
        why = f"the record at {where} cannot be asked ({outages.brief(error)})"
        raise TrackingError(_nothing_deleted(why)) from error
    if needed and not record.runs:
        raise TrackingError(_nothing_deleted(f"the record at {where} holds no run"))
    return record


def known(store: Path) -> str:
    """Where the record of a store's runs is, without credentials.

    Raises:
        TrackingError: there is none: to look would make an empty one.
    """
    uri = tracking_uri(store)
    where, file = scrub.text(uri), sqlite_file(uri)
    if file is not None and not file.is_file():
        raise TrackingError(f"there is no record at {where}")
    return where


def _nothing_deleted(why: str) -> str:
    return f"{why}, so nothing is deleted: set MLFLOW_TRACKING_URI to where the runs were recorded"


def _read(client: MlflowClient, where: str) -> Record:
    referred: dict[str, list[str]] = {}
    runs: set[str] = set()
    keys: set[str] = set()
    for run, is_live in _runs(client):
        runs.add(run.info.run_id)
        if key := run.data.tags.get("fingerprint", "")[:16]:
            keys.add(key)
            if is_live:
                referred.setdefault(key, []).append(f"MLflow run {run.info.run_id}")
    for model, version, text in _versions(client):
        for key in set(KEYS.findall(text)):
            referred.setdefault(key, []).append(f"registered model {model} version {version}")
    return Record(where, referred, runs, keys)


def _runs(client: MlflowClient) -> Iterator[tuple[Run, bool]]:
    """All runs, and whether each is there still: neither it nor its experiment was deleted."""
    for experiment in found_by(client.search_experiments, ViewType.ALL, max_results=1000):
        ids = [experiment.experiment_id]
        for run in found_by(client.search_runs, ids, "", ViewType.ALL, max_results=1000):
            stages = {experiment.lifecycle_stage, run.info.lifecycle_stage}
            yield run, stages == {LifecycleStage.ACTIVE}


def _versions(client: MlflowClient) -> Iterator[tuple[str, str, str]]:
    """Name and version of each registered model, and all text that may hold a key."""
    for version in found_by(client.search_model_versions, max_results=1000):
        texts = [str(version.source), *map(str, (version.tags or {}).values())]
        yield version.name, str(version.version), " ".join(texts)
