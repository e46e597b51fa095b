"""CLIP models of open_clip behind our encoder interfaces, from a weight file on this machine.

Shape letters: B batch, L tokens, D features, C colour or channels, H W image.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gigagan.models.encoders import (
    ImageEncoder,
    ImageFeatures,
    LearnableTextEncoder,
    TextFeatures,
    with_class_token,
)
from gigagan.models.precision import has_bfloat16

Precision = Literal["auto", "float32", "bfloat16"]

_NUM_STAGES = 4


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether to multiply in bfloat16; `auto` does where the device has instructions for it."""
    if precision != "auto":
        return precision == "bfloat16"
    return has_bfloat16(device)


def load(architecture: str, tag: str, weights: Path, device: torch.device) -> nn.Module:
    """Build the model and fill it from `weights`; nothing is fetched.

    Raises ValueError for an architecture that open_clip lacks, or whose tokenizer or image tower
    does not come with open_clip itself.
    """
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ValueError(f"open_clip has no architecture {architecture!r}; see list_models()")
    foreign = {"hf_model_name", "hf_tokenizer_name"} & config["text_cfg"].keys()
    if foreign or config.get("custom_text") or "timm_model_name" in config["vision_cfg"]:
        raise ValueError(
            f"open_clip:{architecture} is not a plain CLIP (its towers or its tokenizer come from "
            "other libraries); choose a ViT-* architecture without SigLIP in its name"
        )
    # A file carries no settings, so the tag's own must be restored: OpenAI's need QuickGELU.
    settings = open_clip.get_pretrained_cfg(architecture, tag)
    model = open_clip.create_model(
        architecture,
        pretrained=str(weights),
        device=device,
        force_quick_gelu=bool(settings.get("quick_gelu", False)),
    )
    model.pixel_mean = settings.get("mean", open_clip.OPENAI_DATASET_MEAN)
    model.pixel_std = settings.get("std", open_clip.OPENAI_DATASET_STD)
    return model.eval().requires_grad_(False)


def _in_bfloat16(device: torch.device, wanted: bool) -> AbstractContextManager[object]:
    """Autocast where it is wanted; else what the caller has, which training may have turned on."""
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


class _Hidden(nn.Module):
    """Hidden states after all blocks but the last; batch first, whatever the blocks want."""

    attn_mask: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.token_embedding = model.token_embedding
        self.positional_embedding = model.positional_embedding
        self.blocks = model.transformer.resblocks[:-1]
        self.batch_first = model.transformer.batch_first
        self.register_buffer("attn_mask", model.attn_mask, persistent=False)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """B L → B L D."""
        L = ids_BL.shape[1]
        x_BLD = self.token_embedding(ids_BL) + self.positional_embedding[:L]
        x = x_BLD if self.batch_first else x_BLD.transpose(0, 1)
        for block in self.blocks:
            x = block(x, attn_mask=self.attn_mask[:L, :L])
        return x if self.batch_first else x.transpose(0, 1)


