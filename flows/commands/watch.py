"""The log of a flow run on a terminal, until the run is over."""

from __future__ import annotations

import time
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import State
from prefect.client.schemas.sorting import LogSort
from rich.console import Console
from rich.markup import escape

POLL_S = 2.0
"""Prefect's own log is as late as that."""
PAGE = 200
WAITING = {
    "Scheduled": "a worker takes it within seconds",
    "Late": "no worker has taken it yet",
    "Pending": "its process starts: importing takes some ten seconds",
}


def watch(run_id: UUID, console: Console) -> State:
    """Print each line of a run's log and each change of its state; returns the last one."""
    seen = 0
    told = ""
    with get_client(sync_client=True) as client:
        while True:
            state = client.read_flow_run(run_id).state
            assert state is not None, "a run that was created has one"
            if state.name != told:
                told = state.name or ""
                note = WAITING.get(told) or state.message or ""
                line = f"[bold]{told}[/]: {escape(note)}" if note else f"[bold]{told}[/]"
                console.print(line, soft_wrap=True, highlight=False)
            if state.is_final():
                time.sleep(POLL_S)  # its last words come after its end
            seen = _follow(client, run_id, console, seen)
            if state.is_final():
                return state
            time.sleep(POLL_S)


def _follow(client: SyncPrefectClient, run_id: UUID, console: Console, seen: int) -> int:
    """Print the lines after the first `seen`; returns how many there are."""
    wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id]))
    while True:
        lines = client.read_logs(wanted, limit=PAGE, offset=seen, sort=LogSort.TIMESTAMP_ASC)
        for line in lines:
            text = f"{line.timestamp.astimezone():%H:%M:%S}  {escape(line.message)}"
            console.print(text, soft_wrap=True, highlight=False)
        seen += len(lines)
        if len(lines) < PAGE:
            return seen
