"""The machine's load while a stage runs, as `system/…` curves of its MLflow run.

It counts everything on the machine, the stage's children included, and never holds a stage up: a
figure that cannot be logged is dropped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.environment_variables import (
    MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING,
    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL,
)
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

EVERY_S = 10.0
"""Seconds between two samples, unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says otherwise."""
PREFIX = "system/"


def is_on() -> bool:
    """Unless MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is false."""
    variable = MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
    return bool(variable.get()) if variable.is_set() else True


@contextmanager
def metered(client: MlflowClient, run_id: str) -> Iterator[None]:
    """Sample the machine's load during the block."""
    if not is_on():
        yield
        return
    over = threading.Event()
    meter = threading.Thread(target=_sample, args=(client, run_id, over), name="meter", daemon=True)
    meter.start()
    try:
        yield
    finally:
        over.set()  # no join: it may be waiting for a server that is gone


def _sample(client: MlflowClient, run_id: str, over: threading.Event) -> None:
    """Log the load until it is over; a step is a second since the run began, over all attempts."""
    monitors = _monitors()
    began: float | None = None
    while not over.wait(MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or EVERY_S):
        figures: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            figures |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        with suppress(Exception):
            began = began or client.get_run(run_id).info.start_time / 1000
            now = time.time()
            step, stamp = int(now - began), int(now * 1000)
            batch = [Metric(PREFIX + name, value, stamp, step) for name, value in figures.items()]
            if not over.is_set():
                client.log_batch(run_id, metrics=batch)


def _monitors() -> list[BaseMetricsMonitor]:
    found: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(ImportError, RuntimeError):  # no nvidia-ml-py, or no such device
        found.append(GPUMonitor())
    return found
