"""Scores to training shards: thresholds, duplicates, reproducible tars. Nothing is scored here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from flows.conductor import stage_flow
from flows.config import PipelineConfig
from flows.stage import Context, Need, Stage
from flows.stages import download, score
from gigagan.common.files import sha256_of

ALIGNER = "aligner.safetensors"
MAX_ALIGNER_PAIRS = 200_000
"""Pairs that the embedded aligner is fitted to, at most."""


def run(context: Context) -> None:
    """The stage's body; a second attempt writes only the shards that are missing."""
    from data.filter.run import run as select_and_shard

    scores = context.inputs["scores"].parent
    report = select_and_shard(
        context.path,
        scores,
        context.inputs["fates"].parent,
        context.config,
        workers=context.resources.processes,
        backend=context.resources.executor,
        progress=context.progress,
    )
    if "embeddings" in context.inputs:
        _save_aligner(context.path, scores)
    context.metrics |= report.metrics
    for index in context.path.glob("shards/*/index.json"):
        folder = index.parent.relative_to(context.path)
        for shard in json.loads(index.read_text())["shards"]:
            tar = f"{folder}/{shard['name']}"
            context.digests[tar] = shard["sha256"]
            context.digests[tar.removesuffix("tar") + "parquet"] = shard["index_sha256"]


def _save_aligner(out: Path, scores: Path) -> None:
    """Losses and the evaluation measure with what is fitted to the pairs that were kept."""
    import pyarrow.parquet as pq

    from gigagan.scoring import aligner

    kept = pq.ParquetFile(out / "kept.parquet")
    keys: list[str] = []
    for batch in kept.iter_batches(columns=["key"]):
        keys += batch.column(0).to_pylist()
        if len(keys) >= MAX_ALIGNER_PAIRS:
            break
    aligner(scores, keys[:MAX_ALIGNER_PAIRS], out / ALIGNER)


def needs(config: PipelineConfig) -> Mapping[str, Need]:
    """The scores, and the pictures they were made from."""
    pictures = ("images", "plan.json", "site")
    found = {
        "scores": Need(score.STAGE, "scores"),
        "fates": Need(download.STAGE, "fates", beside=pictures),
    }
    if config.score.encoder == "embedded:aligner" or config.filter.min_duplicate_cosine:
        found["embeddings"] = Need(score.STAGE, "embeddings", optional=True)
    return found


def external(config: PipelineConfig) -> Mapping[str, str]:
    """The evaluation captions that training must not contain, and influences by their file."""
    files = {f"decontaminate:{n}": name for n, name in enumerate(config.filter.decontaminate)}
    if config.filter.influence is not None:
        files["influence"] = config.filter.influence
    return {name: sha256_of(Path(file)) for name, file in files.items() if Path(file).is_file()}


def unkeyed(config: PipelineConfig) -> tuple[str, ...]:
    """Where those files lie, for their content counts; a file that is not there has none."""
    found = external(config)
    is_all_there = len(found.keys() - {"influence"}) == len(config.filter.decontaminate)
    return (
        *(("decontaminate",) if is_all_there else ()),
        *(("influence",) if config.filter.influence is None or "influence" in found else ()),
    )


STAGE = Stage("filter", version=4, run=run, needs=needs, external=external, unkeyed=unkeyed)

filter_ = stage_flow(STAGE, "the filter", example='{"filter.min_similarity": 0.2}', reads="score")
