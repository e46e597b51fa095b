"""The learned text branch T over a frozen encoder's features.

Shape letters in this file:
    B batch, L tokens, D width of the encoder's features, P of its pooled vector, T text width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigagan.config import TextConfig
from gigagan.models.attention import FeedForward, merge_heads, split_heads
from gigagan.models.layers import EqualLinear, rms_normalize


class Text(NamedTuple):
    """What the networks see of a caption."""

    local_BLT: Tensor
    """t_local: one vector per token."""
    mask_BL: Tensor
    """True where there is a real token."""
    global_BT: Tensor
    """t_global: one vector per caption."""


class TextLayer(nn.Module):
    """A pre-norm transformer layer with dot-product attention and a padding mask."""

    def __init__(self, width: int, *, head_width: int, mlp_ratio: int) -> None:
        super().__init__()
        self.to_qkv = EqualLinear(width, 3 * width)
        self.to_out = EqualLinear(width, width)
        self.mlp = FeedForward(width, ratio=mlp_ratio)
        self.head_width = head_width

    def forward(self, x_BLT: Tensor, mask_BL: Tensor) -> Tensor:
        """B L T → B L T."""
        q, k, v = (
            split_heads(part, self.head_width)
            for part in self.to_qkv(rms_normalize(x_BLT)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BL[:, None, None, :])
        x_BLT = x_BLT + self.to_out(merge_heads(mixed))
        return x_BLT + self.mlp(x_BLT)


class TextBranch(nn.Module):
    """T: frozen features → t_local and t_global (GigaGAN, section 3.2).

    The encoder's pooled vector (CLIP's EOT token) goes through the layers as one more token and
    comes out as the global descriptor; all other tokens come out as the local ones.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.from_tokens = EqualLinear(config.encoder_width, config.width)
        self.from_pooled = EqualLinear(config.pooled_width, config.width)
        self.layers = nn.ModuleList(
            TextLayer(config.width, head_width=config.head_width, mlp_ratio=config.mlp_ratio)
            for _ in range(config.depth)
        )

    def forward(self, tokens_BLD: Tensor, mask_BL: Tensor, pooled_BP: Tensor) -> Text:
        """Features of a frozen encoder → what the networks see."""
        pooled_B1T = self.from_pooled(rms_normalize(pooled_BP))[:, None]
        x = torch.cat([pooled_B1T, self.from_tokens(rms_normalize(tokens_BLD))], dim=1)
        mask = torch.cat([torch.ones_like(mask_BL[:, :1]), mask_BL], dim=1)
        for layer in self.layers:
            x = layer(x, mask)
        x = rms_normalize(x)
        return Text(local_BLT=x[:, 1:], mask_BL=mask_BL, global_BT=x[:, 0])
