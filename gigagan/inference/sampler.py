"""Prompts to pictures: the base generator, then the upsampler, in single passes.

Shape letters: B batch, Z latent, S style, C colour, H W image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from gigagan.config import StyleConfig
from gigagan.inference import resolver
from gigagan.models import pretrained, snapshot
from gigagan.models.encoders import TextEncoder
from gigagan.models.generator import Generator
from gigagan.models.text import Text
from gigagan.models.upsampler import Upsampler

PUBLISHED = Path(__file__).parents[1] / "snapshots"
"""Trained networks that come with the package: emoji, text → 32 px → 128 px."""
MEAN_LATENTS = 64
"""Latents over which the mean style of a prompt is taken."""


def load(
    path: str | Path | None = None,
    upsampler: str | Path | None = None,
    *,
    device: str = "cpu",
) -> Sampler:
    """Open the snapshot of a base generator and, if given, that of an upsampler.

    Without any, both of those that come with the package. `models:/gigagan@champion`, or
    `models:/gigagan/VERSION`, opens both of a pair registered in MLflow; an upsampler that is given
    takes the place of the pair's.

    Raises:
        SnapshotError: a file is missing, damaged, or of the other kind.
        MissingWeightsError: the frozen text encoder's weights are not installed.
    """
    path, upsampler = or_published(path, upsampler)
    base, _ = snapshot.load(path, device=device)
    if not isinstance(base, Generator):
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
    return Sampler(base, larger, device=device)


def or_published(base: str | Path | None, upsampler: str | Path | None) -> tuple[Path, Path | None]:
    """These snapshots or those of a registered pair; without a base those of the package."""
    if isinstance(base, str) and resolver.is_registered(base):
        registered = resolver.resolve(base)
        return registered[0], registered[1] if upsampler is None else Path(upsampler)
    if base is None:
        base = PUBLISHED / "emoji-32.safetensors"
        upsampler = upsampler or PUBLISHED / "emoji-32-to-128.safetensors"
    return Path(base), None if upsampler is None else Path(upsampler)


class Sampler:
    """Draws pictures from prompts. All randomness comes from the seed of a call."""

    def __init__(
        self, base: Generator, upsampler: Upsampler | None = None, *, device: str = "cpu"
    ) -> None:
        self.base = base
        self.upsampler = upsampler
        self.device = torch.device(device)
        self._encoder = _encoder(base.config, self.device)

    @property
    def resolution(self) -> int:
        """Side of the pictures in pixels."""
        network = self.base if self.upsampler is None else self.upsampler
        return network.config.resolution

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        seed: int,
        truncation: float = 1.0,
        batch_size: int = 16,
        upscale: bool = True,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Image.Image]:
        """One picture per prompt; equal prompts get different latents.

        `truncation` ψ below 1 trades variety for typicality (GigaGAN, section 3.6). A picture
        depends on its prompt, its place in the list and the seed, not on `batch_size`.
        """
        if not 0 <= truncation <= 1:
            raise ValueError(f"truncation={truncation}: give a value from 0 to 1")
        random = torch.Generator().manual_seed(seed)
        z_BZ = torch.randn(len(prompts), self.base.config.latent_dim, generator=random)
        pictures: list[Image.Image] = []
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            features = self._encoder.encode(batch)
            text = self.base.read(features)
            style_BS = self.base.style(z_BZ[start : start + batch_size].to(self.device), text)
            if truncation < 1:
                style_BS = self._truncate(style_BS, text, truncation)
            small_BCHW = self.base.synthesize(style_BS, text)[0]
            if upscale and self.upsampler is not None:
                pictures += self._enlarge(small_BCHW, batch, seed=seed, start=start)
            else:
                pictures += _to_pictures(small_BCHW)
            progress(len(pictures), len(prompts))
        return pictures

    @torch.inference_mode()
    def upscale(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        *,
        seed: int = 0,
        batch_size: int = 16,
    ) -> list[Image.Image]:
        """Enlarge pictures of exactly the upsampler's input size.

        Raises:
            ValueError: without an upsampler, with another size, or with unequal lists.
        """
        if self.upsampler is None:
            raise ValueError("this sampler has no upsampler: load one with load(base, upsampler)")
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts: give one per image")
        side = self.upsampler.config.input_resolution
        wrong = next((i.size for i in images if i.size != (side, side)), None)
        if wrong is not None:
            raise ValueError(f"an image is {wrong[0]}×{wrong[1]} px: resize it to {side}×{side}")
        pictures: list[Image.Image] = []
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size]
            small = torch.stack([_from_picture(i) for i in chunk]).to(self.device)
            batch = list(prompts[start : start + batch_size])
            pictures += self._enlarge(small, batch, seed=seed, start=start)
        return pictures

    def _enlarge(
        self, small_BCHW: Tensor, prompts: list[str], *, seed: int, start: int
    ) -> list[Image.Image]:
        """The upsampler on one batch; latents and noise depend on an image's place in the list."""
        assert self.upsampler is not None
        config = self.upsampler.config
        latents, noises = [], []
        for index in range(start, start + len(prompts)):
            random = torch.Generator().manual_seed(seed * 1_000_003 + index)
            latents.append(torch.randn(config.latent_dim, generator=random))
            noises.append(torch.randn(small_BCHW.shape[1:], generator=random))
        noise_BCHW = torch.stack(noises).to(self.device)
        encoder = _encoder(config, self.device)
        z_BZ = torch.stack(latents).to(self.device)
        features = encoder.encode(prompts)
        return _to_pictures(self.upsampler(small_BCHW.clamp(-1, 1), noise_BCHW, z_BZ, features)[0])

    def _truncate(self, style_BS: Tensor, text: Text, psi: float) -> Tensor:
        """w' = lerp(w̄, lerp(w̄|c, w, ψ), ψ): towards the prompt's mean, then the global mean."""
        random = torch.Generator().manual_seed(0)
        z = torch.randn(MEAN_LATENTS, self.base.config.latent_dim, generator=random)
        z = z.to(self.device)
        B = len(style_BS)
        repeated = text.repeat_interleave(MEAN_LATENTS)
        of_prompt_BS = self.base.style(z.repeat(B, 1), repeated).unflatten(0, (B, -1)).mean(1)
        towards_prompt_BS = of_prompt_BS.lerp(style_BS, psi)
        return self.base.style_mean.expand_as(style_BS).lerp(towards_prompt_BS, psi)


def _encoder(config: StyleConfig, device: torch.device) -> TextEncoder:
    """The frozen text encoder that a network was trained with."""
    if config.text is None:
        raise snapshot.SnapshotError(
            "the snapshot is of a network without text, which has no prompts to draw"
        )
    return pretrained.text_encoder(config.text.encoder, device)


def _to_pictures(images_BCHW: Tensor) -> list[Image.Image]:
    """Images in [−1, 1] → RGB pictures."""
    scaled = ((images_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(x) for x in scaled.permute(0, 2, 3, 1).cpu().numpy()]


def _from_picture(image: Image.Image) -> Tensor:
    """An RGB picture → C H W in [−1, 1]."""
    raw = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return raw.reshape(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1
