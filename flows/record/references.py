"""What in MLflow refers to outputs of the store: such outputs are not deleted."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from flows.record.outages import TrackingError

KEYS = re.compile(r"\b([0-9a-f]{16})(?:[0-9a-f]{48})?\b")
"""Keys, whole or as folders show them, in a text."""


def references(client: MlflowClient) -> dict[str, list[str]]:
    """What in MLflow refers to each key (16 digits): runs that are not deleted, model versions.

    Raises:
        TrackingError: it cannot be asked.
    """
    found: dict[str, list[str]] = {}
    try:
        for run in _runs(client):
            if key := run.data.tags.get("fingerprint"):
                found.setdefault(key[:16], []).append(f"MLflow run {run.info.run_id}")
        for model, version, text in _versions(client):
            for key in set(KEYS.findall(text)):
                found.setdefault(key, []).append(f"registered model {model} version {version}")
    except (MlflowException, OSError) as error:
        raise TrackingError(
            f"MLflow cannot be asked what it refers to ({error}), so nothing is deleted: start it, "
            "or set MLFLOW_TRACKING_URI to where it is"
        ) from error
    return found


def _runs(client: MlflowClient) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_experiments(max_results=1000, page_token=token)
        for experiment in page:
            yield from _runs_of(client, experiment.experiment_id)
        token = page.token
        if not token:
            return


def _runs_of(client: MlflowClient, experiment: str) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs([experiment], max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _versions(client: MlflowClient) -> Iterator[tuple[str, str, str]]:
    """Name and version of each registered model, and all text that may hold a key."""
    token = None
    while True:
        page = client.search_model_versions(max_results=1000, page_token=token)
        for version in page:
            texts = [str(version.source), *map(str, (version.tags or {}).values())]
            yield version.name, str(version.version), " ".join(texts)
        token = page.token
        if not token:
            return
