"""How likely a network made a picture: a linear probe on what a frozen encoder sees of it.

What a generator's convolutions leave behind is in textures of a few pixels, so pictures are cropped
and never made smaller (Gragnaniello et al. 2021), and our probe reads early stages.

Shape letters: N pictures, D features, C channels, H W image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gigagan.common.pictures import centre, square
from gigagan.models import tensors
from gigagan.models.encoders import ImageEncoder

SIDE = 128
"""Side of the crop that the embedded probe looks at, px; smaller pictures are enlarged to it."""
STAGE_ENDS = (0, 1, 2)
"""Groups of EfficientNet-Lite0 behind which it reads: strides 2, 4 and 8."""
BATCH = 16
Crop = Callable[[Image.Image], Image.Image]
Read = Callable[[Tensor], Tensor]
"""Crops in [-1, 1], N 3 H W → features N D."""


class GeneratedProbe:
    """Pictures of any size → probability [N] that each is a network's: sigmoid(w · f(x) + b)."""

    def __init__(
        self, crop: Crop, read: Read, weight_D: Tensor, bias: float, device: torch.device
    ) -> None:
        self._crop, self._read, self._device = crop, read, device
        self._weight_D, self._bias = weight_D.double().to(device), bias

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Judge RGB pictures."""
        features_ND = features(images, self._crop, self._read, self._device)
        return (features_ND.double() @ self._weight_D + self._bias).sigmoid().float().cpu().numpy()


@torch.no_grad()
def features(images: Sequence[Image.Image], crop: Crop, read: Read, device: torch.device) -> Tensor:
    """What a probe's linear map is given, N D."""
    parts = [read(torch.zeros(1, 3, SIDE, SIDE, device=device))[:0]] if not images else []
    for start in range(0, len(images), BATCH):
        crops = [np.asarray(crop(image)) for image in images[start : start + BATCH]]
        x_NCHW = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).to(device)
        parts.append(read(x_NCHW / 127.5 - 1).float())
    return torch.cat(parts)


def crop(image: Image.Image) -> Image.Image:
    """The middle SIDE px square; of a smaller picture all of its middle, enlarged by Lanczos."""
    return centre(image, SIDE) if min(image.size) >= SIDE else square(image, SIDE)


def stage_statistics(encoder: ImageEncoder) -> Read:
    """Mean and standard deviation of every channel of the encoder's stages, N 2ΣC."""

    def read(x_NCHW: Tensor) -> Tensor:
        stages = encoder(x_NCHW).stages
        moments = [(s.mean((2, 3)), s.std((2, 3))) for s in stages]
        return torch.cat([part for pair in moments for part in pair], dim=1)

    return read


def embedded(file: Path, encoder: ImageEncoder, device: torch.device) -> GeneratedProbe:
    """The probe that `python -m studies generated` fits, with its encoder."""
    with tensors.opened(file) as weights:
        weight_D, bias = weights.get_tensor("weight_D"), float(weights.get_tensor("bias_1")[0])
    return GeneratedProbe(crop, stage_statistics(encoder), weight_D, bias, device)


def univfd(file: Path, clip: ImageEncoder, device: torch.device) -> GeneratedProbe:
    """UnivFD (Ojha et al. 2023): the published linear layer on CLIP ViT-L/14's joint-space vector.

    As its code does it takes the middle 224 px, with black around smaller pictures.

    Raises:
        ValueError: the file is not that layer.
    """
    try:
        layer = torch.load(file, map_location="cpu", weights_only=True)
        weight_D, bias = layer["weight"].reshape(clip.width), float(layer["bias"])
    except Exception as error:  # torch raises anything on other files
        raise ValueError(
            f"{file} is not UnivFD's linear layer ({error}): place fc_weights.pth of its authors"
        ) from error
    side = clip.image_size
    assert side is not None, "a ViT takes one size"
    return GeneratedProbe(
        lambda image: centre(image, side), lambda x: clip(x).pooled_BD, weight_D, bias, device
    )
