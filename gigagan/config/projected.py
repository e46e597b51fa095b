"""Every knob of the critic that sees by a frozen encoder. Nothing here imports torch.

"Code" is github.com/autonomousvision/stylegan-t (Sauer et al. 2023), whose heads these are; random
projection and cross-scale mixing are those of Projected GAN (Sauer et al. 2021, section 3.2).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from gigagan.common.settings import Frozen
from gigagan.config.networks import ClassConfig, TextConfig, check_one_condition
from gigagan.config.stylegan_t import CLIP_TEXT

StageKind = Literal["maps", "tokens"]


class Stages(NamedTuple):
    """What heads are put on, known before the encoder is loaded."""

    kind: StageKind
    """Feature maps, or sequences of a transformer's tokens."""
    channels: tuple[int, ...]
    """Of each stage, in the encoder's order."""
    multiple: int
    """The side of a picture in pixels is a multiple of this number."""
    side: int | None = None
    """The only side in pixels, where the encoder takes no other."""


_CLIP_WIDTHS = {
    "ViT-B-32": (768, 32),
    "ViT-B-16": (768, 16),
    "ViT-L-14": (1024, 14),
    "ViT-H-14": (1280, 14),
    "ViT-bigG-14": (1664, 14),
}
"""Width of the image tower and side of a patch."""

ENCODER_STAGES = {
    "embedded:efficientnet-lite0": Stages("maps", (24, 40, 112, 320), 32),
    "dino:vits16": Stages("tokens", (384,) * 5, 16),
    **{
        f"open_clip:{architecture}": Stages("tokens", (width,) * 5, patch, 224)
        for architecture, (width, patch) in _CLIP_WIDTHS.items()
    },
}
"""Stages by encoder; of an open_clip model whatever its tag."""


def check_encoder(encoder: str, side: int, *, name: str, side_name: str) -> None:
    """Refuse an encoder without known stages, or a side in pixels that it cannot take.

    Raises:
        ValueError: the message has the setting by this name, its value and the remedy.
    """
    stages = ENCODER_STAGES.get(encoder.partition("/")[0])
    if stages is None:
        raise ValueError(
            f"{name} = {encoder!r}: no heads are known for it, choose one of "
            f"{', '.join(ENCODER_STAGES)} (open_clip ones with /TAG)"
        )
    if stages.side is not None and side != stages.side:
        raise ValueError(
            f"{side_name} = {side}, but {encoder} takes pictures of {stages.side} px alone: "
            f"set {side_name} to {stages.side}"
        )
    if side % stages.multiple:
        raise ValueError(
            f"{side_name} = {side}, but {encoder} halves or cuts pictures down to pieces of "
            f"{stages.multiple} px: use a multiple of {stages.multiple}"
        )


class ProjectedConfig(Frozen):
    """One small head on each stage of a frozen image encoder; only the heads learn."""

    kind: Literal["projected"] = "projected"
    """Which critic this is."""
    encoder: str = "embedded:efficientnet-lite0"
    """Frozen image encoder: `embedded:efficientnet-lite0`, `dino:vits16` (code) or
    `open_clip:ARCHITECTURE/TAG`."""
    side: int = Field(64, ge=32)
    """Side in pixels to which pictures are brought for the encoder (code: 224)."""
    maps: int = Field(64, ge=1)
    """Dimensions in which a position meets the caption (code: 64), and feature maps to which
    stages are projected."""
    virtual_batch: int = Field(8, ge=1)
    """Most pictures over which a head's batch norm takes its statistics (code: 8).

    Real and generated pictures never share them. Ranks and parts of a batch whose size is a
    multiple of it give what one process would."""
    random_projection: bool = True
    """Whether a fixed random 1×1 convolution brings feature maps to `maps` (Projected GAN), which
    makes the heads small. Of tokens there is none (code)."""
    bias_std: float = Field(1.0, ge=0)
    """Standard deviation, at the start, of the bias b in a head's ⟨h, A c + b⟩ (code: 0).

    It is what a logit has whatever the caption. Without it a head tells real pictures from
    generated ones late: it starts as a random function of the caption, which both have."""
    mixing: bool = False
    """Whether each stage has the coarser ones added to it, at twice its side (Projected GAN's
    cross-scale mixing): heads cost four times as much."""
    text: TextConfig | None = TextConfig(width=384, depth=0)
    """The frozen encoder, whose pooled vector is read as it is: `depth` is 0, and `width` that of
    the vector. Null for a critic without text."""
    classes: ClassConfig | None = None
    """Classes instead of text: a learned vector each, which a head meets as it would a caption's
    (projection discriminator, Miyato and Koyama 2018); with neither the critic is
    unconditional."""

    @property
    def stages(self) -> Stages:
        """What the encoder offers."""
        return ENCODER_STAGES[self.encoder.partition("/")[0]]

    @property
    def condition_width(self) -> int:
        """Width of the vector c of caption or class; 0 without either."""
        condition = self.text or self.classes
        return condition.width if condition else 0

    @property
    def embedding_width(self) -> int:
        """Features of a picture without its caption: `maps` of each stage."""
        return self.maps * len(self.stages.channels)

    @property
    def levels(self) -> int:
        """Levels of a pyramid that it looks at: the largest alone."""
        return 1

    @model_validator(mode="after")
    def _one_condition(self) -> Self:
        check_one_condition(self.text, self.classes)
        return self

    @model_validator(mode="after")
    def _knows_the_encoder(self) -> Self:
        check_encoder(self.encoder, self.side, name="encoder", side_name="side")
        return self

    @model_validator(mode="after")
    def _mixes_projected_maps(self) -> Self:
        if self.mixing and not (self.random_projection and self.stages.kind == "maps"):
            raise ValueError(
                "mixing is true, but only projected feature maps can be added up: set mixing to "
                "false, or random_projection to true with an encoder that gives maps"
            )
        return self

    @model_validator(mode="after")
    def _reads_the_vector(self) -> Self:
        if self.text and (self.text.depth or self.text.width != self.text.pooled_width):
            raise ValueError(
                f"text.depth = {self.text.depth} and text.width = {self.text.width}, but heads "
                "learn no layers over the caption's vector: set depth to 0 and width to "
                f"pooled_width = {self.text.pooled_width}"
            )
        return self

    @classmethod
    def stylegan_t(cls) -> ProjectedConfig:
        """The critic of the code."""
        return cls(encoder="dino:vits16", side=224, bias_std=0, text=CLIP_TEXT)
