"""What a frozen text or image encoder gives, whichever model is behind it. No weights here.

Shape letters: B batch, L tokens, D features, C colour or channels, H W image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn


class TextFeatures(NamedTuple):
    """Features of a batch of captions, padded to the longest; float32."""

    tokens_BLD: Tensor
    mask_BL: Tensor
    """True where there is a token, False at padding."""
    pooled_BD: Tensor
    """One vector per caption; its width may differ from that of the tokens."""


class TextEncoder(ABC):
    """Captions to features. Not an `nn.Module`: it can never enter a state dict or an optimizer."""

    name: str
    width: int
    """Features per token."""
    pooled_width: int
    max_tokens: int
    """Longer captions are truncated; the end token is kept."""

    @abstractmethod
    def count_tokens(self, caption: str) -> int:
        """How many tokens it has, start and end among them, before anything is cut."""

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Encode at least one caption; the result does not depend on the rest of the batch."""


class LearnableTextEncoder(TextEncoder):
    """One that can be had with other weights, and that gradients can go through."""

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Encode captions; fastest when those of a batch are of like length."""
        return self.features(captions)

    @abstractmethod
    def features(self, captions: Sequence[str]) -> TextFeatures:
        """What `encode` gives, with gradients where the weights want them."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """All that `features` depends on, by name."""

    @abstractmethod
    def with_weights(self, weights: Mapping[str, Tensor]) -> Self:
        """The same encoder with these in place of its own; gradients reach them."""


class ImageFeatures(NamedTuple):
    """Features of a batch of images."""

    pooled_BD: Tensor
    stages: list[Tensor]
    """Feature maps [B, C, H, W], from fine to coarse; or tokens [B, L, C], from the first on."""


class ImageEncoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to features; frozen, and differentiable in its input.

    It has neither parameters nor entries in a state dict, so that a network may hold one.
    """

    name: str
    width: int
    """Features in the pooled vector."""
    stage_channels: tuple[int, ...]
    image_size: int | None
    """The only input size in pixels that the model takes, or None if it takes any from 32 px."""

    def forward(self, x_BCHW: Tensor) -> ImageFeatures:
        """Return the features; never resizes, that is the caller's choice."""
        raise NotImplementedError


def with_class_token(tokens_BLC: Tensor) -> Tensor:
    """Add the class token, the first, to every other one, and drop it (DPT's "add" readout)."""
    return tokens_BLC[:, 1:] + tokens_BLC[:, :1]
