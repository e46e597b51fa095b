"""The health of a run: which steps to skip, what to warn of, when to go back or give up.

It decides. It never runs a step or a network, and never reads or writes a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gigagan.config import HealthConfig
from gigagan.models.layers import full_precision

MEAN_DECAY = 0.98  # of the running mean of norms, per good step: a memory of about 50 steps


@dataclass(frozen=True)
class Alarm:
    """A figure beyond its limit."""

    name: str
    value: float
    limit: float
    """Infinite where the figure only had to be finite."""
    images_seen: int
    is_fatal: bool
    is_over: bool = False
    """A warning that ends: the figure is back within its limit."""

    def __str__(self) -> str:
        where = f"at {self.images_seen:,} images"
        if not math.isfinite(self.value):
            return f"{self.name} = {self.value} is not finite {where}"
        figure = f"{self.name} = {self.value:.4g}"
        if self.is_over:
            return f"{figure} is within its limit {self.limit:.4g} again {where}"
        return f"{figure} is beyond its limit {self.limit:.4g} {where}"


class Divergence(RuntimeError):  # noqa: N818 - the word that a report and its readers use
    """A run that cannot go on; carries the alarms that say why."""

    def __init__(self, alarms: Sequence[Alarm]) -> None:
        self.alarms = list(alarms)
        super().__init__("; ".join(str(alarm) for alarm in self.alarms))


class RunningNorm(NamedTuple):
    """The running geometric mean of good gradient norms, as scalars on the device."""

    log_mean: Tensor
    num_good: Tensor

    def allows(self, norm: Tensor, factor: float, settle_steps: int) -> Tensor:
        """Whether norm ≤ factor · mean, or the mean has not settled yet."""
        is_settled = self.num_good >= settle_steps
        return ~is_settled | (norm <= factor * self.log_mean.exp())

    def follow(self, norm: Tensor, is_good: Tensor) -> RunningNorm:
        """m ← m + r · (log norm − m) on good steps, r = max(1 / n, 1 − MEAN_DECAY).

        The plain mean at first, so that the start is not remembered for longer than the rest.
        """
        # The logarithm of zero would pull the mean down for good.
        counts = is_good & (norm > 0)
        num_good = self.num_good + counts
        rate = (1 / num_good.clamp(min=1)).clamp(min=1 - MEAN_DECAY)
        moved = self.log_mean + rate * (norm.log() - self.log_mean)
        return RunningNorm(torch.where(counts, moved, self.log_mean), num_good)


class StepCounts(NamedTuple):
    """Steps of a network, as integers on the device."""

    steps_of_line: Tensor
    bad_of_line: Tensor
    bad: Tensor
    """Since the start of the run."""

    def add(self, is_bad: Tensor) -> StepCounts:
        """Count one more step."""
        return StepCounts(self.steps_of_line + 1, self.bad_of_line + is_bad, self.bad + is_bad)


class Guard:
    """Judges steps on the device, lines of the log and vital signs on the host."""

    def __init__(self, config: HealthConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.num_rollbacks = 0
        self.rate_factor = 1.0
        """What the loop multiplies the learning rate by."""
        self.history: list[dict[str, Any]] = []
        """One entry per rollback: where, back to where, the rate factor since, and why."""
        self.num_warnings: dict[str, int] = {}
        """How often each warning has begun."""
        self._norms: dict[str, RunningNorm] = {}
        self._counts: dict[str, StepCounts] = {}
        self._warned: set[str] = set()
        self._num_confident_lines = 0
        self._figures: dict[str, float] = {}

    # On the device, once per step of each network.

    @torch.no_grad()
    def judge(self, name: str, norm: Tensor, *, kind: str = "plain") -> Tensor:
        """1.0 if this step must be skipped, else 0.0, for the fused optimizer's `found_inf`.

        Nothing is read from the device. `norm` is that of the gradients before clipping, averaged
        over all ranks: so all skip a step or none, and what is not finite anywhere shows in it.
        Steps of another `kind` (with R1, whose gradient is multiplied by its interval) have a mean
        of their own.
        """
        value = full_precision(norm).reshape(())
        key = f"{name}/{kind}"
        running = self._norms.get(key) or RunningNorm(self._number(0.0), self._number(0))
        allowed = running.allows(value, self.config.skip_factor, self.config.settle_steps)
        is_bad = ~(value.isfinite() & allowed)
        counts = self._counts.get(name) or StepCounts(*(self._number(0) for _ in range(3)))
        self._counts[name] = counts.add(is_bad)
        self._norms[key] = running.follow(value, ~is_bad)
        return is_bad.float()

    def _number(self, value: float) -> Tensor:
        return torch.full((), value, device=self.device)  # a copy from the host would be waited for

    # On the host, at each line of the log and each probe.

    def check(self, line: Mapping[str, float], images_seen: int) -> list[Alarm]:
        """What is wrong with the averages of a line, and with the share of skipped steps.

        Starts the counts of the next line; `figures()` gives those of this one.
        """
        shares = self._read_counts()
        limits = self.config

        def fatal(name: str, value: float, limit: float) -> Alarm:
            return Alarm(name, value, limit, images_seen, is_fatal=True)

        alarms = [
            fatal(f"health/skipped_share_{name}", share, limits.max_bad_share)
            for name, share in shares.items()
            if share > limits.max_bad_share
        ]
        # What a skipped step measured has its part in the averages, and harms nothing.
        if not any(shares.values()):
            alarms += [fatal(n, v, math.inf) for n, v in line.items() if not math.isfinite(v)]
        spread = logit_spread(line)
        if spread is not None and spread > limits.max_logit_spread:
            alarms.append(fatal("|d/logit_real − d/logit_fake|", spread, limits.max_logit_spread))
        if line.get("d/r1", 0.0) > limits.max_r1:
            alarms.append(fatal("d/r1", line["d/r1"], limits.max_r1))
        return alarms + self._check_confidence(line, images_seen)

    def check_vitals(self, vitals: Mapping[str, float], images_seen: int) -> list[Alarm]:
        """Warnings that begin or end with these vital signs; a sign not measured changes none."""
        limits = self.config
        lowest = {
            "health/selection_entropy": limits.min_selection_entropy,
            "health/z_effect": limits.min_z_effect,
        }
        highest = {
            "health/attention_self_g": limits.max_self_weight,
            "health/attention_self_d": limits.max_self_weight,
        }
        alarms: list[Alarm] = []
        for name, value in vitals.items():
            # Written so that what is not a number is a breach.
            if name in lowest:
                is_breached = not value >= lowest[name]
                alarms += self._warn(name, value, lowest[name], images_seen, is_breached)
            if name in highest:
                is_breached = not value <= highest[name]
                alarms += self._warn(name, value, highest[name], images_seen, is_breached)
        return alarms

    def figures(self) -> dict[str, float]:
        """For the log: skipped steps as of the last `check`, and rollbacks.

        `health/skipped_share_*` is of that line's steps, `health/skipped_*` since the start, and
        `health/norm_limit_*` the norm beyond which an ordinary step was skipped then.
        """
        return {
            **self._figures,
            "health/rate_factor": self.rate_factor,
            "health/rollbacks": float(self.num_rollbacks),
        }

    def _read_counts(self) -> dict[str, float]:
        """Share of skipped steps of each network since the last call."""
        shares: dict[str, float] = {}
        for name, counts in self._counts.items():
            steps, bad_of_line, bad = torch.stack(counts).tolist()
            shares[name] = bad_of_line / max(steps, 1)
            zero = self._number(0)
            self._counts[name] = StepCounts(zero, zero, counts.bad)
            self._figures[f"health/skipped_share_{name}"] = shares[name]
            self._figures[f"health/skipped_{name}"] = float(bad)
            running = self._norms.get(f"{name}/plain")
            if running is not None and running.num_good.item() >= self.config.settle_steps:
                limit = self.config.skip_factor * running.log_mean.exp().item()
                self._figures[f"health/norm_limit_{name}"] = limit
        return shares

    def _check_confidence(self, line: Mapping[str, float], images_seen: int) -> list[Alarm]:
        """D has won: both of its losses have been tiny for a while."""
        if "d/real" not in line or "d/fake" not in line:
            return []
        largest, limit = max(line["d/real"], line["d/fake"]), self.config.overconfident_loss
        is_below = line["d/real"] < limit and line["d/fake"] < limit
        self._num_confident_lines = self._num_confident_lines + 1 if is_below else 0
        is_breached = self._num_confident_lines >= self.config.patience
        return self._warn("max(d/real, d/fake)", largest, limit, images_seen, is_breached)

    def _warn(
        self, name: str, value: float, limit: float, images_seen: int, is_breached: bool
    ) -> list[Alarm]:
        """Say it once when it begins and once when it ends."""
        if is_breached == (name in self._warned):
            return []
        if is_breached:
            self._warned.add(name)
            self.num_warnings[name] = self.num_warnings.get(name, 0) + 1
        else:
            self._warned.remove(name)
        return [Alarm(name, value, limit, images_seen, is_fatal=False, is_over=not is_breached)]

    # Rollbacks.

    @property
    def can_roll_back(self) -> bool:
        """Whether there is another attempt left."""
        return self.num_rollbacks < self.config.max_rollbacks

    def roll_back(self, alarms: Sequence[Alarm], images_seen: int, to_images: int) -> None:
        """Note that the loop goes back to the checkpoint at `to_images`, at a lower rate.

        Raises:
            Divergence: no attempt is left.
        """
        if not self.can_roll_back:
            raise Divergence(alarms)
        self.num_rollbacks += 1
        self.rate_factor *= self.config.rollback_rate
        self.history.append(
            {
                "images_seen": images_seen,
                "to_images": to_images,
                "rate_factor": self.rate_factor,
                "alarms": [str(alarm) for alarm in alarms],
            }
        )

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to judge as an uninterrupted one."""
        return {
            "norms": {key: running._asdict() for key, running in self._norms.items()},
            "counts": {name: counts._asdict() for name, counts in self._counts.items()},
            "num_rollbacks": self.num_rollbacks,
            "rate_factor": self.rate_factor,
            "history": list(self.history),
            "warned": sorted(self._warned),
            "num_warnings": dict(self.num_warnings),
            "num_confident_lines": self._num_confident_lines,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        What counts since the start of the run (rollbacks, skipped steps) never decreases: in a
        rollback the checkpoint knows less of it than we do.
        """
        own = self._counts
        self._norms = {
            key: RunningNorm(**{k: v.to(self.device) for k, v in saved.items()})
            for key, saved in state["norms"].items()
        }
        self._counts = {
            name: StepCounts(**{k: v.to(self.device) for k, v in saved.items()})
            for name, saved in state["counts"].items()
        }
        zero = self._number(0)
        for name, counts in own.items():
            saved_counts = self._counts.get(name, StepCounts(zero, zero, zero))
            bad = torch.maximum(counts.bad, saved_counts.bad)
            self._counts[name] = saved_counts._replace(bad=bad)
        if state["num_rollbacks"] >= self.num_rollbacks:
            self.num_rollbacks = state["num_rollbacks"]
            self.rate_factor = state["rate_factor"]
            self.history = list(state["history"])
        self._warned = set(state["warned"])
        for name, count in state["num_warnings"].items():
            self.num_warnings[name] = max(count, self.num_warnings.get(name, 0))
        self._num_confident_lines = state["num_confident_lines"]


def logit_spread(line: Mapping[str, float]) -> float | None:
    """|mean logit of real − of generated images|, where both are there."""
    if "d/logit_real" not in line or "d/logit_fake" not in line:
        return None
    return abs(line["d/logit_real"] - line["d/logit_fake"])
