"""The exponential moving average of a generator's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

from gigagan.config import OptimizerConfig

Network = TypeVar("Network", bound=nn.Module)


class Ema(Generic[Network]):
    """A frozen copy that follows the network with a half-life counted in images."""

    def __init__(self, network: Network, config: OptimizerConfig) -> None:
        self.network: Network = copy.deepcopy(network).eval().requires_grad_(False)
        self.half_life = config.ema_half_life_images
        self.ramp = config.ema_ramp

    def half_life_at(self, images_seen: int) -> float:
        """In images: ramp · images seen, up to the full one (StyleGAN2-ADA's `ema_rampup`)."""
        return min(self.half_life, self.ramp * images_seen)

    def decay(self, images_seen: int, batch_size: int) -> float:
        """β of one step: 0.5 ** (batch / half-life)."""
        return 0.5 ** (batch_size / max(self.half_life_at(images_seen), 1e-8))

    @torch.no_grad()
    def update(self, network: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move every weight towards the network's; buffers are copied."""
        beta = self.decay(images_seen, batch_size)
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - beta)
        for mine, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights."""
        return self.network.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take them back."""
        self.network.load_state_dict(state)
