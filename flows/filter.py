"""Images to training shards: scores from frozen encoders, thresholds, reproducible tars."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow

from flows import download
from flows.conductor import Outcome, conduct
from flows.config import PipelineConfig
from flows.stage import Context, Need, Stage

if TYPE_CHECKING:
    from data.config import FilterConfig
    from data.score import Encoders

IMAGE_ENCODER = "embedded:efficientnet-lite0"
TEXT_ENCODER = "embedded:minilm-l6"
"""Together they are what `embedded:aligner` is fitted on."""
IMAGE_PX = 128
"""Pictures are brought to this side for an encoder that takes any size."""
ALIGNER = "aligner.safetensors"


def run(context: Context) -> None:
    """The stage's body; a second attempt scores and writes only the shards that are missing."""
    from data.filter import run as score_and_select

    report = score_and_select(
        context.path,
        context.inputs["images"].parent,
        context.config,
        encoders(context.config),
        progress=context.progress,
    )
    if context.config.aligner == "embedded:aligner":
        save_aligner(context.path)
    context.metrics |= report.metrics
    for index in context.path.glob("shards/*/index.json"):
        folder = index.parent.relative_to(context.path)
        for shard in json.loads(index.read_text())["shards"]:
            context.digests[f"{folder}/{shard['name']}"] = shard["sha256"]


def encoders(config: FilterConfig) -> Encoders:
    """The models that `config` names, as functions over pictures and captions."""
    import torch
    from torch.nn.functional import cosine_similarity

    from data.score import Encoders
    from gigagan.evaluation.features import image_vectors, text_vectors
    from gigagan.models import pretrained
    from gigagan.models.aligner import cross_fitted_similarity

    fitted = config.aligner == "embedded:aligner"
    image = pretrained.image_encoder(IMAGE_ENCODER if fitted else config.aligner)
    text = pretrained.text_encoder(TEXT_ENCODER if fitted else config.aligner)

    def similarity(images_ND: Any, texts_NE: Any) -> Any:
        pairs = torch.from_numpy(images_ND), torch.from_numpy(texts_NE)
        if fitted:
            return cross_fitted_similarity(*pairs, seed=config.seed).numpy()
        return cosine_similarity(*pairs).numpy()

    return Encoders(
        image_features=lambda images: image_vectors(
            images, image, px=image.image_size or IMAGE_PX, batch_size=config.batch_size
        ).numpy(),
        text_features=lambda captions: text_vectors(captions, text).numpy(),
        similarity=similarity,
        unsafe=pretrained.nsfw(config.nsfw) if config.nsfw else None,
    )


def save_aligner(out: Path) -> None:
    """Fit the aligner on all kept pairs, for the losses and the evaluation downstream."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    from gigagan.models.aligner import fit_aligner

    kept = pq.read_table(out / "kept.parquet", columns=["key"])["key"].to_pylist()
    table = pq.read_table(out / "embeddings.parquet", filters=[("key", "in", kept)]).sort_by("key")
    images_ND, texts_NE = (
        torch.from_numpy(np.stack(table[name].to_numpy()).astype(np.float32))
        for name in ("image", "text")
    )
    aligner = fit_aligner(
        images_ND,
        texts_NE,
        image_encoder=IMAGE_ENCODER,
        text_encoder=TEXT_ENCODER,
        image_px=IMAGE_PX,
    )
    aligner.save(out / ALIGNER)


def needs(config: PipelineConfig) -> Mapping[str, Need]:
    """Only the pictures: what became of the other rows changes nothing here."""
    return {"images": Need(download.STAGE, "images")}


STAGE = Stage("filter", version=1, run=run, needs=needs)


@flow(name=STAGE.name, persist_result=True)
def filter_(
    overrides: dict[str, Any] = {},  # noqa: B006
    force: bool = False,
    config: PipelineConfig = PipelineConfig(),
) -> Outcome:
    """Bring the filter up to date.

    * **overrides**: dotted keys, as in `{"filter.min_similarity": 0.2}`
    * **force**: discard its output and run it again
    """
    return conduct(STAGE, overrides, force, config)
