"""Every knob of the networks and of their training. Nothing here imports torch.

Tuples that run over resolutions start at 4 px (generators) and end at the output resolution;
those of the discriminator start at the input resolution and end at 4 px.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    """A section of the configuration: immutable, unknown keys refused, attribute docs shown."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


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


PAPER_TEXT = TextConfig(
    encoder="open_clip:ViT-L-14/openai",
    encoder_width=768,
    pooled_width=768,
    width=768,
    depth=4,
    head_width=64,
    mlp_ratio=4,
)


class BlockConfig(Frozen):
    """What convolution and attention blocks have in common in all networks."""

    head_width: int = Field(32, ge=8)
    """Channels of one attention head."""
    attention_scale: float | None = Field(None, gt=0)
    """Factor σ of −σ‖q − k‖²; null means 1 / head_width (1/√d starts as an identity)."""
    mlp_ratio: int = Field(2, ge=1)
    """Hidden width of the MLP after attention over its channels (paper: 4)."""
    residual_gain: float = Field(0.4, gt=0)
    """Factor of a convolution block's residual branch."""
    attention_gain: float = Field(0.3, gt=0)
    """Factor of the residual branches of attention and its MLP."""
    text: TextConfig = TextConfig()
    """The network's own text branch."""


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


class GeneratorConfig(StyleConfig):
    """The base generator, z and text to a pyramid of images (GigaGAN, section 3 and Table A2)."""

    channels: tuple[int, ...] = (128, 128, 48, 24)
    """Feature maps at 4, 8, … px; their number sets the resolution."""
    kernels: tuple[int, ...] = (1, 1, 4, 4)
    """Filters in each bank of sample-adaptive kernel selection, per resolution."""
    blocks: tuple[int, ...] = (1, 1, 1, 1)
    """Convolution blocks (two adaptive 3×3 each) per resolution."""
    attention: tuple[int, ...] = (0, 1, 0, 0)
    """Attention blocks (self, then cross to the text) per resolution."""
    style_input: bool = True
    """Whether w also shifts the constant 4×4 input."""

    @property
    def resolution(self) -> int:
        """Side of the output image in pixels."""
        return 4 << (len(self.channels) - 1)

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        lengths = {len(self.channels), len(self.kernels), len(self.blocks), len(self.attention)}
        if len(lengths) != 1:
            raise ValueError(
                f"channels, kernels, blocks and attention name {sorted(lengths)} resolutions; "
                "give each the same number of entries, from 4 px upwards"
            )
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
            style_input=False,
            text=PAPER_TEXT,
        )


class DiscriminatorConfig(BlockConfig):
    """The multi-scale input and output discriminator (GigaGAN, section 3.4).

    Of its text branch only the global descriptor is used.
    """

    channels: tuple[int, ...] = (24, 48, 96, 128)
    """Feature maps at the input resolution, its half, … down to 4 px."""
    levels: int = Field(3, ge=1)
    """How many pyramid levels enter, from the largest (paper: 5)."""
    blocks: tuple[int, ...] = (1, 1, 0, 0)
    """Residual blocks per resolution (paper: 1, 2, 2, 2, 2)."""
    attention: tuple[int, ...] = (0, 0, 1, 0)
    """Self-attention blocks per resolution."""
    head_layers: int = Field(2, ge=1)
    """Modulated 1×1 convolutions of a predictor ψ_j before its logit (paper: 4)."""
    minibatch_std: bool = False
    """Whether the last stage sees the batch's standard deviation (paper: on in the upsampler)."""

    @property
    def resolution(self) -> int:
        """Side of the largest input image in pixels."""
        return 4 << (len(self.channels) - 1)

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        lengths = {len(self.channels), len(self.blocks), len(self.attention)}
        if len(lengths) != 1:
            raise ValueError(
                f"channels, blocks and attention name {sorted(lengths)} resolutions; "
                "give each the same number of entries, from the input down to 4 px"
            )
        if self.levels > len(self.channels):
            raise ValueError(f"levels={self.levels} but only {len(self.channels)} resolutions")
        _heads_fit(self.channels, self.attention, self.head_width)
        return self

    @classmethod
    def paper_64(cls) -> DiscriminatorConfig:
        """The discriminator of the paper's 64 px base (381.4 M there; widths left open by it)."""
        return cls(
            channels=(256, 512, 1024, 1536, 1536),
            levels=5,
            blocks=(1, 2, 2, 2, 2),
            attention=(0, 1, 2, 2, 0),
            head_width=64,
            mlp_ratio=4,
            head_layers=4,
            text=PAPER_TEXT,
        )


