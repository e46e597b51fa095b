"""What differs between the things that are trained. The loop knows a `Task`, and no kind of it.

Every generator is called as G(*given, z, captions) and makes a pyramid, largest level first. A new
task is a subclass here and a section of the configuration: its `kind` is the key of `TASKS`.

Shape letters: B batch (of all ranks where said so), C colour, H W image, S style, Z latent.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gigagan import losses
from gigagan.config import (
    GUIDANCE_SIDE,
    ProjectedConfig,
    StyleTConfig,
    TrainBaseConfig,
    TrainStage,
    TrainUpsamplerConfig,
)
from gigagan.evaluation.heldout import Heldout
from gigagan.models import pretrained
from gigagan.models.base import base_generator
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import ImageEncoder
from gigagan.models.generator import Generator
from gigagan.models.heads import ProjectedHeads
from gigagan.models.layers import full_precision, without_autocast
from gigagan.models.options import OptionHeads
from gigagan.models.stylegan_t import StyleGANT
from gigagan.models.text import Reader
from gigagan.models.upsampler import Upsampler, shrink
from gigagan.training.augment import NUM_PARAMETERS
from gigagan.training.distributed.world import World
from gigagan.training.probes import BaseProbe, Probe, UpsamplerProbe

if TYPE_CHECKING:
    from gigagan.training.inputs import Inputs, Loader, Samples

MEAN_STYLE_CAPTIONS, MEAN_STYLE_BATCH = 512, 64
Config = TypeVar("Config", bound=TrainStage)
Network = TypeVar("Network", bound=Generator | StyleGANT | Upsampler)
Metrics = dict[str, Tensor]
"""Detached and still on the device: the loop decides when to read them."""


class Loss(NamedTuple):
    """What to go backward from, and its terms for the log."""

    loss: Tensor
    metrics: Metrics


class Given(NamedTuple):
    """What a task makes of a batch besides its pyramid, latents and captions: a rank's part."""

    images: tuple[Tensor, ...] = ()
    """What G starts from, each B C H W; nothing where latent and caption are all."""
    crop: tuple[int, int] = (0, 0)
    """Top and left corner of the crop on which LPIPS, or guidance, is measured."""
    noise_BN: Tensor | None = None
    """What a generator with noise inputs takes in them."""


class Task(ABC, Generic[Config, Network]):
    """One thing to train. It holds a configuration and no state."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def generator(self) -> Network:
        """A new G, with weights from torch's own random state."""

    def encoder(self, device: torch.device) -> ImageEncoder | None:
        """The frozen encoder on whose features D's heads are, if D is that kind."""
        config = self.config.discriminator
        if isinstance(config, ProjectedConfig):
            return pretrained.critic_encoder(config.encoder, device)
        return None

    def discriminator(self) -> Discriminator | ProjectedHeads:
        """A new D, likewise."""
        config = self.config.discriminator
        made: Discriminator | ProjectedHeads
        if isinstance(config, ProjectedConfig):
            made = ProjectedHeads(config)
        else:
            made = Discriminator(config)
        made.options = self.option_heads()
        return made

    def option_heads(self) -> OptionHeads | None:
        """What options learn beside D; None where none does."""
        config, options = self.config.discriminator, self.config.options
        if not (options.augself or options.classifier):
            return None
        kinds = self.config.augment.diffaugment if options.augself else ()
        classes = config.classes.number if options.classifier and config.classes else 0
        num_told = [NUM_PARAMETERS[kind] for kind in kinds]
        return OptionHeads(config.embedding_width, num_told=num_told, num_classes=classes)

    def prediction_weights(self, discriminator: Discriminator | ProjectedHeads) -> list[float]:
        """Weights of D's predictions, in the order in which it gives them."""
        if isinstance(discriminator, ProjectedHeads):
            number = len(discriminator.heads)
            return [1 / number] * number
        loss = self.config.loss
        pairs = discriminator.config.pairs
        return losses.prediction_weights(pairs, loss.level_weights, intermediate=loss.intermediate)

    @property
    def has_auxiliary(self) -> bool:
        """Whether losses look through a frozen image encoder, too."""
        return False

    def perceptual(self, device: torch.device) -> nn.Module | None:
        """The frozen network that `own_loss` compares pictures by, if it does."""
        return None

    def given(self, real_BCHW: Tensor, random: torch.Generator, world: World) -> Given:
        """What G starts from, of this rank's real images; drawn for all ranks alike."""
        return Given()

    def own_loss(
        self, perceptual: nn.Module | None, inputs: Inputs, fake_BCHW: Tensor
    ) -> Loss | None:
        """What G's loss has beside D's judgement and the regression of a warm start."""
        return None

    @abstractmethod
    def probe(self, captions: Reader, samples: Samples, heldout: Heldout | None) -> Probe:
        """What looks at the averaged generator every so often."""

    def complete(self, averaged: Network, captions: Reader, loader: Loader) -> None:
        """Put into an averaged generator what its users want and training does not."""


