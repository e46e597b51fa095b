"""Every knob of training and evaluation. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from gigagan.common.settings import Frozen
from gigagan.config.networks import (
    DiscriminatorConfig,
    GeneratorConfig,
    UpsamplerConfig,
)
from gigagan.config.options import OptionsConfig, check_options
from gigagan.config.projected import ProjectedConfig, check_encoder
from gigagan.config.stylegan_t import UPPER_FROM, StyleTConfig, TrainedPart
from gigagan.seeds import LARGEST


def _kind_or(usual: str) -> tuple[Discriminator, BeforeValidator]:
    """Which part of a union of sections is meant: its `kind`, without one the usual.

    The usual ones have no such field: it is dropped.
    """

    def kind(section: Any) -> str:
        given = section.get("kind") if isinstance(section, dict) else getattr(section, "kind", None)
        return str(given or usual)

    def without_usual(section: Any) -> Any:
        if isinstance(section, dict) and section.get("kind") == usual:
            return {name: value for name, value in section.items() if name != "kind"}
        return section

    return Discriminator(kind), BeforeValidator(without_usual)


AnyGenerator = Annotated[
    Annotated[GeneratorConfig, Tag("gigagan")] | Annotated[StyleTConfig, Tag("stylegan-t")],
    *_kind_or("gigagan"),
]
"""The base generator's section: `kind: stylegan-t`, or none for GigaGAN's."""
AnyDiscriminator = Annotated[
    Annotated[DiscriminatorConfig, Tag("multi-scale")]
    | Annotated[ProjectedConfig, Tag("projected")],
    *_kind_or("multi-scale"),
]
"""The discriminator's section: `kind: projected`, or none for GigaGAN's."""

CANDIDATE_SIDE = 8
"""Side in pixels at which a warm start looks which of several latents is nearest."""
GUIDANCE_SIDE = 64
"""Largest side in pixels of what guidance looks at (StyleGAN-T); of larger pictures a crop."""

Seed = Annotated[int, Field(ge=0, le=LARGEST)]
"""A field that holds a seed."""


class OptimizerConfig(Frozen):
    """AdamW for G and D, R1, and the average of the generator's weights."""

    lr: float = Field(2.5e-3, gt=0)
    """Learning rate of both networks (all weights have an equalized learning rate)."""
    generator_rate: float = Field(1.0, gt=0)
    """Learning rate of G over that of D; below 1 is a two time-scale update rule (Heusel et al.
    2017, arXiv:1706.08500)."""
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
    cooldown_images: int = Field(0, ge=0)
    """Over the last so many images both learning rates fall linearly to 0; 0: they do not."""
    ema_half_life_images: int = Field(2_000, ge=1)
    """Half-life of the averaged generator in images; the paper's 0.9999 at batch 1024 is 7 M."""
    ema_ramp: float = Field(0.1, gt=0)
    """Early on the half-life is at most this share of the images seen."""
    r1_weight: float = Field(3.0, ge=0)
    """γ of R1 on the weighted mean logit; depends on how predictions are reduced."""
    r1_every: int = Field(16, ge=1)
    """Steps between two (lazy) R1 penalties; its weight is multiplied by the same number."""
    discriminator_every: int = Field(1, ge=1)
    """Steps of G for each step of D, which costs three of G's: 2 spares a third of the time.
    Must divide `r1_every`."""

    @model_validator(mode="after")
    def _penalties_meet_steps(self) -> Self:
        if self.r1_weight and self.r1_every % self.discriminator_every:
            raise ValueError(
                f"r1_every = {self.r1_every} is no multiple of discriminator_every = "
                f"{self.discriminator_every}: some penalties would fall between two steps of D"
            )
        return self


