"""DINO's ViT (Caron et al. 2021) by timm: the features that StyleGAN-T's critic looks at.

Shape letters: B batch, L tokens, C channels, H W image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gigagan.models.encoders import ImageEncoder, ImageFeatures, with_class_token

BLOCKS = (2, 5, 8, 11)
"""Blocks, from 0, behind which a stage is (code of StyleGAN-T)."""


class Dino(ImageEncoder):
    """Pooled: the class token behind the last norm; stages: tokens of five depths.

    These are the patch embedding with its positions and the outputs of blocks 2, 5, 8 and 11, the
    class token added to every other one (StyleGAN-T, appendix; "readout" in its code).
    """

    mean: Tensor
    std: Tensor
    image_size = None

    def __init__(self, name: str, model: Any) -> None:
        super().__init__()
        self.name = name
        self.width = int(model.embed_dim)
        self.stage_channels = (self.width,) * (1 + len(BLOCKS))
        self._model = (model,)  # a tuple hides it from state dicts and parameter lists
        mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x_BCHW: Tensor) -> ImageFeatures:
        """Return features of images in [-1, 1]; positions are resampled for other sides than 224.

        Raises:
            ValueError: a side is not a multiple of a patch's.
        """
        from timm.layers import resample_abs_pos_embed

        (model,) = self._model
        patch = model.patch_embed.patch_size[0]
        H, W = x_BCHW.shape[2:]
        if H % patch or W % patch:
            raise ValueError(
                f"{self.name} was given {tuple(x_BCHW.shape)}: resize to a multiple of {patch} px"
            )
        patches_BHWC = model.patch_embed((x_BCHW * 0.5 + 0.5 - self.mean) / self.std)
        class_B1C = model.cls_token.expand(len(x_BCHW), -1, -1)
        tokens_BLC = torch.cat([class_B1C, patches_BHWC.flatten(1, 2)], dim=1)
        tokens_BLC = tokens_BLC + resample_abs_pos_embed(
            model.pos_embed, [H // patch, W // patch], model.patch_embed.grid_size
        )
        stages = [with_class_token(tokens_BLC)]
        for number, block in enumerate(model.blocks):
            tokens_BLC = block(tokens_BLC)
            if number in BLOCKS:
                stages.append(with_class_token(tokens_BLC))
        return ImageFeatures(model.norm(tokens_BLC)[:, 0], stages)
