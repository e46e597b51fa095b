"""Environment of Prefect and MLflow: at home in runs/, quiet, and calling nobody.

Imported before either of them; a variable that is set already stays as it is.
"""

from __future__ import annotations

import os
from pathlib import Path

from flows.config import ROOT

RUNS = ROOT / "runs"
POOL = "local"
"""The work pool of this machine."""

DEFAULTS = {
    "PREFECT_HOME": str(RUNS / "prefect"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "true",  # not "1", which MLflow ignores
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PREFECT_WORKER_QUERY_SECONDS": "2",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    # In memory, Prefect's default, a restart of the server would leave GPU slots taken for ever.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
        "prefect.server.concurrency.lease_storage.filesystem"
    ),
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # Threads that spin long starve whatever shares the machine; not spinning at all costs a
    # third of the speed (docs/log.md).
    "GOMP_SPINCOUNT": "20000",
    "PREFECT_CLI_PROMPT": "false",
    "PIPELINE_ROOT": str(ROOT),
}


def apply() -> None:
    """Set what is not set, and make `flows` importable in child processes."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    home().mkdir(parents=True, exist_ok=True)  # Prefect makes one level only


def quiet() -> None:
    """Keep Prefect's log off the console; its pages still get all of it."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_ROOT_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")


def home() -> Path:
    """Where Prefect keeps its database."""
    return Path(os.environ["PREFECT_HOME"])
