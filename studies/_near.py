"""Nearest training pictures of real and of drawn ones, and what of them is a near-copy.

Shape letters: N drawn pictures, M training pictures, R real pictures, P captions, C concepts.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from gigagan.evaluation.heldout import Work, training_pictures
from gigagan.evaluation.judges.features import square
from gigagan.evaluation.judges.neighbours import chance_limit, closest, copying
from gigagan.evaluation.judges.statistics import bootstrap, share_interval
from studies import _memorisation
from studies._copies import ENCODERS, PX, Pictures
from studies._queue import Record, rounded

SHARE = 0.05
"""Of training pictures that are as near to one of another concept: what chance finds."""
LATENTS = 2
SHOWN, CELL_PX = (0, 0.05, 0.1, 0.25), 70
"""Captions of each kind in the sheet, by which share is nearer, and the side of pictures there."""


@dataclass(frozen=True)
class Trained:
    """The training pictures, and what each shows."""

    pictures: Pictures
    works: Sequence[Work]
    features: Mapping[str, np.ndarray]
    """By encoder [M, D]."""
    limits: Mapping[str, float]
    """Squared distance by encoder, below which a picture is a near-copy."""

    @classmethod
    def read(
        cls, shards: Path, works: Sequence[Work], limits: Mapping[str, float] | None
    ) -> Trained:
        """All of a folder such as shards/032; kept.parquet of its filter tells what each shows.

        Without `limits` these are found out, which is most of the work.

        Raises:
            ValueError: there are none, or some are not among these works.
        """
        kept = shards.parent.parent / "kept.parquet"
        if not kept.is_file():
            raise ValueError(f"there is no {kept}: give shards of the stage filter")
        rows = pq.read_table(kept, columns=["key", "url"]).to_pylist()
        work_of = {work.picture.stem: work for work in works}
        named = {row["key"]: work_of.get(Path(row["url"]).stem) for row in rows}
        pairs = training_pictures(shards, sys.maxsize)  # with a count it thins out full shards
        found = [work for key, _ in pairs if (work := named.get(key)) is not None]
        if not len(found) == len(pairs) == len(rows) > 0:
            raise ValueError(
                f"{kept} lists {len(rows)} pictures, {shards} has {len(pairs)}, of which the "
                f"gallery knows {len(found)}: give the shards and the held-out pictures of one run"
            )
        pictures = [square(picture, PX) for _, picture in pairs]
        features = {name: encode(pictures) for name, encode in ENCODERS.items()}
        concept_M = concepts(found)
        limits = limits or rounded(
            {name: chance_limit(x_MD, concept_M, SHARE) for name, x_MD in features.items()}
        )
        return cls(pictures, found, features, limits)

    def find(self, encoder: str, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Squared distance [N] to the nearest training picture, and its row [N]."""
        far_N1, row_N1 = closest(x_ND, self.features[encoder])
        return far_N1[:, 0], row_N1[:, 0]


@dataclass(frozen=True)
class Real:
    """Real pictures of one kind of captions, none of which was trained on."""

    works: Sequence[Work]
    far: Mapping[str, np.ndarray]
    """Squared distance [R] to the nearest training picture, by encoder."""

    @classmethod
    def of(cls, works: Sequence[Work], trained: Trained) -> Real:
        """How far they are."""
        pictures = real_pictures(works)
        far = {name: trained.find(name, encode(pictures))[0] for name, encode in ENCODERS.items()}
        return cls(works, far)


def real_pictures(works: Sequence[Work]) -> Pictures:
    """Of the gallery, at the size of training."""
    return [square(work.picture, PX) for work in works]


def concepts(works: Sequence[Work]) -> np.ndarray:
    """What each shows, by name."""
    return np.array([work.concept for work in works])


def mean(values_N: np.ndarray, group_N: np.ndarray) -> list[float]:
    """Mean, and its 95 % bootstrap interval over groups: pictures of one concept are alike.

    Where all are 0 or all 1, which bootstrap gives no width, it is Wilson's for that many groups.
    """
    _, place_N = np.unique(group_N, return_inverse=True)
    sums_C2 = np.stack([np.bincount(place_N, values_N), np.bincount(place_N)], axis=1)

    def ratio(rows_C2: np.ndarray) -> float:
        total, count = rows_C2.sum(axis=0)
        return float(total / count)

    value, C = ratio(sums_C2), len(sums_C2)
    if value in (0, 1):
        interval = share_interval(round(value) * C, C)
    else:
        interval = bootstrap(ratio, sums_C2, resamples=1000)
    return [value, interval.low, interval.high]


