"""What is looked at every so often: a grid of fixed prompts and z, and numbers on unseen captions.

Everything is drawn with the averaged generator and fixed noise, so two ticks differ by training
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gigagan.evaluation import alignment
from gigagan.evaluation.features import square
from gigagan.evaluation.heldout import Heldout
from gigagan.evaluation.report import caption_grid
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.layers import downsample
from gigagan.models.upsampler import Upsampler
from gigagan.training.captions import CaptionFeatures

BATCH = 64
Z_PROMPTS, Z_PER_PROMPT = 4, 8
GRID_PROMPTS, GRID_Z = 8, 4


def to_uint8(images_BCHW: Tensor) -> np.ndarray:
    """Images in [−1, 1] → uint8 B H W C."""
    scaled = (images_BCHW.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(images_BCHW: Tensor) -> Tensor:
    """uint8 → float32 in [−1, 1]."""
    return images_BCHW.float() / 127.5 - 1


@dataclass(frozen=True)
class Look:
    """What a tick found."""

    grid: Image.Image
    scalars: dict[str, float]


class BaseProbe:
    """Probes of the base generator.

    Without a held-out set only the grid and the effect of z are looked at.
    """

    def __init__(
        self,
        captions: CaptionFeatures,
        heldout: Heldout | None,
        *,
        resolution: int,
        num_captions: int,
        prompts: Sequence[str],
    ) -> None:
        self.features = captions
        self.heldout_captions = heldout.captions[:num_captions] if heldout else []
        self.names = (heldout.backgrounds or [])[:num_captions] if heldout else []
        self.palette = heldout.palette if heldout else None
        self.prompts = list(prompts) or self.heldout_captions[:GRID_PROMPTS]
        self.real = _read(heldout.pictures[:num_captions], resolution) if heldout else None

    @torch.no_grad()
    def look(self, generator: nn.Module) -> Look:
        """Draw and measure with a generator in evaluation mode."""
        assert isinstance(generator, Generator)
        scalars: dict[str, float] = {}
        if self.real is not None and len(self.heldout_captions) > 1:
            drawn = self._draw(generator, self.heldout_captions, seed=1)
            rank = alignment.pixel_probe_rank(drawn, self.real)
            scalars["probe/pixel_median_rank"] = rank.median_rank
            scalars["probe/pixel_chance_rank"] = rank.chance
            if self.palette and self.names:
                scalars["probe/colour_accuracy"] = alignment.background_colour_accuracy(
                    drawn, self.names, self.palette
                )
                scalars["probe/shape_rank"] = alignment.shape_rank(drawn, self.real, self.names)
        repeated = [p for p in self.prompts[:GRID_PROMPTS] for _ in range(GRID_Z)]
        tiles = self._draw(generator, repeated, seed=2)
        pictures = tiles.reshape(-1, GRID_Z, *tiles.shape[1:])
        several = [p for p in self.prompts[:Z_PROMPTS] for _ in range(Z_PER_PROMPT)]
        by_prompt = self._draw(generator, several, seed=3)
        scalars["probe/z_sensitivity"] = alignment.z_sensitivity(
            by_prompt.reshape(-1, Z_PER_PROMPT, *by_prompt.shape[1:])
        )
        title = "fixed prompts, four latents each"
        return Look(_sheet(pictures, self.prompts[:GRID_PROMPTS], title), scalars)

    def _draw(self, generator: Generator, prompts: Sequence[str], *, seed: int) -> np.ndarray:
        random = torch.Generator().manual_seed(seed)
        z = torch.randn(len(prompts), generator.config.latent_dim, generator=random)
        parts = []
        for start in range(0, len(prompts), BATCH):
            features = self.features(prompts[start : start + BATCH])
            latents = z[start : start + BATCH].to(features.pooled_BD.device)
            parts.append(to_uint8(generator(latents, features)[0]))
        return np.concatenate(parts)


class UpsamplerProbe:
    """Probes of the upsampler: LPIPS and PSNR to unseen pictures, beside bilinear enlargement."""

    NUM_IMAGES = 32

    def __init__(
        self,
        captions: CaptionFeatures,
        heldout: Heldout | None,
        perceptual: nn.Module | None,
        *,
        resolution: int,
        input_resolution: int,
        fallback: tuple[np.ndarray, list[str]],
    ) -> None:
        """`fallback`: training pictures (uint8 B H W C) and captions, where nothing is held out."""
        self.features = captions
        self.perceptual = perceptual
        self.input_resolution = input_resolution
        count = self.NUM_IMAGES
        if heldout is not None:
            self.captions = heldout.captions[:count]
            self.real = _read(heldout.pictures[:count], resolution)
        else:
            self.real, self.captions = fallback[0][:count], fallback[1][:count]

    @torch.no_grad()
    def look(self, generator: nn.Module) -> Look:
        """Enlarge shrunken pictures and compare them with the originals."""
        assert isinstance(generator, Upsampler)
        features = self.features(self.captions)
        device = features.pooled_BD.device
        random = torch.Generator().manual_seed(4)
        z = torch.randn(len(self.captions), generator.config.latent_dim, generator=random)
        z = z.to(device)
        target = from_uint8(torch.from_numpy(self.real).permute(0, 3, 1, 2)).to(device)
        small = target
        while small.shape[-1] > self.input_resolution:
            small = downsample(small)
        noise = torch.randn(small.shape, generator=random).to(device)
        ours = torch.cat(
            [
                generator(*(x[i : i + 8] for x in (small, noise, z)), _rows(features, i, i + 8))[0]
                for i in range(0, len(target), 8)
            ]
        ).clamp(-1, 1)
        side = target.shape[-1]
        bilinear = nn.functional.interpolate(small, size=(side, side), mode="bilinear").clamp(-1, 1)
        scalars = {
            "probe/psnr": _psnr(ours, target),
            "probe/psnr_bilinear": _psnr(bilinear, target),
        }
        if self.perceptual is not None:
            scalars["probe/lpips"] = self._lpips(ours, target)
            scalars["probe/lpips_bilinear"] = self._lpips(bilinear, target)
        rows = [to_uint8(x[:GRID_PROMPTS]) for x in (bilinear, ours, target)]
        title = "bilinear enlargement, ours, original"
        sheet = _sheet(np.stack(rows, axis=1), self.captions[:GRID_PROMPTS], title)
        return Look(sheet, scalars)

    def _lpips(self, images: Tensor, target: Tensor) -> float:
        assert self.perceptual is not None
        parts = [
            self.perceptual(images[i : i + 8], target[i : i + 8]).flatten()
            for i in range(0, len(target), 8)
        ]
        return torch.cat(parts).mean().item()


def _rows(features: TextFeatures, start: int, stop: int) -> TextFeatures:
    return type(features)(*(part[start:stop] for part in features))


def _psnr(images: Tensor, target: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB, the range being 2."""
    errors = (images - target).square().flatten(1).mean(1).clamp(min=1e-10)
    return (10 * torch.log10(4 / errors)).mean().item()


def _read(pictures: Sequence[Path], resolution: int) -> np.ndarray:
    """Centre-cropped and resized pictures, uint8 B H W C."""
    return np.stack([np.asarray(square(p, resolution)) for p in pictures])


def _sheet(pictures_PKHWC: np.ndarray, captions: Sequence[str], title: str) -> Image.Image:
    """A row of pictures per prompt, the prompt above it."""
    rows = [
        (caption, [Image.fromarray(tile) for tile in row])
        for caption, row in zip(captions, pictures_PKHWC, strict=True)
    ]
    side = max(96, pictures_PKHWC.shape[2])
    return caption_grid(rows, title=title, cell_px=side, columns=2)
