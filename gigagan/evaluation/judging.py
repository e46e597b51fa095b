"""Pictures before their judges: distances between sets, agreement with captions, diversity."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gigagan.config import EvaluateConfig
from gigagan.evaluation import classes, naming
from gigagan.evaluation.findings import Findings
from gigagan.evaluation.heldout import Heldout
from gigagan.evaluation.judges import alignment
from gigagan.evaluation.judges.distances import (
    cmmd,
    frechet_distance,
    kernel_distance,
    mmd2_interval,
    prdc,
)
from gigagan.evaluation.judges.features import (
    Extractor,
    extract,
    extractor,
    open_rgb,
    reference,
    square,
    text_vectors,
)
from gigagan.evaluation.judges.statistics import subsampled
from gigagan.evaluation.naming import Drawn
from gigagan.evaluation.setting import INCEPTION, MAX_PAIRS, Setting, Variants, embedded
from gigagan.models import pretrained
from gigagan.models.aligner import Aligner

_MAX_PRDC = 10_000
_MAX_SUBSAMPLES = 20
_MIN_PART, _MAX_PART = 4, 10_000
"""Rows of the parts behind the interval of a distance."""
_NEIGHBOURS = 5


def judge_all(
    findings: Findings,
    generated: list[Path],
    everything: Heldout,
    chosen: Heldout,
    judge: Aligner | None,
    at: Setting,
    drawn: Sequence[Drawn] = (),
) -> np.ndarray | None:
    """Every metric of pictures and captions; returns the agreement of each picture, if measured.

    `drawn` are the pictures that are to be named, in sets with a gallery. What compares with the
    real picture of the same caption is of those captions in `chosen` that have one.
    """
    sets = features_of(generated, everything.all_pictures, at)
    files = [*generated, *everything.all_pictures]
    known = dict(zip(files, itertools.chain(*sets["inception"]), strict=True))
    measure_distances(findings, sets, at)
    if everything.asks != "text":
        for name in ("naming", "pixel_probe_median_rank", "aligner_similarity", "clip_score"):
            findings.absent[name] = "the network reads no captions"
        classes.measure(findings, everything, generated, chosen.captions, sets["inception"], at)
        return None
    naming.measure(findings, everything, drawn, known, at)
    if chosen.pictures:
        drawn_NHWC = pixels([generated[row] for row in chosen.paired[:MAX_PAIRS]], at.px)
        real_NHWC = pixels(chosen.pictures[:MAX_PAIRS], at.px)
        _measure_pixels(findings, drawn_NHWC, real_NHWC, chosen, at.px)
    else:
        findings.absent["pixel_probe_median_rank"] = (
            f"captions without real pictures of their own: {chosen.captions[0]!r} and all others "
            "are none of the held-out captions"
        )
    by_aligner = _measure_alignment(findings, judge, generated, chosen, at)
    by_clip = _measure_clip(findings, generated, chosen, at)
    return by_aligner if by_clip is None else by_clip


def judges(at: Setting) -> dict[str, Extractor]:
    """The extractors that the settings ask for, by what they serve."""
    wanted = {"inception": f"{INCEPTION}/{at.rules.resize}", "cmmd": at.config.cmmd}
    wanted["dinov2"] = at.config.dinov2
    return {use: extractor(name, *at.devices) for use, name in wanted.items() if name is not None}


Sets = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Features of generated and of real pictures, by use."""


def features_of(generated: Sequence[Path], real: Sequence[Path], at: Setting) -> Sets:
    """Both sets through every judge, each picture decoded once."""
    used = judges(at)
    settings: dict[str, Any] = {"transform": at.square, "batch_size": at.config.batch_size}
    settings["progress"] = at.progress
    ours = extract(generated, list(used.values()), folder=at.out / "features", **settings)
    theirs = reference(
        real,
        list(used.values()),
        transform_name=at.transform,
        cache=at.statistics,
        **settings,
    )
    return {use: (ours[one.name], theirs[one.name]) for use, one in used.items()}


