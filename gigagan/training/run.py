"""The state of a run: everything that steps change, and how it is saved, restored, rolled back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gigagan.config import TrainedPart, TrainStage
from gigagan.models.base import features_of
from gigagan.models.stylegan_t import StyleGANT
from gigagan.training import acceleration, checkpoint, step
from gigagan.training.augment import Ada
from gigagan.training.distributed.optimizer import consolidate, make_optimizer
from gigagan.training.distributed.reducer import GradientReducer
from gigagan.training.distributed.world import World
from gigagan.training.divergence import write_report
from gigagan.training.ema import Ema
from gigagan.training.guard import Alarm, Divergence, Guard
from gigagan.training.inputs import Inputs
from gigagan.training.logs import Log
from gigagan.training.phases import Phase, begins_to_cool, is_on_the_way, phase_at
from gigagan.training.vitals import vital_signs

STOP_EVERY = 8
"""Steps between two questions to all ranks whether one of them was asked to stop."""
BETA1 = 0.0  # GigaGAN and StyleGAN2: no momentum


class Run:
    """Networks, optimizers, averages, guard and position of one training run."""

    def __init__(
        self, config: TrainStage, players: step.Players, run_dir: Path, log: Log, world: World
    ) -> None:
        self.config, self.players, self.run_dir = config, players, run_dir
        self.log, self.world = log, world
        self.images_seen = 0
        self.last_inputs: Inputs | None = None
        """What the last step saw, for vital signs."""
        self._num_failed_saves = 0
        self._trained: TrainedPart | None = None
        """Which part of G the last step trained."""
        self._healthy_at = 0
        """Up to where every line of the log was without a fatal alarm."""
        generator, discriminator = players.generator, players.discriminator
        self.heads: nn.Module = players.auxiliary.heads if players.auxiliary else nn.Module()
        system = config.system
        if system.channels_last:
            acceleration.channels_last(generator)
            acceleration.channels_last(discriminator)
        self.ema = Ema(generator, config.optimizer)  # a copy of what is not wrapped yet
        for network in (generator, discriminator):
            if system.activation_checkpointing:
                acceleration.checkpoint_activations(network)
            if system.compile:
                acceleration.compile_parts(network)
        self.opt_g = adamw(config, world, generator)
        self.opt_d = adamw(config, world, discriminator, self.heads)
        self.reducer_g = GradientReducer(world, generator, bucket_mb=system.bucket_mb)
        self.reducer_d = GradientReducer(
            world, discriminator, self.heads, bucket_mb=system.bucket_mb
        )
        self.guard = Guard(config.health, world.device)
        self.ada = Ada(config.augment, config.batch_size, world.device)
        self._parts: dict[str, checkpoint.Stateful] = {
            "generator": generator,
            "discriminator": discriminator,
            "heads": self.heads,
            "opt_g": self.opt_g,
            "opt_d": self.opt_d,
            "ema": self.ema,
            "guard": self.guard,
            "ada": self.ada,
        }

    # Optimizers.

    def enter_phase(self) -> Phase:
        """The phase of the next step; sets both learning rates, less what rollbacks took."""
        phase = phase_at(self.config, self.images_seen)
        for optimizer, rate in (
            (self.opt_g, phase.generator_lr),
            (self.opt_d, phase.discriminator_lr),
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate * self.guard.rate_factor
        if isinstance(self.players.generator, StyleGANT):
            self._train_only(self.players.generator, phase.trains)
        seam = self.config.warm_start.images
        if seam and self.images_seen - self.config.batch_size < seam <= self.images_seen:
            self.log.say(f"{self.images_seen:,} images seen: the warm start ends, D comes in")
        return phase

    def _train_only(self, generator: StyleGANT, trains: TrainedPart) -> None:
        """Freeze what the phase does not train."""
        if trains == self._trained:
            return
        generator.requires_grad_(False)
        for parameter in generator.trained_in(trains):
            parameter.requires_grad_(True)
        if self._trained is not None or trains != "all":
            self.log.say(f"{self.images_seen:,} images seen: of G {trains} learns from here on")
        self._trained = trains

    @staticmethod
    def rate_of(optimizer: torch.optim.Optimizer) -> float:
        """The learning rate of its last step."""
        return float(optimizer.param_groups[0]["lr"])

    def judge(self, name: str, optimizer: torch.optim.Optimizer, *modules: nn.Module) -> Tensor:
        """Clip, and tell the optimizer what the guard says; the gradients' norm before clipping.

        A step that the guard refuses leaves weights and moments as they are: the fused optimizer
        reads that from the device, so nothing waits for it.
        """
        parameters = [p for m in modules for p in m.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        largest = self.config.optimizer.max_grad_norm
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        has_r1 = name == "d" and self.has_r1
        kind = "r1" if has_r1 else "plain"
        if self.images_seen < self.config.warm_start.images:
            kind = "warm"
        elif name == "g" and self._trained not in (None, "all"):
            kind = str(self._trained)
        optimizer.found_inf = self.guard.judge(name, norm, kind=kind)  # type: ignore[attr-defined]
        return norm.detach()

    def auxiliary_strength(self, phase: Phase) -> float:
        """Weight of what the frozen image encoder says of the next step; 0: not asked."""
        auxiliary = self.players.auxiliary
        if auxiliary is None or not phase.has_discriminator:
            return 0.0
        if not auxiliary.is_due(self.number, self.images_seen):
            return 0.0
        return auxiliary.strength(self.images_seen)

    # Position.

    def advance(self, metrics: step.Metrics) -> None:
        """A step has ended: move on, and average the generator."""
        self.images_seen += self.config.batch_size
        generator = self.players.generator
        self.ema.update(generator, self.images_seen, self.config.batch_size)
        self.log.add(metrics)

    @property
    def is_done(self) -> bool:
        """Whether the run is as long as it shall be."""
        return self.images_seen >= self.config.total_images

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether the step that ended is one after which the state is saved."""
        return self.begins_to_cool or self.crosses(self.config.checkpoint_images)

    @property
    def asks_ranks(self) -> bool:
        """Whether this is a step after which all ranks say if they were asked to stop."""
        return self.world.size == 1 or (self.number - 1) % STOP_EVERY == 0

    @property
    def number(self) -> int:
        """Of the next step, from 0."""
        return self.images_seen // self.config.batch_size

    @property
    def has_r1(self) -> bool:
        """Whether the next step has a lazy R1 penalty."""
        settings = self.config.optimizer
        is_due = settings.r1_weight > 0 and self.number % settings.r1_every == 0
        return is_due and self.trains_discriminator

    @property
    def trains_discriminator(self) -> bool:
        """Whether the next step is one of D, too."""
        is_due = self.number % self.config.optimizer.discriminator_every == 0
        return is_due and self.images_seen >= self.config.warm_start.images

    # Health.

    def heed(self, alarms: Sequence[Alarm]) -> None:
        """Say what the guard says.

        Raises:
            Divergence: one of the alarms is fatal.
        """
        for alarm in alarms:
            self.log.say(f"health: {alarm}")
        if any(alarm.is_fatal for alarm in alarms):
            raise Divergence(alarms)

    def write_line(self, phase: Phase) -> dict[str, float]:
        """Write a line of the log, and let the guard look at it; its means.

        Raises:
            Divergence: the guard found one.
        """
        line = self.log.line(self.images_seen, mean=self.world.mean)
        alarms = self.guard.check(line, self.images_seen)
        is_augmented = self.config.augment.diffaugment
        figures = {
            "learning_rate": self.rate_of(self.opt_g),
            "phase/learning_rate_d": self.rate_of(self.opt_d),
            "phase/adversarial": phase.adversarial,
            "phase/regression": phase.regression,
            "augment/probability": self.ada.probability if is_augmented else 0.0,
            "ema/half_life": self.ema.half_life_at(self.images_seen),
            **self.guard.figures(),
        }
        self.log.scalars(self.images_seen, figures)
        self.heed(alarms)
        self._healthy_at = self.images_seen  # on every rank: no alarm was fatal
        return line

    def vital_signs(self) -> dict[str, float]:
        """Of the networks that are trained, on what the last step saw."""
        inputs = self.last_inputs
        if inputs is None:
            return {}
        players = self.players
        levels = players.discriminator.config.levels
        with torch.no_grad():
            text = features_of(players.generator, inputs.captions, lambda captions: inputs.text)
        return vital_signs(
            players.generator,
            players.discriminator,
            inputs.z_BZ,
            text,
            inputs.real[:levels],
            inputs.given,
        )

    # Checkpoints.

    def resume(self) -> None:
        """Go on from the newest readable checkpoint, if there is one."""
        if self._restore():
            self._healthy_at = self.images_seen
            self.log.say(f"resumed at {self.images_seen:,} images")

    def roll_back(self, divergence: Divergence) -> None:
        """Go back to the last checkpoint of a healthy run, and on with a lower learning rate.

        One written since the last line without a fatal alarm may hold the divergence: it goes.

        Raises:
            Divergence: the number of attempts is used up, or there is no checkpoint; a report is
                written.
        """
        where, folder = self.images_seen, self.run_dir / "checkpoints"
        if not self.guard.can_roll_back or not checkpoint.latest(folder, until=self._healthy_at):
            if self.world.is_main:
                page = write_report(self.run_dir, divergence.alarms, self.guard.history)
                self.log.say(f"health: gave up at {where:,} images; report: {page}")
            raise divergence
        self.world.barrier()
        if self.world.is_main:
            checkpoint.discard(folder, after=self._healthy_at)
        self.world.barrier()
        self._restore()
        self.guard.roll_back(divergence.alarms, where, self.images_seen)
        self.log.say(
            f"health: rolled back from {where:,} to {self.images_seen:,} images, learning rate "
            f"× {self.guard.rate_factor:g}"
        )
        # The attempt counts even if the process is killed before its next checkpoint.
        self.save()

    def save(self, *, is_final: bool = False) -> None:
        """Write a checkpoint; every rank must call this.

        A disk that is full does not end a run: the next checkpoint is another chance. The last
        one must be written.

        Raises:
            WriteError: the final one could not be written.
        """
        consolidate(self.opt_g, self.opt_d)
        if not self.world.is_main:
            return
        config = self.config
        every = config.milestone_images
        try:
            checkpoint.save(
                self.run_dir / "checkpoints",
                self.images_seen,
                self._parts,
                {"config": config.model_dump(mode="json"), "ranks": self.world.size},
                keep=config.keep_checkpoints,
                is_milestone=self.begins_to_cool or (every is not None and self.crosses(every)),
            )
        except checkpoint.WriteError as error:
            self._num_failed_saves += 1
            if is_final:
                raise
            self.log.say(f"warning: {error}; training goes on, and tries again later")
        self.log.scalars(
            self.images_seen, {"health/failed_checkpoints": float(self._num_failed_saves)}
        )

    @property
    def begins_to_cool(self) -> bool:
        """Whether this is the last state that a longer run comes by, too."""
        return begins_to_cool(self.config, self.images_seen)

    def crosses(self, every: int) -> bool:
        """Whether the last step passed a multiple of `every`."""
        return self.images_seen // every > (self.images_seen - self.config.batch_size) // every

    def _restore(self) -> bool:
        """Take back the newest readable checkpoint; whether there is one.

        Of a shorter run that has cooled down it is the one before that, if it was kept.
        """
        folder, total = self.run_dir / "checkpoints", self.config.total_images

        def is_ours(about: Mapping[str, Any]) -> bool:
            return not about or is_on_the_way(about["config"], about["images_seen"], total)

        about = checkpoint.restore_newest(
            folder,
            self._parts,
            self.config.model_dump(mode="json"),
            warn=self.log.say,
            is_preferred=is_ours,
        )
        if about is None:
            return False
        self.images_seen = int(about["images_seen"])
        if not is_ours(about):
            self.log.say(
                f"warning: at {self.images_seen:,} images learning rates had fallen towards the "
                f"end at {about['config']['total_images']:,}, and no checkpoint of before is "
                "left: this run will differ from one that was meant to be as long from its start"
            )
        self.world.barrier()
        if self.world.is_main:  # those beyond would pass for newer ones
            checkpoint.discard(folder, after=self.images_seen, but=is_ours)
        return True


def adamw(config: TrainStage, world: World, *modules: nn.Module) -> torch.optim.Optimizer:
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
    betas, shard = (BETA1, settings.beta2), config.system.shard_optimizer
    return make_optimizer(groups, world, lr=settings.lr, betas=betas, shard=shard)
