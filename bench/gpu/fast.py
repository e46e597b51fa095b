"""Part `fast`: images a second, memory and share of the peak of the paper's networks on this GPU.

Beside what `python -m bench predict` counted. Inputs lie on the device; times are medians of CUDA
events over whole steps; `host_ms` is what it takes to launch a step. R1 is timed apart and
amortised as training does.

Shape letters: B batch, C colour, H W image, N filters of a bank, O I maps.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.record import PACK, SIZE, Record, leave
from bench.gpu.right import step_inputs, step_tensors
from bench.predict import Count
from gigagan.config import TrainBaseConfig, TrainStage
from gigagan.config.presets import preset
from gigagan.models.discriminator import Discriminator
from gigagan.models.generator import Generator
from gigagan.models.layers import adaptive_conv2d, downsample, halve_by_mean, upsample
from gigagan.models.upsampler import Upsampler
from gigagan.training import acceleration, step
from gigagan.training.acceleration import autocast, uncompiled
from gigagan.training.distributed.world import World
from gigagan.training.run import adamw

ROUNDS = 5
BATCHES = (8, 16, 32, 48, 64)
TOKENS = 76
"""Of a caption, as the prediction counts them."""
SMALL_BATCHES = (16, 64, 256, 1024)
CONVOLUTIONS = ((16, 1024, 2), (32, 512, 4), (64, 256, 8))
"""Side, maps and filters of a bank: the largest of `paper_64`."""
H100_TFLOPS = 989.0


class Step:
    """Both networks of a configuration with their optimizers, and a batch on the device."""

    def __init__(
        self,
        config: TrainStage,
        batch: int,
        device: torch.device,
        *,
        channels_last: bool = False,
        compiled: bool = False,
        checkpointed: bool = False,
    ) -> None:
        torch.manual_seed(0)
        is_base = isinstance(config, TrainBaseConfig)
        self.config, self.batch, self.device = config, batch, device
        with device:
            self.g = Generator(config.generator) if is_base else Upsampler(config.upsampler)
            self.d = Discriminator(config.discriminator)
        if channels_last:
            acceleration.channels_last(self.g)
            acceleration.channels_last(self.d)
        if checkpointed:
            acceleration.checkpoint_activations(self.g)
            acceleration.checkpoint_activations(self.d)
        if compiled:
            acceleration.compile_parts(self.g)
            acceleration.compile_parts(self.d)
        self.opt_g, self.opt_d = (adamw(config, World(device=device), n) for n in (self.g, self.d))
        pairs = self.d.config.pairs
        weights = [1 / len(pairs)] * len(pairs)
        self.players = step.Players(self.g, self.d, weights, None, None)
        given = {
            name: x.to(device, torch.float32 if x.is_floating_point() else x.dtype)
            for name, x in step_tensors(config, self.g, batch, tokens=TOKENS).items()
        }
        self.inputs = step_inputs(given, levels=config.discriminator.levels)

    def plain(self) -> None:
        """A step of D and one of G, without R1."""
        settings: dict[str, Any] = {"auxiliary_strength": 0.0}
        with autocast("auto", self.device):
            fakes = step.synthesize(self.g, self.inputs)
        self.d.requires_grad_(True)
        self.opt_d.zero_grad(set_to_none=True)
        with autocast("auto", self.device):
            found = step.discriminator_loss(
                self.players, self.config, self.inputs, fakes, **settings
            )
        found.loss.backward()
        self.opt_d.step()
        self.d.requires_grad_(False)
        self.opt_g.zero_grad(set_to_none=True)
        with autocast("auto", self.device):
            found = step.generator_loss(self.players, self.config, self.inputs, fakes, **settings)
        found.loss.backward()
        self.opt_g.step()

    def r1(self) -> None:
        """The penalty alone."""
        self.d.requires_grad_(True)
        self.opt_d.zero_grad(set_to_none=True)
        with uncompiled(self.d):
            step.r1_loss(self.players, self.inputs).loss.backward()

    @torch.no_grad()
    def draw(self) -> None:
        """G's forward pass."""
        with autocast("auto", self.device):
            step.synthesize(self.g, self.inputs)