class OpenClipText(LearnableTextEncoder):
    """Tokens of the penultimate layer, before the final norm; pooled is the one at the end token.

    The end token is pooled alone, not one of the tokens. Attention is causal: what stands after it
    cannot change a feature and is cut off.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, *, bfloat16: bool = False) -> None:
        self.name = name
        self._bfloat16 = bfloat16
        self.width = self.pooled_width = model.ln_final.normalized_shape[0]
        self.max_tokens = model.context_length
        self._model = model
        self._tokenizer = tokenizer
        self._hidden = _Hidden(model)
        self._weights: dict[str, Tensor] = {}

    def weights(self) -> dict[str, Tensor]:
        """Of the embeddings and all blocks but the last."""
        return {name: p.detach() for name, p in self._hidden.named_parameters()} | self._weights

    def with_weights(self, weights: Mapping[str, Tensor]) -> Self:
        """The same tokenizer and model, whose own weights stay as they are; so does `embed`."""
        encoder = copy.copy(self)
        encoder._weights = dict(weights)
        return encoder

    def count_tokens(self, caption: str) -> int:
        """Byte pairs, start and end among them."""
        return len(self._tokenizer.encode(caption)) + 2

    def features(self, captions: Sequence[str]) -> TextFeatures:
        """Of captions; the start token is one of theirs."""
        ids_BL = self._tokenizer(list(captions)).to(self._model.positional_embedding.device)
        end_B = ids_BL.argmax(dim=1)  # the end token has the highest id
        L = int(end_B.max()) + 1
        with torch.autocast(ids_BL.device.type, enabled=False):
            tokens_BLD = functional_call(self._hidden, self._weights, (ids_BL[:, :L],))
        pooled_BD = tokens_BLD[torch.arange(len(ids_BL), device=ids_BL.device), end_B]
        mask_BL = torch.arange(L - 1, device=ids_BL.device) < end_B[:, None]
        return TextFeatures(tokens_BLD[:, :-1] * mask_BL[..., None], mask_BL, pooled_BD)

    @property
    def logit_scale(self) -> float:
        """Factor of a cosine that CLIP was trained with, exp of its learned logarithm."""
        return float(self._model.logit_scale.exp())

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors of the joint space [B, D], for a CLIP score."""
        ids_BL = self._tokenizer(list(captions)).to(self._model.positional_embedding.device)
        with _in_bfloat16(ids_BL.device, self._bfloat16):
            vectors_BD = self._model.encode_text(ids_BL)
        return F.normalize(vectors_BD.float(), dim=1)


class OpenClipImage(ImageEncoder):
    """Pooled: the joint-space vector (not normalised); stages: patch tokens of four depths."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, model: Any, *, bfloat16: bool = False) -> None:
        super().__init__()
        self.name = name
        self._bfloat16 = bfloat16
        self.width = model.visual.output_dim
        depth = len(model.visual.transformer.resblocks)
        self._depths = [depth * (i + 1) // _NUM_STAGES - 1 for i in range(_NUM_STAGES)]
        channels = model.visual.transformer.resblocks[0].ln_1.normalized_shape[0]
        self.stage_channels = (channels,) * _NUM_STAGES
        size = model.visual.image_size
        self.image_size = size if isinstance(size, int) else size[0]
        self._model = (model,)  # a tuple hides it from state dicts and parameter lists
        mean = torch.tensor(model.pixel_mean).view(3, 1, 1)
        std = torch.tensor(model.pixel_std).view(3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x_BCHW: Tensor) -> ImageFeatures:
        """Return features of images in [-1, 1] of exactly `image_size` pixels."""
        (model,) = self._model
        x_BCHW = self._prepared(x_BCHW)
        with _in_bfloat16(x_BCHW.device, self._bfloat16):
            features = model.visual.forward_intermediates(x_BCHW, indices=self._depths)
        return ImageFeatures(features["image_features"], features["image_intermediates"])

    def _prepared(self, x_BCHW: Tensor) -> Tensor:
        """Normalised as the model was trained, if the size is right."""
        if x_BCHW.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"{self.name} was given {tuple(x_BCHW.shape)}: resize to {self.image_size} px"
            )
        return (x_BCHW * 0.5 + 0.5 - self.mean) / self.std


class OpenClipTokens(OpenClipImage):
    """The image tower as a critic sees it: tokens of five depths, the class token added to each.

    These are the patch embedding, as it enters the first block, and the same four blocks; so
    StyleGAN-T does with DINO.
    """

    def __init__(self, name: str, model: Any, *, bfloat16: bool = False) -> None:
        super().__init__(name, model, bfloat16=bfloat16)
        self.stage_channels = (self.stage_channels[0], *self.stage_channels)

    def forward(self, x_BCHW: Tensor) -> ImageFeatures:
        """Return features of images in [-1, 1] of exactly `image_size` pixels."""
        (model,) = self._model
        x_BCHW = self._prepared(x_BCHW)
        with _in_bfloat16(x_BCHW.device, self._bfloat16):
            embedded_BLC = model.visual._embeds(x_BCHW)
            features = model.visual.forward_intermediates(
                x_BCHW, indices=self._depths, output_fmt="NLC", output_extra_tokens=True
            )
        blocks = zip(
            features["image_intermediates"], features["image_intermediates_prefix"], strict=True
        )
        stages = [with_class_token(embedded_BLC), *(x_BLC + token for x_BLC, token in blocks)]
        return ImageFeatures(features["image_features"], stages)
