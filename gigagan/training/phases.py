"""What a run does at a position: shape by regression first, then the adversarial game on top.

Everything is a function of the images seen, so that a resumed run is in the phase of one that was
never interrupted, on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gigagan.config import PhaseConfig, TrainBaseConfig, TrainedPart, TrainStage

APPROACH = 0.2
"""Over this last part of the warm start G's rate falls to that of what follows."""


class Phase(NamedTuple):
    """Which networks the next step trains, how fast, and what G's loss is made of."""

    has_discriminator: bool = True
    """False: the discriminator takes no part at all, and G runs at its own speed."""
    adversarial: float = 1.0
    """Weight of G's losses through D and the frozen encoder; 0 while D catches up."""
    regression: float = 0.0
    """Weight of the absolute difference to the caption's picture, over all pyramid levels."""
    generator_lr: float = 0.0
    discriminator_lr: float = 0.0
    trains: TrainedPart = "all"
    """Which part of G."""
    guidance: float | None = None
    """Weight of guidance in place of that of the losses."""


def phase_at(config: TrainStage, images_seen: int) -> Phase:
    """The phase of the step that begins at `images_seen`.

    Without a warm start: a linear warm-up of both rates, constant weights. With one, at w images
    with ramp r after D's head start h: G alone before w; weights of 0 up to w + h, then linear to
    `adversarial` at w + h + r; D's warm-up begins at w.
    """
    warm, optimizer, part = config.warm_start, config.optimizer, part_at(config, images_seen)
    follows = optimizer.lr * optimizer.generator_rate
    if part.generator_lr is not None:
        follows = part.generator_lr
    cooling = _cooling(config, images_seen)
    if images_seen < warm.images:
        left = (warm.images - images_seen) / (APPROACH * warm.images)
        rate = follows + (warm.lr - follows) * min(left, 1.0)
        ramp = _ramp(config, images_seen)
        return Phase(
            has_discriminator=False,
            adversarial=0.0,
            regression=warm.regression,
            generator_lr=cooling * ramp * rate,
            trains=part.trains,
        )
    since = images_seen - warm.images
    ramp = _ramp(config, since)
    regression = warm.regression if warm.images else 0.0
    # G has been trained already: only D's moments are without experience.
    g_ramp = 1.0 if warm.images else ramp
    risen = (since - warm.head_start_images) / warm.ramp_images if warm.images else 1.0
    return Phase(
        adversarial=(warm.adversarial if warm.images else 1.0) * min(max(risen, 0.0), 1.0),
        regression=regression,
        generator_lr=cooling * g_ramp * follows,
        discriminator_lr=cooling * ramp * optimizer.lr,
        trains=part.trains,
        guidance=part.guidance,
    )


def part_at(config: TrainStage, images_seen: int) -> PhaseConfig:
    """What of G the step that begins at `images_seen` trains."""
    phases = config.phases if isinstance(config, TrainBaseConfig) else ()
    for phase in phases:
        if phase.until_images is None or images_seen < phase.until_images:
            return phase
    return PhaseConfig()


def begins_to_cool(config: TrainStage, images_seen: int) -> bool:
    """Whether the step that ended here was the last one at full rates; never without a cool-down.

    What was learned until then does not depend on how long the run is.
    """
    seam = config.total_images - config.optimizer.cooldown_images
    return seam < config.total_images and images_seen - config.batch_size <= seam < images_seen


def is_on_the_way(config: Mapping[str, Any], images_seen: int, total_images: int) -> bool:
    """Whether a run of `total_images` comes by the state that one of `config` had at `images_seen`.

    It does not where rates were falling already, towards another end.
    """
    end, cooldown = config["total_images"], config["optimizer"].get("cooldown_images", 0)
    is_cooled = cooldown > 0 and images_seen - config["batch_size"] > end - cooldown
    return end == total_images or not is_cooled


def _ramp(config: TrainStage, since: int) -> float:
    """Linear warm-up to 1, the step itself included."""
    return min((since + config.batch_size) / max(config.optimizer.warmup_images, 1), 1.0)


def _cooling(config: TrainStage, images_seen: int) -> float:
    """1, and over the last `cooldown_images` linearly towards 0."""
    left = config.total_images - images_seen
    return min(left / max(config.optimizer.cooldown_images, 1), 1.0)
