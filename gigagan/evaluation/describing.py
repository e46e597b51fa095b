"""What a result says of itself: counts, preparation, storage, and hashes of all that decides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from gigagan.evaluation.heldout import Heldout, natural
from gigagan.evaluation.judges.naming import TEXT_ENCODER
from gigagan.evaluation.judging import MAX_PAIRS
from gigagan.evaluation.setting import INCEPTION, Setting
from gigagan.models import pretrained
from gigagan.models.aligner import Aligner


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
    names += ["lpips-alex"] if config.diversity_prompts else []
    names += [judge.image_encoder, judge.text_encoder] if judge is not None else []
    names += [TEXT_ENCODER] if everything.gallery is not None else []
    names += [name for name in (at.clip, config.cmmd, config.dinov2) if name is not None]
    if at.rules.name in ("embedded-heldout", "coco-captions"):
        is_embedded = everything.palette is not None
        kind = config.protocol if is_embedded else "coco-captions"
        facts["name"] = f"{kind}-{at.px}"
    facts |= {
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
    with Image.open(generated[0]) as first:
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


def sha256_of(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
