"""What to do while the tracking server is gone: short requests, patience, and a clear message."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mlflow.exceptions import MlflowException

from flows.record import scrub
from gigagan.common import retrying

BOUNDS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""A request gives up after a quarter of a minute; MLflow's own bounds make it several."""
PATIENCE_S = 60.0
"""How long the end of a stage waits for a server that is gone."""
PAUSE_S = 2.0

log = logging.getLogger("flows.record.tracking")
T = TypeVar("T")


class TrackingError(RuntimeError):
    """The tracking server does not answer or refuses us; the message says what is kept."""


def retry(action: Callable[[], T], where: str, kept: Path | None = None) -> T:
    """Do what can be done twice, again and again while the server is gone.

    Raises `TrackingError` when that takes longer than `PATIENCE_S`: it says that the output in
    `kept` is complete, and what completes its record.
    """

    def tell(error: Exception, pause_s: float) -> None:
        said = "MLflow at %s does not take the record (%s); trying again"
        log.warning(said, where, brief(error))

    waits = retrying.pauses(PAUSE_S, growth=1.0)
    try:
        return retrying.retry(
            action, waits, may_help=is_outage, patience_s=PATIENCE_S, on_retry=tell
        )
    except Exception as error:
        if not is_outage(error):
            raise
        raise TrackingError(_gone_message(error, where, kept)) from error


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


def _gone_message(error: Exception, where: str, kept: Path | None) -> str:
    output = f"the output in {kept} is complete and kept" if kept else "nothing is lost"
    return (
        f"MLflow at {where} does not take the record ({brief(error)}): {output}; start the server "
        "and run the same command again, which completes the record"
    )
