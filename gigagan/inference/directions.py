"""Attribute directions: what changes in w and t from one kind of prompt to another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gigagan.models import tensors
from gigagan.models.text import Text

if TYPE_CHECKING:
    from gigagan.inference.sampler import Sampler

FORMAT = "gigagan-direction-1"
LATENTS = 64
"""Over which the means are taken."""


class DirectionError(ValueError):
    """A file that is no direction, or one of another network."""


@dataclass(frozen=True)
class Direction:
    """A difference of means: from prompts without an attribute to the same ones with it."""

    style_S: Tensor
    """In w."""
    global_T: Tensor
    """In t_global."""
    about: dict[str, Any]


@dataclass(frozen=True)
class Shift:
    """A direction with its strength: 0 changes nothing, 1 is the mean difference found."""

    direction: Direction
    strength: float
    space: Literal["w", "t"] = "w"
    """Move the style itself, or the text that it is made of together with z."""

    def of_style(self, style_BS: Tensor) -> Tensor:
        """w, moved if that is where to move."""
        if self.space != "w":
            return style_BS
        return style_BS + self.strength * self.direction.style_S.to(style_BS)

    def of_text(self, text: Text) -> Text:
        """t_global, moved if that is where to move; tokens stay."""
        if self.space != "t" or text.global_BT is None:
            return text
        moved_BT = text.global_BT + self.strength * self.direction.global_T.to(text.global_BT)
        return text._replace(global_BT=moved_BT)


@torch.inference_mode()
def find(
    sampler: Sampler, without: Sequence[str], having: Sequence[str], *, num_latents: int = LATENTS
) -> Direction:
    """The mean difference in w and t over pairs of prompts, each pair at the same latents.

    What moves along it in w leaves t_local alone: layout and words stay those of the prompt.

    Raises:
        ValueError: no pairs, or lists of different lengths.
    """
    about = described(without, having, num_latents)
    z_BZ = sampler.latents(num_latents, seed=0).to(sampler.device)
    styles, texts = [], []
    for prompts in (without, having):
        text = sampler.base.read(sampler.encoder.encode(list(prompts)))
        global_PT = text.global_BT
        if global_PT is None:
            raise ValueError("the network reads no text: it has no such directions")
        rows = Text(global_BT=global_PT.repeat_interleave(num_latents, dim=0))
        styles.append(sampler.base.style(z_BZ.repeat(len(prompts), 1), rows).mean(0))
        texts.append(global_PT.mean(0))
    return Direction(styles[1] - styles[0], texts[1] - texts[0], about)


def described(
    without: Sequence[str], having: Sequence[str], num_latents: int = LATENTS
) -> dict[str, Any]:
    """What a direction of these pairs says of itself; ValueError if they are no pairs."""
    if not without or len(without) != len(having):
        raise ValueError(
            f"{len(without)} prompts without and {len(having)} with the attribute: give pairs"
        )
    return {"without": list(without), "having": list(having), "latents": num_latents}


def save(path: Path, direction: Direction) -> None:
    """Write a direction as safetensors, whole or not at all."""
    told = json.dumps({"format": FORMAT, **direction.about}, ensure_ascii=False)
    values = {"style": direction.style_S.clone(), "global": direction.global_T.clone()}
    tensors.write(path, values, {"direction": told})


def read_about(path: Path) -> dict[str, Any] | None:
    """What `save` was told; None for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {}).get("direction", "{}"))
    except (SafetensorError, OSError, ValueError):
        return None
    return about if about.pop("format", None) == FORMAT else None


def load(path: Path, sampler: Sampler) -> Direction:
    """A direction that was found with a network of the same widths; else DirectionError."""
    try:
        with tensors.opened(path) as file:
            if (about := read_about(path)) is None:
                raise DirectionError(f"{path} is no direction: `gigagan edit direction` writes one")
            direction = Direction(file.get_tensor("style"), file.get_tensor("global"), about)
    except ValueError as error:
        raise DirectionError(str(error)) from error
    wide = sampler.base.config.style_dim
    if len(direction.style_S) != wide:
        raise DirectionError(
            f"{path} is for styles of {len(direction.style_S)}, this network's have {wide}: find "
            "it again with this network"
        )
    return direction
