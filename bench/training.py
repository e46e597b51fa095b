"""A training step, ours against gigagan-pytorch: images per second, memory, and where time goes.

Measured as `bench.model` measures; a step is one update of D and one of G with their optimizers.

- `gigagan` reads 20 tokens of text per image, and its discriminator judges mismatched captions too;
  `gigagan.unconditional` has the same widths and neither text, cross-attention nor text predictors.
  gigagan-pytorch runs unconditionally.
- Ours draws its images once for both updates, gigagan-pytorch twice. Gradient penalties are then
  added at each one's own interval.
- `profile` runs the training loop itself and times what it calls, each without what it calls in
  turn. The losses through frozen image encoders are left out, and features of text are made up, as
  training reads them from memory.

Shape letters: B batch, Z latent, C colour, H W image.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import model, rivals
from bench.model import BATCHES, CONFIGS, OURS, median
from bench.rivals import Calls, Parts
from data.shards.loader import ShardLoader
from gigagan import losses
from gigagan.config import TrainBaseConfig
from gigagan.config.presets import preset
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.layers import pyramid
from gigagan.training import loop, step
from gigagan.training.captions import CaptionFeatures
from gigagan.training.distributed.world import World
from gigagan.training.ema import Ema
from gigagan.training.inputs import Batch, Inputs, Loader
from gigagan.training.logs import Log
from gigagan.training.probes import Look
from gigagan.training.run import Run

WITHOUT_TEXT = f"{OURS}.unconditional"
CANDIDATES = (OURS, WITHOUT_TEXT, "gigagan_pytorch", "gigagan_pytorch.alike")
CONVOLUTION, PRODUCT = "one large convolution", "one large matrix product"
PENALTY_EVERY = {OURS: CONFIGS[32].optimizer.r1_every, "gigagan_pytorch": 4}
STEPS = ("train-32", "train-64")
TASKS = {"train": STEPS, "profile": ("profile",)}
PROFILED = "small_32"


# What is measured of ours.


def train(side: int, batch: int) -> tuple[Parts, Calls]:
    """What the training loop does between two batches."""
    config = CONFIGS[side]
    g, d = Generator(config.generator), Discriminator(config.discriminator)
    levels, num_predictions = d.config.levels, len(d.config.pairs)
    players = step.Players(g, d, [1 / num_predictions] * num_predictions, None, None)
    inputs = Inputs(
        real=pyramid(torch.rand(batch, 3, side, side), levels),
        captions=[""] * batch,
        text=model.features(batch),
        z_BZ=torch.randn(batch, g.config.latent_dim),
        other_text=model.features(batch),
        has_other_B=(True,) * batch,
    )
    opt_g, opt_d = (torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in (g, d))

    def update(*, penalize: bool) -> None:
        fakes = step.synthesize(g, inputs)
        d.requires_grad_(True)
        opt_d.zero_grad(set_to_none=True)
        settings: dict[str, Any] = {"auxiliary_strength": 0.0}
        step.discriminator_loss(players, config, inputs, fakes, **settings).loss.backward()
        if penalize:
            step.r1_loss(players, inputs).loss.backward()
        nn.utils.clip_grad_norm_(d.parameters(), config.optimizer.max_grad_norm)
        opt_d.step()
        d.requires_grad_(False)
        opt_g.zero_grad(set_to_none=True)
        step.generator_loss(players, config, inputs, fakes, **settings).loss.backward()
        nn.utils.clip_grad_norm_(g.parameters(), config.optimizer.max_grad_norm)
        opt_g.step()

    calls: Calls = {
        "step": lambda: update(penalize=False),
        "step with penalty": lambda: update(penalize=True),
    }
    return {"G": g, "D": d}, calls


def reference() -> Calls:
    """oneDNN's own rates: one large convolution and one large product, forward and backward."""
    x_BCHW = torch.randn(16, 256, 32, 32, requires_grad=True)
    filters = torch.randn(256, 256, 3, 3, requires_grad=True)
    a, b = (torch.randn(2048, 2048, requires_grad=True) for _ in range(2))
    return {
        CONVOLUTION: lambda: F.conv2d(x_BCHW, filters, padding=1).sum().backward(),
        PRODUCT: lambda: (a @ b).sum().backward(),
    }


def unconditional(config: TrainBaseConfig) -> TrainBaseConfig:
    """The same networks without text."""
    tree = config.model_dump()
    tree["generator"]["text"] = tree["discriminator"]["text"] = None
    tree["loss"] |= {"matching": 0.0, "contrastive": 0.0, "generator_matching": 0.0}
    return TrainBaseConfig.model_validate(tree)


