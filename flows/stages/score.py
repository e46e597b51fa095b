"""Images to scores: what frozen models say of each picture and caption."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from flows.conductor import stage_flow
from flows.config import PipelineConfig
from flows.stage import Context, Need, Stage
from flows.stages import download


def run(context: Context) -> None:
    """The stage's body; a second attempt scores only the shards that are missing."""
    from data.score.run import run as score
    from gigagan.scoring import encoders

    report = score(
        context.path,
        context.inputs["fates"].parent,
        context.config,
        partial(encoders, context.config),
        workers=context.resources.processes,
        backend=context.resources.executor,
        gpus=context.resources.gpus,
        progress=context.progress,
    )
    context.metrics |= report.metrics


def needs(config: PipelineConfig) -> Mapping[str, Need]:
    """The fates: they name every picture by its sha256."""
    return {"fates": Need(download.STAGE, "fates", beside=("images", "lists"))}


def unkeyed(config: PipelineConfig) -> tuple[str, ...]:
    """How the models are spread over devices."""
    return ("devices", "batch_size")


STAGE = Stage("score", version=2, run=run, needs=needs, unkeyed=unkeyed, gpu=True)

score = stage_flow(STAGE, "the scores", example='{"score.nsfw": null}', reads="download")
