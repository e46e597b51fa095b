"""Attention: L2 self-attention with tied keys and a style token, cross-attention to text.

Shape letters in this file:
    B batch, H heads, L queries, M keys, D head width, C channels, S style, T text width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigagan.config import BlockConfig
from gigagan.models.layers import (
    ACTIVATION_GAIN,
    EqualLinear,
    activate,
    add_residual,
    full_precision,
    residual_weights,
    rms_normalize,
)

EXTRA_WIDTH = 8
"""Head dimensions added for the last term; one would do, but GPU kernels want multiples of 8."""


def l2_attention(
    q_BHLD: Tensor,
    k_BHMD: Tensor,
    v_BHMD: Tensor,
    *,
    scale: float,
    double_backward: bool = False,
) -> Tensor:
    """softmax_m(−scale · ‖q_l − k_m‖²) · v (GigaGAN, section 3.3; Kim et al. 2021).

    The softmax ignores terms that do not depend on m, so −σ‖q − k‖² may be replaced by
    2σ q·k − σ‖k‖², whose last term rides in one extra head dimension: an ordinary fused
    attention. Values get an empty one too, since fused kernels want equal widths and are left
    without a word otherwise. They cannot be differentiated twice: `double_backward=True` takes
    the explicit form, which can (the R1 penalty needs it).
    """
    if double_backward:
        squares_BHLM = (
            q_BHLD.square().sum(-1, keepdim=True)
            + k_BHMD.square().sum(-1)[:, :, None, :]
            - 2 * q_BHLD @ k_BHMD.transpose(-1, -2)
        )
        weights_BHLM = (-scale * full_precision(squares_BHLM)).softmax(-1).to(v_BHMD.dtype)
        return weights_BHLM @ v_BHMD
    ones_BHLE = F.pad(torch.ones_like(q_BHLD[..., :1]), (0, EXTRA_WIDTH - 1))
    half_norm_BHM1 = k_BHMD.square().sum(-1, keepdim=True) / 2
    q = torch.cat([q_BHLD, ones_BHLE], dim=-1)
    k = torch.cat([k_BHMD, F.pad(-half_norm_BHM1, (0, EXTRA_WIDTH - 1))], dim=-1)
    v = F.pad(v_BHMD, (0, EXTRA_WIDTH))
    return F.scaled_dot_product_attention(q, k, v, scale=2 * scale)[..., : v_BHMD.shape[-1]]


def split_heads(x_BLC: Tensor, head_width: int) -> Tensor:
    """B L C → B H L D."""
    B, L, C = x_BLC.shape
    return x_BLC.reshape(B, L, C // head_width, head_width).transpose(1, 2)


def merge_heads(x_BHLD: Tensor) -> Tensor:
    """B H L D → B L C."""
    B, H, L, D = x_BHLD.shape
    return x_BHLD.transpose(1, 2).reshape(B, L, H * D)


class SelfAttention(nn.Module):
    """L2 self-attention over positions, queries and keys tied, the style w as one more token."""

    def __init__(
        self,
        channels: int,
        *,
        head_width: int,
        scale: float | None,
        style_dim: int | None,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.to_qk = EqualLinear(channels, channels, bias=None)
        self.to_v = EqualLinear(channels, channels, bias=None)
        self.to_out = EqualLinear(channels, channels, gain=gain)
        self.style_token = None if style_dim is None else EqualLinear(style_dim, channels)
        self.head_width = head_width
        # Tied keys of unit variance lie √(2d) apart: 1/d keeps the self weight moderate.
        self.scale = 1 / head_width if scale is None else scale

    def forward(
        self, x_BLC: Tensor, style_BS: Tensor | None = None, *, double_backward: bool = False
    ) -> Tensor:
        """B L C and B S (or 1 S for all) → B L C."""
        tokens_BMC = self._tokens(x_BLC, style_BS)
        k = split_heads(self.to_qk(tokens_BMC), self.head_width)
        v = split_heads(self.to_v(tokens_BMC), self.head_width)
        q = k[:, :, : x_BLC.shape[1]]
        mixed = l2_attention(q, k, v, scale=self.scale, double_backward=double_backward)
        return self.to_out(merge_heads(mixed))

    def self_weight(self, x_BLC: Tensor, style_BS: Tensor | None = None) -> Tensor:
        """Mean weight that a position gives itself: 1 / Σ_m exp(−σ ‖k_l − k_m‖²).

        With tied keys its distance to itself is zero. The style token is among the M keys. One
        sample at a time, since weights of a whole batch would be the largest tensor of a run.
        """
        L, tokens_BMC = x_BLC.shape[1], self._tokens(x_BLC, style_BS)
        means = []
        for keys_HMD in full_precision(split_heads(self.to_qk(tokens_BMC), self.head_width)):
            norms_HM = keys_HMD.square().sum(-1)
            products_HLM = keys_HMD[:, :L] @ keys_HMD.transpose(-1, -2)
            squares_HLM = norms_HM[:, :L, None] + norms_HM[:, None, :] - 2 * products_HLM
            weights_HLM = (-self.scale * squares_HLM).softmax(-1)
            means.append(weights_HLM.diagonal(dim1=-2, dim2=-1).mean())
        return torch.stack(means).mean()

    def _tokens(self, x_BLC: Tensor, style_BS: Tensor | None) -> Tensor:
        """What is attended to: the normalised positions, then the style's token if there is one."""
        x_BLC = rms_normalize(x_BLC)
        if self.style_token is None:
            return x_BLC
        assert style_BS is not None
        token_BC = rms_normalize(self.style_token(style_BS)).expand(len(x_BLC), -1)
        return torch.cat([x_BLC, token_BC[:, None].to(x_BLC.dtype)], dim=1)


