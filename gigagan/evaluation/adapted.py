"""What a base draws before and after it was adapted: names, KID, and how far pictures moved.

Shape letters: N captions, G gallery, D pixels, B batch, C colour, H W image, Z latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gigagan.evaluation import naming
from gigagan.evaluation.heldout import Gallery, Heldout, Work
from gigagan.evaluation.judges.distances import kernel_distance
from gigagan.evaluation.judges.features import extract, extractor, square
from gigagan.evaluation.setting import INCEPTION
from gigagan.models.pixels import to_uint8

Draw = Callable[[Tensor, Sequence[str]], list[Tensor]]
"""Latents B Z and captions → a pyramid, largest first."""
T = TypeVar("T")
LEAST_FOR_KID, MOST_FOR_KID = 16, 48
"""Inception takes a third of a second for a picture on a core."""
KID_PX = 128
_BATCH = 16


@dataclass(frozen=True)
class Asked:
    """Captions that are drawn, and the pictures that they are told apart by."""

    gallery: Gallery
    places: list[int]
    """Which of its works are asked for."""
    reals_GHWC: np.ndarray
    """Its pictures, or what the base drew for its captions at other latents."""

    @property
    def captions(self) -> list[str]:
        """What is asked for."""
        return [self.gallery.works[place].caption for place in self.places]

    def only(self, wanted: Callable[[str], bool], count: int) -> Asked:
        """At most `count` of the captions that are wanted, against the same gallery."""
        works = self.gallery.works
        kept = [place for place in self.places if wanted(works[place].caption)]
        return Asked(self.gallery, _thinned(kept, count), self.reals_GHWC)


def of_pictures(found: Heldout, count: int, px: int) -> Asked:
    """At most `count` captions of a set with pictures, by its gallery where it has one."""
    if found.gallery is None:
        captions = [found.captions[row] for row in found.paired]
        whole = of_gallery(_flat(captions, found.pictures), px)
        return whole.only(lambda caption: True, count)
    return of_gallery(found.gallery, px).only(lambda c: c in set(found.captions), count)


def of_gallery(gallery: Gallery, px: int) -> Asked:
    """Every caption of a gallery."""
    reals = np.stack([np.asarray(square(work.picture, px)) for work in gallery.works])
    return Asked(gallery, list(range(len(gallery.works))), reals)


def of_captions(captions: Sequence[str], draw: Draw, latent_dim: int) -> Asked:
    """Captions without pictures: each is told apart by what `draw` makes of it at another z."""
    gallery = _flat(captions, [Path()] * len(captions))
    return Asked(gallery, list(range(len(captions))), drawn(draw, captions, latent_dim, seed=1))


def _thinned(items: Sequence[T], count: int) -> list[T]:
    """At most `count`, evenly spread."""
    step = max(1.0, len(items) / count)
    return [items[int(i * step)] for i in range(min(count, len(items)))]


def _flat(captions: Sequence[str], pictures: Sequence[Path]) -> Gallery:
    """A gallery of what is not known to have styles: every caption is told from all others."""
    pairs = dict(zip(captions, pictures, strict=True))
    return Gallery([Work(c, c, "", "", "trained", p) for c, p in pairs.items()])


@torch.no_grad()
def drawn(draw: Draw, captions: Sequence[str], latent_dim: int, *, seed: int) -> np.ndarray:
    """One picture a caption, N H W C in bytes; z is the seed's, by place in the list."""
    random = torch.Generator().manual_seed(seed)
    z_NZ = torch.randn(len(captions), latent_dim, generator=random)
    parts = [
        to_uint8(draw(z_NZ[i : i + _BATCH], captions[i : i + _BATCH])[0])
        for i in range(0, len(captions), _BATCH)
    ]
    return np.concatenate(parts)


def rate(asked: Asked, pictures_NHWC: np.ndarray) -> tuple[float, float]:
    """R@1 by 16×16 pixels, the share of pictures nearest to their own caption's; and chance."""
    found = naming.pixel_ranks(
        asked.gallery, asked.places, naming.pooled(pictures_NHWC), naming.pooled(asked.reals_GHWC)
    )
    return float((found.rank_N <= 1).mean()), float((1 / found.count_N).mean())


def kids(sets: Sequence[np.ndarray], reals_NHWC: np.ndarray, folder: Path) -> list[float]:
    """KID of each set to the same real pictures, by at most 48 of each, evenly spread."""
    thinned = [_thinned([*pictures], MOST_FOR_KID) for pictures in (*sets, reals_NHWC)]
    judge = extractor(f"{INCEPTION}/clean", "cpu")
    everything = [picture for pictures in thinned for picture in pictures]
    features = extract(everything, [judge], transform=lambda p: square(p, KID_PX), folder=folder)
    ends = np.cumsum([len(pictures) for pictures in thinned[:-1]])
    *drawn_sets, real_ND = np.split(np.asarray(features[judge.name]), ends)
    return [kernel_distance(drawn_ND, real_ND).value for drawn_ND in drawn_sets]


def compared(
    asked: Asked, before_NHWC: np.ndarray, after_NHWC: np.ndarray, folder: Path | None
) -> dict[str, float]:
    """Both sets of pictures judged, and `moved`: their mean difference in levels from 0 to 255.

    Features for KID go to `folder`; without one, or for fewer than 16 captions, it is not measured.
    """
    pair = {"before": before_NHWC, "after": after_NHWC}
    figures: dict[str, float] = {}
    for name, pictures_NHWC in pair.items():
        figures[f"r1_{name}"], chance = rate(asked, pictures_NHWC)
    figures |= {"r1_chance": chance, "captions": float(len(asked.places))}
    if folder is not None and len(asked.places) >= LEAST_FOR_KID:
        found_kids = kids([*pair.values()], asked.reals_GHWC[asked.places], folder)
        figures |= {f"kid_{n}": value for n, value in zip(pair, found_kids, strict=True)}
    figures["moved"] = float(np.abs(before_NHWC.astype(np.float64) - after_NHWC).mean())
    return figures