class BaseTask(Task[TrainBaseConfig, Generator | StyleGANT]):
    """The base generator: pictures from captions, classes or nothing."""

    def generator(self) -> Generator | StyleGANT:
        """A new G."""
        return base_generator(self.config.generator)

    @property
    def has_auxiliary(self) -> bool:
        """Whether the vision-aided or the contrastive loss, or guidance, has a weight."""
        loss = self.config.loss
        return bool(loss.vision or loss.contrastive or self.config.is_guided)

    def given(self, real_BCHW: Tensor, random: torch.Generator, world: World) -> Given:
        """The noise inputs of a generator that has them, and where guidance looks."""
        config, noise_BN, crop = self.config, None, (0, 0)
        if isinstance(config.generator, StyleTConfig):
            seed = int(torch.randint(2**62, (), generator=random))
            on_device = torch.Generator(world.device).manual_seed(seed)
            shape = config.batch_size, config.generator.noise_dim
            noise_BN = world.share(torch.randn(shape, generator=on_device, device=world.device))
        if config.is_guided:
            room = max(config.generator.resolution - GUIDANCE_SIDE, 0) + 1
            top, left = torch.randint(room, (2,), generator=random).tolist()
            crop = top, left
        return Given(noise_BN=noise_BN, crop=crop)

    def probe(self, captions: Reader, samples: Samples, heldout: Heldout | None) -> Probe:
        """Pictures of fixed prompts, and figures of held-out captions."""
        prompts = self.config.prompts
        if not prompts and heldout is None:
            some = samples.captions_between(0, min(samples.num_samples, 1_000))
            prompts = tuple(sorted(set(some))[:8])
        return BaseProbe(
            captions,
            heldout,
            resolution=self.config.generator.resolution,
            num_captions=self.config.num_probe_captions,
            prompts=prompts,
        )

    @torch.no_grad()
    def complete(self, averaged: Generator | StyleGANT, captions: Reader, loader: Loader) -> None:
        """w̄ for truncation: over the first captions of the training set, one latent each.

        StyleGAN-T's has followed training already.
        """
        if isinstance(averaged, StyleGANT):
            return
        random = torch.Generator().manual_seed(0)
        styles = []
        for start in range(0, MEAN_STYLE_CAPTIONS, MEAN_STYLE_BATCH):
            known = loader.captions_between(start, start + MEAN_STYLE_BATCH)
            text = averaged.read(captions(known))
            z_BZ = torch.randn(MEAN_STYLE_BATCH, averaged.config.latent_dim, generator=random)
            styles.append(averaged.style(z_BZ.to(averaged.style_mean.device), text))
        averaged.style_mean.copy_(torch.cat(styles).mean(0))


class UpsamplerTask(Task[TrainUpsamplerConfig, Upsampler]):
    """The upsampler: a large picture from a small one and its caption."""

    def generator(self) -> Upsampler:
        """A new G."""
        return Upsampler(self.config.upsampler)

    def perceptual(self, device: torch.device) -> nn.Module | None:
        """LPIPS with VGG16."""
        return pretrained.lpips("vgg", device) if self.config.lpips > 0 else None

    def given(self, real_BCHW: Tensor, random: torch.Generator, world: World) -> Given:
        """The shrunken picture and its noise; where LPIPS will look."""
        config = self.config
        side, target = config.upsampler.input_resolution, config.upsampler.resolution
        noise_BCHW = world.share(torch.randn(config.batch_size, 3, side, side, generator=random))
        room = max(target - config.lpips_crop, 0) + 1
        top, left = torch.randint(room, (2,), generator=random).tolist()
        return Given((shrink(real_BCHW, side), noise_BCHW), (top, left))

    def own_loss(self, perceptual: nn.Module | None, inputs: Inputs, fake_BCHW: Tensor) -> Loss:
        """What ties G's output to its target: LPIPS on a crop, and absolute difference."""
        config = self.config
        pixel = (fake_BCHW - inputs.real[0]).abs().mean()
        loss, terms = config.pixel * pixel, {"g/pixel": pixel.detach()}
        if perceptual is not None and config.lpips > 0:
            top, left = inputs.crop
            side = min(config.lpips_crop, fake_BCHW.shape[-1])
            # This rank's share of the batch's samples.
            count = math.ceil(config.lpips_samples * len(fake_BCHW) / config.batch_size)
            crop = (slice(count), slice(None), slice(top, top + side), slice(left, left + side))
            pair = full_precision(fake_BCHW[crop]), full_precision(inputs.real[0][crop])
            with without_autocast(fake_BCHW.device):  # squares of small differences
                distance = perceptual(*pair).mean()
            loss = loss + config.lpips * distance
            terms["g/lpips"] = distance.detach()
        return Loss(loss, terms)

    def probe(self, captions: Reader, samples: Samples, heldout: Heldout | None) -> Probe:
        """LPIPS and PSNR to pictures that were held out, or else to the first ones of training."""
        first = next(samples.batches(0))
        return UpsamplerProbe(
            captions,
            heldout,
            pretrained.lpips(
                "alex", captions.device
            ),  # cheap, and not what training may descend on
            resolution=self.config.upsampler.resolution,
            input_resolution=self.config.upsampler.input_resolution,
            fallback=(first.images_BCHW.permute(0, 2, 3, 1).numpy(), first.captions),
        )


TASKS: Mapping[str, type[Task[Any, Any]]] = {"base": BaseTask, "upsampler": UpsamplerTask}


def task_of(config: TrainStage) -> Task[Any, Any]:
    """What this section trains."""
    return TASKS[config.kind](config)
