"""Augmentation of what D sees, the same for all levels of an image; G's other losses never see it.

Blur, translation and their padding are products with small matrices along an image's rows and
columns: deterministic on every device, and differentiable as often as one likes.

Shape letters: B batch, C colour, H W image, S side, K copies of an image in a row (odd).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gigagan.config import AugmentConfig
from gigagan.models.layers import full_precision, without_autocast

MIN_BLUR = 0.1
"""σ in pixels below which a Gaussian has no weight beside its centre (e⁻⁵⁰)."""
BLUR_REACH = 4
"""A Gaussian is cut off at this many σ, where it has fallen to 0.03 % of its height."""
TRANSLATION = 8
"""Images move by up to 1/8 of their side (DiffAugment)."""
NUM_PARAMETERS = {"color": 3, "translation": 2, "cutout": 2}
"""Numbers that say what an augmentation did to an image."""


class Draws(NamedTuple):
    """Everything random about the augmentation of a batch; no level's size is in it."""

    is_on_B: Tensor
    """Which images are augmented at all."""
    brightness_B: Tensor
    """Added to every value: −0.5 to 0.5."""
    saturation_B: Tensor
    """Factor of a pixel's distance to its grey: 0 to 2."""
    contrast_B: Tensor
    """Factor of a value's distance to the image's mean: 0.5 to 1.5."""
    shift_B2: Tensor
    """Uniform, for the shift down and to the right."""
    cutout_B2: Tensor
    """Uniform, for the centre of the cut-out square."""

    def shared(self, share: Callable[[Tensor], Tensor]) -> Draws:
        """Every tensor through `share`: a rank's rows of the whole batch, on its device."""
        return Draws(*map(share, self))


