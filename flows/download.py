"""Metadata to images: which rows are worth asking for, then their original bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import flow

from data.config import LIMITS
from flows.conductor import Outcome, conduct
from flows.config import PipelineConfig
from flows.stage import Context, Stage


def run(context: Context) -> None:
    """The stage's body; a second attempt fetches only the shards that are missing."""
    from data.download import run as fetch

    report = fetch(
        context.path,
        context.config,
        processes=context.resources.processes,
        progress=context.progress,
    )
    context.metrics |= report.metrics


def external(config: PipelineConfig) -> Mapping[str, str]:
    """The lists of URLs: other rows under the same name make another download."""
    if config.download.source == "embedded":
        return {}
    from data.metadata import fingerprint

    return {"metadata": fingerprint(config.download.metadata)}


def unkeyed(config: PipelineConfig) -> set[str]:
    """Limits and politeness, with which a download goes on; where its lists lie, for their content
    counts; and what its source does not read."""
    is_embedded = config.download.source == "embedded"
    return {*LIMITS, "metadata", *(["columns", "allow_withdrawn"] if is_embedded else ["embedded"])}


STAGE = Stage(
    "download",
    version=2,
    run=run,
    external=external,
    unkeyed=unkeyed,
    # The fates have each picture's sha256, and what comes after depends on those.
    vouched=("images",),
    scratch=("img2dataset.log", "work"),
)


@flow(name=STAGE.name, persist_result=True)
def download(
    overrides: dict[str, Any] = {},  # noqa: B006
    force: bool = False,
    upstream: dict[str, str] = {},  # noqa: B006
    config: PipelineConfig = PipelineConfig(),
) -> Outcome:
    """Bring the download up to date.

    Args:
        overrides: settings by dotted key, as in `{"download.embedded.max_concepts": 50}`
        force: discard its output and run it again
        upstream: outputs to read instead; this stage reads none
        config: all settings; the deployment comes with those of its preset
    """
    return conduct(STAGE, overrides, force, config, upstream)
