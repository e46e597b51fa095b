"""What an evaluation found: metrics with their intervals, floors, ceilings and chances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gigagan.config import EvaluateConfig
from gigagan.evaluation.judges.statistics import mean_interval

_SPLITS = ("combination", "trained")
HEADLINES = (
    *(f"naming_{how}_r1_{split}" for split in _SPLITS for how in ("pixels", "judge")),
    *("fid", "kid", "background_colour_accuracy", "pixel_probe_median_rank", "shape_rank"),
)


@dataclass
class Findings:
    """What is measured, filled one metric at a time."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % intervals over pictures drawn anew, by the metrics' names; of one training."""
    real: dict[str, float] = field(default_factory=dict)
    """The same metric of real pictures: a floor or a ceiling."""
    chance: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)
    """What a metric hangs on beside the settings: a part of the result's `protocol`."""

    def add(
        self,
        name: str,
        value: float,
        *,
        real: float | None = None,
        chance: float | None = None,
        interval: tuple[float, float] | None = None,
    ) -> None:
        """Note one metric with what it is to be held against."""
        self.metrics[name] = float(value)
        for kind, other in ((self.real, real), (self.chance, chance)):
            if other is not None:
                kind[name] = float(other)
        if interval is not None:
            self.intervals[name] = (float(interval[0]), float(interval[1]))

    def add_mean(
        self,
        name: str,
        values: np.ndarray,
        config: EvaluateConfig,
        *,
        real: float | None = None,
        chance: float | None = None,
    ) -> None:
        """Note the mean over pictures with its interval."""
        found = mean_interval(values) if config.resamples else None
        interval = None if found is None else found[:2]
        self.add(name, float(np.mean(values)), real=real, chance=chance, interval=interval)


def assemble(findings: Findings, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json holds, with what one looks at first in front."""
    return {
        "protocol": {**facts, **findings.rules},
        "metrics": dict(sorted(findings.metrics.items(), key=_headlines_first)),
        "intervals": {name: list(pair) for name, pair in findings.intervals.items()},
        "reference": {"real": findings.real, "chance": findings.chance},
        "absent": findings.absent,
    }


def _headlines_first(item: tuple[str, float]) -> int:
    """Sort key: what one looks at first, then the rest as measured."""
    name = item[0]
    return HEADLINES.index(name) if name in HEADLINES else len(HEADLINES)
