"""Distances between two sets of features: Fréchet, kernel (KID), precision and recall.

Pure functions in float64; what they depend on beside the features is an argument.
Shape letters: N M samples, D features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_CHUNK = 2048  # rows of a kernel or distance matrix that are held at a time


def frechet_distance(features_a_ND: np.ndarray, features_b_MD: np.ndarray) -> float:
    """‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 Σ √eig(Σ₁ Σ₂): FID when features are Inception's.

    Heusel et al. 2017, with unbiased covariances. With Σᵢ = RᵢᵀRᵢ the eigenvalues are the squared
    singular values of R₁R₂ᵀ, which needs no matrix root, and stays exact with fewer samples than
    features. Raises ValueError with fewer than two samples on a side.
    """
    a_ND, b_MD = _checked(features_a_ND, features_b_MD)
    mean_gap_D = a_ND.mean(axis=0) - b_MD.mean(axis=0)
    root_a, root_b = _covariance_root(a_ND), _covariance_root(b_MD)
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    traces = np.square(root_a).sum() + np.square(root_b).sum()
    return float(mean_gap_D @ mean_gap_D + traces - 2 * overlap)


def _covariance_root(features_ND: np.ndarray) -> np.ndarray:
    """Some R of at most D rows with RᵀR = the unbiased covariance."""
    N, D = features_ND.shape
    centred_ND = (features_ND - features_ND.mean(axis=0)) / np.sqrt(N - 1)
    return np.asarray(np.linalg.qr(centred_ND, mode="r")) if N > D else centred_ND


class KernelDistance(NamedTuple):
    """A kernel distance and its spread."""

    value: float
    """Unbiased estimate from all samples; it may be slightly negative."""
    subset_mean: float
    """Mean of the same estimate over random subsets: what other tools call KID."""
    subset_std: float
    """Standard deviation over the subsets."""


def kernel_distance(
    features_a_ND: np.ndarray,
    features_b_MD: np.ndarray,
    *,
    subset_size: int = 1000,
    num_subsets: int = 100,
    seed: int = 0,
) -> KernelDistance:
    """Squared maximum mean discrepancy under k(x, y) = (x·y / D + 1)³: KID with Inception features.

    Bińkowski et al. 2018. Unlike FID it has no bias at small sizes. Subsets are drawn without
    replacement from `seed`, the same size on both sides, at most the smaller set.
    """
    a_ND, b_MD = _checked(features_a_ND, features_b_MD)
    size = min(subset_size, len(a_ND), len(b_MD))
    rng = np.random.default_rng(seed)
    estimates = [
        _unbiased_mmd2(
            a_ND[rng.choice(len(a_ND), size, replace=False)],
            b_MD[rng.choice(len(b_MD), size, replace=False)],
        )
        for _ in range(num_subsets)
    ]
    return KernelDistance(
        _unbiased_mmd2(a_ND, b_MD), float(np.mean(estimates)), float(np.std(estimates))
    )


def _unbiased_mmd2(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Mean of k(a, a′) + k(b, b′) − 2 k(a, b) over pairs of distinct samples."""
    N, M = len(a_ND), len(b_MD)
    within_a = (_kernel_sum(a_ND, a_ND) - _self_kernel_sum(a_ND)) / (N * (N - 1))
    within_b = (_kernel_sum(b_MD, b_MD) - _self_kernel_sum(b_MD)) / (M * (M - 1))
    return float(within_a + within_b - 2 * _kernel_sum(a_ND, b_MD) / (N * M))


def _kernel_sum(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    D = a_ND.shape[1]
    starts = range(0, len(a_ND), _CHUNK)
    return sum(float(((a_ND[i : i + _CHUNK] @ b_MD.T / D + 1) ** 3).sum()) for i in starts)


def _self_kernel_sum(a_ND: np.ndarray) -> float:
    return float(((np.square(a_ND).sum(axis=1) / a_ND.shape[1] + 1) ** 3).sum())


class PrecisionRecall(NamedTuple):
    """How much of either set lies within the other; see `prdc`."""

    precision: float
    """Share of generated samples inside some real sample's neighbourhood."""
    recall: float
    """Share of real samples inside some generated sample's neighbourhood."""
    density: float
    """Real neighbourhoods around a generated sample over `neighbours`; may exceed 1."""
    coverage: float
    """Share of real neighbourhoods with a generated sample in them."""


def prdc(real_ND: np.ndarray, generated_MD: np.ndarray, *, neighbours: int = 5) -> PrecisionRecall:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A sample's neighbourhood reaches to its `neighbours`-th nearest sample of its own set. Raises
    ValueError if a set has no more samples than that.
    """
    real_ND, generated_MD = _checked(real_ND, generated_MD)
    smaller = min(len(real_ND), len(generated_MD))
    if not 1 <= neighbours < smaller:
        raise ValueError(f"neighbours={neighbours} with {smaller} samples: give fewer neighbours")
    real_radius_N = _radii(real_ND, neighbours)
    generated_radius_M = _radii(generated_MD, neighbours)
    distance_NM = _distances(real_ND, generated_MD)
    in_real_NM = distance_NM < real_radius_N[:, None]
    in_generated_NM = distance_NM < generated_radius_M[None, :]
    return PrecisionRecall(
        precision=float(in_real_NM.any(axis=0).mean()),
        recall=float(in_generated_NM.any(axis=1).mean()),
        density=float(in_real_NM.sum(axis=0).mean() / neighbours),
        coverage=float((distance_NM.min(axis=1) < real_radius_N).mean()),
    )


def _radii(features_ND: np.ndarray, neighbours: int) -> np.ndarray:
    distance_NN = _distances(features_ND, features_ND)
    np.fill_diagonal(distance_NN, 0)  # exactly: a sample is its own nearest
    return np.partition(distance_NN, neighbours, axis=1)[:, neighbours]


def _distances(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    squared_NM = (
        np.square(a_ND).sum(axis=1)[:, None] + np.square(b_MD).sum(axis=1) - 2 * a_ND @ b_MD.T
    )
    return np.sqrt(squared_NM.clip(min=0))


def _checked(a_ND: np.ndarray, b_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64, after checking that a distance between them exists."""
    a_ND, b_MD = np.asarray(a_ND, np.float64), np.asarray(b_MD, np.float64)
    if a_ND.ndim != 2 or b_MD.ndim != 2 or a_ND.shape[1] != b_MD.shape[1]:
        raise ValueError(
            f"features of shapes {a_ND.shape} and {b_MD.shape}: give [N, D] and [M, D]"
        )
    if min(len(a_ND), len(b_MD)) < 2:
        raise ValueError(f"{len(a_ND)} and {len(b_MD)} samples: give two or more on both sides")
    for name, features in (("first", a_ND), ("second", b_MD)):
        if not np.isfinite(features).all():
            raise ValueError(f"the {name} features hold values that are not finite")
    return a_ND, b_MD
