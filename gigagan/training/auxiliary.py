"""The two losses that look through a frozen image encoder: vision-aided and contrastive.

The encoder is shared and never trained; the aligner that maps its features to caption vectors is
fitted once, before the first step, on real pictures at the size at which the loss sees them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gigagan import losses
from gigagan.config import LossConfig
from gigagan.models.aligner import Aligner
from gigagan.models.encoders import ImageEncoder, ImageFeatures
from gigagan.models.vision import VisionAidedDiscriminator


def see(encoder: ImageEncoder, images_BCHW: Tensor, *, side: int) -> ImageFeatures:
    """Bring images in [−1, 1] to the encoder's side and encode them."""
    if images_BCHW.shape[-1] != side:
        images_BCHW = F.interpolate(
            images_BCHW, size=(side, side), mode="bilinear", align_corners=False, antialias=True
        )
    features: ImageFeatures = encoder(images_BCHW.clamp(-1, 1))
    return features


@dataclass(frozen=True)
class Auxiliary:
    """What both losses need: the frozen encoder, the aligner, and the trained heads."""

    config: LossConfig
    encoder: ImageEncoder
    aligner: Aligner
    heads: VisionAidedDiscriminator

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

    def discriminator_loss(self, real: Tensor, fake: Tensor, text_BT: Tensor) -> Tensor:
        """Logistic loss of the heads, mean over stages."""
        with torch.no_grad():
            stages = self.see(torch.cat([real, fake])).stages
        logits = self.heads(stages, text_BT.repeat(2, 1))
        weights = [1 / len(logits)] * len(logits)
        real_logits, fake_logits = zip(*(x.chunk(2) for x in logits), strict=True)
        return losses.as_real(real_logits, weights) + losses.as_fake(fake_logits, weights)

    def generator_losses(
        self, fake: Tensor, text_BT: Tensor, captions_BE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The heads' non-saturating loss, and InfoNCE against the captions of the batch."""
        seen = self.see(fake)
        logits = self.heads(seen.stages, text_BT)
        vision = losses.as_real(logits, [1 / len(logits)] * len(logits))
        contrastive = losses.info_nce(
            self.aligner.embed_images(seen.pooled_BD),
            self.aligner.embed_texts(captions_BE),
            scale=self.config.contrastive_scale,
        )
        return vision, contrastive
