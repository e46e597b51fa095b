"""The slots of the `gpu` limit: how many training jobs run at a time on one Prefect server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from flows.safety.aftermath import await_server

GPU_LIMIT = "gpu"
LEASE_S = float(os.environ.get("PIPELINE_GPU_LEASE_S", 120))
"""A slot whose holder is silent for this long is free again: the wait after a power cut. It is
renewed after three quarters, so that the last quarter is what a server may be away for."""


@contextmanager
def gpu_slot() -> Iterator[None]:
    """Hold a slot during the block; says so when all are taken, and waits."""
    _say_if_busy()
    # A slot lost in an outage of the server must not cost a training its work.
    with concurrency(
        GPU_LIMIT, lease_duration=LEASE_S, strict=True, raise_on_lease_renewal_failure=False
    ):
        yield
        await_server()  # to whom the slot is given back


def _say_if_busy() -> None:
    """A line in the run's log; makes the limit when nobody has bootstrapped this server."""
    log = get_run_logger()
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(GPU_LIMIT)
        except ObjectNotFound:
            client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, 1)
            log.info("made the limit %r with one slot: this server had none", GPU_LIMIT)
            return
    if limit.active_slots >= limit.limit:
        log.warning(
            "waiting for the limit %r: %d of its %d slots are taken; `prefect gcl ls` shows them, "
            "`python -m flows bootstrap --gpu-jobs N` sets their number",
            GPU_LIMIT,
            limit.active_slots,
            limit.limit,
        )
