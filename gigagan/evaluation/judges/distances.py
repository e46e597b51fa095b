"""Distances between two sets of features: Fréchet, kernel (KID), precision and recall.

Pure functions in float64; what they depend on beside the features is an argument.
Shape letters: N M samples, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import NamedTuple

import numpy as np

from gigagan.evaluation.judges.statistics import (
    Interval,
    Moments,
    frechet_from_moments,
    student_quantile,
)

_CHUNK = 2048  # rows of a kernel or distance matrix that are held at a time


def frechet_distance(features_a_ND: np.ndarray, features_b_MD: np.ndarray) -> float:
    """‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 Σ √eig(Σ₁ Σ₂): FID when features are Inception's.

    Heusel et al. 2017, with unbiased covariances. With Σᵢ = RᵢᵀRᵢ the eigenvalues are the squared
    singular values of R₁R₂ᵀ, which needs no matrix root, and stays exact with fewer samples than
    features. Larger sets are read once, a part at a time. Raises ValueError with fewer than two
    samples on a side.
    """
    a_ND, b_MD = _checked(features_a_ND, features_b_MD)
    if min(len(a_ND), len(b_MD)) > max(a_ND.shape[1], _CHUNK):
        return frechet_from_moments(_moments(a_ND), _moments(b_MD))
    a_ND, b_MD = a_ND.astype(np.float64), b_MD.astype(np.float64)
    mean_gap_D = a_ND.mean(axis=0) - b_MD.mean(axis=0)
    root_a, root_b = _covariance_root(a_ND), _covariance_root(b_MD)
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    traces = np.square(root_a).sum() + np.square(root_b).sum()
    return float(mean_gap_D @ mean_gap_D + traces - 2 * overlap)


def _moments(features_ND: np.ndarray) -> Moments:
    moments = Moments(features_ND.shape[1])
    for part_ND in _parts(features_ND):
        moments.update(part_ND)
    return moments


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
        mmd2(
            a_ND[rng.choice(len(a_ND), size, replace=False)],
            b_MD[rng.choice(len(b_MD), size, replace=False)],
        )
        for _ in range(num_subsets)
    ]
    return KernelDistance(mmd2(a_ND, b_MD), float(np.mean(estimates)), float(np.std(estimates)))


def mmd2(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Mean of k(a, a′) + k(b, b′) − 2 k(a, b) over pairs of distinct samples."""
    within_a, within_b = _Kernel(a_ND), _Kernel(b_MD)
    return within_a.mean + within_b.mean - 2 * _Kernel(a_ND, b_MD).mean


def mmd2_interval(a_ND: np.ndarray, b_MD: np.ndarray, *, level: float = 0.95) -> Interval:
    """In which the squared MMD of the two distributions lies, by `mmd2` of samples from them.

    With V₁ + V₂ the variance of `mmd2` (Hoeffding 1948): V₁ = 4 Var f(a) / N + 4 Var f(b) / M of
    f(x) = mean k(x, a) − mean k(x, b), which vanishes for equal distributions, and V₂ of what is
    left of the kernel without its means, which does not. As f grows with the distance θ, V₁ is
    taken as c θ, and the interval holds each θ with |mmd2 − θ| ≤ t √(V₂ + c θ), as Wilson's does
    for shares. It covers both equal and different distributions, where resampling is too wide for
    the former. Raises ValueError with fewer than four samples on a side.
    """
    a_ND, b_MD = _checked(a_ND, b_MD)
    N, M = len(a_ND), len(b_MD)
    if min(N, M) < 4:
        raise ValueError(f"{N} and {M} samples: an interval needs four or more on both sides")
    within_a, within_b, between = _Kernel(a_ND), _Kernel(b_MD), _Kernel(a_ND, b_MD)
    value = within_a.mean + within_b.mean - 2 * between.mean
    rest = (  # V₂
        2 * within_a.spread / (N * (N - 1))
        + 2 * within_b.spread / (M * (M - 1))
        + 4 * between.spread / (N * M)
    )
    f_N = within_a.rows_N / (N - 1) - between.rows_N / M
    f_M = within_b.rows_N / (M - 1) - between.columns_M / N
    linear = 4 * f_N.var(ddof=1) / N + 4 * f_M.var(ddof=1) / M - 2 * rest  # V₁: f is noisy, too
    c = max(linear, rest / 2) / max(value, sqrt(rest))
    t = student_quantile((1 + level) / 2, min(N, M) - 1)
    middle = value + t**2 * c / 2
    reach = t * sqrt(max(0.0, rest + c * value + t**2 * c**2 / 4))
    return Interval(middle - reach, middle + reach, level)


