"""The two losses that look through a frozen image encoder: vision-aided and contrastive.

The encoder is shared and never trained. Of an open_clip encoder the contrastive loss uses its own
text tower and logit scale; for an embedded one an aligner maps its features to caption vectors,
fitted once, before the first step, on real pictures at the size at which the loss sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gigagan import losses
from gigagan.config import GUIDANCE_SIDE, LossConfig, ProjectedConfig, TrainStage
from gigagan.models import pretrained
from gigagan.models.aligner import Aligner, fit_aligner
from gigagan.models.encoders import ImageEncoder, ImageFeatures, TextFeatures
from gigagan.models.heads import ProjectedHeads
from gigagan.models.layers import full_precision, without_autocast
from gigagan.models.openclip import OpenClipText
from gigagan.models.pixels import from_uint8
from gigagan.models.text import Features, Reader
from gigagan.models.vision import VisionAidedDiscriminator
from gigagan.training.captions import CaptionFeatures
from gigagan.training.distributed.world import World
from gigagan.training.inputs import Samples
from gigagan.training.logs import Log

ALIGNER_PICTURES = 2_048


def see(encoder: ImageEncoder, images_BCHW: Tensor, *, side: int) -> ImageFeatures:
    """Bring images in [−1, 1] to the encoder's side and encode them.

    What G draws beyond that range is not clamped: it would have no gradient there.
    """
    if images_BCHW.shape[-1] != side:
        wide_BCHW = full_precision(images_BCHW)  # CPUs have no such filter in bf16
        images_BCHW = F.interpolate(
            wide_BCHW, size=(side, side), mode="bilinear", align_corners=False, antialias=True
        )
    features: ImageFeatures = encoder(images_BCHW)
    return features


class JointSpace(Protocol):
    """Where images and captions meet as unit vectors [B, E]."""

    @property
    def scale(self) -> float:
        """Factor of a cosine in the softmax of InfoNCE."""

    def embed_images(self, pooled_BD: Tensor) -> Tensor:
        """The image encoder's pooled features, differentiable."""

    def embed_captions(self, captions: Sequence[str], text: TextFeatures) -> Tensor:
        """Captions, of which the conditioning encoder's features are known."""


@dataclass(frozen=True)
class AlignerSpace:
    """The space of the conditioning encoder's pooled vector."""

    aligner: Aligner
    scale: float

    def embed_images(self, pooled_BD: Tensor) -> Tensor:
        """By the aligner's projection."""
        with without_autocast(pooled_BD.device):
            return self.aligner.embed_images(full_precision(pooled_BD))

    def embed_captions(self, captions: Sequence[str], text: TextFeatures) -> Tensor:
        """The pooled vector, centred."""
        return self.aligner.embed_texts(text.pooled_BD)


@dataclass(frozen=True)
class ClipSpace:
    """CLIP's own joint space and logit scale."""

    tower: OpenClipText

    @property
    def scale(self) -> float:
        """exp of the learned logit scale (100 for OpenAI's weights)."""
        return self.tower.logit_scale

    def embed_images(self, pooled_BD: Tensor) -> Tensor:
        """The image tower's output is in the joint space already."""
        return F.normalize(pooled_BD.float(), dim=1)

    def embed_captions(self, captions: Sequence[str], text: TextFeatures) -> Tensor:
        """By CLIP's text tower."""
        return self.tower.embed(captions)