class WarmStartConfig(Frozen):
    """Shape first: G alone regresses on its caption's picture, then the adversarial game on top.

    The L1 that stays beside the adversarial terms is pix2pix's (Isola et al. 2017,
    arXiv:1611.07004, section 3.1), to begin with it alone SRGAN's (Ledig et al. 2017,
    arXiv:1609.04802, section 3.2). **Not in GigaGAN's paper**, and off in its presets: it teaches
    a network the pictures of its captions, which suits closed sets with a picture a caption, and
    is wrong on LAION."""

    images: int = Field(0, ge=0)
    """G trains alone up to here, in images seen, and there is no discriminator's work at all;
    0: no warm start, and nothing of this section counts."""
    lr: float = Field(5e-3, gt=0)
    """Learning rate of G until then; over the last fifth it falls to that of what follows."""
    regression: float = Field(3.0, ge=0)
    """Weight of the regression, before and after: mean absolute difference to the caption's
    picture, averaged over all levels of the pyramid, plus `gradients` times that of its edges."""
    gradients: float = Field(0.0, ge=0)
    """Weight of the absolute difference between neighbouring pixels' differences (image
    gradients; Mathieu et al. 2016, arXiv:1511.05440, equation 6), relative to the L1's."""
    candidates: int = Field(1, ge=1)
    """Latents z that stand for a picture: the one whose drawing at `CANDIDATE_SIDE` px is nearest
    to it learns (conditional implicit maximum likelihood, Li et al. 2020, arXiv:2004.03590). For
    conditions with many pictures each: a single latent learns their mean. Of GigaGAN's generator
    alone; 8 of them double the time of a step of G."""
    head_start_images: int = Field(2_000, ge=0)
    """Images in which D learns to tell the pictures apart before G hears of it."""
    ramp_images: int = Field(2_000, ge=1)
    """Images in which G's adversarial terms then rise to their full weight."""
    adversarial: float = Field(0.15, ge=0)
    """That weight, of all that reaches G through D and the frozen image encoder."""


class LossConfig(Frozen):
    """Weights of the losses. Starts are in images seen; a weight ramps up over `ramp_images`."""

    adversarial: Literal["logistic", "hinge"] = "logistic"
    """What D's logits are for: logistic with a non-saturating G (StyleGAN2, GigaGAN), or the hinge
    (StyleGAN-T, Projected GAN)."""
    level_weights: tuple[float, ...] = (0.4, 0.3, 0.3)
    """Weight of each pyramid level, from the largest; normalised to sum 1."""
    intermediate: float = Field(0.3, ge=0)
    """Weight of predictions before the last stage, relative to the last stage's."""
    matching: float = Field(1.0, ge=0)
    """Matching-aware loss of D: pairs with another caption count as fake."""
    matching_images: Literal["real", "half", "both"] = "half"
    """Which images meet another caption: real ones, half a batch of real and half of generated
    ones, or all of both (paper)."""
    generator_matching: float = Field(0.0, ge=0)
    """G's own term: its images shall count as fake beside another caption."""
    hard_mismatches: float = Field(0.5, ge=0, le=1)
    """Share of mismatched captions that differ in as few words as any seen lately.

    The others are a derangement of the batch (paper: all of them)."""
    recent_captions: int = Field(256, ge=1)
    """How many captions a hard mismatched one is chosen from, on each rank."""
    contrastive: float = Field(0.1, ge=0)
    """InfoNCE of generated images against the captions of the batch."""
    contrastive_scale: float = Field(20.0, gt=0)
    """Logit scale of InfoNCE for embedded encoders; an open_clip encoder brings its own."""
    guidance: float = Field(0.0, ge=0)
    """Squared angle between generated images and their captions in the joint space of the frozen
    image encoder (StyleGAN-T's CLIP guidance, which its paper gives 0.2); an embedded encoder's
    space is that of its aligner."""
    vision: float = Field(0.1, ge=0)
    """Vision-aided loss on the features of a frozen image encoder."""
    vision_encoder: str = "embedded:efficientnet-lite0"
    """Frozen image encoder of the contrastive and vision-aided losses."""
    vision_heads: Literal["modulated", "projected"] = "modulated"
    """Heads of the vision-aided loss: one 3×3 and a logit modulated by the caption (GigaGAN), or
    StyleGAN-T's, with `ProjectedConfig`'s defaults."""
    vision_resolution: int = Field(64, ge=32)
    """Images are resized to this side for the frozen image encoder."""
    auxiliary_start_images: int = Field(4_000, ge=0)
    """Contrastive and vision-aided losses start here: from step 0 they stop learning."""
    ramp_images: int = Field(4_000, ge=1)
    """Images over which their weights rise to the full value."""
    auxiliary_every: int = Field(4, ge=1)
    """Steps between two uses of the frozen image encoder (weights are not multiplied)."""

    @model_validator(mode="after")
    def _has_stages_for_heads(self) -> Self:
        if self.vision and self.vision_heads == "projected":
            check_encoder(
                self.vision_encoder,
                self.vision_resolution,
                name="vision_encoder",
                side_name="vision_resolution",
            )
        return self


