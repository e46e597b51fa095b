"""The Inception Score: pictures of one clear thing each, and of all things together.

Shape letters: N pictures, C classes of ImageNet as the network was trained on them, D features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SPLITS = 10


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the parts of a set."""

    mean: float
    std: float


def inception_score(logits_NC: np.ndarray, *, splits: int = SPLITS) -> InceptionScore:
    """exp(mean KL(p(y|x) ‖ p(y))), p(y) of a part's own pictures (Salimans et al. 2016).

    From 1, where all pictures are told alike, to C. The parts are consecutive, in double precision.

    Raises:
        ValueError: fewer pictures than parts.
    """
    if len(logits_NC) < splits:
        raise ValueError(f"{len(logits_NC)} pictures in {splits} parts: give more pictures")
    scores = []
    for part_NC in np.array_split(logits_NC.astype(np.float64), splits):
        log_p_NC = part_NC - part_NC.max(axis=1, keepdims=True)
        log_p_NC -= np.log(np.exp(log_p_NC).sum(axis=1, keepdims=True))
        p_NC = np.exp(log_p_NC)
        divergence_N = (p_NC * (log_p_NC - np.log(p_NC.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergence_N.mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))
