"""What judges pictures beside captions. The step knows a `Critic`, and no kind of it.

Shape letters: B batch, C colour, H W image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from gigagan import losses
from gigagan.config import AugmentConfig, TrainStage
from gigagan.models.base import BaseGenerator
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import ImageEncoder
from gigagan.models.heads import ProjectedHeads
from gigagan.models.layers import full_precision
from gigagan.models.text import Text
from gigagan.models.upsampler import Upsampler
from gigagan.training.augment import Augment, mean_sign
from gigagan.training.auxiliary import Auxiliary
from gigagan.training.distributed.world import World
from gigagan.training.inputs import Inputs
from gigagan.training.tasks import Loss, Metrics
from gigagan.training.transfer import place


class Drawn(list[Tensor]):
    """A generated pyramid, largest first, and what a frozen encoder sees in it.

    An encoder that is not trained sees the same in D's step and in G's: one pass serves both.
    """

    def __init__(self, images: Iterable[Tensor]) -> None:
        super().__init__(images)
        self.stages: list[Tensor] | None = None
        """Features with their way back to the generator, once a critic has looked."""
        self.text: Text | None = None
        """The captions' distributions, where they have them."""


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
    world: World = field(default_factory=World)
    """The entropy compares the images of all ranks."""


class Critic(ABC):
    """D's side of a step: its losses, and what of them reaches G. It holds no state of its own."""

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
    def embed(self, images: Sequence[Tensor], *, num_sets: int = 1) -> Tensor:
        """D's features of pictures as they are, without a caption: a pyramid → B F.

        They are `num_sets` sets laid end to end, over which statistics are taken apart.
        """

    @abstractmethod
    def penalty(self, inputs: Inputs) -> Loss:
        """R1 on the real pyramid with its captions, in float32."""

    @staticmethod
    def game(config: TrainStage) -> losses.Adversarial:
        """What logits are for."""
        return losses.ADVERSARIAL[config.loss.adversarial]

    def told_apart(
        self, config: TrainStage, real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]
    ) -> Loss:
        """D's loss on real and generated images beside their captions."""
        weights, game = self.players.weights, self.game(config)
        loss_real, loss_fake = game.real(real_logits, weights), game.fake(fake_logits, weights)
        metrics = {
            "d/real": loss_real.detach(),
            "d/fake": loss_fake.detach(),
            "d/logit_real": mean_logit(real_logits, weights),
            "d/logit_fake": mean_logit(fake_logits, weights),
            "d/sign_real": mean_sign(real_logits, weights),
        }
        return Loss(loss_real + loss_fake, metrics)

    def mismatched(
        self,
        config: TrainStage,
        inputs: Inputs,
        loss: Tensor,
        beside_other: Callable[[Tensor, Tensor], list[Tensor]],
    ) -> Loss:
        """Matching-aware: `loss`, and that images with the caption of another count as fake.

        `beside_other` gives the logits of rows of the 2 B images beside the other captions of
        these samples.
        """
        weight = config.loss.matching
        if weight == 0:
            return Loss(loss, {})
        names = "d/mismatch", "d/logit_mismatch"
        rows, samples = mismatched_rows(
            config.loss.matching_images, inputs.has_other_B, inputs.in_second_half_B
        )
        if not rows:  # ranks average these: each has them, whatever its captions are
            return Loss(loss, dict.fromkeys(names, loss.new_zeros(())))
        chosen = place(torch.tensor([rows, samples], device="cpu"), loss.device)
        logits = beside_other(chosen[0], chosen[1])
        # The mean over all samples: one without another caption adds nothing. So parts of a
        # batch, and ranks, have the mean of the whole.
        share = len(rows) / len(inputs.has_other_B)
        loss_match = share * self.game(config).fake(logits, self.players.weights)
        found = loss_match.detach(), mean_logit(logits, self.players.weights)
        return Loss(loss + weight * loss_match, dict(zip(names, found, strict=True)))


def mismatched_rows(
    images: Literal["real", "half", "both"],
    has_other_B: Sequence[bool],
    in_second_half_B: Sequence[bool] | None = None,
) -> tuple[list[int], list[int]]:
    """Which of the 2 B images (real, then generated) meet whose other caption: rows, samples.

    Samples without another caption take no part. Of `half`, the generated images are those of the
    second half of the global batch, so that ranks and parts choose as one process would.
    """
    B = len(has_other_B)
    second_B = in_second_half_B or [sample >= B // 2 for sample in range(B)]
    pairs = {
        "real": [(sample, sample) for sample in range(B)],
        "half": [(sample + B * second_B[sample], sample) for sample in range(B)],
        "both": [(sample + start, sample) for start in (0, B) for sample in range(B)],
    }[images]
    kept = [(row, sample) for row, sample in pairs if has_other_B[sample]]
    return [row for row, _ in kept], [sample for _, sample in kept]


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
