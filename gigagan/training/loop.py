"""The training loop, top to bottom. Position is counted in images seen.

Shape letters: B batch (of all ranks where said so), C colour, H W image, Z latent.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gigagan.config import TrainStage
from gigagan.models import snapshot
from gigagan.models.generator import Generator
from gigagan.models.layers import pyramid
from gigagan.models.upsampler import Upsampler
from gigagan.training import checkpoint, step
from gigagan.training.captions import CaptionFeatures, RecentCaptions, mismatch
from gigagan.training.distributed import World
from gigagan.training.ema import Ema
from gigagan.training.logs import Log
from gigagan.training.probes import Look, from_uint8

BETA1 = 0.0  # GigaGAN and StyleGAN2: no momentum
MEAN_STYLE_BATCHES = 32


class DivergenceError(RuntimeError):
    """A loss or gradient is no longer finite."""


class Batch(Protocol):
    """What the loader gives: this rank's part of a batch."""

    @property
    def images_BCHW(self) -> Tensor:
        """uint8."""

    @property
    def captions(self) -> list[str]:
        """One per image."""


class Probe(Protocol):
    """Looks at a generator every so often."""

    def look(self, generator: nn.Module) -> Look:
        """Draw and measure."""


class Progress:
    """The counters of a run, saved with it."""

    def __init__(self) -> None:
        self.images_seen = 0

    def state_dict(self) -> dict[str, int]:
        """Plain numbers."""
        return {"images_seen": self.images_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.images_seen = state["images_seen"]


class Result(NamedTuple):
    """How a run ended."""

    images_seen: int
    scalars: dict[str, float]
    """The last probe and the last line of the log."""


def train(
    config: TrainStage,
    players: step.Players,
    captions: CaptionFeatures,
    batches: Callable[[int], Iterator[Batch]],
    probe: Probe,
    run_dir: Path,
    log: Log,
    world: World,
) -> Result:
    """Train until `config.total_images`, resuming from `run_dir` if it holds a checkpoint.

    Writes checkpoints, sample pictures and, at the end, `snapshot.safetensors`.

    Raises:
        DivergenceError: a gradient is not finite.
    """
    generator, discriminator = players.generator, players.discriminator
    heads = players.auxiliary.heads if players.auxiliary else nn.Module()

    # Optimizers and everything else that a resumed run needs.
    opt_g = _adamw(config, generator)
    opt_d = _adamw(config, discriminator, heads)
    ema = Ema(generator, config.optimizer)
    progress = Progress()
    parts: dict[str, checkpoint.Stateful] = {
        "generator": generator,
        "discriminator": discriminator,
        "heads": heads,
        "opt_g": opt_g,
        "opt_d": opt_d,
        "ema": ema,
        "progress": progress,
    }
    newest = checkpoint.latest(run_dir / "checkpoints")
    if newest is not None:
        checkpoint.restore(newest, parts)
        log.say(f"resumed from {newest.name} at {progress.images_seen:,} images")
    log.start(progress.images_seen)

    batch_size = config.batch_size
    found: dict[str, float] = {}
    recent = _recent(config, batches, progress.images_seen, world)
    stream = batches(progress.images_seen)
    while progress.images_seen < config.total_images:
        seen = progress.images_seen
        number = seen // batch_size
        for optimizer in (opt_g, opt_d):
            _set_rate(optimizer, config, seen)
        inputs = _inputs(config, players, captions, recent, next(stream), seen, world)
        auxiliary = players.auxiliary
        is_due = auxiliary is not None and auxiliary.is_due(number, seen)
        strength = auxiliary.strength(seen) if auxiliary is not None and is_due else 0.0

        # One forward of the generator serves both steps.
        with _autocast(config, world.device):
            fakes = step.synthesize(generator, inputs)

        # Discriminator.
        _require_grad(True, discriminator, heads)
        opt_d.zero_grad(set_to_none=True)
        with _autocast(config, world.device):
            metrics = step.accumulate_discriminator(
                players, config, inputs, fakes, auxiliary_strength=strength
            )
        if config.optimizer.r1_weight > 0 and number % config.optimizer.r1_every == 0:
            weight = config.optimizer.r1_weight / 2 * config.optimizer.r1_every
            metrics |= step.accumulate_r1(players, inputs, weight=weight)
        world.mean_gradients(discriminator, heads)
        metrics["d/gradient_norm"] = _clip(config, discriminator, heads)
        opt_d.step()

        # Generator.
        _require_grad(False, discriminator, heads)
        opt_g.zero_grad(set_to_none=True)
        with _autocast(config, world.device):
            metrics |= step.accumulate_generator(
                players, config, inputs, fakes, auxiliary_strength=strength
            )
        world.mean_gradients(generator)
        metrics["g/gradient_norm"] = _clip(config, generator)
        opt_g.step()
        del fakes

        # Bookkeeping.
        progress.images_seen += batch_size
        ema.update(generator, progress.images_seen, batch_size)
        log.add(metrics)
        is_done = progress.images_seen >= config.total_images
        if is_done or _crosses(seen, batch_size, config.log_images):
            found |= _checked(log.line(progress.images_seen), progress.images_seen)
        if world.is_main and (is_done or _crosses(seen, batch_size, config.sample_images)):
            found |= _look(probe, ema.network, progress.images_seen, log)
        if world.is_main and (is_done or _crosses(seen, batch_size, config.checkpoint_images)):
            about = {"images_seen": progress.images_seen, "config": config.model_dump(mode="json")}
            checkpoint.save(
                run_dir / "checkpoints",
                progress.images_seen,
                parts,
                about,
                keep=config.keep_checkpoints,
            )
    if not found and world.is_main:  # resumed at the very end
        found |= _look(probe, ema.network, progress.images_seen, log)
    if world.is_main:
        about_snapshot: dict[str, str | int | float] = {
            "images_seen": progress.images_seen,
            "seed": config.seed,
        }
        averaged = ema.network
        assert isinstance(averaged, Generator | Upsampler)
        if isinstance(averaged, Generator):
            averaged.style_mean.copy_(_mean_style(averaged, captions, batches))
        snapshot.save(run_dir / "snapshot.safetensors", averaged, about_snapshot)
    return Result(progress.images_seen, found)


def _recent(
    config: TrainStage,
    batches: Callable[[int], Iterator[Batch]],
    images_seen: int,
    world: World,
) -> RecentCaptions:
    """The captions before this position, as an uninterrupted run would remember them."""
    recent = RecentCaptions(config.loss.recent_captions)
    local_batch = config.batch_size // world.size
    wanted = math.ceil(config.loss.recent_captions / local_batch)
    steps_back = min(images_seen // config.batch_size, wanted)
    start = images_seen - steps_back * config.batch_size
    for batch in itertools.islice(batches(start), steps_back):
        recent.add(batch.captions)
    return recent


@torch.no_grad()
def _mean_style(
    generator: Generator, captions: CaptionFeatures, batches: Callable[[int], Iterator[Batch]]
) -> Tensor:
    """w̄ over the captions of the first batches, one latent each: S."""
    random = torch.Generator().manual_seed(0)
    styles = []
    for batch in itertools.islice(batches(0), MEAN_STYLE_BATCHES):
        text = generator.read(captions(batch.captions))
        z = torch.randn(len(batch.captions), generator.config.latent_dim, generator=random)
        styles.append(generator.style(z.to(generator.style_mean.device), text))
    return torch.cat(styles).mean(0)


def _inputs(
    config: TrainStage,
    players: step.Players,
    captions: CaptionFeatures,
    recent: RecentCaptions,
    batch: Batch,
    images_seen: int,
    world: World,
) -> step.Inputs:
    """Draw everything random of a step from (seed, position), for all ranks alike, and share it."""
    random = torch.Generator().manual_seed(config.seed * 1_000_003 + images_seen)
    generator, levels = players.generator, players.discriminator.config.levels
    B = config.batch_size
    z_BZ = world.share(torch.randn(B, generator.config.latent_dim, generator=random))
    is_hard_B = world.share(torch.rand(B, generator=random) < config.loss.hard_mismatches)
    uniform_B = world.share(torch.rand(B, generator=random))
    rotation = float(torch.rand((), generator=random))

    real_BCHW = from_uint8(batch.images_BCHW.to(world.device, non_blocking=True))
    real = pyramid(real_BCHW, levels)
    small: tuple[Tensor, Tensor] | None = None
    crop = (0, 0)
    if isinstance(generator, Upsampler):
        side, target = generator.config.input_resolution, generator.config.resolution
        small_BCHW = pyramid(real_BCHW, (target // side).bit_length())[-1]
        small = small_BCHW, world.share(torch.randn(B, 3, side, side, generator=random))
        room = max(target - getattr(config, "lpips_crop", target), 0) + 1
        top, left = torch.randint(room, (2,), generator=random).tolist()
        crop = (top, left)

    recent.add(batch.captions)
    others = mismatch(
        batch.captions,
        recent,
        is_hard_B=is_hard_B.tolist(),
        uniform_B=uniform_B.tolist(),
        order_B=uniform_B.argsort().tolist(),
        rotation=rotation,
    )
    has_other_B = torch.tensor([other is not None for other in others], device=world.device)
    other_text = captions([o or own for o, own in zip(others, batch.captions, strict=True)])
    text = captions(batch.captions)
    return step.Inputs(real, batch.captions, text, z_BZ, small, other_text, has_other_B, crop)


def _adamw(config: TrainStage, *modules: nn.Module) -> torch.optim.AdamW:
    """AdamW with a stronger decay on attention weights (GigaGAN, appendix A)."""
    settings = config.optimizer
    attention: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            (attention if "attention" in name else others).append(parameter)
    groups = [
        {"params": others, "weight_decay": settings.weight_decay},
        {"params": attention, "weight_decay": settings.attention_weight_decay},
    ]
    # The fused step is one pass over each parameter instead of ten.
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(BETA1, settings.beta2), fused=True)


def _set_rate(optimizer: torch.optim.Optimizer, config: TrainStage, images_seen: int) -> None:
    """Linear warm-up over the first images."""
    warmup = max(config.optimizer.warmup_images, 1)
    rate = config.optimizer.lr * min((images_seen + config.batch_size) / warmup, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate


def _clip(config: TrainStage, *modules: nn.Module) -> Tensor:
    """Scale gradients down to the largest allowed norm; the norm before that."""
    parameters = [p for m in modules for p in m.parameters()]
    return nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm).detach()


def _require_grad(value: bool, *modules: nn.Module) -> None:
    """Whether a step trains these; if not, it does not pay for their gradients."""
    for module in modules:
        module.requires_grad_(value)


def _autocast(
    config: TrainStage, device: torch.device
) -> contextlib.AbstractContextManager[object]:
    """bf16 where asked for, or where `auto` and the device multiplies bf16 natively.

    A CPU without such instructions emulates them at a tenth of the speed of float32 or less.
    """
    native = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    wanted = config.precision == "bf16" or (config.precision == "auto" and native)
    return torch.autocast(device.type, torch.bfloat16) if wanted else contextlib.nullcontext()


def _crosses(images_seen: int, batch_size: int, every: int) -> bool:
    """Whether this step passes a multiple of `every`."""
    return (images_seen + batch_size) // every > images_seen // every


def _checked(line: dict[str, float], images_seen: int) -> dict[str, float]:
    """Stop where a figure is not finite: going on would only overwrite good checkpoints."""
    bad = [name for name, value in line.items() if value != value or abs(value) == float("inf")]
    if bad:
        raise DivergenceError(
            f"{', '.join(bad)} not finite at {images_seen:,} images: lower optimizer.lr or raise "
            "optimizer.r1_weight, and start again from the last checkpoint"
        )
    return line


def _look(probe: Probe, averaged: nn.Module, images_seen: int, log: Log) -> dict[str, float]:
    """A tick: picture and probes of the averaged generator."""
    started = time.monotonic()
    look = probe.look(averaged)
    log.picture(images_seen, "samples", look.grid)
    log.scalars(images_seen, look.scalars)
    shown = "  ".join(f"{name.removeprefix('probe/')} {v:.3f}" for name, v in look.scalars.items())
    log.say(f"{images_seen:,} images seen: {shown}")
    log.pause(time.monotonic() - started)
    return look.scalars