def timed(call: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> dict[str, Any]:
    """Median milliseconds on the device and of launching; peak memory in GB."""
    call()
    if device.type != "cuda":
        times = []
        for _ in range(max(rounds // 2, 1)):
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e3)
        return {"ms": statistics.median(times), "host_ms": None, "peak_gb": None}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    milliseconds, host = [], []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began = time.perf_counter()
        start.record()
        call()
        end.record()
        host.append((time.perf_counter() - began) * 1e3)
        torch.cuda.synchronize()
        milliseconds.append(start.elapsed_time(end))
    return {
        "ms": statistics.median(milliseconds),
        "host_ms": statistics.median(host),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def free() -> None:
    """Give back what a measurement held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def whole_step(
    config: TrainStage, batch: int, device: torch.device, count: Count, **how: bool
) -> dict[str, object]:
    """Times of a step and of R1, images a second, share of the peak, memory beside the count's."""
    made = Step(config, batch, device, **how)
    try:
        found = timed(made.plain, device)
        r1 = timed(made.r1, device, rounds=2)
        every = config.optimizer.r1_every
        total_ms = found["ms"] + r1["ms"] / every
        gmac = count.gmac + (count.forward_gmac if how.get("checkpointed") else 0.0)
        flops = 2e9 * (gmac + count.r1_gmac / every) * batch
        per_image = count.checkpointed_gb if how.get("checkpointed") else count.kept_gb
        return {
            "batch": batch,
            **found,
            "r1_ms": r1["ms"],
            "r1_peak_gb": r1["peak_gb"],
            "images_per_second": batch / total_ms * 1e3,
            "tflops": flops / total_ms * 1e3 / 1e12,
            "share_of_h100_peak": flops / total_ms * 1e3 / 1e12 / H100_TFLOPS,
            "counted_gb": count.constant_gb + batch * per_image,
        }
    finally:
        del made
        free()


def largest(
    record: Record,
    name: str,
    config: TrainStage,
    count: Count,
    device: torch.device,
    batches: tuple[int, ...],
) -> int:
    """Steps at rising batches until memory or time is out; the largest that went well."""
    best = 0
    for batch in batches:
        call = functools.partial(whole_step, config, batch, device, count)
        if not record.attempt(f"{name}_step_{batch}", call, needs=10):
            free()
            break
        best = batch
    for how in ("channels_last", "checkpointed"):
        if best:
            call = functools.partial(whole_step, config, best, device, count, **{how: True})
            record.attempt(f"{name}_step_{best}_{how}", call, needs=10)
            free()
    return best


def forward(config: TrainStage, batch: int, device: torch.device) -> dict[str, object]:
    """G alone, drawing."""
    made = Step(config, batch, device)
    try:
        found = timed(made.draw, device)
        return {"batch": batch, **found, "images_per_second": batch / found["ms"] * 1e3}
    finally:
        del made
        free()


def convolution(
    side: int, maps: int, bank: int, batch: int, device: torch.device
) -> dict[str, Any]:
    """Ways to convolve every sample with its own mixture of filters; forward and backward."""
    torch.manual_seed(0)
    with device:
        weight = torch.randn(bank, maps, maps, 3, 3, requires_grad=True)
        x = torch.randn(batch, maps, side, side, dtype=torch.bfloat16, requires_grad=True)
        select = torch.randn(batch, bank).softmax(1).requires_grad_()
        scale = torch.randn(batch, maps, requires_grad=True)

    def grouped(x: Tensor = x) -> Tensor:
        return adaptive_conv2d(x, weight, select, scale)

    def dense() -> Tensor:  # all filters on every sample, outputs mixed
        scaled = x * scale[:, :, None, None].to(x.dtype)
        every = F.conv2d(scaled, weight.flatten(0, 1).to(x.dtype), padding=1)
        return torch.einsum("bnohw,bn->bohw", every.unflatten(1, (bank, maps)), select.to(x.dtype))

    def unfolded() -> Tensor:
        scaled = x * scale[:, :, None, None].to(x.dtype)
        columns = F.unfold(scaled, 3, padding=1)
        mixed = (select @ weight.flatten(1)).to(x.dtype).view(batch, maps, maps * 9)
        return (mixed @ columns).view(batch, maps, side, side)

    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    ways: dict[str, Callable[[], Tensor]] = {
        "grouped": grouped,
        "grouped_channels_last": lambda: grouped(last),
        "dense_then_mixed": dense,
        "unfold_and_multiply": unfolded,
    }
    flops = 3 * 2 * batch * side * side * maps * maps * 9  # what is needed, forward and backward
    found: dict[str, Any] = {}
    for name, call in ways.items():

        def both(call: Callable[[], Tensor] = call) -> None:
            with autocast("auto", device):
                out = call()
            out.float().square().sum().backward()

        try:
            times = timed(both, device, rounds=3)
        except torch.OutOfMemoryError:
            found[name] = "out of memory"
        else:
            found[name] = {**times, "tflops": flops / times["ms"] * 1e3 / 1e12}
        free()
    return found


def resampling(device: torch.device, side: int = 64, maps: int = 256) -> dict[str, Any]:
    """Doubling and halving, forward and backward: products as we take them, and `interpolate`."""
    x = torch.randn(16, maps, side, side, device=device, dtype=torch.bfloat16, requires_grad=True)
    interpolate = functools.partial(F.interpolate, mode="bilinear", align_corners=False)
    ways: Mapping[str, Callable[[Tensor], Tensor]] = {
        "upsample": upsample,
        "upsample_interpolate": lambda x: interpolate(x, scale_factor=2.0),
        "downsample": downsample,
        "downsample_interpolate": lambda x: interpolate(
            x if x.is_cuda else x.float(), scale_factor=0.5, antialias=True
        ),
        "halve_by_mean": halve_by_mean,
    }
    return {
        name: timed(lambda call=call: call(x).float().square().sum().backward(), device, 3)["ms"]
        for name, call in ways.items()
    }


def top_kernels(config: TrainStage, batch: int, device: torch.device) -> dict[str, object]:
    """What a step spends its time on, and how many launches it has."""
    from torch.profiler import ProfilerActivity, profile

    made = Step(config, batch, device)
    try:
        made.plain()
        kinds = [ProfilerActivity.CPU]
        kinds += [ProfilerActivity.CUDA] if device.type == "cuda" else []
        with profile(activities=kinds) as seen:
            made.plain()
            if device.type == "cuda":
                torch.cuda.synchronize()
        events = seen.key_averages()

        def own(event: Any) -> float:
            return float(getattr(event, "self_device_time_total", 0) or event.self_cpu_time_total)

        ranked = sorted(events, key=own, reverse=True)[:15]
        launches = sum(e.count for e in events if "LaunchKernel" in e.key)
        return {
            "batch": batch,
            "launches": launches,
            "top_ms": {e.key[:90]: round(own(e) / 1e3, 2) for e in ranked},
        }
    finally:
        del made
        free()


def main() -> int:
    """All measurements, the most wanted first; 1 if one failed but for want of time or memory."""
    record = Record.of_environment("fast")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_small = os.environ[SIZE] == "small"
    acceleration.prepare(
        TrainBaseConfig().system.model_copy(update={"deterministic": False}), device
    )
    paper: TrainStage = TrainBaseConfig() if is_small else preset("paper_64")
    up: TrainStage = preset("paper_64_to_512")
    batches = (2, 4) if is_small else BATCHES
    described = json.loads((Path(os.environ[PACK]) / "pack.json").read_text())["counts"]
    counts = {name: Count(**found) for name, found in described.items()}
    count = counts["small_32" if is_small else "paper_64"]
    best = largest(record, "paper_64", paper, count, device, batches)
    record.attempt("paper_64_kernels", lambda: top_kernels(paper, max(best // 2, 1), device))
    for side, maps, bank in CONVOLUTIONS:
        maps, batch = (8, 2) if is_small else (maps, 16)
        call = functools.partial(convolution, side, maps, bank, batch, device)
        record.attempt(f"convolution_{side}px_{maps}_maps_bank_{bank}", call, needs=5)
        free()
    record.attempt("resampling", lambda: resampling(device, maps=8 if is_small else 256), needs=3)
    for batch in SMALL_BATCHES[: 1 if is_small else None]:
        config = TrainBaseConfig()
        call = functools.partial(whole_step, config, batch, device, counts["small_32"])
        record.attempt(f"small_32_step_{batch}", call, needs=4)
        free()
    if not is_small:
        for batch in (1, 4, 8):
            call = functools.partial(forward, up, batch, device)
            record.attempt(f"paper_64_to_512_forward_{batch}", call, needs=8)
    # Compiling takes as long as it takes, perhaps all that is left.
    call = functools.partial(whole_step, paper, max(best, 1), device, count, compiled=True)
    record.attempt(f"paper_64_step_{best}_compiled", call, needs=30)
    return 0


if __name__ == "__main__":
    leave(main())
