"""What a step is given: a batch, and everything random of it, drawn from (seed, position).

A class-conditional network's caption is the name of its class.

Shape letters: B batch (of all ranks where said so), C colour, H W image, Z latent, N noise inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gigagan.config import TrainStage
from gigagan.models.layers import pyramid
from gigagan.models.pixels import from_uint8
from gigagan.models.text import Features, Reader, rows_of
from gigagan.seeds import derived
from gigagan.training.augment import Augment, Draws
from gigagan.training.captions import RecentCaptions, mismatch
from gigagan.training.distributed.world import World
from gigagan.training.options import Chance
from gigagan.training.tasks import task_of
from gigagan.training.transfer import place


class Batch(Protocol):
    """What the loader gives: this rank's part of a global batch."""

    @property
    def images_BCHW(self) -> Tensor:
        """uint8."""

    @property
    def captions(self) -> list[str]:
        """One per image."""

    @property
    def planned_captions(self) -> list[str]:
        """Of the whole global batch, in its order."""


class Loader(Protocol):
    """Where batches come from: a function of the position."""

    def batches(self, images_seen: int = 0) -> Iterator[Batch]:
        """From there on, without end."""

    def captions_between(self, start: int, stop: int) -> list[str]:
        """Captions at these positions."""


class Samples(Loader, Protocol):
    """A loader of a set whose size is known."""

    @property
    def num_samples(self) -> int:
        """Of one epoch."""


class Inputs(NamedTuple):
    """One rank's part of a batch; everything random has been drawn."""

    real: list[Tensor]
    """Pyramid of real images in [−1, 1], largest first."""
    captions: Sequence[str]
    """Their captions …"""
    text: Features
    """… and what networks read of them."""
    z_BZ: Tensor
    other_text: Features
    """Another caption for every sample …"""
    has_other_B: tuple[bool, ...]
    """… where there is one: False if all captions lately were the same. Known to the host, which
    chooses rows by it without waiting for the device."""
    given: tuple[Tensor, ...] = ()
    """What G starts from besides, each B C H W: the upsampler's input and its noise."""
    noise_BN: Tensor | None = None
    """What a generator with noise inputs takes in them."""
    crop: tuple[int, int] = (0, 0)
    """Top and left corner of the crop on which LPIPS, or guidance, is measured."""
    draws: tuple[Draws | None, ...] = (None, None, None)
    """Augmentation of real and generated images in D's step, and of generated ones in G's."""
    candidates_BKZ: Tensor | None = None
    """Latents from which a warm start chooses one for each picture, in place of z."""
    chance: Chance = Chance()
    """What options draw at random."""
    images_seen: int = 0
    """Position, for what fades."""
    in_second_half_B: tuple[bool, ...] | None = None
    """Whether a sample is in the second half of the global batch; None: this is all of it."""


def recent_captions(
    config: TrainStage, captions_between: Callable[[int, int], list[str]], images_seen: int
) -> RecentCaptions:
    """The captions before this position, as an uninterrupted run would remember them."""
    recent = RecentCaptions(config.loss.recent_captions)
    start = max(images_seen - config.loss.recent_captions, 0)
    recent.add(captions_between(start, images_seen))
    return recent


def draw(
    config: TrainStage,
    augment: Augment,
    captions: Reader,
    recent: RecentCaptions,
    batch: Batch,
    images_seen: int,
    world: World,
    *,
    has_discriminator: bool = True,
    augmented_share: float = 1.0,
) -> Inputs:
    """Draw everything random of a step from (seed, position), for all ranks alike, and share it.

    Without a discriminator nothing meets another caption.
    """
    random = torch.Generator().manual_seed(derived(config.seed, images_seen))
    levels = config.discriminator.levels
    if config.warm_start.images:  # the regression is on every level that is drawn
        levels = config.network.num_images
    B = config.batch_size
    z_BZ = world.share(torch.randn(B, config.network.latent_dim, generator=random))
    is_hard_B = torch.rand(B, generator=random) < config.loss.hard_mismatches
    uniform_B = torch.rand(B, generator=random)
    rotation = float(torch.rand((), generator=random))

    real_BCHW = from_uint8(place(batch.images_BCHW, world.device))
    real = pyramid(real_BCHW, levels)
    given = task_of(config).given(real_BCHW, random, world)
    draws: list[Draws | None] = []
    for _ in range(3):  # of real and generated images in D's step, and of generated ones in G's
        drawn = augment.draw(B, random, augmented_share)
        draws.append(drawn and drawn.shared(world.share))
    chance = Chance.draw(config, random).shared(world.share)
    candidates_BKZ: Tensor | None = None
    if config.warm_start.images and (K := config.warm_start.candidates) > 1:
        candidates = torch.randn(B, K, config.network.latent_dim, generator=random)
        candidates_BKZ = world.share(candidates)

    recent.add(batch.planned_captions)
    text = captions(batch.captions)
    other_text, has_other_B = text, (False,) * len(batch.captions)
    if has_discriminator:
        others = mismatch(
            batch.planned_captions,
            recent,
            rows=world.rows(B),
            is_hard_B=is_hard_B.tolist(),
            uniform_B=uniform_B.tolist(),
            order_B=uniform_B.argsort().tolist(),
            rotation=rotation,
        )
        # A picture that could not be read was replaced by another, perhaps of that very caption.
        pairs = list(zip(others, batch.captions, strict=True))
        has_other_B = tuple(other is not None and other != own for other, own in pairs)
        other_text = captions([other or own for other, own in pairs])
    return Inputs(
        real=real,
        captions=batch.captions,
        text=text,
        z_BZ=z_BZ,
        other_text=other_text,
        has_other_B=has_other_B,
        given=given.images,
        noise_BN=given.noise_BN,
        crop=given.crop,
        draws=tuple(draws),
        candidates_BKZ=candidates_BKZ,
        chance=chance,
        images_seen=images_seen,
        in_second_half_B=tuple(row >= B // 2 for row in world.rows(B)),
    )


def split(inputs: Inputs, num_parts: int) -> list[Inputs]:
    """A batch as equal parts, for gradient accumulation.

    Raises:
        ValueError: the batch does not divide.
    """
    if num_parts == 1:
        return [inputs]
    B = len(inputs.z_BZ)
    if B % num_parts:
        raise ValueError(
            f"a rank's batch of {B} cannot be split into system.accumulate = {num_parts} equal "
            "parts: choose a divisor"
        )
    size = B // num_parts
    return [_rows(inputs, slice(start, start + size)) for start in range(0, B, size)]


def _rows(inputs: Inputs, rows: slice) -> Inputs:
    return inputs._replace(
        real=[x[rows] for x in inputs.real],
        captions=inputs.captions[rows],
        text=rows_of(inputs.text, rows),
        z_BZ=inputs.z_BZ[rows],
        other_text=rows_of(inputs.other_text, rows),
        has_other_B=inputs.has_other_B[rows],
        given=tuple(x[rows] for x in inputs.given),
        noise_BN=None if inputs.noise_BN is None else inputs.noise_BN[rows],
        draws=tuple(d and d.shared(lambda x: x[rows]) for d in inputs.draws),
        candidates_BKZ=None if inputs.candidates_BKZ is None else inputs.candidates_BKZ[rows],
        chance=inputs.chance.shared(lambda x: x[rows]),
        in_second_half_B=None if inputs.in_second_half_B is None else inputs.in_second_half_B[rows],
    )
