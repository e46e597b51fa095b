"""Environment of Prefect and MLflow: at home in runs/, quiet, and calling nobody.

Imported before either of them; a variable that is set already stays as it is.
"""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from pathlib import Path

from flows import databases
from flows.places import runs

POOL = "local"
"""The work pool of this machine."""

DEFAULTS = {
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
}
PREFECT_DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
DATABASES = (
    *("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"),
    *(PREFECT_DATABASE, "PREFECT_API_DATABASE_CONNECTION_URL"),
)
"""Variables that may name an SQLite file."""
FOLDERS = ("GIGAGAN_RUNS", "PREFECT_HOME", "GIGAGAN_STORE_CACHE", "GIGAGAN_CACHE")
"""Variables that name a folder."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def apply() -> None:
    """Set what is not set.

    What is relative to this folder means the same place in processes that run in another one.
    """
    _name_a_home()
    for name, value in {"PREFECT_HOME": str(runs() / "prefect"), **DEFAULTS}.items():
        os.environ.setdefault(name, value)
    for name in set(FOLDERS) & os.environ.keys():
        os.environ[name] = os.environ[name] and str(Path(os.environ[name]).expanduser().absolute())
    for name in set(DATABASES) & os.environ.keys():
        os.environ[name] = databases.absolute(os.environ[name])
    _name_prefects_database()
    _spare_loopback()
    with suppress(OSError):  # what only looks needs none, and what writes says so itself
        home().mkdir(parents=True, exist_ok=True)  # Prefect makes one level only
    warnings.filterwarnings("ignore", "Failed to create the Prefect home")


def _name_a_home() -> None:
    """A user id without a name, as containers have it, and without HOME keeps what it has here."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(runs())


def _name_prefects_database() -> None:
    """Prefect puts its home into an address as it is, which fails where signs mean something."""
    if set("%?") & set(str(home())) and not set(DATABASES[2:]) & os.environ.keys():
        os.environ[PREFECT_DATABASE] = databases.sqlite_uri(home() / "prefect.db", "+aiosqlite")


def _spare_loopback() -> None:
    """Our own servers are never asked through a proxy."""
    for name, other in (("no_proxy", "NO_PROXY"), ("NO_PROXY", "no_proxy")):
        given = os.environ.get(name) or os.environ.get(other, "")
        hosts = [host.strip() for host in given.split(",") if host.strip()]
        if "*" not in hosts:
            os.environ[name] = ",".join(dict.fromkeys([*hosts, *LOOPBACK]))


def quiet() -> None:
    """Keep Prefect's log off the console; its pages still get all of it."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_ROOT_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")


def home() -> Path:
    """Where Prefect keeps its database."""
    return Path(os.environ["PREFECT_HOME"])
