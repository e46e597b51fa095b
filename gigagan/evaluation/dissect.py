"""Which units of a generator draw which concept: feature maps held against masks by IoU.

GAN Dissection (Bau et al. 2019, arXiv:1811.10597), with a mask from captions for a segmenter's: at
one latent a background is what changes with the word for it, a thing what then stays, a style what
changes with the style.

Shape letters: N pictures, U units, h w their maps, H W masks, B bytes of a mask's packed bits, K
concepts of an axis, R nulls, C colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gigagan.common.progress import Progress, silent
from gigagan.evaluation import switching
from gigagan.evaluation.findings import Findings
from gigagan.evaluation.heldout import Gallery
from gigagan.evaluation.probing import BACKGROUND, THING, Drawn, Grid, Probe
from gigagan.evaluation.setting import Setting
from gigagan.evaluation.switching import Switched, Switcher
from gigagan.models.base import BaseGenerator
from gigagan.models.encoders import TextEncoder

SHARE = 0.05
"""P(a > t) of a unit: how much of all pictures its mask covers."""
Generator = tuple[BaseGenerator, TextEncoder]
"""A network, and the encoder that it reads captions by."""
LATENTS = 2
"""Of each caption, in an evaluation."""
NULLS = 20
"""Times that masks are dealt out to other pictures."""

# ---- where a concept is ------------------------------------------------------------------------


def otsu(values: np.ndarray) -> float:
    """The threshold between two classes of greatest variance σ²_B = ω₀ω₁(μ₀ − μ₁)² (Otsu 1979).

    By a histogram of 256 bins; values above it are of the upper class.
    """
    counts, edges = np.histogram(values, 256)
    lower = np.cumsum(counts)[:-1]
    upper = counts.sum() - lower
    moments = np.cumsum(counts * (edges[:-1] + edges[1:]) / 2)
    means = moments[:-1] / lower.clip(1), (moments[-1] - moments[:-1]) / upper.clip(1)
    return float(edges[1 + int(np.argmax(lower * upper * (means[0] - means[1]) ** 2))])


def changed(pictures_KNCHW: Tensor) -> Tensor:
    """Where each of K values, all else equal, looks unlike most others: bool K N H W.

    By the median over the other values of the greatest difference among the three colours, above
    Otsu's threshold of that value's pictures.
    """
    masks = []
    for k, own_NCHW in enumerate(pictures_KNCHW):
        others = torch.cat([pictures_KNCHW[:k], pictures_KNCHW[k + 1 :]])
        difference_NHW = (others - own_NCHW).abs().amax(dim=2).median(dim=0).values
        masks.append(difference_NHW > otsu(difference_NHW.numpy()))
    return torch.stack(masks)


def masks(grid: Grid, pictures_NCHW: Tensor) -> dict[str, Tensor]:
    """Where in each picture its own value of an axis is: bool N H W of each with two or more."""
    pictures = pictures_NCHW.unflatten(0, (-1, *grid.shape))  # latents first
    found = {}
    for place, (axis, values) in enumerate(grid.axes.items(), start=1):
        if len(values) > 1:
            moved = pictures.movedim(place, 0)
            mask = changed(moved.flatten(1, -4)).unflatten(1, moved.shape[1:-3])
            found[axis] = mask.movedim(0, place).flatten(0, -3)
    if BACKGROUND in found and THING in found:
        found[THING] = ~found[BACKGROUND]
    return found


# ---- units against concepts --------------------------------------------------------------------


def packed(masks_NHW: Tensor | np.ndarray) -> np.ndarray:
    """Masks N H W as bits, eight to a byte: N B."""
    bits_NB: np.ndarray = np.packbits(np.asarray(masks_NHW).reshape(len(masks_NHW), -1), axis=1)
    return bits_NB


def above_threshold(map_Nhw: Tensor, side: int) -> np.ndarray:
    """A unit's masks N H W: its maps, enlarged bilinearly, above t with P(a > t) = `SHARE`."""
    large = F.interpolate(map_Nhw[:, None], size=(side, side), mode="bilinear")[:, 0].numpy()
    found_NHW: np.ndarray = large > np.quantile(large, 1 - SHARE)
    return found_NHW


def iou(unit_NB: np.ndarray, mask_NB: np.ndarray, concept_N: np.ndarray, count: int) -> np.ndarray:
    """IoU_c = Σ|M ∧ S_c| / Σ|M ∨ S_c| over all pictures, S_c being empty in those of others: K.

    Masks are `packed`; `concept_N` is the number of the concept that each picture's is of.
    """
    shared_K = np.bincount(concept_N, np.bitwise_count(unit_NB & mask_NB).sum(axis=1), count)
    masks_K = np.bincount(concept_N, np.bitwise_count(mask_NB).sum(axis=1), count)
    either_K = np.bitwise_count(unit_NB).sum() + masks_K - shared_K
    return shared_K / either_K.clip(1)


@dataclass(frozen=True)
class Agreement:
    """How well the units of a level agree with the concepts of one axis."""

    axis: str
    concepts: Sequence[str]
    iou_UK: np.ndarray
    null_UR: np.ndarray
    """The highest IoU of each unit with masks dealt out to other pictures, R times."""
    area_K: np.ndarray
    """Part of all pixels that a concept's masks take."""

    @property
    def null(self) -> float:
        """What 99 % of units stay below by chance."""
        return float(np.quantile(self.null_UR, 0.99))

    def told(self) -> dict[str, Any]:
        """Figures of this axis, as dissect.json has them."""
        best_U = self.iou_UK.max(axis=1)
        reachable_K = np.minimum(self.area_K, SHARE) / np.maximum(self.area_K, SHARE)
        return {
            "concepts": list(self.concepts),
            "area": self.area_K.tolist(),
            "reachable_iou": reachable_K.tolist(),
            "mean_best_iou": float(best_U.mean()),
            "null_mean": float(self.null_UR.mean()),
            "null_99": self.null,
            "units_above_null_99": int((best_U > self.null).sum()),
        }


