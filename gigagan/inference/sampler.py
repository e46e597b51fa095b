"""Prompts to pictures: the base generator, then the upsampler, in single passes.

A prompt is what the base reads: words, the name or number of a class, or nothing.

Shape letters: B batch, Z latent, S style, C colour, H W image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from gigagan.common.pictures import as_rgb
from gigagan.inference import resolver, tiles
from gigagan.inference.conditions import Condition, Untold, Words, condition_of
from gigagan.inference.editing import Edit, interpolate
from gigagan.models import snapshot
from gigagan.models.adapters import Given, apply
from gigagan.models.base import BaseGenerator
from gigagan.models.encoders import TextEncoder
from gigagan.models.generator import Late
from gigagan.models.pixels import from_uint8, to_uint8
from gigagan.models.text import Features, Text
from gigagan.models.upsampler import Upsampler
from gigagan.seeds import derived

PUBLISHED = Path(__file__).parents[1] / "snapshots"
"""Trained networks that come with the package: emoji, text → 32 px → 128 px."""
MAX_OUTPUT_PIXELS = 2**28
"""Of an enlarged picture: 268 million, 16384 × 16384."""


def load(
    path: str | Path | None = None,
    upsampler: str | Path | None = None,
    *,
    adapters: Sequence[Given] = (),
    device: str = "cpu",
) -> Sampler:
    """Open the snapshot of a base generator and, if given, that of an upsampler.

    Without any, both of those that come with the package. `models:/gigagan@champion`, or
    `models:/gigagan/VERSION`, opens both of a pair registered in MLflow; an upsampler that is given
    takes the place of the pair's. `adapters` are files, or pairs of a file and its weight, whose
    updates are added to the base's weights.

    Raises:
        AdapterError: one of them does not fit the base.
        SnapshotError: a file is missing, damaged, or of the other kind; or the upsampler reads
            what the base is not told.
        MissingWeightsError: the frozen text encoder's weights are not installed.
    """
    path, upsampler = or_published(path, upsampler)
    base, _ = snapshot.load(path, device=device)
    if isinstance(base, Upsampler):
        raise snapshot.SnapshotError(f"{path} is the snapshot of an upsampler: give a base's here")
    larger: Upsampler | None = None
    if upsampler is not None:
        opened, _ = snapshot.load(upsampler, device=device)
        if not isinstance(opened, Upsampler):
            raise snapshot.SnapshotError(f"{upsampler} is not the snapshot of an upsampler")
        larger = opened
        if larger.config.input_resolution != base.config.resolution:
            raise snapshot.SnapshotError(
                f"{upsampler} enlarges {larger.config.input_resolution} px images, but {path} "
                f"makes {base.config.resolution} px"
            )
    files = {"base": path} | ({} if upsampler is None else {"upsampler": upsampler})
    files |= apply(base, adapters)
    return Sampler(base, larger, device=device, snapshots=files)


def or_published(base: str | Path | None, upsampler: str | Path | None) -> tuple[Path, Path | None]:
    """These snapshots or those of a registered pair; without a base those of the package."""
    if isinstance(base, str) and resolver.is_registered(base):
        registered = resolver.resolve(base)
        return registered[0], registered[1] if upsampler is None else Path(upsampler)
    if base is None:
        base = PUBLISHED / "emoji-32.safetensors"
        upsampler = upsampler or PUBLISHED / "emoji-32-to-128.safetensors"
    return Path(base), None if upsampler is None else Path(upsampler)


class Finest(NamedTuple):
    """What decides a batch's details under the upsampler."""

    features: Features
    seed: int
    other: Features = None
    """Features of a second prompt, blended in by the share `amount`."""
    amount: float = 0.0


class Drawing(NamedTuple):
    """A batch's text and style, and what an edit puts into the fine levels."""

    text: Text
    style_BS: Tensor
    late: Late | None
    finest: Finest


