"""Losses as pure functions of tensors: no networks, no devices, no logging.

Softplus, norms and log-softmax are computed in float32 whatever the logits' type.

Shape letters: B batch, E embedding, C colour, H W image, P parameters, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def as_fake(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_k w_k · mean softplus(l_k): −log(1 − sigmoid(l)) over all predictions (i, j)."""
    return _weighted([F.softplus(_full(x)).mean() for x in logits], weights)


def as_real(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_k w_k · mean softplus(−l_k): −log sigmoid(l); G's non-saturating loss on its own images."""
    return _weighted([F.softplus(-_full(x)).mean() for x in logits], weights)


def hinge_real(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_k w_k · mean max(0, 1 − l_k): D's hinge loss on real images (Lim and Ye 2017)."""
    return _weighted([F.relu(1 - _full(x)).mean() for x in logits], weights)


def hinge_fake(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_k w_k · mean max(0, 1 + l_k): D's hinge loss on generated images."""
    return _weighted([F.relu(1 + _full(x)).mean() for x in logits], weights)


def hinge_generator(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """−Σ_k w_k · mean l_k: G's loss beside D's hinge loss; it has no bound."""
    return _weighted([-_full(x).mean() for x in logits], weights)


class Adversarial(NamedTuple):
    """What D's logits are for; each takes logits and weights of predictions."""

    real: Callable[[Sequence[Tensor], Sequence[float]], Tensor]
    fake: Callable[[Sequence[Tensor], Sequence[float]], Tensor]
    generator: Callable[[Sequence[Tensor], Sequence[float]], Tensor]


ADVERSARIAL = {
    "logistic": Adversarial(as_real, as_fake, as_real),
    "hinge": Adversarial(hinge_real, hinge_fake, hinge_generator),
}
"""By the name that settings have for it."""


def _full(x: Tensor) -> Tensor:
    """float32 for what overflows or loses its digits in half precision; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _weighted(terms: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([w * t for w, t in zip(weights, terms, strict=True)]).sum()


def prediction_weights(
    pairs: Sequence[tuple[int, int]], level_weights: Sequence[float], *, intermediate: float
) -> list[float]:
    """Weights of predictions (level i, stage j), summing to 1.

    A level's weight goes to its prediction after the last stage in full and to earlier ones times
    `intermediate`.
    """
    last = max(stage for _, stage in pairs)
    raw = [level_weights[i] * (1.0 if j == last else intermediate) for i, j in pairs]
    return [w / sum(raw) for w in raw]


def r1_penalty(
    logits: Sequence[Tensor], weights: Sequence[float], pyramid: Sequence[Tensor]
) -> Tensor:
    """Mean over the batch of Σ_levels ‖∂(Σ_k w_k · mean l_k) / ∂x‖² at real images.

    `pyramid` must require grad and have gone through D in a form that can be differentiated
    twice. A penalty of γ/2 times this is R1 (Mescheder et al. 2018, equation 9).
    """
    per_sample_B = torch.stack(
        [w * _full(x).flatten(1).mean(1) for w, x in zip(weights, logits, strict=True)]
    ).sum(0)
    gradients = torch.autograd.grad(per_sample_B.sum(), list(pyramid), create_graph=True)
    return torch.stack([_full(g).square().flatten(1).sum(1) for g in gradients]).sum(0).mean()


def info_nce(images_BE: Tensor, texts_BE: Tensor, *, scale: float) -> Tensor:
    """−mean log softmax_b'(scale · cos(image_b, text_b'))[b]: the CLIP loss of GigaGAN, eq. 10."""
    logits_BB = F.normalize(_full(images_BE), dim=1) @ F.normalize(_full(texts_BE), dim=1).T
    target_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return F.cross_entropy(scale * logits_BB, target_B)


def squared_angle(images_BE: Tensor, texts_BE: Tensor) -> Tensor:
    """mean arccos²(cos(image_b, text_b)): CLIP guidance (StyleGAN-T, section 3.4).

    Cosines are kept a millionth away from ±1, where arccos has no finite slope.
    """
    cosine_B = F.cosine_similarity(_full(images_BE), _full(texts_BE), dim=1)
    return cosine_B.clamp(-1 + 1e-6, 1 - 1e-6).arccos().square().mean()


def adaptive_mix(
    mixed_BE: Tensor, first_BE: Tensor, second_BE: Tensor, share_B: Tensor, noise_BE: Tensor
) -> Tensor:
    """mean (1 − cos(F(λ x + (1 − λ) y), λ F(x) + (1 − λ) F(y) + ε)): AdaptiveMix, as in its code.

    The second argument of the cosine is fixed: only the mix's features learn (Liu et al. 2023).
    """
    first_BE, second_BE = _full(first_BE.detach()), _full(second_BE.detach())
    target_BE = second_BE.lerp(first_BE, share_B[:, None]) + noise_BE
    return 1 - F.cosine_similarity(_full(mixed_BE), _full(target_BE), dim=1).mean()


def augmentation_error(
    told: Sequence[Tensor], parameters: Sequence[Tensor], is_on_B: Tensor
) -> Tensor:
    """Σ over kinds of augmentation of mean (ω̂ − ω)², B P each (AugSelf-GAN, Hou et al. 2023).

    A picture that was not augmented adds nothing; the mean is over all, so that parts of a batch
    and ranks have the mean of the whole.
    """
    pairs = zip(told, parameters, strict=True)
    errors = [((_full(a) - b).square().mean(1) * is_on_B).mean() for a, b in pairs]
    return torch.stack(errors).sum()


def neighbour_entropy(x_BE: Tensor) -> Tensor:
    """mean_b ½ log(min_{c≠b} ‖x̂_b − x̂_c‖² + 10⁻⁶) of directions x̂ = x / ‖x‖.

    Times E, and but for a constant, the entropy of what the batch is drawn from, as Kozachenko and
    Leonenko (1987) estimate it. MEE (Liu et al. 2022) raises log mean_b min_c of the features as
    they are, c among those of earlier batches.
    """
    x_BE = F.normalize(_full(x_BE), dim=1)
    with torch.no_grad():
        nearest_B = torch.cdist(x_BE, x_BE).fill_diagonal_(torch.inf).argmin(1)
    squared_B = (x_BE - x_BE[nearest_B]).square().sum(1)
    return 0.5 * (squared_B + 1e-6).log().mean()


def adc_discriminator(real_BK: Tensor, fake_BK: Tensor, classes_B: Tensor) -> Tensor:
    """−mean log C(k⁺ | real) − mean log C(k⁻ | generated): ADC-GAN (Hou et al. 2022, section 4).

    Logits are of 2 K classes: first the real ones k⁺, then the generated ones k⁻.
    """
    num_classes = real_BK.shape[1] // 2
    real = F.cross_entropy(_full(real_BK), classes_B)
    return real + F.cross_entropy(_full(fake_BK), classes_B + num_classes)


def adc_generator(fake_BK: Tensor, classes_B: Tensor) -> Tensor:
    """−mean (log C(k⁺ | x) − log C(k⁻ | x)) of generated images: a difference of two logits."""
    real_BK, fake_BK = _full(fake_BK).chunk(2, dim=1)
    return (fake_BK - real_BK).gather(1, classes_B[:, None]).mean()


def gaussian_kl(mean_BE: Tensor, log_variance_BE: Tensor) -> Tensor:
    """Mean over B and E of KL(N(μ, σ²) ‖ N(0, 1)) = ½ (μ² + σ² − 1 − log σ²).

    StackGAN's regularisation (Zhang et al. 2017, equation 2) per dimension, as in its code.
    """
    mean_BE, log_variance_BE = _full(mean_BE), _full(log_variance_BE)
    return 0.5 * (mean_BE.square() + log_variance_BE.exp() - 1 - log_variance_BE).mean()


def regression(
    images: Sequence[Tensor], targets: Sequence[Tensor], *, gradients: float = 0.0
) -> Tensor:
    """Mean over levels of mean |x − y| + g · mean |∇(x − y)|: shape before realism.

    ∇ are differences of neighbouring pixels along both sides. L1 beside an adversarial loss is
    pix2pix's (Isola et al. 2017, equation 4), here at every level of the pyramid; the second term
    is the gradient difference loss of Mathieu et al. (2016, equation 6), without their inner
    absolute values.
    """
    terms = []
    for x_BCHW, y_BCHW in zip(images, targets, strict=True):
        error_BCHW = _full(x_BCHW) - _full(y_BCHW)
        term = error_BCHW.abs().mean()
        if gradients:
            across, down = error_BCHW.diff(dim=3), error_BCHW.diff(dim=2)
            term = term + gradients * (across.abs().mean() + down.abs().mean())
        terms.append(term)
    return torch.stack(terms).mean()