class AugmentConfig(Frozen):
    """Augmentation of all that D sees, real and generated alike; nothing is on by default."""

    diffaugment: tuple[Literal["color", "translation", "cutout"], ...] = ()
    """What is done to an image (DiffAugment, Zhao et al. 2020, arXiv:2006.10738).

    `color`: brightness ± 0.5 (of a range of 2), saturation × 0 to 2, contrast × 0.5 to 1.5.
    `translation`: up to 1/8 of the side, reflected at the edges. `cutout`: a square of half the
    side becomes grey. Beware of `color` with captions: it turns a red thing grey or dark whose
    caption says red, so D learns to overlook the words for colours."""
    probability: float = Field(1.0, ge=0, le=1)
    """Share of images that are augmented, all or nothing; ignored with `ada`."""
    ada: bool = False
    """Adapt that share to how far D overfits (ADA, Karras et al. 2020, arXiv:2006.06676)."""
    ada_target: float = Field(0.6, gt=-1, lt=1)
    """r_t = E[sign D(real)] that is aimed at; above it the share rises."""
    ada_every: int = Field(4, ge=1)
    """Steps between two changes of the share."""
    ada_images: int = Field(500_000, ge=1)
    """Images in which the share can rise from 0 to 1."""
    blur_sigma: float = Field(0.0, ge=0)
    """σ in pixels of the largest level with which D's input is blurred at first; 0 is never.

    StyleGAN3-R (arXiv:2106.12423) has 10 where its Gaussian is 2^−(x/σ)², which is 8.5 here."""
    blur_fade_images: int = Field(200_000, ge=1)
    """Images over which σ falls linearly to 0."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if len(set(self.diffaugment)) < len(self.diffaugment):
            raise ValueError(f"diffaugment={self.diffaugment} names one twice: name it once")
        if self.ada and not self.diffaugment:
            raise ValueError("ada needs something to apply: name it in diffaugment")
        return self


class HealthConfig(Frozen):
    """When a step is skipped, a person is warned, or a run goes back to its last checkpoint."""

    skip_factor: float = Field(20.0, gt=1)
    """A step is skipped if its gradient norm exceeds this many times the running geometric mean
    of its kind; ordinary noise stays within a factor of 3, an explosion passes 100."""
    settle_steps: int = Field(50, ge=1)
    """Good steps of a kind before norms are compared: the first ones fall by a factor of 10.
    Steps that are not finite are skipped from the start."""
    max_bad_share: float = Field(0.5, ge=0, le=1)
    """Fatal: more than this share of the steps between two lines of the log was skipped."""
    max_logit_spread: float = Field(50.0, gt=0)
    """Fatal: |mean logit of real − of generated images|; 0.5 to 5 is usual, and the logistic
    loss has no gradient left beyond 20."""
    max_r1: float = Field(100.0, gt=0)
    """Fatal: squared gradient of D's mean logit at real images; 0.01 to 1 is usual."""
    overconfident_loss: float = Field(0.02, ge=0)
    """Warning: D's losses on real and on generated images are both below this (0.69 is chance)
    …"""
    patience: int = Field(10, ge=1)
    """… for this many lines of the log in a row."""
    min_selection_entropy: float = Field(0.05, ge=0, le=1)
    """Warning: entropy of the kernel selection in units of log N (1 = even, 0 = a bank of one)."""
    max_self_weight: float = Field(0.95, gt=0, le=1)
    """Warning: mean weight that a position gives itself in self-attention (1 = sees no other)."""
    min_z_effect: float = Field(0.01, ge=0)
    """Warning: standard deviation of a pixel over latents at a fixed prompt, the range being 2."""
    max_rollbacks: int = Field(3, ge=0)
    """How often a run goes back to its last checkpoint before it gives up."""
    rollback_rate: float = Field(0.5, gt=0, le=1)
    """The learning rate is multiplied by this at each return to a checkpoint."""
    stall_seconds: float = Field(1_800, ge=0)
    """A process whose step takes longer writes its stacks and ends; 0 = off. The longest pause
    that is no fault (first compilation, pictures, a checkpoint on slow storage) must fit."""


