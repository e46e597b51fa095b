"""The critic's heads on a frozen encoder: spectral norm, local batch norm, a logit per position.

As in StyleGAN-T (Sauer et al. 2023); "code" is github.com/autonomousvision/stylegan-t. The encoder
itself is passed features, never held here: it stays out of every state dict.

Shape letters in this file:
    B batch, C I O channels, H W maps, L tokens, N positions (H·W or L), M logit maps, T text width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gigagan.config.projected import ProjectedConfig
from gigagan.models.layers import (
    EqualLinear,
    activate,
    full_precision,
    upsample,
    without_autocast,
)
from gigagan.models.text import Features, Text, vector_branch


class SpectralConv(nn.Module):
    """A convolution whose filter, as a matrix O × (I·h·w), has largest singular value 1.

    One step of the power method in each forward pass of training (Miyato et al. 2018, algorithm 1),
    in float32 whatever the precision around it; its vectors are buffers. Over maps it pads with
    zeros; along tokens it is circular (code).
    """

    weight: Tensor

    def __init__(
        self, in_maps: int, out_maps: int, size: tuple[int, ...], *, bias: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_maps, in_maps, *size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # torch's own for convolutions
        self.bias = nn.Parameter(torch.zeros(out_maps)) if bias else None
        spectral_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        """B I H W → B O H W, or B I L → B O L."""
        with without_autocast(x.device):
            weight = self.weight
        reach = weight.shape[-1] // 2
        if weight.ndim == 4:
            return F.conv2d(x, weight, self.bias, padding=reach)
        return F.conv1d(F.pad(x, (reach, reach), mode="circular"), weight, self.bias)


class BatchNormLocal(nn.Module):
    """Batch norm over virtual batches of a few neighbours, with no memory of other batches (code).

    A set of n pictures is cut in order into ⌈n / virtual_batch⌉ groups whose sizes differ by one
    at most: 12 with groups of 8 into 6 and 6, 9 into 5 and 4. (The code wants equal groups.)
    """

    def __init__(self, channels: int, virtual_batch: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.virtual_batch = virtual_batch
        self.eps = eps

    def forward(self, x: Tensor, *, num_sets: int = 1) -> Tensor:
        """(x − mean) / √(var + ε) · weight + bias over a group's pictures and positions: B C ….

        The batch is `num_sets` sets laid end to end, which share no group. In float32.
        """
        assert len(x) % num_sets == 0
        wide, per_set = full_precision(x), len(x) // num_sets
        groups = -(-per_set // self.virtual_batch)
        is_even = per_set % groups == 0
        normalize = self._at_once if x.is_cuda and is_even else self._in_turn
        return normalize(wide, num_sets, groups).to(x.dtype)

    def _in_turn(self, x: Tensor, num_sets: int, groups: int) -> Tensor:
        parts = [part for one in x.chunk(num_sets) for part in one.tensor_split(groups)]
        return torch.cat([self._normalize(part) for part in parts])

    def _normalize(self, x: Tensor, times: int = 1) -> Tensor:
        weight, bias = self.weight.repeat(times), self.bias.repeat(times)
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)

    def _at_once(self, x: Tensor, num_sets: int, groups: int) -> Tensor:
        """Equal groups as more channels: two copies instead of a launch for each group."""
        total = num_sets * groups
        folded = x.unflatten(0, (total, -1)).transpose(0, 1).flatten(1, 2)
        y = self._normalize(folded, total).unflatten(1, (total, -1))
        return y.transpose(0, 1).flatten(0, 1)


class Head(nn.Module):
    """h = SN 1×1 → BN → LReLU; (h + LReLU(BN(SN conv h))) / √2; SN 1×1 to M (code).

    `size` is that of the second convolution: (3, 3) over maps, (9,) along tokens.
    """

    def __init__(
        self, channels: int, maps: int, *, size: tuple[int, ...], virtual_batch: int
    ) -> None:
        super().__init__()
        point = (1,) * len(size)
        self.first = SpectralConv(channels, channels, point)  # batch norm takes a bias out again
        self.first_norm = BatchNormLocal(channels, virtual_batch)
        self.second = SpectralConv(channels, channels, size)
        self.second_norm = BatchNormLocal(channels, virtual_batch)
        self.to_maps = SpectralConv(channels, maps, point, bias=True)

    def forward(self, x: Tensor, *, num_sets: int = 1) -> Tensor:
        """A stage, B C H W or B C L → B M N."""
        h = activate(self.first_norm(self.first(x), num_sets=num_sets))
        branch = activate(self.second_norm(self.second(h), num_sets=num_sets))
        maps_BMN: Tensor = self.to_maps((h + branch) * math.sqrt(0.5)).flatten(2)
        return maps_BMN


class PairLogit(nn.Module):
    """⟨h, A c + b⟩ / √M at each position: a picture beside its caption (projection discriminator).

    Captions begin with the share of the code's, which have unit norm and ours unit rms; so A is
    √T times smaller, and learns as much faster. Without text M = 1, and h is the logit.
    """

    def __init__(self, maps: int, *, text_width: int, bias_std: float) -> None:
        super().__init__()
        self.from_text: EqualLinear | None = None
        if text_width:
            self.from_text = EqualLinear(text_width, maps)
            self.from_text.weight.data /= math.sqrt(text_width)
            self.from_text.bias = nn.Parameter(bias_std * torch.randn(maps))

    def forward(self, maps_BMN: Tensor, text_BT: Tensor | None) -> Tensor:
        """B M N and B T → B N, in float32."""
        if self.from_text is None:
            return full_precision(maps_BMN).squeeze(1)
        assert text_BT is not None, "heads with text were given none"
        with without_autocast(maps_BMN.device):
            text_BM = self.from_text(full_precision(text_BT)) / math.sqrt(maps_BMN.shape[1])
            return (text_BM[:, None] @ full_precision(maps_BMN)).squeeze(1)


class FixedConv(nn.Module):
    """A random 1×1 convolution that never learns; its filter has orthonormal rows or columns."""

    weight: Tensor

    def __init__(self, in_maps: int, out_maps: int) -> None:
        super().__init__()
        weight = torch.empty(out_maps, in_maps, 1, 1)
        self.register_buffer("weight", nn.init.orthogonal_(weight))

    def forward(self, x_BIHW: Tensor) -> Tensor:
        """B I H W → B O H W."""
        return F.conv2d(x_BIHW, self.weight)


class RandomProjection(nn.Module):
    """Fixed random mixing of a stage's channels, and of scales (Projected GAN, section 3.2).

    With `mixing`, from the coarsest on: y_k = R_k ↑2 (P_k x_k + y_{k+1}).
    """

    def __init__(self, stage_channels: Sequence[int], maps: int, *, mixing: bool) -> None:
        super().__init__()
        self.channels = nn.ModuleList(FixedConv(channels, maps) for channels in stage_channels)
        self.scales = nn.ModuleList(FixedConv(maps, maps) for _ in stage_channels if mixing)

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """B C H W, each half the side of the last → B maps H W, of twice the side if mixed."""
        projected = [mix(x) for mix, x in zip(self.channels, stages, strict=True)]
        if not self.scales:
            return projected
        mixed: list[Tensor] = []
        for mix, x in zip(reversed(self.scales), reversed(projected), strict=True):
            mixed.append(mix(upsample(x + mixed[-1] if mixed else x)))
        return mixed[::-1]


class ProjectedHeads(nn.Module):
    """One head per stage of the frozen encoder that the configuration names.

    `stage_channels` are those of another encoder with stages of the same kind, `text_width` that
    of caption vectors which another network has read.
    """

    def __init__(
        self,
        config: ProjectedConfig,
        stage_channels: Sequence[int] | None = None,
        *,
        text_width: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.options: nn.Module | None = None  # what options of training learn beside them
        self.has_tokens = config.stages.kind == "tokens"
        channels = tuple(stage_channels or config.stages.channels)
        self.text = vector_branch(config.text, config.classes)
        self.projection: RandomProjection | None = None
        if config.random_projection and not self.has_tokens:
            self.projection = RandomProjection(channels, config.maps, mixing=config.mixing)
            channels = (config.maps,) * len(channels)
        size = (9,) if self.has_tokens else (3, 3)
        text_width = text_width or config.condition_width
        most = config.virtual_batch
        maps = config.maps if text_width else 1
        self.heads = nn.ModuleList(
            Head(width, maps, size=size, virtual_batch=most) for width in channels
        )
        self.to_logit = nn.ModuleList(
            PairLogit(maps, text_width=text_width, bias_std=config.bias_std) for _ in channels
        )

    def read(self, features: Features) -> Tensor | None:
        """Frozen features of captions, or class numbers B → c, B T; None if unconditional."""
        text: Text = self.text(features)
        return text.global_BT

    def trunk(self, stages: Sequence[Tensor], *, num_sets: int = 1) -> list[Tensor]:
        """Stages of the encoder, B C H W or B L C → what meets a caption, B M N each.

        The batch may be `num_sets` sets laid end to end (real and generated): batch norm never
        mixes them. No caption is in it, so that several can be asked of one pass.
        """
        inputs = [x_BLC.mT for x_BLC in stages] if self.has_tokens else list(stages)
        if self.projection is not None:
            inputs = self.projection(inputs)
        return [head(x, num_sets=num_sets) for head, x in zip(self.heads, inputs, strict=True)]

    def predict(self, maps: Sequence[Tensor], text_BT: Tensor | None) -> list[Tensor]:
        """What `trunk` gave, or rows of it, and captions → logits per stage, B N each."""
        return [judge(x, text_BT) for judge, x in zip(self.to_logit, maps, strict=True)]

    def forward(
        self, stages: Sequence[Tensor], text_BT: Tensor | None, *, num_sets: int = 1
    ) -> list[Tensor]:
        """Stages of the encoder and captions → logits per stage, B N each (N positions)."""
        return self.predict(self.trunk(stages, num_sets=num_sets), text_BT)
