"""The critic of GigaGAN: the multi-scale discriminator (section 3.4), with R1.

Beside it, where their weights are set, the heads on a frozen encoder (vision-aided) and the
contrastive loss.

Shape letters: B batch, C colour, H W image, T text width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gigagan import losses
from gigagan.config import TrainStage
from gigagan.models.discriminator import Discriminator, LevelMaps
from gigagan.models.layers import full_precision
from gigagan.models.text import Features
from gigagan.training import options
from gigagan.training.critic import Critic, of_pictures
from gigagan.training.inputs import Inputs
from gigagan.training.tasks import Loss, Metrics
from gigagan.training.transfer import place


class MultiScaleCritic(Critic):
    """Predictions (i, j) of pyramid level i after stage j."""

    @property
    def network(self) -> Discriminator:
        """D."""
        network = self.players.discriminator
        assert isinstance(network, Discriminator)
        return network

    def discriminator_loss(
        self, config: TrainStage, inputs: Inputs, fakes: Sequence[Tensor], strength: float
    ) -> Loss:
        """Real and generated images share one pass of the trunk, and an image's two captions do."""
        players, d = self.players, self.network
        B = len(inputs.z_BZ)
        levels = d.config.levels
        augment, seen = players.augment, inputs.images_seen
        reals = augment.apply(inputs.real[:levels], inputs.draws[0], seen)
        drawn = augment.apply([x.detach() for x in fakes[:levels]], inputs.draws[1], seen)
        both = [torch.cat(pair) for pair in zip(reals, drawn, strict=True)]
        text_BT = d.read(inputs.text)
        features = d.trunk(both, num_sets=2)
        logits = d.predict(features, None if text_BT is None else text_BT.repeat(2, 1))
        real_logits, fake_logits = [x[:B] for x in logits], [x[B:] for x in logits]
        loss, metrics = self.told_apart(config, real_logits, fake_logits)

        def beside_other(rows: Tensor, samples: Tensor) -> list[Tensor]:
            other_BT = _read(d, inputs.other_text).index_select(0, samples)
            return d.predict(_rows(features, rows), other_BT)

        loss, more = self.mismatched(config, inputs, loss, beside_other)
        metrics |= more
        if config.options.reads_features:
            extra = options.discriminator_terms(self, config, inputs, fakes, _embedding(features))
            loss, metrics = loss + extra.loss, metrics | extra.metrics

        # Vision-aided: the heads on the frozen encoder.
        if players.auxiliary is not None and strength > 0:
            fixed_BT = None if text_BT is None else text_BT.detach()
            loss_vision = players.auxiliary.discriminator_loss(reals[0], drawn[0], fixed_BT)
            loss = loss + loss_vision
            metrics["d/vision"] = loss_vision.detach()
        return Loss(loss, metrics)

    def generator_loss(
        self, config: TrainStage, inputs: Inputs, fakes: Sequence[Tensor], strength: float
    ) -> tuple[Tensor, Metrics]:
        """Through D, beside its caption and another, and through the frozen image encoder."""
        players, d = self.players, self.network
        with torch.no_grad():
            text_BT = d.read(inputs.text)
        seen = players.augment.apply(
            list(fakes[: d.config.levels]), inputs.draws[2], inputs.images_seen
        )
        features = d.trunk(seen)
        logits = d.predict(features, text_BT)
        loss_adversarial = self.game(config).generator(logits, players.weights)
        loss = loss_adversarial
        metrics = {"g/adversarial": loss_adversarial.detach()}
        if config.loss.generator_matching > 0:
            metrics["g/mismatch"] = loss_adversarial.new_zeros(())
        if config.loss.generator_matching > 0 and any(inputs.has_other_B):
            there = [row for row, has_other in enumerate(inputs.has_other_B) if has_other]
            rows = place(torch.tensor(there, device="cpu"), seen[0].device)
            picked = _rows(features, rows)
            with torch.no_grad():
                other_BT = _read(d, inputs.other_text).index_select(0, rows)
            present = len(other_BT) / len(inputs.has_other_B)
            loss_match = present * losses.as_fake(d.predict(picked, other_BT), players.weights)
            loss = loss + config.loss.generator_matching * loss_match
            metrics["g/mismatch"] = loss_match.detach()
        if config.options.reads_features:
            seen_BF = _embedding(features)
            own = options.generator_terms(self, config, inputs, fakes, seen_BF, inputs.draws[2])
            loss, metrics = loss + own.loss, metrics | own.metrics
        if players.auxiliary is not None and strength > 0:
            vision, contrastive = players.auxiliary.generator_losses(
                seen[0], fakes[0], text_BT, inputs.captions, inputs.text
            )
            extra = config.loss.vision * vision + config.loss.contrastive * contrastive
            loss = loss + strength * extra
            metrics |= {"g/vision": vision.detach(), "g/contrastive": contrastive.detach()}
        return loss, metrics

    def judge(self, images: Sequence[Tensor], inputs: Inputs) -> Tensor:
        """By all predictions (i, j)."""
        logits = self.network(list(images[: self.network.config.levels]), inputs.text)
        return of_pictures(logits, self.players.weights)

    def embed(self, images: Sequence[Tensor], *, num_sets: int = 1) -> Tensor:
        """By the largest picture's maps behind the last stage."""
        levels = list(images[: self.network.config.levels])
        return _embedding(self.network.trunk(levels, num_sets=num_sets))

    def penalty(self, inputs: Inputs) -> Loss:
        """R1 with respect to the images before their augmentation (StyleGAN2-ADA)."""
        players, d = self.players, self.network
        real = [full_precision(x.detach()).requires_grad_() for x in inputs.real[: d.config.levels]]
        seen = players.augment.apply(real, inputs.draws[0], inputs.images_seen)
        logits = d(seen, inputs.text, double_backward=True)
        penalty = losses.r1_penalty(logits, players.weights, real)
        return Loss(penalty, {"d/r1": penalty.detach()})


def _embedding(features: Sequence[LevelMaps]) -> Tensor:
    """The largest picture's maps behind the last stage, of 1 px: B F."""
    return [f.maps_BCHW for f in features if f.level == 0][-1].flatten(1)


def _rows(features: Sequence[LevelMaps], rows: Tensor) -> list[LevelMaps]:
    """Some pictures of what the trunk gave."""
    return [f._replace(maps_BCHW=f.maps_BCHW.index_select(0, rows)) for f in features]


def _read(d: Discriminator, other: Features) -> Tensor:
    """t_D of other captions or classes: the settings refuse a weight for them without either."""
    text_BT = d.read(other)
    assert text_BT is not None
    return text_BT