class UpsamplerConfig(StyleConfig):
    """The text-conditioned upsampler: an asymmetric U-Net (GigaGAN, section 3.5)."""

    style_dim: int = Field(128, ge=1)
    """Dimensions of the style w (paper: 512)."""
    mapping_layers: int = Field(2, ge=1)
    """Layers of the mapping network (paper: 4)."""
    input_resolution: int = Field(32, ge=8)
    """Side of the low-resolution input in pixels."""
    down_channels: tuple[int, ...] = (32, 64, 96)
    """Feature maps from the input resolution down to the bottom of the U."""
    up_channels: tuple[int, ...] = (96, 64, 48, 32, 16)
    """Feature maps from the bottom of the U up to the output resolution."""
    kernels: tuple[int, ...] = (1, 2, 2, 4, 4)
    """Filters in each bank of the way up, per resolution."""
    blocks: tuple[int, ...] = (1, 1, 1, 1, 1)
    """Convolution blocks of the way up, per resolution."""
    attention: tuple[int, ...] = (1, 0, 0, 0, 0)
    """Attention blocks (self, then cross to the text) of the way up, per resolution."""
    noise_augmentation: float = Field(0.02, ge=0, le=1)
    """Standard deviation of the Gaussian noise added to the input, in training and in use."""

    @property
    def resolution(self) -> int:
        """Side of the output image in pixels."""
        bottom = self.input_resolution >> (len(self.down_channels) - 1)
        return bottom << (len(self.up_channels) - 1)

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        lengths = {
            len(self.up_channels),
            len(self.kernels),
            len(self.blocks),
            len(self.attention),
        }
        if len(lengths) != 1:
            raise ValueError(
                f"up_channels, kernels, blocks and attention name {sorted(lengths)} resolutions; "
                "give each the same number of entries, from the bottom of the U upwards"
            )
        if self.resolution <= self.input_resolution:
            raise ValueError(
                f"{len(self.up_channels)} resolutions on the way up end at {self.resolution} px, "
                f"which is not above the input's {self.input_resolution} px: add some"
            )
        _heads_fit(self.up_channels, self.attention, self.head_width)
        return self

    @classmethod
    def paper_64_to_512(cls) -> UpsamplerConfig:
        """The 359.1 M parameter 64→512 upsampler of the paper (widths left open by it)."""
        return cls(
            input_resolution=64,
            down_channels=(256, 512, 512, 1024),
            up_channels=(1024, 512, 512, 256, 256, 128, 64),
            kernels=(1, 1, 2, 4, 4, 4, 4),
            blocks=(2, 2, 2, 2, 2, 2, 1),
            attention=(2, 1, 1, 0, 0, 0, 0),
            head_width=64,
            mlp_ratio=4,
            latent_dim=128,
            style_dim=512,
            mapping_layers=4,
            mapping_lr_multiplier=0.01,
            text=PAPER_TEXT.model_copy(update={"depth": 2}),
        )


def _heads_fit(channels: tuple[int, ...], attention: tuple[int, ...], head_width: int) -> None:
    """Refuse attention where the channels do not divide into heads."""
    for maps, depth in zip(channels, attention, strict=True):
        if depth and maps % head_width:
            raise ValueError(
                f"attention over {maps} channels does not divide into heads of {head_width}: "
                "change head_width or the channels"
            )


