"""The pages of Prefect and MLflow over what was recorded, until Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from flows.record import relocation
from flows.record.tracking import tracking_uri
from flows.serve import services


@contextmanager
def mlflow_page(store: Path, port: int | None = None) -> Iterator[str]:
    """MLflow's page: the server of `MLFLOW_TRACKING_URI`, or one of our own on the database."""
    uri = tracking_uri(store)
    if uri.startswith(("http://", "https://")):
        yield uri
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    relocation.relocate(uri, store)
    port = port or services.choose_port(5000)
    page = f"http://{services.HOST}:{port}"
    module = ["mlflow", "server", "--host", services.HOST, "--port", str(port), "--workers", "1"]
    module += ["--backend-store-uri", uri]
    module += ["--artifacts-destination", relocation.artifacts(store).as_uri()]
    module += ["--allowed-hosts", "localhost:*,127.0.0.1:*"]
    with services.running("mlflow", module, f"{page}/health"):
        yield page


def serve(
    store: Path, console: Console, prefect_port: int | None = None, mlflow_port: int | None = None
) -> None:
    """Open both pages and wait for Ctrl-C or SIGTERM."""
    relocation.relocate(tracking_uri(store), store)  # be refused before anything starts
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with ExitStack() as stack:
        api = stack.enter_context(services.prefect_api(prefect_port))
        page = stack.enter_context(mlflow_page(store, mlflow_port))
        prefect_page = os.environ.get("PREFECT_UI_URL", api.removesuffix("/api"))
        console.print(f"Prefect  {prefect_page}\nMLflow   {page}\nCtrl-C ends both.")
        stop.wait()