def train_unconditional(side: int, batch: int) -> tuple[Parts, Calls]:
    """The same step without captions: `gigagan.training.step` has conditional networks only."""
    config = unconditional(CONFIGS[side])
    g, d = Generator(config.generator), Discriminator(config.discriminator)
    levels = d.config.levels
    weights = [1 / len(d.config.pairs)] * len(d.config.pairs)
    real = pyramid(torch.rand(batch, 3, side, side), levels)
    z_BZ = torch.randn(batch, g.config.latent_dim)
    opt_g, opt_d = (torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in (g, d))

    def update(*, penalize: bool) -> None:
        fakes = g(z_BZ, None)
        d.requires_grad_(True)
        opt_d.zero_grad(set_to_none=True)
        both = [torch.cat([x, y.detach()]) for x, y in zip(real, fakes[:levels], strict=True)]
        logits = d.predict(d.trunk(both, num_sets=2), None)
        loss = losses.as_real([x[:batch] for x in logits], weights)
        (loss + losses.as_fake([x[batch:] for x in logits], weights)).backward()
        if penalize:
            inputs = [x.detach().requires_grad_() for x in real]
            logits = d(inputs, None, double_backward=True)
            losses.r1_penalty(logits, weights, inputs).backward()
        nn.utils.clip_grad_norm_(d.parameters(), config.optimizer.max_grad_norm)
        opt_d.step()
        d.requires_grad_(False)
        opt_g.zero_grad(set_to_none=True)
        losses.as_real(d(fakes[:levels], None), weights).backward()
        nn.utils.clip_grad_norm_(g.parameters(), config.optimizer.max_grad_norm)
        opt_g.step()

    calls: Calls = {
        "step": lambda: update(penalize=False),
        "step with penalty": lambda: update(penalize=True),
    }
    return {"G": g, "D": d}, calls


# A measuring process.


def child(candidate: str, task: str) -> dict[str, Any]:
    """One measurement; oneDNN's own rates are measured beside it, in the same process."""
    side = int(task.split("-")[1])
    sizes = side, BATCHES[side]
    ours = {OURS: train, WITHOUT_TEXT: train_unconditional}

    def build() -> tuple[Parts, Calls]:
        of_candidate = ours.get(candidate) or functools.partial(rivals.train, candidate)
        parts, calls = of_candidate(*sizes)
        return parts, calls | (reference() if candidate == OURS else {})

    return model.measured(candidate, build)


# Where the time of a step goes.


class Stopwatch:
    """Seconds of named calls, each without the timed calls within it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time a block; "backward" takes the name of the block around it in front."""
        if name == "backward" and self._open:
            name = f"{self._open[-1][0]}, backward"
        started, within = time.perf_counter(), len(self._open)
        self._open.append((name, 0.0))
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            _, inner = self._open.pop()
            self.seconds[name] += seconds - inner
            if within:
                outer, so_far = self._open[-1]
                self._open[-1] = (outer, so_far + seconds)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @functools.wraps(function)
        def call(*args: Any, **settings: Any) -> Any:
            with self.time(name):
                return function(*args, **settings)

        return call


class _Batch(NamedTuple):
    images_BCHW: Tensor
    captions: list[str]
    planned_captions: list[str]


class Noise:
    """In place of shards: a rank's part of the same batch again and again."""

    def __init__(self, side: int, batch: int, world: World) -> None:
        self._rows = world.rows(batch)
        self.image_BCHW = torch.randint(0, 256, (len(self._rows), 3, side, side), dtype=torch.uint8)
        self.known = [f"caption {i}" for i in range(batch)]

    def batches(self, images_seen: int = 0) -> Iterator[_Batch]:
        own = [self.known[row] for row in self._rows]
        return itertools.repeat(_Batch(self.image_BCHW, own, self.known))

    def captions_between(self, start: int, stop: int) -> list[str]:
        return [self.known[i % len(self.known)] for i in range(start, stop)]


class Encoder:
    """In place of the frozen text encoder: captions of 20 tokens."""

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        return model.features(len(captions))


class NoProbe:
    def look(self, generator: nn.Module) -> Look:
        raise AssertionError("a profile ends before the first look")


class _Enough(Exception):  # noqa: N818 – not an error
    """All steps of a profile are done."""


class _Timed:
    """A loader that ends after some steps; the clock starts after the first."""

    def __init__(self, loader: Loader, watch: Stopwatch, num_steps: int) -> None:
        self.loader, self.watch, self.num_steps = loader, watch, num_steps
        self.captions_between = loader.captions_between
        self.total = 0.0

    def batches(self, images_seen: int = 0) -> Iterator[Batch]:
        stream, started = self.loader.batches(images_seen), 0.0
        for number in itertools.count():
            if number == 1:
                self.watch.seconds.clear()
                started = time.perf_counter()
            if number > self.num_steps:
                self.total = time.perf_counter() - started
                raise _Enough
            with self.watch.time("loader"):
                batch = next(stream)
            yield batch


def endless(name: str) -> TrainBaseConfig:
    """A preset that never comes to a tick, a checkpoint or its end."""
    config, never = preset(name), 1 << 40
    assert isinstance(config, TrainBaseConfig)
    changes = {"total_images": never, "sample_images": never, "checkpoint_images": never}
    return config.model_copy(update=changes)


