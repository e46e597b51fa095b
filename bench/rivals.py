"""The networks and training steps of two other packages, at sizes like those of ours.

Nothing of theirs is changed, and neither needs a flag to run on a CPU. gigagan-pytorch runs without
text, because its text branch wants CLIP's weights. It trains with its own trainer; where speed is
measured, without an average of the generator's weights (as ours). Its networks come in two layouts,
both with about the parameters of ours:

- `gigagan_pytorch`: what it builds unless told otherwise, only narrower: attention of 512 channels
  at 16 and 32 px, and a decoder that reconstructs D's input.
- `gigagan_pytorch.alike`: maps and attention as ours has them at each resolution, and no decoder.

For pictures rather than speed there are two larger ones, of 20 M and 6 M parameters at 32 px:
`gigagan_pytorch.large` is all defaults but the number of maps; `gigagan_pytorch.large8` differs in
the resolution of attention alone, 8 px: that at 32 px takes most of a step's time on a CPU.

AuraSR's published network has 617.6 M parameters at `dim=64`; `dim` scales all of its widths but
those of the style network and of the attention heads.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

Calls = dict[str, Callable[[], object]]
Parts = dict[str, nn.Module]
Arguments = Mapping[tuple[str, int], dict[str, Any]]

GENERATORS: Arguments = {
    ("gigagan_pytorch", 32): {
        "dim_capacity": 10,
        "dim_latent": 128,
        "style_network": {"dim": 256, "depth": 3},
    },
    ("gigagan_pytorch", 64): {
        "dim_capacity": 11,
        "dim_latent": 256,
        "style_network": {"dim": 256, "depth": 3},
    },
    ("gigagan_pytorch.large", 32): {
        "dim_capacity": 28,
        "style_network": {"dim": 512, "depth": 4},
    },
    ("gigagan_pytorch.large8", 32): {
        "dim_capacity": 28,
        "style_network": {"dim": 512, "depth": 4},
        "self_attn_resolutions": (8,),
    },
    ("gigagan_pytorch.alike", 32): {
        "dim_capacity": 12,
        "dim_max": 128,
        "dim_latent": 128,
        "style_network": {"dim": 256, "depth": 6},
        "self_attn_resolutions": (8,),
    },
    ("gigagan_pytorch.alike", 64): {
        "dim_capacity": 16,
        "dim_max": 256,
        "dim_latent": 256,
        "style_network": {"dim": 256, "depth": 3},
        "self_attn_resolutions": (8, 16),
    },
}
NARROW_ATTENTION = {
    "self_attn_dim_head": 32,
    "self_attn_heads": 4,
    "self_attn_ff_mult": 2,
}
DISCRIMINATORS: Arguments = {
    ("gigagan_pytorch", 32): {"dim_capacity": 9},
    ("gigagan_pytorch", 64): {"dim_capacity": 10},
    ("gigagan_pytorch.large", 32): {"dim_capacity": 17},
    ("gigagan_pytorch.large8", 32): {"dim_capacity": 17, "attn_resolutions": (8,)},
    ("gigagan_pytorch.alike", 32): {
        "dim_capacity": 12,
        "dim_max": 128,
        "attn_resolutions": (8,),
    },
    ("gigagan_pytorch.alike", 64): {
        "dim_capacity": 16,
        "dim_max": 256,
        "attn_resolutions": (8, 16),
    },
}
NARROW_ATTENTION_NO_DECODER = {
    "attn_dim_head": 32,
    "attn_heads": 4,
    "ff_mult": 2,
    "aux_recon_resolutions": (),
    "aux_recon_patch_dims": (),
    "aux_recon_frac_patches": (),
}
AURA_SR: dict[str, Any] = {
    "dim": 16,
    "image_size": 256,
    "input_image_size": 64,
    "style_network": {"dim_in": 128, "dim_out": 512, "depth": 4},
}


def generator(layout: str, side: int) -> Any:
    """gigagan-pytorch's generator."""
    from gigagan_pytorch import Generator

    alike = NARROW_ATTENTION if layout.endswith(".alike") else {}
    return Generator(image_size=side, unconditional=True, **alike, **GENERATORS[layout, side])


