"""Median times of alternating calls, so that a disturbance hits all candidates alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def medians(candidates: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median milliseconds of each candidate, after one call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            if number:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def show(title: str, times: Mapping[str, float]) -> None:
    """Print times as multiples of the first candidate's."""
    first = next(iter(times.values()))
    shown = "  ".join(f"{name} {ms:.1f} ms (×{ms / first:.2f})" for name, ms in times.items())
    print(f"{title}: {shown}", flush=True)
