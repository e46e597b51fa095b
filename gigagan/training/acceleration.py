"""Ways to run the same networks in less memory or time, applied to them from outside.

None of them changes what a network computes (but for rounding), nor the keys of its state dict.
Apply `channels_last` before the average (EMA) is copied from a network, that both lie alike in
memory, and the others after.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gigagan.config import SystemConfig
from gigagan.models.attention import AttentionBlock
from gigagan.models.discriminator import DownConv, Predictor, Reduce, Stage
from gigagan.models.generator import SynthesisLevel
from gigagan.models.heads import Head
from gigagan.models.layers import AdaptiveBlock, DownBlock, ResidualBlock
from gigagan.models.precision import has_bfloat16
from gigagan.models.stylegan_t import ResidualLayer, SynthesisBlock, SynthesisLayer

_LEVELS = (SynthesisLevel, SynthesisBlock, Stage, DownBlock)
_COMPILED = (
    *(AdaptiveBlock, AttentionBlock, ResidualBlock, DownBlock, DownConv, Reduce, Predictor),
    *(SynthesisLayer, ResidualLayer, Head),
)


def autocast(
    precision: Literal["auto", "fp32", "bf16"], device: torch.device
) -> contextlib.AbstractContextManager[object]:
    """bf16 where asked for, or where `auto` and the device multiplies bf16 natively.

    Demodulation, softmax over a bank, losses and R1 keep float32.
    """
    wanted = precision == "bf16" or (precision == "auto" and has_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16) if wanted else contextlib.nullcontext()


def prepare(system: SystemConfig, device: torch.device) -> None:
    """Set what PyTorch keeps for the whole process: how a GPU multiplies."""
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high" if system.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = system.tf32
    torch.backends.cudnn.benchmark = not system.deterministic
    torch.backends.cudnn.deterministic = system.deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(system.deterministic, warn_only=True)  # attention, too
    # Filling new memory finds bugs and costs a pass.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def loader_threads(system: SystemConfig, device: torch.device, *, local_ranks: int = 1) -> int:
    """Threads that decode pictures for one rank."""
    if system.loader_threads is not None:
        return system.loader_threads
    if device.type != "cuda":
        return 1
    return max(1, min(16, len(os.sched_getaffinity(0)) // local_ranks))


def checkpoint_activations(network: nn.Module) -> int:
    """Keep only the inputs of each resolution level for the backward; the number of levels.

    Everything within is computed again when its gradients are (non-reentrant checkpointing, which
    can be differentiated twice). The levels draw no random numbers, so no generator is restored.
    """
    levels = _outermost(network, _LEVELS)
    for level in levels:
        level.forward = functools.partial(
            checkpoint, level.forward, use_reentrant=False, preserve_rng_state=False
        )
    return len(levels)


@torch.no_grad()
def channels_last(network: nn.Module) -> None:
    """Lay out convolution filters with channels last, before an optimizer takes them.

    Only parameters with four dimensions: `module.to(memory_format=…)` raises on filter banks.
    """
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def compile_parts(network: nn.Module, *, backend: str = "inductor") -> int:
    """Compile the blocks of G or D in place, when they first run; the number of blocks.

    Blocks of equal structure share their code. Attention and compiled code cannot be differentiated
    twice: run what R1 differentiates inside `uncompiled()`.
    """
    parts = _outermost(network, _COMPILED)
    # All blocks of a kind count as one function, whose versions are limited to eight by default;
    # beyond, they run uncompiled. Two sizes of batch (D sees real and generated together) each.
    limit = max(torch._dynamo.config.recompile_limit, 4 * len(parts))
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 4 * limit
    )
    for part in parts:
        part.compile(backend=backend, dynamic=False)
    return len(parts)


def uncompiled(network: nn.Module, *more: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Inside, forward passes of these networks run as they were written, with their hooks.

    Their backward, and a second one, may come later.
    """
    modules = (module for whole in (network, *more) for module in whole.modules())
    if all(module._compiled_call_impl is None for module in modules):
        return contextlib.nullcontext()  # nor is the compiler imported
    stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def _outermost(network: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """The modules of these kinds that lie in no other of them."""
    if isinstance(network, kinds):
        return [network]
    return [found for child in network.children() for found in _outermost(child, kinds)]
