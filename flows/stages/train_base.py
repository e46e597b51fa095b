"""Shards to a base generator, in a process of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from flows import launch
from flows.conductor import stage_flow
from flows.config import PipelineConfig
from flows.stage import Context, Length, Need, Stage
from flows.stages import download, filter
from gigagan.config import FREE_TO_CHANGE

PROCESS = launch.Process(("gigagan.training",), out="--run-dir")
SCRATCH = ("checkpoints", "text-features.pt", launch.LOG)
CHECKPOINT = re.compile(r"checkpoints/images-(\d+)\.pt")


def train(context: Context) -> None:
    """The body of both training stages; a second attempt goes on from the last checkpoint."""
    launch.stage_process(context, PROCESS)
    context.metrics |= json.loads((context.path / "result.json").read_text())


def needs(config: PipelineConfig) -> Mapping[str, Need]:
    """Shards at the generator's resolution, and unseen captions for the probes."""
    resolution = config.train_base.generator.resolution
    return {
        "shards": Need(filter.STAGE, f"shards/{resolution:03d}"),
        "heldout": Need(download.STAGE, "heldout", optional=True),
    }


def unkeyed(config: PipelineConfig) -> set[str]:
    """With what else than its length a run goes on in its folder."""
    return {*FREE_TO_CHANGE} - {LENGTH.setting}


def reached(names: Iterable[str]) -> int:
    """Images seen, by the newest checkpoint's name."""
    found = (CHECKPOINT.fullmatch(name) for name in names)
    return max((int(match[1]) for match in found if match), default=0)


LENGTH = Length("total_images", reached)


STAGE = Stage(
    "train-base",
    version=3,
    run=train,
    needs=needs,
    scratch=SCRATCH,
    unkeyed=unkeyed,
    length=LENGTH,
    gpu=True,
)

train_base = stage_flow(
    STAGE,
    "the base generator",
    again="train",
    example='{"train_base.total_images": 20000}',
    reads="filter",
)
