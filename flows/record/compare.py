"""The MLflow page that lays runs side by side: find it or serve it, and show the way."""

from __future__ import annotations

import json
import signal
import threading
import urllib.parse
import urllib.request
import webbrowser
from contextlib import ExitStack

from rich.console import Console

from flows.config import PipelineConfig
from flows.record.tracking import LOCAL_UI, Tracker
from flows.serve import ui


def compare(config: PipelineConfig, stage: str | None, console: Console, *, browse: bool) -> None:
    """Print the page with the curves of a stage's runs, or of all pipelines, and open it.

    A page that is served already is used; else one is, until Ctrl-C.
    """
    tracker = Tracker(config.name, config.store_path)
    with ExitStack() as stack:
        is_served = tracker.is_server or shows(LOCAL_UI, tracker, stage)
        page = None if is_served else stack.enter_context(ui.mlflow_page(config.store_path))
        url = tracker.compare_url(stage, page)
        console.print(url, soft_wrap=True, highlight=False)
        if browse:
            webbrowser.open(url)
        if not is_served:
            console.print("Ctrl-C ends the page.")
            _until_told()


def shows(page: str, tracker: Tracker, stage: str | None = None) -> bool:
    """Whether a page of MLflow is served there over this record, and not over that of another."""
    name = tracker.experiment_name(stage)
    ours = tracker.client.get_experiment_by_name(name)
    query = f"{page}/api/2.0/mlflow/experiments/get-by-name?" + urllib.parse.urlencode(
        {"experiment_name": name}
    )
    try:
        with urllib.request.urlopen(query, timeout=5) as response:
            theirs = json.load(response)["experiment"]
    except (OSError, ValueError, LookupError, TypeError):
        return False  # nobody answers, or not MLflow, or it knows no such experiment
    told = (theirs.get("experiment_id"), theirs.get("creation_time"))
    return ours is not None and told == (ours.experiment_id, ours.creation_time)


def _until_told() -> None:
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    told.wait()
