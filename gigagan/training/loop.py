"""The training loop, top to bottom. Position is counted in images seen.

Shape letters: B batch (of all ranks where said so), C colour, H W image, Z latent.
"""

from __future__ import annotations

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
from gigagan.models.upsampler import Upsampler, shrink
from gigagan.training import step
from gigagan.training.acceleration import autocast, uncompiled
from gigagan.training.augment import Draws
from gigagan.training.captions import CaptionFeatures, RecentCaptions, mismatch
from gigagan.training.distributed import World
from gigagan.training.guard import Divergence, StallWatch
from gigagan.training.logs import SNAPSHOTS, Log
from gigagan.training.probes import Look, from_uint8
from gigagan.training.run import Run
from gigagan.training.transfer import place

MEAN_STYLE_CAPTIONS, MEAN_STYLE_BATCH = 512, 64
STOP_EVERY = 8
"""Steps between two questions to all ranks whether one of them was asked to stop."""


class Preempted(RuntimeError):  # noqa: N818 - not an error: the run goes on later
    """The process was asked to stop; a checkpoint of the last step is written."""


class Batch(Protocol):
    """What the loader gives: this rank's part of a global batch."""

    @property
    def images_BCHW(self) -> Tensor:
        """uint8."""

    @property
    def captions(self) -> list[str]:
        """One per image."""

    @property
    def planned_captions(self) -> list[str]:
        """Of the whole global batch, in its order."""


class Loader(Protocol):
    """Where batches come from: a function of the position."""

    def batches(self, images_seen: int = 0) -> Iterator[Batch]:
        """From there on, without end."""

    def captions_between(self, start: int, stop: int) -> list[str]:
        """Captions at these positions."""


class Probe(Protocol):
    """Looks at a generator every so often."""

    def look(self, generator: nn.Module) -> Look:
        """Draw and measure."""


class Result(NamedTuple):
    """How a run ended."""

    images_seen: int
    scalars: dict[str, float]
    """The last probe and the last line of the log."""


