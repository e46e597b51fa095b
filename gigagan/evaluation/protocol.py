"""The evaluation by its named rules: captions to pictures to one result file.

Captions nobody trained on are drawn and compared with the real pictures of the same captions. All
that a number depends on stands beside it in results.json; a metric that cannot be computed is
absent with a reason, never zero.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from gigagan.config import EvaluateConfig
from gigagan.evaluation import alignment, report
from gigagan.evaluation.distances import frechet_distance, kernel_distance, prdc
from gigagan.evaluation.features import (
    Progress,
    image_vectors,
    inception_features,
    silent,
    square,
    text_vectors,
)
from gigagan.evaluation.heldout import Heldout, read_heldout, subset
from gigagan.models import pretrained
from gigagan.models.aligner import Aligner

Sample = Callable[[list[str], int], list[Image.Image]]
"""(captions, seed) → one picture each; equal captions of one call get different latents."""

HEADLINES = ("fid", "kid", "background_colour_accuracy", "pixel_probe_median_rank", "shape_rank")

_MAX_PAIRS = 1000
"""Retrieval and pixel metrics look at this many pairs: ranks among more say little more."""
_MAX_PRDC = 10_000
_GRID_PAIRS = 24
_GRID_PROMPTS = 8
_NEIGHBOURS = 5


@dataclass
class _Findings:
    """What is measured, filled one metric at a time."""

    metrics: dict[str, float] = field(default_factory=dict)
    real: dict[str, float] = field(default_factory=dict)
    """The same metric of real pictures: a floor or a ceiling."""
    chance: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def add(
        self, name: str, value: float, *, real: float | None = None, chance: float | None = None
    ) -> None:
        self.metrics[name] = float(value)
        if real is not None:
            self.real[name] = float(real)
        if chance is not None:
            self.chance[name] = float(chance)


def evaluate(
    sample: Sample,
    heldout: Path,
    out: Path,
    config: EvaluateConfig,
    *,
    aligner: Path | None = None,
    clip: str | None = None,
    snapshots: Mapping[str, Path] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Draw every caption, measure, and write images/, captions.txt, two grids and results.json.

    `aligner` is the file fitted by the filter; `clip` an `open_clip:…` name for a CLIP score;
    `snapshots` are the weight files under test, recorded by hash. Returns what results.json holds:
    `protocol`, `metrics` (flat floats), `reference` (`real` and `chance`, by the same names) and
    `absent` (reasons).
    """
    everything = read_heldout(heldout)
    chosen = subset(everything, config.num_images, config.seed)
    px = config.resolution
    findings = _Findings()

    # Pictures, and how long they took.
    generated, seconds = _generate(sample, chosen.captions, out, config, progress)
    findings.add("seconds_per_image", seconds)

    # Distances between the sets.
    settings: dict[str, Any] = {"px": px, "device": device, "batch_size": config.batch_size}
    settings |= {"progress": progress}
    generated_ND = inception_features(generated, **settings)
    real_ND = inception_features(everything.all_pictures, **settings)
    _measure_distances(findings, generated_ND, real_ND, config)

    # Agreement with captions, and with the pictures they describe.
    pairs = slice(_MAX_PAIRS)
    captions, drawn, real = chosen.captions[pairs], generated[pairs], chosen.pictures[pairs]
    drawn_NHWC, real_NHWC = _pixels(drawn, px), _pixels(real, px)
    _measure_pixels(findings, drawn_NHWC, real_NHWC, chosen, px)
    judge = None if aligner is None else Aligner.load(aligner)
    _measure_alignment(findings, judge, drawn, real, captions, config, device)
    if clip is not None:
        name = "clip_score_" + clip.removeprefix("open_clip:").replace("/", "_")
        scores = [
            alignment.clip_score(pictures, chosen.captions, clip, device=device)
            for pictures in (generated, chosen.pictures)
        ]
        findings.add(name, scores[0], real=scores[1])

    # Diversity within a prompt.
    variants = _variants(sample, chosen.captions, config, progress)
    _measure_diversity(findings, variants, px, device)

    # Everything a reader needs to judge the numbers.
    judges = _describe_judges(config, judge, aligner, clip)
    results = {
        "protocol": _describe_rules(config, everything, chosen, generated[0])
        | judges
        | {"snapshots_sha256": {name: _sha256(path) for name, path in (snapshots or {}).items()}},
        "metrics": dict(sorted(findings.metrics.items(), key=_headlines_first)),
        "reference": {"real": findings.real, "chance": findings.chance},
        "absent": findings.absent,
    }
    _draw_grids(out, chosen, generated, variants, px)
    report.write_json(out / "results.json", results)
    return results