class Sampler:
    """Draws pictures from prompts. All randomness comes from the seed of a call."""

    def __init__(
        self,
        base: BaseGenerator,
        upsampler: Upsampler | None = None,
        *,
        device: str = "cpu",
        snapshots: Mapping[str, Path] | None = None,
    ) -> None:
        self.base = base
        self.upsampler = upsampler
        self.device = torch.device(device)
        self.snapshots = dict(snapshots or {})
        """The files that the networks came from, for provenance."""
        self.condition = condition_of(base, self.device)
        """What the base is told."""
        self.upsampler_condition = self._condition_of_upsampler()
        """What the upsampler is told; of the base without one."""

    def _condition_of_upsampler(self) -> Condition:
        if self.upsampler is None:
            return self.condition
        told = condition_of(self.upsampler, self.device)
        if told.name == self.condition.name:
            return self.condition
        if isinstance(told, Untold) or (
            isinstance(told, Words) and isinstance(self.condition, Words)
        ):
            return told
        raise snapshot.SnapshotError(
            f"the upsampler reads {_kind(told)}, but the base is told {_kind(self.condition)}: "
            "give one that reads the same, or an unconditional one"
        )

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder of the base; raises ValueError where it has none."""
        if not isinstance(self.condition, Words):
            raise ValueError(f"the base reads {_kind(self.condition)} and has no text encoder")
        return self.condition.encoder

    @property
    def resolution(self) -> int:
        """Side of the pictures in pixels."""
        network = self.base if self.upsampler is None else self.upsampler
        return network.config.resolution

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[str] | int,
        *,
        seed: int,
        truncation: float = 1.0,
        batch_size: int = 16,
        upscale: bool = True,
        edit: Edit | None = None,
        latents_BZ: Tensor | None = None,
        places: Sequence[int] | None = None,
        cut: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Image.Image]:
        """One picture per prompt; equal prompts get different latents.

        An unconditional network is given the number of pictures, or so many empty prompts.

        `truncation` ψ below 1 trades variety for typicality (GigaGAN, section 3.6). A picture
        depends on its prompt, its place in the list and the seed, not on `batch_size`. `edit`
        changes every one of them; `latents_BZ` takes the place of the seed's draws of z, and
        `places` that of 0, 1, 2… in the list, on which the upsampler's noise depends. `cut` lets
        prompts through that are longer than the encoder reads.

        Raises:
            PromptError: a prompt is empty, too long or has control characters; of no class that
                the network knows; or there is one where it reads none.
            ValueError: another argument is out of its range, or pixels came out as NaN.
        """
        if not 0 <= truncation <= 1:
            raise ValueError(f"truncation={truncation}: give a value from 0 to 1")
        if isinstance(prompts, int):
            prompts = [""] * prompts
        prompts = [self.condition.check(p, cut=cut) for p in prompts]
        if edit is not None and edit.prompt is not None:
            edit = replace(edit, prompt=self.condition.check(edit.prompt, cut=cut))
        z_BZ = self.latents(len(prompts), seed) if latents_BZ is None else latents_BZ
        if z_BZ.shape != (len(prompts), self.base.config.latent_dim):
            raise ValueError(
                f"latents of shape {tuple(z_BZ.shape)} for {len(prompts)} prompts: give "
                f"[{len(prompts)}, {self.base.config.latent_dim}]"
            )
        other_BZ = z_BZ
        if edit is not None and edit.seed is not None:
            other_BZ = self.latents(len(prompts), edit.seed)
        pictures: list[Image.Image] = []
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            batch = prompts[rows]
            drawing = self._prepare(batch, z_BZ[rows], other_BZ[rows], seed, truncation, edit)
            small_BCHW = self.base.synthesize(drawing.style_BS, drawing.text, drawing.late)[0]
            if upscale and self.upsampler is not None:
                numbers = list(range(len(prompts)) if places is None else places)[rows]
                pictures += self._finish(small_BCHW, drawing.finest, numbers)
            else:
                pictures += _to_pictures(small_BCHW)
            progress(len(pictures), len(prompts))
        return pictures

    def latents(self, count: int, seed: int) -> Tensor:
        """The z [count, Z] of a seed, on the CPU, one after the other."""
        random = torch.Generator().manual_seed(seed)
        return torch.randn(count, self.base.config.latent_dim, generator=random)

    def _prepare(
        self,
        batch: list[str],
        z_BZ: Tensor,
        other_BZ: Tensor,
        seed: int,
        truncation: float,
        edit: Edit | None,
    ) -> Drawing:
        """Text and style of a batch, changed as asked."""
        features = self.condition(batch)
        text, finest = self.base.read(features), self._for_upsampler(batch, features)
        style_BS = self._style(text, z_BZ, truncation)
        if edit is None:
            return Drawing(text, style_BS, None, Finest(finest, seed))
        second = batch if edit.prompt is None else [edit.prompt] * len(batch)
        other_features = self.condition(second)
        other_text = self.base.read(other_features)
        other_finest = self._for_upsampler(second, other_features)
        other_BS = self._style(other_text, other_BZ, truncation)
        if edit.how == "interpolate":
            mixed = interpolate(text, other_text, edit.amount)
            style_BS = style_BS.lerp(other_BS, edit.amount)
            blended = Finest(finest, seed, other_finest, edit.amount)
            return Drawing(mixed, style_BS, None, blended)
        level = edit.first_level(len(self.base.levels))
        tokens = text if edit.how == "style" else other_text
        late = Finest(
            finest if edit.how == "style" else other_finest,
            seed if edit.seed is None else edit.seed,
        )
        return Drawing(text, style_BS, Late(other_BS, tokens, level), late)

    def _for_upsampler(self, prompts: Sequence[str], features: Features) -> Features:
        """Of prompts with these features for the base: what the upsampler was trained to read."""
        is_same = self.upsampler_condition is self.condition
        return features if is_same else self.upsampler_condition(prompts)

    def _style(self, text: Text, z_BZ: Tensor, truncation: float) -> Tensor:
        style_BS = self.base.style(z_BZ.to(self.device), text)
        return self.base.truncate(style_BS, text, truncation) if truncation < 1 else style_BS

    @torch.inference_mode()
    def upscale(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        *,
        seed: int = 0,
        batch_size: int = 16,
        overlap: int | None = None,
        faithful: bool = True,
        cut: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Image.Image]:
        """Enlarge pictures of any size by overlapping tiles.

        All tiles of a picture share one z, one style and one text, and are cut from one field of
        noise. `overlap` is in pixels of the input, by default
        three eighths of a tile; less is faster, and a quarter shows a faint grid on smooth areas.
        Made small again by Lanczos' filter the result is the picture itself: the network adds
        details, and neither shifts colours nor darkens borders (`tiles.keep_low_frequencies`). With
        `faithful=False` it is what the network makes of pictures of exactly its input's size in
        one pass, which is how it was trained and how it is measured. `progress` is told the tiles
        of the picture under way.

        Raises:
            ValueError: without an upsampler, with unequal lists, for an output of more than
                `MAX_OUTPUT_PIXELS`, or for another size with `faithful=False`.
        """
        if self.upsampler is None:
            raise ValueError("this sampler has no upsampler: load one with load(base, upsampler)")
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts: give one per image")
        config = self.upsampler.config
        tile, factor = config.input_resolution, config.resolution // config.input_resolution
        overlap = tiles.usual_overlap(tile) if overlap is None else overlap
        told = self.upsampler_condition
        prompts = [told.check(p, cut=cut) for p in prompts]
        for image in images:
            _check_output(image, factor)
        if not faithful:
            return self._pass(images, prompts, seed, batch_size)
        pictures = []
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            small_CHW = _from_picture(image)
            z_1Z, noise_CHW = _randomness(config.latent_dim, small_CHW.shape, seed, index)
            text = self.upsampler.read(told([prompt]))
            network = self._tile_network(self.upsampler.style(z_1Z.to(self.device), text), text)
            large = tiles.enlarge(
                small_CHW,
                noise_CHW,
                network,
                tile=tile,
                factor=factor,
                overlap=overlap,
                margin=tiles.reach(network, tile, factor),
                batch_size=batch_size,
                progress=progress,
            )
            large = tiles.keep_low_frequencies(large, small_CHW)
            pictures.append(Image.fromarray(large.permute(1, 2, 0).contiguous().numpy()))
        return pictures

    def _tile_network(self, style_1S: Tensor, text: Text) -> tiles.Network:
        """Tiles and noise → larger tiles, all of one style and text."""
        upsampler = self.upsampler
        assert upsampler is not None

        def network(tiles_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
            x, noise = tiles_BCHW.to(self.device).clamp(-1, 1), noise_BCHW.to(self.device)
            return upsampler.synthesize(x, noise, style_1S, text)[0]

        return network

    def _pass(
        self, images: Sequence[Image.Image], prompts: list[str], seed: int, batch_size: int
    ) -> list[Image.Image]:
        """Pictures of exactly the input's size, several in one pass."""
        assert self.upsampler is not None
        config = self.upsampler.config
        tile = config.input_resolution
        if odd := [image.size for image in images if image.size != (tile, tile)]:
            raise ValueError(
                f"a picture of {odd[0][0]}×{odd[0][1]} px, but faithful=False takes those of "
                f"{tile}×{tile} px: leave it at True"
            )
        pictures: list[Image.Image] = []
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size]
            small = torch.stack([_from_picture(i) for i in chunk]).to(self.device)
            features = self.upsampler_condition(prompts[start : start + batch_size])
            places = range(start, start + len(small))
            pictures += self._finish(small, Finest(features, seed), places)
        return pictures

    def _finish(
        self, small_BCHW: Tensor, finest: Finest, places: Sequence[int]
    ) -> list[Image.Image]:
        """The upsampler on one batch; latents and noise depend on an image's place in the list."""
        upsampler = self.upsampler
        assert upsampler is not None
        Z = upsampler.config.latent_dim
        draws = [_randomness(Z, small_BCHW.shape[1:], finest.seed, index) for index in places]
        z_BZ = torch.cat([z for z, _ in draws]).to(self.device)
        noise_BCHW = torch.stack([noise for _, noise in draws]).to(self.device)
        text = upsampler.read(finest.features)
        style_BS = upsampler.style(z_BZ, text)
        if finest.other is not None:
            other = upsampler.read(finest.other)
            style_BS = style_BS.lerp(upsampler.style(z_BZ, other), finest.amount)
            text = interpolate(text, other, finest.amount)
        images = upsampler.synthesize(small_BCHW.clamp(-1, 1), noise_BCHW, style_BS, text)
        return _to_pictures(images[0])


