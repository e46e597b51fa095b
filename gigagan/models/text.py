"""What a network is conditioned on: the learned text branch T, a class, or nothing.

Shape letters in this file:
    B batch, L tokens, D width of the encoder's features, P of its pooled vector, T text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigagan.config import BlockConfig, ClassConfig, TextConfig
from gigagan.models.attention import FeedForward, merge_heads, split_heads
from gigagan.models.encoders import TextFeatures
from gigagan.models.layers import EqualLinear, rms_normalize

Features = TextFeatures | Tensor | None
"""What a network reads: a frozen encoder's features, class numbers B, or nothing."""


class Reader(Protocol):
    """Captions, or names of classes → what networks read of them, on a device."""

    @property
    def device(self) -> torch.device:
        """Where."""

    def __call__(self, captions: Sequence[str], /) -> Features:
        """One per sample."""


def rows_of(features: Features, rows: slice) -> Features:
    """Of some samples of a batch."""
    if isinstance(features, TextFeatures):
        return TextFeatures(*(part[rows] for part in features))
    return None if features is None else features[rows]


class Text(NamedTuple):
    """What the networks see of a caption; of a class only the global descriptor."""

    local_BLT: Tensor | None = None
    """t_local: one vector per token."""
    mask_BL: Tensor | None = None
    """True where there is a real token."""
    global_BT: Tensor | None = None
    """t_global: one vector per caption or class; None in an unconditional network."""
    mean_BT: Tensor | None = None
    """μ(t) of a branch with conditioning augmentation …"""
    log_variance_BT: Tensor | None = None
    """… and log σ²(t)."""

    def repeat_interleave(self, count: int) -> Text:
        """Each sample `count` times in a row."""
        return Text(*(x if x is None else x.repeat_interleave(count, dim=0) for x in self))


class ConditioningAugmentation(nn.Module):
    """A caption's t_global → N(μ(t), diag σ²(t)) (StackGAN, Zhang et al. 2017, section 3.2).

    Before the first step σ is 1, that of the distribution to which the KL term draws it. What the
    networks see has unit mean square, as without it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_mean = EqualLinear(width, width)
        self.to_log_variance = EqualLinear(width, width)
        nn.init.zeros_(self.to_log_variance.weight)

    def forward(self, text: Text) -> Text:
        """The mean for t_global, and the distribution for `scattered`."""
        assert text.global_BT is not None
        mean_BT = self.to_mean(text.global_BT)
        return text._replace(
            global_BT=rms_normalize(mean_BT),
            mean_BT=mean_BT,
            log_variance_BT=self.to_log_variance(text.global_BT),
        )


def scattered(text: Text, noise_BT: Tensor) -> Text:
    """t_global drawn with this N(0, 1) noise: μ + σ ⊙ ε, at unit mean square."""
    assert text.mean_BT is not None
    assert text.log_variance_BT is not None
    drawn_BT = text.mean_BT + (0.5 * text.log_variance_BT).exp() * noise_BT
    return text._replace(global_BT=rms_normalize(drawn_BT))


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
    comes out as the global descriptor; all other tokens come out as the local ones, if anything
    `attends` to them.
    """

    mean_token_D: Tensor
    mean_pooled_P: Tensor

    def __init__(self, config: TextConfig, *, attends: bool) -> None:
        super().__init__()
        self.attends = attends
        self.is_centred = config.centred
        if config.centred:
            self.register_buffer("mean_token_D", torch.zeros(config.encoder_width))
            self.register_buffer("mean_pooled_P", torch.zeros(config.pooled_width))
        self.from_tokens: EqualLinear | None = None
        if attends or config.depth:
            self.from_tokens = EqualLinear(config.encoder_width, config.width)
        self.from_pooled = EqualLinear(config.pooled_width, config.width)
        self.layers = nn.ModuleList(
            TextLayer(config.width, head_width=config.head_width, mlp_ratio=config.mlp_ratio)
            for _ in range(config.depth)
        )
        self.augmentation: ConditioningAugmentation | None = None
        if config.conditioning_augmentation:
            self.augmentation = ConditioningAugmentation(config.width)

    @torch.no_grad()
    def centre(self, mean_token_D: Tensor, mean_pooled_P: Tensor) -> None:
        """Take what all captions of a data set have in common out of every one, from now on.

        Frozen encoders put captions of one kind close together: of MiniLM's vectors for emoji the
        mean has 0.78 of the norm, and what remains is all that tells captions apart.
        """
        self.mean_token_D.copy_(mean_token_D)
        self.mean_pooled_P.copy_(mean_pooled_P)

    def forward(self, features: Features) -> Text:
        """Features of a frozen encoder → what the networks see."""
        if not isinstance(features, TextFeatures):
            raise TypeError(f"a text-conditional network was given {type(features).__name__}")
        tokens_BLD, mask_BL, pooled_BP = features
        if self.is_centred:
            tokens_BLD, pooled_BP = tokens_BLD - self.mean_token_D, pooled_BP - self.mean_pooled_P
        x = self.from_pooled(rms_normalize(pooled_BP))[:, None]
        if self.from_tokens is not None:
            x = torch.cat([x, self.from_tokens(rms_normalize(tokens_BLD))], dim=1)
        mask = torch.cat([torch.ones_like(mask_BL[:, :1]), mask_BL], dim=1)
        for layer in self.layers:
            x = layer(x, mask)
        if not self.attends:
            text = Text(global_BT=rms_normalize(x[:, 0]))
        else:
            x = rms_normalize(x)
            text = Text(local_BLT=x[:, 1:], mask_BL=mask_BL, global_BT=x[:, 0])
        if self.augmentation is not None:
            text = self.augmentation(text)
        return text


class PooledText(TextBranch):
    """The pooled vector of a frozen encoder, centred if asked for, at unit rms. Learns nothing.

    What StyleGAN-T's networks see of a caption. Its published code takes CLIP's joint-space vector
    at unit norm, and so gives it a T-th of this energy: less than 2 % of what the first styles have
    of z.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config, attends=False)
        self.from_pooled = nn.Identity()  # type: ignore[assignment]


class ClassBranch(nn.Module):
    """A learned vector for each class."""

    def __init__(self, config: ClassConfig) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(config.number, config.width))

    def forward(self, features: Features) -> Text:
        """Class numbers B → their vectors, of unit mean square.

        Raises:
            ValueError: a number is not below that of the classes.
        """
        if not isinstance(features, Tensor):
            raise TypeError(f"a class-conditional network was given {type(features).__name__}")
        if features.is_cpu and features.numel():  # a GPU would have to be waited for
            lowest, highest = int(features.min()), int(features.max())
            if not 0 <= lowest <= highest < len(self.vectors):
                raise ValueError(
                    f"classes from {lowest} to {highest}: the network knows 0 to "
                    f"{len(self.vectors) - 1}"
                )
        return Text(global_BT=rms_normalize(self.vectors[features]))


class NoBranch(nn.Module):
    """The text branch of an unconditional network, which reads nothing."""

    def forward(self, features: Features) -> Text:
        """An empty text, whatever the features."""
        return Text()


def vector_branch(text: TextConfig | None, classes: ClassConfig | None) -> nn.Module:
    """The branch of a network that learns no layers over captions."""
    if text is not None:
        return PooledText(text)
    return NoBranch() if classes is None else ClassBranch(classes)


def condition_branch(config: BlockConfig, *, attends: bool) -> nn.Module:
    """The branch that a configuration asks for; `attends`: the network has cross-attention."""
    if config.text is not None:
        return TextBranch(config.text, attends=attends)
    return NoBranch() if config.classes is None else ClassBranch(config.classes)