class SystemConfig(Frozen):
    """How a step is laid out on the machine; what it computes stays the same to rounding."""

    accumulate: int = Field(1, ge=1)
    """Micro-batches per step and rank: memory of activations falls by this factor, a step takes
    little longer. Statistics and contrasts over a batch then see one micro-batch. For batches
    that do not fit."""
    shard_optimizer: bool = False
    """Each rank keeps AdamW's moments (8 bytes per parameter) of its part of the parameters only;
    costs a broadcast of the weights per step. For networks whose state crowds out activations."""
    bucket_mb: float = Field(25.0, gt=0)
    """Megabytes of gradients that travel together while the backward still runs. More use the
    network better, fewer begin earlier."""
    channels_last: bool = False
    """Convolution filters lie in memory with channels last: tensor cores of GPUs multiply these
    without rearranging them. No memory."""
    compile: bool = False
    """Compile the blocks of G and D: minutes at the start, then fewer passes over memory per step;
    R1 steps of D run uncompiled. For long runs on GPUs."""
    tf32: bool = True
    """GPUs may round the factors of float32 products to 10 bits (TF32), many times as fast: what
    is left to float32, R1 above all, loses no more than bf16 loses elsewhere."""
    deterministic: bool = True
    """GPUs add up in a fixed order, so that a run that was interrupted agrees with one that was not
    in every bit. False: whatever is fastest, convolutions by trial, and the last digits differ."""
    loader_threads: int | None = Field(None, ge=1)
    """Threads of a rank that decode pictures; null: one on CPUs, which have other work, and on
    GPUs the rank's share of the machine's cores, 16 at most."""
    activation_checkpointing: bool = False
    """Keep only the input of each resolution and compute the rest again in the backward: about a
    third more time per step. For resolutions or batches that do not fit; try `accumulate`
    first."""
    collective_timeout_s: float = Field(600.0, gt=0)
    """Seconds that ranks wait for one that does not answer before they end with an error; more
    than the pictures, probes and checkpoints that rank 0 makes alone."""


class PhaseConfig(Frozen):
    """A stretch of a training in which a part of G learns (StyleGAN-T, section 3.5).

    D learns in all of them; it and guidance see captions by the frozen encoder."""

    trains: TrainedPart = "all"
    """`all` of G but its own text encoder, its `upper` blocks (above 64 px, and every toRGB), or
    that `text_encoder` alone."""
    until_images: int | None = Field(None, ge=1)
    """Images seen at which it ends; null, of the last one: the end of the run."""
    generator_lr: float | None = Field(None, gt=0)
    """Learning rate of G; null: the optimizer's (code: 3e-6 for the text encoder)."""
    guidance: float | None = Field(None, ge=0)
    """In place of `loss.guidance` (paper: up to 50 for the text encoder); null: that."""


