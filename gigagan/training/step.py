"""One optimizer step of each network: forward, loss, backward. The maths of a run is here.

Shape letters: B batch, C colour, H W image, Z latent, T text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gigagan import losses
from gigagan.config import TrainStage, TrainUpsamplerConfig
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.layers import full_precision
from gigagan.models.upsampler import Upsampler
from gigagan.training.auxiliary import Auxiliary

Metrics = dict[str, Tensor]  # detached, still on the device; the loop decides when to read them


class Inputs(NamedTuple):
    """One rank's part of a batch; everything random has been drawn."""

    real: list[Tensor]
    """Pyramid of real images in [−1, 1], largest first."""
    captions: Sequence[str]
    """Their captions …"""
    text: TextFeatures
    """… and what the frozen encoder says of them."""
    z_BZ: Tensor
    small: tuple[Tensor, Tensor] | None
    """The upsampler's input and its noise, both B C H W; None for the base."""
    other_text: TextFeatures
    """Another caption for every sample …"""
    has_other_B: Tensor
    """… where there is one: False if all captions lately were the same."""
    crop: tuple[int, int]
    """Top and left corner of the crop on which LPIPS is measured."""


@dataclass(frozen=True)
class Players:
    """The networks of a run and how their predictions are weighted."""

    generator: Generator | Upsampler
    discriminator: Discriminator
    weights: list[float]
    """Of the predictions (i, j), in the discriminator's order; sum 1."""
    auxiliary: Auxiliary | None
    perceptual: nn.Module | None
    """LPIPS with a frozen VGG16, for the upsampler."""


def synthesize(generator: Generator | Upsampler, inputs: Inputs) -> list[Tensor]:
    """The generated pyramid, largest first."""
    if isinstance(generator, Upsampler):
        assert inputs.small is not None
        return generator(*inputs.small, inputs.z_BZ, inputs.text)
    return generator(inputs.z_BZ, inputs.text)


def accumulate_discriminator(
    players: Players,
    config: TrainStage,
    inputs: Inputs,
    fakes: Sequence[Tensor],
    *,
    auxiliary_strength: float,
) -> Metrics:
    """Add D's gradients: real, generated, and both with another caption (matching-aware).

    Real and generated images share one pass of the trunk, and so do an image's two captions.
    """
    d, weights = players.discriminator, players.weights
    B = len(inputs.z_BZ)
    levels = d.config.levels
    both = [
        torch.cat([real, fake.detach()])
        for real, fake in zip(inputs.real[:levels], fakes[:levels], strict=True)
    ]
    text_BT = _read(d, inputs.text)
    features = d.trunk(both, num_sets=2)
    logits = d.predict(features, text_BT.repeat(2, 1))
    real_logits, fake_logits = [x[:B] for x in logits], [x[B:] for x in logits]
    loss_real = losses.as_real(real_logits, weights)
    loss_fake = losses.as_fake(fake_logits, weights)
    loss = loss_real + loss_fake
    metrics = {
        "d/real": loss_real.detach(),
        "d/fake": loss_fake.detach(),
        "d/logit_real": _mean_logit(real_logits, weights),
        "d/logit_fake": _mean_logit(fake_logits, weights),
    }

    # Matching-aware: images with the caption of another count as fake.
    rows, samples = mismatched_rows(config.loss.matching_images, inputs.has_other_B)
    if config.loss.matching > 0 and len(rows):
        picked = [f._replace(maps_BCHW=f.maps_BCHW[rows]) for f in features]
        mismatched = d.predict(picked, _read(d, inputs.other_text)[samples])
        num_terms = 2 if config.loss.matching_images == "both" else 1
        loss_match = num_terms * losses.as_fake(mismatched, weights)
        loss = loss + config.loss.matching * loss_match
        metrics["d/mismatch"] = loss_match.detach()
        metrics["d/logit_mismatch"] = _mean_logit(mismatched, weights)

    # Vision-aided: the heads on the frozen encoder.
    if players.auxiliary is not None and auxiliary_strength > 0:
        loss_vision = players.auxiliary.discriminator_loss(
            inputs.real[0], fakes[0].detach(), text_BT.detach()
        )
        loss = loss + loss_vision
        metrics["d/vision"] = loss_vision.detach()
    loss.backward()
    return metrics