class _Kernel:
    """Sums of k(x, y) = (x·y / D + 1)³ over two sets, or over distinct pairs of one."""

    def __init__(self, a_ND: np.ndarray, b_MD: np.ndarray | None = None) -> None:
        self._is_within = b_MD is None
        other_MD = a_ND if b_MD is None else b_MD
        D = a_ND.shape[1]
        self.rows_N, self.columns_M = np.zeros(len(a_ND)), np.zeros(len(other_MD))
        self._squares = 0.0
        for i, a_part in enumerate(_parts(a_ND)):
            for j, b_part in enumerate(_parts(other_MD)):
                kernel = (a_part @ b_part.T / D + 1) ** 3
                if self._is_within and i == j:
                    np.fill_diagonal(kernel, 0)
                self.rows_N[i * _CHUNK :][: len(a_part)] += kernel.sum(axis=1)
                self.columns_M[j * _CHUNK :][: len(b_part)] += kernel.sum(axis=0)
                self._squares += float(np.square(kernel).sum())

    @property
    def mean(self) -> float:
        N, M = len(self.rows_N), len(self.columns_M)
        return float(self.rows_N.sum() / (N * (N - 1) if self._is_within else N * M))

    @property
    def spread(self) -> float:
        """Mean square of the kernel without the means of its rows and columns, unbiased."""
        N, M, total = len(self.rows_N), len(self.columns_M), float(self.rows_N.sum())
        of_rows, of_columns = (float(np.square(x).sum()) for x in (self.rows_N, self.columns_M))
        if self._is_within:
            left = self._squares - 2 * of_rows / (N - 2) + total**2 / ((N - 1) * (N - 2))
            return left / (N * (N - 3))
        left = self._squares - of_rows / M - of_columns / N + total**2 / (N * M)
        return left / ((N - 1) * (M - 1))


def cmmd(
    a_ND: np.ndarray, b_MD: np.ndarray, *, sigma: float = 10.0, scale: float = 1000.0
) -> float:
    """`scale` × squared MMD of unit vectors under exp(−‖x − y‖² / 2σ²) (Jayasumana et al. 2024).

    With CLIP's image vectors. The biased estimate, pairs of a sample with itself included, as in
    the authors' code: zero for equal sets.
    """
    a_ND, b_MD = _checked(a_ND, b_MD)

    def units(x_ND: np.ndarray) -> Iterator[np.ndarray]:
        return (part / np.linalg.norm(part, axis=1, keepdims=True) for part in _parts(x_ND))

    def mean_kernel(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
        total = 0.0
        for x in units(x_ND):
            for y in units(y_MD):
                total += float(np.exp((x @ y.T - 1) / sigma**2).sum())  # ‖x − y‖² = 2 − 2 cos
        return total / (len(x_ND) * len(y_MD))

    value = mean_kernel(a_ND, a_ND) + mean_kernel(b_MD, b_MD) - 2 * mean_kernel(a_ND, b_MD)
    return scale * value


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
    real_ND, generated_MD = real_ND.astype(np.float64), generated_MD.astype(np.float64)
    smaller = min(len(real_ND), len(generated_MD))
    if not 1 <= neighbours < smaller:
        raise ValueError(f"neighbours={neighbours} with {smaller} samples: give fewer neighbours")
    real_radius_N = _radii(real_ND, neighbours)
    generated_radius_M = _radii(generated_MD, neighbours)
    N, M = len(real_ND), len(generated_MD)
    around_M = np.zeros(M)  # real neighbourhoods that a generated sample lies in
    is_recalled_N, is_covered_N = np.zeros(N, bool), np.zeros(N, bool)
    for start in range(0, N, _CHUNK):
        rows = slice(start, start + _CHUNK)
        distance_NM = _distances(real_ND[rows], generated_MD)
        radius_N1 = real_radius_N[rows, None]
        around_M += (distance_NM < radius_N1).sum(axis=0)
        is_recalled_N[rows] = (distance_NM < generated_radius_M).any(axis=1)
        is_covered_N[rows] = distance_NM.min(axis=1) < radius_N1[:, 0]
    return PrecisionRecall(
        precision=float((around_M > 0).mean()),
        recall=float(is_recalled_N.mean()),
        density=float(around_M.mean() / neighbours),
        coverage=float(is_covered_N.mean()),
    )


def _radii(features_ND: np.ndarray, neighbours: int) -> np.ndarray:
    parts = []
    for start in range(0, len(features_ND), _CHUNK):
        distance_BN = _distances(features_ND[start : start + _CHUNK], features_ND)
        own = np.arange(len(distance_BN))
        distance_BN[own, start + own] = 0  # exactly: a sample is its own nearest
        parts.append(np.partition(distance_BN, neighbours, axis=1)[:, neighbours])
    return np.concatenate(parts)


def _distances(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    squared_NM = (
        np.square(a_ND).sum(axis=1)[:, None] + np.square(b_MD).sum(axis=1) - 2 * a_ND @ b_MD.T
    )
    return np.sqrt(squared_NM.clip(min=0))


def _parts(features_ND: np.ndarray) -> Iterator[np.ndarray]:
    """Rows in float64, a part at a time: the whole may be a file."""
    for start in range(0, len(features_ND), _CHUNK):
        yield np.asarray(features_ND[start : start + _CHUNK], np.float64)


def _checked(a_ND: np.ndarray, b_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both, after checking that a distance between them exists."""
    a_ND, b_MD = np.asanyarray(a_ND), np.asanyarray(b_MD)
    if a_ND.ndim != 2 or b_MD.ndim != 2 or a_ND.shape[1] != b_MD.shape[1]:
        raise ValueError(
            f"features of shapes {a_ND.shape} and {b_MD.shape}: give [N, D] and [M, D]"
        )
    if min(len(a_ND), len(b_MD)) < 2:
        raise ValueError(f"{len(a_ND)} and {len(b_MD)} samples: give two or more on both sides")
    for name, features in (("first", a_ND), ("second", b_MD)):
        if not all(np.isfinite(part).all() for part in _parts(features)):
            raise ValueError(f"the {name} features hold values that are not finite")
    return a_ND, b_MD
