"""Every knob of the networks, with the paper's sizes. Nothing here imports torch.

Tuples that run over resolutions start at 4 px (generators) or at the bottom of the U (upsamplers)
and end at the output; those of the discriminator start at the input resolution and end at 4 px.

Where the paper leaves a width open, it is chosen here to meet the published number of parameters;
the docstring of each preset says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gigagan.common.settings import Frozen

PositiveInt = Annotated[int, Field(ge=1)]
Depth = Annotated[int, Field(ge=0)]

ENCODER_WIDTHS = {
    "embedded:minilm-l6": (384, 384),
    "open_clip:ViT-B-32": (512, 512),
    "open_clip:ViT-B-16": (512, 512),
    "open_clip:ViT-L-14": (768, 768),
    "open_clip:ViT-H-14": (1024, 1024),
    "open_clip:ViT-bigG-14": (1280, 1280),
}
"""Widths of token features and of the pooled vector, where they are known before loading."""


class TextConfig(Frozen):
    """The text branch: a frozen encoder and the learned layers T over its tokens."""

    encoder: str = "embedded:minilm-l6"
    """Frozen text encoder: `embedded:minilm-l6` or `open_clip:ARCHITECTURE/TAG`."""
    encoder_width: int = Field(384, ge=1)
    """Width of the encoder's token features (MiniLM-L6 384, CLIP ViT-L/14 768)."""
    pooled_width: int = Field(384, ge=1)
    """Width of the encoder's pooled vector (MiniLM-L6 384, CLIP ViT-L/14's EOT token 768)."""
    width: int = Field(128, ge=8)
    """Width of t_local and t_global, the outputs of T."""
    depth: int = Field(1, ge=0)
    """Learned attention layers of T (paper: 4 in the base, 2 in the upsampler)."""
    head_width: int = Field(32, ge=8)
    """Channels of one attention head."""
    mlp_ratio: int = Field(2, ge=1)
    """Hidden width of a layer's MLP over its width (paper: 4)."""
    centred: bool = True
    """Whether the mean of the training captions' features is taken out of them (paper: no).

    Without it captions of a narrow set differ little, and the style w hardly with them."""
    conditioning_augmentation: bool = False
    """Whether training draws t_global around a learned mean, with a learned spread (StackGAN);
    drawing pictures takes the mean. Of a generator alone; goes with `options.conditioning_kl`."""

    @model_validator(mode="after")
    def _widths_agree(self) -> Self:
        given = {"encoder_width": self.encoder_width, "pooled_width": self.pooled_width}
        right = ENCODER_WIDTHS.get(self.encoder.partition("/")[0], tuple(given.values()))
        for (field, value), width in zip(given.items(), right, strict=True):
            if value != width:
                raise ValueError(
                    f"{field} = {value} does not match the encoder {self.encoder}: it gives {width}"
                )
        if self.depth and self.width % self.head_width:
            raise ValueError(
                f"width = {self.width} does not divide into heads of head_width = "
                f"{self.head_width}: use a multiple of it"
            )
        return self


class ClassConfig(Frozen):
    """Classes instead of text: one learned vector each."""

    number: int = Field(1_000, ge=2)
    """How many classes (ImageNet: 1000)."""
    width: int = Field(128, ge=8)
    """Width of a class's vector."""
    names: tuple[str, ...] = ()
    """The classes' names by their numbers; training fills them in from the shards."""

    @model_validator(mode="after")
    def _each_has_a_name(self) -> Self:
        if self.names and len(set(self.names)) != self.number:
            raise ValueError(
                f"names has {len(set(self.names))} different ones for number = {self.number} "
                "classes: leave it out, training fills it in"
            )
        return self


PAPER_TEXT = TextConfig(
    encoder="open_clip:ViT-L-14/openai",
    encoder_width=768,
    pooled_width=768,
    width=768,
    depth=4,
    head_width=64,
    mlp_ratio=4,
    centred=False,
)


def check_one_condition(text: TextConfig | None, classes: ClassConfig | None) -> None:
    """Refuse a network that would read captions and classes."""
    if text and classes:
        raise ValueError("text and classes are both set: set one of them to null")