def train(
    config: TrainStage,
    players: step.Players,
    captions: CaptionFeatures,
    loader: Loader,
    probe: Probe,
    run_dir: Path,
    log: Log,
    world: World,
    *,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train until `config.total_images`, resuming from `run_dir` if it holds a checkpoint.

    Writes checkpoints, sample pictures and, at the end, `snapshot.safetensors`. Where the guard
    sees a divergence the run goes back to the last checkpoint, with a lower learning rate.

    Raises:
        Divergence: it diverged more often than the configuration allows; a report is written.
        Preempted: asked to stop, and a checkpoint of this position is written.
        CheckpointError: what `run_dir` holds is unreadable or of another configuration.
    """
    run = Run(config, players, run_dir, log, world)
    run.resume()
    log.start(run.images_seen)
    found: dict[str, float] = {}
    with StallWatch(run_dir, config.health.stall_seconds, rank=world.rank) as watch:
        while run.images_seen < config.total_images:
            try:
                found = _steps(run, captions, loader, probe, watch, is_asked_to_stop)
            except Divergence as divergence:
                watch.pause()
                run.roll_back(divergence)
                log.start(run.images_seen)
    if world.is_main:
        if not found:  # resumed at the very end: all is logged already
            found = probe.look(run.ema.network).scalars
        _save_snapshot(run, captions, loader, run_dir / "snapshot.safetensors")
    return Result(run.images_seen, found)


def _steps(
    run: Run,
    captions: CaptionFeatures,
    loader: Loader,
    probe: Probe,
    watch: StallWatch,
    is_asked_to_stop: Callable[[], bool],
) -> dict[str, float]:
    """Step after step from the run's position to its end; the last figures.

    Raises:
        Divergence: the guard found one.
        Preempted: asked to stop.
    """
    config, players, world, log = run.config, run.players, run.world, run.log
    generator, discriminator, heads = players.generator, players.discriminator, run.heads
    found: dict[str, float] = {}
    recent = _recent(config, loader, run.images_seen)
    stream = loader.batches(run.images_seen)
    while run.images_seen < config.total_images:
        phase, has_r1 = run.enter_phase(), run.has_r1
        inputs = _inputs(
            config,
            players,
            captions,
            recent,
            next(stream),
            run.images_seen,
            world,
            has_discriminator=phase.has_discriminator,
            augmented_share=run.ada.probability,
        )
        parts = step.split(inputs, config.system.accumulate)
        share, keeps_graph = 1 / len(parts), len(parts) == 1
        auxiliary = players.auxiliary
        is_due = auxiliary is not None and auxiliary.is_due(run.number, run.images_seen)
        is_due = is_due and phase.has_discriminator
        strength = auxiliary.strength(run.images_seen) if auxiliary and is_due else 0.0
        is_asking = world.size == 1 or run.number % STOP_EVERY == 0
        metrics: step.Metrics = {}

        # One forward of the generator serves both steps, unless a batch comes in parts.
        fakes: list[list[Tensor]] = []
        for part in parts:
            with torch.set_grad_enabled(keeps_graph), autocast(config.precision, world.device):
                fakes.append(step.synthesize(generator, part))

        # Discriminator: every so many steps, and not at all in a warm start.
        if run.trains_discriminator:
            _require_grad(True, discriminator, heads)
            run.opt_d.zero_grad(set_to_none=True)
            for i, (part, fake) in enumerate(zip(parts, fakes, strict=True)):
                if i == len(parts) - 1 and not has_r1:
                    run.reducer_d.arm()  # means of gradients leave while this backward runs
                with autocast(config.precision, world.device):
                    terms = step.accumulate_discriminator(
                        players, config, part, fake, auxiliary_strength=strength, share=share
                    )
                step.add(metrics, terms, share)
            if has_r1:
                weight = config.optimizer.r1_weight / 2 * config.optimizer.r1_every
                for i, part in enumerate(parts):
                    if i == len(parts) - 1:
                        run.reducer_d.arm()
                    with uncompiled():
                        terms = step.accumulate_r1(players, part, weight=weight * share)
                    step.add(metrics, terms, share)
            run.reducer_d.finish()
            metrics["d/gradient_norm"] = run.update("d", run.opt_d, discriminator, heads)
            run.ada.update(metrics["d/sign_real"], world.mean)

        # Generator.
        _require_grad(False, discriminator, heads)
        run.opt_g.zero_grad(set_to_none=True)
        for i, (part, fake) in enumerate(zip(parts, fakes, strict=True)):
            if i == len(parts) - 1:
                run.reducer_g.arm()
            with autocast(config.precision, world.device):
                images = fake if keeps_graph else step.synthesize(generator, part)
                terms = step.accumulate_generator(
                    players,
                    config,
                    part,
                    images,
                    auxiliary_strength=strength,
                    phase=phase,
                    share=share,
                )
            step.add(metrics, terms, share)
        run.reducer_g.finish()
        metrics["g/gradient_norm"] = run.update("g", run.opt_g, generator)
        run.last_inputs = inputs
        del fakes, fake, images, part, parts, inputs

        # Bookkeeping.
        run.images_seen += config.batch_size
        run.ema.update(generator, run.images_seen, config.batch_size)
        log.add(metrics)
        watch.beat()
        is_done = run.images_seen >= config.total_images
        if is_done or run.crosses(config.log_images):
            line = log.line(run.images_seen, mean=world.mean)
            alarms = run.guard.check(line, run.images_seen)
            figures = {
                "learning_rate": run.rate_of(run.opt_g),
                "phase/learning_rate_d": run.rate_of(run.opt_d),
                "phase/adversarial": phase.adversarial,
                "phase/regression": phase.regression,
                "augment/probability": run.ada.probability if config.augment.diffaugment else 0.0,
                "ema/half_life": run.ema.half_life_at(run.images_seen),
                **run.guard.figures(),
            }
            log.scalars(run.images_seen, figures)
            found |= line
            run.heed(alarms)
            run.note_health()
        if is_done or run.crosses(config.sample_images):
            watch.pause()
            if world.is_main:
                found |= _look(run, probe, captions, loader)
            watch.beat()
        is_stopping = is_asking and world.any(is_asked_to_stop())
        is_kept = run.begins_to_cool or run.crosses(config.checkpoint_images)
        if is_done or is_stopping or is_kept:
            run.save(is_final=is_done or is_stopping)
        if is_stopping and not is_done:
            raise Preempted(f"asked to stop: wrote a checkpoint at {run.images_seen:,} images")
    return found


def _recent(config: TrainStage, loader: Loader, images_seen: int) -> RecentCaptions:
    """The captions before this position, as an uninterrupted run would remember them."""
    recent = RecentCaptions(config.loss.recent_captions)
    start = max(images_seen - config.loss.recent_captions, 0)
    recent.add(loader.captions_between(start, images_seen))
    return recent


def _inputs(
    config: TrainStage,
    players: step.Players,
    captions: CaptionFeatures,
    recent: RecentCaptions,
    batch: Batch,
    images_seen: int,
    world: World,
    *,
    has_discriminator: bool = True,
    augmented_share: float = 1.0,
) -> step.Inputs:
    """Draw everything random of a step from (seed, position), for all ranks alike, and share it.

    Without a discriminator nothing meets another caption.
    """
    random = torch.Generator().manual_seed(config.seed * 1_000_003 + images_seen)
    generator, levels = players.generator, players.discriminator.config.levels
    if config.warm_start.images:  # the regression is on every level that is drawn
        levels = generator.num_images
    B = config.batch_size
    z_BZ = world.share(torch.randn(B, generator.config.latent_dim, generator=random))
    is_hard_B = torch.rand(B, generator=random) < config.loss.hard_mismatches
    uniform_B = torch.rand(B, generator=random)
    rotation = float(torch.rand((), generator=random))

    real_BCHW = from_uint8(place(batch.images_BCHW, world.device))
    real = pyramid(real_BCHW, levels)
    small: tuple[Tensor, Tensor] | None = None
    crop = (0, 0)
    if isinstance(generator, Upsampler):
        side, target = generator.config.input_resolution, generator.config.resolution
        small_BCHW = shrink(real_BCHW, side)
        small = small_BCHW, world.share(torch.randn(B, 3, side, side, generator=random))
        room = max(target - getattr(config, "lpips_crop", target), 0) + 1
        top, left = torch.randint(room, (2,), generator=random).tolist()
        crop = (top, left)
    draws: list[Draws | None] = []
    for _ in range(3):  # of real and generated images in D's step, and of generated ones in G's
        drawn = players.augment.draw(B, random, augmented_share)
        draws.append(drawn and drawn.shared(world.share))

    recent.add(batch.planned_captions)
    text = captions(batch.captions)
    others: list[str | None] = [None] * len(batch.captions)
    if has_discriminator:
        others = mismatch(
            batch.planned_captions,
            recent,
            rows=world.rows(B),
            is_hard_B=is_hard_B.tolist(),
            uniform_B=uniform_B.tolist(),
            order_B=uniform_B.argsort().tolist(),
            rotation=rotation,
        )
    # A picture that could not be read was replaced by another, perhaps of that very caption.
    others = [o if o != own else None for o, own in zip(others, batch.captions, strict=True)]
    has_other_B = tuple(other is not None for other in others)
    other_text = text
    if has_discriminator:
        other_text = captions([o or own for o, own in zip(others, batch.captions, strict=True)])
    return step.Inputs(
        real,
        batch.captions,
        text,
        z_BZ,
        small,
        other_text,
        has_other_B,
        crop,
        tuple(draws),
        images_seen,
        tuple(row >= B // 2 for row in world.rows(B)),
    )


def _require_grad(value: bool, *modules: nn.Module) -> None:
    """Whether a step trains these; if not, it does not pay for their gradients."""
    for module in modules:
        module.requires_grad_(value)


def _look(run: Run, probe: Probe, captions: CaptionFeatures, loader: Loader) -> dict[str, float]:
    """A tick: picture and probes of the averaged generator, vital signs of the trained one.

    Raises nothing of what the guard finds: vital signs only warn.
    """
    started = time.monotonic()
    log, seen = run.log, run.images_seen
    look = probe.look(run.ema.network)
    vitals = run.vital_signs()
    log.picture(seen, "samples", look.grid)
    log.scalars(seen, look.scalars | vitals)
    run.heed(run.guard.check_vitals(vitals, seen))
    log.health(run.config.health)
    every = run.config.snapshot_images
    if every is not None and run.crosses(every):
        path = run.run_dir / SNAPSHOTS / f"images-{seen:010d}.safetensors"
        with log.spare("a snapshot"):
            path.parent.mkdir(exist_ok=True)
            _save_snapshot(run, captions, loader, path)
    shown = "  ".join(f"{name.removeprefix('probe/')} {v:.3f}" for name, v in look.scalars.items())
    log.say(f"{seen:,} images seen: {shown}")
    log.pause(time.monotonic() - started)
    return look.scalars


def _save_snapshot(run: Run, captions: CaptionFeatures, loader: Loader, path: Path) -> None:
    """The averaged generator, for users."""
    averaged = run.ema.network
    assert isinstance(averaged, Generator | Upsampler)
    if isinstance(averaged, Generator):
        averaged.style_mean.copy_(_mean_style(averaged, captions, loader))
    about: dict[str, str | int | float] = {
        "images_seen": run.images_seen,
        "seed": run.config.seed,
    }
    snapshot.save(path, averaged, about)


@torch.no_grad()
def _mean_style(generator: Generator, captions: CaptionFeatures, loader: Loader) -> Tensor:
    """w̄ over the first captions of the training set, one latent each: S."""
    random = torch.Generator().manual_seed(0)
    styles = []
    for start in range(0, MEAN_STYLE_CAPTIONS, MEAN_STYLE_BATCH):
        text = generator.read(captions(loader.captions_between(start, start + MEAN_STYLE_BATCH)))
        z = torch.randn(MEAN_STYLE_BATCH, generator.config.latent_dim, generator=random)
        styles.append(generator.style(z.to(generator.style_mean.device), text))
    return torch.cat(styles).mean(0)
