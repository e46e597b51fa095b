"""The health of a run: which steps to skip, what to warn of, when to go back or give up.

It decides and describes. It never runs a step, and never reads or writes a checkpoint.

Shape letters: B batch, Z latent, N filters of a bank, H heads, L queries, M keys, C channels or
colour, S style, P prompts, H W image where said so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from gigagan.config import HealthConfig
from gigagan.evaluation.alignment import z_sensitivity
from gigagan.models.attention import SelfAttention, split_heads
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.layers import AdaptiveConv, full_precision, rms_normalize
from gigagan.models.text import Features
from gigagan.models.upsampler import Upsampler
from gigagan.training.probes import to_uint8

MEAN_DECAY = 0.98  # of the running mean of norms, per good step: a memory of about 50 steps
NUM_VITAL_IMAGES = 8
NUM_REPORT_LINES = 20
NUM_REPORT_PICTURES = 2
REPORT_COLUMNS = (
    "d/real",
    "d/fake",
    "d/logit_real",
    "d/logit_fake",
    "d/r1",
    "d/gradient_norm",
    "g/adversarial",
    "g/gradient_norm",
    "health/skipped_share_d",
    "health/skipped_share_g",
)


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


# The report of a run that gave up.


def write_report(
    run_dir: Path,
    alarms: Sequence[Alarm],
    history: Sequence[Mapping[str, Any]],
    pictures: Sequence[Path] | None = None,
) -> Path:
    """Write `divergence/report.md` for people and `report.json`, with copies of the pictures.

    Without `pictures`, the newest samples of the run. Returns the path of the page.
    """
    if pictures is None:
        pictures = sorted((run_dir / "samples").glob("*.png"))[-NUM_REPORT_PICTURES:]
    directory = run_dir / "divergence"
    directory.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        shutil.copyfile(picture, directory / picture.name)
    lines = _last_lines(run_dir / "metrics.jsonl", NUM_REPORT_LINES)
    names = [picture.name for picture in pictures]
    about = {
        "alarms": [dataclasses.asdict(alarm) for alarm in alarms],
        "rollbacks": list(history),
        "last_lines": lines,
        "pictures": names,
    }
    (directory / "report.json").write_text(json.dumps(_strict(about), indent=2) + "\n")
    page = directory / "report.md"
    page.write_text(_page(run_dir.name, alarms, history, lines, names))
    return page


def _page(
    run_name: str,
    alarms: Sequence[Alarm],
    history: Sequence[Mapping[str, Any]],
    lines: Sequence[Mapping[str, float]],
    pictures: Sequence[str],
) -> str:
    """The report in Markdown."""
    position = max((alarm.images_seen for alarm in alarms), default=0)
    parts = [f"# Run {run_name} diverged at {position:,} images", "## What was wrong"]
    parts.append("\n".join(f"- {alarm}" for alarm in alarms) or "Nothing was noted.")
    parts.append("## What was tried")
    rollbacks = [
        f"{i}. At {entry['images_seen']:,} images back to {entry['to_images']:,}, learning rate "
        f"× {entry['rate_factor']:g} since: {'; '.join(entry['alarms'])}"
        for i, entry in enumerate(history, start=1)
    ]
    parts.append("\n".join(rollbacks) or "No return to a checkpoint.")
    parts.append("## The last lines of the log")
    parts.append(_table(lines))
    if pictures:
        parts += ["## The last pictures", *(f"![{name}]({name})" for name in pictures)]
    parts.append("## What to change")
    parts.append(
        "A lower `optimizer.lr` or `optimizer.max_grad_norm` where gradient norms rose first; a "
        "higher `optimizer.r1_weight` where the logits of real and generated images drifted apart "
        "first. Where every step is bad from one position on, look at the data there. All figures "
        "are in `report.json`, and in `metrics.jsonl` of the run."
    )
    return "\n\n".join(parts) + "\n"


def _table(lines: Sequence[Mapping[str, float]]) -> str:
    """The main figures, one row per position."""
    rows: dict[int, dict[str, float]] = {}
    for line in lines:
        rows.setdefault(int(line["images"]), {}).update(line)
    columns = [c for c in REPORT_COLUMNS if any(c in row for row in rows.values())]
    if not columns:
        return "There are none."
    head = ["images", *columns]
    body = [
        [f"{images:,}", *(f"{row[c]:.4g}" if c in row else "" for c in columns)]
        for images, row in rows.items()
    ]
    ruled = [head, ["---:"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in ruled)


def _last_lines(path: Path, count: int) -> list[dict[str, float]]:
    """The newest complete lines of a log."""
    if not path.exists():
        return []
    lines: list[dict[str, float]] = []
    for text in path.read_text().splitlines()[-count - 1 :]:
        with contextlib.suppress(ValueError):  # a torn last line
            line = json.loads(text)
            if isinstance(line, dict) and "images" in line:
                lines.append(line)
    return lines[-count:]


def _strict(value: Any) -> Any:
    """JSON has no word for what is not finite: it becomes text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_strict(v) for v in value]
    return value


