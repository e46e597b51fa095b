"""What a data stage says at its end: a report whose counts add up."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gigagan.common.files import write_aside


class Step(NamedTuple):
    """One step of a funnel: rows it dropped, rows left after it. The first drops none."""

    step: str
    dropped: int
    rows: int


Funnel = list[Step]


@dataclass(frozen=True)
class Report:
    """Outcome of a stage."""

    counts: dict[str, int]
    """Rows by outcome; they sum to the rows that came in."""
    funnel: Funnel
    """The same rows as steps, in the order in which they were dropped."""
    metrics: dict[str, float]
    """Headline numbers, flat."""
    details: dict[str, Any] = field(default_factory=dict)
    """Tables of the stage's own, JSON."""

    def __post_init__(self) -> None:
        for before, after in zip(self.funnel, self.funnel[1:], strict=False):
            assert before.rows - after.dropped == after.rows, f"{before} → {after} does not add up"

    def save(self, path: Path) -> None:
        """Write as JSON."""
        document = {**asdict(self), "funnel": [step._asdict() for step in self.funnel]}
        write_aside(path, json.dumps(document, indent=1, ensure_ascii=False))

    def table(self) -> str:
        """The funnel as aligned text, one step a line."""
        width = max(len(step.step) for step in self.funnel)
        return "\n".join(f"{s.step:{width}}  −{s.dropped:<9,} {s.rows:>11,}" for s in self.funnel)
