"""Both networks to numbers and pictures, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from flows import launch
from flows.conductor import stage_flow
from flows.config import PipelineConfig
from flows.stage import Context, Need, Stage
from flows.stages import download, filter, train_base, train_upsampler
from gigagan.common.files import sha256_of

PROCESS = launch.Process(("gigagan", "evaluate"), out="--out")


STATISTICS = "statistics"
"""Folder of the store beside those of the stages: features of reference sets, by content."""


def run(context: Context) -> None:
    """The stage's body."""
    inputs = {**context.inputs, "statistics": context.path.parents[1] / STATISTICS}
    launch.stage_process(replace(context, inputs=inputs), PROCESS)
    context.metrics |= json.loads((context.path / "results.json").read_text())["metrics"]


def needs(config: PipelineConfig) -> Mapping[str, Need]:
    """Weights, unseen captions with their pictures, the filter's model, and training pictures."""
    training = {}
    if config.evaluate.neighbours:
        resolution = config.train_base.generator.resolution
        training["shards"] = Need(filter.STAGE, f"shards/{resolution:03d}", optional=True)
    return {
        "base": Need(train_base.STAGE, "snapshot.safetensors"),
        "upsampler": Need(train_upsampler.STAGE, "snapshot.safetensors"),
        "heldout": Need(download.STAGE, "heldout", optional=config.evaluate.captions is not None),
        "aligner": Need(filter.STAGE, filter.ALIGNER, optional=True),
        **training,
    }


def external(config: PipelineConfig) -> Mapping[str, str]:
    """A captions file of one's own; the run itself complains where it is not there."""
    path = Path(config.evaluate.captions or "")
    return {"captions": sha256_of(path)} if path.is_file() else {}


def unkeyed(config: PipelineConfig) -> tuple[str, ...]:
    """Where its captions lie, for their content counts."""
    return ("captions",) if external(config) else ()


STAGE = Stage(
    "evaluate",
    version=5,
    run=run,
    needs=needs,
    external=external,
    unkeyed=unkeyed,
    scratch=("features", launch.LOG),
    gpu=True,
    registers=True,
)

evaluate = stage_flow(
    STAGE, "the evaluation", again="evaluate", example='{"evaluate.seed": 1}', reads="train-base"
)
