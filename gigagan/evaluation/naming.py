"""Can one name what was drawn? The own picture or caption, found among those of other concepts.

What is drawn for a caption of the gallery is held against the real pictures (by 16×16 pixels) and
against the captions (by a judge that has seen no such picture) of the same style on the same
background, so that only the concept tells them apart. A caption of a trained concept has the
trained concepts for rivals, one of an unseen concept all.

Shape letters: N asked captions, G gallery, F fitted pictures, D image and E text features.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from gigagan.evaluation.findings import Findings
from gigagan.evaluation.heldout import SPLITS, Gallery, Heldout
from gigagan.evaluation.judges.features import (
    extract,
    extractor,
    reference,
    reference_texts,
    square,
)
from gigagan.evaluation.judges.statistics import bootstrap
from gigagan.evaluation.setting import INCEPTION, TEXT_ENCODER, Setting
from gigagan.models.aligner import fit_aligner

CAPTIONS = 192
"""Most captions of each split that pictures are drawn for."""
PX = 16
RANKS = (1, 5)
RIDGE = 1.0
_CHUNK = 64
_FIT_LOOKS = 2
"""Pictures of each concept in each style that the judge is fitted on, at least: with two, one is
left when a background is left out."""


@dataclass(frozen=True)
class Drawn:
    """A picture that was drawn for a caption of the gallery."""

    work: int
    """Place of the caption in the gallery."""
    picture: Path


# ---- who is asked for, and told apart from whom ------------------------------------------------


def choose(
    gallery: Gallery, split: str, *, among: Collection[int] | None = None, count: int = CAPTIONS
) -> list[int]:
    """At most `count` places of a split: one of every concept, then a second one of each, …

    Which ones hangs on the gallery alone, and on `among` which places it is chosen.
    """
    places = [
        i
        for i, work in enumerate(gallery.works)
        if work.split == split and (among is None or i in among)
    ]
    met: Counter[str] = Counter()
    rounds = []
    for place in np.random.default_rng(0).permutation(np.array(places, np.int64)):
        concept = gallery.works[place].concept
        rounds.append((met[concept], int(place)))
        met[concept] += 1
    return [place for _, place in sorted(rounds, key=lambda pair: pair[0])[:count]]


def plan(
    gallery: Gallery,
    captions: Sequence[str],
    *,
    count: int = CAPTIONS,
    splits: Collection[str] = SPLITS,
) -> tuple[list[int], list[int]]:
    """Places that are asked for: those drawn anyway, for `captions`, and those beside them.

    A split of which any caption is drawn anyway is asked for by these alone.
    """
    there = {gallery.places[c] for c in captions if c in gallery.places}
    anyway: list[int] = []
    beside: list[int] = []
    for split in SPLITS:
        own = choose(gallery, split, among=there, count=count)
        anyway += own
        beside += [] if own or split not in splits else choose(gallery, split, count=count)
    return anyway, beside


def rivals(gallery: Gallery, asked: Sequence[int]) -> np.ndarray:
    """Which works [N, G] each asked one is told apart from, itself among them."""
    looks = [(work.style, work.background) for work in gallery.works]
    codes = {look: code for code, look in enumerate(dict.fromkeys(looks))}
    look_G = np.array([codes[look] for look in looks])
    unseen_G = np.array([work.split == "unseen" for work in gallery.works])
    asked_N = np.asarray(asked, np.int64)
    same_NG: np.ndarray = look_G[asked_N][:, None] == look_G
    return same_NG & (unseen_G[asked_N][:, None] | ~unseen_G)


class Ranks(NamedTuple):
    """For N pictures: where each finds its own caption among the rivals, by distance."""

    rank_N: np.ndarray
    """From 1; those that are equally near share the mean of their ranks."""
    count_N: np.ndarray
    """Rivals that it is ranked among, its own counted."""

    def of(self, rows: list[int]) -> Ranks:
        """The ranks of these rows alone."""
        return Ranks(self.rank_N[rows], self.count_N[rows])


def own_ranks(gallery: Gallery, asked: Sequence[int], distance_NG: np.ndarray) -> Ranks:
    """Rank of the own work of each asked one among its rivals, the nearest first."""
    rival_NG = rivals(gallery, asked)
    distance_NG = distance_NG.round(9)  # ties must not hang on the order of additions
    own_N1 = np.take_along_axis(distance_NG, np.asarray(asked, np.int64)[:, None], axis=1)
    nearer_N = ((distance_NG < own_N1) & rival_NG).sum(axis=1)
    level_N = ((distance_NG == own_N1) & rival_NG).sum(axis=1) - 1
    return Ranks(1 + nearer_N + level_N / 2, rival_NG.sum(axis=1))


# ---- by pixels ---------------------------------------------------------------------------------


def pooled(pictures_NHWC: np.ndarray) -> np.ndarray:
    """Pictures averaged to 16×16 pixels [N, 768], values from 0 to 1."""
    x_NCHW = torch.from_numpy(np.ascontiguousarray(pictures_NHWC)).permute(0, 3, 1, 2).float()
    found: np.ndarray = F.adaptive_avg_pool2d(x_NCHW / 255, PX).flatten(1).numpy()
    return found


def read_pooled(pictures: Sequence[Path], px: int) -> np.ndarray:
    """`pooled` of files [N, 768], each brought to `px` first, as what it is compared with is."""
    parts = [np.empty((0, 3 * PX**2), np.float32)]
    for start in range(0, len(pictures), _CHUNK):
        batch = [np.asarray(square(p, px)) for p in pictures[start : start + _CHUNK]]
        parts.append(pooled(np.stack(batch)))
    return np.concatenate(parts)


def pixel_ranks(
    gallery: Gallery, asked: Sequence[int], drawn_ND: np.ndarray, real_GD: np.ndarray
) -> Ranks:
    """Ranks by squared distance of pooled pixels."""
    drawn_ND, real_GD = drawn_ND.astype(np.float64), real_GD.astype(np.float64)
    squares_NG = (drawn_ND**2).sum(axis=1)[:, None] + (real_GD**2).sum(axis=1)
    return own_ranks(gallery, asked, squares_NG - 2 * drawn_ND @ real_GD.T)


# ---- by an independent judge -------------------------------------------------------------------


def fitted_on(gallery: Gallery, known: Sequence[int]) -> list[int]:
    """The known works, and more until each concept in each style is there on two backgrounds."""
    chosen = list(dict.fromkeys(known))
    met = Counter((gallery.works[i].concept, gallery.works[i].style) for i in chosen)
    taken = set(chosen)
    for place in np.random.default_rng(0).permutation(len(gallery.works)).tolist():
        of = gallery.works[place].concept, gallery.works[place].style
        if place not in taken and met[of] < _FIT_LOOKS:
            chosen.append(place)
            met[of] += 1
    return chosen


@dataclass(frozen=True)
class Judge:
    """Image features → caption vectors, by a ridge projection for each background left out.

    A picture is judged by the projection that was fitted on real pictures of the other
    backgrounds: no picture that a caption asks for is among those that its judge has seen.
    """

    gallery: Gallery
    fitted: Sequence[int]
    features_FD: np.ndarray
    """Features of the real pictures that the projections are fitted on."""
    texts_GE: torch.Tensor
    """Vectors of the gallery's captions."""

    def ranks(self, asked: Sequence[int], features_ND: np.ndarray) -> Ranks:
        """Ranks of the own caption by cosine."""
        works = self.gallery.works
        cosine_NG = np.zeros((len(asked), len(works)))
        backgrounds = [works[place].background for place in asked]
        for background in dict.fromkeys(backgrounds):
            others = [i for i, p in enumerate(self.fitted) if works[p].background != background]
            places = [self.fitted[i] for i in others]
            aligner = fit_aligner(
                torch.from_numpy(self.features_FD[others]), self.texts_GE[places], ridge=RIDGE
            )
            rows = [row for row, other in enumerate(backgrounds) if other == background]
            texts_GE = aligner.embed_texts(self.texts_GE).double()
            images_NE = aligner.embed_images(torch.from_numpy(features_ND[rows])).double()
            cosine_NG[rows] = (images_NE @ texts_GE.T).numpy()
        return own_ranks(self.gallery, asked, -cosine_NG)