def agree(grid: Grid, axis: str, units_UNB: Sequence[np.ndarray], mask_NHW: Tensor) -> Agreement:
    """IoU of every unit with every concept of an axis, and what chance gives."""
    N, K = len(mask_NHW), len(grid.axes[axis])
    concept_N, mask_NB, random = grid.values(axis, N), packed(mask_NHW), np.random.default_rng(0)
    orders = [random.permutation(N) for _ in range(NULLS)]
    dealt = [(mask_NB[order], concept_N[order]) for order in orders]
    return Agreement(
        axis,
        grid.axes[axis],
        np.stack([iou(unit_NB, mask_NB, concept_N, K) for unit_NB in units_UNB]),
        np.array([[iou(unit, *other, K).max() for other in dealt] for unit in units_UNB]),
        np.bincount(concept_N, mask_NHW.sum(dim=(1, 2)), K) / mask_NHW.numel(),
    )


# ---- all of it ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dissection:
    """What was found in one level of a generator."""

    grid: Grid
    drawn: Drawn
    agreements: dict[str, Agreement]
    switched: list[Switched]
    settings: dict[str, Any]

    def units(self) -> list[dict[str, Any]]:
        """Each unit with the concept that it agrees with best, the highest IoU first."""
        rows = []
        for unit in range(self.drawn.maps_NUhw.shape[1]):
            best = max(self.agreements.values(), key=lambda a: float(a.iou_UK[unit].max()))
            k = int(best.iou_UK[unit].argmax())
            row = {"unit": unit, "axis": best.axis, "concept": best.concepts[k]}
            rows.append({**row, "iou": float(best.iou_UK[unit, k]), "null_99": best.null})
        return sorted(rows, key=lambda row: -row["iou"])

    def told(self) -> dict[str, Any]:
        """What dissect.json holds."""
        return {
            "settings": self.settings,
            "axes": {axis: agreement.told() for axis, agreement in self.agreements.items()},
            "units": self.units(),
            "concepts": [switched.told() for switched in self.switched],
        }


def dissect(
    network: BaseGenerator,
    encoder: TextEncoder,
    grid: Grid,
    *,
    level: int | None = None,
    latents: int = 4,
    off: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Dissection:
    """Draw a grid, hold units against concepts, and switch the `off` best units of each.

    `level` is a resolution in pixels, by default the last but one; `off` by default an eighth of
    its units.

    Raises:
        ValueError: there is no such level, it has too few units, or pixels came out as NaN.
    """
    last_but_one = network.config.resolution >> min(1, len(network.levels) - 1)
    px = last_but_one if level is None else level
    probe = Probe(network, encoder, grid, px=px, latents=latents, seed=seed)
    count = latents * len(grid.captions)
    drawn = probe.draw(range(count), progress=progress)
    if drawn.pictures_NCHW.isnan().any():
        raise ValueError("NaN instead of a picture: the weights are damaged")
    U = drawn.maps_NUhw.shape[1]
    off = max(1, U // 8) if off is None else off
    if not 1 <= off <= U // 2:
        raise ValueError(f"off {off}: level {px} has {U} units, give 1 to {U // 2}")
    masks_of = masks(grid, drawn.pictures_NCHW)
    side = drawn.pictures_NCHW.shape[-1]
    units_UNB = [packed(above_threshold(x_Nhw, side)) for x_Nhw in drawn.maps_NUhw.unbind(1)]
    agreements = {axis: agree(grid, axis, units_UNB, mask) for axis, mask in masks_of.items()}
    switcher = Switcher(probe, grid, drawn, masks_of)
    every = [(axis, concept) for axis in agreements for concept in range(len(grid.axes[axis]))]
    switched = []
    for axis, concept in every:
        switched.append(switcher(axis, concept, agreements[axis].iou_UK[:, concept], off))
        progress("concepts", len(switched), len(every))
    settings = {"level": px, "units": U, "off": off, "seed": seed, "share": SHARE, "nulls": NULLS}
    settings |= {"latents": latents, "captions": len(grid.captions), **switching.SETTINGS}
    return Dissection(grid, drawn, agreements, switched, settings)


def measure(
    findings: Findings, generator: Generator | None, gallery: Gallery | None, at: Setting
) -> Dissection | None:
    """As a part of an evaluation: the mean over units of their best IoU, on each axis."""
    reason = None
    if not at.config.dissect_captions:
        reason = "evaluate.dissect_captions is 0"
    elif generator is None:
        reason = "no torch network that reads captions was given, whose maps could be read"
    elif gallery is None:
        reason = "no gallery.json beside the captions says which concepts there are"
    if generator is None or gallery is None or reason:
        findings.absent["dissection"] = str(reason)
        return None
    try:
        grid = Grid.of_gallery(gallery, at.config.dissect_captions)
    except ValueError as error:
        findings.absent["dissection"] = str(error)
        return None
    settings: dict[str, Any] = {"seed": at.config.seed, "progress": at.progress}
    found = dissect(*generator, grid, latents=LATENTS, **settings)
    for axis, figures in found.told()["axes"].items():
        chance = figures["null_mean"]
        findings.add(f"unit_iou_{axis}", figures["mean_best_iou"], chance=chance)
    return found
