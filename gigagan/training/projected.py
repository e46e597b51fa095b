"""StyleGAN-T's critic: heads on the features of a frozen image encoder (Sauer et al. 2023, 3.2).

No R1, no discriminator of its own; the encoder sees a picture once for both steps.

Shape letters: B batch, N positions, T text width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gigagan.config import TrainStage
from gigagan.models.encoders import ImageEncoder
from gigagan.models.heads import ProjectedHeads
from gigagan.models.layers import full_precision
from gigagan.training import options
from gigagan.training.augment import Draws
from gigagan.training.auxiliary import see
from gigagan.training.critic import Critic, Drawn, of_pictures
from gigagan.training.inputs import Inputs
from gigagan.training.tasks import Loss, Metrics


class ProjectedCritic(Critic):
    """One prediction per stage of the encoder."""

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
        heads, B = self.heads, len(inputs.z_BZ)
        with torch.no_grad():
            real = self._see(inputs.real[0], inputs, inputs.draws[0])
        drawn = [stage.detach() for stage in self._stages(fakes, inputs)]
        text_BT = heads.read(inputs.text)
        both = [torch.cat(pair) for pair in zip(real, drawn, strict=True)]
        maps = heads.trunk(both, num_sets=2)
        logits = heads.predict(maps, None if text_BT is None else text_BT.repeat(2, 1))
        real_logits, fake_logits = [x[:B] for x in logits], [x[B:] for x in logits]
        loss, metrics = self.told_apart(config, real_logits, fake_logits)

        def beside_other(rows: Tensor, samples: Tensor) -> list[Tensor]:
            other_BT = heads.read(inputs.other_text)
            assert other_BT is not None  # the settings refuse a weight without captions
            picked = [x_BMN.index_select(0, rows) for x_BMN in maps]
            return heads.predict(picked, other_BT.index_select(0, samples))

        loss, more = self.mismatched(config, inputs, loss, beside_other)
        metrics |= more
        if config.options.reads_features:
            extra = options.discriminator_terms(self, config, inputs, fakes, _embedding(maps))
            loss, metrics = loss + extra.loss, metrics | extra.metrics
        return Loss(loss, metrics)

    def generator_loss(
        self, config: TrainStage, inputs: Inputs, fakes: Sequence[Tensor], strength: float
    ) -> tuple[Tensor, Metrics]:
        """Through the heads as D's step has left them."""
        with torch.no_grad():
            text_BT = self.heads.read(inputs.text)
        maps = self.heads.trunk(self._stages(fakes, inputs))
        loss = self.game(config).generator(self.heads.predict(maps, text_BT), self.players.weights)
        metrics = {"g/adversarial": loss.detach()}
        if config.options.reads_features:
            seen_BF = _embedding(maps)
            own = options.generator_terms(self, config, inputs, fakes, seen_BF, inputs.draws[1])
            loss, metrics = loss + own.loss, metrics | own.metrics
        return loss, metrics

    def judge(self, images: Sequence[Tensor], inputs: Inputs) -> Tensor:
        """By the heads of all stages."""
        stages = self._see(images[0], inputs, None)
        return of_pictures(self.heads(stages, self.heads.read(inputs.text)), self.players.weights)

    def embed(self, images: Sequence[Tensor], *, num_sets: int = 1) -> Tensor:
        """By the mean over positions of what meets the caption, of all stages."""
        stages = see(self._encoder, images[0], side=self.heads.config.side).stages
        return _embedding(self.heads.trunk(stages, num_sets=num_sets))

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
        (seen_BCHW,) = self.players.augment.apply([images_BCHW], draws, inputs.images_seen)
        return list(see(self._encoder, seen_BCHW, side=self.heads.config.side).stages)

    @property
    def _encoder(self) -> ImageEncoder:
        encoder = self.players.encoder
        assert encoder is not None
        return encoder


def _embedding(maps: Sequence[Tensor]) -> Tensor:
    """What the heads make of a picture before it meets a caption, B M N each → B F."""
    return torch.cat([full_precision(x_BMN).mean(2) for x_BMN in maps], dim=1)
