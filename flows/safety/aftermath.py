"""What an accident of Prefect's own parts means for a run: it outlives them where it can."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentTaskRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.runtime import flow_run
from prefect.states import Crashed, Running, State

OUTAGE_S = 600.0
"""How long a stage that is over waits for a server that is away, to report to it."""

SILENT = "no heartbeat"
"""How the message begins that a run gets whose process is taken for dead."""

RUNNING_BELOW_ANOTHER = FlowRunFilter(
    state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])),
    parent_task_run_id=FlowRunFilterParentTaskRunId(is_null_=False),
)


def close_left_behind() -> None:
    """Set runs of stages Crashed that stand on Running below a pipeline that is over.

    Prefect marks the run whose process was killed, but not the runs inside that process.
    """
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=RUNNING_BELOW_ANOTHER):
            parent = _parent(client, run)
            if parent.state and parent.state.is_final():
                message = f"its pipeline {parent.name} ended as {parent.state.name}"
                client.set_flow_run_state(run.id, Crashed(message=message), force=True)


@contextmanager
def suppressed(what: str) -> Iterator[None]:
    """What only informs does not cost a stage its work: a warning, and on."""
    try:
        yield
    except Exception as error:  # Prefect, httpx and pydantic have none in common
        cause = f"{type(error).__name__}: {error}"
        get_run_logger().warning("%s not shown in Prefect (%s); the work goes on", what, cause)


@contextmanager
def logging_to_run() -> Iterator[None]:
    """Put what our own modules log, in whatever thread, into the log of this flow run."""
    run, ours = get_run_logger(), logging.getLogger("flows")

    class ToRun(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            run.log(record.levelno, "%s", record.getMessage())

    handler = ToRun(logging.INFO)
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)


def set_running_again() -> None:
    """Set this run, and its pipeline's, Running again that were taken for dead while they live.

    A server that was away has seen no heartbeats, and may say so when it is back.
    """
    mine = {flow_run.id, flow_run.root_flow_run_id} - {None}
    with get_client(sync_client=True) as client:
        for run_id in mine:
            state = client.read_flow_run(UUID(str(run_id))).state
            if state and state.is_crashed() and (state.message or "").startswith(SILENT):
                lives: State = Running(message="its process lives: the server had been away")
                client.set_flow_run_state(UUID(str(run_id)), lives, force=True)


def ignore_closed_console() -> None:
    """Let a run go on when the worker is gone that reads its output.

    Left to itself the console of Prefect's log ends the process at the next line.
    """
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    for logger in [logging.root, *loggers]:
        for handler in logger.handlers:
            if isinstance(handler, PrefectConsoleHandler):
                console = handler.console
                console.on_broken_pipe = partial(setattr, console, "quiet", True)  # type: ignore[method-assign]


def _parent(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    assert run.parent_task_run_id is not None, "of a run that the filter found"
    task = client.read_task_run(run.parent_task_run_id)
    assert task.flow_run_id is not None, "the task stands for the run in its parent"
    return client.read_flow_run(task.flow_run_id)


def await_server() -> None:
    """Return once the Prefect server answers, or after `OUTAGE_S`."""
    deadline = time.monotonic() + OUTAGE_S
    is_said = False
    with get_client(sync_client=True) as client:
        while client.api_healthcheck() and time.monotonic() < deadline:
            if not is_said:
                get_run_logger().warning(
                    "the Prefect server does not answer: waiting up to %d min to report to it",
                    OUTAGE_S // 60,
                )
                is_said = True
            time.sleep(1)
