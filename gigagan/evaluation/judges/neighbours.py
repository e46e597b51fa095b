"""Does a generator repeat its training pictures? Nearest ones, and how near is nearer than usual.

Shape letters: N samples, M training pictures, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_CHUNK = 2**24
"""Values of training features that are held at a time."""
_USUAL = 0.99
_ROUNDING = 1e-6
"""By which share of a usual distance two may differ that are the same but for float32."""


def closest(
    samples_ND: np.ndarray,
    training_MD: np.ndarray,
    *,
    k: int = 1,
    cosine: bool = False,
    apart: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances [N, k] to the k nearest training pictures, nearest first, and their rows.

    Found by ‖a‖² + ‖b‖² − 2 a·b in the precision of the features, then measured by ‖a − b‖²; with
    `cosine` of both as float64 at length 1, which is 2 (1 − cosine). `apart` has the groups of
    samples [N] and of training pictures [M]: those of a sample's own group are infinitely far.
    Training rows are read a part at a time: they may be a file.
    """
    if not 1 <= k <= len(training_MD):
        raise ValueError(f"k={k} neighbours of {len(training_MD)} training pictures")
    read = _units if cosine else np.asarray
    samples_ND = read(samples_ND)
    best_NK = np.empty((len(samples_ND), 0), samples_ND.dtype)
    row_NK = np.empty((len(samples_ND), 0), np.int64)
    rows = max(1, _CHUNK // max(1, training_MD.shape[1]))
    norm_N1 = np.square(samples_ND).sum(axis=1, keepdims=True)
    for start in range(0, len(training_MD), rows):
        part_RD = read(training_MD[start : start + rows])
        far_NR = norm_N1 + np.square(part_RD).sum(axis=1) - 2 * samples_ND @ part_RD.T
        far_NR = far_NR.clip(min=0)
        if apart is not None:
            far_NR[apart[0][:, None] == apart[1][start : start + rows]] = np.inf
        row_NR = np.broadcast_to(start + np.arange(len(part_RD)), far_NR.shape)
        best_NK = np.concatenate([best_NK, far_NR], axis=1)
        row_NK = np.concatenate([row_NK, row_NR], axis=1)
        order_NK = np.argsort(best_NK, axis=1, kind="stable")[:, :k]
        best_NK = np.take_along_axis(best_NK, order_NK, axis=1)
        row_NK = np.take_along_axis(row_NK, order_NK, axis=1)
    for far_K, row_K, sample_D in zip(best_NK, row_NK, samples_ND, strict=True):
        exact_K = np.square(sample_D - read(training_MD[row_K])).sum(axis=1)
        exact_K[np.isinf(far_K)] = np.inf
        order_K = np.argsort(exact_K, kind="stable")
        far_K[:], row_K[:] = exact_K[order_K], row_K[order_K]
    return best_NK, row_NK


@dataclass(frozen=True)
class Neighbour:
    """One training picture and the cosine of its features to a sample's."""

    index: int
    cosine: float


def nearest(
    samples_ND: np.ndarray, training_MD: np.ndarray, *, k: int = 3
) -> list[list[Neighbour]]:
    """The k nearest training pictures of each sample by cosine, nearest first."""
    far_NK, row_NK = closest(samples_ND, training_MD, k=k, cosine=True)
    return [
        [Neighbour(int(row), float(1 - far / 2)) for row, far in zip(rows, fars, strict=True)]
        for rows, fars in zip(row_NK, far_NK, strict=True)
    ]


def chance_limit(training_MD: np.ndarray, group_M: np.ndarray, share: float) -> float:
    """Squared distance that only `share` of training pictures have to one of another group.

    What is nearer to a training picture is a near-copy; by the real set alone, as between halves
    of it, each of other groups (concepts, say) than the other.
    """
    return float(np.quantile(closest(training_MD, training_MD, apart=(group_M, group_M))[0], share))


def copying(drawn_N: np.ndarray, real_M: np.ndarray) -> np.ndarray:
    """For the distance of each drawn picture to training, the share [N] of real ones' above it.

    Equal ones, but for rounding, count half. The mean is 1 − Δ of Meehan et al. 2020: more than 0.5
    where data are copied, as drawn pictures are nearer to training than independent real ones.
    """
    real_M, slack = np.sort(real_M), _ROUNDING * np.median(real_M)
    below = np.searchsorted(real_M, drawn_N - slack, "left")
    up_to = np.searchsorted(real_M, drawn_N + slack, "right")
    shares_N: np.ndarray = 1 - (below + up_to) / (2 * len(real_M))
    return shares_N


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