class BlockConfig(Frozen):
    """What convolution and attention blocks have in common in all networks."""

    head_width: int = Field(32, ge=8)
    """Channels of one attention head."""
    attention_scale: float | None = Field(None, gt=0)
    """Factor σ of −σ‖q − k‖²; null means 1 / head_width (1/√d starts as an identity)."""
    mlp_ratio: int = Field(2, ge=1)
    """Hidden width of the MLP after attention over its channels (paper: 4)."""
    residual_gain: float = Field(0.4, gt=0)
    """Weight of a convolution block's residual branch, its trunk having 1."""
    attention_gain: float = Field(0.3, gt=0)
    """Weight of the residual branches of attention and its MLP, their trunk having 1."""
    text: TextConfig | None = TextConfig()
    """The network's own text branch; null for networks without text."""
    classes: ClassConfig | None = None
    """Classes instead of text; with neither the network is unconditional."""

    @property
    def condition_width(self) -> int:
        """Width of the global descriptor of text or class; 0 without either."""
        condition = self.text or self.classes
        return condition.width if condition else 0

    @property
    def text_width(self) -> int | None:
        """Width of t_local, where there is text to attend to."""
        return self.text.width if self.text else None

    @model_validator(mode="after")
    def _one_condition(self) -> Self:
        check_one_condition(self.text, self.classes)
        return self


class StyleConfig(BlockConfig):
    """What networks that draw with a style have in common."""

    latent_dim: int = Field(64, ge=1)
    """Dimensions of the latent z ~ N(0, I) (paper: 128)."""
    style_dim: int = Field(256, ge=1)
    """Dimensions of the style w (paper: 1024 in the base, 512 in the upsampler)."""
    mapping_layers: int = Field(3, ge=1)
    """Layers of the mapping network M(z, t_global) → w (paper: 4)."""
    mapping_lr_multiplier: float = Field(0.1, gt=0)
    """Learning rate of the mapping network over that of the rest (StyleGAN2: 0.01)."""
    latent_gain: float = Field(1.0, ge=0)
    """Weight of z beside the global descriptor in M's input; 1 gives both the same energy.

    Less for data in which the caption decides most of the picture: half of w is noise there."""
    linear_style: bool = False
    """Whether the last layer of M has no activation (paper: it has one), so that the styles of
    different captions and latents have no common mean at the start."""


class GeneratorConfig(StyleConfig):
    """The base generator, z and text to a pyramid of images (GigaGAN, section 3 and Table A2)."""

    channels: tuple[PositiveInt, ...] = (128, 128, 48, 24)
    """Feature maps at 4, 8, … px; their number sets the resolution."""
    kernels: tuple[PositiveInt, ...] = (1, 1, 4, 4)
    """Filters in each bank of sample-adaptive kernel selection, per resolution."""
    blocks: tuple[PositiveInt, ...] = (1, 1, 1, 1)
    """Blocks of two adaptive 3×3 convolutions per resolution; the first of all has one."""
    attention: tuple[Depth, ...] = (0, 1, 0, 0)
    """Attention blocks (self, then cross to the text) per resolution."""
    linear_style: bool = True
    """Whether the last layer of M has no activation (paper: it has one), so that the styles of
    different captions and latents have no common mean at the start."""
    style_input: bool = True
    """Whether the 4×4 input is, or has added to it, something linear in w (paper: no)."""
    constant_input: bool = False
    """Whether the 4×4 input has a learned constant (paper: it is nothing else).

    A constant is what all images share and what follows D most quickly: with it short trainings
    drew one shape for all captions."""

    @property
    def resolution(self) -> int:
        """Side of the output image in pixels."""
        return 4 << (len(self.channels) - 1)

    @property
    def num_images(self) -> int:
        """Levels of the pyramid that it draws."""
        return len(self.channels)

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        if not (self.style_input or self.constant_input):
            raise ValueError(
                "style_input and constant_input are both false: the generator would have no input"
            )
        sides = [4 << i for i in range(len(self.channels))]
        _one_entry_each(self, "channels", ("kernels", "blocks", "attention"), sides)
        _heads_fit(self.channels, self.attention, self.head_width)
        return self

    @classmethod
    def paper_64(cls) -> GeneratorConfig:
        """The 652.5 M parameter base generator of the paper (counted without T)."""
        return cls(
            channels=(1600, 1600, 1024, 512, 256),
            kernels=(1, 1, 2, 4, 8),
            blocks=(3, 3, 3, 2, 2),
            attention=(0, 2, 2, 1, 0),
            head_width=64,
            mlp_ratio=4,
            latent_dim=128,
            style_dim=1024,
            mapping_layers=4,
            mapping_lr_multiplier=0.01,
            linear_style=False,
            style_input=False,
            constant_input=True,
            text=PAPER_TEXT,
        )

    @classmethod
    def imagenet_256(cls) -> GeneratorConfig:
        """The 569 M parameter class-conditional ImageNet generator; all widths are our choice."""
        return cls(
            channels=(1536, 1536, 1024, 512, 256, 128, 64),
            kernels=(1, 1, 2, 4, 8, 8, 8),
            blocks=(3, 3, 3, 3, 3, 3, 2),
            attention=(0, 2, 2, 1, 0, 0, 0),
            head_width=64,
            mlp_ratio=4,
            latent_dim=128,
            style_dim=512,
            mapping_layers=4,
            mapping_lr_multiplier=0.01,
            linear_style=False,
            style_input=False,
            constant_input=True,
            text=None,
            classes=ClassConfig(number=1_000, width=512),
        )


