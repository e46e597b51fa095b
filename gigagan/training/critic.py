"""What judges pictures beside captions. The step knows a `Critic`, and no kind of it.

Shape letters: B batch, C colour, H W image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from gigagan.config import AugmentConfig, TrainStage
from gigagan.models.base import BaseGenerator
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import ImageEncoder
from gigagan.models.heads import ProjectedHeads
from gigagan.models.layers import full_precision
from gigagan.models.upsampler import Upsampler
from gigagan.training.augment import Augment
from gigagan.training.auxiliary import Auxiliary
from gigagan.training.inputs import Inputs
from gigagan.training.tasks import Loss, Metrics


class Drawn(list[Tensor]):
    """A generated pyramid, largest first, and what a frozen encoder sees in it.

    An encoder that is not trained sees the same in D's step and in G's: one pass serves both.
    """

    def __init__(self, images: Iterable[Tensor]) -> None:
        super().__init__(images)
        self.stages: list[Tensor] | None = None
        """Features with their way back to the generator, once a critic has looked."""


@dataclass(frozen=True)
class Players:
    """The networks of a run and how their predictions are weighted."""

    generator: BaseGenerator | Upsampler
    discriminator: Discriminator | ProjectedHeads
    weights: list[float]
    """Of the predictions, in the discriminator's order; sum 1."""
    auxiliary: Auxiliary | None
    perceptual: nn.Module | None
    """What the task's own loss compares pictures by, if it does."""
    augment: Augment = field(default_factory=lambda: Augment(AugmentConfig()))
    """What is done to all images that D sees; nothing by default."""
    encoder: ImageEncoder | None = None
    """The frozen encoder on whose features a projected critic's heads are."""


class Critic(ABC):
    """D's side of a step: its losses, and what of them reaches G. It holds no state of its own."""

    has_penalty: ClassVar[bool] = True
    """Whether R1 is defined for it."""

    def __init__(self, players: Players) -> None:
        self.players = players

    @abstractmethod
    def discriminator_loss(
        self, config: TrainStage, inputs: Inputs, fakes: Sequence[Tensor], strength: float
    ) -> Loss:
        """Real, generated, and images beside another caption.

        `strength` is the weight of what the frozen image encoder of the auxiliary losses says.
        """

    @abstractmethod
    def generator_loss(
        self, config: TrainStage, inputs: Inputs, fakes: Sequence[Tensor], strength: float
    ) -> tuple[Tensor, Metrics]:
        """What reaches G."""

    @abstractmethod
    def judge(self, images: Sequence[Tensor], inputs: Inputs) -> Tensor:
        """The weighted mean logit of pictures as they are, beside the captions: a pyramid → B."""

    @abstractmethod
    def penalty(self, inputs: Inputs) -> Loss:
        """R1 on the real pyramid with its captions, in float32."""


def of_pictures(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Each picture's mean logit over positions, weighted over predictions: B."""
    return torch.stack(
        [w * full_precision(x).flatten(1).mean(1) for w, x in zip(weights, logits, strict=True)]
    ).sum(0)


def mean_logit(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Of all predictions, weighted as they are in the loss; detached."""
    return torch.stack(
        [w * full_precision(x.detach()).mean() for w, x in zip(weights, logits, strict=True)]
    ).sum()
