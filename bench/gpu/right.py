"""Part `right`: is what the GPU computes what the CPU computes in float64?

Forward passes, gradients, R1's double backward, whole steps; in float32 with and without TF32 and
in bf16 autocast. Then: two runs of one step bit for bit, a resumed training bit for bit, which
attention kernels are taken, and whether a step ever waits for the device.

Shape letters: B batch, C colour, H W image.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu import emoji, learn
from bench.gpu.record import PACK, SIZE, Record, leave
from gigagan import losses
from gigagan.config import SystemConfig, TrainBaseConfig, TrainStage, TrainUpsamplerConfig
from gigagan.models import layers
from gigagan.models.attention import AttentionBlock, l2_attention
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.layers import AdaptiveConv, DownBlock
from gigagan.models.upsampler import Upsampler
from gigagan.training import acceleration, loop, step
from gigagan.training.acceleration import autocast
from gigagan.training.captions import CaptionFeatures
from gigagan.training.inputs import Inputs

B, TOKENS = 4, 12
LIMITS = {"fp32": 1e-3, "tf32": 3e-2, "bf16": 2.5e-1}
"""‖Δ‖ / ‖reference‖ beyond which a check fails: rounding of each kind, and its amplification by
the depth of a network and by a second derivative."""


class Subject(NamedTuple):
    """Something with parameters and inputs whose loss is differentiated."""

    module: nn.Module
    inputs: tuple[Any, ...]
    call: Callable[..., Tensor]
    """Module and inputs → a scalar."""


def subjects() -> dict[str, Callable[[], Subject]]:
    """By name; each is made in float64 on the CPU from its own seed."""
    base, up = TrainBaseConfig(), TrainUpsamplerConfig()
    found: dict[str, Callable[[], Subject]] = {
        "upsample": lambda: _tensor(layers.upsample, 4, 8, 16, 16),
        "downsample": lambda: _tensor(layers.downsample, 4, 8, 16, 16),
        "l2_attention": lambda: _attention(double_backward=False),
        "l2_attention_explicit": lambda: _attention(double_backward=True),
        "adaptive_conv_1": lambda: _adaptive(1),
        "adaptive_conv_4": lambda: _adaptive(4),
        "down_block": lambda: _plain(DownBlock(16, 24, gain=0.4), 4, 16, 16, 16),
        "attention_block": _attention_block,
        "regression": lambda: _tensor(
            lambda x: losses.regression([x], [torch.zeros_like(x)], gradients=0.5), 4, 3, 16, 16
        ),
        "info_nce": lambda: _tensor(
            lambda x: losses.info_nce(x, x.detach().roll(1, 0), scale=20.0), 8, 16
        ),
        "generator": lambda: _step(base, "synthesize"),
        "discriminator_step": lambda: _step(base, "d"),
        "r1": lambda: _step(base, "r1"),
        "generator_step": lambda: _step(base, "g"),
        "upsampler": lambda: _step(up, "synthesize"),
        "upsampler_discriminator_step": lambda: _step(up, "d"),
    }
    return found


def _tensor(call: Callable[[Tensor], Tensor], *shape: int) -> Subject:
    torch.manual_seed(1)
    x = torch.randn(*shape, dtype=torch.float64)
    return Subject(nn.Identity(), (x,), lambda module, x: _scalar(call(x)))


def _plain(module: nn.Module, *shape: int) -> Subject:
    torch.manual_seed(2)
    x = torch.randn(*shape, dtype=torch.float64)
    return Subject(module.double(), (x,), lambda module, x: _scalar(module(x)))


def _adaptive(kernels: int) -> Subject:
    torch.manual_seed(3)
    module = AdaptiveConv(16, 24, style_dim=32, num_kernels=kernels)
    x, style = torch.randn(B, 16, 16, 16), torch.randn(B, 32)
    call = lambda m, x, style: _scalar(m(x, style))  # noqa: E731
    return Subject(module.double(), (x.double(), style.double()), call)


def _attention(*, double_backward: bool) -> Subject:
    torch.manual_seed(4)
    q, k, v = (torch.randn(B, 2, 64, 32, dtype=torch.float64) for _ in range(3))

    def call(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _scalar(l2_attention(q, k, v, scale=1 / 32, double_backward=double_backward))

    return Subject(nn.Identity(), (q, k, v), call)


def _attention_block() -> Subject:
    torch.manual_seed(5)
    config = TrainBaseConfig().generator
    module = AttentionBlock(64, config, style_dim=32, text_width=48).double()
    x, style, text = torch.randn(B, 64, 8, 8), torch.randn(B, 32), torch.randn(B, TOKENS, 48)
    mask = torch.arange(TOKENS) < torch.tensor([3, 7, 12, 5])[:, None]

    def call(module: nn.Module, x: Tensor, style: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return _scalar(module(x, style, text, mask))

    return Subject(module, (x.double(), style.double(), text.double(), mask), call)


class _Networks(nn.Module):
    """G and D of a configuration, so that both move and are compared together."""

    def __init__(self, config: TrainBaseConfig | TrainUpsamplerConfig) -> None:
        super().__init__()
        is_base = isinstance(config, TrainBaseConfig)
        self.g = Generator(config.generator) if is_base else Upsampler(config.upsampler)
        self.d = Discriminator(config.discriminator)


def _step(config: TrainBaseConfig | TrainUpsamplerConfig, what: str) -> Subject:
    """A part of a training step; its gradients are those that the step leaves."""
    torch.manual_seed(6)
    networks = _Networks(config).double()
    tensors = step_tensors(config, networks.g, B)

    def call(networks: nn.Module, **given: Tensor) -> Tensor:
        assert isinstance(networks, _Networks)
        inputs = step_inputs(given)
        pairs = networks.d.config.pairs
        players = step.Players(networks.g, networks.d, [1 / len(pairs)] * len(pairs), None, None)
        fakes = step.synthesize(networks.g, inputs)
        if what == "synthesize":
            return torch.stack([_scalar(x) for x in fakes]).sum()
        settings: dict[str, Any] = {"auxiliary_strength": 0.0}
        if what == "d":
            networks.g.requires_grad_(False)
            found = step.discriminator_loss(players, config, inputs, fakes, **settings)
        elif what == "g":
            networks.d.requires_grad_(False)
            bare = config.model_copy(update={"lpips": 0.0})
            found = step.generator_loss(players, bare, inputs, fakes, **settings)
        else:
            found = step.r1_loss(players, inputs)
        networks.requires_grad_(True)
        return found.loss

    return Subject(networks, (tensors,), lambda module, given: call(module, **given))


def step_tensors(
    config: TrainStage, g: Generator | Upsampler, batch: int, *, tokens: int = TOKENS
) -> dict[str, Tensor]:
    """Random inputs of a step in float64 on the CPU."""
    read = g.config.text
    assert read is not None
    side = config.discriminator.resolution
    real = torch.tanh(torch.randn(batch, 3, side, side, dtype=torch.float64))
    found = {
        "real": real,
        "tokens": torch.randn(batch, tokens, read.encoder_width, dtype=torch.float64),
        "pooled": torch.randn(batch, read.pooled_width, dtype=torch.float64),
        "mask": torch.arange(tokens) < torch.arange(1, batch + 1)[:, None].clamp(min=3),
        "z": torch.randn(batch, g.config.latent_dim, dtype=torch.float64),
    }
    if isinstance(g, Upsampler):
        small = g.config.input_resolution
        found["small"] = F.avg_pool2d(real, side // small)
        found["noise"] = torch.randn(batch, 3, small, small, dtype=torch.float64)
    return found


def step_inputs(given: Mapping[str, Tensor], *, levels: int = 3) -> Inputs:
    """The same as a step takes them, with so many levels of the pyramid."""
    text = TextFeatures(given["tokens"], given["mask"], given["pooled"])
    other = TextFeatures(*(x.roll(1, 0) for x in text))
    batch = len(given["z"])
    return Inputs(
        real=layers.pyramid(given["real"], levels),
        captions=[""] * batch,
        text=text,
        z_BZ=given["z"],
        given=(given["small"], given["noise"]) if "small" in given else (),
        other_text=other,
        has_other_B=(True,) * batch,
    )


def _scalar(x: Tensor) -> Tensor:
    """A fixed random functional of a result: a sum with weights that depend on the place."""
    weights = torch.sin(torch.arange(x.numel(), device=x.device, dtype=torch.float64) * 12.9898)
    return (layers.full_precision(x).flatten() * weights.to(layers.full_precision(x).dtype)).sum()


def gradients(
    subject: Subject, device: torch.device, dtype: torch.dtype, precision: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and every gradient by name, in float64 on the CPU."""
    module = copy.deepcopy(subject.module).to(device, dtype)

    def moved(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: moved(value) for name, value in x.items()}
        if not x.is_floating_point():
            return x.to(device)
        return x.detach().clone().to(device, dtype).requires_grad_()

    inputs = [moved(x) for x in subject.inputs]
    cast = autocast("bf16", device) if precision == "bf16" else contextlib.nullcontext()
    with cast:
        loss = subject.call(module, *inputs)
    if loss.requires_grad:
        loss.backward()
    flat = {f"input {i}": x for i, x in enumerate(inputs) if isinstance(x, Tensor)}
    found = {
        n: x.grad for n, x in [*module.named_parameters(), *flat.items()] if x.grad is not None
    }
    return loss.detach().double().cpu(), {n: g.double().cpu() for n, g in found.items()}


