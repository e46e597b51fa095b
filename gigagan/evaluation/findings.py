"""What results.json holds: metrics with intervals, floors and chances, and what decides them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gigagan.common.files import sha256_of
from gigagan.common.pictures import opened
from gigagan.config import EvaluateConfig
from gigagan.evaluation.heldout import Heldout, natural
from gigagan.evaluation.judges.statistics import mean_interval
from gigagan.evaluation.setting import INCEPTION, MAX_PAIRS, TEXT_ENCODER, Setting
from gigagan.models import pretrained
from gigagan.models.aligner import Aligner

_SPLITS = ("combination", "trained")
HEADLINES = (
    *(f"naming_{how}_r1_{split}" for split in _SPLITS for how in ("pixels", "judge")),
    *("class_accuracy_nearest_mean", "fid", "kid", "inception_score", "intra_class_lpips"),
    *("background_colour_accuracy", "pixel_probe_median_rank", "shape_rank"),
)


@dataclass
class Findings:
    """What is measured, filled one metric at a time."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % intervals over pictures drawn anew, by the metrics' names; of one training."""
    real: dict[str, float] = field(default_factory=dict)
    """The same metric of real pictures: a floor or a ceiling."""
    chance: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)
    """What a metric hangs on beside the settings: a part of the result's `protocol`."""

    def add(
        self,
        name: str,
        value: float,
        *,
        real: float | None = None,
        chance: float | None = None,
        interval: tuple[float, float] | None = None,
    ) -> None:
        """Note one metric with what it is to be held against."""
        self.metrics[name] = float(value)
        for kind, other in ((self.real, real), (self.chance, chance)):
            if other is not None:
                kind[name] = float(other)
        if interval is not None:
            self.intervals[name] = (float(interval[0]), float(interval[1]))

    def add_mean(
        self,
        name: str,
        values: np.ndarray,
        config: EvaluateConfig,
        *,
        real: float | None = None,
        chance: float | None = None,
    ) -> None:
        """Note the mean over pictures with its interval."""
        found = mean_interval(values) if config.resamples else None
        interval = None if found is None else found[:2]
        self.add(name, float(np.mean(values)), real=real, chance=chance, interval=interval)


def assemble(findings: Findings, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json holds, with what one looks at first in front."""
    return {
        "protocol": {**facts, **findings.rules},
        "metrics": dict(sorted(findings.metrics.items(), key=_headlines_first)),
        "intervals": {name: list(pair) for name, pair in findings.intervals.items()},
        "reference": {"real": findings.real, "chance": findings.chance},
        "absent": findings.absent,
    }


def _headlines_first(item: tuple[str, float]) -> int:
    """Sort key: what one looks at first, then the rest as measured."""
    name = item[0]
    return HEADLINES.index(name) if name in HEADLINES else len(HEADLINES)


def describe(
    at: Setting,
    everything: Heldout,
    chosen: Heldout,
    generated: Sequence[Path],
    judge: Aligner | None,
    aligner: Path | None,
) -> dict[str, Any]:
    """What was drawn, how both sets were prepared, and who judged."""
    config = at.config
    facts = describe_rules(at, chosen.captions, everything.all_pictures, generated)
    names = [INCEPTION]
    names += ["lpips-alex"] if config.diversity_prompts or everything.asks == "class" else []
    names += [judge.image_encoder, judge.text_encoder] if judge is not None else []
    names += [TEXT_ENCODER] if everything.gallery is not None else []
    names += [name for name in (at.clip, config.cmmd, config.dinov2) if name is not None]
    if at.rules.name in ("embedded-heldout", "coco-captions"):
        is_embedded = everything.palette is not None
        kind = config.protocol if is_embedded else "coco-captions"
        facts["name"] = f"{kind}-{at.px}"
    facts |= {
        "condition": everything.asks,
        "num_with_real": len(chosen.paired),
        "num_pairs": min(MAX_PAIRS, len(chosen.paired)),
        "diversity": {"prompts": config.diversity_prompts, "seeds": config.diversity_seeds},
        "weights_sha256": {name: pretrained.sha256(name) for name in names},
        "aligner": None,
        "clip": None,
    }
    if judge is not None and aligner is not None:
        facts["aligner"] = {
            "image_encoder": judge.image_encoder,
            "text_encoder": judge.text_encoder,
            "image_px": judge.image_px,
            "sha256": sha256_of(aligner),
        }
    if at.clip is not None:
        facts["clip"] = {"model": at.clip, "prefix": at.rules.clip_prefix}
    return facts


def describe_rules(
    at: Setting, captions: Sequence[str], real: Sequence[Path], generated: Sequence[Path]
) -> dict[str, Any]:
    """The part of a result's `protocol` that every task has."""
    config = at.config
    lines = "".join(f"{caption}\n" for caption in captions)
    with opened(generated[0].read_bytes()) as first:
        generated_size = list(first.size)
    storage = sorted({path.suffix.lstrip(".").upper() for path in generated})
    return {
        "name": at.rules.name,
        "task": at.rules.task,
        "num_generated": len(generated),
        "num_real": len(real),
        "captions_sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "reference_sha256": _content(real),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "truncation": config.truncation,
        "generated_size": generated_size,
        "resolution": at.px,
        "crop": "centre square of the short side, halves to even, both sets",
        "resize": f"Pillow Lanczos to {at.px} px, then {_TO_299[at.rules.resize]} to 299 px",
        "storage": "+".join(storage),
        "kid": {"subset_size": config.kid_subset_size, "subsets": config.kid_subsets},
        "resamples": config.resamples,
    }


_TO_299 = {"clean": "clean-fid 'clean'", "legacy": "TensorFlow 1 bilinear (clean-fid 'legacy')"}


def _content(pictures: Sequence[Path]) -> str:
    """Hash of the pictures' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for picture in sorted(pictures, key=lambda path: natural(path.name)):
        digest.update(sha256_of(picture).encode())
    return digest.hexdigest()
