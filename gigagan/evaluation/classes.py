"""Pictures drawn by class, or of no class in particular: are they of it, and do they differ?

Shape letters: N drawn and M real pictures, K classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from gigagan.evaluation.findings import Findings
from gigagan.evaluation.heldout import Heldout
from gigagan.evaluation.judges import fidelity
from gigagan.evaluation.judges.features import square
from gigagan.evaluation.judges.inception_score import inception_score
from gigagan.evaluation.naming import read_pooled
from gigagan.evaluation.protocol import ProtocolError
from gigagan.evaluation.setting import Setting
from gigagan.models import pretrained

ACCURACY, COVERED, DIVERSITY = "class_accuracy_nearest_mean", "classes_covered", "intra_class_lpips"
BY_PIXELS = "class_accuracy_nearest_mean_pixels"
MAX_LPIPS_PAIRS = 500
_CHUNK = 4096


def in_equal_shares(names: Sequence[str], at: Setting) -> list[str]:
    """The classes in turn, as many as the protocol says.

    Raises:
        ProtocolError: it says another number of classes.
    """
    assert at.rules.num_generated is not None, "every protocol for classes names its count"
    if len(names) != at.rules.num_classes:
        raise ProtocolError(
            f"{at.rules.name} is of {at.rules.num_classes:,} classes, the network knows "
            f"{len(names):,}: choose protocol=coco-captions, whose numbers carry no paper's name"
        )
    return [names[number % len(names)] for number in range(at.rules.num_generated)]


def measure(
    findings: Findings,
    everything: Heldout,
    generated: Sequence[Path],
    asked: Sequence[str],
    features: tuple[np.ndarray, np.ndarray],
    at: Setting,
) -> None:
    """Inception Score, share told as its class, classes covered, diversity within a class.

    Told by the nearest mean of a class's real pictures: of Inception's features, and of 16×16
    pixels, by which a blur of the right form and colour counts.

    `asked` are the classes that pictures were drawn for, empty words where there was none;
    `features` Inception's of both sets. Real pictures are told by the means without themselves.
    """
    generated_ND, real_MD = features
    _measure_inception_score(findings, generated_ND, real_MD, at)
    is_told = everything.asks == "class"
    if everything.labels is None:
        for name in (ACCURACY, BY_PIXELS, COVERED, DIVERSITY):
            findings.absent[name] = "the held-out pictures have no labels"
        return
    names = sorted(set(everything.labels))
    real_M = _numbers(everything.labels, names)
    told_N = told_as(generated_ND, real_MD, real_M)
    findings.add(COVERED, len(set(told_N.tolist())) / len(names))
    findings.rules["classes"] = len(names)
    if not is_told:
        for name in (ACCURACY, BY_PIXELS, DIVERSITY):
            findings.absent[name] = "the network is unconditional: no picture is of a class"
        return
    known = [row for row, name in enumerate(asked) if name in set(names)]
    own_N = _numbers([asked[row] for row in known], names)
    seen = {
        ACCURACY: (generated_ND[known], real_MD),
        BY_PIXELS: (
            read_pooled([generated[row] for row in known], at.px),
            read_pooled(everything.pictures, at.px),
        ),
    }
    for metric, (x_ND, x_MD) in seen.items():
        told_real_M = told_as(x_MD, x_MD, real_M, without_own=True)
        findings.add_mean(
            metric,
            (told_as(x_ND, x_MD, real_M) == own_N).astype(np.float64),
            at.config,
            real=_share(told_real_M == real_M, told_real_M >= 0),
            chance=1 / len(names),
        )
    _measure_diversity(findings, generated, asked, everything, at)


def told_as(
    asked_ND: np.ndarray, real_MD: np.ndarray, class_M: np.ndarray, *, without_own: bool = False
) -> np.ndarray:
    """The class [N] whose real pictures' mean is nearest.

    `without_own`: the asked ones are the real ones, each of which is left out of its class's mean;
    −1 where it is the only one of its class.
    """
    count_K = np.bincount(class_M)
    mean_KD = np.stack(
        [real_MD[class_M == k].mean(axis=0, dtype=np.float64) for k in range(len(count_K))]
    )
    parts = []
    for start in range(0, len(asked_ND), _CHUNK):  # the whole may be a file
        x_ND = np.asarray(asked_ND[start : start + _CHUNK], np.float64)
        squares_NK = np.square(mean_KD).sum(axis=1) - 2 * x_ND @ mean_KD.T
        squares_NK += np.square(x_ND).sum(axis=1, keepdims=True)
        if without_own:  # ‖x − (n μ − x) / (n − 1)‖² = (n / (n − 1))² ‖x − μ‖²
            own_N = class_M[start : start + _CHUNK]
            factor_N = np.square(count_K[own_N] / np.maximum(count_K[own_N] - 1, 1))
            squares_NK[np.arange(len(own_N)), own_N] *= factor_N
        parts.append(squares_NK.argmin(axis=1))
    told_N = np.concatenate(parts)
    return np.where(count_K[class_M] > 1, told_N, -1) if without_own else told_N


def _measure_inception_score(
    findings: Findings, generated_ND: np.ndarray, real_MD: np.ndarray, at: Setting
) -> None:
    try:
        weight_CD = pretrained.inception_classifier()
    except pretrained.MissingWeightsError as error:
        findings.absent["inception_score"] = str(error)
        return
    try:
        drawn = inception_score(generated_ND @ weight_CD.T)
        real = inception_score(real_MD @ weight_CD.T)
    except ValueError as error:
        findings.absent["inception_score"] = str(error)
        return
    findings.add("inception_score", drawn.mean, real=real.mean, chance=1)
    findings.add("inception_score_std", drawn.std)


def _measure_diversity(
    findings: Findings,
    generated: Sequence[Path],
    asked: Sequence[str],
    everything: Heldout,
    at: Setting,
) -> None:
    """Mean LPIPS between two pictures of one class, of drawn and of real ones."""
    assert everything.labels is not None
    drawn, real = pairs_of(asked), pairs_of(everything.labels)
    if not drawn:
        findings.absent[DIVERSITY] = "no class has two pictures: draw more (evaluate.num_images)"
        return
    distances_N = _distances(generated, drawn, at)
    of_real = _distances(everything.pictures, real, at).mean() if real else None
    findings.add_mean(DIVERSITY, distances_N, at.config, real=of_real)


def pairs_of(classes: Sequence[str], *, most: int = MAX_LPIPS_PAIRS) -> list[tuple[int, int]]:
    """Pairs of places of one class: the first two of every class, then the next two, …"""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(classes):
        rows.setdefault(name, []).append(row)
    rounds = [
        (number, pair)
        for own in rows.values()
        for number, pair in enumerate(list(pairwise(own))[::2])
    ]
    return [pair for _, pair in sorted(rounds, key=lambda found: found[0])[:most]]


def _distances(
    pictures: Sequence[Path], pairs: Sequence[tuple[int, int]], at: Setting
) -> np.ndarray:
    network, found = pretrained.lpips("alex", at.device), []
    for start in range(0, len(pairs), at.config.batch_size):
        batch = pairs[start : start + at.config.batch_size]
        first, second = (
            np.stack([np.asarray(square(pictures[pair[side]], at.px)) for pair in batch])
            for side in (0, 1)
        )
        found.append(fidelity.lpips_pairs(first, second, network))
    return np.concatenate(found)


def _numbers(labels: Sequence[str], names: Sequence[str]) -> np.ndarray:
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[label] for label in labels], np.int64)


def _share(is_right: np.ndarray, is_counted: np.ndarray) -> float | None:
    return float(is_right[is_counted].mean()) if is_counted.any() else None
