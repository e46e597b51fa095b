"""StyleGAN-T's critic: heads on the features of a frozen image encoder (Sauer et al. 2023, 3.2).

No R1, no discriminator of its own; the encoder sees a picture once for both steps.

Shape letters: B batch, N positions, T text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gigagan import losses
from gigagan.config import TrainStage
from gigagan.models.heads import ProjectedHeads
from gigagan.training.augment import Draws, mean_sign
from gigagan.training.auxiliary import see
from gigagan.training.critic import Critic, Drawn, mean_logit, of_pictures
from gigagan.training.inputs import Inputs
from gigagan.training.multi_scale import mismatched_rows
from gigagan.training.tasks import Loss, Metrics
from gigagan.training.transfer import place


class ProjectedCritic(Critic):
    """One prediction per stage of the encoder."""

    has_penalty: ClassVar[bool] = False

    @property
    def heads(self) -> ProjectedHeads:
        """What is trained."""
        heads = self.players.discriminator
        assert isinstance(heads, ProjectedHeads)
        return heads

    def discriminator_loss(
        self, config: TrainStage, inputs: Inputs, fakes: Sequence[Tensor], strength: float
    ) -> Loss:
        """Real pictures, generated ones, and pictures beside another caption (weight `matching`).

        The published code shows D generated pictures of another z than G's step; here both steps
        share them, as they do the encoder's features.
        """
        weights, is_hinge = self.players.weights, config.loss.adversarial == "hinge"
        real_loss = losses.hinge_real if is_hinge else losses.as_real
        fake_loss = losses.hinge_fake if is_hinge else losses.as_fake
        heads, B = self.heads, len(inputs.z_BZ)
        with torch.no_grad():
            real = self._see(inputs.real[0], inputs, inputs.draws[0])
        drawn = [stage.detach() for stage in self._stages(fakes, inputs)]
        text_BT = heads.read(inputs.text)
        both = [torch.cat(pair) for pair in zip(real, drawn, strict=True)]
        maps = heads.trunk(both, num_sets=2)
        logits = heads.predict(maps, None if text_BT is None else text_BT.repeat(2, 1))
        real_logits, fake_logits = [x[:B] for x in logits], [x[B:] for x in logits]
        loss_real = real_loss(real_logits, weights)
        loss_fake = fake_loss(fake_logits, weights)
        loss = loss_real + loss_fake
        metrics = {
            "d/real": loss_real.detach(),
            "d/fake": loss_fake.detach(),
            "d/logit_real": mean_logit(real_logits, weights),
            "d/logit_fake": mean_logit(fake_logits, weights),
            "d/sign_real": mean_sign(real_logits, weights),
        }
        if config.loss.matching > 0:  # ranks average these: each has them, whatever its captions
            metrics |= dict.fromkeys(("d/mismatch", "d/logit_mismatch"), loss_real.new_zeros(()))
        rows, samples = mismatched_rows(
            config.loss.matching_images, inputs.has_other_B, inputs.in_second_half_B
        )
        if config.loss.matching > 0 and rows:
            chosen = place(torch.tensor([rows, samples], device="cpu"), maps[0].device)
            picked = [x_BMN.index_select(0, chosen[0]) for x_BMN in maps]
            other_BT = heads.read(inputs.other_text)
            assert other_BT is not None  # the settings refuse a weight without captions
            mismatched = heads.predict(picked, other_BT.index_select(0, chosen[1]))
            loss_match = len(rows) / B * fake_loss(mismatched, weights)
            loss = loss + config.loss.matching * loss_match
            metrics["d/mismatch"] = loss_match.detach()
            metrics["d/logit_mismatch"] = mean_logit(mismatched, weights)
        return Loss(loss, metrics)

    def generator_loss(
        self, config: TrainStage, inputs: Inputs, fakes: Sequence[Tensor], strength: float
    ) -> tuple[Tensor, Metrics]:
        """Through the heads as D's step has left them, and CLIP guidance."""
        with torch.no_grad():
            text_BT = self.heads.read(inputs.text)
        logits = self.heads(self._stages(fakes, inputs), text_BT)
        is_hinge = config.loss.adversarial == "hinge"
        loss_of = losses.hinge_generator if is_hinge else losses.as_real
        loss = loss_of(logits, self.players.weights)
        return loss, {"g/adversarial": loss.detach()}

    def judge(self, images: Sequence[Tensor], inputs: Inputs) -> Tensor:
        """By the heads of all stages."""
        stages = self._see(images[0], inputs, None)
        return of_pictures(self.heads(stages, self.heads.read(inputs.text)), self.players.weights)

    def penalty(self, inputs: Inputs) -> Loss:
        """There is none: the settings refuse a weight for it."""
        raise TypeError("R1 is not defined for heads on a frozen encoder")

    def _stages(self, fakes: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
        """Features of generated pictures, with their way back to G; seen once for both steps."""
        if not isinstance(fakes, Drawn):
            return self._see(fakes[0], inputs, inputs.draws[1])
        if fakes.stages is None:
            fakes.stages = self._see(fakes[0], inputs, inputs.draws[1])
        return fakes.stages

    def _see(self, images_BCHW: Tensor, inputs: Inputs, draws: Draws | None) -> list[Tensor]:
        """What the encoder makes of pictures, augmented."""
        encoder = self.players.encoder
        assert encoder is not None
        (seen_BCHW,) = self.players.augment.apply([images_BCHW], draws, inputs.images_seen)
        return list(see(encoder, seen_BCHW, side=self.heads.config.side, clamps=False).stages)
