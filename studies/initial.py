"""Spread of activations, logits and gradients before the first step, layer by layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gigagan import losses
from gigagan.config import DiscriminatorConfig, GeneratorConfig, TextConfig
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.layers import pyramid
from gigagan.models.summary import groups

PICTURE = Path("docs/images/initial-statistics.png")
NUM_TOKENS = 20


class Spread(NamedTuple):
    """One layer group after the forward and backward pass of one batch."""

    name: str
    activation: float
    """Standard deviation of its output; the mean over its uses."""
    gradient: float
    """Norm of its parameters' gradient."""


class Initial(NamedTuple):
    """Both networks before the first step."""

    generator: list[Spread]
    discriminator: list[Spread]
    image: float
    """Standard deviation of generated pixels."""
    logits: list[float]
    """Standard deviation over images of each prediction (i, j)."""


def measure(
    g_config: GeneratorConfig, d_config: DiscriminatorConfig, *, batch: int, seed: int
) -> Initial:
    """G's and D's own first losses on random captions and pictures with the spectrum of real ones.

    D sees real and generated images; gradients of G are those of its loss through D.
    """
    torch.manual_seed(seed)
    g, d = Generator(g_config), Discriminator(d_config)
    z_BZ, text = torch.randn(batch, g_config.latent_dim), _captions(g_config.text, batch)
    weights = losses.prediction_weights(d_config.pairs, (1.0,) * d_config.levels, intermediate=1.0)

    outputs = _watch(g)
    fakes = g(z_BZ, text)
    d.requires_grad_(False)
    losses.as_real(d(fakes[: d_config.levels], text), weights).backward()
    of_generator = _spreads(g, outputs)
    image = fakes[0].std().item()
    fakes = [x.detach() for x in fakes]
    del g

    d.requires_grad_(True)
    outputs = _watch(d)
    real = pyramid(pink_images(batch, d_config.resolution), d_config.levels)
    both = [torch.cat(pair) for pair in zip(real, fakes, strict=False)]
    maps = d.trunk(both, num_sets=2)
    text_BT = d.read(text)
    assert text_BT is not None
    logits = d.predict(maps, text_BT.repeat(2, 1))
    real_logits, fake_logits = [x[:batch] for x in logits], [x[batch:] for x in logits]
    (losses.as_real(real_logits, weights) + losses.as_fake(fake_logits, weights)).backward()
    return Initial(of_generator, _spreads(d, outputs), image, [x.std().item() for x in logits])


def pink_images(batch: int, side: int) -> Tensor:
    """Random images whose power falls as 1 / f², as that of photographs; std 0.5, B 3 H W."""
    spectrum = torch.fft.rfft2(torch.randn(batch, 3, side, side))
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None])
    images = torch.fft.irfft2(spectrum / frequency.clamp(min=1 / side), s=(side, side))
    return (images / images.std() * 0.5).clamp(-1, 1)


def _captions(config: TextConfig | None, batch: int) -> TextFeatures:
    assert config is not None
    return TextFeatures(
        torch.randn(batch, NUM_TOKENS, config.encoder_width),
        torch.ones(batch, NUM_TOKENS, dtype=torch.bool),
        torch.randn(batch, config.pooled_width),
    )


def _watch(network: nn.Module) -> dict[str, list[float]]:
    """Standard deviations of every group's outputs, filled by the forward pass."""
    found: dict[str, list[float]] = {}
    for name, module in groups(network):

        def note(module: nn.Module, inputs: object, output: Tensor, name: str = name) -> None:
            found.setdefault(name, []).append(output.detach().float().std().item())

        module.register_forward_hook(note)
    return found


def _spreads(network: nn.Module, outputs: dict[str, list[float]]) -> list[Spread]:
    modules = dict(groups(network))
    return [
        Spread(name, sum(values) / len(values), _gradient_norm(modules[name]))
        for name, values in outputs.items()
    ]


def _gradient_norm(module: nn.Module) -> float:
    squares = [p.grad.square().sum().item() for p in module.parameters() if p.grad is not None]
    return math.sqrt(sum(squares))


def main() -> None:
    """The paper's base networks at full size, batch 4."""
    found = measure(GeneratorConfig.paper_64(), DiscriminatorConfig.paper_64(), batch=4, seed=0)
    for title, spreads in (("G", found.generator), ("D", found.discriminator)):
        print(f"{title}: {'layer':24} activation std   gradient norm")
        for spread in spreads:
            print(f"   {spread.name:24} {spread.activation:14.3f}   {spread.gradient:13.2e}")
    print(f"pixels of G: std {found.image:.3f}")
    print("logits of D: std " + ", ".join(f"{x:.2f}" for x in found.logits))
    draw(found, PICTURE)
    print(f"drawn in {PICTURE}")


def draw(found: Initial, path: Path) -> None:
    """Activations and gradients through depth, both networks."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 7), sharex="col", layout="constrained")
    for column, (title, spreads) in enumerate(
        (("generator", found.generator), ("discriminator", found.discriminator))
    ):
        names = [spread.name for spread in spreads]
        for row, (what, values) in enumerate(
            (
                ("standard deviation of activations", [s.activation for s in spreads]),
                ("norm of gradients", [s.gradient for s in spreads]),
            )
        ):
            axis = axes[row, column]
            axis.semilogy(names, values, "o-", markersize=4)
            axis.grid(alpha=0.3)
            axis.set_ylabel(what)
            axis.tick_params(axis="x", rotation=90, labelsize=8)
        axes[0, column].set_title(f"{title} at 64 px, the paper's size, before the first step")
        axes[0, column].axhspan(0.3, 3, color="tab:green", alpha=0.1)
        axes[0, column].set_ylim(0.03, 30)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
