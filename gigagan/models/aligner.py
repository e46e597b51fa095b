"""A ridge projection from image features to caption vectors: scores pairs where no CLIP is at hand.

It is fitted in about a second on the pairs of one data set, and never called CLIP.
Shape letters: N pairs, D image features, E text features.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gigagan.models import tensors

DEFAULT_RIDGE = 1.0
"""Best mean similarity and R@10 on unseen emoji, at 64 px as at 224 (0.3 to 3 are near)."""
CHUNK = 8192
"""Pairs that are held in float64 at one time."""


@dataclass(frozen=True)
class Aligner:
    """Maps both kinds of features to unit vectors of one space; see `fit_aligner`."""

    projection_DE: Tensor
    image_mean_D: Tensor
    text_mean_E: Tensor
    image_encoder: str = "embedded:efficientnet-lite0"
    """Name of the model whose pooled features are the input."""
    text_encoder: str = "embedded:minilm-l6"
    image_px: int = 128
    """Pictures are brought to this side before they are encoded, when fitting and ever after."""

    def embed_images(self, features_ND: Tensor) -> Tensor:
        """Unit vectors [N, E]; differentiable in the features."""
        return F.normalize((features_ND - self.image_mean_D) @ self.projection_DE, dim=-1)

    def embed_texts(self, features_NE: Tensor) -> Tensor:
        """Features of texts → unit vectors [N, E]."""
        return F.normalize(features_NE - self.text_mean_E, dim=-1)

    def similarity(self, image_features_ND: Tensor, text_features_NE: Tensor) -> Tensor:
        """Cosine [N] of every image with its own caption."""
        images_NE, texts_NE = (
            self.embed_images(image_features_ND),
            self.embed_texts(text_features_NE),
        )
        return (images_NE * texts_NE).sum(dim=-1)

    def to(self, device: torch.device | str) -> Aligner:
        """Return the same aligner on another device."""
        return dataclasses.replace(
            self,
            projection_DE=self.projection_DE.to(device),
            image_mean_D=self.image_mean_D.to(device),
            text_mean_E=self.text_mean_E.to(device),
        )

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically; the encoders' names are in its metadata."""
        settings = {
            "image_encoder": self.image_encoder,
            "text_encoder": self.text_encoder,
            "image_px": self.image_px,
        }
        tensors.write(path, self._tensors(), {"aligner": json.dumps(settings)})

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> Aligner:
        """Read what `save` wrote; ValueError if the file holds something else."""
        with tensors.opened(path, device=str(device)) as file:
            settings = (file.metadata() or {}).get("aligner")
            if settings is None:
                raise ValueError(
                    f"{path} is not an aligner: give the one that the filter stage fits"
                )
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return cls(**found, **json.loads(settings))

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "projection_DE": self.projection_DE,
            "image_mean_D": self.image_mean_D,
            "text_mean_E": self.text_mean_E,
        }


def fit_aligner(
    image_features_ND: Tensor,
    text_features_NE: Tensor,
    *,
    ridge: float = DEFAULT_RIDGE,
    image_encoder: str = "embedded:efficientnet-lite0",
    text_encoder: str = "embedded:minilm-l6",
    image_px: int = 128,
) -> Aligner:
    """Fit W = (XᵀX / N + λ I)⁻¹ XᵀY / N on centred features, in float64; deterministic.

    `ridge` is λ in units of the mean variance of an image feature, so that it means the same for
    any encoder. Raises ValueError with fewer than two pairs.
    """
    moments = _Moments.of(*_matched(image_features_ND, text_features_NE))
    return _fitted(moments, ridge, image_encoder, text_encoder, image_px)


def _fitted(
    moments: _Moments, ridge: float, image_encoder: str, text_encoder: str, image_px: int
) -> Aligner:
    image_mean_D, text_mean_E = moments.image_D / moments.N, moments.text_E / moments.N
    covariance_DD = moments.square_DD / moments.N - torch.outer(image_mean_D, image_mean_D)
    cross_DE = moments.cross_DE / moments.N - torch.outer(image_mean_D, text_mean_E)
    # The floor keeps the system solvable where all pictures are alike.
    penalty = ridge * covariance_DD.diagonal().mean().clamp(min=1e-12)
    covariance_DD.diagonal().add_(penalty)
    projection_DE = torch.linalg.solve(covariance_DD, cross_DE)
    return Aligner(
        projection_DE.float().contiguous(),
        image_mean_D.float(),
        text_mean_E.float(),
        image_encoder,
        text_encoder,
        image_px,
    )


def cross_fitted_similarity(
    image_features_ND: Tensor,
    text_features_NE: Tensor,
    *,
    folds: int = 5,
    seed: int = 0,
    ridge: float = DEFAULT_RIDGE,
) -> Tensor:
    """Similarity [N] of each pair under an aligner that was fitted without it.

    An aligner that has seen a wrong caption has learned a little of it; one that has not gives it
    the score of a chance pair. Folds are drawn from `seed`. Raises ValueError for folds that leave
    fewer than two pairs to fit on.
    """
    images_ND, texts_NE = _matched(image_features_ND, text_features_NE)
    N = len(images_ND)
    if not 2 <= folds <= N or N - -(-N // folds) < 2:
        raise ValueError(f"{folds} folds of {N} pairs: give 2 folds or more, and 4 pairs or more")
    order_N = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    held_out = order_N.to(images_ND.device).chunk(folds)
    parts = [_Moments.of(images_ND[held], texts_NE[held]) for held in held_out]
    similarity_N = torch.empty(N, device=images_ND.device)
    for own, held in enumerate(held_out):
        others = [part for number, part in enumerate(parts) if number != own]
        aligner = _fitted(_Moments.sum(others), ridge, "", "", 0)
        for rows in held.split(CHUNK):
            pairs = images_ND[rows].float(), texts_NE[rows].float()
            similarity_N[rows] = aligner.similarity(*pairs)
    return similarity_N


class _Moments(NamedTuple):
    """Sums over pairs in float64: all that a ridge regression needs to know of them."""

    N: int
    image_D: Tensor
    text_E: Tensor
    square_DD: Tensor
    cross_DE: Tensor

    @classmethod
    def of(cls, images_ND: Tensor, texts_NE: Tensor) -> _Moments:
        """Of pairs in any precision, a chunk at a time."""
        return cls.sum(cls._of_few(x, y) for x, y in _chunks(images_ND, texts_NE))

    @classmethod
    def _of_few(cls, x_ND: Tensor, y_NE: Tensor) -> _Moments:
        return cls(len(x_ND), x_ND.sum(0), y_NE.sum(0), x_ND.T @ x_ND, x_ND.T @ y_NE)

    @classmethod
    def sum(cls, parts: Iterable[_Moments]) -> _Moments:
        """The moments of all pairs together, from those of parts of them."""
        return functools.reduce(_Moments._plus, parts)

    def _plus(self, other: _Moments) -> _Moments:
        return _Moments(
            self.N + other.N,
            self.image_D + other.image_D,
            self.text_E + other.text_E,
            self.square_DD + other.square_DD,
            self.cross_DE + other.cross_DE,
        )


def _chunks(images_ND: Tensor, texts_NE: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for x_ND, y_NE in zip(images_ND.split(CHUNK), texts_NE.split(CHUNK), strict=True):
        yield x_ND.double(), y_NE.double()


def _matched(images_ND: Tensor, texts_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Both, after checking that they are pairs."""
    if len(images_ND) != len(texts_NE) or len(images_ND) < 2:
        raise ValueError(
            f"{len(images_ND)} image and {len(texts_NE)} text features: give two pairs or more"
        )
    return images_ND, texts_NE
