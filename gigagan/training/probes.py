"""What is looked at every so often: a grid of fixed prompts and z, and numbers on unseen captions.

Everything is drawn with the averaged generator and fixed noise, so two ticks differ by training
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn

from gigagan.evaluation import enlarge, naming
from gigagan.evaluation.heldout import SPLITS, Gallery, Heldout
from gigagan.evaluation.judges import alignment, fidelity
from gigagan.evaluation.judges.features import square
from gigagan.evaluation.report.results import caption_grid
from gigagan.models.base import BaseGenerator, features_of
from gigagan.models.pixels import from_uint8, to_uint8
from gigagan.models.text import Reader
from gigagan.models.upsampler import Upsampler

BATCH, UPSAMPLER_BATCH = 64, 8
Z_PROMPTS, Z_PER_PROMPT = 4, 8
GRID_PROMPTS, GRID_Z = 8, 4


@dataclass(frozen=True)
class Look:
    """What a tick found."""

    grid: Image.Image
    scalars: dict[str, float]


class Probe(Protocol):
    """Looks at a generator every so often."""

    def look(self, generator: Any) -> Look:
        """Draw and measure with a generator in evaluation mode."""


class BaseProbe:
    """Probes of the base generator.

    Without a held-out set only the grid and the effect of z are looked at, and so where captions
    are names of classes, or empty: no real picture is the one that should be drawn. Without a
    gallery the own picture is looked for among all of the set by coarse layout.
    """

    def __init__(
        self,
        captions: Reader,
        heldout: Heldout | None,
        *,
        resolution: int,
        num_captions: int,
        prompts: Sequence[str],
    ) -> None:
        self.features = captions
        self.resolution = resolution
        self.has_pairs = heldout is None or heldout.asks == "text"
        self.gallery = heldout.gallery if heldout else None
        self.heldout_captions = heldout.captions[:num_captions] if heldout else []
        self.names = (heldout.backgrounds or [])[:num_captions] if heldout else []
        self.palette = heldout.palette if heldout else None
        distinct = list(dict.fromkeys(self.heldout_captions))
        self.prompts = list(prompts) or distinct[:GRID_PROMPTS]
        self.heldout_pictures = heldout.pictures[:num_captions] if heldout else []
        self.real = _read(self.heldout_pictures, resolution) if self.heldout_pictures else None

    @torch.no_grad()
    def look(self, generator: BaseGenerator) -> Look:
        """Draw and measure with a generator in evaluation mode."""
        scalars: dict[str, float] = {}
        if self.real is not None and self.has_pairs and len(self.heldout_captions) > 1:
            drawn = self._draw(generator, self.heldout_captions, seed=1)
            if self.gallery is None:
                rank = alignment.pixel_probe_rank(drawn, self.real)
                scalars["probe/pixel_median_rank"] = rank.median_rank
                scalars["probe/pixel_chance_rank"] = rank.chance
            else:
                scalars |= self._named(generator, self.gallery, drawn)
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
        return Look(self._grid(pictures), scalars)

    def _named(
        self, generator: BaseGenerator, gallery: Gallery, heldout_NHWC: np.ndarray
    ) -> dict[str, float]:
        """R@1 by pixels of every split; held-out captions are drawn already."""
        anyway, beside = naming.plan(gallery, self.heldout_captions)
        rows = [self.heldout_captions.index(gallery.works[place].caption) for place in anyway]
        drawn = [heldout_NHWC[rows]]
        if beside:
            asked = [gallery.works[place].caption for place in beside]
            drawn.append(self._draw(generator, asked, seed=5))
        pooled_ND = naming.pooled(np.concatenate(drawn))
        places = anyway + beside
        ranks = naming.pixel_ranks(gallery, places, pooled_ND, self._gallery_pooled)
        splits = np.array([gallery.works[place].split for place in places])
        found = {
            f"probe/naming_r1_{split}": float((ranks.rank_N[splits == split] <= 1).mean())
            for split in SPLITS
            if split in splits
        }
        return found | {"probe/naming_chance": float((1 / ranks.count_N).mean())}

    @cached_property
    def _gallery_pooled(self) -> np.ndarray:
        """The gallery's pictures pooled [G, D]: read once, by who looks."""
        assert self.gallery is not None
        return naming.read_pooled([work.picture for work in self.gallery.works], self.resolution)

    def _grid(self, pictures_PZHWC: np.ndarray) -> Image.Image:
        """A row of latents per prompt, and the real picture last where it is known."""
        known = {work.caption: work.picture for work in self.gallery.works} if self.gallery else {}
        known = dict(zip(self.heldout_captions, self.heldout_pictures, strict=True)) | known
        rows = []
        for caption, tiles in zip(self.prompts[:GRID_PROMPTS], pictures_PZHWC, strict=True):
            real = [square(known[caption], self.resolution)] if caption in known else []
            rows.append((caption, [*map(Image.fromarray, tiles), *real]))
        has_real = any(len(row) > GRID_Z for _, row in rows)
        title = "fixed prompts, four latents each" + (", the real picture last" if has_real else "")
        return caption_grid(rows, title=title, cell_px=max(96, self.resolution), columns=2)

    def _draw(self, generator: BaseGenerator, prompts: Sequence[str], *, seed: int) -> np.ndarray:
        random = torch.Generator().manual_seed(seed)
        z = torch.randn(len(prompts), generator.config.latent_dim, generator=random)
        parts = []
        for start in range(0, len(prompts), BATCH):
            features = features_of(generator, prompts[start : start + BATCH], self.features)
            latents = z[start : start + BATCH].to(self.features.device)
            parts.append(to_uint8(generator(latents, features)[0]))
        return np.concatenate(parts)