def _generate(
    sample: Sample, captions: list[str], out: Path, config: EvaluateConfig, progress: Progress
) -> tuple[list[Path], float]:
    """Write images/*.png and captions.txt; return the files and the median seconds per image."""
    folder = out / "images"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier evaluation, perhaps a larger one
    folder.mkdir(parents=True)
    paths, seconds = [], []
    for start in range(0, len(captions), config.batch_size):
        batch = captions[start : start + config.batch_size]
        began = time.perf_counter()
        pictures = sample(batch, _seed(config, start))
        seconds.append((time.perf_counter() - began) / len(batch))
        for number, picture in enumerate(pictures, start=start):
            paths.append(folder / f"{number:06d}.png")
            picture.save(paths[-1])
        progress("pictures", start + len(batch), len(captions))
    if len(paths) != len(captions):
        raise ValueError(f"the sampler returned {len(paths)} pictures for {len(captions)} captions")
    (out / "captions.txt").write_text("".join(f"{caption}\n" for caption in captions))
    return paths, median(seconds)


def _seed(config: EvaluateConfig, position: int) -> int:
    """Seed of the batch that begins at this caption."""
    return config.seed * 1_000_003 + position


def _measure_distances(
    findings: _Findings, generated_ND: np.ndarray, real_ND: np.ndarray, config: EvaluateConfig
) -> None:
    settings: dict[str, Any] = {
        "subset_size": config.kid_subset_size,
        "num_subsets": config.kid_subsets,
        "seed": config.seed,
    }
    order = np.random.default_rng(config.seed).permutation(len(real_ND))
    halves = np.array_split(real_ND[order], 2)
    has_floor = min(map(len, halves)) >= 2
    floor_kid = kernel_distance(*halves, **settings).value if has_floor else None
    floor_fid = frechet_distance(*halves) if has_floor else None
    kid = kernel_distance(generated_ND, real_ND, **settings)
    findings.add("fid", frechet_distance(generated_ND, real_ND), real=floor_fid)
    findings.add("kid", kid.value, real=floor_kid)
    findings.add("kid_subset_mean", kid.subset_mean)
    findings.add("kid_subset_std", kid.subset_std)
    generated_ND, real_ND = generated_ND[:_MAX_PRDC], real_ND[:_MAX_PRDC]
    if min(len(generated_ND), len(real_ND)) > _NEIGHBOURS:
        for name, value in prdc(real_ND, generated_ND, neighbours=_NEIGHBOURS)._asdict().items():
            findings.add(name, value)
    else:
        findings.absent["precision"] = f"needs more than {_NEIGHBOURS} pictures on both sides"


