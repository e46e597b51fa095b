"""all-MiniLM-L6-v2, a sentence encoder with features per token: BERT's forward pass, frozen.

Shape letters: B batch, L tokens, D features, N heads, K features per head.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from gigagan.models.encoders import LearnableTextEncoder, TextFeatures

_NUM_LAYERS = 6
_NUM_HEADS = 12
_EPS = 1e-12  # of BERT's layer norms
_PARTS = ("embeddings.", "encoder.")
"""How the names of weights begin that features depend on."""


@dataclass(frozen=True)
class _Affine:
    """Weight and bias of a linear layer or of a layer norm."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def read(cls, weights: Mapping[str, Tensor], *names: str) -> _Affine:
        """Take one layer, or several of the same input as one wider layer."""
        return cls(
            torch.cat([weights[f"{name}.weight"] for name in names]),
            torch.cat([weights[f"{name}.bias"] for name in names]),
        )

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.bias.shape, self.weight, self.bias, _EPS)


class _Layer:
    """A post-norm transformer layer."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str) -> None:
        heads = [f"{prefix}.attention.self.{part}" for part in ("query", "key", "value")]
        self.qkv = _Affine.read(weights, *heads)
        self.attended = _Affine.read(weights, f"{prefix}.attention.output.dense")
        self.attended_norm = _Affine.read(weights, f"{prefix}.attention.output.LayerNorm")
        self.widen = _Affine.read(weights, f"{prefix}.intermediate.dense")
        self.narrow = _Affine.read(weights, f"{prefix}.output.dense")
        self.norm = _Affine.read(weights, f"{prefix}.output.LayerNorm")

    def __call__(self, x_BLD: Tensor, mask_B11L: Tensor) -> Tensor:
        B, L, D = x_BLD.shape
        qkv_BL3NK = self.qkv.linear(x_BLD).view(B, L, 3, _NUM_HEADS, D // _NUM_HEADS)
        q_BNLK, k_BNLK, v_BNLK = qkv_BL3NK.permute(2, 0, 3, 1, 4)
        mixed_BNLK = F.scaled_dot_product_attention(q_BNLK, k_BNLK, v_BNLK, attn_mask=mask_B11L)
        mixed_BLD = mixed_BNLK.transpose(1, 2).reshape(B, L, D)
        x_BLD = self.attended_norm.norm(x_BLD + self.attended.linear(mixed_BLD))
        return self.norm.norm(x_BLD + self.narrow.linear(F.gelu(self.widen.linear(x_BLD))))


class MiniLM(LearnableTextEncoder):
    """Tokens are the last hidden states; pooled is their mean at unit length, as published."""

    name = "embedded:minilm-l6"
    width = pooled_width = 384
    max_tokens = 256

    def __init__(self, weights: Path, tokenizer: Path, device: torch.device) -> None:
        self._prepare(load_file(weights, device=str(device)), tokenizer, device)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], tokenizer: Path, device: torch.device) -> Self:
        """An encoder whose weights are in memory already, in place of a file's."""
        encoder = cls.__new__(cls)
        encoder._prepare({n: t.to(device) for n, t in tensors.items()}, tokenizer, device)
        return encoder

    def _prepare(
        self, tensors: Mapping[str, Tensor], tokenizer: Path, device: torch.device
    ) -> None:
        self.device = device
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._whole = Tokenizer.from_file(str(tokenizer))
        self._whole.no_truncation()
        self._whole.no_padding()
        self._tokenizer.enable_truncation(self.max_tokens)
        self._tokenizer.enable_padding()  # the file's own setting pads everything to 128
        self._take(tensors)

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {
            name: tensor
            for name, tensor in tensors.items()
            if name.startswith(_PARTS) and tensor.is_floating_point()
        }
        self._words = tensors["embeddings.word_embeddings.weight"]
        # A caption is one segment, so that its embedding is a constant of every position.
        self._positions = (
            tensors["embeddings.position_embeddings.weight"]
            + tensors["embeddings.token_type_embeddings.weight"][0]
        )
        self._embedding_norm = _Affine.read(tensors, "embeddings.LayerNorm")
        self._layers = [_Layer(tensors, f"encoder.layer.{i}") for i in range(_NUM_LAYERS)]

    def weights(self) -> dict[str, Tensor]:
        """As they are named in the file; its pooler is not among them."""
        return dict(self._tensors)

    def with_weights(self, weights: Mapping[str, Tensor]) -> Self:
        """The same tokenizer, other weights."""
        encoder = copy.copy(self)
        encoder._take(weights)
        return encoder

    def count_tokens(self, caption: str) -> int:
        """Word pieces, start and end among them."""
        return len(self._whole.encode(caption).ids)

    def features(self, captions: Sequence[str]) -> TextFeatures:
        """Of the last layer; padding is zero."""
        encodings = self._tokenizer.encode_batch(list(captions))
        ids_BL = torch.tensor([e.ids for e in encodings], device=self.device)
        mask_BL = torch.tensor([e.attention_mask for e in encodings], device=self.device).bool()
        with torch.autocast(self.device.type, enabled=False):  # features are float32 everywhere
            x_BLD = F.embedding(ids_BL, self._words) + self._positions[: ids_BL.shape[1]]
            x_BLD = self._embedding_norm.norm(x_BLD)
            for layer in self._layers:
                x_BLD = layer(x_BLD, mask_BL[:, None, None, :])
            x_BLD = x_BLD * mask_BL[..., None]
            pooled_BD = F.normalize(x_BLD.sum(dim=1), dim=1)  # unit length: sum and mean agree
        return TextFeatures(x_BLD, mask_BL, pooled_BD)