class OptimizerConfig(Frozen):
    """AdamW for G and D, R1, and the average of the generator's weights."""

    lr: float = Field(2.5e-3, gt=0)
    """Learning rate of both networks (all weights have an equalized learning rate)."""
    beta2: float = Field(0.99, gt=0, lt=1)
    """Second-moment decay; the first is 0."""
    weight_decay: float = Field(1e-5, ge=0)
    """Decoupled weight decay."""
    attention_weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay of attention weights."""
    max_grad_norm: float = Field(10.0, gt=0)
    """Gradients of a network are scaled down to this norm."""
    warmup_images: int = Field(1_000, ge=0)
    """The learning rate rises linearly over this many images."""
    ema_half_life_images: int = Field(2_000, ge=1)
    """Half-life of the averaged generator in images; the paper's 0.9999 at batch 1024 is 7 M."""
    ema_ramp: float = Field(0.1, gt=0)
    """Early on the half-life is at most this share of the images seen."""
    r1_weight: float = Field(3.0, ge=0)
    """γ of R1 on the weighted mean logit; depends on how predictions are reduced."""
    r1_every: int = Field(16, ge=1)
    """Steps between two (lazy) R1 penalties; its weight is multiplied by the same number."""


class LossConfig(Frozen):
    """Weights of the losses. Starts are in images seen; a weight ramps up over `ramp_images`."""

    level_weights: tuple[float, ...] = (0.4, 0.3, 0.3)
    """Weight of each pyramid level, from the largest; normalised to sum 1."""
    intermediate: float = Field(0.3, ge=0)
    """Weight of predictions before the last stage, relative to the last stage's."""
    matching: float = Field(1.0, ge=0)
    """Matching-aware loss of D: pairs with another caption count as fake."""
    hard_mismatches: float = Field(0.5, ge=0, le=1)
    """Share of mismatched captions that differ in as few words as any seen lately."""
    recent_captions: int = Field(256, ge=1)
    """How many captions a mismatched one is chosen from, on each rank."""
    contrastive: float = Field(0.1, ge=0)
    """InfoNCE of generated images against the captions of the batch."""
    contrastive_scale: float = Field(20.0, gt=0)
    """Logit scale of InfoNCE (an open_clip encoder brings its own)."""
    vision: float = Field(0.1, ge=0)
    """Vision-aided loss on the features of a frozen image encoder."""
    vision_encoder: str = "embedded:efficientnet-lite0"
    """Frozen image encoder of the contrastive and vision-aided losses."""
    vision_resolution: int = Field(64, ge=32)
    """Images are resized to this side for the frozen image encoder."""
    auxiliary_start_images: int = Field(4_000, ge=0)
    """Contrastive and vision-aided losses start here: from step 0 they stop learning."""
    ramp_images: int = Field(4_000, ge=1)
    """Images over which their weights rise to the full value."""
    auxiliary_every: int = Field(4, ge=1)
    """Steps between two uses of the frozen image encoder (weights are not multiplied)."""


class TrainConfig(Frozen):
    """What the two training stages have in common."""

    total_images: int = Field(16_000, ge=1)
    """Length of the run in images seen."""
    batch_size: int = Field(32, ge=2)
    """Images per step, over all ranks."""
    seed: int = 0
    """Seed of initial weights, data order, noise and mismatched captions."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer, R1 and EMA."""
    loss: LossConfig = LossConfig()
    """Loss weights."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast; `auto` is bf16 where the device multiplies it natively, else fp32."""
    checkpoint_images: int = Field(4_000, ge=1)
    """Images between two checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints stay on disk."""
    sample_images: int = Field(4_000, ge=1)
    """Images between two sample grids with fixed prompts and z, and two probes."""
    log_images: int = Field(320, ge=1)
    """Images between two lines of the log."""
    num_probe_captions: int = Field(384, ge=0)
    """Held-out captions on which the probes of a tick are measured."""
    prompts: tuple[str, ...] = ()
    """Fixed prompts of the sample grid; empty means some of the held-out captions."""