@dataclass(frozen=True)
class Auxiliary:
    """What both losses need: the frozen encoder, the joint space, and the trained heads."""

    config: LossConfig
    encoder: ImageEncoder
    space: JointSpace | None
    """None where there are no captions: the settings refuse losses that look into it."""
    heads: VisionAidedDiscriminator | ProjectedHeads
    world: World = field(default_factory=World)
    """The contrastive loss compares the images and captions of all ranks."""

    def strength(self, images_seen: int) -> float:
        """0 before the start, then a linear ramp to 1."""
        since = images_seen - self.config.auxiliary_start_images
        return min(max(since / self.config.ramp_images, 0.0), 1.0)

    def is_due(self, step: int, images_seen: int) -> bool:
        """Whether this step uses the encoder."""
        return step % self.config.auxiliary_every == 0 and self.strength(images_seen) > 0

    def see(self, images_BCHW: Tensor) -> ImageFeatures:
        """Features at the side that the loss uses; differentiable in the images."""
        return see(self.encoder, images_BCHW, side=self.config.vision_resolution)

    def discriminator_loss(self, real: Tensor, fake: Tensor, text_BT: Tensor | None) -> Tensor:
        """Logistic loss of the heads, mean over stages."""
        with torch.no_grad():
            stages = self.see(torch.cat([real, fake])).stages
        twice_BT = None if text_BT is None else text_BT.repeat(2, 1)
        logits = self.heads(stages, twice_BT, num_sets=2)
        weights = [1 / len(logits)] * len(logits)
        real_logits, fake_logits = zip(*(x.chunk(2) for x in logits), strict=True)
        return losses.as_real(real_logits, weights) + losses.as_fake(fake_logits, weights)

    def generator_losses(
        self,
        augmented: Tensor,
        fake: Tensor,
        text_BT: Tensor | None,
        captions: Sequence[str],
        text: Features,
    ) -> tuple[Tensor, Tensor]:
        """The heads' non-saturating loss, and InfoNCE against the captions of the batch.

        Without captions the latter is 0.

        The heads see images augmented as D does; the contrastive loss, which tells what they
        show, sees them as they are.
        """
        plain = self.see(fake)
        seen = plain if augmented is fake else self.see(augmented)
        logits = self.heads(seen.stages, text_BT)
        vision = losses.as_real(logits, [1 / len(logits)] * len(logits))
        if self.space is None:
            return vision, vision.new_zeros(())
        assert isinstance(text, TextFeatures)
        gather = self.world.gather_with_gradient
        contrastive = losses.info_nce(
            gather(self.space.embed_images(plain.pooled_BD)),
            gather(self.space.embed_captions(captions, text)),
            scale=self.space.scale,
        )
        return vision, contrastive

    def guidance(
        self,
        fake_BCHW: Tensor,
        crop: tuple[int, int],
        captions: Sequence[str],
        text: Features,
    ) -> Tensor:
        """Mean squared angle between images and captions (StyleGAN-T, section 3.4).

        Of images larger than `GUIDANCE_SIDE` the crop at these pixels is looked at.
        """
        assert self.space is not None
        assert isinstance(text, TextFeatures)
        (top, left), side = crop, GUIDANCE_SIDE
        seen = self.see(fake_BCHW[:, :, top : top + side, left : left + side])
        images_BE = self.space.embed_images(seen.pooled_BD)
        return losses.squared_angle(images_BE, self.space.embed_captions(captions, text))


def auxiliary_losses(
    config: TrainStage,
    samples: Samples,
    captions: Reader,
    run_dir: Path,
    world: World,
    log: Log,
) -> Auxiliary:
    """The frozen image encoder, its joint space with text, and the heads that are trained on it."""
    name, text_width = config.loss.vision_encoder, config.discriminator.condition_width
    heads: VisionAidedDiscriminator | ProjectedHeads
    if config.loss.vision_heads == "projected" and config.loss.vision:
        side = config.loss.vision_resolution
        encoder = pretrained.critic_encoder(name, world.device)
        projected = ProjectedConfig(encoder=name, side=side, text=None)
        heads = ProjectedHeads(projected, text_width=text_width)
    else:
        encoder = pretrained.image_encoder(name, world.device)
        is_projected = isinstance(config.discriminator, ProjectedConfig)  # has heads of its own
        stage_channels = () if is_projected else encoder.stage_channels
        heads = VisionAidedDiscriminator(stage_channels, text_width=text_width)
    heads.to(world.device)
    if not isinstance(captions, CaptionFeatures):
        return Auxiliary(config.loss, encoder, None, heads, world)
    if name.startswith("open_clip:"):
        tower = pretrained.text_encoder(name, world.device)
        assert isinstance(tower, OpenClipText)
        return Auxiliary(config.loss, encoder, ClipSpace(tower), heads, world)
    path = run_dir / "aligner.safetensors"
    if world.is_main and not path.exists():
        _fit_aligner(config, encoder, samples, captions).save(path)
        log.say(f"fitted the aligner of {encoder.name} to {captions.encoder.name}")
    world.barrier()
    space = AlignerSpace(Aligner.load(path, world.device), config.loss.contrastive_scale)
    return Auxiliary(config.loss, encoder, space, heads, world)


@torch.no_grad()
def _fit_aligner(
    config: TrainStage, encoder: ImageEncoder, samples: Samples, captions: CaptionFeatures
) -> Aligner:
    """Ridge regression from image to caption features on the first training pictures."""
    images, texts = [], []
    wanted = min(ALIGNER_PICTURES, samples.num_samples)
    for batch in samples.batches(0):
        pictures = from_uint8(batch.images_BCHW.to(captions.device))
        images.append(see(encoder, pictures, side=config.loss.vision_resolution).pooled_BD)
        texts.append(captions(batch.captions).pooled_BD)
        if sum(map(len, images)) >= wanted:
            break
    return fit_aligner(
        torch.cat(images),
        torch.cat(texts),
        image_encoder=encoder.name,
        text_encoder=captions.encoder.name,
        image_px=config.loss.vision_resolution,
    )
