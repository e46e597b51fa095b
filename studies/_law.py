"""L(N, D, S) = E + A N^−α + B D^−β + G S^−γ: a law of scaling, fitted, with intervals.

Chinchilla's parametric form (Hoffmann et al. 2022, arXiv:2203.15556, equation 2), in which D are
tokens seen, each once; here pictures are seen again and again, so that how many there are (D) and
how many were seen (S) have a term each. Nothing here knows what was trained.

Shape letters: P points, 3 (N in millions, D and S in thousands), R resamples, 7 logarithms of
E, A, B, G, then exponents α, β, γ.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy.optimize import least_squares

UNITS = np.array([1e6, 1e3, 1e3])
"""Of N, D and S: A, B and G are what a million parameters, and a thousand pictures, leave."""
NAMES = ("E", "A", "B", "G", "α", "β", "γ")
LOWEST = np.array([-12.0] * 4 + [0.01] * 3)
HIGHEST = np.array([3.0] * 4 + [3.0] * 3)
"""A term of e⁻¹² is none. An exponent on a bound is one that the points do not tell."""
_STARTS = [*product((0.3, 1.0), repeat=3)]
_FEWEST = 8


def predicted(law_7: np.ndarray, x_P3: np.ndarray) -> np.ndarray:
    """L at points (parameters, pictures, images seen), P; pictures may be infinite."""
    E, *coefficients = np.exp(law_7[:4])
    terms_P3 = np.array(coefficients) * (np.asarray(x_P3, float) / UNITS) ** -law_7[4:]
    return np.asarray(E + terms_P3.sum(-1))


def fitted(x_P3: np.ndarray, loss_P: np.ndarray, start_7: np.ndarray | None = None) -> np.ndarray:
    """The law of least squared relative error; of several starts the best one's, 7.

    Raises:
        ValueError: too few points for seven numbers, or a loss that is not above 0.
    """
    if len(loss_P) < _FEWEST:
        raise ValueError(f"{len(loss_P)} measurements fit any law: measure {_FEWEST} or more")
    if not (np.isfinite(loss_P).all() and (loss_P > 0).all()):
        raise ValueError(f"a loss of {loss_P.min():g} has no logarithm: losses must be above 0")
    fewest = loss_P.min()
    starts = [start_7] if start_7 is not None else [
        np.array([*np.log([fewest / 2, fewest / 4, fewest / 4, fewest / 4]), *exponents])
        for exponents in _STARTS
    ]  # fmt: skip

    def residuals(law_7: np.ndarray) -> np.ndarray:
        return np.log(predicted(law_7, x_P3)) - np.log(loss_P)

    found = [
        least_squares(residuals, start_7.clip(LOWEST, HIGHEST), bounds=(LOWEST, HIGHEST))
        for start_7 in starts
    ]
    return np.asarray(min(found, key=lambda one: one.cost).x)


def resampled(
    law_7: np.ndarray,
    x_P3: np.ndarray,
    loss_P: np.ndarray,
    trainings: Sequence[str],
    *,
    resamples: int,
    seed: int = 0,
) -> np.ndarray:
    """Laws of a wild cluster bootstrap, R 7: all errors of a training change sign together.

    The readings of one training err alike, and every one stays in, so that no width is missing
    (Cameron, Gelbach and Miller 2008, with Rademacher's weights). Errors are those of the law
    without that training: seven numbers come near to all that they are fitted to.
    """
    random = np.random.default_rng(seed)
    names, number_P = np.unique(list(trainings), return_inverse=True)
    log_P, expected_P = np.log(loss_P), np.log(predicted(law_7, x_P3))
    error_P = np.empty_like(log_P)
    for number in range(len(names)):
        own_P = number_P == number
        without_7 = fitted(x_P3[~own_P], loss_P[~own_P], law_7)
        error_P[own_P] = log_P[own_P] - np.log(predicted(without_7, x_P3[own_P]))
    signs_RT = random.choice([-1.0, 1.0], (resamples, len(names)))
    return np.stack([
        fitted(x_P3, np.exp(expected_P + signs_T[number_P] * error_P), law_7)
        for signs_T in signs_RT
    ])  # fmt: skip


def power_law(x_P: np.ndarray, y_P: np.ndarray) -> tuple[float, float]:
    """(log k, κ) of y = k x^−κ by least squares of logarithms."""
    slope, offset = np.polyfit(np.log(x_P), np.log(y_P), 1)
    return float(offset), float(-slope)
