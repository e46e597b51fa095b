"""Metadata to images: which rows are worth asking for, then their original bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from data.config import LIMITS
from flows.conductor import stage_flow
from flows.config import PipelineConfig
from flows.stage import Context, Stage
from gigagan.common.progress import Progress


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
    version=3,
    run=run,
    external=external,
    unkeyed=unkeyed,
    # The fates have each picture's sha256, and what comes after depends on those.
    vouched=("images",),
    harm=harm,
    scratch=("img2dataset.log", "work"),
)

download = stage_flow(
    STAGE, "the download", example='{"download.embedded.max_concepts": 50}', reads=None
)