def kappa(one_N: np.ndarray, other_N: np.ndarray) -> float | None:
    """Agreement of two answers beyond chance (Cohen 1960); None where both always say the same."""
    a, b = one_N.mean(), other_N.mean()
    chance = a * b + (1 - a) * (1 - b)
    return None if chance == 1 else float(((one_N == other_N).mean() - chance) / (1 - chance))


def spread(far_N: np.ndarray, limit: float) -> list[float]:
    """Quantiles from 0 to 1 of distance ÷ that of the limit, both as distances, not squares."""
    found: list[float] = np.quantile(np.sqrt(far_N / limit), _memorisation.QUANTILES).tolist()
    return found


@dataclass(frozen=True)
class Found:
    """Nearest training pictures of N drawn ones by one encoder; P captions, with each latent."""

    limit: float
    """Squared distance of near-copies."""
    far_N: np.ndarray
    row_N: np.ndarray
    is_drawing_N: np.ndarray
    """The nearest one shows the caption's concept in its style, on whatever background."""
    is_own_N: np.ndarray
    """No picture is nearer, of training or the caption's real one, than the latter."""
    between_P: np.ndarray
    """Squared distance of a caption's two pictures."""

    @classmethod
    def by(cls, encoder: str, pictures: Pictures, works: Sequence[Work], trained: Trained) -> Found:
        """Of the pictures of these captions, which are all there once a latent."""
        x_ND, y_ND = (ENCODERS[encoder](some) for some in (pictures, real_pictures(works)))
        far_N, row_N = trained.find(encoder, x_ND)
        seen = [trained.works[row] for row in row_N]
        is_drawing_N = [
            (a.concept, a.style) == (b.concept, b.style) for a, b in zip(seen, works, strict=True)
        ]
        is_same_N = [a == b for a, b in zip(seen, works, strict=True)]
        is_nearer_N = np.square(x_ND - y_ND).sum(axis=1) < far_N
        first_PD, second_PD = np.split(x_ND, LATENTS)
        return cls(
            trained.limits[encoder],
            far_N,
            row_N,
            np.array(is_drawing_N),
            np.array(is_same_N) | is_nearer_N,
            np.square(first_PD - second_PD).sum(axis=1),
        )

    @property
    def is_near_N(self) -> np.ndarray:
        """Near-copies."""
        return self.far_N < self.limit

    def record(self, real_R: np.ndarray, concept_N: np.ndarray) -> Record:
        """Means with their intervals; `real_R` are real pictures' distances to training."""
        first_P, second_P = np.split(self.is_near_N, LATENTS)
        concept_P = concept_N[: len(first_P)]
        return {
            "near": mean(self.is_near_N, concept_N),
            "drawing": mean(self.is_drawing_N, concept_N),
            "own": mean(self.is_own_N, concept_N),
            "copying": mean(copying(self.far_N, real_R), concept_N),
            "latents_agree": mean(first_P == second_P, concept_P),
            "latents_near": mean(self.between_P < self.limit, concept_P),
            "spread": spread(self.far_N, self.limit),
        }

    def agreement(self, other: Found, concept_N: np.ndarray) -> Record:
        """Whether another encoder calls the same pictures near-copies."""
        one_N, other_N = self.is_near_N, other.is_near_N
        return {
            "same": mean(one_N == other_N, concept_N),
            "both": mean(one_N & other_N, concept_N),
            "kappa": kappa(one_N, other_N),
        }

    def strip(self, pictures: Pictures, trained: Trained) -> Image.Image:
        """Some captions beside their neighbours, the nearest first; near-copies have frames."""
        num_captions = len(self.between_P)
        order = np.argsort(self.far_N, kind="stable")
        _, firsts = np.unique(order % num_captions, return_index=True)
        nearest_P = order[np.sort(firsts)]  # of a caption's pictures the nearer one
        strip = Image.new("RGB", (2 * len(SHOWN) * CELL_PX, CELL_PX), "white")
        for place, share in enumerate(SHOWN):
            i = nearest_P[int(share * num_captions)]
            colour = "#d55e00" if self.is_near_N[i] else "white"
            pair = (pictures[i], trained.pictures[self.row_N[i]])
            for left, picture in enumerate(pair, start=2 * place):
                large = picture.resize((CELL_PX - 6,) * 2, Image.Resampling.NEAREST)
                strip.paste(ImageOps.expand(large, 3, colour), (left * CELL_PX, 0))
        return strip