class Originals(NamedTuple):
    """Pictures that the upsampler shall make again."""

    real_NHWC: np.ndarray
    """uint8."""
    captions: list[str]


class UpsamplerProbe:
    """Probes of the upsampler: LPIPS and PSNR to unseen pictures, beside plain enlargement.

    What it enlarges are the pictures shrunk by Lanczos, as everywhere. A gallery's concepts that
    were never trained are measured apart, as `…_unseen`.
    """

    NUM_IMAGES = 64

    def __init__(
        self,
        captions: Reader,
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
        if heldout is None:
            self.sets = {"": Originals(fallback[0][:count], fallback[1][:count])}
            return
        pictures = _read(heldout.pictures[:count], resolution)
        self.sets = {"": Originals(pictures, heldout.captions[:count])}
        works = heldout.gallery.works if heldout.gallery else []
        unseen = [work for work in works if work.split == "unseen"]
        if unseen:
            unseen = unseen[:: max(len(unseen) // count, 1)][:count]
            pictures = _read([work.picture for work in unseen], resolution)
            self.sets["_unseen"] = Originals(pictures, [work.caption for work in unseen])

    def look(self, generator: Upsampler) -> Look:
        """Enlarge shrunken pictures and compare them with the originals."""
        scalars: dict[str, float] = {}
        rows: list[np.ndarray] = []
        for suffix, originals in self.sets.items():
            small = self._shrunken(originals)
            made_NHWC = self._enlarge(generator, small, originals.captions)
            scalars |= self._compare(made_NHWC, originals, suffix)
            if not rows:
                plain_NHWC = enlarge.plainly(small, made_NHWC.shape[1], "bicubic")
                rows = [x[:GRID_PROMPTS] for x in (plain_NHWC, made_NHWC, originals.real_NHWC)]
        title = "bicubic enlargement, ours, original"
        captions = self.sets[""].captions[:GRID_PROMPTS]
        # Its own figures come first: summaries show the first few.
        return Look(_sheet(np.stack(rows, axis=1), captions, title), scalars | self._plain)

    @cached_property
    def _plain(self) -> dict[str, float]:
        """Figures of enlargement without a network, the same at every tick."""
        found: dict[str, float] = {}
        for suffix, originals in self.sets.items():
            small, side = self._shrunken(originals), originals.real_NHWC.shape[1]
            for method in enlarge.PLAIN:
                made_NHWC = enlarge.plainly(small, side, method)
                found |= self._compare(made_NHWC, originals, f"{suffix}_{method}")
        return found

    def _shrunken(self, originals: Originals) -> list[Image.Image]:
        side = (self.input_resolution, self.input_resolution)
        lanczos = Image.Resampling.LANCZOS
        return [Image.fromarray(x).resize(side, lanczos) for x in originals.real_NHWC]

    @torch.no_grad()
    def _enlarge(
        self, generator: Upsampler, small: Sequence[Image.Image], captions: Sequence[str]
    ) -> np.ndarray:
        random = torch.Generator().manual_seed(4)
        z_NZ = torch.randn(len(small), generator.config.latent_dim, generator=random)
        small_NHWC = np.stack([np.asarray(picture) for picture in small])
        small_NCHW = from_uint8(torch.from_numpy(small_NHWC).permute(0, 3, 1, 2))
        noise_NCHW = torch.randn(small_NCHW.shape, generator=random)
        parts = []
        for start in range(0, len(small), UPSAMPLER_BATCH):
            rows = slice(start, start + UPSAMPLER_BATCH)
            features = self.features(captions[rows])
            inputs = (x[rows].to(self.features.device) for x in (small_NCHW, noise_NCHW, z_NZ))
            parts.append(to_uint8(generator(*inputs, features)[0]))
        return np.concatenate(parts)

    def _compare(
        self, made_NHWC: np.ndarray, originals: Originals, suffix: str
    ) -> dict[str, float]:
        real_NHWC = originals.real_NHWC
        found = {f"probe/psnr{suffix}": float(fidelity.psnr(made_NHWC, real_NHWC).mean())}
        if self.perceptual is not None:
            starts = range(0, len(real_NHWC), UPSAMPLER_BATCH)
            rows = [slice(start, start + UPSAMPLER_BATCH) for start in starts]
            distances = [
                fidelity.lpips_pairs(made_NHWC[r], real_NHWC[r], self.perceptual) for r in rows
            ]
            found[f"probe/lpips{suffix}"] = float(np.concatenate(distances).mean())
        return found


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
