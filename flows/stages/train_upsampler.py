"""Shards to an upsampler, in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping

from flows.conductor import stage_flow
from flows.config import PipelineConfig
from flows.stage import Need, Stage
from flows.stages import download, filter, train_base


def needs(config: PipelineConfig) -> Mapping[str, Need]:
    """Shards at the upsampler's output resolution, and unseen captions for the probes.

    It learns from shrunk real pictures: another base generator does not train it again.
    """
    resolution = config.train_upsampler.upsampler.resolution
    return {
        "shards": Need(filter.STAGE, f"shards/{resolution:03d}"),
        "heldout": Need(download.STAGE, "heldout", optional=True),
    }


STAGE = Stage(
    "train-upsampler",
    version=3,
    run=train_base.train,
    needs=needs,
    scratch=train_base.SCRATCH,
    unkeyed=train_base.unkeyed,
    length=train_base.LENGTH,
    gpu=True,
)

train_upsampler = stage_flow(
    STAGE,
    "the upsampler",
    again="train",
    example='{"train_upsampler.total_images": 20000}',
    reads="filter",
)
