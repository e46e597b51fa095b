"""A picture of any size through a network of one size: overlapping tiles, blended without seams.

Shape letters: B tiles, C colour, H W a picture, h w a tile, F the factor of enlargement.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from gigagan.models.upsampler import _lanczos as lanczos

Network = Callable[[Tensor, Tensor], Tensor]
"""Tiles [B, C, h, w] and their noise → enlarged tiles."""
_BLOCK_PX, _HALO_PX = 80, 8
"""Of the small picture: what is corrected at a time, and how far a correction is felt."""
_ROUNDS = 4


def usual_overlap(tile: int) -> int:
    """Three eighths of a tile: the least at which a gradient shows no grid (docs/results.md)."""
    return tile * 3 // 8


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side so that neighbours share at least `overlap` pixels."""
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap={overlap}: give 0 or more and less than the tile's {tile} px")
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def weights(begins: list[int], tile: int, length: int) -> np.ndarray:
    """Share of each tile [tiles, tile] in the pixels that it covers: over a pixel they sum to 1.

    Within an overlap they rise and fall as sin² does, towards the middle of each tile.
    """
    hat = np.sin(np.pi * (np.arange(tile) + 0.5) / tile) ** 2
    total = np.zeros(length)
    for begin in begins:
        total[begin : begin + tile] += hat
    return np.stack([hat / total[begin : begin + tile] for begin in begins])


def reach(network: Network, tile: int, factor: int) -> int:
    """How many pixels of the input a tile's rim reaches inwards, at most a quarter of the tile.

    There the network sees its own zeros beyond the tile. NaN spreads exactly as far as a layer
    sees; attention, which sees everything, and deep networks end at the quarter.
    """
    probe_1CHW = torch.zeros(1, 3, tile, tile)
    probe_1CHW[..., 0] = torch.nan
    seen = network(probe_1CHW, torch.zeros_like(probe_1CHW)).isnan().flatten(0, 2).any(0)
    return min(-(-int(seen.sum()) // factor), tile // 4)


def reflect(image_CHW: Tensor, margin: int, least: int) -> Tensor:
    """The picture continued by its mirror image on every side, and to `least` pixels at least."""
    for dim in (1, 2):
        length = image_CHW.shape[dim]
        place = torch.arange(-margin, max(length + margin, least - margin)) % (2 * length)
        image_CHW = image_CHW.index_select(dim, torch.minimum(place, 2 * length - 1 - place))
    return image_CHW


def enlarge(
    image_CHW: Tensor,
    noise_CHW: Tensor,
    network: Network,
    *,
    tile: int,
    factor: int,
    overlap: int,
    margin: int = 0,
    batch_size: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """The whole picture, `factor` times larger, as bytes [C, F·H, F·W] of [−1, 1] clamped.

    A band of rows as high as one tile is held in floating point; the rest is bytes. A picture is
    continued by its mirror image, `margin` pixels on every side and at least to a tile's size, and
    cut again.
    """
    C, H, W = image_CHW.shape
    image_CHW, noise_CHW = (reflect(x, margin, tile) for x in (image_CHW, noise_CHW))
    rows, columns = (starts(side, tile, overlap) for side in image_CHW.shape[1:])
    big = tile * factor
    share_of_row, share_of_column = (
        torch.from_numpy(weights([b * factor for b in begins], big, side * factor)).float()
        for begins, side in ((rows, image_CHW.shape[1]), (columns, image_CHW.shape[2]))
    )
    canvas = torch.empty(C, image_CHW.shape[1] * factor, image_CHW.shape[2] * factor).byte()
    band = torch.zeros(C, big, canvas.shape[2])
    total, done = len(rows) * len(columns), 0
    for number, top in enumerate(rows):
        for chunk in _chunks(list(enumerate(columns)), batch_size):
            cut = [(..., slice(top, top + tile), slice(left, left + tile)) for _, left in chunk]
            made = network(
                torch.stack([image_CHW[c] for c in cut]), torch.stack([noise_CHW[c] for c in cut])
            )
            for (column, left), large in zip(chunk, made.float().cpu(), strict=True):
                shares = share_of_row[number][:, None] * share_of_column[column]
                band[:, :, left * factor : left * factor + big] += large * shares
            done += len(chunk)
            progress(done, total)
        ready = (rows[number + 1] - top if number + 1 < len(rows) else tile) * factor
        canvas[:, top * factor : top * factor + ready] = _bytes(band[:, :ready])
        band = torch.cat([band[:, ready:], torch.zeros(C, ready, canvas.shape[2])], dim=1)
    begin = margin * factor
    return canvas[:, begin : begin + H * factor, begin : begin + W * factor]


def keep_low_frequencies(large_CHW: Tensor, small_CHW: Tensor) -> Tensor:
    """The nearest picture, as bytes, that Lanczos' filter makes the small one [−1, 1] of again.

    y + D⁺(x − D y): details that a small picture cannot hold stay as they are, all else is the
    small picture's, to a level of 255; beside black and white to some more, as bytes end there:
    what clamping takes is put back around it, `_ROUNDS` times. Blocks overlap by more than the
    filter sees.
    """
    factor = large_CHW.shape[1] // small_CHW.shape[1]
    kept = torch.empty_like(large_CHW)
    sides = [min(_BLOCK_PX, side) for side in small_CHW.shape[1:]]
    rows, columns = (
        starts(length, side, 2 * _HALO_PX if length > side else 0)
        for length, side in zip(small_CHW.shape[1:], sides, strict=True)
    )
    down_y, down_x = (lanczos(side * factor, side) for side in sides)
    up_y, up_x = (torch.linalg.pinv(down.double()).float() for down in (down_y, down_x))
    for top, left in itertools.product(rows, columns):
        bottom, right = top + sides[0], left + sides[1]
        x_CHW = small_CHW[:, top:bottom, left:right]
        at = slice(None), slice(top * factor, bottom * factor), slice(left * factor, right * factor)
        y_CHW = large_CHW[at].float() / 127.5 - 1
        for _ in range(_ROUNDS):
            lacks_CHW = x_CHW - (down_y @ y_CHW @ down_x.T).clamp(-1, 1)
            y_CHW = (y_CHW + up_y @ lacks_CHW @ up_x.T).clamp(-1, 1)
        # What is still wrong at its end the next block overwrites.
        skip_y, skip_x = (_HALO_PX * factor if begin else 0 for begin in (top, left))
        kept[at][:, skip_y:, skip_x:] = _bytes(y_CHW)[:, skip_y:, skip_x:]
    return kept


def _bytes(image_CHW: Tensor) -> Tensor:
    return ((image_CHW.clamp(-1, 1) + 1) * 127.5).round().byte()


def _chunks(items: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
