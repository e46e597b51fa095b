"""The frozen models that score pictures and captions, as functions for data.score.run.

A worker imports this: neither Prefect nor MLflow comes with it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.config import ScoreConfig
    from data.score.run import Encoders

IMAGE_ENCODER = "embedded:efficientnet-lite0"
TEXT_ENCODER = "embedded:minilm-l6"
"""Together they are what `embedded:aligner` is fitted on."""
FEWEST = 5
"""Pairs that the aligner is fitted to, each fold by the others."""
IMAGE_PX = 128
"""Pictures are brought to this side for an encoder that takes any size."""


def encoders(config: ScoreConfig, worker: int = 0) -> Encoders:
    """The models that `config` names, as functions over pictures and captions.

    Workers take the devices in turn.
    """
    from data.score.run import Encoders
    from gigagan.models import pretrained

    device = _device(config.devices, worker)
    nsfw = pretrained.nsfw(config.nsfw) if _is_computed("unsafe", config) and config.nsfw else None
    generated = pretrained.generated(config.generated, device) if config.generated else None
    if {"similarity_b32", "similarity_l14"} & {*config.take_over}:
        return Encoders(unsafe=nsfw, generated=generated)
    made = _clip if config.encoder.startswith("open_clip:") else _embedded
    learned = config.aesthetic == "laion-v2" and _is_computed("aesthetic", config)
    return Encoders(
        **made(config, device),
        aesthetic=pretrained.aesthetic() if learned else None,
        unsafe=nsfw,
        generated=generated,
    )


def _clip(config: ScoreConfig, device: str) -> dict[str, Any]:
    """Both towers of an open_clip model, and the cosine between their joint-space vectors."""
    import torch

    from gigagan.evaluation.judges.features import clip_image_vectors
    from gigagan.models import pretrained
    from gigagan.models.openclip import OpenClipText

    image = pretrained.image_encoder(config.encoder, device, precision=config.precision)
    text = pretrained.text_encoder(config.encoder, device, precision=config.precision)
    assert isinstance(text, OpenClipText)
    batch = config.batch_size

    def texts(captions: list[str]) -> Any:
        parts = [text.embed(captions[i : i + batch]) for i in range(0, len(captions), batch)]
        return torch.cat(parts).cpu().numpy()

    return {
        "image_features": lambda images: clip_image_vectors(
            images, image, device=device, batch_size=batch
        ).numpy(),
        "text_features": texts,
        "similarity": _cosine,
    }


def _embedded(config: ScoreConfig, device: str) -> dict[str, Any]:
    """The two encoders that the aligner connects; it is fitted when all pairs are known."""
    from gigagan.evaluation.judges.features import image_vectors, text_vectors
    from gigagan.models import pretrained

    if config.encoder != "embedded:aligner":
        raise ValueError(
            f"score.encoder is {config.encoder!r}: choose embedded:aligner or "
            "open_clip:ARCHITECTURE/TAG"
        )
    image = pretrained.image_encoder(IMAGE_ENCODER, device)
    text = pretrained.text_encoder(TEXT_ENCODER, device)
    return {
        "image_features": lambda images: image_vectors(
            images, image, px=IMAGE_PX, device=device, batch_size=config.batch_size
        ).numpy(),
        "text_features": lambda captions: text_vectors(captions, text).numpy(),
        "fit_similarity": partial(_cross_fitted, seed=config.seed),
    }


def _is_computed(score: str, config: ScoreConfig) -> bool:
    return score not in config.take_over


def _device(devices: tuple[str, ...], worker: int) -> str:
    """The worker's device; `auto` stands for every CUDA device, or else the CPU."""
    import torch

    every = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    listed = [name for device in devices for name in (every if device == "auto" else [device])]
    return listed[worker % len(listed)]


def _cosine(images_ND: Any, texts_ND: Any) -> Any:
    import torch
    from torch.nn.functional import cosine_similarity

    first, second = (torch.as_tensor(vectors).float() for vectors in (images_ND, texts_ND))
    return cosine_similarity(first, second).numpy()


def _cross_fitted(images_ND: Any, texts_NE: Any, *, seed: int) -> Any:
    if len(images_ND) < FEWEST:
        raise ValueError(
            f"score.encoder embedded:aligner is fitted to the pictures themselves, and "
            f"{len(images_ND)} are too few: {FEWEST} at least, or choose open_clip:ARCHITECTURE/TAG"
        )
    import torch

    from gigagan.models.aligner import cross_fitted_similarity

    pairs = torch.from_numpy(images_ND), torch.from_numpy(texts_NE)
    return cross_fitted_similarity(*pairs, seed=seed).numpy()


def aligner(scores: Path, keys: list[str], out: Path) -> None:
    """Fit the embedded aligner to some of the scored pairs, for losses and evaluation."""
    import numpy as np
    import pyarrow.dataset as ds
    import torch

    from gigagan.models.aligner import fit_aligner

    embeddings = ds.dataset(scores / "embeddings", format="parquet")
    table = embeddings.to_table(filter=ds.field("key").isin(keys)).sort_by("key")
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
    aligner.save(out)
