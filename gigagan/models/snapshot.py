"""A snapshot: averaged weights for users, in safetensors, with the network's config inside.

It holds no optimizer and no random state: that is the checkpoint's business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from gigagan.config import AnyGenerator, UpsamplerConfig
from gigagan.models import tensors
from gigagan.models.base import BaseGenerator, base_generator
from gigagan.models.upsampler import Upsampler

FORMAT = "gigagan-snapshot-1"
ENTRY = "snapshot"


class SnapshotError(ValueError):
    """A file that is not a snapshot this version can open."""


def save(
    path: Path,
    network: BaseGenerator | Upsampler,
    about: Mapping[str, object],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the network's weights with its config; `about` says where they come from.

    `dtype` rounds floating-point weights, bfloat16 to half the size; `load` gives float32 again.
    """
    described = {
        "format": FORMAT,
        "kind": "upsampler" if isinstance(network, Upsampler) else "base",
        "config": network.config.model_dump(mode="json"),
        "about": dict(about),
    }
    weights = {
        name: (value.to(dtype) if dtype and value.is_floating_point() else value).contiguous()
        for name, value in network.state_dict().items()
    }
    # A single entry: the order of several is not fixed, and equal weights shall be equal bytes.
    tensors.write(path, weights, {ENTRY: json.dumps(described)})


def read_about(path: Path) -> dict[str, object] | None:
    """What `save` was told; None for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {})[ENTRY])
        return dict(described["about"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def load(path: Path, *, device: str = "cpu") -> tuple[BaseGenerator | Upsampler, dict[str, object]]:
    """The frozen network in evaluation mode, and what `save` was told about it.

    Raises:
        SnapshotError: the file is missing, damaged, or of another format.
    """
    if not path.is_file():
        raise SnapshotError(f"{path}: no such snapshot; training writes snapshot.safetensors")
    try:
        with tensors.opened(path, device=device) as file:
            described = json.loads((file.metadata() or {}).get(ENTRY, "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except ValueError as error:
        raise SnapshotError(str(error)) from error
    if described.get("format") != FORMAT:
        found = str(described.get("format"))
        is_ours = found.startswith(FORMAT.rstrip("0123456789"))
        raise SnapshotError(
            f"{path}: format {found!r} in its metadata, expected {FORMAT!r}"
            + ("; it was written by a newer version: upgrade gigagan" if is_ours else "")
        )
    network: BaseGenerator | Upsampler
    try:
        if described["kind"] == "base":
            section = TypeAdapter(AnyGenerator).validate_python(described["config"])
            network = base_generator(section)
        else:
            network = Upsampler(UpsamplerConfig.model_validate(described["config"]))
        network.load_state_dict(weights)
    except (ValidationError, RuntimeError) as error:
        raise SnapshotError(
            f"{path}: config and weights do not fit this version (if it was written by a newer "
            f"version, upgrade gigagan): {error}"
        ) from error
    return network.to(device).eval().requires_grad_(False), described["about"]