class DiscriminatorConfig(BlockConfig):
    """The multi-scale input and output discriminator (GigaGAN, section 3.4).

    Of its text branch only the global descriptor is used.
    """

    channels: tuple[PositiveInt, ...] = (24, 48, 96, 128)
    """Feature maps at the input resolution, its half, … down to 4 px."""
    levels: int = Field(3, ge=1)
    """How many pyramid levels enter, from the largest (paper: 5)."""
    every_stage: bool = True
    """Predict after every stage that a level passes; false: after the last one alone."""
    blocks: tuple[Depth, ...] = (1, 1, 0, 0)
    """Residual blocks per resolution, the one that halves it included (paper: 1, 2, 2, 2, 2).

    0 halves it with a single convolution.
    """
    attention: tuple[Depth, ...] = (0, 0, 1, 0)
    """Self-attention blocks per resolution."""
    head_layers: int = Field(2, ge=1)
    """Modulated 1×1 convolutions of a predictor ψ_j before its logit (paper: 4)."""
    caption_std: float = Field(1.0, ge=0)
    """Standard deviation over captions that the scales in a predictor ψ_j have before the first
    step, around 1; at 0 a logit begins as a function of the picture alone."""
    halving: Literal["low-pass", "mean"] = "low-pass"
    """How maps are halved: behind StyleGAN2's [1, 3, 3, 1] filter, or as the mean of 2×2, which
    leaves D more of the fine structure that tells generated pictures."""
    minibatch_std: bool = False
    """Whether the last stage sees the batch's standard deviation (paper: on in the upsampler)."""

    @property
    def resolution(self) -> int:
        """Side of the largest input image in pixels."""
        return 4 << (len(self.channels) - 1)

    @property
    def embedding_width(self) -> int:
        """Features of a picture without its caption: what leaves the last stage."""
        return self.channels[-1]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(level i, stage j) of every prediction D_ij, in the order in which they are made."""
        last = len(self.channels) - 1
        stages = range(last + 1) if self.every_stage else [last]
        return [(i, j) for j in stages for i in range(min(j + 1, self.levels))]

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        sides = [self.resolution >> i for i in range(len(self.channels))]
        _one_entry_each(self, "channels", ("blocks", "attention"), sides)
        if self.levels > len(self.channels):
            raise ValueError(
                f"levels = {self.levels}, but channels has only {len(self.channels)} resolutions"
            )
        _heads_fit(self.channels, self.attention, self.head_width)
        return self

    @classmethod
    def paper_64(cls) -> DiscriminatorConfig:
        """The 381.4 M parameter discriminator of the base, T_D included.

        Widths follow StyleGAN2's rule, 16384 / side up to the paper's 1536; the depth of T_D, which
        the paper leaves open, meets the count.
        """
        return cls(
            channels=(256, 512, 1024, 1536, 1536),
            levels=5,
            blocks=(1, 2, 2, 2, 2),
            attention=(0, 1, 2, 2, 0),
            head_width=64,
            mlp_ratio=4,
            head_layers=4,
            text=PAPER_TEXT.model_copy(update={"depth": 3}),
        )

    @classmethod
    def paper_64_to_512(cls) -> DiscriminatorConfig:
        """Judges the 64→512 upsampler; its size is not known, so widths are our choice."""
        return cls(
            channels=(64, 128, 256, 512, 512, 1024, 1024, 1024),
            levels=4,
            blocks=(1, 1, 2, 2, 2, 2, 2, 2),
            attention=(0, 0, 0, 0, 1, 2, 2, 0),
            head_width=64,
            mlp_ratio=4,
            head_layers=4,
            minibatch_std=True,
            text=PAPER_TEXT,
        )

    @classmethod
    def paper_128_to_1024(cls) -> DiscriminatorConfig:
        """Judges the 128→1024 upsampler; its size is not known, so widths are our choice."""
        smaller = cls.paper_64_to_512()
        return smaller.model_copy(
            update={
                "channels": (32, *smaller.channels),
                "blocks": (1, *smaller.blocks),
                "attention": (0, *smaller.attention),
            }
        )

    @classmethod
    def imagenet_256(cls) -> DiscriminatorConfig:
        """Judges the class-conditional ImageNet generator; widths are our choice."""
        return cls(
            channels=(64, 128, 256, 512, 1024, 1024, 1024),
            levels=5,
            blocks=(1, 1, 2, 2, 2, 2, 2),
            attention=(0, 0, 0, 1, 2, 2, 0),
            head_width=64,
            mlp_ratio=4,
            head_layers=4,
            minibatch_std=True,
            text=None,
            classes=ClassConfig(number=1_000, width=512),
        )

    @classmethod
    def imagenet_64_to_256(cls) -> DiscriminatorConfig:
        """Judges the unconditional ImageNet upsampler; widths are our choice."""
        return cls.imagenet_256().model_copy(update={"levels": 3, "classes": None})


class UpsamplerConfig(StyleConfig):
    """The text-conditioned upsampler: an asymmetric U-Net (GigaGAN, section 3.5)."""

    style_dim: int = Field(128, ge=1)
    """Dimensions of the style w (paper: 512)."""
    mapping_layers: int = Field(2, ge=1)
    """Layers of the mapping network (paper: 4)."""
    input_resolution: int = Field(32, ge=8)
    """Side of the low-resolution input in pixels."""
    down_channels: tuple[PositiveInt, ...] = (32, 64, 96)
    """Feature maps from the input resolution down to the bottom of the U."""
    up_channels: tuple[PositiveInt, ...] = (96, 64, 48, 32, 16)
    """Feature maps from the bottom of the U up to the output resolution."""
    kernels: tuple[PositiveInt, ...] = (1, 2, 2, 4, 4)
    """Filters in each bank of the way up, per resolution."""
    blocks: tuple[PositiveInt, ...] = (1, 1, 1, 1, 1)
    """Convolution blocks of the way up, per resolution."""
    attention: tuple[Depth, ...] = (1, 0, 0, 0, 0)
    """Attention blocks (self, then cross to the text) of the way up, per resolution."""
    noise_augmentation: float = Field(0.02, ge=0, le=1)
    """Standard deviation of the Gaussian noise added to the input, in training and in use."""

    @property
    def bottom(self) -> int:
        """Side of the smallest feature maps in pixels."""
        return self.input_resolution >> (len(self.down_channels) - 1)

    @property
    def resolution(self) -> int:
        """Side of the output image in pixels."""
        return self.bottom << (len(self.up_channels) - 1)

    @property
    def num_images(self) -> int:
        """Levels of the pyramid that it draws, the input's resolution included."""
        return (self.resolution // self.input_resolution).bit_length()

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        halvings = len(self.down_channels) - 1
        if self.input_resolution % (1 << halvings) or self.bottom < 1:
            raise ValueError(
                f"input_resolution = {self.input_resolution} cannot be halved {halvings} times, as "
                f"down_channels asks: use a multiple of {1 << halvings}"
            )
        sides = [self.bottom << i for i in range(len(self.up_channels))]
        _one_entry_each(self, "up_channels", ("kernels", "blocks", "attention"), sides)
        if self.resolution <= self.input_resolution:
            raise ValueError(
                f"up_channels has {len(self.up_channels)} resolutions and ends at "
                f"{self.resolution} px, which is not above input_resolution = "
                f"{self.input_resolution}: add some"
            )
        _heads_fit(self.up_channels, self.attention, self.head_width)
        return self

    @classmethod
    def paper_64_to_512(cls) -> UpsamplerConfig:
        """The 359.1 M parameter 64→512 upsampler (T included); widths and depths are our choice."""
        return cls(
            input_resolution=64,
            down_channels=(256, 512, 1024, 1024),
            up_channels=(1024, 1024, 512, 512, 256, 128, 64),
            kernels=(1, 1, 2, 4, 4, 4, 4),
            blocks=(3, 3, 3, 3, 3, 3, 2),
            attention=(2, 1, 1, 0, 0, 0, 0),
            head_width=64,
            mlp_ratio=4,
            latent_dim=128,
            style_dim=512,
            mapping_layers=4,
            mapping_lr_multiplier=0.01,
            text=PAPER_TEXT.model_copy(update={"depth": 2}),
        )

    @classmethod
    def paper_128_to_1024(cls) -> UpsamplerConfig:
        """The 693 M parameter 128→1024 upsampler (T included); widths and depths are our choice."""
        smaller = cls.paper_64_to_512()
        return smaller.model_copy(
            update={
                "input_resolution": 128,
                "up_channels": (1536, 1536, 768, 512, 256, 128, 64),
                "attention": (2, 2, 1, 0, 0, 0, 0),
            }
        )

    @classmethod
    def imagenet_64_to_256(cls) -> UpsamplerConfig:
        """The 359 M unconditional ImageNet upsampler; widths and depths are our choice."""
        larger = cls.paper_64_to_512()
        return larger.model_copy(
            update={
                "down_channels": (256, 512, 768, 1024),
                "up_channels": larger.up_channels[:-1],
                "kernels": (1, 1, 2, 4, 8, 8),
                "blocks": (3, 3, 3, 3, 3, 3),
                "attention": (4, 2, 2, 0, 0, 0),
                "text": None,
            }
        )


def _one_entry_each(
    config: Frozen, leader: str, followers: Sequence[str], sides: Sequence[int]
) -> None:
    """Refuse tuples over resolutions that are longer or shorter than the one of the widths."""
    if not sides:
        raise ValueError(f"{leader} is empty: give the feature maps of at least one resolution")
    shown = ", ".join(map(str, sides))
    for name in followers:
        values = getattr(config, name)
        if len(values) > len(sides):
            raise ValueError(
                f"{name} = {values} has {len(values)} entries, but {leader} has the "
                f"{len(sides)} resolutions {shown} px: entry {len(sides)} = "
                f"{values[len(sides)]} stands for a resolution that does not exist"
            )
        if len(values) < len(sides):
            raise ValueError(
                f"{name} = {values} has {len(values)} entries: give one for each of the "
                f"{len(sides)} resolutions {shown} px of {leader}"
            )


def _heads_fit(channels: Sequence[int], attention: Sequence[int], head_width: int) -> None:
    """Refuse attention where the channels do not divide into heads."""
    for maps, depth in zip(channels, attention, strict=True):
        if depth and maps % head_width:
            raise ValueError(
                f"attention over {maps} channels does not divide into heads of head_width = "
                f"{head_width}: use a multiple of it, or another head_width"
            )
