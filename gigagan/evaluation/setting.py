"""What every part of an evaluation needs to know: settings, rules, and where things are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gigagan.common.progress import Progress, silent
from gigagan.config import EvaluateConfig
from gigagan.evaluation import protocol
from gigagan.evaluation.devices import Device
from gigagan.evaluation.judges.features import image_vectors, square
from gigagan.models import pretrained
from gigagan.models.aligner import Aligner
from gigagan.seeds import derived

INCEPTION = "inception-2015-12-05"
TEXT_ENCODER = "embedded:minilm-l6"
"""Encoder of the captions that drawn pictures are named by."""
MAX_PAIRS = 1000
"""Retrieval and pixel metrics look at this many pairs: ranks among more say little more."""
_DEFAULT_RESOLUTION = 128

Sample = Callable[[list[str], int, float], list[Image.Image]]
"""(captions, seed, truncation) → one picture each; equal captions get different latents.

It is called from as many threads at a time as there are devices.
"""

Variants = list[tuple[str, list[Image.Image]]]
"""Several pictures of each of a few prompts."""


@dataclass(frozen=True)
class Setting:
    """What every part of an evaluation needs to know."""

    config: EvaluateConfig
    rules: protocol.Protocol
    px: int
    out: Path
    devices: Sequence[Device]
    """Pictures are drawn and judged a batch on each at a time."""
    statistics: Path
    """Folder of features of reference sets, by content."""
    progress: Progress

    @property
    def device(self) -> Device:
        """The first: for work that one device does alone."""
        return self.devices[0]

    @property
    def clip(self) -> str | None:
        """Encoder of the CLIP score."""
        return self.config.clip or self.rules.clip

    def square(self, picture: Any) -> Image.Image:
        """A picture as all judges but CLIP get it."""
        return square(picture, self.px)

    @property
    def transform(self) -> str:
        """Name of that, for caches and results."""
        return f"centre square, Lanczos {self.px}"


def setting(
    config: EvaluateConfig,
    out: Path,
    *,
    devices: Sequence[Device] = ("cpu",),
    statistics: Path | None = None,
    progress: Progress = silent,
) -> Setting:
    """The settings with what the protocol rules; raises ProtocolError where these disagree."""
    rules = protocol.named(config.protocol)
    protocol.check_settings(rules, resolution=config.resolution, num_images=config.num_images)
    config = config.model_copy(update={"num_images": rules.num_generated or config.num_images})
    px = rules.resolution or config.resolution or _DEFAULT_RESOLUTION
    cache = statistics or out / "statistics"
    return Setting(config, rules, px, out, tuple(devices), cache, progress)


def seed_of(config: EvaluateConfig, position: int) -> int:
    """Seed of the batch that begins at this caption."""
    return derived(config.seed, position)


def embedded(judge: Aligner, pictures: Sequence[Path | Image.Image], at: Setting) -> torch.Tensor:
    """Pictures in the aligner's space [N, E]."""
    encoder = pretrained.image_encoder(judge.image_encoder, at.device)
    settings: dict[str, Any] = {"px": judge.image_px, "device": at.device}
    settings |= {"batch_size": at.config.batch_size}
    return judge.embed_images(image_vectors(list(pictures), encoder, **settings))