# ---- both, as a part of an evaluation ----------------------------------------------------------


def measure(
    findings: Findings,
    everything: Heldout,
    drawn: Sequence[Drawn],
    known: Mapping[Path, np.ndarray],
    at: Setting,
) -> None:
    """R@1, R@5 and median rank of every split, by pixels and by the judge.

    `known` are Inception features of pictures, by file, that are at hand already. The judge hangs
    on the held-out set alone, not on what is drawn.
    """
    gallery = everything.gallery
    if gallery is None or not drawn:
        findings.absent["naming"] = (
            "no gallery.json beside the captions says what there is to tell apart"
            if gallery is None
            else "no picture was drawn for a caption of the gallery"
        )
        return
    asked = [one.work for one in drawn]
    pictures = [work.picture for work in gallery.works]

    # By pixels: a real picture is the nearest to itself.
    drawn_ND = read_pooled([one.picture for one in drawn], at.px)
    by_pixels = pixel_ranks(gallery, asked, drawn_ND, read_pooled(pictures, at.px))

    # By the judge: the real pictures that it is fitted on are judged as drawn ones are, by others.
    at_hand = set(everything.all_pictures)
    first = [place for place, picture in enumerate(pictures) if picture in at_hand]
    fitted = fitted_on(gallery, first)
    features_FD = _features([pictures[i] for i in fitted], known, at, are_real=True)
    captions = [work.caption for work in gallery.works]
    texts_GE = reference_texts(captions, TEXT_ENCODER, cache=at.statistics, device=at.device)
    judge = Judge(gallery, fitted, features_FD, texts_GE)
    drawn_ND = _features([one.picture for one in drawn], known, at, are_real=False)
    by_judge = judge.ranks([*asked, *fitted], np.concatenate([drawn_ND, features_FD]))

    splits = [gallery.works[place].split for place in asked]
    real_splits = [gallery.works[place].split for place in fitted]
    for split in SPLITS:
        rows = [row for row, other in enumerate(splits) if other == split]
        if not rows:
            reason = f"no picture was drawn for a caption of the split {split!r}"
            findings.absent[f"naming_{split}"] = reason
            continue
        real = [len(asked) + i for i, other in enumerate(real_splits) if other == split]
        _add(findings, "naming_pixels", split, by_pixels.of(rows), np.ones(1), at)
        _add(findings, "naming_judge", split, by_judge.of(rows), by_judge.rank_N[real], at)
    findings.rules["naming_captions"] = {split: splits.count(split) for split in SPLITS}
    findings.rules["naming"] = {
        "pixels": PX,
        "judge": f"ridge {RIDGE:g}, {INCEPTION} to {TEXT_ENCODER}, by backgrounds left out",
        "fitted": len(fitted),
        "gallery_sha256": _content(gallery),
    }