def compare(
    subject: Subject,
    expected: tuple[Tensor, dict[str, Tensor]],
    device: torch.device,
    precision: str,
) -> dict[str, object]:
    """Relative errors of one precision.

    Raises:
        AssertionError: beyond the limit, or a gradient is missing.
    """
    with _tf32(precision == "tf32"):
        loss, found = gradients(subject, device, torch.float32, precision)
    reference_loss, reference = expected
    assert found.keys() == reference.keys(), f"gradients of {found.keys() ^ reference.keys()}"
    total = torch.stack([g.square().sum() for g in reference.values()]).sum().sqrt()
    wrong = {n: (found[n] - g).norm() for n, g in reference.items()}
    error = float(torch.stack(list(wrong.values())).square().sum().sqrt() / total.clamp(min=1e-30))
    worst = max(wrong, key=lambda n: float(wrong[n] / reference[n].norm().clamp(min=total * 1e-3)))
    shown = {"gradient_error": error, "worst": worst, "gradients": len(reference)}
    shown["loss_error"] = abs(float((loss - reference_loss) / reference_loss.abs().clamp(min=1e-9)))
    limit = LIMITS[precision]
    assert error <= limit, f"{error:.2e} > {limit:.0e}: {shown}"
    return shown


def _reference(make: Callable[[], Subject]) -> tuple[Subject, tuple[Tensor, dict[str, Tensor]]]:
    subject = make()
    return subject, gradients(subject, torch.device("cpu"), torch.float64, "fp32")


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False


