"""Which evaluations may be compared, and by which number: smaller wins.

protocol = digest of the rules that `evaluate --compare` asks to be equal
decides  = FID; KID for fewer than 10,000 pictures, where FID is mostly bias
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.stage import Manifest
from flows.storage.files import digest
from gigagan.evaluation.protocol import DECISIVE

MIN_FID_IMAGES = 10_000
"""FID of fewer pictures is mostly its bias, which differs from model to model; KID has none."""


@dataclass(frozen=True)
class Score:
    """The number that decides, smaller is better."""

    metric: str
    value: float

    def beats(self, other: Score) -> bool:
        """Whether it is better: neither equal nor incomparable (NaN is neither)."""
        return self.metric == other.metric and self.value < other.value


def protocol_of(results: Mapping[str, Any], manifest: Manifest) -> str:
    """Identity of how the deciding metric was measured: equal ones may be compared."""
    rules = results.get("protocol", {})
    decisive = {name: rules.get(name) for name in DECISIVE}
    decisive["code"] = manifest.version
    return digest(decisive)[:16]


def score_of(results: Mapping[str, Any]) -> Score:
    """What decides about these results; NaN where it was not measured."""
    rules = results.get("protocol", {})
    images = min(rules.get("num_generated", 0), rules.get("num_real", 0))
    metric = "fid" if images >= MIN_FID_IMAGES else "kid"
    return Score(metric, float(results["metrics"].get(metric, math.nan)))
