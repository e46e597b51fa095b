"""Predicted speed and memory of the paper's configurations on GPUs: counted, never measured.

Counted on the meta device, for one image and one caption of 77 tokens, with the functions of the
training step itself:

- Multiply-adds of convolutions, products and attention: one forward of G, D on a real and a
  generated image, its predictions with another caption, D's backward, G's loss through D and its
  backward; and R1, a double backward in float32, each `r1_every` steps. Not the losses through
  frozen encoders (LPIPS is left out of the upsampler's too), nor the frozen text encoder.
- Bytes that operations read and write if none is fused: an upper bound of the traffic. What is
  fused reads and writes less; `FUSED` is the share that we assume to be left.
- Activations that autograd keeps for a backward pass, each storage once, as bf16 autocast keeps
  them: two bytes a number. With checkpointing: the inputs of each block, and the largest block.

time of a step = max(operations / (peak · UTILISATION), bytes / bandwidth) + R1's, amortised.
Communication, loading and the optimizers' own time are not in it.

Shape letters: B batch, C colour, H W image.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.model import gmac
from gigagan.config import TrainBaseConfig, TrainStage
from gigagan.config.presets import preset
from gigagan.models.attention import AttentionBlock
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.layers import AdaptiveBlock, DownBlock, ResidualBlock
from gigagan.models.summary import NUM_TOKENS
from gigagan.models.upsampler import Upsampler
from gigagan.training import step
from gigagan.training.inputs import Inputs

PRESETS = ("paper_64", "paper_64_to_512")
UTILISATION = 0.35  # of the dense bf16 peak, assumed
FLOAT32_SHARE = 0.5  # R1 runs in float32, as TF32: half of the bf16 peak
FUSED = 0.5  # of the unfused traffic, assumed
HALF = 2  # bytes of a number in bf16
RESERVED_GB = 6.0  # CUDA, NCCL, the frozen encoders and fragmentation, assumed
NUM_CARDS = 64
STEPS = 1_350_000
GLOBAL_BATCHES = (512, 1024)
BLOCKS = (AdaptiveBlock, AttentionBlock, DownBlock, ResidualBlock)


class Card(NamedTuple):
    """A GPU by its data sheet: speed, bandwidth and memory."""

    name: str
    tflops: float
    """Dense bf16, 10¹² operations a second."""
    tb_per_second: float
    gb: float


CARDS = (Card("A100-80GB", 312, 2.0, 80), Card("H100-80GB SXM", 989, 3.35, 80))


class Count(NamedTuple):
    """What a step computes, moves and keeps: a constant (weights) and a part for each image."""

    gmac: float
    """10⁹ multiply-adds of an image, without R1."""
    r1_gmac: float
    """10⁹ multiply-adds of an image's R1."""
    forward_gmac: float
    """10⁹ multiply-adds of the forward passes that checkpointing repeats."""
    gb: float
    """10⁹ bytes that an image's operations move without fusion, without R1."""
    r1_gb: float
    """10⁹ bytes that an image's R1 moves without fusion."""
    kept_gb: float
    """10⁹ bytes of an image's activations: G's graph and that of D's step."""
    checkpointed_gb: float
    """The same with checkpointing."""
    r1_kept_gb: float
    """10⁹ bytes of G's graph and that of R1, which is float32 and not checkpointed."""
    constant_gb: float
    """10⁹ bytes of weights, gradients, AdamW, EMA and what a step computes of weights once."""
    millions: tuple[float, float]
    """10⁶ parameters of G and of D."""


class _Traffic(TorchDispatchMode):
    """Numbers that operations read and write; views cost nothing."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = (x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
            self.numbers += sum(x.numel() for x in tensors if x.is_floating_point())
        return out


class _Kept:
    """What autograd keeps, each storage once, by the block that it was computed in."""

    def __init__(self, *networks: nn.Module) -> None:
        self.found: dict[int, tuple[int, Tensor]] = {}
        self.inputs: dict[int, Tensor] = {}
        self._calls, self._block = 0, 0  # block 0 is outside of all
        self._hooks = [
            hook
            for network in networks
            for module in network.modules()
            if isinstance(module, BLOCKS)
            for hook in (
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave),
            )
        ]

    def __enter__(self) -> _Kept:
        self._saved = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self._saved.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._saved.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._calls += 1
        self._block = self._calls
        self.inputs[inputs[0].untyped_storage()._cdata] = inputs[0]

    def _leave(self, module: nn.Module, inputs: object, output: object) -> None:
        self._block = 0

    def _pack(self, x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            self.found.setdefault(x.untyped_storage()._cdata, (self._block, x))
        return x

    @property
    def numbers(self) -> int:
        """How many numbers all kept tensors hold."""
        return sum(_size(x) for _, x in self.found.values())

    @property
    def checkpointed(self) -> int:
        """What is left if blocks keep their inputs alone, and the largest block."""
        blocks: defaultdict[int, int] = defaultdict(int)
        for block, x in self.found.values():
            blocks[block] += _size(x)
        outside = blocks.pop(0, 0)
        apart = (x for key, x in self.inputs.items() if self.found.get(key, (1,))[0])
        return outside + sum(map(_size, apart)) + max(blocks.values(), default=0)


def _size(x: Tensor) -> int:
    return x.untyped_storage().nbytes() // x.element_size()


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    """A GPU's attention, which keeps no matrix of weights; the mask costs nothing."""
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    out: Tensor = fused(q, k, v, None, True, scale=settings.get("scale"))[0]
    return out