def bitwise(device: torch.device, precision: str) -> dict[str, object]:
    """The same step twice: which gradients differ in any bit.

    Raises:
        AssertionError: some do.
    """
    acceleration.prepare(SystemConfig(tf32=False), device)
    different: dict[str, list[str]] = {}
    for what in ("d", "r1", "g"):
        subject = _step(TrainBaseConfig(), what)
        twice = [gradients(subject, device, torch.float32, precision)[1] for _ in range(2)]
        names = [n for n, g in twice[0].items() if not torch.equal(g, twice[1][n])]
        if names:
            different[what] = names[:10]
    assert not different, f"gradients that differ between two runs: {different}"
    return {"steps": "d, r1, g"}


def attention_kernels(device: torch.device) -> dict[str, object]:
    """Which fused kernels take our attention, in bf16; forced one by one.

    Raises:
        AssertionError: on a GPU self-attention is not taken by flash attention.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    found: dict[str, object] = {}
    for width in (32, 64):
        q = torch.randn(2, 4, 257, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        mask = torch.ones(2, 1, 1, 257, dtype=torch.bool, device=device)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            for name, call in {
                f"self_{width}": lambda q=q, width=width: l2_attention(q, q, q, scale=1 / width),
                f"cross_{width}": lambda q=q, mask=mask: F.scaled_dot_product_attention(
                    q, q, q, attn_mask=mask
                ),
            }.items():
                try:
                    with sdpa_kernel(backend):
                        call().sum().backward()
                    found[f"{name}/{backend.name}"] = True
                except RuntimeError as error:
                    found[f"{name}/{backend.name}"] = str(error)[:80]
    if device.type == "cuda":
        flash = [found[f"self_{width}/FLASH_ATTENTION"] for width in (32, 64)]
        assert flash == [True, True], f"self-attention is refused by flash attention: {found}"
    return found


class _Watching(emoji.EmojiLoader):
    """Between the batches `first` and `last` nothing may wait for the device."""

    def __init__(self, *args: Any, first: int, last: int, on_host: bool, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.first, self.last, self.on_host = first, last, on_host
        self.watched = 0

    def batches(self, images_seen: int = 0) -> Iterator[emoji.EmojiBatch]:
        """As always, with the mode switched on and off."""
        for number, batch in enumerate(super().batches(images_seen)):
            if self.on_host:  # as the loader of shards gives them
                batch = batch._replace(images_BCHW=batch.images_BCHW.cpu())
            is_watched = self.first <= number < self.last
            self.watched += is_watched
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("error" if is_watched else "default")
            yield batch
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")


def training_config(
    pack: Path, *, batches: int, warm: int = 0, every_component: bool = False
) -> TrainBaseConfig:
    """A small 64 px training of so many batches."""
    presets = json.loads((pack / "pack.json").read_text())["presets"]
    raw = learn.base_config(learn.SMALL["base"], presets["train_base"])
    batch = raw["batch_size"]
    if every_component:
        kernels = {"kernels": [1, 2, 2, 4, 4], "attention": [0, 1, 1, 0, 0]}
        raw["generator"] |= {"channels": [32, 32, 32, 32, 32], **kernels}
        raw["discriminator"] |= {"channels": [32] * 5, "attention": [0, 0, 0, 1, 0]}
        raw["loss"] |= {"generator_matching": 0.5}
    planned = learn.planned(raw, images=batches * batch, warm=warm * batch, rate=1.0)
    changed = planned.model_dump() | {"log_images": 1 << 40, "sample_images": 1 << 40}
    changed["warm_start"] |= {"images": warm * batch, "head_start_images": 0, "ramp_images": 1}
    changed["optimizer"] |= {"r1_every": 4, "discriminator_every": 1}
    return TrainBaseConfig.model_validate(changed | {"snapshot_images": None})


def no_waiting(room: learn.Room, made: emoji.Emoji, *, on_host: bool) -> dict[str, object]:
    """Whole steps of the loop, warm and adversarial, R1 among them, while waiting is an error."""
    steps = 16
    config = training_config(room.pack, batches=steps, warm=6, every_component=True)
    loader = _Watching(made, batch_size=config.batch_size, first=2, last=14, on_host=on_host)
    _train(room, config, made, loader)
    return {"watched_steps": loader.watched, "is_gpu": torch.cuda.is_available()}


def resume(room: learn.Room, made: emoji.Emoji) -> dict[str, object]:
    """A training that was stopped and resumed ends bit for bit like one that was not.

    Raises:
        AssertionError: it does not.
    """
    config = training_config(room.pack, batches=10, warm=4, every_component=True)
    whole = _train(room, config, made)
    stops = functools.partial(_after, 5)
    parted = Path(tempfile.mkdtemp(prefix="resume-"))
    with contextlib.suppress(loop.Preempted):
        _train(room, config, made, run_dir=parted, stop=stops())
    assert not (parted / "snapshot.safetensors").exists(), "it was not stopped"
    _train(room, config, made, run_dir=parted)
    ends = [(f / "snapshot.safetensors").read_bytes() for f in (whole, parted)]
    assert ends[0] == ends[1], "snapshots differ"
    return {"stopped_after": 5, "of": 10, "bytes": len(ends[0])}


def _after(calls: int) -> Callable[[], bool]:
    """A function that returns True from its `calls`-th call on."""
    asked = iter(range(1 << 30))
    return lambda: next(asked) >= calls - 1


def _train(
    room: learn.Room,
    config: TrainBaseConfig,
    made: emoji.Emoji,
    loader: emoji.EmojiLoader | None = None,
    *,
    run_dir: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    run_dir = run_dir or Path(tempfile.mkdtemp(prefix="right-"))
    learn.train(room, config, made, learn.NoLook(), run_dir, loader=loader, stop=stop)
    return run_dir


def machine(device: torch.device) -> dict[str, object]:
    """What this is, and its ceilings: a copy and a matrix product."""
    found: dict[str, object] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cores": len(os.sched_getaffinity(0)),
    }
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    found |= {"device": properties.name, "gb": properties.total_memory / 1e9}
    found |= {"cudnn": torch.backends.cudnn.version(), "capability": properties.major}
    x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    found["bf16_tflops"] = 2 * 8192**3 / _seconds(lambda: x @ x) / 1e12
    y = torch.empty(1 << 30, device=device, dtype=torch.uint8)
    found["copy_tb_per_second"] = 2 * y.numel() / _seconds(lambda: y.clone()) / 1e12
    return found


def _seconds(call: Callable[[], object], times: int = 10) -> float:
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / times


def main() -> int:
    """All checks; 1 if one failed."""
    record = Record.of_environment("right")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pack, is_small = Path(os.environ[PACK]), os.environ[SIZE] == "small"
    scratch = tempfile.tempdir = tempfile.mkdtemp(prefix="right-")  # of all that follows
    done = [record.attempt("machine", lambda: machine(device))]

    @functools.cache
    def prepared() -> tuple[learn.Room, emoji.Emoji]:
        captions = CaptionFeatures(emoji.text_encoder(pack, device), device)
        made = emoji.load(pack, 64, device)
        captions.warm(emoji.EmojiLoader(made, batch_size=16).captions_between(0, 1_024))
        room = learn.Room(record, pack, record.out, device, captions, is_small, float("inf"))
        return room, made

    for on_host in (False, True):
        name = f"no_waiting_{'host' if on_host else 'device'}"
        done.append(record.attempt(name, lambda h=on_host: no_waiting(*prepared(), on_host=h)))
    done.append(record.attempt("resume", lambda: resume(*prepared())))
    done.append(record.attempt("attention_kernels", lambda: attention_kernels(device)))
    for precision in ("fp32", "bf16"):
        name = f"bitwise_{precision}"
        done.append(record.attempt(name, lambda p=precision: bitwise(device, p), needs=5))
    for name, make in subjects().items():
        # Each is built, and its reference computed, inside the first check that needs it.
        reference = functools.cache(functools.partial(_reference, make))
        for precision in LIMITS:
            if name == "r1" and precision == "bf16":
                continue  # training leaves autocast for it
            call = lambda r=reference, p=precision: compare(*r(), device, p)  # noqa: E731
            done.append(record.attempt(f"{name}_{precision}", call, needs=3))
    shutil.rmtree(scratch, ignore_errors=True)
    return 0 if all(done) else 1


if __name__ == "__main__":
    leave(main())
