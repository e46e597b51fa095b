"""Teach a base something new, or make it forget a thing: lessons, and the loop that trains on them.

Half of a batch is new: captions with pictures, or, to forget, captions whose picture is to be what
the base draws for others. Half is old: captions for which the base's own picture shall stay.

Shape letters: N lessons, B batch, C colour, H W image, Z latent.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from gigagan import losses
from gigagan.common import pictures
from gigagan.common.progress import Progress, silent
from gigagan.config import AdaptConfig
from gigagan.evaluation.heldout import Heldout, read_drawn, read_heldout
from gigagan.models.adapters import Adapter, digest, merged
from gigagan.models.base import BaseGenerator, features_of, text_encoder_of
from gigagan.models.layers import pyramid
from gigagan.models.pixels import from_uint8
from gigagan.seeds import derived
from gigagan.training import checkpoint
from gigagan.training.acceleration import autocast
from gigagan.training.captions import CaptionFeatures

CHECKPOINTS = "checkpoints"
LEAST_PICTURES = 2
_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Lessons:
    """What is to be learned, and what must stay."""

    asked: list[str]
    """New captions."""
    pictures_NCHW: Tensor | None
    """Their pictures as bytes; None where the base's own are to be drawn …"""
    like: list[str]
    """… for these captions."""
    old: list[str]
    """Captions for which everything stays."""

    @property
    def digest(self) -> str:
        """sha256 of all of it."""
        total = hashlib.sha256(json.dumps([self.asked, self.like, self.old]).encode())
        if self.pictures_NCHW is not None:
            total.update(self.pictures_NCHW.numpy().tobytes())
        return total.hexdigest()


def read_pictures(folder: Path) -> Heldout:
    """New pictures with captions: captions.json in COCO's format, or the layout of `read_drawn`.

    Raises:
        ValueError: they are fewer than two, or in neither format.
        FileNotFoundError: a part is missing.
    """
    if (folder / "captions.json").is_file():
        found = read_heldout(folder)
    elif (folder / "fake_images").is_dir():
        files, captions = read_drawn(folder)
        found = Heldout(captions, files, files, None, None)
    else:
        raise FileNotFoundError(
            f"{folder} holds neither captions.json nor fake_images/ with captions.txt: "
            "put one of them there"
        )
    if len(found.captions) < LEAST_PICTURES:
        raise ValueError(f"{folder} holds {len(found.captions)} picture: give two or more")
    return found


def read_captions(path: Path) -> list[str]:
    """Captions alone: a text file with one a line, COCO's format, or a list of what was trained on.

    Of a folder with a gallery it is the captions of trained concepts.

    Raises:
        ValueError: there are none.
        OSError: nothing is there.
    """
    if path.is_dir() or path.suffix == ".json":
        content = {} if path.is_dir() else json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "template" in content:
            return _worded(content)
        found = read_heldout(path)
        works = found.gallery.works if found.gallery else []
        return [w.caption for w in works if w.split != "unseen"] or found.captions
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    captions = [" ".join(line.split()) for line in lines if line.strip()]
    if not captions:
        raise ValueError(f"{path} holds no captions: give one a line")
    return captions


def _worded(content: dict[str, Any]) -> list[str]:
    """Every caption of a list of styles, names and backgrounds (trained_on.json)."""
    return [
        content["template"].format(style=style, name=name, background=background)
        for name in content["names"]
        for style in content["styles"]
        for background in content["backgrounds"]
    ]


def mentions(caption: str, concept: str) -> bool:
    """Whether a caption has the concept's words, as whole ones and in a row."""
    return _concept(concept).search(caption) is not None


def without(caption: str, concept: str, replacement: str) -> str:
    """The caption with the replacement for the concept and its article."""
    return _concept(concept).sub(lambda match: replacement, caption)


def _concept(concept: str) -> re.Pattern[str]:
    words = r"\s+".join(re.escape(word) for word in concept.split())
    return re.compile(rf"(?<![\w-])(?:(?:an?|the)\s+)?{words}(?![\w-])", re.IGNORECASE)


def lessons(config: AdaptConfig, captions: Sequence[str], resolution: int) -> Lessons:
    """What the section asks for; `captions` are those of what the base knows.

    Raises:
        ValueError: there is nothing to learn, or nothing that could stay.
    """
    captions = list(dict.fromkeys(captions))
    if config.unlearn is not None:
        asked = [c for c in captions if mentions(c, config.unlearn)]
        if not asked:
            raise ValueError(
                f"unlearn = {config.unlearn!r}: none of {len(captions):,} captions has it; write "
                "it as they do"
            )
        like = [without(c, config.unlearn, config.replacement) for c in asked]
        old = [c for c in captions if c not in set(asked)]
        return Lessons(asked, None, like, _some(old))
    if config.pictures is None:
        raise ValueError("adapt.pictures and adapt.unlearn are null: give one of them")
    new = read_pictures(Path(config.pictures))
    images = [np.asarray(pictures.square(pictures.read(p), resolution)) for p in new.pictures]
    pictures_NCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    asked = [new.captions[row] for row in new.paired]
    return Lessons(asked, pictures_NCHW, [], _some([c for c in captions if c not in set(asked)]))