def _add(
    findings: Findings, name: str, split: str, found: Ranks, real_N: np.ndarray, at: Setting
) -> None:
    for k in RANKS:
        findings.add_mean(
            f"{name}_r{k}_{split}",
            (found.rank_N <= k).astype(np.float64),
            at.config,
            real=float((real_N <= k).mean()) if len(real_N) else None,
            chance=float((k / found.count_N).clip(max=1).mean()),
        )
    interval = None
    if at.config.resamples and len(found.rank_N) > 1:
        settings: dict[str, Any] = {"resamples": at.config.resamples, "seed": at.config.seed}
        between = bootstrap(lambda x: float(np.median(x)), found.rank_N, **settings)
        interval = (between.low, between.high)
    findings.add(
        f"{name}_rank_{split}",
        float(np.median(found.rank_N)),
        real=float(np.median(real_N)) if len(real_N) else None,
        chance=float((found.count_N + 1).mean() / 2),
        interval=interval,
    )


def _features(
    pictures: Sequence[Path], known: Mapping[Path, np.ndarray], at: Setting, *, are_real: bool
) -> np.ndarray:
    """Inception features [N, D], taken of those that are not known; of real ones kept for later."""
    judge = extractor(f"{INCEPTION}/{at.rules.resize}", *at.devices)
    missing = [picture for picture in dict.fromkeys(pictures) if picture not in known]
    settings: dict[str, Any] = {"transform": at.square, "batch_size": at.config.batch_size}
    settings["progress"] = at.progress
    if are_real:
        settings |= {"transform_name": at.transform, "cache": at.statistics}
        taken = reference(missing, [judge], **settings)[judge.name]
    else:
        taken = extract(missing, [judge], folder=at.out / "features" / "naming", **settings)[
            judge.name
        ]
    found = dict(zip(missing, taken, strict=True))
    return np.stack([found[p] if p in found else known[p] for p in pictures])


def _content(gallery: Gallery) -> str:
    """Hash of the gallery: captions, splits and the bytes of the pictures."""
    digest = hashlib.sha256()
    for work in gallery.works:
        digest.update(f"{work.split}\t{work.caption}\n".encode())
        digest.update(hashlib.sha256(work.picture.read_bytes()).digest())
    return digest.hexdigest()