FREE_TO_CHANGE = (
    "total_images",
    "checkpoint_images",
    "keep_checkpoints",
    "milestone_images",
    "sample_images",
    "snapshot_images",
    "log_images",
    "num_probe_captions",
    "prompts",
    "health",
    "system",
)
"""Settings, or sections, that a resumed run may change: they say how long a run is, what is
looked at, and on what it runs, not what is learned."""


class TrainConfig(Frozen):
    """What the two training stages have in common."""

    total_images: int = Field(16_000, ge=1)
    """Length of the run in images seen."""
    batch_size: int = Field(32, ge=2)
    """Images per step, over all ranks."""
    seed: Seed = 0
    """Seed of initial weights, data order, noise and mismatched captions."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer, R1 and EMA."""
    loss: LossConfig = LossConfig()
    """Loss weights."""
    warm_start: WarmStartConfig = WarmStartConfig()
    """A start by regression, before there is a discriminator; off."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of what D sees."""
    options: OptionsConfig = OptionsConfig()
    """Terms beside the losses that neither paper has; none is on."""
    health: HealthConfig = HealthConfig()
    """When steps are skipped and when a run goes back to its last checkpoint."""
    system: SystemConfig = SystemConfig()
    """How a step is laid out on the machine."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast; `auto` is bf16 where the device multiplies it natively, else fp32."""
    checkpoint_images: int = Field(4_000, ge=1)
    """Images between two checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints stay on disk."""
    milestone_images: int | None = Field(None, ge=1)
    """Images between two checkpoints that are kept for good; null means none."""
    sample_images: int = Field(4_000, ge=1)
    """Images between two sample grids with fixed prompts and z, and two probes."""
    snapshot_images: int | None = Field(None, ge=1)
    """Images between two snapshots in `snapshots/`, written with a sample grid; null means none.

    For curves of FID and KID over a run."""
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
    generator: AnyGenerator = GeneratorConfig()
    """The base generator."""
    discriminator: AnyDiscriminator = DiscriminatorConfig(halving="mean")
    """Its discriminator."""
    phases: tuple[PhaseConfig, ...] = ()
    """What of G learns when, one after the other; none: all of it, to the end."""

    @property
    def network(self) -> GeneratorConfig | StyleTConfig:
        """What draws."""
        return self.generator

    @property
    def is_guided(self) -> bool:
        """Whether guidance has a weight at any time."""
        return any(self.guidance_in(phase) for phase in self.phases or (PhaseConfig(),))

    def guidance_in(self, phase: PhaseConfig) -> float:
        """Its weight then."""
        return self.loss.guidance if phase.guidance is None else phase.guidance

    @model_validator(mode="after")
    def _networks_agree(self) -> Self:
        if isinstance(self.discriminator, ProjectedConfig):
            _only_what_heads_know(self.loss, self.optimizer)
        else:
            _same_resolution(self.generator, self.discriminator, self.loss)
        _same_condition(self.generator, self.discriminator, self.loss, guided=self.is_guided)
        check_options(self.options, self.generator, self.discriminator, self.augment.diffaugment)
        _something_to_learn(self.warm_start, self.warm_start.regression)
        if self.warm_start.candidates > 1 and not isinstance(self.generator, GeneratorConfig):
            raise ValueError(
                f"warm_start.candidates = {self.warm_start.candidates}, but only GigaGAN's "
                "generator draws the small pictures by which they are told: set it to 1"
            )
        _phases_follow(self.phases)
        for number, phase in enumerate(self.phases):
            _has_what_it_trains(f"phases[{number}].trains", phase.trains, self.generator)
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

    @property
    def network(self) -> UpsamplerConfig:
        """What draws."""
        return self.upsampler

    @model_validator(mode="after")
    def _networks_agree(self) -> Self:
        if self.loss.guidance:
            raise ValueError(
                f"loss.guidance = {self.loss.guidance}, but an upsampler is trained without an "
                "encoder of images: set it to 0"
            )
        _same_resolution(self.upsampler, self.discriminator, self.loss)
        _same_condition(self.upsampler, self.discriminator, self.loss)
        check_options(self.options, self.upsampler, self.discriminator, self.augment.diffaugment)
        _something_to_learn(self.warm_start, self.warm_start.regression + self.pixel + self.lpips)
        if self.warm_start.candidates > 1:
            raise ValueError(
                f"warm_start.candidates = {self.warm_start.candidates}, but what an upsampler "
                "draws hangs on its input: set it to 1"
            )
        return self