class Augment:
    """Draws and applies what the config asks for: DiffAugment, and a blur that fades."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config

    def draw(self, batch: int, random: torch.Generator, probability: float) -> Draws | None:
        """Draw for `batch` images of all ranks on the CPU; None if no image is augmented.

        What an image would get does not depend on `probability`, only whether it gets it.
        """
        if not self.config.diffaugment:
            return None
        uniform_B8 = torch.rand(batch, 8, generator=random)
        is_on_B = uniform_B8[:, 0] < probability
        if not is_on_B.any():
            return None
        return Draws(
            is_on_B=is_on_B,
            brightness_B=uniform_B8[:, 1] - 0.5,
            saturation_B=uniform_B8[:, 2] * 2,
            contrast_B=uniform_B8[:, 3] + 0.5,
            shift_B2=uniform_B8[:, 4:6],
            cutout_B2=uniform_B8[:, 6:8],
        )

    def blur_sigma(self, images_seen: int) -> float:
        """σ in pixels of the largest level, falling linearly to 0."""
        left = max(1 - images_seen / self.config.blur_fade_images, 0.0)
        return self.config.blur_sigma * left

    def apply(self, levels: list[Tensor], draws: Draws | None, images_seen: int) -> list[Tensor]:
        """Blur a pyramid, largest level first, then augment it; the same list if nothing is on.

        The values of `draws` belong to the rows of `levels`.
        """
        levels = blur(levels, self.blur_sigma(images_seen))
        if draws is None:
            return levels
        coarsest = levels[-1].shape
        steps = (_steps(coarsest[2]), _steps(coarsest[3]))
        with without_autocast(levels[0].device):
            return [self._augment(x_BCHW, draws, steps) for x_BCHW in levels]

    def parameters(self, levels: Sequence[Tensor], draws: Draws) -> list[Tensor]:
        """What was done to each image, in 0 … 1: B 3 for "color", else B 2, as the policy lists.

        Of shifts and centres what is left of the numbers drawn, which are rounded to whole steps.
        """
        H, W = levels[-1].shape[2:]
        steps = (_steps(H), _steps(W))
        size_2 = draws.shift_B2.new_tensor(steps)
        most_2 = draws.shift_B2.new_tensor([n // TRANSLATION for n in steps])
        colour = draws.brightness_B + 0.5, draws.saturation_B / 2, draws.contrast_B - 0.5
        found = {
            "color": torch.stack(colour, dim=1),
            "translation": shifts(draws.shift_B2, steps) / most_2 / 2 + 0.5,
            "cutout": centres(draws.cutout_B2, steps) / size_2,
        }
        return [found[kind] for kind in self.config.diffaugment]

    def _augment(self, x_BCHW: Tensor, draws: Draws, steps: tuple[int, int]) -> Tensor:
        wide_BCHW = full_precision(x_BCHW)
        y_BCHW = wide_BCHW
        policy = self.config.diffaugment
        if "color" in policy:
            y_BCHW = recolor(y_BCHW, draws.brightness_B, draws.saturation_B, draws.contrast_B)
        if "translation" in policy:
            y_BCHW = translate(y_BCHW, _pixels(shifts(draws.shift_B2, steps), steps, y_BCHW))
        if "cutout" in policy:
            y_BCHW = cut_out(y_BCHW, _pixels(centres(draws.cutout_B2, steps), steps, y_BCHW))
        return torch.where(_as_map(draws.is_on_B), y_BCHW, wide_BCHW).to(x_BCHW.dtype)


def recolor(
    x_BCHW: Tensor, brightness_B: Tensor, saturation_B: Tensor, contrast_B: Tensor
) -> Tensor:
    """Add brightness; scale the distance to a pixel's grey; scale the distance to the mean.

    DiffAugment's "color", in its order. A level's contrast is about its own mean.
    """
    brightness, saturation, contrast = (
        _as_map(v.to(x_BCHW.dtype)) for v in (brightness_B, saturation_B, contrast_B)
    )
    x_BCHW = x_BCHW + brightness
    x_BCHW = torch.lerp(x_BCHW.mean(1, keepdim=True), x_BCHW, saturation)
    return torch.lerp(x_BCHW.mean((1, 2, 3), keepdim=True), x_BCHW, contrast)


def shifts(uniform_B2: Tensor, steps: tuple[int, int]) -> Tensor:
    """Uniform numbers → whole numbers of steps, up to 1/8 of all steps down and to the right."""
    most = [n // TRANSLATION for n in steps]
    columns = zip(uniform_B2.unbind(1), most, strict=True)
    return torch.stack([_whole(uniform_B, 2 * m) - m for uniform_B, m in columns], dim=1)


def centres(uniform_B2: Tensor, steps: tuple[int, int]) -> Tensor:
    """Uniform numbers → whole numbers of steps from the upper left corner, 0 to all."""
    columns = zip(uniform_B2.unbind(1), steps, strict=True)
    return torch.stack([_whole(uniform_B, n) for uniform_B, n in columns], dim=1)


def translate(x_BCHW: Tensor, pixels_B2: Tensor) -> Tensor:
    """Move each image by pixels down and to the right, reflected at its edges.

    Whole pixels are moved exactly; between them it is linear interpolation.
    """
    H, W = x_BCHW.shape[2:]
    rows_BHH = _shift_matrix(pixels_B2[:, 0], H)
    columns_BWW = _shift_matrix(pixels_B2[:, 1], W)
    moved_BCHW = torch.einsum("bij,bcjw->bciw", rows_BHH, x_BCHW)
    return (moved_BCHW.flatten(1, 2) @ columns_BWW.mT).view_as(x_BCHW)


def cut_out(x_BCHW: Tensor, centre_B2: Tensor) -> Tensor:
    """Make a rectangle of half the sides grey; what lies outside of the image is lost.

    A pixel that is covered in part fades by that part.
    """
    H, W = x_BCHW.shape[2:]
    rows_BH = _coverage(centre_B2[:, 0], H)
    columns_BW = _coverage(centre_B2[:, 1], W)
    keep_BHW = 1 - rows_BH[:, :, None] * columns_BW[:, None, :]
    return x_BCHW * keep_BHW[:, None]


def blur(levels: list[Tensor], sigma: float) -> list[Tensor]:
    """Gaussian of σ pixels of the first level and as many per side of the others, reflecting.

    Levels whose own σ is below 0.1 px come back as they are, and so does the list if all do
    (Karras et al. 2021, arXiv:2106.12423, blur D's input over the first 200 k images).
    """
    if sigma < MIN_BLUR:
        return levels
    largest = levels[0].shape[2]
    with without_autocast(levels[0].device):
        return [_blur(x_BCHW, sigma * x_BCHW.shape[2] / largest) for x_BCHW in levels]


def _blur(x_BCHW: Tensor, sigma: float) -> Tensor:
    if sigma < MIN_BLUR:
        return x_BCHW
    wide_BCHW = full_precision(x_BCHW)
    rows_HH = _blur_matrix(sigma, x_BCHW.shape[2], x_BCHW.device).to(wide_BCHW.dtype)
    columns_WW = _blur_matrix(sigma, x_BCHW.shape[3], x_BCHW.device).to(wide_BCHW.dtype)
    return (rows_HH @ wide_BCHW @ columns_WW.T).to(x_BCHW.dtype)


def mean_sign(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """r_t = mean over the batch of sign Σ_k w_k · mean l_k (ADA, equation 1), detached."""
    per_sample_B = torch.stack(
        [
            w * full_precision(x.detach()).flatten(1).mean(1)
            for w, x in zip(weights, logits, strict=True)
        ]
    ).sum(0)
    return per_sample_B.sign().mean()


class Ada:
    """The share of images that are augmented: fixed, or adapted so that r_t meets its target.

    Every `ada_every` steps it moves by the images seen since then / `ada_images`, up if the mean
    r_t was above the target and down if below, within 0 and 1.
    """

    def __init__(self, config: AugmentConfig, batch_size: int, device: torch.device) -> None:
        self.config = config
        self.probability = 0.0 if config.ada else config.probability
        self.step_size = batch_size * config.ada_every / config.ada_images
        self.num_steps = 0
        self.sum = torch.zeros((), device=device)

    def update(self, sign: Tensor, mean: Callable[[Tensor], Tensor]) -> None:
        """Take in this rank's r_t of a step; `mean` averages a tensor over the ranks.

        It is averaged every step, so that the state one rank saves is that of all. Only every
        `ada_every` steps is a number read from the device.
        """
        if not self.config.ada:
            return
        self.sum += mean(sign.detach().to(self.sum))
        self.num_steps += 1
        if self.num_steps < self.config.ada_every:
            return
        excess = float(self.sum) / self.num_steps - self.config.ada_target
        direction = (excess > 0) - (excess < 0)
        self.probability = min(max(self.probability + direction * self.step_size, 0.0), 1.0)
        self.num_steps = 0
        self.sum.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The share, and what has been gathered since it last moved."""
        return {
            "probability": self.probability,
            "num_steps": self.num_steps,
            "sum": self.sum.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; a fixed share is the config's."""
        if not self.config.ada:
            return
        self.probability = state["probability"]
        self.num_steps = state["num_steps"]
        self.sum.copy_(state["sum"])


def _steps(coarsest_side: int) -> int:
    """Into how many steps a side is divided: whole pixels of every level of at least 8 px."""
    steps = coarsest_side
    while steps < TRANSLATION:
        steps *= 2
    return steps


def _whole(uniform_B: Tensor, most: int) -> Tensor:
    """Uniform numbers → whole numbers from 0 to `most`, all as likely."""
    # Rounding could bring a number just below 1 past the end of its range.
    return (uniform_B * (most + 1)).floor().clamp(max=most)


def _pixels(number_B2: Tensor, steps: tuple[int, int], x_BCHW: Tensor) -> Tensor:
    """Numbers of steps in pixels of this level, exact where they are whole."""
    columns = zip(number_B2.to(x_BCHW.dtype).unbind(1), x_BCHW.shape[2:], steps, strict=True)
    return torch.stack([number_B * side / n for number_B, side, n in columns], dim=1)


def _as_map(values_B: Tensor) -> Tensor:
    return values_B[:, None, None, None]


def _coverage(centre_B: Tensor, side: int) -> Tensor:
    """How much of each pixel is within a quarter of the side of the centre: B S in 0 … 1."""
    left_S = torch.arange(side, device=centre_B.device, dtype=centre_B.dtype)
    start_B1 = (centre_B - side / 4)[:, None]
    end_B1 = start_B1 + side / 2
    return (torch.minimum(left_S + 1, end_B1) - torch.maximum(left_S, start_B1)).clamp(0, 1)


def _shift_matrix(pixels_B: Tensor, side: int) -> Tensor:
    """y_i = x_{i − pixels}, linear between pixels, for shifts of up to a side: B S S."""
    pixel_S = torch.arange(side, device=pixels_B.device, dtype=pixels_B.dtype)
    column = torch.arange(-side, 2 * side, device=pixels_B.device, dtype=pixels_B.dtype)
    from_BS1 = (pixel_S - pixels_B[:, None])[:, :, None]
    return _fold((1 - (from_BS1 - column).abs()).clamp(min=0))


def _blur_matrix(sigma: float, side: int, device: torch.device) -> Tensor:
    """y_i = Σ_j N(i − j; σ) x_j in double precision: S S."""
    reach = math.ceil(BLUR_REACH * sigma)
    copies = math.ceil(reach / side)
    pixel_S = torch.arange(side, dtype=torch.double, device=device)
    column = torch.arange(-copies * side, (copies + 1) * side, dtype=torch.double, device=device)
    distance = pixel_S[:, None] - column
    weights = (-0.5 * (distance / sigma).square()).exp() * (distance.abs() <= reach)
    return _fold(weights / weights.sum(1, keepdim=True))


def _fold(weights: Tensor) -> Tensor:
    """Weights of an endless row of mirror images, … S K·S, the image in the middle → … S S."""
    side = weights.shape[-2]
    copies = weights.unflatten(-1, (-1, side)).unbind(-2)
    middle = len(copies) // 2
    mirrored = [c.flip(-1) if (k - middle) % 2 else c for k, c in enumerate(copies)]
    return torch.stack(mirrored).sum(0)
