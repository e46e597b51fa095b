"""Our networks against gigagan-pytorch and aura-sr: passes, sampling, upsampling; time and memory.

Each measurement runs in a process of its own, which prints a line of JSON; candidates take turns
and never run beside each other. What is compared:

- Parameters agree within 6 %, our text branch not counted; `rivals` says how theirs are built.
- Ours reads 20 tokens of text per image; theirs run unconditionally.
- Times are medians. A call during which other processes had a processor for more than a tenth of
  the time is thrown away, for a minute at most.
- Memory is the peak of the process so far; what of it is new since the imports is shown beside it.

Shape letters: B batch, L tokens, D features, Z latent, C colour, H W image.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import flop_counter

from bench import rivals
from bench.rivals import Calls, Parts, passes, without_gradients
from gigagan.config import (
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    TrainBaseConfig,
    UpsamplerConfig,
)
from gigagan.models.baking import bake
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.layers import pyramid
from gigagan.models.upsampler import Upsampler

BATCHES = {32: 16, 64: 8}
CONFIGS = {
    32: TrainBaseConfig(
        generator=GeneratorConfig(mapping_layers=5),
        discriminator=DiscriminatorConfig(blocks=(1, 1, 2, 3), head_layers=3),
    ),
    64: TrainBaseConfig(
        generator=GeneratorConfig(
            channels=(256, 256, 128, 64, 32),
            kernels=(2, 2, 3, 4, 4),
            blocks=(1, 1, 1, 1, 1),
            attention=(0, 1, 1, 0, 0),
        ),
        discriminator=DiscriminatorConfig(
            channels=(32, 64, 128, 256, 256),
            levels=4,
            blocks=(1, 2, 2, 2, 3),
            attention=(0, 0, 1, 1, 0),
            head_layers=4,
        ),
        loss=LossConfig(level_weights=(0.25, 0.25, 0.25, 0.25)),
    ),
}
# At every resolution at least as wide as AuraSR at dim=16, and as many parameters.
UPSAMPLER = UpsamplerConfig(
    input_resolution=64,
    down_channels=(32, 64, 128, 512),
    up_channels=(512, 256, 128, 64, 32, 16),
    kernels=(1, 1, 2, 4, 4, 4),
    blocks=(5, 3, 2, 2, 2, 2),
    attention=(2, 1, 1, 0, 0, 0),
    latent_dim=128,
    style_dim=512,
    mapping_layers=4,
)
OURS = "gigagan"
PACKAGES = {"gigagan_pytorch": "gigagan-pytorch", "aura_sr": "aura-sr"}
BASES = (OURS, "gigagan_pytorch", "gigagan_pytorch.alike")
UPSAMPLERS = (OURS, "aura_sr")
SECONDS = 20  # of measuring in a process, about
SLOW_SECONDS = 120  # of a process, after which its candidate is not measured again
GIVE_UP_SECONDS = 60  # of waiting for an undisturbed call
CANDIDATES = tuple(dict.fromkeys(BASES + UPSAMPLERS))
TASKS = {
    "networks": ("networks-32", "networks-64"),
    "sample": ("sample-32", "sample-64"),
    "upsample": ("upsample-1", "upsample-4"),
}


# What is measured of ours.


def features(batch: int) -> TextFeatures:
    """Captions of 20 tokens."""
    mask_BL = torch.ones(batch, 20, dtype=torch.bool)
    return TextFeatures(torch.randn(batch, 20, 384), mask_BL, torch.randn(batch, 384))


def networks(side: int, batch: int) -> tuple[Parts, Calls]:
    """Each network forward, and forward and backward."""
    config = CONFIGS[side]
    g, d = Generator(config.generator), Discriminator(config.discriminator)
    z_BZ, text = torch.randn(batch, config.generator.latent_dim), features(batch)
    real = pyramid(torch.rand(batch, 3, side, side), config.discriminator.levels)
    return {"G": g, "D": d}, passes(
        lambda: g(z_BZ, text)[0].sum(),
        lambda: torch.stack([x.sum() for x in d(real, text)]).sum(),
    )


def sample(side: int, batch: int) -> tuple[Parts, Calls]:
    """Images from latents and text."""
    g = Generator(CONFIGS[side].generator).eval()
    z_BZ, text = torch.randn(batch, g.config.latent_dim), features(batch)
    return {"G": g}, {"sample": lambda: without_gradients(lambda: g(z_BZ, text))}


def upsample(batch: int) -> tuple[Parts, Calls]:
    """The upsampler on tiles."""
    network = Upsampler(UPSAMPLER).eval()
    small, noise = torch.rand(batch, 3, 64, 64), torch.randn(batch, 3, 64, 64)
    z_BZ, text = torch.randn(batch, network.config.latent_dim), features(batch)
    with torch.no_grad():
        read = network.read(TextFeatures(*(part[:1] for part in text)))
        baked = bake(network, network.style(z_BZ[:1], read), read)
    return {"upsampler": network}, {
        "upsample": lambda: without_gradients(lambda: network(small, noise, z_BZ, text)),
        "upsample, baked": lambda: without_gradients(lambda: baked(small, noise)),
    }


# A measuring process.


def child(candidate: str, task: str) -> dict[str, Any]:
    """Measure one task of this file in this process."""
    kind, size = task.split("-")
    sizes = (int(size),) if kind == "upsample" else (int(size), BATCHES[int(size)])
    if candidate == OURS:
        return measured(candidate, lambda: getattr(sys.modules[__name__], kind)(*sizes))
    return measured(candidate, lambda: getattr(rivals, kind)(candidate, *sizes))


def measured(
    candidate: str, build: Callable[[], tuple[Parts, Calls]], with_gmac: bool = True
) -> dict[str, Any]:
    """What `build` gives, measured; what is imported does not count as memory of the networks."""
    importlib.import_module(package(candidate))
    torch.manual_seed(0)
    before = peak_mb()
    parts, calls = build()
    return {
        "before": before,
        "parameters": {name: _parameters(part) for name, part in parts.items()},
        "rows": measure(calls, with_gmac),
    }


def measure(calls: Calls, with_gmac: bool = True) -> dict[str, dict[str, Any]]:
    """Times in ms, taken in turns; peak memory in MB after the calls so far; 10⁹ multiply-adds.

    Counting multiply-adds takes one more call of each.
    """
    rows: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    for name, call in calls.items():
        call()
        rows[name] = {"ms": [], "mb": peak_mb()}
    warm_seconds = time.perf_counter() - started
    for _ in range(min(max(round(SECONDS / warm_seconds), 1), 20)):
        for name, call in calls.items():
            rows[name]["ms"].append(_undisturbed_ms(call))
    if with_gmac:
        for name, call in calls.items():
            rows[name]["gmac"] = gmac(call)
    return rows


def _undisturbed_ms(call: Callable[[], object]) -> float:
    give_up = time.perf_counter() + GIVE_UP_SECONDS
    while True:
        started, foreign = time.perf_counter(), foreign_seconds()
        call()
        seconds = time.perf_counter() - started
        is_disturbed = foreign_seconds() - foreign > 0.1 * seconds + 0.02
        if not is_disturbed or time.perf_counter() > give_up:
            return seconds * 1e3


def peak_mb() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def foreign_seconds() -> float:
    """Processor time that went to others than this process; always 0 where there is no /proc."""
    counts = Path("/proc/stat")
    if not counts.is_file():
        return 0.0
    user, nice, system, _idle, _iowait, *rest = map(int, counts.read_text().split()[1:9])
    busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


class _NoModules(contextlib.nullcontext[None]):
    """In place of torch's module tracker, which fails on networks that run without gradients."""

    parents = ("Global",)