class TrainBaseConfig(TrainConfig):
    """Training of the base generator."""

    kind: Literal["base"] = "base"
    """Which network this section trains."""
    generator: GeneratorConfig = GeneratorConfig()
    """The base generator."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    """Its discriminator."""

    @model_validator(mode="after")
    def _networks_agree(self) -> Self:
        _same_resolution(self.generator.resolution, self.discriminator, self.loss)
        return self


class TrainUpsamplerConfig(TrainConfig):
    """Training of the upsampler."""

    kind: Literal["upsampler"] = "upsampler"
    """Which network this section trains."""
    upsampler: UpsamplerConfig = UpsamplerConfig()
    """The upsampler."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig(
        channels=(16, 32, 64, 96, 96, 96),
        levels=3,
        blocks=(0, 0, 0, 0, 0, 0),
        attention=(0, 0, 0, 0, 1, 0),
        head_layers=1,
        minibatch_std=True,
    )
    """Its discriminator."""
    total_images: int = Field(2_000, ge=1)
    """Length of the run in images seen."""
    batch_size: int = Field(16, ge=2)
    """Images per step, over all ranks."""
    lpips: float = Field(10.0, ge=0)
    """Weight of LPIPS (VGG16) between output and target (paper: 10 for 64→512)."""
    lpips_crop: int = Field(64, ge=32)
    """LPIPS is measured on a random crop of this side (VGG16 dominates the cost of a step)."""
    lpips_samples: int = Field(4, ge=1)
    """LPIPS is measured on this many images of a batch."""
    pixel: float = Field(1.0, ge=0)
    """Weight of the mean absolute difference to the target (not in the paper; for short runs)."""

    @model_validator(mode="after")
    def _networks_agree(self) -> Self:
        _same_resolution(self.upsampler.resolution, self.discriminator, self.loss)
        made = (self.upsampler.resolution // self.upsampler.input_resolution).bit_length()
        if self.discriminator.levels > made:
            raise ValueError(
                f"discriminator.levels={self.discriminator.levels}, but the upsampler makes only "
                f"{made} levels from its input's resolution upwards"
            )
        return self


def _same_resolution(resolution: int, discriminator: DiscriminatorConfig, loss: LossConfig) -> None:
    """Refuse networks or level weights that do not fit together."""
    if discriminator.resolution != resolution:
        raise ValueError(
            f"the generator makes {resolution} px but the discriminator's "
            f"{len(discriminator.channels)} resolutions start at {discriminator.resolution} px"
        )
    if len(loss.level_weights) != discriminator.levels:
        raise ValueError(
            f"loss.level_weights has {len(loss.level_weights)} entries for "
            f"{discriminator.levels} discriminator levels"
        )


class EvaluateConfig(Frozen):
    """The evaluation stage."""

    protocol: Literal["embedded-heldout"] = "embedded-heldout"
    """Named set of rules: which captions and pictures, crop, resize, storage, metrics."""
    captions: str | None = None
    """COCO captions file to evaluate on; null means the held-out part of the download."""
    num_images: int | None = Field(None, ge=2)
    """How many captions; null means all."""
    batch_size: int = Field(16, ge=1)
    """Images generated and scored at once."""
    seed: int = 0
    """Seed of the latents."""
    truncation: float = Field(1.0, ge=0, le=1)
    """ψ of the truncation towards the mean style; 1 is none."""
    resolution: int = Field(128, ge=8)
    """Side to which both sets are brought before features are taken."""
    diversity_prompts: int = Field(12, ge=0)
    """Prompts on which the LPIPS diversity within a prompt is measured."""
    diversity_seeds: int = Field(4, ge=2)
    """Images per prompt for that."""
    kid_subset_size: int = Field(100, ge=2)
    """Images per subset of KID."""
    kid_subsets: int = Field(50, ge=1)
    """Subsets of KID."""


TrainStage = TrainBaseConfig | TrainUpsamplerConfig
