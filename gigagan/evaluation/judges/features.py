"""Pictures to the features that judges compare: Inception for distances, an encoder for alignment.

Shape letters: N pictures, H W image, C colour, D features.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gigagan.common import pictures as reading
from gigagan.common.files import PARTIAL, filled_aside, sha256_of
from gigagan.common.progress import Progress, silent
from gigagan.evaluation.devices import Device, Team, deal
from gigagan.models import pretrained

Picture = Path | Image.Image | np.ndarray
"""A file, a PIL image, or an RGB array [H, W, 3] of uint8."""

log = logging.getLogger(__name__)

_READING = "sRGB, upright, 16 bits scaled, crops rounded to even"
"""How files become what is judged: a part of the names of what is kept of them."""


@functools.cache
def _clean_resizer() -> Callable[[np.ndarray], np.ndarray]:
    """Pillow's antialiased bicubic to 299, left unrounded. Training does without its package."""
    from cleanfid.resize import build_resizer

    resizer: Callable[[np.ndarray], np.ndarray] = build_resizer("clean")
    return resizer


def _clean_resize(image_HWC: np.ndarray) -> np.ndarray:
    return _clean_resizer()(image_HWC)


def open_rgb(picture: Picture) -> Image.Image:
    """A picture as RGB, files by the same rules as in training: see `gigagan.common.pictures`."""
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    return reading.read(picture) if isinstance(picture, Path) else reading.as_rgb(picture)


def square(picture: Picture, px: int) -> Image.Image:
    """Centre-crop to the short side and resize to `px` with Lanczos: both sides of every distance.

    It is the identity for a picture of that size already.
    """
    return reading.square(open_rgb(picture), px)


# ---- one pass over pictures for several judges -----------------------------------------------


class PictureError(ValueError):
    """Pictures that cannot be read: how many, and the first of them."""


class Extractor(ABC):
    """What one judge makes of a picture: prepared alone, judged in batches."""

    name: str
    weights: str
    """Its name for `pretrained.sha256`."""
    width: int
    lanes = 1
    """Batches that it judges at a time."""

    @abstractmethod
    def prepare(self, image: Image.Image) -> np.ndarray:
        """One RGB picture → what the judge sees [H, W, 3]."""

    @abstractmethod
    def __call__(self, batch_NHWC: np.ndarray) -> np.ndarray:
        """Prepared pictures → features [N, width] in float32."""


class _Inception(Extractor):
    """FID's Inception behind one of the two resizes to 299 px, or on pictures of that size."""

    weights = "inception-2015-12-05"
    width = 2048

    def __init__(self, resize: str, device: torch.device | str) -> None:
        self.name = f"{self.weights}/{resize}"
        self._resize = {"clean": _clean_resize, "legacy": legacy_resize}[resize]
        self._network = pretrained.inception(device)

    def prepare(self, image: Image.Image) -> np.ndarray:
        prepared: np.ndarray = self._resize(np.asarray(image))
        return prepared

    def __call__(self, batch_NHWC: np.ndarray) -> np.ndarray:
        x_NCHW = torch.from_numpy(batch_NHWC).permute(0, 3, 1, 2)
        features: np.ndarray = self._network(x_NCHW).float().cpu().numpy()
        return features


class _Clip(Extractor):
    """Joint-space vectors of an open_clip model, not normalised, in its own preparation."""

    def __init__(self, name: str, device: torch.device | str) -> None:
        self.name = self.weights = name
        self._device = device
        self._encoder = pretrained.image_encoder(name, device)
        self.width = self._encoder.width

    def prepare(self, image: Image.Image) -> np.ndarray:
        assert self._encoder.image_size is not None, "a ViT takes one size"
        return _clip_pixels(image, self._encoder.image_size)

    @torch.no_grad()
    def __call__(self, batch_NHWC: np.ndarray) -> np.ndarray:
        x_NCHW = torch.from_numpy(batch_NHWC).permute(0, 3, 1, 2).to(self._device)
        features: np.ndarray = self._encoder(x_NCHW / 127.5 - 1).pooled_BD.float().cpu().numpy()
        return features


