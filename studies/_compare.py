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
    """Spearman's ρ of two orders of the same settings."""

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
    rng = np.random.default_rng(seed)
    theirs_N = np.array([theirs[name] for name in names])
    rho = _rho(np.array([np.mean(ours[name]) for name in names]), theirs_N)
    drawn = [_resampled(ours, names, theirs_N, rng) for _ in range(RESAMPLES)]
    found = np.array([value for value in drawn if not math.isnan(value)])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    exact = stats.spearmanr([np.mean(ours[name]) for name in names], theirs_N)
    return Agreement(Interval(rho, float(low), float(high)), float(exact.pvalue))


def _resampled(
    ours: Mapping[str, Sequence[float]],
    names: Sequence[str],
    theirs_N: np.ndarray,
    rng: np.random.Generator,
) -> float:
    rows = rng.integers(len(names), size=len(names))
    means = [np.mean(rng.choice(ours[names[row]], size=len(ours[names[row]]))) for row in rows]
    return _rho(np.array(means), theirs_N[rows])


def _rho(a_N: np.ndarray, b_N: np.ndarray) -> float:
    if len(set(a_N)) < 2 or len(set(b_N)) < 2:
        return math.nan
    return float(stats.spearmanr(a_N, b_N).statistic)