def mismatched_rows(
    images: Literal["real", "half", "both"], has_other_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Which of the 2 B images (real, then generated) meet whose other caption: rows, samples.

    Samples without another caption take no part.
    """
    B = len(has_other_B)
    sample_B = torch.arange(B, device=has_other_B.device)
    row, sample = {
        "real": (sample_B, sample_B),
        "half": (sample_B + B * (sample_B >= B // 2), sample_B),
        "both": (torch.cat([sample_B, sample_B + B]), sample_B.repeat(2)),
    }[images]
    keep = has_other_B[sample]
    return row[keep], sample[keep]


def accumulate_r1(players: Players, inputs: Inputs, *, weight: float) -> Metrics:
    """Add D's gradients of `weight` · R1 on the real pyramid with its captions, in float32."""
    d = players.discriminator
    real = [full_precision(x.detach()).requires_grad_() for x in inputs.real[: d.config.levels]]
    logits = d(real, inputs.text, double_backward=True)
    penalty = losses.r1_penalty(logits, players.weights, real)
    (weight * penalty).backward()
    return {"d/r1": penalty.detach()}


def accumulate_generator(
    players: Players,
    config: TrainStage,
    inputs: Inputs,
    fakes: Sequence[Tensor],
    *,
    auxiliary_strength: float,
) -> Metrics:
    """Add G's gradients; D's parameters must not require any."""
    d = players.discriminator
    with torch.no_grad():
        text_BT = _read(d, inputs.text)
    features = d.trunk(list(fakes[: d.config.levels]))
    loss_adversarial = losses.as_real(d.predict(features, text_BT), players.weights)
    loss = loss_adversarial
    metrics = {"g/adversarial": loss_adversarial.detach()}
    if config.loss.generator_matching > 0 and bool(inputs.has_other_B.any()):
        keep_B = inputs.has_other_B
        picked = [f._replace(maps_BCHW=f.maps_BCHW[keep_B]) for f in features]
        with torch.no_grad():
            other_BT = _read(d, inputs.other_text)[keep_B]
        loss_match = losses.as_fake(d.predict(picked, other_BT), players.weights)
        loss = loss + config.loss.generator_matching * loss_match
        metrics["g/mismatch"] = loss_match.detach()
    if players.auxiliary is not None and auxiliary_strength > 0:
        vision, contrastive = players.auxiliary.generator_losses(
            fakes[0], text_BT, inputs.captions, inputs.text
        )
        extra = config.loss.vision * vision + config.loss.contrastive * contrastive
        loss = loss + auxiliary_strength * extra
        metrics |= {"g/vision": vision.detach(), "g/contrastive": contrastive.detach()}
    if isinstance(config, TrainUpsamplerConfig):
        fidelity, terms = _fidelity(players, config, inputs, fakes[0])
        loss = loss + fidelity
        metrics |= terms
    loss.backward()
    return metrics


def _fidelity(
    players: Players, config: TrainUpsamplerConfig, inputs: Inputs, fake_BCHW: Tensor
) -> tuple[Tensor, Metrics]:
    """What ties the upsampler's output to its target: LPIPS on a crop, and absolute difference."""
    pixel = (fake_BCHW - inputs.real[0]).abs().mean()
    loss, terms = config.pixel * pixel, {"g/pixel": pixel.detach()}
    if players.perceptual is not None and config.lpips > 0:
        top, left = inputs.crop
        side = min(config.lpips_crop, fake_BCHW.shape[-1])
        crop = (slice(config.lpips_samples), slice(None), slice(top, top + side))
        window = (*crop, slice(left, left + side))
        perceptual = players.perceptual(fake_BCHW[window], inputs.real[0][window]).mean()
        loss = loss + config.lpips * perceptual
        terms["g/lpips"] = perceptual.detach()
    return loss, terms


def _read(d: Discriminator, text: TextFeatures) -> Tensor:
    """t_D: what is trained here has a text branch."""
    text_BT = d.read(text)
    assert text_BT is not None
    return text_BT


def _mean_logit(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack(
        [w * full_precision(x.detach()).mean() for w, x in zip(weights, logits, strict=True)]
    ).sum()
