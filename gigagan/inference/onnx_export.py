"""A baked network as an ONNX file: no PyTorch, no text encoder, where pictures are made.

The generator is fixed to one prompt, and takes z. The upsampler is fixed to one prompt and one
latent, and takes tiles and their noise.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gigagan.models.baking import bake
from gigagan.models.encoders import TextEncoder
from gigagan.models.generator import Generator
from gigagan.models.text import Text
from gigagan.models.upsampler import Upsampler

OPSET = 18
ENTRY = "gigagan"
"""Entry of the metadata that holds prompt and provenance as JSON."""
PARITY = 1e-3
"""Largest difference to the original, of pixels in [−1, 1], that is taken for rounding."""
_INPUTS = {"generator": ("z",), "upsampler": ("image", "noise")}


class PromptGenerator(nn.Module):
    """z → the largest image, for one caption that was read once."""

    def __init__(self, network: Generator, text: Text) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("local_1LT", text.local_BLT)
        self.register_buffer("mask_1L", text.mask_BL)
        self.register_buffer("global_1T", text.global_BT)

    def forward(self, z_1Z: Tensor) -> Tensor:
        """1 Z → 1 C H W in [−1, 1], roughly."""
        text = Text(self.local_1LT, self.mask_1L, self.global_1T)  # type: ignore[arg-type]
        return self.network.synthesize(self.network.style(z_1Z, text), text)[0]


class StyleUpsampler(nn.Module):
    """Tiles and noise → larger tiles, of one style and caption."""

    def __init__(self, network: Upsampler, text: Text, z_1Z: Tensor) -> None:
        super().__init__()
        self.baked = bake(network, network.style(z_1Z, text)[0], text)

    def forward(self, small_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
        """B C h w each → B C H W."""
        image_BCHW: Tensor = self.baked(small_BCHW, noise_BCHW)[0]
        return image_BCHW


@torch.no_grad()
def export(
    path: Path,
    network: Generator | Upsampler,
    encoder: TextEncoder,
    prompt: str,
    *,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> float:
    """Write the network fixed to a prompt; returns the largest difference to it in onnxruntime.

    The difference is over pixels in [−1, 1], on inputs that were not traced; the file is only put
    in its place after it ran. `about` goes into its metadata beside prompt and seed.

    Raises:
        ValueError: the packages onnx, onnxscript and onnxruntime are not installed; or the file
            draws otherwise than the network, and is not kept.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # what torch exports with
    except ModuleNotFoundError as error:
        raise ValueError(
            f"an .onnx needs the package {error.name}: `pip install -e .[use]`"
        ) from error
    text = network.read(encoder.encode([prompt]))
    text = Text(*(None if x is None else x.clone() for x in text))
    if text.mask_BL is not None and text.local_BLT is not None:
        kept_L = text.mask_BL[0]
        text = Text(text.local_BLT[:, kept_L], text.mask_BL[:, kept_L], text.global_BT)
    random = torch.Generator().manual_seed(seed)
    module, inputs, others = _module(network, text, random)
    names = _INPUTS["generator" if isinstance(network, Generator) else "upsampler"]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.onnx")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                inputs,
                str(partial),
                input_names=list(names),
                output_names=["image_out"],
                dynamic_shapes=_dynamic(network),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        model = onnx.load(str(partial))
        described = {"prompt": prompt, "seed": seed, **(about or {})}
        onnx.helper.set_model_props(model, {ENTRY: json.dumps(described, ensure_ascii=False)})
        onnx.save(model, str(partial))
        onnx.checker.check_model(str(partial))
        onnxruntime.disable_telemetry_events()  # it would call its maker
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        feed = {name: x.numpy() for name, x in zip(names, others, strict=True)}
        theirs = session.run(None, feed)[0]
        difference = float(np.abs(theirs - module(*others).numpy()).max())
        if not difference <= PARITY:
            raise ValueError(f"{path} would draw otherwise than the original, by {difference:.1e}")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return difference


def read_about(path: Path) -> dict[str, Any] | None:
    """What `export` wrote into the metadata; None for any other file."""
    try:
        import onnx

        props = onnx.load(str(path), load_external_data=False).metadata_props
        return dict(json.loads(next(prop.value for prop in props if prop.key == ENTRY)))
    except Exception:  # protobuf raises anything
        return None


def _module(
    network: Generator | Upsampler, text: Text, random: torch.Generator
) -> tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What is exported, inputs to trace it by, and others to check it with."""
    Z = network.config.latent_dim
    if isinstance(network, Generator):
        module: nn.Module = PromptGenerator(network, text)
        first = (torch.randn(1, Z, generator=random),)
        return module.eval(), first, (torch.randn(1, Z, generator=random),)
    module = StyleUpsampler(network, text, torch.randn(1, Z, generator=random))
    side = network.config.input_resolution

    def tiles(count: int) -> tuple[Tensor, ...]:
        shape = (count, 3, side, side)
        return torch.rand(shape, generator=random) * 2 - 1, torch.randn(shape, generator=random)

    return module.eval(), tiles(2), tiles(3)


def _dynamic(network: Generator | Upsampler) -> Any:
    """Any number of tiles; one z at a time, as kernels depend on it."""
    if isinstance(network, Generator):
        return None
    return ({0: "tiles"}, {0: "tiles"})
