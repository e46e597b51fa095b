"""LAION's aesthetic predictor v2 as what it is: one affine map of OpenAI's CLIP ViT-L/14 embedding.

Its five linear layers have nothing between them but dropout, so their product says the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gigagan.models import tensors

SOURCE = "sac+logos+ava1-l14-linearMSE.pth"
"""File of github.com/christophschuhmann/improved-aesthetic-predictor, Apache-2.0."""
SOURCE_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
_LINEAR = (0, 2, 4, 6, 7)
"""Numbers of the linear layers in the file; those between them are dropout."""


class AestheticPredictor:
    """Embeddings [N, D] of any length → scores [N]: about 1 for ugly and 10 for beautiful."""

    def __init__(self, file: Path) -> None:
        with tensors.opened(file, framework="np") as weights:
            self._weight_D = weights.get_tensor("weight_D")
            self._bias = float(weights.get_tensor("bias_1")[0])

    def __call__(self, embeddings_ND: np.ndarray) -> np.ndarray:
        """Score image embeddings of the model that it was fitted on; an all-zero one gets NaN.

        Raises:
            ValueError: embeddings of another width, hence of another model.
        """
        if embeddings_ND.ndim != 2 or embeddings_ND.shape[1] != len(self._weight_D):
            raise ValueError(
                f"the aesthetic predictor reads embeddings [N, {len(self._weight_D)}] of "
                f"open_clip:ViT-L-14/openai, but was given {list(embeddings_ND.shape)}"
            )
        x_ND = embeddings_ND.astype(np.float32)
        with np.errstate(invalid="ignore"):
            unit_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
        return unit_ND @ self._weight_D + self._bias


def collapse(source: Path, target: Path) -> None:
    """Write the product of the published layers, taken in float64; so the shipped file was made.

    Wₖ (… (W₁ x + b₁) …) + bₖ = W x + b. Rounding to float32 moves a score by less than 1e-5.
    """
    layers = torch.load(source, map_location="cpu", weights_only=True)
    width = layers["layers.0.weight"].shape[1]
    weight = torch.eye(width, dtype=torch.float64)
    bias = torch.zeros(width, dtype=torch.float64)
    for number in _LINEAR:
        step = layers[f"layers.{number}.weight"].double()
        weight, bias = step @ weight, step @ bias + layers[f"layers.{number}.bias"].double()
    about = {
        "source": SOURCE,
        "source_sha256": SOURCE_SHA256,
        "licence": "Apache-2.0",
        "changes": "the product of its five linear layers, taken in float64",
        "input": "image embeddings of OpenAI's CLIP ViT-L/14, L2-normalised",
    }
    folded = {"weight_D": weight[0].float().contiguous(), "bias_1": bias.float()}
    tensors.write(target, folded, about)
