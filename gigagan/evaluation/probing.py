"""A grid of captions, and a generator whose maps are read, and changed, while it draws them.

A unit is one feature map of a level, of which both recipes have a list.

Shape letters: N pictures, U units, h w their maps, M changed units, L latents, Z width, H W image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigagan.common.progress import Progress, silent
from gigagan.evaluation.heldout import Gallery
from gigagan.models.base import BaseGenerator
from gigagan.models.encoders import TextEncoder
from gigagan.models.text import Text

THING, STYLE, BACKGROUND = "thing", "style", "background"
MASK_PX = 64
"""Most pixels along a side of what is kept of pictures and maps; larger ones are averaged down."""
_BATCH = 64


@dataclass(frozen=True)
class Grid:
    """Every combination of the values of some axes, the last axis fastest, each with a caption."""

    axes: Mapping[str, Sequence[str]]
    captions: Sequence[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """How many values each axis has."""
        return tuple(map(len, self.axes.values()))

    def values(self, axis: str, N: int) -> np.ndarray:
        """The number of each picture's value on an axis, of N: all captions at a latent, …"""
        each = np.unravel_index(np.arange(len(self.captions)), self.shape)
        return np.tile(each[list(self.axes).index(axis)], N // len(self.captions))

    def same(self, axis: str, N: int) -> np.ndarray:
        """Numbers of N pictures: by their value K, and in each column all else is the same."""
        numbers = np.arange(N).reshape(-1, *self.shape)
        moved = np.moveaxis(numbers, 1 + list(self.axes).index(axis), 0)
        return moved.reshape(len(moved), -1)

    @classmethod
    def fill(cls, template: str, axes: Mapping[str, Sequence[str]]) -> Grid:
        """Captions from a template with a {place} for each axis.

        Raises:
            ValueError: an axis without a value or with one twice, the first with only one, or a
                place that is not there once.
        """
        for number, (name, values) in enumerate(axes.items()):
            twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
            if twice is not None:
                raise ValueError(f"the {name} {twice!r} is given twice: give each once")
            if not values or not all(value.strip() for value in values):
                raise ValueError(f"a {name} is empty or none is given: say what to draw")
            if number == 0 and len(values) < 2:
                raise ValueError(
                    f"{values[0]!r} alone: give two or more, a concept is told from others"
                )
            if template.count(f"{{{name}}}") != 1:
                raise ValueError(f"template {template!r}: it needs {{{name}}} once")
        captions = []
        for values in product(*axes.values()):
            caption = template
            for name, value in zip(axes, values, strict=True):
                caption = caption.replace(f"{{{name}}}", value)
            captions.append(caption)
        return cls(axes, captions)

    @classmethod
    def of_gallery(cls, gallery: Gallery, most: int) -> Grid:
        """At most so many of its captions: trained concepts by lot, in all styles and backgrounds.

        Raises:
            ValueError: that is not enough for two concepts, or there are none.
        """
        works = [work for work in gallery.works if work.split != "unseen"]
        if not works:
            raise ValueError("the gallery has no trained concept: there is nothing to dissect")
        captions = {(w.concept, w.style, w.background): w.caption for w in works}
        concepts, styles, backgrounds = (sorted(set(part)) for part in zip(*captions, strict=True))
        each = len(styles) * len(backgrounds)
        looks = {
            c: [captions.get((c, s, b)) for s in styles for b in backgrounds] for c in concepts
        }
        lot = np.random.default_rng(0).permutation([c for c in concepts if None not in looks[c]])
        chosen = [str(concept) for concept in lot[: most // each]]
        if len(chosen) < 2:
            raise ValueError(
                f"{most} captions are not two concepts of the gallery in {len(styles)} styles on "
                f"{len(backgrounds)} backgrounds: set evaluate.dissect_captions to {2 * each}"
            )
        axes = {THING: chosen, STYLE: styles, BACKGROUND: backgrounds}
        return cls(axes, [text for c in chosen for text in looks[c] if text is not None])


class Change(NamedTuple):
    """Values that are put in the place of some maps."""

    units_M: Tensor
    values_M: Tensor
    where_Nhw: Tensor
    """Of each picture, the places that are changed: bool, in the level's own resolution."""


class Drawn(NamedTuple):
    """Pictures, and the maps that they came from; both on the CPU, float32."""

    pictures_NCHW: Tensor
    """In [−1, 1]."""
    maps_NUhw: Tensor


class Probe:
    """A generator whose maps at one level are read, and changed, while it draws."""

    def __init__(
        self,
        network: BaseGenerator,
        encoder: TextEncoder,
        grid: Grid,
        *,
        px: int,
        latents: int,
        seed: int = 0,
    ) -> None:
        self.network, self.px = network, px
        self.level = level_of(network, px)
        random = torch.Generator().manual_seed(seed)
        self.z_LZ = torch.randn(latents, network.config.latent_dim, generator=random)
        with torch.inference_mode():
            self.text = network.read(encoder.encode(grid.captions))

    @torch.inference_mode()
    def draw(
        self,
        rows: Sequence[int] | np.ndarray,
        change: Change | None = None,
        progress: Progress = silent,
    ) -> Drawn:
        """Pictures by their numbers: all captions of the first latent, of the second, …"""
        count = len(next(x for x in self.text if x is not None))
        pictures: list[Tensor] = []
        maps: list[Tensor] = []
        for start in range(0, len(rows), _BATCH):
            batch = np.asarray(rows[start : start + _BATCH])
            text = Text(*(None if x is None else x[batch % count] for x in self.text))
            part = None
            if change is not None:
                part = change._replace(where_Nhw=change.where_Nhw[start : start + _BATCH])
            style_BS = self.network.style(self.z_LZ[batch // count].to(_device(self.network)), text)
            with _watched(self.level, part) as seen:
                pictures.append(_small(self.network.synthesize(style_BS, text)[0].clamp(-1, 1)))
            maps += map(_small, seen)
            progress("pictures", start + len(batch), len(rows))
        return Drawn(torch.cat(pictures), torch.cat(maps))


def level_of(network: BaseGenerator, px: int) -> nn.Module:
    """The layers at one resolution, of either recipe; raises ValueError with those there are."""
    whole = network.config.resolution
    sides = [whole >> i for i in reversed(range(len(network.levels)))]
    if px not in sides:
        raise ValueError(
            f"level {px}: the generator has none of {px} px, choose {', '.join(map(str, sides))}"
        )
    return network.levels[sides.index(px)]


@contextmanager
def _watched(level: nn.Module, change: Change | None) -> Iterator[list[Tensor]]:
    """A level's maps of every pass, after a change that later layers see, too."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, __: Any, maps_NUhw: Tensor) -> Tensor:
        if change is not None:
            units_M, where_N1hw = change.units_M, change.where_Nhw[:, None].to(maps_NUhw.device)
            values_M11 = change.values_M.to(maps_NUhw)[:, None, None]
            maps_NUhw = maps_NUhw.clone()
            maps_NUhw[:, units_M] = torch.where(where_N1hw, values_M11, maps_NUhw[:, units_M])
        seen.append(maps_NUhw)
        return maps_NUhw

    handle = level.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def _small(x_NCHW: Tensor) -> Tensor:
    x_NCHW = x_NCHW.float()
    if x_NCHW.shape[-1] > MASK_PX:
        x_NCHW = F.adaptive_avg_pool2d(x_NCHW, MASK_PX)
    return x_NCHW.cpu()


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