def count(config: TrainStage) -> Count:
    """A step of this configuration: two images against one give the part of each."""
    with mock.patch.object(F, "scaled_dot_product_attention", _fused_attention):
        one, two = (_raw(config, batch) for batch in (1, 2))
    each = {name: two[name] - one[name] for name in two}
    g, d = one["g"], one["d"]
    # What does not grow with the batch is computed of weights once a step: bf16 copies.
    constant = (16 * (g + d) + 4 * g + HALF * max(one["kept"] - each["kept"], 0)) / 1e9
    return Count(
        one["gmac"],
        one["r1_gmac"],
        one["forward_gmac"],
        each["traffic"] * HALF / 1e9,
        each["r1_traffic"] * 4 / 1e9,
        each["kept"] * HALF / 1e9,
        each["checkpointed"] * HALF / 1e9,
        (each["kept_of_g"] * HALF + each["r1_kept"] * 4) / 1e9,
        constant,
        (g / 1e6, d / 1e6),
    )


def _raw(config: TrainStage, batch: int) -> dict[str, float]:
    """Numbers of a whole batch."""
    with torch.device("meta"):
        g, d, inputs = _build(config, batch)
        weights = [1 / len(d.config.pairs)] * len(d.config.pairs)
        players = step.Players(g, d, weights, None, None)

        def of_d() -> None:
            fakes = step.synthesize(g, inputs)
            loss = step.discriminator_loss(players, config, inputs, fakes, auxiliary_strength=0.0)
            loss.loss.backward()

        def of_g() -> None:
            d.requires_grad_(False)
            fakes = step.synthesize(g, inputs)
            loss = step.generator_loss(players, config, inputs, fakes, auxiliary_strength=0.0)
            loss.loss.backward()
            d.requires_grad_(True)

        def synthesize() -> None:
            step.synthesize(g, inputs)

        def judge() -> None:
            d(inputs.real, inputs.text)

        def r1() -> None:
            step.r1_loss(players, inputs).loss.backward()

        found: dict[str, float] = {
            "traffic": _traffic(of_d) + _traffic(of_g) - _traffic(synthesize),
            "r1_traffic": _traffic(r1),
            "g": sum(p.numel() for p in g.parameters()),
            "d": sum(p.numel() for p in d.parameters()),
        }
        with _Kept(g) as kept:
            synthesize()
        found["kept_of_g"] = kept.numbers
        with _Kept(g, d) as kept:
            of_d()
        found |= {"kept": kept.numbers, "checkpointed": kept.checkpointed}
        with _Kept(d) as kept:
            r1()
        found["r1_kept"] = kept.numbers
        if batch > 1:  # multiply-adds of weights alone are too few to matter
            return found
        with torch.no_grad():
            forward_g, forward_d = gmac(synthesize), gmac(judge)
        return found | {
            # G's forward is in both halves but is computed once.
            "gmac": gmac(of_d) + gmac(of_g) - forward_g,
            "r1_gmac": gmac(r1),
            "forward_gmac": forward_g + 3 * forward_d,  # D: real, generated, and for G's loss
        }


def _traffic(call: Callable[[], object]) -> int:
    with _Traffic() as traffic:
        call()
    return traffic.numbers


