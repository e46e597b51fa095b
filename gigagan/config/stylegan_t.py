"""Every knob of StyleGAN-T's generator, with the sizes of the paper's code. Nothing imports torch.

"Code" is github.com/autonomousvision/stylegan-t, of Sauer et al. 2023. Tuples over resolutions
start at 8 px and end at the output.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gigagan.common.settings import Frozen
from gigagan.config.networks import ClassConfig, TextConfig, check_one_condition

TrainedPart = Literal["all", "upper", "text_encoder"]
UPPER_FROM = 64
"""Side in pixels above which blocks are `upper` ones (code: `freeze64`)."""
START = 8
"""Side of the first maps in pixels, and their sampling rate: positions per side of the picture."""

CLIP_TEXT = TextConfig(
    encoder="open_clip:ViT-L-14/openai", encoder_width=768, pooled_width=768, width=768, depth=0
)


class StyleTConfig(Frozen):
    """StyleGAN-T's generator: z and a caption's vector to one image (Sauer et al. 2023)."""

    kind: Literal["stylegan-t"] = "stylegan-t"
    """Which generator this is."""
    channels: tuple[Annotated[int, Field(ge=1)], ...] = Field((192, 96, 48), min_length=1)
    """Feature maps at 8, 16, … px; their number sets the resolution.

    Code: min(base / side, most), with base and most 32768 and 512 (lite) or 65536 and 2048 (full).
    """
    blocks: int = Field(1, ge=1)
    """Residual blocks per resolution, of two 3×3 convolutions each (code: lite 2, full 3)."""
    groups: int = Field(32, ge=1)
    """Groups of GroupNorm in front of a residual convolution (code: 32).

    Where they do not divide the feature maps, the greatest common divisor of both."""
    layer_scale: float = Field(1e-5, gt=0)
    """LayerScale γ of every map of a residual branch at the start (code: 1e-5)."""
    rgb_scale: float = Field(0.1, gt=0)
    """Standard deviation of the filters of toRGB at the start (code: 0.1; all others have 1)."""
    bandwidth: float = Field(2.0, gt=0, le=START / 2)
    """Highest frequency of the Fourier input in cycles per side of the picture (code: 2)."""
    latent_dim: int = Field(64, ge=1)
    """Dimensions of the latent z ~ N(0, I), and of x = M(z) (code: 64)."""
    mapping_layers: int = Field(2, ge=1)
    """Layers of the mapping network M, the last of them linear (code: 2)."""
    mapping_lr_multiplier: float = Field(0.01, gt=0)
    """Learning rate of the mapping network over that of the rest (code: 0.01)."""
    style_mean_decay: float = Field(0.995, ge=0, lt=1)
    """What the moving mean of x keeps at every forward pass in training (code: 0.995)."""
    text: TextConfig | None = TextConfig(width=384, depth=0)
    """The frozen encoder, whose pooled vector is read as it is: `depth` is 0, and `width` that of
    the vector. Null for a network without text."""
    classes: ClassConfig | None = None
    """Classes instead of text, whose learned vectors are c; with neither the network is
    unconditional."""
    own_text_encoder: bool = False
    """Whether the network has a copy of that encoder, which the phase `text_encoder` trains."""

    @property
    def resolution(self) -> int:
        """Side of the output image in pixels."""
        return START << (len(self.channels) - 1)

    @property
    def num_images(self) -> int:
        """Levels of the pyramid that it draws: the output alone."""
        return 1

    @property
    def condition_width(self) -> int:
        """Width of the vector c of caption or class; 0 without either."""
        condition = self.text or self.classes
        return condition.width if condition else 0

    @property
    def text_width(self) -> int | None:
        """Width of t_local, which does not exist: there is no attention to tokens."""
        return None

    @property
    def style_dim(self) -> int:
        """Dimensions of the style w = [x, c] (code: 64 + 768)."""
        return self.latent_dim + self.condition_width

    @property
    def layers(self) -> tuple[int, ...]:
        """3×3 convolutions per resolution, each with a noise input."""
        return tuple(2 * self.blocks + (i > 0) for i in range(len(self.channels)))

    @property
    def noise_dim(self) -> int:
        """Values of all noise inputs of one picture: one per pixel of each layer."""
        return sum(count * (START << i) ** 2 for i, count in enumerate(self.layers))

    @model_validator(mode="after")
    def _one_condition(self) -> Self:
        check_one_condition(self.text, self.classes)
        return self

    @model_validator(mode="after")
    def _has_what_it_copies(self) -> Self:
        if self.own_text_encoder and self.text is None:
            raise ValueError(
                "own_text_encoder is true, but text is null: there is no encoder to copy; give a "
                "text section, or set own_text_encoder to false"
            )
        return self

    @model_validator(mode="after")
    def _reads_the_vector(self) -> Self:
        if self.text and (self.text.depth or self.text.width != self.text.pooled_width):
            raise ValueError(
                f"text.depth = {self.text.depth} and text.width = {self.text.width}, but "
                "StyleGAN-T learns no layers over the caption's vector: set depth to 0 and width "
                f"to pooled_width = {self.text.pooled_width}"
            )
        return self

    @classmethod
    def lite_64(cls) -> StyleTConfig:
        """74.6 M parameters: `--cfg lite` of the code at 64 px."""
        return cls(channels=_maps(32_768, 512, 64), blocks=2, text=CLIP_TEXT)

    @classmethod
    def full_64(cls) -> StyleTConfig:
        """975.6 M parameters: `--cfg full` of the code at 64 px; of 512 px it has 1,020.5 M.

        The paper says about one billion and leaves widths and depth to its code.
        """
        return cls(channels=_maps(65_536, 2_048, 64), blocks=3, text=CLIP_TEXT)

    @classmethod
    def small_32(cls) -> StyleTConfig:
        """2.9 M parameters, for CPUs, with MiniLM's text; widths and depth are our choice."""
        return cls(channels=_maps(1_536, 192, 32))


def _maps(base: int, most: int, resolution: int) -> tuple[int, ...]:
    """min(base / side, most) feature maps at 8 px, 16 px, … up to the resolution."""
    sides = [START << i for i in range((resolution // START).bit_length())]
    return tuple(min(base // side, most) for side in sides)