def discriminator(layout: str, side: int) -> Any:
    """gigagan-pytorch's discriminator."""
    from gigagan_pytorch import Discriminator

    alike = NARROW_ATTENTION_NO_DECODER if layout.endswith(".alike") else {}
    arguments = DISCRIMINATORS[layout, side]
    return Discriminator(image_size=side, unconditional=True, **alike, **arguments)


def networks(layout: str, side: int, batch: int) -> tuple[Parts, Calls]:
    """Each network forward, and forward and backward."""
    g, d = generator(layout, side), discriminator(layout, side)
    z = torch.randn(batch, g.style_network.dim)
    image = torch.rand(batch, 3, side, side)
    pyramid = d.real_images_to_rgbs(image)

    def judge() -> torch.Tensor:
        logits, others, _ = d(image, pyramid, calc_aux_loss=False)
        return torch.stack([x.sum() for x in (logits, *others)]).sum()

    return {"G": g, "D": d}, passes(lambda: g(noise=z).sum(), judge)


def passes(generate: Callable[[], torch.Tensor], judge: Callable[[], torch.Tensor]) -> Calls:
    """The four calls of the networks' benchmark from what sums up each one's output."""
    return {
        "G forward": lambda: without_gradients(generate),
        "D forward": lambda: without_gradients(judge),
        "G forward, backward": lambda: generate().backward(),
        "D forward, backward": lambda: judge().backward(),
    }


def without_gradients(call: Callable[[], object]) -> object:
    """Forward as in use: nothing is kept for a backward."""
    with torch.inference_mode():
        return call()


def trainer(layout: str, side: int, **settings: Any) -> Any:
    """Its own trainer on a CPU, all defaults but `settings`; it prints nothing to stdout here."""
    from gigagan_pytorch import GigaGAN

    folder = Path(tempfile.mkdtemp())  # it makes two folders whether it writes to them or not
    with contextlib.redirect_stdout(sys.stderr):
        return GigaGAN(
            generator=generator(layout, side),
            discriminator=discriminator(layout, side),
            model_folder=str(folder / "models"),
            results_folder=str(folder / "results"),
            accelerate_kwargs={"cpu": True},
            **settings,
        )


def settings(layout: str) -> dict[str, Any]:
    """What its trainer must be told of a layout: where D has no decoder, none reconstructs."""
    return {"discr_aux_recon_loss_weight": 0.0} if layout.endswith(".alike") else {}


def step(
    trainer: Any, images: Iterator[torch.Tensor], batch: int, *, penalize: bool
) -> dict[str, float]:
    """One update of D, then one of G, as its training loop makes them; the losses it reports."""
    of_d = trainer.train_discriminator_step(dl_iter=images, apply_gradient_penalty=penalize)
    of_g = trainer.train_generator_step(batch_size=batch, dl_iter=images)
    return {
        f"{player}/{name}": float(value)
        for player, losses in (("d", of_d), ("g", of_g))
        for name, value in losses._asdict().items()
        if value is not None
    }


def train(layout: str, side: int, batch: int) -> tuple[Parts, Calls]:
    """A step of its own trainer, for D and for G."""
    own = trainer(layout, side, create_ema_generator_at_init=False, **settings(layout))
    image_BCHW = torch.rand(batch, 3, side, side)
    images = (image_BCHW.clone() for _ in itertools.count())
    calls: Calls = {
        "step": lambda: step(own, images, batch, penalize=False),
        "step with penalty": lambda: step(own, images, batch, penalize=True),
    }
    return {"G": own.G, "D": own.D}, calls


def sample(layout: str, side: int, batch: int) -> tuple[Parts, Calls]:
    """Images from latents."""
    g = generator(layout, side).eval()
    z = torch.randn(batch, g.style_network.dim)
    return {"G": g}, {"sample": lambda: without_gradients(lambda: g(noise=z))}


def upsample(layout: str, batch: int) -> tuple[Parts, Calls]:
    """AuraSR on tiles."""
    from aura_sr import UnetUpsampler

    network = UnetUpsampler(**AURA_SR).eval()
    small, z = torch.rand(batch, 3, 64, 64), torch.randn(batch, 128)
    call = lambda: without_gradients(lambda: network(small, noise=z))  # noqa: E731
    return {"upsampler": network}, {"upsample": call}
