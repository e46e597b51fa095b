"""What to do while the tracking server is gone: short requests, patience, and a clear message."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mlflow.exceptions import MlflowException

from flows.record import scrub

BOUNDS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""A request gives up after a quarter of a minute; MLflow's own bounds make it several."""
PATIENCE_S = 60.0
"""How long the end of a stage waits for a server that is gone."""
PAUSE_S = 2.0

log = logging.getLogger("flows.record.tracking")
T = TypeVar("T")


class TrackingError(RuntimeError):
    """The tracking server does not answer or refuses us; the message says what is kept."""


def insist(action: Callable[[], T], where: str, kept: Path | None = None) -> T:
    """Do what can be done twice, again and again while the server is gone.

    Raises `TrackingError` when that takes longer than `PATIENCE_S`: it says that the output in
    `kept` is complete, and what completes its record.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return action()
        except Exception as error:
            if not is_outage(error):
                raise
            if time.monotonic() > deadline:
                raise TrackingError(_lament(error, where, kept)) from error
            log.warning(
                "MLflow at %s does not take the record (%s); trying again", where, brief(error)
            )
            time.sleep(PAUSE_S)


def is_outage(error: Exception) -> bool:
    """Whether trying again may help: a refusal and a full disk stay what they are."""
    if "disk is full" in str(error):
        return False
    if "IntegrityError" in str(error):  # two wrote the same tag at once: the second one updates it
        return True
    if isinstance(error, MlflowException):
        return error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")
    package = type(error).__module__.partition(".")[0]
    is_clients = package in ("botocore", "boto3", "urllib3", "requests")
    return is_clients or isinstance(error, ConnectionError | TimeoutError)


def brief(error: Exception) -> str:
    """The first line of an error, without credentials."""
    return scrub.text(str(error)).partition("\n")[0][:300]


def _lament(error: Exception, where: str, kept: Path | None) -> str:
    output = f"the output in {kept} is complete and kept" if kept else "nothing is lost"
    return (
        f"MLflow at {where} does not take the record ({brief(error)}): {output}; start the server "
        "and run the same command again, which completes the record"
    )