# A process that hangs.


class StallWatch:
    """Ends the process if no step ends in time, with the stacks of all threads in a file.

    The watching thread is written in C and needs no interpreter lock: it also ends a process
    that hangs in a kernel or a collective. It writes to one file only, so where it will is said
    beforehand. The status of such a process is 1.
    """

    def __init__(self, run_dir: Path, seconds: float, *, rank: int = 0) -> None:
        """Not armed before the first `beat()`; `seconds` = 0 is off."""
        self.seconds = seconds
        self.path = run_dir / ("stall.txt" if rank == 0 else f"stall-rank{rank}.txt")
        self._file = self.path.open("a") if seconds > 0 else None
        if self._file is not None and self.path.stat().st_size:
            print(f"an earlier attempt hung: see {self.path}", file=sys.stderr, flush=True)
        if self._file is not None and rank == 0:
            print(
                f"a step of more than {seconds:g} s ends this process with status 1 and the "
                f"stacks of its threads in {self.path}",
                file=sys.stderr,
                flush=True,
            )

    def beat(self) -> None:
        """A step has ended: the next one has the whole time again."""
        if self._file is not None:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=self._file)

    def pause(self) -> None:
        """Stop watching until the next beat: before what may take its time."""
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Stop watching for good, and leave no empty file behind."""
        self.pause()
        if self._file is not None:
            self._file.close()
            self._file = None
            if not self.path.stat().st_size:
                self.path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


# Vital signs.


@torch.no_grad()
def vital_signs(
    generator: Generator | Upsampler,
    discriminator: Discriminator,
    z_BZ: Tensor,
    features: Features,
    real: Sequence[Tensor],
    small: tuple[Tensor, Tensor] | None = None,
) -> dict[str, float]:
    """Figures of the networks' inside on the first samples of a batch.

    `real` is the pyramid of real images, `small` the upsampler's input and its noise. The
    networks stay as they are, and no random number is drawn.
    """
    count = min(len(z_BZ), NUM_VITAL_IMAGES)
    z_BZ, rows = z_BZ[:count], _first_rows(features, count)
    low = None if small is None else (small[0][:count], small[1][:count])
    found: dict[str, float] = {}
    with _evaluating(generator, discriminator):
        entropies: list[Tensor] = []
        self_weights: list[Tensor] = []
        with _watching(generator, entropies, self_weights):
            _draw(generator, z_BZ, rows, low)
        _note(found, "health/selection_entropy", entropies)
        _note(found, "health/attention_self_g", self_weights)
        self_weights = []
        with _watching(discriminator, [], self_weights):
            discriminator([level[:count] for level in real], rows)
        _note(found, "health/attention_self_d", self_weights)
        if count > 1:
            # One prompt (and one small picture) with every latent.
            fixed = None if low is None else (_spread(low[0], count), _spread(low[1], count))
            images_BCHW = _draw(generator, z_BZ, _first_rows(features, 1, count), fixed)[0]
            found["health/z_effect"] = z_sensitivity(to_uint8(images_BCHW)[None])
    for name, network in (("g", generator), ("d", discriminator)):
        norms = torch._foreach_norm([p.detach().float() for p in network.parameters()])
        found[f"health/weight_norm_{name}"] = torch.stack(norms).norm().item()
    return found


def selection_entropy(select_BN: Tensor) -> Tensor:
    """−Σ_n p_n log p_n / log N, mean over the batch: 1 is an even choice, 0 always one filter."""
    entropy_B = torch.special.entr(full_precision(select_BN)).sum(1)
    return entropy_B.mean() / math.log(select_BN.shape[1])


def self_weight(attention: SelfAttention, x_BLC: Tensor, style_BS: Tensor | None) -> Tensor:
    """Mean weight that a position gives itself: 1 / Σ_m exp(−σ ‖k_l − k_m‖²).

    With tied keys its distance to itself is zero. The style token is among the M keys. One
    sample at a time, since weights of a whole batch would be the largest tensor of a run.
    """
    x_BLC = rms_normalize(x_BLC)
    tokens_BMC = x_BLC
    if attention.style_token is not None:
        assert style_BS is not None
        token_BC = rms_normalize(attention.style_token(style_BS)).expand(len(x_BLC), -1)
        tokens_BMC = torch.cat([x_BLC, token_BC[:, None].to(x_BLC.dtype)], dim=1)
    L = x_BLC.shape[1]
    means = []
    for keys_HMD in full_precision(split_heads(attention.to_qk(tokens_BMC), attention.head_width)):
        norms_HM = keys_HMD.square().sum(-1)
        products_HLM = keys_HMD[:, :L] @ keys_HMD.transpose(-1, -2)
        squares_HLM = norms_HM[:, :L, None] + norms_HM[:, None, :] - 2 * products_HLM
        weights_HLM = (-attention.scale * squares_HLM).softmax(-1)
        means.append(weights_HLM.diagonal(dim1=-2, dim2=-1).mean())
    return torch.stack(means).mean()


@contextlib.contextmanager
def _watching(
    network: nn.Module, entropies: list[Tensor], self_weights: list[Tensor]
) -> Iterator[None]:
    """While inside, every forward adds its layers' figures to the lists."""

    def watch_selection(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, AdaptiveConv)
        entropies.append(selection_entropy(module.read(inputs[1])[0]))

    def watch_attention(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, SelfAttention)
        self_weights.append(self_weight(module, inputs[0], inputs[1] if inputs[1:] else None))

    with contextlib.ExitStack() as hooks:
        for module in network.modules():
            if isinstance(module, AdaptiveConv) and module.to_select is not None:
                hooks.callback(module.register_forward_pre_hook(watch_selection).remove)
            elif isinstance(module, SelfAttention):
                hooks.callback(module.register_forward_pre_hook(watch_attention).remove)
        yield


