"""Shards to an upsampler, in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import flow

from flows.conductor import Outcome, conduct
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


@flow(name=STAGE.name, persist_result=True)
def train_upsampler(
    overrides: dict[str, Any] = {},  # noqa: B006
    force: bool = False,
    upstream: dict[str, str] = {},  # noqa: B006
    config: PipelineConfig = PipelineConfig(),
) -> Outcome:
    """Bring the upsampler up to date.

    Args:
        overrides: settings by dotted key, as in `{"train_upsampler.total_images": 20000}`
        force: discard its output and train again
        upstream: outputs to read instead: `{"filter": WHERE}` with a key, an MLflow run, a
            folder or a URL
        config: all settings; the deployment comes with those of its preset
    """
    return conduct(STAGE, overrides, force, config, upstream)
