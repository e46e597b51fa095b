"""A network's layers with shapes, parameters and multiply-adds, counted without computing.

Shape letters: B batch, L tokens, D T features of text, Z latent, C colour, H W image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gigagan.config import BlockConfig, DiscriminatorConfig, GeneratorConfig, UpsamplerConfig
from gigagan.config.projected import ProjectedConfig
from gigagan.config.stylegan_t import StyleTConfig
from gigagan.models.base import base_generator
from gigagan.models.discriminator import Discriminator, Stage
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Generator, SynthesisLevel
from gigagan.models.heads import ProjectedHeads
from gigagan.models.stylegan_t import StyleGANT, SynthesisBlock
from gigagan.models.text import Features, TextBranch
from gigagan.models.upsampler import Upsampler

NUM_TOKENS = 77
"""Tokens of a caption where multiply-adds are counted: CLIP's context."""

Section = GeneratorConfig | StyleTConfig | DiscriminatorConfig | ProjectedConfig | UpsamplerConfig
"""What a network is built from."""
CONTAINERS = (nn.ModuleList, nn.ModuleDict, SynthesisLevel, SynthesisBlock, Stage, TextBranch)
"""Modules whose parts get a row each."""


class Row(NamedTuple):
    """One layer group of a network."""

    name: str
    """Path within the network, as in its state dict."""
    kind: str
    """Name of the class."""
    shapes: str
    """Output for one image; several where it is used several times."""
    parameters: int
    multiply_adds: int
    """Multiply-adds of one image's forward pass, over all uses of the layer."""


class Summary(NamedTuple):
    """All layers of one network."""

    network: str
    rows: list[Row]
    parameters: int
    """Parameters of the whole network, the learned text branch T included."""
    parameters_of_text: int
    """Parameters of T alone."""
    multiply_adds: int
    """Multiply-adds of one image, T included; the frozen encoder excluded."""


@torch.no_grad()
def summarize(config: Section) -> Summary:
    """Build the network without storage, run one image through it, and count.

    Counted are convolutions and matrix products, attention's included; not normalisation,
    activations and resampling. The discriminator's is for one image with one caption, all levels.
    """
    with torch.device("meta"):
        network, inputs = _build(config)
        network.requires_grad_(False)
        shapes: dict[str, list[str]] = {}
        for name, module in network.named_modules():
            module.register_forward_hook(_recorder(shapes.setdefault(name, [])))
        with FlopCounterMode(display=False) as counter:
            network(*inputs)
    counts = counter.get_flop_counts()
    root = type(network).__name__
    rows = [
        Row(
            name,
            type(module).__name__,
            ", ".join(dict.fromkeys(shapes[name])),
            _count(module),
            sum(counts.get(f"{root}.{name}", {}).values()) // 2,
        )
        for name, module in groups(network)
    ]
    own = _count(network) - sum(row.parameters for row in rows)
    if own:
        constant = network.constant if isinstance(network, Generator) else None
        shape = () if constant is None else tuple(constant.shape)
        rows.append(Row("constant", "Parameter", _shape(shape), own, 0))
    total = counter.get_total_flops() // 2
    return Summary(root, rows, _count(network), _count(network.text), total)


def _build(
    config: Section,
) -> tuple[Generator | StyleGANT | Discriminator | ProjectedHeads | Upsampler, tuple[object, ...]]:
    """The network and the inputs of one image."""
    if isinstance(config, ProjectedConfig):
        text = torch.empty(1, config.condition_width) if config.text else None
        return ProjectedHeads(config), (_stages(config), text)
    features = _features(config)
    if isinstance(config, GeneratorConfig | StyleTConfig):
        return base_generator(config), (torch.empty(1, config.latent_dim), features)
    if isinstance(config, UpsamplerConfig):
        small = torch.empty(1, 3, config.input_resolution, config.input_resolution)
        return Upsampler(config), (small, small, torch.empty(1, config.latent_dim), features)
    sides = [config.resolution >> level for level in range(config.levels)]
    return Discriminator(config), ([torch.empty(1, 3, s, s) for s in sides], features)


def _stages(config: ProjectedConfig) -> list[torch.Tensor]:
    """What the frozen encoder makes of one image."""
    kind, channels, multiple, _ = config.stages
    last = config.side // multiple  # stages of maps halve their sides down to it
    if kind == "tokens":
        return [torch.empty(1, last**2, width) for width in channels]
    sides = [last << i for i in reversed(range(len(channels)))]
    return [torch.empty(1, width, side, side) for width, side in zip(channels, sides, strict=True)]


def _features(config: BlockConfig | StyleTConfig) -> Features:
    if config.text is not None:
        return TextFeatures(
            torch.empty(1, NUM_TOKENS - 1, config.text.encoder_width),
            torch.ones(1, NUM_TOKENS - 1, dtype=torch.bool),
            torch.empty(1, config.text.pooled_width),
        )
    # Not on the meta device: a class number is looked at before it is used.
    return None if config.classes is None else torch.zeros(1, dtype=torch.long, device="cpu")


def groups(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What is shown as one row each, in the order of the state dict."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, CONTAINERS):
            yield from groups(child, f"{path}.")
        else:
            yield path, child


def _recorder(found: list[str]):  # type: ignore[no-untyped-def]
    """A forward hook that notes the shape of what a layer returns."""

    def note(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            found.append(_shape(tuple(output.shape[1:])))

    return note


def _shape(sides: tuple[int, ...]) -> str:
    return "×".join(map(str, sides))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