@contextlib.contextmanager
def _evaluating(*networks: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and no compiled code; afterwards every module in the mode it had."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        with _uncompiled(*networks):
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def _uncompiled(*networks: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Compiled modules run as written: compiled code passes hooks by."""
    is_compiled = any(m._compiled_call_impl is not None for n in networks for m in n.modules())
    # Asked only where needed, since it imports the compiler.
    if is_compiled:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def _draw(
    generator: Generator | Upsampler,
    z_BZ: Tensor,
    features: Features,
    small: tuple[Tensor, Tensor] | None,
) -> list[Tensor]:
    if isinstance(generator, Upsampler):
        assert small is not None
        assert features is None or isinstance(features, TextFeatures)
        return generator(*small, z_BZ, features)
    return generator(z_BZ, features)


def _first_rows(features: Features, count: int, repeat: int = 1) -> Features:
    """The first rows of what the networks are conditioned on, each `repeat` times."""
    if features is None:
        return None
    if isinstance(features, Tensor):
        return features[:count].repeat_interleave(repeat, dim=0)
    return TextFeatures(*(part[:count].repeat_interleave(repeat, dim=0) for part in features))


def _spread(x_BCHW: Tensor, count: int) -> Tensor:
    """The first sample for all."""
    return x_BCHW[:1].expand(count, -1, -1, -1)


def _note(found: dict[str, float], name: str, figures: Sequence[Tensor]) -> None:
    """The mean over layers; nothing where the network has no such layer."""
    if figures:
        found[name] = torch.stack(list(figures)).mean().item()
