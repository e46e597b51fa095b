"""The training loop, top to bottom. Position is counted in images seen.

Shape letters: B batch (of all ranks where said so), C colour, H W image, Z latent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gigagan.config import TrainStage
from gigagan.models import snapshot
from gigagan.models.text import Reader
from gigagan.training import step
from gigagan.training.acceleration import autocast, uncompiled
from gigagan.training.distributed.world import World
from gigagan.training.guard import Divergence
from gigagan.training.inputs import Inputs, Loader, draw, recent_captions, split
from gigagan.training.logs import SNAPSHOTS, Log
from gigagan.training.phases import Phase, phase_at
from gigagan.training.probes import Probe
from gigagan.training.run import Run
from gigagan.training.stall import StallWatch
from gigagan.training.tasks import task_of


class Preempted(RuntimeError):  # noqa: N818 - not an error: the run goes on later
    """The process was asked to stop; a checkpoint of the last step is written."""


class Result(NamedTuple):
    """How a run ended."""

    images_seen: int
    scalars: dict[str, float]
    """The last probe and the last line of the log."""


def train(
    config: TrainStage,
    players: step.Players,
    captions: Reader,
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

        def after_step(phase: Phase) -> None:
            found.update(_tick(run, phase, captions, loader, probe, watch))
            _save_or_stop(run, is_asked_to_stop)

        while run.images_seen < config.total_images:
            try:
                _steps(run, _inputs(run, captions, loader), after_step)
            except Divergence as divergence:
                watch.pause()
                run.roll_back(divergence)
                log.start(run.images_seen)
    if world.is_main:
        if not found:  # resumed at the very end: all is logged already
            found = probe.look(run.ema.network).scalars
        _save_snapshot(run, captions, loader, run_dir / "snapshot.safetensors")
    return Result(run.images_seen, found)


def _steps(run: Run, stream: Iterator[Inputs], after_step: Callable[[Phase], None]) -> None:
    """Step after step from the run's position to its end, or to what `after_step` raises."""
    config, players, world = run.config, run.players, run.world
    generator, discriminator, heads = players.generator, players.discriminator, run.heads
    while run.images_seen < config.total_images:
        phase, has_r1 = run.enter_phase(), run.has_r1
        strength = run.auxiliary_strength(phase)
        inputs = run.last_inputs = next(stream)
        parts = split(inputs, config.system.accumulate)
        share, keeps_graph, last = 1 / len(parts), len(parts) == 1, len(parts) - 1
        metrics: step.Metrics = {}

        # Beside a regression each picture may choose its latent.
        if phase.regression > 0:
            with autocast(config.precision, world.device):
                parts = [step.with_nearest_latents(generator, part) for part in parts]

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
                if i == last and not has_r1:
                    run.reducer_d.arm()  # means of gradients leave while this backward runs
                with autocast(config.precision, world.device):
                    loss, terms = step.discriminator_loss(
                        players, config, part, fake, auxiliary_strength=strength
                    )
                (share * loss).backward()
                step.add(metrics, terms, share)
            if has_r1:
                weight = config.optimizer.r1_weight / 2 * config.optimizer.r1_every
                for i, part in enumerate(parts):
                    if i == last:
                        run.reducer_d.arm()
                    with uncompiled(discriminator):
                        penalty, terms = step.r1_loss(players, part)
                        (weight * share * penalty).backward()
                    step.add(metrics, terms, share)
            run.reducer_d.finish()
            metrics["d/gradient_norm"] = run.judge("d", run.opt_d, discriminator, heads)
            run.opt_d.step()
            run.ada.update(metrics["d/sign_real"], world.mean)

        # Generator.
        _require_grad(False, discriminator, heads)
        run.opt_g.zero_grad(set_to_none=True)
        for i, (part, fake) in enumerate(zip(parts, fakes, strict=True)):
            if i == last:
                run.reducer_g.arm()
            with autocast(config.precision, world.device):
                images = fake if keeps_graph else step.synthesize(generator, part)
                loss, terms = step.generator_loss(
                    players, config, part, images, auxiliary_strength=strength, phase=phase
                )
            (share * loss).backward()
            step.add(metrics, terms, share)
        run.reducer_g.finish()
        metrics["g/gradient_norm"] = run.judge("g", run.opt_g, generator)
        run.opt_g.step()
        del fakes, fake, images, loss, part, parts, inputs

        # Position, average, log; then pictures, checkpoints, and whether to stop.
        run.advance(metrics)
        after_step(phase)


def _inputs(run: Run, captions: Reader, loader: Loader) -> Iterator[Inputs]:
    """What each step is given, from the run's position on."""
    config = run.config
    recent = recent_captions(config, loader.captions_between, run.images_seen)
    for batch in loader.batches(run.images_seen):
        yield draw(
            config,
            run.players.augment,
            captions,
            recent,
            batch,
            run.images_seen,
            run.world,
            has_discriminator=phase_at(config, run.images_seen).has_discriminator,
            augmented_share=run.ada.probability,
        )


def _tick(
    run: Run,
    phase: Phase,
    captions: Reader,
    loader: Loader,
    probe: Probe,
    watch: StallWatch,
) -> dict[str, float]:
    """After a step: a line of the log and a look at pictures, where they are due; their figures.

    Raises:
        Divergence: the guard found one.
    """
    found: dict[str, float] = {}
    watch.beat()
    if run.is_done or run.crosses(run.config.log_images):
        found |= run.write_line(phase)
    if run.is_done or run.crosses(run.config.sample_images):
        watch.pause()
        if run.world.is_main:
            found |= _look(run, probe, captions, loader)
        watch.beat()
    return found


def _save_or_stop(run: Run, is_asked_to_stop: Callable[[], bool]) -> None:
    """After a step: a checkpoint, where it is due.

    Raises:
        Preempted: asked to stop.
    """
    is_stopping = run.asks_ranks and run.world.any(is_asked_to_stop())
    if run.is_done or is_stopping or run.is_checkpoint_due:
        run.save(is_final=run.is_done or is_stopping)
    if is_stopping and not run.is_done:
        raise Preempted(f"asked to stop: wrote a checkpoint at {run.images_seen:,} images")


def _require_grad(value: bool, *modules: nn.Module) -> None:
    """Whether a step trains these; if not, it does not pay for their gradients."""
    for module in modules:
        module.requires_grad_(value)


def _look(run: Run, probe: Probe, captions: Reader, loader: Loader) -> dict[str, float]:
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


def _save_snapshot(run: Run, captions: Reader, loader: Loader, path: Path) -> None:
    """The averaged generator, for users."""
    averaged = run.ema.network
    task_of(run.config).complete(averaged, captions, loader)
    about: dict[str, str | int | float] = {"images_seen": run.images_seen, "seed": run.config.seed}
    snapshot.save(path, averaged, about)