def _measure_pixels(
    findings: _Findings, drawn_NHWC: np.ndarray, real_NHWC: np.ndarray, chosen: Heldout, px: int
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
    findings: _Findings,
    judge: Aligner | None,
    drawn: Sequence[Path],
    real: Sequence[Path],
    captions: Sequence[str],
    config: EvaluateConfig,
    device: torch.device | str,
) -> None:
    if judge is None:
        findings.absent["aligner_similarity"] = "no aligner was given"
        return
    encoder = pretrained.image_encoder(judge.image_encoder, device)
    settings: dict[str, Any] = {"px": judge.image_px, "device": device}
    settings |= {"batch_size": config.batch_size}
    drawn_NE = judge.embed_images(image_vectors(drawn, encoder, **settings))
    real_NE = judge.embed_images(image_vectors(real, encoder, **settings))
    texts = text_vectors(captions, pretrained.text_encoder(judge.text_encoder, device))
    texts_NE = judge.embed_texts(texts)
    findings.add(
        "aligner_similarity",
        alignment.mean_similarity(drawn_NE, texts_NE),
        real=alignment.mean_similarity(real_NE, texts_NE),
        chance=alignment.mean_similarity(real_NE, texts_NE.roll(len(captions) // 2, dims=0)),
    )
    for k in (1, 10):
        findings.add(
            f"aligner_recall_at_{k}",
            alignment.recall_at(k, drawn_NE, texts_NE),
            real=alignment.recall_at(k, real_NE, texts_NE),
            chance=min(1, k / len(captions)),
        )


Variants = list[tuple[str, list[Image.Image]]]
"""Several pictures of each of a few prompts."""


def _variants(
    sample: Sample, captions: list[str], config: EvaluateConfig, progress: Progress
) -> Variants:
    """Draw a few captions, evenly spread over the list, with several latents each."""
    num_prompts = min(config.diversity_prompts, len(captions))
    variants = []
    for number in range(num_prompts):
        caption = captions[number * len(captions) // num_prompts]
        # Beyond the seeds of the captions themselves.
        seed = _seed(config, len(captions) + number)
        variants.append((caption, sample([caption] * config.diversity_seeds, seed)))
        progress("variants", number + 1, num_prompts)
    return variants


def _measure_diversity(
    findings: _Findings, variants: Variants, px: int, device: torch.device | str
) -> None:
    if not variants:
        findings.absent["lpips_diversity"] = "diversity_prompts is 0"
        return
    images_PZHWC = np.stack([_pixels(pictures, px) for _, pictures in variants])
    distance = pretrained.lpips("alex", device)
    findings.add("lpips_diversity", alignment.lpips_diversity(images_PZHWC, distance))
    findings.add("z_sensitivity", alignment.z_sensitivity(images_PZHWC))


def _headlines_first(item: tuple[str, float]) -> int:
    """Sort key: what one looks at first, then the rest as measured."""
    name = item[0]
    return HEADLINES.index(name) if name in HEADLINES else len(HEADLINES)


# ---- what the result file says -----------------------------------------------------------------


def _describe_rules(
    config: EvaluateConfig, everything: Heldout, chosen: Heldout, picture: Path
) -> dict[str, Any]:
    """What was drawn, and how both sets were prepared."""
    captions = "".join(f"{caption}\n" for caption in chosen.captions)
    with Image.open(picture) as first:
        generated_size = list(first.size)
    is_embedded = everything.palette is not None
    return {
        "name": f"{config.protocol if is_embedded else 'coco-captions'}-{config.resolution}",
        "num_generated": len(chosen.captions),
        "num_real": len(everything.all_pictures),
        "num_pairs": min(_MAX_PAIRS, len(chosen.captions)),
        "captions_sha256": hashlib.sha256(captions.encode()).hexdigest(),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "truncation": config.truncation,
        "generated_size": generated_size,
        "crop": "centre square of the short side, both sets",
        "resize": f"Pillow Lanczos to {config.resolution} px, then clean-fid 'clean' to 299 px",
        "storage": "PNG",
        "kid": {"subset_size": config.kid_subset_size, "subsets": config.kid_subsets},
        "diversity": {"prompts": config.diversity_prompts, "seeds": config.diversity_seeds},
    }


def _describe_judges(
    config: EvaluateConfig, judge: Aligner | None, aligner: Path | None, clip: str | None
) -> dict[str, Any]:
    """Which models judged, by name and hash."""
    names = ["inception-2015-12-05"]
    names += ["lpips-alex"] if config.diversity_prompts else []
    names += [judge.image_encoder, judge.text_encoder] if judge is not None else []
    names += [clip] if clip is not None else []
    described: dict[str, Any] = {
        "weights_sha256": {name: pretrained.sha256(name) for name in names},
        "aligner": None,
        "clip": None,
    }
    if judge is not None and aligner is not None:
        described["aligner"] = {
            "image_encoder": judge.image_encoder,
            "text_encoder": judge.text_encoder,
            "image_px": judge.image_px,
            "sha256": _sha256(aligner),
        }
    if clip is not None:
        described["clip"] = {"model": clip, "prefix": alignment.CLIP_PREFIX}
    return described


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _draw_grids(
    out: Path, chosen: Heldout, generated: list[Path], variants: Variants, px: int
) -> None:
    """grid.png: generated beside real; latents.png: several latents of each prompt."""
    total = len(chosen.captions)
    count = min(_GRID_PAIRS, total)
    shown = [number * total // count for number in range(count)]
    rows = [
        (chosen.captions[i], [square(generated[i], px), square(chosen.pictures[i], px)])
        for i in shown
    ]
    title = "Held-out captions: generated (left), real (right)"
    report.caption_grid(rows, title=title, columns=4).save(out / "grid.png")
    if variants:
        title = "One caption, several latents"
        grid = report.caption_grid(variants[:_GRID_PROMPTS], title=title, columns=2)
        grid.save(out / "latents.png")


def _pixels(pictures: Sequence[Path | Image.Image], px: int) -> np.ndarray:
    return np.stack([np.asarray(square(picture, px)) for picture in pictures])
