"""Metadata to images: which rows are worth asking for, then their original bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow

from data.config import LIMITS
from flows.conductor import Outcome, conduct
from flows.config import PipelineConfig
from flows.stage import Context, Progress, Stage


def run(context: Context) -> None:
    """The stage's body; a second attempt fetches only the shards that are missing."""
    from data.download.run import run as fetch

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
    from data.lists.metadata import fingerprint

    return {"metadata": fingerprint(config.download.metadata)}


def unkeyed(config: PipelineConfig) -> set[str]:
    """Limits and manners with which a download goes on, and what its source does not read."""
    is_embedded = config.download.source == "embedded"
    return {*LIMITS, *(["columns", "allow_withdrawn"] if is_embedded else ["embedded"])}


def harm(folder: Path, progress: Progress) -> str | None:
    """Pictures whose bytes are not those that were downloaded."""
    from data.originals import verify

    found = verify(folder, progress=progress)
    if not found:
        return None
    return (
        f"{len(found):,} pictures are not those that were downloaded (first: key {found[0].key}): "
        f"`python -m data download {folder} --verify` fetches them again"
    )


STAGE = Stage(
    "download",
    version=2,
    run=run,
    external=external,
    unkeyed=unkeyed,
    # The fates have each picture's sha256, and what comes after depends on those.
    vouched=("images",),
    harm=harm,
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