class _DinoV2(Extractor):
    """The class token of DINOv2 at 224 px (Stein et al. 2023 put it behind FD-DINOv2)."""

    def __init__(self, name: str, device: torch.device | str) -> None:
        self.name = self.weights = name
        self._device = device
        self._network = pretrained.dinov2(name, device)
        self.width = int(self._network.num_features)

    def prepare(self, image: Image.Image) -> np.ndarray:
        return _clip_pixels(image, 224)

    @torch.no_grad()
    def __call__(self, batch_NHWC: np.ndarray) -> np.ndarray:
        x_NHWC = torch.from_numpy(batch_NHWC).to(self._device).float() / 255
        mean, std = (torch.tensor(v, device=self._device) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
        features: np.ndarray = (
            self._network(((x_NHWC - mean) / std).permute(0, 3, 1, 2)).float().cpu().numpy()
        )
        return features


_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class _Everywhere(Extractor):
    """One judge on several devices."""

    def __init__(self, members: Sequence[Extractor]) -> None:
        self._first, self._team, self.lanes = members[0], Team(members), len(members)
        self.name, self.weights = self._first.name, self._first.weights
        self.width = self._first.width

    def prepare(self, image: Image.Image) -> np.ndarray:
        return self._first.prepare(image)

    def __call__(self, batch_NHWC: np.ndarray) -> np.ndarray:
        with self._team.one() as member:
            return member(batch_NHWC)


def extractor(name: str, *devices: Device) -> Extractor:
    """`inception-2015-12-05/clean`, `…/legacy`, `open_clip:ARCHITECTURE/TAG` or `dinov2:vitl14`.

    On several devices batches are shared out among them. Raises ValueError for any other name,
    MissingWeightsError where a file is not there.
    """
    if len(devices) > 1:
        return _Everywhere([extractor(name, device) for device in devices])
    device = devices[0] if devices else "cpu"
    base, _, resize = name.partition("/")
    if base == _Inception.weights and resize in ("clean", "legacy"):
        return _Inception(resize, device)
    if name.startswith("open_clip:"):
        return _Clip(name, device)
    if name.startswith("dinov2:"):
        return _DinoV2(name, device)
    raise ValueError(
        f"{name!r} judges no pictures: choose {_Inception.weights}/clean or /legacy, "
        "open_clip:ARCHITECTURE/TAG or dinov2:vitl14"
    )


Transform = Callable[[Picture], Image.Image]


def extract(
    pictures: Sequence[Picture],
    extractors: Sequence[Extractor],
    *,
    transform: Transform,
    folder: Path,
    batch_size: int = 16,
    workers: int | None = None,
    progress: Progress = silent,
) -> dict[str, np.ndarray]:
    """Features [N, width] by extractor's name: read-only memory maps of files in `folder`.

    Each picture is decoded and transformed once for all extractors, by `workers` threads (two a
    device), a batch ahead: memory does not grow with their number. Unreadable ones are all looked
    for before PictureError names them; then no file is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partials = {one.name: folder / f"{_file_name(one)}.npy{PARTIAL}" for one in extractors}
    maps = {
        one.name: np.lib.format.open_memmap(
            partials[one.name], "w+", dtype=np.float32, shape=(len(pictures), one.width)
        )
        for one in extractors
    }
    unreadable: list[str] = []
    lanes = max((one.lanes for one in extractors), default=1)

    def judge(piece: tuple[int, list[list[np.ndarray] | str]]) -> int:
        start, batch = piece
        good = [prepared for prepared in batch if not isinstance(prepared, str)]
        unreadable.extend(prepared for prepared in batch if isinstance(prepared, str))
        if good and not unreadable:  # once one is missing only the reading goes on
            for number, one in enumerate(extractors):
                stacked = np.stack([prepared[number] for prepared in good])
                maps[one.name][start : start + len(batch)] = one(stacked)
        return start + len(batch)

    batches = _prepared(pictures, extractors, transform, batch_size, workers or 2 * lanes)
    starts = range(0, len(pictures), batch_size)
    for done in deal(judge, zip(starts, batches, strict=True), lanes):
        progress("features", done, len(pictures))
    maps.clear()
    if unreadable:
        for partial in partials.values():
            partial.unlink()
        shown = "; ".join(unreadable[:5])
        raise PictureError(
            f"{len(unreadable)} of {len(pictures)} pictures cannot be read ({shown}): replace or "
            "remove them; nothing was measured without them"
        )
    found = {}
    for one in extractors:
        path = folder / f"{_file_name(one)}.npy"
        partials[one.name].replace(path)
        found[one.name] = np.load(path, mmap_mode="r") if len(pictures) else np.load(path)
    return found


def reference(
    pictures: Sequence[Path],
    extractors: Sequence[Extractor],
    *,
    transform: Transform,
    transform_name: str,
    cache: Path,
    batch_size: int = 16,
    workers: int | None = None,
    progress: Progress = silent,
) -> dict[str, np.ndarray]:
    """`extract` for a set that is measured against again and again: kept by content in `cache`.

    An entry's name is the hash of the pictures' bytes in their order, of the transform's name and
    of the judge's weights, so that nothing that decides can change unseen. A damaged entry is
    computed again, and the log says so.
    """
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(bytes.fromhex(sha256_of(picture)))
    found: dict[str, np.ndarray] = {}
    for one in extractors:
        described = f"{_READING}|{transform_name}|{one.name}|{pretrained.sha256(one.weights)}"
        key = hashlib.sha256(digest.digest() + described.encode()).hexdigest()[:32]
        path = cache / f"{_file_name(one)}-{key}.npy"
        kept = _kept(path, (len(pictures), one.width))
        if kept is None:
            settings = {"transform": transform, "folder": cache / f".{key}-{os.getpid()}"}
            extract(
                pictures,
                [one],
                batch_size=batch_size,
                workers=workers,
                progress=progress,
                **settings,  # type: ignore[arg-type]
            )
            made = cache / f".{key}-{os.getpid()}" / f"{_file_name(one)}.npy"
            made.replace(path)
            made.parent.rmdir()
            kept = np.load(path, mmap_mode="r")
        found[one.name] = kept
    return found


def _kept(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """A cached array of this shape, finite throughout; None where there is none."""
    if not path.is_file():
        return None
    try:
        features: np.ndarray = np.load(path, mmap_mode="r")
        if features.shape == shape and all(
            np.isfinite(features[i : i + 4096]).all() for i in range(0, len(features), 4096)
        ):
            return features
        problem = f"shape {features.shape}, or values that are not finite"
    except (OSError, ValueError) as error:
        problem = str(error)
    log.warning("%s is damaged (%s): it is computed again", path, problem)
    return None


def _prepared(
    pictures: Sequence[Picture],
    extractors: Sequence[Extractor],
    transform: Transform,
    batch_size: int,
    workers: int,
) -> Iterator[list[list[np.ndarray] | str]]:
    """Batches of pictures as every extractor wants them, or why one cannot be read."""

    def prepare(picture: Picture) -> list[np.ndarray] | str:
        try:
            image = transform(picture)
        except (OSError, ValueError) as error:
            return f"{picture if isinstance(picture, Path) else 'a picture'}: {error}"
        return [one.prepare(image) for one in extractors]

    with ThreadPoolExecutor(workers) as pool:
        ahead: list[list[list[np.ndarray] | str]] = []
        for start in range(0, len(pictures), batch_size):
            futures = [pool.submit(prepare, p) for p in pictures[start : start + batch_size]]
            if ahead:
                yield ahead.pop()
            ahead.append([future.result() for future in futures])
        yield from ahead


def _file_name(one: Extractor) -> str:
    return one.name.replace("/", "-").replace(":", "-")


def legacy_resize(image_HWC: np.ndarray, px: int = 299) -> np.ndarray:
    """TensorFlow 1's bilinear resize [px, px, 3] in float32, which StyleGAN's FID uses.

    Pixel i of the output is read at i · W / px: no half-pixel shift, no antialiasing, not rounded.
    It is what the published TorchScript does inside, and clean-fid calls `legacy_tensorflow`.
    """
    x = image_HWC.astype(np.float32)
    for axis in (0, 1):
        side = x.shape[axis]
        place = np.arange(px, dtype=np.float64) * (side / px)
        low = np.floor(place).astype(np.int64)
        high = np.minimum(low + 1, side - 1)
        shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
        weight = (place - low).astype(np.float32).reshape(shape)
        x = x.take(low, axis) * (1 - weight) + x.take(high, axis) * weight
    return x


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


def reference_texts(
    captions: Sequence[str], name: str, *, cache: Path, device: Device = "cpu"
) -> torch.Tensor:
    """`text_vectors` for captions that are read again and again: kept in `cache`.

    An entry's name is the hash of the captions in their order and of the encoder's weights.
    """
    encoder = pretrained.text_encoder(name, device)
    described = json.dumps([name, pretrained.sha256(name), *captions])
    key = hashlib.sha256(described.encode()).hexdigest()[:32]
    path = cache / f"{name.replace(':', '-').replace('/', '-')}-{key}.npy"
    kept = _kept(path, (len(captions), encoder.pooled_width))
    if kept is not None:
        return torch.tensor(kept)
    vectors = text_vectors(captions, encoder)
    cache.mkdir(parents=True, exist_ok=True)
    with filled_aside(path, has_rivals=True) as partial, partial.open("wb") as file:
        np.save(file, vectors.numpy())
    return vectors


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
    """As open_clip's own transform makes them [px, px, 3]: the long side is cut to whole pixels."""
    image = open_rgb(picture)
    short = min(image.size)
    width, height = (int(px * side / short) for side in image.size)
    return np.asarray(reading.centre(image.resize((width, height), Image.Resampling.BICUBIC), px))