def _same_resolution(
    generator: GeneratorConfig | StyleTConfig | UpsamplerConfig,
    discriminator: DiscriminatorConfig,
    loss: LossConfig,
) -> None:
    """Refuse networks or level weights that do not fit together."""
    if discriminator.resolution != generator.resolution:
        raise ValueError(
            f"the generator makes {generator.resolution} px but the discriminator's "
            f"{len(discriminator.channels)} resolutions start at {discriminator.resolution} px"
        )
    if discriminator.levels > generator.num_images:
        raise ValueError(
            f"discriminator.levels = {discriminator.levels}, but the generator makes only "
            f"{generator.num_images} level{'s' * (generator.num_images > 1)} of a pyramid"
        )
    if len(loss.level_weights) != discriminator.levels:
        raise ValueError(
            f"loss.level_weights has {len(loss.level_weights)} entries for "
            f"{discriminator.levels} discriminator levels"
        )


def _only_what_heads_know(loss: LossConfig, optimizer: OptimizerConfig) -> None:
    """Refuse what a projected critic has not, rather than leave it out without a word."""
    for name, value in {
        "optimizer.r1_weight": optimizer.r1_weight,
        "loss.vision": loss.vision,
        "loss.contrastive": loss.contrastive,
        "loss.generator_matching": loss.generator_matching,
    }.items():
        if value:
            raise ValueError(
                f"{name} = {value}, but the heads of discriminator.kind = projected have no such "
                "term: set it to 0"
            )


def _phases_follow(phases: tuple[PhaseConfig, ...]) -> None:
    """Refuse phases that do not end one after the other, the last with the run."""
    ends = [phase.until_images for phase in phases]
    if not ends:
        return
    if ends[-1] is not None:
        raise ValueError(
            f"phases[{len(ends) - 1}].until_images = {ends[-1]}, but the last phase lasts to the "
            "end of the run: set it to null, or add a phase"
        )
    last = 0
    for number, end in enumerate(ends[:-1]):
        if end is None or end <= last:
            raise ValueError(
                f"phases[{number}].until_images = {end}, but the next phase begins there: give "
                f"images seen, more than {last}"
            )
        last = end


def _has_what_it_trains(
    name: str, trains: TrainedPart, generator: GeneratorConfig | StyleTConfig
) -> None:
    """Refuse a phase for a part that the generator has not."""
    if trains == "all":
        return
    if not isinstance(generator, StyleTConfig):
        raise ValueError(
            f"{name} = {trains}, but a generator of GigaGAN trains as a whole: use all, or "
            "generator.kind = stylegan-t"
        )
    if trains == "text_encoder" and not generator.own_text_encoder:
        raise ValueError(
            f"{name} = text_encoder, but the generator has no text encoder of its own: set "
            "generator.own_text_encoder to true"
        )
    if trains == "upper" and generator.resolution <= UPPER_FROM:
        raise ValueError(
            f"{name} = upper, but the generator draws {generator.resolution} px and has no blocks "
            f"above {UPPER_FROM} px: use all, or add entries to generator.channels"
        )


def _something_to_learn(warm_start: WarmStartConfig, weights: float) -> None:
    """Refuse a warm start without a loss."""
    if warm_start.images and not weights:
        raise ValueError(
            f"warm_start.images = {warm_start.images}, but warm_start.regression is 0 and nothing "
            "else ties pictures to captions: G would have no loss until then"
        )


