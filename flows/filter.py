"""Images to training shards: scores from frozen encoders, thresholds, reproducible tars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import flow

from flows import download
from flows.conductor import Outcome, conduct
from flows.config import PipelineConfig
from flows.stage import Context, Need, Stage


def run(context: Context) -> None:
    """The stage's body."""
    raise RuntimeError("filter")


def needs(config: PipelineConfig) -> Mapping[str, Need]:
    """Only the pictures: what became of the other rows changes nothing here."""
    return {"images": Need(download.STAGE, "images")}


STAGE = Stage("filter", version=1, run=run, needs=needs)


@flow(name=STAGE.name, persist_result=True)
def filter_(
    overrides: dict[str, Any] = {},  # noqa: B006
    force: bool = False,
    config: PipelineConfig = PipelineConfig(),
) -> Outcome:
    """Bring the filter up to date.

    * **overrides**: dotted keys, as in `{"filter.min_similarity": 0.2}`
    * **force**: discard its output and run it again
    """
    return conduct(STAGE, overrides, force, config)
