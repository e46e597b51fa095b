"""Does a generator repeat its training pictures? Nearest ones, and how near is nearer than usual.

Shape letters: N samples, M training pictures, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_CHUNK = 8192
_USUAL = 0.99


@dataclass(frozen=True)
class Neighbour:
    """One training picture and the cosine of its features to a sample's."""

    index: int
    cosine: float


def nearest(
    samples_ND: np.ndarray, training_MD: np.ndarray, *, k: int = 3
) -> list[list[Neighbour]]:
    """The k nearest training pictures of each sample by cosine, nearest first.

    Training rows are read a part at a time: they may be a file.
    """
    if not 1 <= k <= len(training_MD):
        raise ValueError(f"k={k} neighbours of {len(training_MD)} training pictures")
    samples_ND = _units(samples_ND)
    best_NK = np.empty((len(samples_ND), 0))
    index_NK = np.empty((len(samples_ND), 0), np.int64)
    for start in range(0, len(training_MD), _CHUNK):
        cosine_NM = samples_ND @ _units(training_MD[start : start + _CHUNK]).T
        places_NM = np.broadcast_to(start + np.arange(cosine_NM.shape[1]), cosine_NM.shape)
        best_NK = np.concatenate([best_NK, cosine_NM], axis=1)
        index_NK = np.concatenate([index_NK, places_NM], axis=1)
        order_NK = np.argsort(-best_NK, axis=1, kind="stable")[:, :k]
        best_NK = np.take_along_axis(best_NK, order_NK, axis=1)
        index_NK = np.take_along_axis(index_NK, order_NK, axis=1)
    return [
        [Neighbour(int(i), float(c)) for i, c in zip(indices, cosines, strict=True)]
        for indices, cosines in zip(index_NK, best_NK, strict=True)
    ]


@dataclass(frozen=True)
class Memorisation:
    """How near samples come to training pictures, beside real pictures never trained on."""

    sample_median: float
    """Median cosine of a sample to its nearest training picture."""
    real_median: float
    """Median cosine of a held-out real picture to its nearest training picture."""
    share_closer: float
    """Share of samples nearer to training than 99 % of held-out pictures are; 0.01 is chance."""


def memorisation(
    samples_ND: np.ndarray, heldout_ND: np.ndarray, training_MD: np.ndarray
) -> Memorisation:
    """Compare nearest cosines of samples with those of held-out real pictures."""
    sample_N, real_N = (
        np.array([found[0].cosine for found in nearest(x, training_MD, k=1)])
        for x in (samples_ND, heldout_ND)
    )
    limit = np.quantile(real_N, _USUAL)
    return Memorisation(
        float(np.median(sample_N)), float(np.median(real_N)), float((sample_N > limit).mean())
    )


def _units(x_ND: np.ndarray) -> np.ndarray:
    x_ND = np.asarray(x_ND, np.float64)
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True).clip(min=1e-12)