def measure_distances(findings: Findings, sets: Sets, at: Setting) -> None:
    """FID, KID, precision and recall; CMMD and FD-DINOv2 where asked for."""
    config = at.config
    generated_ND, real_ND = sets["inception"]
    kernel: dict[str, Any] = {"subset_size": config.kid_subset_size, "seed": config.seed}
    kernel["num_subsets"] = config.kid_subsets
    order = np.random.default_rng(config.seed).permutation(len(real_ND))
    halves = [real_ND[rows] for rows in np.array_split(order, 2)]
    has_floor = min(map(len, halves)) >= 2
    has_intervals = config.resamples > 0 and min(len(generated_ND), len(real_ND)) >= 2 * _MIN_PART
    kid = kernel_distance(generated_ND, real_ND, **kernel)
    fid = frechet_distance(generated_ND, real_ND)
    findings.add(
        "fid",
        fid,
        real=frechet_distance(*halves) if has_floor else None,
        interval=_fid_interval(generated_ND, real_ND, fid, config) if has_intervals else None,
    )
    findings.add(
        "kid",
        kid.value,
        real=kernel_distance(*halves, **kernel).value if has_floor else None,
        interval=mmd2_interval(generated_ND, real_ND)[:2] if has_intervals else None,
    )
    findings.add("kid_subset_mean", kid.subset_mean)
    findings.add("kid_subset_std", kid.subset_std)
    for use, name, distance in (
        ("cmmd", f"cmmd_{label(config.cmmd)}", cmmd),
        ("dinov2", f"fd_{label(config.dinov2)}", frechet_distance),
    ):
        if use in sets:
            findings.add(name, distance(*sets[use]))
    generated_ND, real_ND = generated_ND[:_MAX_PRDC], real_ND[:_MAX_PRDC]
    if min(len(generated_ND), len(real_ND)) > _NEIGHBOURS:
        for name, value in prdc(real_ND, generated_ND, neighbours=_NEIGHBOURS)._asdict().items():
            findings.add(name, value)
    else:
        findings.absent["precision"] = f"needs more than {_NEIGHBOURS} pictures on both sides"


def patch_distance(generated: Sequence[Path], real: Sequence[Path], at: Setting) -> float:
    """Patch-FID: the Fréchet distance of crops of both sets, at full resolution.

    One random place per picture, the same in both sets' pictures of one number, so that no detail
    is lost to Inception's small input (Chai et al. 2022).
    """
    side = at.rules.patch
    assert side is not None
    random = np.random.default_rng(at.config.seed)
    places = {
        path: random.integers(0, max(1, at.px - side + 1), 2)
        for paths in zip(sorted(generated), sorted(real), strict=False)
        for path in paths
    }

    def crop(picture: Any) -> Image.Image:
        left, top = (int(x) for x in places[picture])
        return at.square(picture).crop((left, top, left + side, top + side))

    judge = extractor(f"{INCEPTION}/{at.rules.resize}", *at.devices)
    settings: dict[str, Any] = {"transform": crop, "batch_size": at.config.batch_size}
    settings["progress"] = at.progress
    sets = [
        extract(sorted(paths), [judge], folder=at.out / "features" / name, **settings)[judge.name]
        for name, paths in (("patches", generated), ("patches-real", real))
    ]
    return frechet_distance(*sets)


def _fid_interval(
    generated_ND: np.ndarray, real_ND: np.ndarray, fid: float, config: EvaluateConfig
) -> tuple[float, float]:
    """95 % interval of FID at these numbers of pictures."""
    low, high, _ = subsampled(
        frechet_distance,
        generated_ND,
        real_ND,
        value=fid,
        resamples=max(2, min(config.resamples, _MAX_SUBSAMPLES)),
        share=min(0.5, _MAX_PART / max(len(generated_ND), len(real_ND))),
        seed=config.seed,
    )
    return max(0.0, low), high


def label(name: str | None) -> str:
    """A model's name as a part of a metric's."""
    return (name or "").removeprefix("open_clip:").replace("/", "_").replace(":", "_")


def _measure_pixels(
    findings: Findings, drawn_NHWC: np.ndarray, real_NHWC: np.ndarray, chosen: Heldout, px: int
) -> None:
    probe = alignment.pixel_probe_rank(drawn_NHWC, real_NHWC)
    findings.add("pixel_probe_median_rank", probe.median_rank, real=1, chance=probe.chance)
    if chosen.backgrounds is None or chosen.palette is None:
        reason = "the captions name no background colours of a known palette"
        findings.absent["background_colour_accuracy"] = reason
        return
    names = chosen.backgrounds[: len(drawn_NHWC)]
    findings.add(
        "background_colour_accuracy",
        alignment.background_colour_accuracy(drawn_NHWC, names, chosen.palette),
        real=alignment.background_colour_accuracy(real_NHWC, names, chosen.palette),
        chance=1 / len(chosen.palette),
    )
    if len(set(names)) < len(names):
        shape = alignment.shape_rank(drawn_NHWC, real_NHWC, names)
        findings.add("shape_rank", shape, real=0, chance=0.5)
    else:
        findings.absent["shape_rank"] = "no two pictures share a background"


