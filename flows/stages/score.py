"""Images to scores: what frozen models say of each picture and caption."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from prefect import flow

from flows.conductor import Outcome, conduct
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


STAGE = Stage("score", version=1, run=run, needs=needs, unkeyed=unkeyed, gpu=True)


@flow(name=STAGE.name, persist_result=True)
def score(
    overrides: dict[str, Any] = {},  # noqa: B006
    force: bool = False,
    upstream: dict[str, str] = {},  # noqa: B006
    config: PipelineConfig = PipelineConfig(),
) -> Outcome:
    """Bring the scores up to date.

    Args:
        overrides: settings by dotted key, as in `{"score.nsfw": null}`
        force: discard its output and run it again
        upstream: outputs to read instead: `{"download": WHERE}` with a key, an MLflow run, a
            folder or a URL
        config: all settings; the deployment comes with those of its preset
    """
    return conduct(STAGE, overrides, force, config, upstream)