def _randomness(
    latent_dim: int, shape: Sequence[int], seed: int, index: int
) -> tuple[Tensor, Tensor]:
    """The upsampler's z [1, Z] and noise of this shape, of the picture at this place in a list."""
    random = torch.Generator().manual_seed(derived(seed, index))
    z_1Z = torch.randn(latent_dim, generator=random)[None]
    return z_1Z, torch.randn(*shape, generator=random)


def _kind(told: Condition) -> str:
    """For messages."""
    return "captions" if isinstance(told, Words) else told.name.partition(":")[0]


def _check_output(image: Image.Image, factor: int) -> None:
    """Raise ValueError if the picture enlarged by this factor would be too large."""
    made = image.width * image.height * factor**2
    if made > MAX_OUTPUT_PIXELS:
        raise ValueError(
            f"a picture of {image.width}×{image.height} px would become {made / 1e6:,.0f} "
            f"megapixels, the limit is {MAX_OUTPUT_PIXELS / 1e6:,.0f}: cut it into parts"
        )


def _to_pictures(images_BCHW: Tensor) -> list[Image.Image]:
    """Images in [−1, 1] → RGB pictures."""
    if images_BCHW.isnan().any():
        raise ValueError("NaN instead of a picture: the weights are damaged")
    return [Image.fromarray(x) for x in to_uint8(images_BCHW)]


def _from_picture(image: Image.Image) -> Tensor:
    """A picture → C H W in [−1, 1]."""
    raw = torch.frombuffer(bytearray(as_rgb(image).tobytes()), dtype=torch.uint8)
    return from_uint8(raw.reshape(image.height, image.width, 3).permute(2, 0, 1))
