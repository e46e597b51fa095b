"""The MLflow page that lays runs side by side: find it or serve it, and show the way."""

from __future__ import annotations

import signal
import threading
import urllib.parse
import urllib.request
import webbrowser
from contextlib import ExitStack

from rich.console import Console

from flows import ui
from flows.config import PipelineConfig
from flows.record.tracking import LOCAL_UI, Tracker


def compare(config: PipelineConfig, stage: str | None, console: Console, *, browse: bool) -> None:
    """Print the page with the curves of a stage's runs, or of all pipelines, and open it.

    A page that is served already is used; else one is, until Ctrl-C.
    """
    tracker = Tracker(config.name, config.store_path)
    with ExitStack() as stack:
        is_served = tracker.is_server or shows(LOCAL_UI, tracker.experiment_name(stage))
        page = None if is_served else stack.enter_context(ui.mlflow_page(config.store_path))
        url = tracker.compare_url(stage, page)
        console.print(url, soft_wrap=True, highlight=False)
        if browse:
            webbrowser.open(url)
        if not is_served:
            console.print("Ctrl-C ends the page.")
            _until_told()


def shows(page: str, experiment: str) -> bool:
    """Whether a page of MLflow is served there, over a record that has this experiment."""
    name = urllib.parse.quote(experiment)
    query = f"{page}/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}"
    try:
        with urllib.request.urlopen(query, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:  # nobody answers, or MLflow knows no such experiment
        return False


def _until_told() -> None:
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    told.wait()