class CrossAttention(nn.Module):
    """Positions ask the caption's tokens: dot-product attention with a padding mask."""

    def __init__(
        self, channels: int, *, text_width: int, head_width: int, gain: float = 1.0
    ) -> None:
        super().__init__()
        self.to_q = EqualLinear(channels, channels, bias=None)
        self.to_k = EqualLinear(text_width, channels, bias=None)
        self.to_v = EqualLinear(text_width, channels, bias=None)
        self.to_out = EqualLinear(channels, channels, gain=gain)
        self.head_width = head_width

    def forward(self, x_BLC: Tensor, text_BMT: Tensor, mask_BM: Tensor) -> Tensor:
        """B L C, B M T and B M (true = a real token; or 1 M T and 1 M for all) → B L C."""
        q = split_heads(self.to_q(rms_normalize(x_BLC)), self.head_width)
        k = split_heads(self.to_k(text_BMT), self.head_width).expand(len(q), -1, -1, -1)
        v = split_heads(self.to_v(text_BMT), self.head_width).expand(len(q), -1, -1, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BM[:, None, None, :])
        return self.to_out(merge_heads(mixed))


class FeedForward(nn.Module):
    """Two linear layers around one activation, on normalised positions."""

    def __init__(self, channels: int, *, ratio: int, gain: float = 1.0) -> None:
        super().__init__()
        self.expand = EqualLinear(channels, channels * ratio, gain=ACTIVATION_GAIN)
        self.contract = EqualLinear(channels * ratio, channels, gain=gain)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """B L C → B L C."""
        return self.contract(activate(self.expand(rms_normalize(x_BLC))))


class AttentionBlock(nn.Module):
    """Self-attention, MLP, and where there is text cross-attention and another MLP.

    Every branch is added with a reduced gain (GigaGAN, section 3.3).
    """

    def __init__(
        self,
        channels: int,
        config: BlockConfig,
        *,
        style_dim: int | None = None,
        text_width: int | None = None,
    ) -> None:
        super().__init__()
        width, ratio = config.head_width, config.mlp_ratio
        self.trunk_weight, gain = residual_weights(config.attention_gain)
        self.self_attention = SelfAttention(
            channels,
            head_width=width,
            scale=config.attention_scale,
            style_dim=style_dim,
            gain=gain,
        )
        self.self_mlp = FeedForward(channels, ratio=ratio, gain=gain)
        self.cross_attention: CrossAttention | None = None
        if text_width is not None:
            self.cross_attention = CrossAttention(
                channels, text_width=text_width, head_width=width, gain=gain
            )
            self.cross_mlp = FeedForward(channels, ratio=ratio, gain=gain)

    def forward(
        self,
        x_BCHW: Tensor,
        style_BS: Tensor | None = None,
        text_BMT: Tensor | None = None,
        mask_BM: Tensor | None = None,
        *,
        double_backward: bool = False,
    ) -> Tensor:
        """B C H W → the same."""
        height = x_BCHW.shape[2]
        x = x_BCHW.flatten(2).transpose(1, 2)
        x = self._add(x, self.self_attention(x, style_BS, double_backward=double_backward))
        x = self._add(x, self.self_mlp(x))
        if self.cross_attention is not None:
            assert text_BMT is not None
            assert mask_BM is not None
            x = self._add(x, self.cross_attention(x, text_BMT, mask_BM))
            x = self._add(x, self.cross_mlp(x))
        return x.transpose(1, 2).unflatten(2, (height, -1))

    def _add(self, x_BLC: Tensor, branch_BLC: Tensor) -> Tensor:
        return add_residual(x_BLC, branch_BLC, self.trunk_weight)
