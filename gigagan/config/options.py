"""Terms of the literature that may stand beside the losses, each with a weight; none is on."""

from __future__ import annotations

from pydantic import Field

from gigagan.common.settings import Frozen
from gigagan.config.networks import (
    DiscriminatorConfig,
    GeneratorConfig,
    UpsamplerConfig,
)
from gigagan.config.projected import ProjectedConfig
from gigagan.config.stylegan_t import StyleTConfig


class OptionsConfig(Frozen):
    """Weights of terms that neither paper has; docs/options.md says what each brought here.

    At 0 a term is not computed, has no weights and draws no random number. The features are D's
    for a picture without its caption: what leaves the last stage of the multi-scale
    discriminator, or the mean over positions of what meets the caption in projected heads."""

    adaptive_mix: float = Field(0.0, ge=0)
    """Features of a mix of two real pictures lie where the mix of their features does
    (AdaptiveMix, Liu et al. 2023, arXiv:2303.01559; code: 1). Costs D a pass over mixes."""
    augself: float = Field(0.0, ge=0)
    """D tells how a real picture was augmented, and the opposite of a generated one (AugSelf-GAN,
    Hou et al. 2023, arXiv:2205.15677; paper: 1). Costs D a pass over pictures as they were."""
    augself_generator: float = Field(0.0, ge=0)
    """G draws pictures of which that is told as of real ones (paper: 1)."""
    entropy: float = Field(0.0, ge=0)
    """G spreads what it draws: the distance of a picture's features to the nearest of the batch
    (MEE, Liu et al. 2022, arXiv:2208.12055; code: 1, of other features)."""
    classifier: float = Field(0.0, ge=0)
    """D classifies into real and generated pictures of each class, and G passes for the real ones
    of its class (ADC-GAN, Hou et al. 2022, arXiv:2107.10060; paper: 1)."""
    conditioning_kl: float = Field(0.0, ge=0)
    """Divergence of a caption's distribution from N(0, 1), where
    `text.conditioning_augmentation` of the generator makes it one (StackGAN, Zhang et al. 2017,
    arXiv:1612.03242; code: 1)."""

    @property
    def reads_features(self) -> bool:
        """Whether any term is about D's features."""
        return any((self.adaptive_mix, self.augself, self.entropy, self.classifier))


def check_options(
    options: OptionsConfig,
    generator: GeneratorConfig | StyleTConfig | UpsamplerConfig,
    discriminator: DiscriminatorConfig | ProjectedConfig,
    diffaugment: tuple[str, ...],
) -> None:
    """Refuse terms that have nothing to work on.

    Raises:
        ValueError: names the setting, its value and the remedy.
    """
    if options.augself and not diffaugment:
        raise ValueError(
            f"options.augself = {options.augself}, but no picture is augmented: name something in "
            "augment.diffaugment, or set it to 0"
        )
    if options.augself_generator and not options.augself:
        raise ValueError(
            f"options.augself_generator = {options.augself_generator}, but D learns to tell "
            "nothing with options.augself = 0: give that a weight, or set it to 0"
        )
    if options.classifier and discriminator.classes is None:
        raise ValueError(
            f"options.classifier = {options.classifier}, but there are no classes: give both "
            "networks a classes section, or set it to 0"
        )
    if (
        options.reads_features
        and isinstance(discriminator, ProjectedConfig)
        and not discriminator.condition_width
    ):
        raise ValueError(
            "options need features of D, but projected heads without text or classes have none "
            "beneath their logits: give discriminator and generator one of them, or set "
            "adaptive_mix, augself, entropy and classifier to 0"
        )
    _check_augmented_condition(options, generator, discriminator)


def _check_augmented_condition(
    options: OptionsConfig,
    generator: GeneratorConfig | StyleTConfig | UpsamplerConfig,
    discriminator: DiscriminatorConfig | ProjectedConfig,
) -> None:
    if discriminator.text and discriminator.text.conditioning_augmentation:
        raise ValueError(
            "discriminator.text.conditioning_augmentation is true, but D reads captions as they "
            "are: set it to false; it is for the generator's text section"
        )
    is_on = bool(generator.text and generator.text.conditioning_augmentation)
    if is_on and isinstance(generator, StyleTConfig):
        raise ValueError(
            "text.conditioning_augmentation is true, but a generator of kind stylegan-t takes the "
            "frozen encoder's vector as it is: set it to false"
        )
    if is_on and not options.conditioning_kl:
        raise ValueError(
            "text.conditioning_augmentation is true, but options.conditioning_kl = 0 leaves "
            "nothing that keeps its noise from vanishing: set that to 1"
        )
    if options.conditioning_kl and not is_on:
        raise ValueError(
            f"options.conditioning_kl = {options.conditioning_kl}, but the generator's captions "
            "have no distribution: set text.conditioning_augmentation of the generator to true, or "
            "this to 0"
        )
