"""A baked network as an ONNX file: no PyTorch, no text encoder, where pictures are made.

The generator is fixed to one prompt, and takes z. The upsampler is fixed to one prompt and one
latent, and takes tiles and their noise.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gigagan.common.files import filled_aside
from gigagan.inference.conditions import Condition
from gigagan.models.baking import bake
from gigagan.models.base import BaseGenerator
from gigagan.models.text import Text
from gigagan.models.upsampler import Upsampler

OPSET = 18
ENTRY = "gigagan"
"""Entry of the metadata that holds prompt and provenance as JSON."""
PARITY = 1e-3
"""Largest difference to the original, of pixels in [−1, 1], that is taken for rounding."""


class PromptGenerator(nn.Module):
    """z → the largest image, for one caption that was read once."""

    def __init__(self, network: BaseGenerator, text: Text) -> None:
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
    network: BaseGenerator | Upsampler,
    told: Condition,
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
    _check_packages()
    text = _alone(network.read(told([prompt])))
    module, inputs, others = _module(network, text, torch.Generator().manual_seed(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    with filled_aside(path) as partial:
        _trace(partial, network, module, inputs)
        _describe(partial, {"prompt": prompt, "seed": seed, **(about or {})})
        difference = _difference(partial, network, module, others)
        if not difference <= PARITY:
            raise ValueError(f"{path} would draw otherwise than the original, by {difference:.1e}")
    return difference


def _check_packages() -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):  # the last is what torch exports with
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"an .onnx needs the package {name}: `pip install -e .[use]`")


def _alone(text: Text) -> Text:
    """The text of one caption without padding; outside inference mode, which cannot be traced."""
    text = Text(*(None if x is None else x.clone() for x in text))
    if text.mask_BL is None or text.local_BLT is None:
        return text
    kept_L = text.mask_BL[0]
    return Text(text.local_BLT[:, kept_L], text.mask_BL[:, kept_L], text.global_BT)


def _trace(
    path: Path, network: BaseGenerator | Upsampler, module: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    """Write the module as ONNX, as it runs on these inputs."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            inputs,
            str(path),
            input_names=list(_names(network)),
            output_names=["image_out"],
            dynamic_shapes=_dynamic(network),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _describe(path: Path, about: Mapping[str, Any]) -> None:
    """Write prompt and provenance into the file's metadata, and check the file."""
    import onnx

    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, {ENTRY: json.dumps(about, ensure_ascii=False)})
    onnx.save(model, str(path))
    onnx.checker.check_model(str(path))


def _difference(
    path: Path, network: BaseGenerator | Upsampler, module: nn.Module, inputs: tuple[Tensor, ...]
) -> float:
    """The largest difference of a pixel between the file in onnxruntime and the module."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # it would call its maker
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {name: x.numpy() for name, x in zip(_names(network), inputs, strict=True)}
    return float(np.abs(session.run(None, feed)[0] - module(*inputs).numpy()).max())


def read_about(path: Path) -> dict[str, Any] | None:
    """What `export` wrote into the metadata; None for any other file."""
    try:
        import onnx

        props = onnx.load(str(path), load_external_data=False).metadata_props
        return dict(json.loads(next(prop.value for prop in props if prop.key == ENTRY)))
    except Exception:  # protobuf raises anything
        return None


def _module(
    network: BaseGenerator | Upsampler, text: Text, random: torch.Generator
) -> tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What is exported, inputs to trace it by, and others to check it with."""
    Z = network.config.latent_dim
    if not isinstance(network, Upsampler):
        module: nn.Module = PromptGenerator(network, text)
        first = (torch.randn(1, Z, generator=random),)
        return module.eval(), first, (torch.randn(1, Z, generator=random),)
    module = StyleUpsampler(network, text, torch.randn(1, Z, generator=random))
    side = network.config.input_resolution

    def tiles(count: int) -> tuple[Tensor, ...]:
        shape = (count, 3, side, side)
        return torch.rand(shape, generator=random) * 2 - 1, torch.randn(shape, generator=random)

    return module.eval(), tiles(2), tiles(3)


def _names(network: BaseGenerator | Upsampler) -> tuple[str, ...]:
    """What the inputs of the file are called."""
    return ("image", "noise") if isinstance(network, Upsampler) else ("z",)


def _dynamic(network: BaseGenerator | Upsampler) -> Any:
    """Any number of tiles; one z at a time, as kernels depend on it."""
    if not isinstance(network, Upsampler):
        return None
    return ({0: "tiles"}, {0: "tiles"})
