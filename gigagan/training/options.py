"""Terms of the literature beside the losses of both critics: what a step adds where one is on.

The maths is in `losses`, the weights are in `OptionsConfig`; here features meet them. What learns
(`models.options`) is a part of D: its optimizer, its checkpoint and its ranks have them with it.

Shape letters: B batch, C colour, H W image, F D's features of a picture, T text width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gigagan import losses
from gigagan.config import TrainStage
from gigagan.models.options import OptionHeads
from gigagan.models.text import Text
from gigagan.training.augment import Draws
from gigagan.training.tasks import Loss

if TYPE_CHECKING:
    from gigagan.training.critic import Critic
    from gigagan.training.inputs import Inputs


MIX_NOISE = 0.05
"""Standard deviation of what AdaptiveMix adds to a mix of features, as in its code."""


class Chance(NamedTuple):
    """What options draw at random of a batch; None where one is off."""

    mix_B: Tensor | None = None
    """Share λ of each picture in its mix with the next one."""
    mix_noise_BF: Tensor | None = None
    """What is added to the mix of features."""
    condition_BT: Tensor | None = None
    """Noise of conditioning augmentation."""

    @classmethod
    def draw(cls, config: TrainStage, random: torch.Generator) -> Chance:
        """For the batch of all ranks, on the CPU."""
        B, options, text = config.batch_size, config.options, config.network.text
        mix_B = mix_noise_BF = condition_BT = None
        if options.adaptive_mix:
            mix_B = torch.rand(B, generator=random)
            width = config.discriminator.embedding_width
            mix_noise_BF = MIX_NOISE * torch.randn(B, width, generator=random)
        if text is not None and text.conditioning_augmentation:
            condition_BT = torch.randn(B, text.width, generator=random)
        return cls(mix_B, mix_noise_BF, condition_BT)

    def shared(self, share: Callable[[Tensor], Tensor]) -> Chance:
        """Every tensor through `share`: a rank's rows of the whole batch, on its device."""
        return Chance(*(None if x is None else share(x) for x in self))


def discriminator_terms(
    critic: Critic, config: TrainStage, inputs: Inputs, fakes: Sequence[Tensor], seen_BF: Tensor
) -> Loss:
    """What options add to D's loss.

    `seen_BF` are D's features of the 2 B pictures as they were augmented: real, then generated.
    """
    options = config.options
    real_BF, fake_BF = seen_BF.chunk(2)
    terms: dict[str, tuple[float, Tensor]] = {}
    if options.adaptive_mix:
        terms["d/adaptive_mix"] = options.adaptive_mix, _mixed(critic, config, inputs, real_BF)
    if options.augself:
        heads, levels = _heads(critic), config.discriminator.levels
        pictures = [x.detach() for x in fakes[:levels]]
        both = [torch.cat(pair) for pair in zip(inputs.real[:levels], pictures, strict=True)]
        told = heads.tell(seen_BF, critic.embed(_unaugmented(critic, both, inputs), num_sets=2))
        real, fake = zip(*(x.chunk(2) for x in told), strict=True)
        error = _error(critic, inputs.real[:levels], real, inputs.draws[0], 1)
        error = error + _error(critic, inputs.real[:levels], fake, inputs.draws[1], -1)
        terms["d/augself"] = options.augself, error
    if options.classifier:
        classify = _heads(critic).classify
        loss = losses.adc_discriminator(classify(real_BF), classify(fake_BF), _classes(inputs))
        terms["d/classifier"] = options.classifier, loss
    return _summed(terms, seen_BF)


def generator_terms(
    critic: Critic,
    config: TrainStage,
    inputs: Inputs,
    fakes: Sequence[Tensor],
    seen_BF: Tensor,
    draws: Draws | None,
) -> Loss:
    """What options add to G's loss through D.

    `seen_BF` are D's features of the B generated pictures, augmented by these `draws`.
    """
    options = config.options
    terms: dict[str, tuple[float, Tensor]] = {}
    if options.augself_generator:
        levels = list(fakes[: config.discriminator.levels])
        plain_BF = critic.embed(_unaugmented(critic, levels, inputs))
        told = _heads(critic).tell(seen_BF, plain_BF)
        error = _error(critic, levels, told, draws, 1) - _error(critic, levels, told, draws, -1)
        terms["g/augself"] = options.augself_generator, error
    if options.entropy:
        entropy = losses.neighbour_entropy(critic.players.world.gather_with_gradient(seen_BF))
        terms["g/entropy"] = -options.entropy, entropy
    if options.classifier:
        loss = losses.adc_generator(_heads(critic).classify(seen_BF), _classes(inputs))
        terms["g/classifier"] = options.classifier, loss
    return _summed(terms, seen_BF)


def condition_kl(text: Text) -> Tensor:
    """Divergence of the captions' distributions from N(0, 1)."""
    assert text.mean_BT is not None
    assert text.log_variance_BT is not None
    return losses.gaussian_kl(text.mean_BT, text.log_variance_BT)


def _mixed(critic: Critic, config: TrainStage, inputs: Inputs, real_BF: Tensor) -> Tensor:
    """AdaptiveMix of each augmented real picture with the next one of this rank and part."""
    share_B, noise_BF = inputs.chance.mix_B, inputs.chance.mix_noise_BF
    assert share_B is not None
    assert noise_BF is not None
    plain, seen = inputs.real[: config.discriminator.levels], inputs.images_seen
    reals = critic.players.augment.apply(plain, inputs.draws[0], seen)
    mixes = [x.roll(-1, 0).lerp(x, share_B[:, None, None, None].to(x.dtype)) for x in reals]
    mixed_BF = critic.embed(mixes)
    return losses.adaptive_mix(mixed_BF, real_BF, real_BF.roll(-1, 0), share_B, noise_BF)


def _unaugmented(critic: Critic, levels: list[Tensor], inputs: Inputs) -> list[Tensor]:
    """Pictures as D would see them but for their augmentation."""
    return critic.players.augment.apply(levels, None, inputs.images_seen)


def _error(
    critic: Critic,
    levels: Sequence[Tensor],
    told: Sequence[Tensor],
    draws: Draws | None,
    sign: int,
) -> Tensor:
    """Error of what D tells of the augmentation, or of its opposite; 0 where none was augmented."""
    if draws is None:
        return told[0].new_zeros(())
    parameters = [sign * x for x in critic.players.augment.parameters(levels, draws)]
    return losses.augmentation_error(told, parameters, draws.is_on_B)


def _heads(critic: Critic) -> OptionHeads:
    heads = critic.players.discriminator.options
    assert isinstance(heads, OptionHeads)
    return heads


def _classes(inputs: Inputs) -> Tensor:
    """Class numbers: what a class-conditional network reads."""
    assert isinstance(inputs.text, Tensor)
    return inputs.text


def _summed(terms: dict[str, tuple[float, Tensor]], like: Tensor) -> Loss:
    loss = sum((weight * term for weight, term in terms.values()), like.new_zeros(()))
    return Loss(loss, {name: term.detach() for name, (_, term) in terms.items()})
