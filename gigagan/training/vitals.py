"""Vital signs: figures of the networks' inside, measured on a few samples of a batch.

Shape letters: B batch, Z latent, N filters of a bank, C colour, H W image.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gigagan.evaluation.judges.alignment import z_sensitivity
from gigagan.models.attention import SelfAttention
from gigagan.models.base import BaseGenerator
from gigagan.models.encoders import TextFeatures
from gigagan.models.layers import AdaptiveConv, full_precision
from gigagan.models.pixels import to_uint8
from gigagan.models.text import Features
from gigagan.models.upsampler import Upsampler
from gigagan.training.acceleration import uncompiled

NUM_IMAGES = 8


@torch.no_grad()
def vital_signs(
    generator: BaseGenerator | Upsampler,
    discriminator: nn.Module,
    z_BZ: Tensor,
    features: Features,
    real: Sequence[Tensor],
    given: Sequence[Tensor] = (),
) -> dict[str, float]:
    """Figures of the networks' inside on the first samples of a batch.

    `real` is the pyramid of real images, `given` what G starts from, each B C H W. The networks
    stay as they are, and no random number is drawn.
    """
    count = min(len(z_BZ), NUM_IMAGES)
    z_BZ, rows = z_BZ[:count], _first_rows(features, count)
    given = [x_BCHW[:count] for x_BCHW in given]
    found: dict[str, float] = {}
    with _evaluating(generator, discriminator):
        entropies: list[Tensor] = []
        self_weights: list[Tensor] = []
        with _watching(generator, entropies, self_weights):
            generator(*given, z_BZ, rows)
        _note(found, "health/selection_entropy", entropies)
        _note(found, "health/attention_self_g", self_weights)
        if any(isinstance(module, SelfAttention) for module in discriminator.modules()):
            self_weights = []
            with _watching(discriminator, [], self_weights):
                discriminator([level[:count] for level in real], rows)
            _note(found, "health/attention_self_d", self_weights)
        if count > 1:
            # One prompt (and one small picture) with every latent.
            fixed = [x_BCHW[:1].expand_as(x_BCHW) for x_BCHW in given]
            images_BCHW = generator(*fixed, z_BZ, _first_rows(features, 1, count))[0]
            found["health/z_effect"] = z_sensitivity(to_uint8(images_BCHW)[None])
    for name, network in (("g", generator), ("d", discriminator)):
        norms = torch._foreach_norm([p.detach().float() for p in network.parameters()])
        found[f"health/weight_norm_{name}"] = torch.stack(norms).norm().item()
    return found


def selection_entropy(select_BN: Tensor) -> Tensor:
    """−Σ_n p_n log p_n / log N, mean over the batch: 1 is an even choice, 0 always one filter."""
    entropy_B = torch.special.entr(full_precision(select_BN)).sum(1)
    return entropy_B.mean() / math.log(select_BN.shape[1])


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
        self_weights.append(module.self_weight(inputs[0], inputs[1] if inputs[1:] else None))

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
        with uncompiled(*networks):
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def _first_rows(features: Features, count: int, repeat: int = 1) -> Features:
    """The first rows of what the networks are conditioned on, each `repeat` times."""
    if features is None:
        return None
    if isinstance(features, Tensor):
        return features[:count].repeat_interleave(repeat, dim=0)
    return TextFeatures(*(part[:count].repeat_interleave(repeat, dim=0) for part in features))


def _note(found: dict[str, float], name: str, figures: Sequence[Tensor]) -> None:
    """The mean over layers; nothing where the network has no such layer."""
    if figures:
        found[name] = torch.stack(list(figures)).mean().item()
