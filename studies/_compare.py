"""Settings compared by few seeds each: intervals by a common spread, and ranks beside other ranks.

Three seeds say little of a spread, three seeds of every setting say more: it is taken to be the
same for all (on the scale that is given), as in an analysis of variance, with the degrees of
freedom of all together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 4_000


class Interval(NamedTuple):
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Spread(NamedTuple):
    """Standard deviation of a seed, over all settings."""

    deviation: float
    freedom: int
    """Degrees of freedom behind it."""

    def margin(self, *counts: int) -> float:
        """Half of the interval of a mean of so many seeds, or of a difference of such means."""
        t = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom))
        return t * self.deviation * math.sqrt(sum(1 / n for n in counts))


def spread(values: Mapping[str, Sequence[float]]) -> Spread:
    """Pooled within settings.

    Raises:
        ValueError: no setting has two seeds.
    """
    freedom = sum(len(found) - 1 for found in values.values())
    if freedom < 1:
        raise ValueError("no setting has two seeds yet, so that nothing says how far seeds lie")
    squares = sum(
        float(((x := np.asarray(v, float)) - x.mean()) @ (x - x.mean())) for v in values.values()
    )
    return Spread(math.sqrt(squares / freedom), freedom)


def mean_of(values: Sequence[float], common: Spread) -> Interval:
    """Mean over seeds with its interval."""
    mean, margin = float(np.mean(values)), common.margin(len(values))
    return Interval(mean, mean - margin, mean + margin)


def difference(after: Sequence[float], before: Sequence[float], common: Spread) -> Interval:
    """Mean of `after` less that of `before`, with its interval."""
    change = float(np.mean(after) - np.mean(before))
    margin = common.margin(len(after), len(before))
    return Interval(change, change - margin, change + margin)


class Agreement(NamedTuple):
    """Spearman's ρ of two orders of the same settings; NaN where one of them is no order."""

    rho: Interval
    """Its interval by resampling settings, and seeds within each."""
    p_value: float
    """How often an order by lot agrees as much or more, either way."""


def agreement(
    ours: Mapping[str, Sequence[float]], theirs: Mapping[str, float], *, seed: int = 0
) -> Agreement:
    """How far the means of our seeds have the order of `theirs`, over the settings of both.

    Raises:
        ValueError: fewer than four settings in common.
    """
    names = [name for name in theirs if ours.get(name)]
    if len(names) < 4:
        raise ValueError(f"only {names} are in both orders: an agreement needs four")
    N, R = len(names), RESAMPLES
    rng = np.random.default_rng(seed)
    theirs_N = np.array([theirs[name] for name in names])
    means_N = np.array([np.mean(ours[name]) for name in names])
    drawn = [rng.choice(ours[name], size=(R, len(ours[name]))).mean(1) for name in names]
    rows_RN = rng.integers(N, size=(R, N))
    found_R = _rho(np.take_along_axis(np.stack(drawn, 1), rows_RN, 1), theirs_N[rows_RN])
    found_R = found_R[~np.isnan(found_R)]
    tail = (1 - CONFIDENCE) / 2
    ends = np.quantile(found_R, [tail, 1 - tail]) if len(found_R) else [math.nan, math.nan]
    rho = float(_rho(means_N[None], theirs_N[None])[0])
    orders_RN = rng.permuted(np.tile(theirs_N, (R, 1)), axis=1)
    by_lot_R = _rho(np.tile(means_N, (R, 1)), orders_RN)
    p_value = (1 + np.count_nonzero(np.abs(by_lot_R) >= abs(rho) - 1e-9)) / (1 + R)
    return Agreement(Interval(rho, float(ends[0]), float(ends[1])), float(p_value))


def _rho(a_RN: np.ndarray, b_RN: np.ndarray) -> np.ndarray:
    """Spearman's ρ [R] of rows, ties sharing their mean rank; NaN where all are tied."""
    a_RN, b_RN = (stats.rankdata(x, axis=1) for x in (a_RN, b_RN))
    a_RN, b_RN = (x - x.mean(1, keepdims=True) for x in (a_RN, b_RN))
    norms_R = np.sqrt((a_RN**2).sum(1) * (b_RN**2).sum(1))
    with np.errstate(invalid="ignore"):
        found: np.ndarray = (a_RN * b_RN).sum(1) / np.where(norms_R > 0, norms_R, np.nan)
    return found
