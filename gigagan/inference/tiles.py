"""A picture of any size through a network of one size: overlapping tiles, blended without seams.

Shape letters: B tiles, C colour, H W a picture, h w a tile, F the factor of enlargement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]
"""Tiles [B, C, h, w] and their noise → enlarged tiles."""


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


def enlarge(
    image_CHW: Tensor,
    noise_CHW: Tensor,
    network: Network,
    *,
    tile: int,
    factor: int,
    overlap: int,
    batch_size: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """The whole picture, `factor` times larger, as bytes [C, F·H, F·W] of [−1, 1] clamped.

    A band of rows as high as one tile is held in floating point; the rest is bytes. A picture that
    is smaller than a tile is continued by its border and cut again.
    """
    C, H, W = image_CHW.shape
    pad = (0, max(0, tile - W), 0, max(0, tile - H))
    image_CHW = F.pad(image_CHW[None], pad, mode="replicate")[0]
    noise_CHW = F.pad(noise_CHW[None], pad, mode="replicate")[0]
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
    return canvas[:, : H * factor, : W * factor]


def _bytes(image_CHW: Tensor) -> Tensor:
    return ((image_CHW.clamp(-1, 1) + 1) * 127.5).round().byte()


def _chunks(items: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
