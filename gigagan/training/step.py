"""The losses of one step of each network. The maths of a run is here; the loop goes backward.

Shape letters: B batch, C colour, H W image, Z latent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gigagan import losses
from gigagan.config import CANDIDATE_SIDE, TrainStage
from gigagan.models.base import BaseGenerator, features_of
from gigagan.models.generator import Generator
from gigagan.models.heads import ProjectedHeads
from gigagan.models.stylegan_t import StyleGANT
from gigagan.models.text import scattered
from gigagan.models.upsampler import Upsampler
from gigagan.training.critic import Critic, Drawn, Players
from gigagan.training.inputs import Inputs
from gigagan.training.multi_scale import MultiScaleCritic
from gigagan.training.options import condition_kl
from gigagan.training.phases import Phase
from gigagan.training.projected import ProjectedCritic
from gigagan.training.tasks import Loss, Metrics, task_of

__all__ = [
    "Drawn",
    "Inputs",
    "Loss",
    "Metrics",
    "Players",
    "add",
    "critic_of",
    "discriminator_loss",
    "generator_loss",
    "r1_loss",
    "synthesize",
    "with_nearest_latents",
]

ADVERSARIAL = Phase()


def add(metrics: Metrics, terms: Metrics, share: float) -> None:
    """Add a part's metrics to those of its step."""
    for name, value in terms.items():
        metrics[name] = metrics.get(name, torch.zeros_like(value)) + share * value


@torch.no_grad()
def with_nearest_latents(generator: BaseGenerator | Upsampler, inputs: Inputs) -> Inputs:
    """With each picture's z the candidate whose small drawing is nearest to it, by L1.

    Conditional implicit maximum likelihood (Li et al. 2020, algorithm 1): every picture pulls its
    nearest drawing, so that no look of a condition is left out, and none is averaged with another.
    Theirs chooses anew once in a while, here each step does.
    """
    if inputs.candidates_BKZ is None:
        return inputs
    assert isinstance(generator, Generator)  # the settings refuse others
    B, K, _ = inputs.candidates_BKZ.shape
    text = generator.read(inputs.text).repeat_interleave(K)
    style_BS = generator.style(inputs.candidates_BKZ.flatten(0, 1), text)
    drawn_BKCHW = generator.synthesize(style_BS, text, side=CANDIDATE_SIDE)[0].unflatten(0, (B, K))
    (real_BCHW,) = [x for x in inputs.real if x.shape[-1] == drawn_BKCHW.shape[-1]]
    best_B = (drawn_BKCHW - real_BCHW[:, None]).abs().flatten(2).mean(2).argmin(1)
    rows_B = torch.arange(B, device=best_B.device)
    return inputs._replace(z_BZ=inputs.candidates_BKZ[rows_B, best_B])


def synthesize(generator: BaseGenerator | Upsampler, inputs: Inputs) -> Drawn:
    """The generated pyramid, largest first."""
    noise = () if inputs.noise_BN is None else (inputs.noise_BN,)
    if (noise_BT := inputs.chance.condition_BT) is not None:
        return _from_distribution(generator, inputs, noise_BT)
    text = features_of(generator, inputs.captions, lambda captions: inputs.text)
    return Drawn(generator(*inputs.given, inputs.z_BZ, text, *noise))


def _from_distribution(
    generator: BaseGenerator | Upsampler, inputs: Inputs, noise_BT: Tensor
) -> Drawn:
    """With captions drawn from what conditioning augmentation makes of them."""
    assert not isinstance(generator, StyleGANT)  # the settings refuse it
    text = scattered(generator.read(inputs.text), noise_BT)
    style_BS = generator.style(inputs.z_BZ, text)
    if isinstance(generator, Upsampler):
        small_BCHW, noise_BCHW = inputs.given
        drawn = Drawn(generator.synthesize(small_BCHW, noise_BCHW, style_BS, text))
    else:
        drawn = Drawn(generator.synthesize(style_BS, text))
    drawn.text = text
    return drawn


def critic_of(players: Players) -> Critic:
    """Whose losses a run's discriminator has."""
    is_projected = isinstance(players.discriminator, ProjectedHeads)
    return ProjectedCritic(players) if is_projected else MultiScaleCritic(players)


def discriminator_loss(
    players: Players,
    config: TrainStage,
    inputs: Inputs,
    fakes: Sequence[Tensor],
    *,
    auxiliary_strength: float,
) -> Loss:
    """D's loss: real, generated, and images beside another caption."""
    return critic_of(players).discriminator_loss(config, inputs, fakes, auxiliary_strength)


def r1_loss(players: Players, inputs: Inputs) -> Loss:
    """R1 of D on the real pyramid with its captions, in float32."""
    return critic_of(players).penalty(inputs)


def generator_loss(
    players: Players,
    config: TrainStage,
    inputs: Inputs,
    fakes: Sequence[Tensor],
    *,
    auxiliary_strength: float,
    phase: Phase = ADVERSARIAL,
) -> Loss:
    """G's loss; D's parameters should not require gradients, which would be computed in vain.

    What the phase gives no weight is not computed.
    """
    terms: list[Tensor] = []
    metrics: Metrics = {}
    if phase.adversarial > 0:
        critic = critic_of(players)
        loss, metrics = critic.generator_loss(config, inputs, fakes, auxiliary_strength)
        terms.append(phase.adversarial * loss)
    auxiliary = players.auxiliary
    weight = config.loss.guidance if phase.guidance is None else phase.guidance
    if phase.adversarial > 0 and auxiliary and auxiliary_strength > 0 and weight:
        angle = auxiliary.guidance(fakes[0], inputs.crop, inputs.captions, inputs.text)
        terms.append(phase.adversarial * auxiliary_strength * weight * angle)
        metrics["g/guidance"] = angle.detach()
    if phase.regression > 0:
        gradients = config.warm_start.gradients
        loss = losses.regression(fakes, inputs.real[: len(fakes)], gradients=gradients)
        terms.append(phase.regression * loss)
        metrics["g/regression"] = loss.detach()
    if isinstance(fakes, Drawn) and fakes.text is not None:
        terms.append(config.options.conditioning_kl * (kl := condition_kl(fakes.text)))
        metrics["g/conditioning_kl"] = kl.detach()
    own = task_of(config).own_loss(players.perceptual, inputs, fakes[0])
    if own is not None:
        terms.append(own.loss)
        metrics |= own.metrics
    return Loss(torch.stack(terms).sum(), metrics)