def _same_condition(
    generator: GeneratorConfig | StyleTConfig | UpsamplerConfig,
    discriminator: DiscriminatorConfig | ProjectedConfig,
    loss: LossConfig,
    *,
    guided: bool = False,
) -> None:
    """Refuse networks that are conditioned on different things, and losses that ask for others."""
    g_encoder = generator.text.encoder if generator.text else None
    d_encoder = discriminator.text.encoder if discriminator.text else None
    if g_encoder != d_encoder:
        raise ValueError(
            f"generator and discriminator read different encoders, {g_encoder} and {d_encoder}: "
            "set text.encoder of both to the same"
        )
    g_classes = generator.classes.number if generator.classes else None
    d_classes = discriminator.classes.number if discriminator.classes else None
    if g_classes != d_classes:
        raise ValueError(
            f"generator and discriminator know {g_classes} and {d_classes} classes: set "
            "classes.number of both to the same"
        )
    if g_encoder is not None:
        return
    needs = {"contrastive": "captions, but text is null"}
    if g_classes is None:
        said = "captions or classes, but text and classes are null"
        needs = {"matching": said, "generator_matching": said, **needs}
    used = [
        f"{name} = {value} needs {what}"
        for name, what in needs.items()
        if (value := getattr(loss, name))
    ]
    used += [f"guidance = {loss.guidance} needs captions, but text is null"] if guided else []
    if used:
        raise ValueError(f"loss.{used[0]}: set it to 0")


def with_class_names(config: TrainStage, names: Sequence[str]) -> TrainStage:
    """The section whose networks know these classes, by number.

    Raises:
        ValueError: the networks are built for another number of classes.
    """
    sections = [
        name for name in ("generator", "upsampler", "discriminator") if hasattr(config, name)
    ]
    changes = {}
    for name in sections:
        section = getattr(config, name)
        if section.classes.number != len(names):
            raise ValueError(
                f"{name}.classes.number = {section.classes.number}, but the shards hold "
                f"{len(names)} classes: set it to {len(names)}"
            )
        known = section.classes.model_copy(update={"names": tuple(names)})
        changes[name] = section.model_copy(update={"classes": known})
    return config.model_copy(update=changes)


class EvaluateConfig(Frozen):
    """The evaluation stage."""

    protocol: Literal[
        "embedded-heldout",
        "coco-captions",
        "gigagan-coco2014-256",
        "coco2017-512",
        "imagenet-256",
        "imagenet-64-256",
        "upsampler-128-1024",
        "stylegan-t-coco-256",
        "stylegan-t-coco-64",
    ] = "embedded-heldout"
    """Named rules: counts, crop, resize, judges; `python -m gigagan evaluate --protocols`."""
    captions: str | None = None
    """COCO captions file to evaluate on; null means the held-out part of the download."""
    num_images: int | None = Field(None, ge=2)
    """How many captions; null means the protocol's number, or all."""
    batch_size: int = Field(16, ge=1)
    """Images generated and scored at once."""
    seed: Seed = 0
    """Seed of the latents."""
    truncation: float = Field(1.0, ge=0, le=1)
    """ψ of the truncation towards the mean style; 1 is none."""
    resolution: int | None = Field(None, ge=8)
    """Side to which both sets are brought before features are taken; null: the protocol's, or
    128."""
    clip: str | None = None
    """Encoder of the CLIP score, as in `open_clip:ViT-B-32/openai`; null means the protocol's."""
    cmmd: str | None = None
    """CLIP encoder of CMMD, as in `open_clip:ViT-L-14-336/openai`; null measures none."""
    dinov2: str | None = None
    """Encoder of FD-DINOv2, as in `dinov2:vitl14`; null measures none."""
    resamples: int = Field(200, ge=0)
    """Resamples behind the 95 % intervals of FID (20 at most) and of median ranks; 0 gives no
    intervals."""
    naming_captions: int = Field(192, ge=0)
    """Most captions of each split of the gallery (trained, combinations, unseen) of which it is
    measured whether the picture can be named; 0 measures none."""
    naming_splits: tuple[Literal["trained", "combination", "unseen"], ...] = (
        "trained",
        "combination",
        "unseen",
    )
    """Splits of which captions are drawn for that; of others only what is drawn anyway is named."""
    diversity_prompts: int = Field(12, ge=0)
    """Prompts on which the LPIPS diversity within a prompt is measured."""
    diversity_seeds: int = Field(4, ge=2)
    """Images per prompt for that."""
    dissect_captions: int = Field(128, ge=0)
    """Most captions of the gallery by which the generator is dissected (which units draw which
    concept); 0 dissects none."""
    kid_subset_size: int = Field(100, ge=2)
    """Images per subset of KID."""
    kid_subsets: int = Field(50, ge=1)
    """Subsets of KID."""
    sweep: tuple[float, ...] = (0.4, 0.6, 0.8, 1.0)
    """ψ of the points of the truncation curve; empty draws none."""
    sweep_captions: int = Field(48, ge=2)
    """Captions drawn for each point of it."""
    speed_batches: tuple[int, ...] = (1, 4, 16)
    """Batch sizes at which drawing is timed; empty times none."""
    neighbours: int = Field(8, ge=0)
    """Pictures shown beside their nearest training pictures; 0 looks for none."""
    neighbour_pool: int = Field(2_000, ge=2)
    """Training pictures searched, evenly spread over the shards."""


