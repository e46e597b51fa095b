"""Pictures as vectors whose squared distances tell copies, and the copies that are planted.

Shape letters: N pictures, D features, H W image, C colour.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from gigagan.evaluation.judges.features import image_vectors, square
from gigagan.models import pretrained

Pictures = Sequence[Image.Image]
PX = 32
"""Of all pictures, real and drawn."""
_BATCH = 64


def lpips(pictures: Pictures) -> np.ndarray:
    """Vectors [N, D] whose squared distance is LPIPS by AlexNet at 64 px (Zhang et al. 2018).

    LPIPS is a weighted sum of squared differences of activations at length 1, hence a squared
    distance itself, and neighbours by it need no network a pair.
    """
    network: Any = pretrained.lpips("alex")
    weights = [head.model[-1].weight.clamp(min=0).sqrt() for head in network.lins]
    parts = []
    for start in range(0, len(pictures), _BATCH):
        x_NCHW = _batch(pictures[start : start + _BATCH], 2 * PX) * 2 - 1
        layers = network.net(network.scaling_layer(x_NCHW))
        scaled = [
            (F.normalize(h_NCHW, dim=1, eps=1e-10) * w / h_NCHW[0, 0].numel() ** 0.5).flatten(1)
            for h_NCHW, w in zip(layers, weights, strict=True)
        ]
        parts.append(torch.cat(scaled, dim=1))
    return torch.cat(parts).numpy()


def efficientnet(pictures: Pictures) -> np.ndarray:
    """EfficientNet-Lite0's pooled features [N, D] at 128 px and length 1: 2 (1 − cosine)."""
    encoder = pretrained.image_encoder("embedded:efficientnet-lite0")
    return F.normalize(image_vectors(pictures, encoder, px=4 * PX), dim=1).numpy()


def pixels(pictures: Pictures) -> np.ndarray:
    """Values from 0 to 1 [N, D], scaled: the squared distance is their mean squared difference."""
    x_ND = _batch(pictures, PX).flatten(1)
    return (x_ND / x_ND.shape[1] ** 0.5).numpy()


ENCODERS: dict[str, Callable[[Pictures], np.ndarray]] = {
    "LPIPS": lpips,
    "EfficientNet": efficientnet,
    "pixels": pixels,
}


def _batch(pictures: Pictures, px: int) -> torch.Tensor:
    x_NHWC = np.stack([np.asarray(square(picture, px)) for picture in pictures])
    return torch.from_numpy(x_NHWC).permute(0, 3, 1, 2) / 255


# ---- planted copies -----------------------------------------------------------------------------

Change = Callable[[Image.Image], Image.Image]


def changes() -> dict[str, Change]:
    """What is done to training pictures that shall be found all the same."""
    return {
        "noise, σ = 8 of 255": _noisy(8),
        "noise, σ = 16 of 255": _noisy(16),
        "JPEG, quality 75": _jpeg(75),
        "JPEG, quality 50": _jpeg(50),
        "blur, σ = 0.7 px": lambda picture: picture.filter(ImageFilter.GaussianBlur(0.7)),
        "blur, σ = 1 px": lambda picture: picture.filter(ImageFilter.GaussianBlur(1)),
        "one pixel right and down": _shifted,
    }


def _noisy(sigma: float) -> Change:
    random = np.random.default_rng(0)

    def change(picture: Image.Image) -> Image.Image:
        x_HWC = np.asarray(picture) + random.normal(0, sigma, (picture.height, picture.width, 3))
        return Image.fromarray(x_HWC.round().clip(0, 255).astype(np.uint8))

    return change


def _jpeg(quality: int) -> Change:
    def change(picture: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return change


def _shifted(picture: Image.Image) -> Image.Image:
    x_HWC = np.pad(np.asarray(picture), ((1, 0), (1, 0), (0, 0)), "edge")
    return Image.fromarray(x_HWC[:-1, :-1])