def players(config: TrainBaseConfig) -> step.Players:
    """New networks, the same in every process, without frozen ones."""
    torch.manual_seed(0)
    g, d = Generator(config.generator), Discriminator(config.discriminator)
    num_predictions = len(d.config.pairs)
    return step.Players(g, d, [1 / num_predictions] * num_predictions, None, None)


def profile(shards: Path | None = None, num_steps: int = 16, name: str = PROFILED) -> None:
    """Shares of a step's time in the training loop, R1 at its own interval."""
    config = endless(name)
    loader: Loader = Noise(config.generator.resolution, config.batch_size, World())
    if shards is not None:
        loader = ShardLoader(shards, batch_size=config.batch_size, seed=0)
    watch = Stopwatch()
    timed = _Timed(loader, watch, num_steps)
    captions = CaptionFeatures(Encoder(), torch.device("cpu"))  # type: ignore[arg-type]
    with contextlib.ExitStack() as stack, contextlib.suppress(_Enough):
        for owner, attribute, shown in (
            (loop, "draw", "inputs: pyramid, captions, noise"),
            (step, "synthesize", "G, forward"),
            (step, "discriminator_loss", "D, forward and losses"),
            (step, "r1_loss", "R1"),
            (step, "generator_loss", "loss of G through D"),
            (Tensor, "backward", "backward"),
            (Run, "judge", "clipping and the guard"),
            (torch.optim.AdamW, "step", "optimizers"),
            (Ema, "update", "EMA"),
            (Log, "add", "logging"),
            (Log, "line", "logging"),
        ):
            function = watch.timed(shown, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, function))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log = Log(folder, config.total_images, is_main=False)
        loop.train(config, players(config), captions, timed, NoProbe(), folder, log, World())
    source = "made-up pictures" if shards is None else str(shards)
    print(
        f"\n{name}, batch {config.batch_size}, {num_steps} steps on {source}, R1 every "
        f"{config.optimizer.r1_every}: {timed.total / num_steps * 1e3:.0f} ms a step, "
        f"{num_steps * config.batch_size / timed.total:.1f} images/s"
    )
    rest = timed.total - sum(watch.seconds.values())
    for part, seconds in [*watch.seconds.items(), ("everything else", rest)]:
        print(f"  {part:34}{seconds / num_steps * 1e3:9.1f} ms {seconds / timed.total:7.1%}")


# The process that starts the others and prints.


def main(
    rounds: int = 3,
    what: Collection[str] = tuple(TASKS),
    candidates: Collection[str] = CANDIDATES,
    shards: Path | None = None,
    num_steps: int = 16,
) -> None:
    """A training step against gigagan-pytorch, and where its time goes."""
    wanted = list(itertools.chain.from_iterable(TASKS.get(kind, (kind,)) for kind in what))
    for task in wanted:
        if task == "profile":
            profile(shards, num_steps)
            continue
        found = model.compete(__name__, task, CANDIDATES, {OURS, *candidates}, rounds)
        side = int(task.split("-")[1])
        batch = BATCHES[side]
        model.show(f"a training step, {side} px, batch {batch}", found, batch)
        _show_amortised(found, batch)
        _show_shares(found)
        sys.stdout.flush()


def _show_amortised(found: Mapping[str, list[dict[str, Any]]], batch: int) -> None:
    """A step with each one's penalty at its own interval."""
    print("  step, penalty amortised")
    ours = None
    for name, runs in found.items():
        plain, penalized = (
            median(run["rows"][row]["ms"] for run in runs) for row in ("step", "step with penalty")
        )
        every = PENALTY_EVERY[model.package(name)]
        ms = plain + (penalized - plain) / every
        ours = ours or ms
        print(
            f"    {name:22} {ms:8.1f} ms (×{ms / ours:.2f}) {batch / ms * 1e3:7.1f} images/s, "
            f"every {every} steps"
        )


def _show_shares(found: Mapping[str, list[dict[str, Any]]]) -> None:
    """Each one's multiply-adds per second in a whole step over those of one large convolution."""

    def rate(name: str, row: str) -> float:
        seconds = median(run["rows"][row]["ms"] for run in found[name]) / 1e3
        return float(found[name][0]["rows"][row]["gmac"]) / seconds

    convolution = rate(OURS, CONVOLUTION)
    print(
        f"  share of oneDNN's convolution rate ({convolution:.1f} GMAC/s; matrix product "
        f"{rate(OURS, PRODUCT):.1f})"
    )
    for name in found:
        print(
            f"    {name:22} {rate(name, 'step'):6.1f} GMAC/s {rate(name, 'step') / convolution:.0%}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.training")
    parser.add_argument("--candidate", required=True, choices=CANDIDATES)
    parser.add_argument("--task", required=True, choices=STEPS)
    arguments = parser.parse_args()
    print(json.dumps(child(arguments.candidate, arguments.task)))