def _build(config: TrainStage, batch: int) -> tuple[Generator | Upsampler, Discriminator, Inputs]:
    """Networks and a batch without storage."""
    is_base = isinstance(config, TrainBaseConfig)
    g = Generator(config.generator) if is_base else Upsampler(config.upsampler)
    d = Discriminator(config.discriminator)
    read = g.config.text
    assert read is not None
    text = TextFeatures(
        torch.empty(batch, NUM_TOKENS - 1, read.encoder_width),
        torch.ones(batch, NUM_TOKENS - 1, dtype=torch.bool),
        torch.empty(batch, read.pooled_width),
    )
    sides = [config.discriminator.resolution >> level for level in range(d.config.levels)]
    given: tuple[torch.Tensor, ...] = ()
    if isinstance(g, Upsampler):
        side = g.config.input_resolution
        given = (torch.empty(batch, 3, side, side), torch.empty(batch, 3, side, side))
    inputs = Inputs(
        real=[torch.empty(batch, 3, side, side) for side in sides],
        captions=[""] * batch,
        text=text,
        z_BZ=torch.empty(batch, g.config.latent_dim),
        given=given,
        other_text=text,
        has_other_B=(True,) * batch,
    )
    return g, d, inputs


class Prediction(NamedTuple):
    """Batch and time per image on one card."""

    batch: int
    r1_batch: int
    """While R1 runs, which may come in smaller parts."""
    compute_ms: float
    """Milliseconds that an image's multiply-adds take."""
    memory_ms: float
    """Milliseconds that moving an image's bytes takes."""

    @property
    def images_per_second(self) -> float:
        """Computing and moving overlap: the slower one decides."""
        return 1e3 / max(self.compute_ms, self.memory_ms)


def predict(found: Count, card: Card, *, r1_every: int, is_checkpointed: bool) -> Prediction:
    """Speed and batch on a card, by the formulas in this file's docstring."""
    per_image = found.checkpointed_gb if is_checkpointed else found.kept_gb
    room = card.gb - RESERVED_GB - found.constant_gb
    batch, r1_batch = (max(math.floor(room / gb), 0) for gb in (per_image, found.r1_kept_gb))
    step_gmac = found.gmac + (found.forward_gmac if is_checkpointed else 0.0)
    rate = card.tflops * 1e3 * UTILISATION / 2  # GMAC a second
    compute = step_gmac / rate + found.r1_gmac / (rate * FLOAT32_SHARE) / r1_every
    moved_gb = FUSED * (found.gb * step_gmac / found.gmac + found.r1_gb / r1_every)
    return Prediction(batch, r1_batch, compute * 1e3, moved_gb / card.tb_per_second)


def main() -> None:
    """Predicted, not measured: the paper's pair on A100 and H100."""
    print(
        f"Predictions from counts, none of it measured. Assumed: {UTILISATION:.0%} of the dense "
        f"bf16 peak ({FLOAT32_SHARE:.0%} of that in R1, TF32); {FUSED:.0%} of the unfused traffic "
        f"at full bandwidth; {RESERVED_GB:.0f} GB reserved; captions of {NUM_TOKENS} tokens; "
        f"{NUM_CARDS} cards without losses in communication.\n"
        "ms per image = max(2 · GMAC / (peak · utilisation), bytes / bandwidth)"
    )
    for name in PRESETS:
        config = preset(name)
        found = count(config)
        every = config.optimizer.r1_every
        print(
            f"\n{name}: G {found.millions[0]:.0f} M, D {found.millions[1]:.0f} M parameters with T"
            f"\n  an image: {found.gmac:,.0f} GMAC a step, R1 {found.r1_gmac:,.0f} every {every} "
            f"steps; {found.gb:.1f} GB moved unfused, R1 {found.r1_gb:.1f}"
            f"\n  memory: {found.constant_gb:.1f} GB constant; an image {found.kept_gb:.2f} GB, "
            f"checkpointed {found.checkpointed_gb:.2f}, while R1 runs {found.r1_kept_gb:.2f}\n"
        )
        days = "".join(f" days, batch {batch} |" for batch in GLOBAL_BATCHES)
        own = f"days, {config.total_images / 1e6:,.0f} M images"
        print(
            "| card | checkpointing | largest batch | R1's | compute | bytes | images/s | "
            f"on {NUM_CARDS} |{days} {own} |\n|{'---|' * (9 + len(GLOBAL_BATCHES))}"
        )
        for card in CARDS:
            for is_checkpointed in (False, True):
                p = predict(found, card, r1_every=every, is_checkpointed=is_checkpointed)
                together = NUM_CARDS * p.images_per_second
                totals = [STEPS * batch for batch in GLOBAL_BATCHES] + [config.total_images]
                cells = [
                    card.name,
                    "yes" if is_checkpointed else "no",
                    str(p.batch),
                    str(p.r1_batch),
                    f"{p.compute_ms:.1f} ms",
                    f"{p.memory_ms:.1f} ms",
                    f"{p.images_per_second:.1f}",
                    f"{together:,.0f}",
                    *(f"{total / together / 86400:,.1f}" for total in totals),
                ]
                print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\nDays by batch are for {STEPS:,} steps; a batch too large for the cards is split up.")


if __name__ == "__main__":
    main()
