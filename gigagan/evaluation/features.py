"""Pictures to the features that judges compare: Inception for distances, an encoder for alignment.

Shape letters: N pictures, H W image, C colour, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from cleanfid.resize import build_resizer
from PIL import Image

from gigagan.models import pretrained

Progress = Callable[[str, int, int | None], None]
"""Called with (what, done, total)."""

Picture = Path | Image.Image | np.ndarray
"""A file, a PIL image, or an RGB array [H, W, 3] of uint8."""

_clean_resize = build_resizer("clean")  # Pillow's antialiased bicubic to 299, left unrounded


def silent(what: str, done: int, total: int | None) -> None:
    """Report nothing."""


def open_rgb(picture: Picture) -> Image.Image:
    """Load a picture as RGB; transparency is put on white, as a page would show it."""
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    image = Image.open(picture) if isinstance(picture, Path) else picture
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(picture: Picture, px: int) -> Image.Image:
    """Centre-crop to the short side and resize to `px` with Lanczos: both sides of every distance.

    It is the identity for a picture of that size already.
    """
    image = open_rgb(picture)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return image if side == px else image.resize((px, px), Image.Resampling.LANCZOS)


def inception_features(
    pictures: Sequence[Picture],
    *,
    px: int | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    cache: Path | None = None,
    progress: Progress = silent,
) -> np.ndarray:
    """Features [N, 2048] in float32 of the FID Inception after clean-fid's `clean` resize.

    Pictures are first made square at `px`, if given. With `cache`, a folder, features of the same
    pixels are read back from it: the name of a file is the hash of what it was computed from.
    """
    key = None
    if cache is not None:
        key = cache / f"inception-{_content(pictures, px)}.npy"
        if key.is_file():
            return np.load(key)

    network = pretrained.inception(device)
    parts = [np.empty((0, 2048), np.float32)]
    for start in range(0, len(pictures), batch_size):
        batch = [_at_299(picture, px) for picture in pictures[start : start + batch_size]]
        x_NCHW = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
        parts.append(network(x_NCHW).float().cpu().numpy())
        progress("Inception features", min(start + batch_size, len(pictures)), len(pictures))
    features_ND = np.concatenate(parts)

    if key is not None:
        key.parent.mkdir(parents=True, exist_ok=True)
        partial = key.with_suffix(".partial.npy")
        np.save(partial, features_ND)
        partial.replace(key)
    return features_ND


def image_vectors(
    pictures: Sequence[Picture],
    encoder: pretrained.ImageEncoder,
    *,
    px: int,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    progress: Progress = silent,
) -> torch.Tensor:
    """Pooled features [N, D] of pictures cropped and resized to `px`, on the CPU, no gradients."""
    parts = [torch.empty(0, encoder.width)]
    for start in range(0, len(pictures), batch_size):
        batch = [np.asarray(square(p, px)) for p in pictures[start : start + batch_size]]
        x_NCHW = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(device)
        with torch.no_grad():
            parts.append(encoder(x_NCHW / 127.5 - 1).pooled_BD.float().cpu())
        progress("image features", min(start + batch_size, len(pictures)), len(pictures))
    return torch.cat(parts)


def text_vectors(
    captions: Sequence[str], encoder: pretrained.TextEncoder, *, batch_size: int = 64
) -> torch.Tensor:
    """Pooled features [N, D] of captions, on the CPU; each distinct one is encoded once."""
    distinct = sorted(set(captions), key=lambda caption: (len(caption), caption))
    vectors: dict[str, torch.Tensor] = {}
    for start in range(0, len(distinct), batch_size):
        batch = distinct[start : start + batch_size]  # of like length, hence little padding
        vectors.update(zip(batch, encoder.encode(batch).pooled_BD.cpu(), strict=True))
    return torch.stack([vectors[caption] for caption in captions])


def clip_image_vectors(
    pictures: Sequence[Picture],
    encoder: pretrained.ImageEncoder,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
) -> torch.Tensor:
    """Joint-space vectors [N, D] of pictures in a CLIP's own preparation, on the CPU, unnormalised.

    That is: the short side by bicubic to the encoder's, and a centre crop. Published thresholds
    and scores are of pictures prepared so.
    """
    assert encoder.image_size is not None, "a ViT takes one size"
    parts = [torch.empty(0, encoder.width)]
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        pixels = np.stack([_clip_pixels(picture, encoder.image_size) for picture in batch])
        x_NCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)
        with torch.no_grad():
            parts.append(encoder(x_NCHW / 127.5 - 1).pooled_BD.float().cpu())
    return torch.cat(parts)


def _clip_pixels(picture: Picture, px: int) -> np.ndarray:
    image = open_rgb(picture)
    scale = px / min(image.size)
    width, height = (max(px, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - px) // 2, (height - px) // 2
    return np.asarray(image.crop((left, top, left + px, top + px)))


def _at_299(picture: Picture, px: int | None) -> np.ndarray:
    image = open_rgb(picture) if px is None else square(picture, px)
    return _clean_resize(np.asarray(image))


def _content(pictures: Iterable[Picture], px: int | None) -> str:
    """Hash of the judge, of the preparation and of every picture."""
    digest = hashlib.sha256(f"{pretrained.sha256('inception-2015-12-05')} clean {px}".encode())
    for picture in pictures:
        image = open_rgb(picture)
        digest.update(repr(image.size).encode())
        digest.update(hashlib.sha256(image.tobytes()).digest())
    return digest.hexdigest()[:32]