AdaptedLayers = Literal["modulation", "convolutions", "text"]
"""Mapping network and affine layers of styles; banks of adaptive convolutions; text layers T."""


class AdaptConfig(Frozen):
    """A base taught something new, or made to forget a thing, by low-rank updates of its weights.

    G regresses on the new pictures (`WarmStartConfig` says what that suits), and on old captions
    draws what the base draws at the same z."""

    base: str | None = None
    """Snapshot of the base; null: what the stage train-base left."""
    pictures: str | None = None
    """Folder of new pictures with captions: a captions.json in COCO's format, or fake_images/
    beside captions.txt. Null with `unlearn`."""
    unlearn: str | None = Field(None, pattern=r"\S")
    """Thing to forget, as captions call it (`padlock`): captions with it then draw what the base
    draws for the same caption with `replacement`. Null with `pictures`."""
    replacement: str = Field("something", pattern=r"\S")
    """What stands for it and its article."""
    old_captions: str | None = None
    """Captions of what must stay: a text file with one a line, a COCO file or folder, or the
    package's trained_on.json. Null: those of the held-out set, its whole gallery."""
    layers: tuple[AdaptedLayers, ...] = Field(("modulation", "convolutions", "text"), min_length=1)
    """Which weights are adapted."""
    rank: int | None = Field(4, ge=1)
    """Rank of every update; null: full updates, in a file as large as these weights."""
    total_images: int = Field(12_000, ge=1)
    """Length in images seen, new and old; 200 a second on a core at 32 px."""
    batch_size: int = Field(16, ge=2)
    """Images per step: half are new, half old."""
    lr: float = Field(0.02, gt=0)
    """Learning rate of Adam, relative to a weight's size; over the last half it falls to 0."""
    keep: float = Field(1.0, ge=0)
    """Weight of what must stay against what is new."""
    gradients: float = Field(0.5, ge=0)
    """Weight of pictures' edges in both losses, relative to the L1's."""
    checkpoint_images: int = Field(4_000, ge=1)
    """Images between two checkpoints."""
    measure_pictures: str | None = None
    """Folder of further new pictures, on which it is measured; null: those it learned from."""
    measure_captions: int = Field(128, ge=2)
    """Most captions, new and old each, on which it is measured before and after; KID on 48."""
    seed: Seed = 0
    """Seed of the factors, of the order and of latents."""

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        if self.pictures is not None and self.unlearn is not None:
            raise ValueError(
                f"pictures = {self.pictures} and unlearn = {self.unlearn}: give one of them"
            )
        return self


TrainStage = TrainBaseConfig | TrainUpsamplerConfig