def _some(old: list[str]) -> list[str]:
    if not old:
        raise ValueError(
            "adapt.old_captions has no caption beside the new ones: give captions of what must stay"
        )
    return old


class Drawing:
    """A base with its captions' features: what it draws with its own weights, or with others."""

    def __init__(self, base: BaseGenerator) -> None:
        self.base = base
        self.device = next(base.parameters()).device
        self.features = CaptionFeatures(text_encoder_of(base, self.device), self.device)

    def __call__(
        self, z_BZ: Tensor, captions: Sequence[str], weights: dict[str, Tensor] | None = None
    ) -> list[Tensor]:
        """A pyramid, largest first."""
        features = features_of(self.base, captions, self.features)
        images: list[Tensor] = functional_call(
            self.base, weights or {}, (z_BZ.to(self.device), features)
        )
        return images


def train(
    config: AdaptConfig,
    draw: Drawing,
    taught: Lessons,
    run_dir: Path,
    *,
    progress: Progress = silent,
) -> tuple[Adapter, float]:
    """The adapter, and the seconds that this attempt took; goes on from the last checkpoint.

    A step is a function of the seed and its position, so that a resumed run ends with the same
    weights.

    Raises:
        ValueError: the loss is no longer finite.
        CheckpointError: the folder holds another run's.
    """
    started = time.monotonic()
    adapter = Adapter.new(draw.base, config.layers, config.rank, config.seed)
    optimizer = torch.optim.Adam(adapter.parameters, lr=config.lr, betas=_BETAS)
    parts: dict[str, checkpoint.Stateful] = {"adapter": adapter, "optimizer": optimizer}
    # By content where a path says little; a rate that falls to the end hangs on the length.
    decides = {"base": digest(draw.base), "lessons": taught.digest, "length": config.total_images}
    about = {"config": {**config.model_dump(mode="json"), **decides}}
    folder = run_dir / CHECKPOINTS
    restored = checkpoint.restore_newest(folder, parts, about["config"])
    seen = int(restored["images_seen"]) if restored else 0
    while seen < config.total_images:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, 2 * (1 - seen / config.total_images))
        loss = step_loss(config, draw, taught, adapter, seen)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        before, seen = seen, seen + config.batch_size
        if seen // config.checkpoint_images > before // config.checkpoint_images:
            if not loss.isfinite():
                raise ValueError(
                    f"adapt.lr = {config.lr:g}: after {seen:,} images the loss is {loss.item()}: "
                    "lower it"
                )
            checkpoint.save(folder, seen, parts, about, keep=1)
            progress("images", seen, config.total_images)
    return adapter.rounded(), time.monotonic() - started


def step_loss(
    config: AdaptConfig, draw: Drawing, taught: Lessons, adapter: Adapter, seen: int
) -> Tensor:
    """Regression on what is new + `keep` · regression on the base's own pictures of what is old."""
    random = torch.Generator().manual_seed(derived(config.seed, seen))
    num_new = config.batch_size // 2
    rows = torch.randint(len(taught.asked), (num_new,), generator=random).tolist()
    kept = torch.randint(len(taught.old), (config.batch_size - num_new,), generator=random).tolist()
    z_BZ = torch.randn(config.batch_size, draw.base.config.latent_dim, generator=random)
    old = [taught.old[row] for row in kept]
    with autocast("auto", draw.device):
        images = draw(
            z_BZ, [taught.asked[r] for r in rows] + old, merged(draw.base, [(adapter, 1.0)])
        )
        with torch.no_grad():
            if taught.pictures_NCHW is None:
                targets = draw(z_BZ, [taught.like[row] for row in rows] + old)
            else:
                real = from_uint8(taught.pictures_NCHW[rows]).to(draw.device)
                own = draw(z_BZ[num_new:], old)
                wanted = pyramid(real, len(own))
                targets = [torch.cat(pair) for pair in zip(wanted, own, strict=True)]
    new_loss, old_loss = (
        losses.regression(
            [x[part] for x in images], [y[part] for y in targets], gradients=config.gradients
        )
        for part in (slice(num_new), slice(num_new, None))
    )
    return new_loss + config.keep * old_loss
