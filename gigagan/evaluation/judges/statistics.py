"""Statistics: streaming moments of features, intervals by resampling, and those of counts.

Intervals are of drawing the pictures anew, from the same networks and the same kind of real
pictures: what another training, of another seed, would give is not in them. Pure functions in
float64. Shape letters: N M samples, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import comb, factorial, sqrt
from typing import NamedTuple

import numpy as np


class Moments:
    """Mean and covariance of samples that come in parts, and of parts that come from elsewhere.

    Chan et al. 1979: exact up to rounding, whatever the split, in memory that D alone decides.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean_D = np.zeros(width)
        self._scatter_DD = np.zeros((width, width))

    def update(self, batch_ND: np.ndarray) -> None:
        """Take in samples [N, D]."""
        batch_ND = np.asarray(batch_ND, np.float64)
        if not len(batch_ND):
            return
        other = Moments(batch_ND.shape[1])
        other.count = len(batch_ND)
        other.mean_D = batch_ND.mean(axis=0)
        centred_ND = batch_ND - other.mean_D
        other._scatter_DD = centred_ND.T @ centred_ND
        self.merge(other)

    def merge(self, other: Moments) -> None:
        """Take in what another one has seen, on another device, say."""
        count = self.count + other.count
        if not count:
            return
        gap_D = other.mean_D - self.mean_D
        weight = self.count * other.count / count
        self._scatter_DD += other._scatter_DD + weight * np.outer(gap_D, gap_D)
        self.mean_D = self.mean_D + gap_D * (other.count / count)
        self.count = count

    @property
    def covariance_DD(self) -> np.ndarray:
        """The unbiased one; raises ValueError before two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance of {self.count} samples: give two or more")
        return self._scatter_DD / (self.count - 1)


def frechet_from_moments(a: Moments, b: Moments) -> float:
    """‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 Σ √eig(Σ₁ Σ₂), see `distances.frechet_distance`.

    With Σ₁ = RᵀR the eigenvalues are those of R Σ₂ Rᵀ, which is symmetric: no matrix root of a
    product that is not.
    """
    gap_D = a.mean_D - b.mean_D
    values, vectors = np.linalg.eigh(a.covariance_DD)
    root_DD = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root_DD @ b.covariance_DD @ root_DD.T).clip(min=0)).sum()
    traces = np.trace(a.covariance_DD) + np.trace(b.covariance_DD)
    return float(gap_D @ gap_D + traces - 2 * overlap)


class Interval(NamedTuple):
    """Between which values a statistic lies, of pictures drawn anew."""

    low: float
    high: float
    level: float = 0.95


def bootstrap(
    statistic: Callable[..., float],
    *sets: np.ndarray,
    resamples: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of `statistic(*sets)` (Efron 1979): rows are drawn with replacement.

    For medians and the like; `mean_interval` is for means. Not for distances between sets: repeated
    rows make a set look narrower than it is, which lifts FID; `subsampled` is for those.
    """
    if resamples < 1 or not all(len(rows) for rows in sets):
        raise ValueError(f"resamples={resamples} of {[len(rows) for rows in sets]} samples")
    random = np.random.default_rng(seed)
    found = [
        statistic(*(rows[random.integers(0, len(rows), len(rows))] for rows in sets))
        for _ in range(resamples)
    ]
    tail = (1 - level) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(float(low), float(high), level)


def student_quantile(share: float, freedom: float) -> float:
    """Below which value Student's t lies with probability `share`; inf or nan where it has none.

    What `scipy.stats.t.ppf` gives, to the bit, without an import that takes half as long as
    torch's: training reads this module, and asks for no interval.
    """
    from scipy.special import stdtrit

    return float(stdtrit(freedom, share))


def subsampled(
    statistic: Callable[..., float],
    *sets: np.ndarray,
    value: float,
    resamples: int = 20,
    share: float = 0.5,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Interval around `value`, a distance of whole sets, from distances of parts of them.

    Each part holds `share` of every set's rows, drawn without replacement, so that no row repeats
    (Politis & Romano 1994). Parts of b of n rows vary by about √((n − b) / b) of what whole sets
    would between data sets: their standard deviation is scaled by its inverse, and Student's t
    makes up for their small number, of which percentiles cover too little. It covers the mean of
    the statistic over sets of these sizes, with its bias; where both sets come from one
    distribution it is up to √3 times too wide, as parts vary by 1 / b there.
    """
    if resamples < 2 or not 0 < share < 1:
        raise ValueError(f"resamples={resamples}, share={share}: give two or more, and a share")
    random = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        parts = []
        for rows in sets:
            size = max(2, round(len(rows) * share))
            parts.append(rows[np.sort(random.choice(len(rows), size, replace=False))])
        found.append(statistic(*parts))
    deviation = float(np.std(found, ddof=1)) * sqrt(share / (1 - share))
    reach = student_quantile((1 + level) / 2, resamples - 1) * deviation
    return Interval(value - reach, value + reach, level)


def mean_interval(values_N: np.ndarray) -> Interval | None:
    """95 % interval of a mean by Student's t, of a share where all values are 0 or 1 by Wilson's.

    None for fewer than two values, which do not say how far they spread.
    """
    N = len(values_N)
    if N < 2:
        return None
    if np.isin(values_N, (0, 1)).all():
        return share_interval(int(np.sum(values_N)), N)
    reach = student_quantile(0.975, N - 1) * float(np.std(values_N, ddof=1)) / sqrt(N)
    mean = float(np.mean(values_N))
    return Interval(mean - reach, mean + reach)


def share_interval(successes: int, count: int) -> Interval:
    """95 % interval of a share of independent trials (Wilson 1927)."""
    if not 0 <= successes <= count or not count:
        raise ValueError(f"{successes} of {count}: give a count of 1 or more, and no more than it")
    z, share = 1.959964, successes / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) * z / (1 + z**2 / count)
    return Interval(max(0.0, centre - reach), min(1.0, centre + reach))


def matches_by_chance(right: int, answered: int, count: int) -> float:
    """How likely `right` matches or more are where answers are dealt out at random.

    Of `count` names, each used once, `answered` were given. By inclusion and exclusion over sets
    of j matches: Σⱼ₌ₖ (−1)ʲ⁻ᵏ C(j−1, k−1) C(m, j) (n−j)! / n! (Riordan 1958, ch. 3).
    """
    if not 0 <= right <= answered <= count:
        raise ValueError(f"{right} right of {answered} answered of {count}: each at most the next")
    if not right:
        return 1.0
    terms = (
        (-1) ** (j - right)
        * comb(j - 1, right - 1)
        * comb(answered, j)
        * Fraction(factorial(count - j), factorial(count))
        for j in range(right, answered + 1)
    )
    return float(sum(terms))
