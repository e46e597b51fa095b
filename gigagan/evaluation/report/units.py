"""A dissection to look at: where units are strongest, outlined, and what switching them does."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import binary_erosion
from torch import Tensor

from gigagan.evaluation.dissect import Dissection, above_threshold
from gigagan.evaluation.report.results import caption_grid
from gigagan.evaluation.switching import Switched
from gigagan.models.pixels import to_uint8

CELL_PX = 96
ROWS = 8
_TOP = 6
_OUTLINE = (255, 0, 255)
TITLES = (
    "Units and the concepts they agree with, where they are strongest",
    "Its own picture, best units off, random off; another's, best units on, random on",
)

Rows = list[tuple[str, list[Image.Image]]]
"""A caption above each row of pictures."""


class Looks(NamedTuple):
    """Rows of both kinds, by `TITLES`."""

    units: Rows
    changes: Rows

    def sheet(self) -> Image.Image:
        """Both beside each other."""
        parts = [
            caption_grid(rows, title=title, cell_px=CELL_PX)
            for rows, title in zip(self, TITLES, strict=True)
        ]
        size = sum(part.width for part in parts), max(part.height for part in parts)
        sheet = Image.new("RGB", size, "white")
        for number, part in enumerate(parts):
            sheet.paste(part, (number * parts[0].width, 0))
        return sheet


def looks(found: Dissection, count: int = ROWS) -> Looks:
    """The units of highest IoU, and of each axis the concepts whose best units agree most."""
    units = [_unit(found, row) for row in found.units()[:count]]
    each = -(-count // len(found.agreements))
    changes: Rows = []
    for axis in found.agreements:
        own = [switched for switched in found.switched if switched.axis == axis]
        changes += map(_change, sorted(own, key=lambda switched: -switched.iou[0])[:each])
    return Looks(units, changes[:count])


def _unit(found: Dissection, row: dict[str, Any]) -> tuple[str, list[Image.Image]]:
    """The captions' pictures in which a unit is strongest, each of another caption."""
    map_Nhw = found.drawn.maps_NUhw[:, row["unit"]]
    pictures_NCHW = found.drawn.pictures_NCHW
    mask_NHW = above_threshold(map_Nhw, pictures_NCHW.shape[-1])
    captions: dict[int, int] = {}
    for n in map_Nhw.amax(dim=(1, 2)).argsort(descending=True).tolist():
        captions.setdefault(n % len(found.grid.captions), n)
    top = list(captions.values())[:_TOP]
    text = (
        f"unit {row['unit']}: {row['concept']}, IoU {row['iou']:.2f} (chance {row['null_99']:.2f})"
    )
    return text, [_outlined(pictures_NCHW[n], mask_NHW[n]) for n in top]


def _outlined(picture_CHW: Tensor, mask_HW: np.ndarray) -> Image.Image:
    """A picture, enlarged to `CELL_PX`, with the border of a mask."""
    size = (CELL_PX, CELL_PX)
    large = _picture(picture_CHW).resize(size, Image.Resampling.NEAREST)
    mask = np.asarray(Image.fromarray(mask_HW).resize(size, Image.Resampling.NEAREST))
    pixels_HWC = np.array(large)
    pixels_HWC[mask & ~binary_erosion(mask, iterations=2)] = _OUTLINE
    return Image.fromarray(pixels_HWC)


def _change(switched: Switched) -> tuple[str, list[Image.Image]]:
    best, random = switched.effect, switched.random
    text = (
        f"{switched.concept}: change inside {best.inside:.1%} (random {random.inside:.1%}), "
        f"outside {best.outside:.1%} ({random.outside:.1%}); ACE {best.ace:.2f} ({random.ace:.2f})"
    )
    return text, [_picture(picture) for picture in switched.pictures]


def _picture(picture_CHW: Tensor) -> Image.Image:
    return Image.fromarray(to_uint8(picture_CHW[None])[0])