def gmac(call: Callable[[], object]) -> float:
    """10⁹ multiply-adds in convolutions, products and attention."""
    aten = torch.ops.aten
    formulas = {
        aten.convolution_backward: _convolution_backward,
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
            flop_counter.sdpa_flop_count(q, k, v)
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            flop_counter.sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=formulas)
    counter.mod_tracker = _NoModules()
    with counter:
        call()
    return counter.get_total_flops() / 2e9


def _convolution_backward(
    gradient: Sequence[int], x: Sequence[int], filters: Sequence[int], *args: Any, **_: Any
) -> int:
    """Each wanted gradient costs what the forward does; torch's own formula overcounts groups."""
    forward = 2 * gradient[0] * math.prod(gradient[2:]) * math.prod(filters)
    return forward * sum(args[7][:2])


def _parameters(network: nn.Module) -> int:
    """Number of parameters, those of our text branch left out."""
    return sum(p.numel() for n, p in network.named_parameters() if not n.startswith("text."))


def package(candidate: str) -> str:
    """Name of the package that a candidate comes from."""
    return candidate.split(".")[0]


# The process that starts the others and prints.


def main(
    rounds: int = 3, what: Iterable[str] = tuple(TASKS), candidates: Sequence[str] = CANDIDATES
) -> None:
    """Networks, sampling and upsampling against gigagan-pytorch and aura-sr."""
    for kind in what:
        of_kind = UPSAMPLERS if kind.startswith("upsample") else BASES
        for task in TASKS.get(kind, (kind,)):
            title, batch = _title(task)
            show(title, compete(__name__, task, of_kind, {OURS, *candidates}, rounds), batch)