def _measure_alignment(
    findings: Findings,
    judge: Aligner | None,
    generated: Sequence[Path],
    chosen: Heldout,
    at: Setting,
) -> np.ndarray | None:
    if judge is None:
        findings.absent["aligner_similarity"] = "no aligner was given"
        return None
    captions = chosen.captions[:MAX_PAIRS]
    drawn_NE = embedded(judge, generated[:MAX_PAIRS], at)
    texts = text_vectors(captions, pretrained.text_encoder(judge.text_encoder, at.device))
    texts_NE = judge.embed_texts(texts)
    own = [row for row in chosen.paired if row < len(captions)]
    real_NE = embedded(judge, chosen.pictures[: len(own)], at) if own else None
    each_N = alignment.similarities(drawn_NE, texts_NE)
    other_NE = texts_NE.roll(len(captions) // 2, dims=0)
    findings.add_mean(
        "aligner_similarity",
        each_N,
        at.config,
        real=None if real_NE is None else alignment.mean_similarity(real_NE, texts_NE[own]),
        chance=None if real_NE is None else alignment.mean_similarity(real_NE, other_NE[own]),
    )
    _add_recall(findings, "aligner", drawn_NE, real_NE, texts_NE, chosen, at)
    return each_N


def _add_recall(
    findings: Findings,
    judge: str,
    drawn_ND: torch.Tensor,
    real_MD: torch.Tensor | None,
    texts_ND: torch.Tensor,
    chosen: Heldout,
    at: Setting,
) -> None:
    """R@1 and R@10 of pictures for their own captions, among the first captions."""
    drawn_ND, texts_ND = drawn_ND[:MAX_PAIRS], texts_ND[:MAX_PAIRS]
    own = [row for row in chosen.paired if row < len(texts_ND)]
    real_MD = None if real_MD is None or not own else real_MD[: len(own)]
    for k in (1, 10):
        findings.add_mean(
            f"{judge}_recall_at_{k}",
            alignment.recalled(k, drawn_ND, texts_ND),
            at.config,
            real=None if real_MD is None else alignment.recall_at(k, real_MD, texts_ND, own),
            chance=min(1, k / len(texts_ND)),
        )


def _measure_clip(
    findings: Findings, generated: Sequence[Path], chosen: Heldout, at: Setting
) -> np.ndarray | None:
    """The CLIP score and R@k under the same encoder."""
    if at.clip is None:
        return None
    judge = extractor(at.clip, *at.devices)
    settings: dict[str, Any] = {"transform": open_rgb, "batch_size": at.config.batch_size}
    settings["progress"] = at.progress
    texts_ND = alignment.clip_text_vectors(
        chosen.captions, at.clip, prefix=at.rules.clip_prefix, device=at.device
    )
    drawn = extract(generated, [judge], folder=at.out / "features" / "clip", **settings)
    drawn_ND = torch.tensor(drawn[judge.name])
    each_N = alignment.similarities(drawn_ND, texts_ND)
    real_MD = None
    if chosen.pictures:
        settings |= {"transform_name": "as it is", "cache": at.statistics}
        real_MD = torch.tensor(reference(chosen.pictures, [judge], **settings)[judge.name])
    findings.add_mean(
        f"clip_score_{label(at.clip)}",
        each_N,
        at.config,
        real=None
        if real_MD is None
        else alignment.mean_similarity(real_MD, texts_ND[chosen.paired]),
    )
    _add_recall(findings, f"clip_{label(at.clip)}", drawn_ND, real_MD, texts_ND, chosen, at)
    return each_N


def measure_diversity(findings: Findings, variants: Variants, at: Setting) -> None:
    """LPIPS and pixel distance between pictures of one caption: does the latent do anything?"""
    if not variants:
        findings.absent["lpips_diversity"] = "diversity_prompts is 0"
        return
    images_PZHWC = np.stack([pixels(pictures, at.px) for _, pictures in variants])
    distance = pretrained.lpips("alex", at.device)
    findings.add("lpips_diversity", alignment.lpips_diversity(images_PZHWC, distance))
    findings.add("z_sensitivity", alignment.z_sensitivity(images_PZHWC))


def pixels(pictures: Sequence[Path | Image.Image], px: int) -> np.ndarray:
    """Pictures as the judges see them [N, H, W, 3]."""
    return np.stack([np.asarray(square(picture, px)) for picture in pictures])
