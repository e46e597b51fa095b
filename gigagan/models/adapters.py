"""Adapters: low-rank updates of some weights of one base, W + Σ_k a_k · B_k A_k, as small files.

Low rank after LoRA (Hu et al. 2021, arXiv:2106.09685, equation 3); to adapt a GAN by so few numbers
after E²GAN (Gong et al. 2024, arXiv:2401.06127), by its modulation alone after LFS-GAN (Seo et al.
2023, arXiv:2308.14321). Nothing here changes the base: `merged` gives plain weights beside its own.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gigagan.config import AdaptedLayers
from gigagan.models import tensors
from gigagan.models.base import BaseGenerator
from gigagan.models.layers import AdaptiveConv, EqualLinear, MappingNetwork
from gigagan.models.text import TextBranch

FORMAT = "gigagan-adapter-1"
ENTRY = "adapter"
DTYPE = torch.bfloat16
"""What a file holds; training and merging work in float32."""
_UP, _DOWN, _FULL = ".up", ".down", ".full"


class AdapterError(ValueError):
    """A file that is no adapter, or is one of another base; or a weight that is no number."""


def chosen(network: BaseGenerator, layers: Sequence[AdaptedLayers], *, full: bool) -> list[str]:
    """Names of the parameters of these kinds of layers; without `full` only what has a rank.

    Raises:
        AdapterError: the network has none of them.
    """
    names = [
        name
        for prefix, kind in _kinds(network)
        if kind in layers
        for name, value in network.named_parameters()
        if name.startswith(prefix) and (full or value.ndim > 1)
    ]
    if not names:
        raise AdapterError(f"layers = {', '.join(layers)}: this base has no such weights to adapt")
    return sorted(set(names))


def _kinds(network: nn.Module) -> Iterator[tuple[str, AdaptedLayers]]:
    """How names of parameters begin, and which kind of layer they are of."""
    for name, module in network.named_modules():
        if isinstance(module, MappingNetwork) or (
            isinstance(module, EqualLinear) and name == "style_input"
        ):
            yield f"{name}.", "modulation"
        elif isinstance(module, AdaptiveConv):
            yield f"{name}.to_", "modulation"
            yield f"{name}.b", "convolutions"  # its bank and bias
        elif isinstance(module, TextBranch):
            yield f"{name}.", "text"


class Adapter:
    """Factors by the names of a base's weights: B (`.up`) and A (`.down`), or one `.full` update.

    A weight of more than two sides is a matrix of its outputs (of a bank, all filters') by all that
    one output sees.
    """

    def __init__(self, factors: Mapping[str, Tensor]) -> None:
        self.factors = dict(factors)

    @classmethod
    def new(
        cls, network: BaseGenerator, layers: Sequence[AdaptedLayers], rank: int | None, seed: int
    ) -> Adapter:
        """One that changes nothing yet: B is 0, A as large as the weight it is for.

        So Adam's step of B by η changes a weight by about η times its size. Without a rank every
        parameter has an update of its own size, biases too.
        """
        random = torch.Generator().manual_seed(seed)
        parameters = dict(network.named_parameters())
        factors: dict[str, Tensor] = {}
        for name in chosen(network, layers, full=rank is None):
            weight = parameters[name].detach()
            if rank is None:
                factors[name + _FULL] = torch.zeros_like(weight)
                continue
            rows, columns = _matrix(weight).shape
            scale = weight.float().square().mean().sqrt() / math.sqrt(rank)
            down = scale * torch.randn(rank, columns, generator=random).to(weight.device)
            factors[name + _UP] = torch.zeros(rows, rank, device=weight.device)
            factors[name + _DOWN] = down
        return cls({name: factor.requires_grad_() for name, factor in factors.items()})

    @property
    def parameters(self) -> list[Tensor]:
        """All factors, in a fixed order."""
        return [self.factors[name] for name in sorted(self.factors)]

    @property
    def num_parameters(self) -> int:
        """How many numbers it holds."""
        return sum(factor.numel() for factor in self.parameters)

    def update(self, name: str, weight: Tensor) -> Tensor | None:
        """B A in the weight's shape, or its full update; None where the weight has none."""
        if (full := self.factors.get(name + _FULL)) is not None:
            return full
        up, down = self.factors.get(name + _UP), self.factors.get(name + _DOWN)
        return None if up is None or down is None else (up @ down).reshape(weight.shape)

    def state_dict(self) -> dict[str, Tensor]:
        """The factors, for checkpoints."""
        return {name: factor.detach() for name, factor in self.factors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        for name, factor in self.factors.items():
            factor.copy_(state[name])

    def rounded(self) -> Adapter:
        """What a file would give back."""
        return Adapter({n: f.detach().to(DTYPE).float() for n, f in self.factors.items()})


def _matrix(weight: Tensor) -> Tensor:
    """O I… as O × I…; a bank N O I h w as N·O × I·h·w."""
    return (weight.flatten(0, 1) if weight.ndim == 5 else weight).flatten(1)


def merged(network: nn.Module, parts: Sequence[tuple[Adapter, float]]) -> dict[str, Tensor]:
    """Plain weights W + Σ_k a_k · B_k A_k of the parameters that any part changes, by name."""
    found: dict[str, Tensor] = {}
    for name, weight in network.named_parameters():
        for adapter, amount in parts:
            if (update := adapter.update(name, weight)) is not None:
                found[name] = found.get(name, weight) + amount * update
    return found


@torch.no_grad()
def merge(network: nn.Module, parts: Sequence[tuple[Adapter, float]]) -> None:
    """Write `merged` into the network, which from then on is a plain one."""
    parameters = dict(network.named_parameters())
    for name, weight in merged(network, parts).items():
        parameters[name].copy_(weight)


def digest(network: nn.Module) -> str:
    """sha256 of all weights by name, as float32: one base has one, however its file was written."""
    total = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        total.update(f"{name} {tuple(value.shape)}\n".encode())
        total.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


# ---- files -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class About:
    """What a file says of itself."""

    kind: str
    """`adapter` or `unlearn`."""
    base: str
    """`digest` of the base that it belongs to."""
    rank: int | None
    layers: tuple[str, ...]
    concept: str | None
    """What was unlearned."""
    about: dict[str, Any]
    """Where it comes from."""


def save(path: Path, adapter: Adapter, about: About) -> None:
    """Write the factors in bfloat16, with what they are for."""
    values = {n: f.detach().to(DTYPE).cpu().contiguous() for n, f in adapter.factors.items()}
    described = {"format": FORMAT, **vars(about), "targets": sorted(_targets(values))}
    tensors.write(path, values, {ENTRY: json.dumps(described)})


def load(path: Path, network: nn.Module) -> tuple[Adapter, About]:
    """An adapter of exactly this base, in float32 on its device.

    Raises:
        AdapterError: the file is missing, damaged, no adapter, of another format, or of another
            base.
    """
    if not path.is_file():
        raise AdapterError(f"{path}: no such adapter; the stage adapt writes adapter.safetensors")
    try:
        with tensors.opened(path) as file:
            described = json.loads((file.metadata() or {}).get(ENTRY, "{}"))
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except ValueError as error:
        raise AdapterError(str(error)) from error
    if described.get("format") != FORMAT:
        found = described.get("format")
        raise AdapterError(
            f"{path} is no adapter: its metadata has no entry {ENTRY!r}"
            if found is None
            else f"{path}: format {found!r}, expected {FORMAT!r}: upgrade gigagan"
        )
    about = About(**{name: described[name] for name in About.__dataclass_fields__})
    if about.base != (own := digest(network)):
        raise AdapterError(
            f"{path} belongs to the base with weights {about.base[:12]}…, not to this one "
            f"({own[:12]}…): give the base that it was made from"
        )
    device = next(network.parameters()).device
    return Adapter({name: value.float().to(device) for name, value in values.items()}), about


def _targets(names: Mapping[str, Tensor]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


Given = str | Path | tuple[str | Path, float]
"""A file, alone or with its weight."""


def apply(network: nn.Module, given: Sequence[Given]) -> dict[str, Path]:
    """Merge files into a base; gives each file by a name that tells its place and weight.

    Raises:
        AdapterError: one does not fit, or a weight is no finite number.
    """
    pairs = [one if isinstance(one, tuple) else (one, 1.0) for one in given]
    parts = []
    for path, amount in pairs:
        if not math.isfinite(amount):
            raise AdapterError(f"{path}: weight {amount}: give a finite number, as in 0.5")
        parts.append((load(Path(path), network)[0], amount))
    if parts:
        merge(network, parts)
    return {f"adapter {n} × {amount:g}": Path(p) for n, (p, amount) in enumerate(pairs, start=1)}