def compete(
    module: str, task: str, order: Sequence[str], wanted: Collection[str], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Measure the candidates whose package is there in turns, each time in a new process."""
    is_missing = {name: importlib.util.find_spec(name) is None for name in PACKAGES}
    present = [n for n in order if n in wanted and not is_missing.get(package(n), False)]
    for name in sorted({package(n) for n in order if n in wanted and n not in present}):
        print(
            f"{PACKAGES[name]} not installed: pip install --no-deps -r bench/requirements.txt",
            flush=True,
        )
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in present}
    left = list(present)
    for _ in range(rounds):
        for name in list(left):
            started = time.perf_counter()
            found[name].append(_run(module, name, task))
            if time.perf_counter() - started > SLOW_SECONDS:
                left.remove(name)
    return found


def _run(module: str, candidate: str, task: str) -> dict[str, Any]:
    """Measure in a new process; what it says on the way is shown only if it fails."""
    command = [sys.executable, "-m", module, "--candidate", candidate, "--task", task]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _title(task: str) -> tuple[str, int]:
    """What is printed above a task's rows, and its batch."""
    kind, size = task.split("-")
    batch = int(size) if kind == "upsample" else BATCHES[int(size)]
    return (
        f"{kind}, batch {batch}" if kind == "upsample" else f"{kind}, {size} px, batch {batch}",
        batch,
    )


def show(title: str, found: Mapping[str, list[dict[str, Any]]], batch: int) -> None:
    """Medians, and in brackets how many times those of the first candidate, which is ours."""
    print(f"\n{title}")
    for name, runs in found.items():
        counts = (f"{part} {n / 1e6:.2f} M" for part, n in runs[0]["parameters"].items())
        print(f"  {name}: {', '.join(counts)} parameters")
    for row in next(iter(found.values()))[0]["rows"]:
        print(f"  {row}")
        ours = None
        measured = {name: runs for name, runs in found.items() if row in runs[0]["rows"]}
        for name, runs in measured.items():
            ms, mb = (median(run["rows"][row][key] for run in runs) for key in ("ms", "mb"))
            new_mb = mb - median(run["before"] for run in runs)
            gmac = runs[0]["rows"][row]["gmac"]
            ours = ours or (ms, mb, new_mb)
            time_ratio, mb_ratio, new_ratio = (
                f"(×{x / y:.2f})" for x, y in zip((ms, mb, new_mb), ours, strict=True)
            )
            print(
                f"    {name:22}{ms:9.1f} ms {time_ratio:9}{batch / ms * 1e3:7.1f} images/s"
                f"{gmac:8.2f} GMAC {gmac / ms * 1e3:5.1f}/s"
                f"  peak {mb:5.0f} MB {mb_ratio:8} new {new_mb:5.0f} MB {new_ratio}"
            )
    sys.stdout.flush()


def median(values: Iterable[float | Sequence[float]]) -> float:
    """The median of all numbers, those in lists too."""
    flat = (x for value in values for x in (value if isinstance(value, list) else [value]))
    return float(statistics.median(flat))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.model")
    parser.add_argument("--candidate", required=True, choices=CANDIDATES)
    parser.add_argument("--task", required=True)
    arguments = parser.parse_args()
    print(json.dumps(child(arguments.candidate, arguments.task)))
