"""One network at several settings: the truncation curve, and speed by batch size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from PIL import Image


@dataclass(frozen=True)
class CurvePoint:
    """What one truncation costs in distance and brings in agreement."""

    truncation: float
    distance: float
    alignment: float


def truncation_curve(
    draw: Callable[[list[str], float], list[Image.Image]],
    captions: Sequence[str],
    psis: Sequence[float],
    *,
    distance: Callable[[Sequence[Image.Image]], float],
    alignment: Callable[[Sequence[Image.Image], Sequence[str]], float],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[CurvePoint]:
    """Distance to real pictures and agreement with captions at each ψ, over the same captions."""
    points = []
    for number, psi in enumerate(sorted(psis), start=1):
        pictures = draw(list(captions), psi)
        points.append(CurvePoint(psi, distance(pictures), alignment(pictures, captions)))
        progress(number, len(psis))
    return points


@dataclass(frozen=True)
class Speed:
    """Drawing at one batch size, everything from prompt to picture."""

    batch_size: int
    seconds_per_image: float
    images_per_second: float


def speeds(
    draw: Callable[[list[str]], object],
    captions: Sequence[str],
    batch_sizes: Sequence[int] = (1, 4, 16, 64),
    *,
    repeats: int = 3,
    budget_seconds: float = 60.0,
) -> list[Speed]:
    """Median of `repeats` calls after one that warms up, at each batch size.

    Captions are repeated where they are fewer than a batch. Once the budget is spent no larger
    batch is begun: what was measured is returned.
    """
    began = time.perf_counter()
    found: list[Speed] = []
    for size in sorted(batch_sizes):
        if found and time.perf_counter() - began > budget_seconds:
            break
        batch = [captions[i % len(captions)] for i in range(size)]
        draw(batch)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            draw(batch)
            seconds.append(time.perf_counter() - start)
        each = max(median(seconds), 1e-9) / size
        found.append(Speed(size, each, 1 / each))
    return found
