"""Named configurations: the paper's sizes, and the ladder of its ablation (Table 1) at one size.

`small_32` and `small_32_to_128` are the defaults of the training sections: a CPU trains them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from gigagan.common.settings import nearest
from gigagan.config.networks import (
    DiscriminatorConfig,
    GeneratorConfig,
    TextConfig,
    UpsamplerConfig,
)
from gigagan.config.projected import ProjectedConfig
from gigagan.config.stylegan_t import StyleTConfig
from gigagan.config.training import (
    AugmentConfig,
    LossConfig,
    OptimizerConfig,
    TrainBaseConfig,
    TrainStage,
    TrainUpsamplerConfig,
)

PUBLISHED: dict[str, dict[str, float]] = {
    "paper_64": {"Generator": 652.5e6, "Discriminator": 381.4e6},
    "paper_64_to_512": {"Upsampler": 359.1e6},
    "paper_128_to_1024": {"Upsampler": 693e6},
    "imagenet_256": {"Generator": 569e6},
    "imagenet_64_to_256": {"Upsampler": 359e6},
}
"""Parameters as the paper states them, by preset and network; its base generator's without T."""

PAPER_OPTIMIZER = OptimizerConfig(
    ema_half_life_images=7_000_000, warmup_images=200_000, r1_weight=0.2048
)
PAPER_LOSS = LossConfig(
    level_weights=(0.33, 0.17, 0.17, 0.17, 0.17),
    intermediate=0.01,
    matching_images="both",
    hard_mismatches=0.0,
    vision_encoder="open_clip:ViT-B-32/openai",
    vision_resolution=224,
    auxiliary_start_images=20_000_000,
    ramp_images=20_000_000,
)
WITHOUT_TEXT: dict[str, Any] = {"matching": 0.0, "contrastive": 0.0}


def _loss(**changes: Any) -> LossConfig:
    return LossConfig.model_validate({**PAPER_LOSS.model_dump(), **changes})


def paper_64() -> TrainBaseConfig:
    """Text → 64 px on 96 to 128 GPUs (GigaGAN, Table A2).

    Start and ramp of the auxiliary losses are our choice. The weight of R1 is the paper's lower
    one; how the paper reduces its predictions before R1 is not known (ours is a weighted mean).
    """
    return TrainBaseConfig(
        generator=GeneratorConfig.paper_64(),
        discriminator=DiscriminatorConfig.paper_64(),
        loss=PAPER_LOSS,
        optimizer=PAPER_OPTIMIZER,
        total_images=1_382_400_000,  # 1350 k steps
        batch_size=1024,
        checkpoint_images=2_048_000,
        sample_images=2_048_000,
        log_images=20_480,
    )


def _paper_upsampler(
    upsampler: UpsamplerConfig, discriminator: DiscriminatorConfig, **changes: Any
) -> TrainUpsamplerConfig:
    levels = discriminator.levels
    loss = _loss(level_weights=(1 / levels,) * levels, contrastive=0.0, vision=0.0, **changes)
    return TrainUpsamplerConfig(
        upsampler=upsampler,
        discriminator=discriminator,
        loss=loss,
        optimizer=PAPER_OPTIMIZER.model_copy(update={"ema_half_life_images": 1_000_000}),
        total_images=200_000_000,
        batch_size=192,
        lpips_crop=upsampler.resolution,
        lpips_samples=32,
        pixel=0.0,
        checkpoint_images=960_000,
        sample_images=960_000,
        log_images=9_600,
    )


def paper_64_to_512() -> TrainUpsamplerConfig:
    """64 → 512 px with text; length of the run and batch are our choice."""
    return _paper_upsampler(
        UpsamplerConfig.paper_64_to_512(), DiscriminatorConfig.paper_64_to_512()
    )


def paper_128_to_1024() -> TrainUpsamplerConfig:
    """128 → 1024 px with text; length of the run and batch are our choice."""
    return _paper_upsampler(
        UpsamplerConfig.paper_128_to_1024(), DiscriminatorConfig.paper_128_to_1024()
    )


def imagenet_256() -> TrainBaseConfig:
    """1000 classes → 256 px (GigaGAN, ImageNet); length of the run and batch are our choice."""
    return TrainBaseConfig(
        generator=GeneratorConfig.imagenet_256(),
        discriminator=DiscriminatorConfig.imagenet_256(),
        loss=_loss(**WITHOUT_TEXT),
        optimizer=PAPER_OPTIMIZER,
        total_images=500_000_000,
        batch_size=1024,
    )


def imagenet_64_to_256() -> TrainUpsamplerConfig:
    """64 → 256 px, unconditional; length of the run and batch are our choice."""
    trained = _paper_upsampler(
        UpsamplerConfig.imagenet_64_to_256(),
        DiscriminatorConfig.imagenet_64_to_256(),
        matching=0.0,
    )
    return trained.model_copy(update={"lpips": 100.0})


# ---- StyleGAN-T ------------------------------------------------------------------------------

_HINGE: dict[str, Any] = {"adversarial": "hinge", "vision": 0.0, "contrastive": 0.0}
_PLAIN_ADAM: dict[str, Any] = {"r1_weight": 0.0, "weight_decay": 0.0, "attention_weight_decay": 0.0}


def _stylegan_t(generator: StyleTConfig) -> TrainBaseConfig:
    """As the code of StyleGAN-T trains at batch 2048; the length of the run is our choice."""
    return TrainBaseConfig(
        generator=generator,
        discriminator=ProjectedConfig.stylegan_t(),
        loss=LossConfig.model_validate(
            {
                **_HINGE,
                "matching": 0.0,
                "hard_mismatches": 0.0,
                "guidance": 0.2,
                "vision_encoder": "open_clip:ViT-L-14/openai",
                "vision_resolution": 224,
                "auxiliary_start_images": 0,
                "ramp_images": 1,
                "auxiliary_every": 1,
            }
        ),
        optimizer=OptimizerConfig.model_validate(
            {**_PLAIN_ADAM, "lr": 2e-3, "ema_half_life_images": 640_000, "ema_ramp": 0.05}
        ),
        augment=AugmentConfig(
            diffaugment=("color", "translation", "cutout"),
            blur_sigma=27.2,  # the code's 32, in whose Gaussian 2 stands for e
            blur_fade_images=1_000_000,
        ),
        total_images=25_000_000,
        batch_size=2048,
        checkpoint_images=1_024_000,
        sample_images=1_024_000,
        log_images=40_960,
    )


def stylegan_t_lite_64() -> TrainBaseConfig:
    """Text → 64 px, 75 M parameters (StyleGAN-T, `--cfg lite`)."""
    return _stylegan_t(StyleTConfig.lite_64())


def stylegan_t_full_64() -> TrainBaseConfig:
    """Text → 64 px, 976 M parameters (StyleGAN-T, `--cfg full`)."""
    return _stylegan_t(StyleTConfig.full_64())


def stylegan_t_small_32() -> TrainBaseConfig:
    """Text → 32 px for CPUs: what is embedded takes the place of CLIP and DINO.

    The critic hears of other captions too, which the paper's does not; rates are our choice.
    """
    return TrainBaseConfig(
        generator=StyleTConfig.small_32(),
        discriminator=ProjectedConfig(),
        loss=LossConfig.model_validate({**_HINGE, "matching": 0.5, "matching_images": "real"}),
        optimizer=OptimizerConfig.model_validate(
            {**_PLAIN_ADAM, "lr": 2e-3, "generator_rate": 2.0, "ema_ramp": 0.05}
        ),
        augment=AugmentConfig(diffaugment=("translation", "cutout")),
        batch_size=16,
    )


# ---- the ladder -----------------------------------------------------------------------------

_PLAIN: dict[str, Any] = {
    "generator": {
        "channels": (96, 96, 48, 24),
        "kernels": (1, 1, 1, 1),
        "blocks": (1, 1, 1, 1),
        "attention": (0, 0, 0, 0),
        "linear_style": False,
        "style_input": False,
        "constant_input": True,
        "mapping_layers": 8,
        "mapping_lr_multiplier": 0.01,
        "text": TextConfig(depth=0),
    },
    "discriminator": {
        "channels": (24, 48, 96, 96),
        "levels": 1,
        "every_stage": False,
        "blocks": (1, 1, 1, 1),
        "attention": (0, 0, 0, 0),
        "head_layers": 1,
        "minibatch_std": True,
        "text": TextConfig(depth=0),
    },
    "loss": {
        "level_weights": (1.0,),
        "matching": 0.0,
        "contrastive": 0.0,
        "vision": 0.0,
        "hard_mismatches": 0.0,
    },
    "optimizer": {"lr": 2e-3, "r1_weight": 10.0},
}
LADDER: dict[str, dict[str, Any]] = {
    "stylegan2": {},
    "larger": {
        "generator.channels": (304, 304, 152, 76),
        "discriminator.channels": (76, 152, 304, 304),
    },
    "tuned": {
        "generator.channels": (96, 96, 48, 24),
        "discriminator.channels": (24, 48, 96, 96),
        "generator.mapping_layers": 4,
        "generator.mapping_lr_multiplier": 0.1,
        "generator.style_input": True,
        "discriminator.head_layers": 2,
        "optimizer.lr": 2.5e-3,
        "optimizer.r1_weight": 3.0,
    },
    "attention": {
        "generator.attention": (0, 1, 1, 0),
        "generator.channels": (96, 96, 64, 24),
        "generator.text": TextConfig(depth=1),
        "discriminator.attention": (0, 0, 1, 0),
        "discriminator.text": TextConfig(depth=1),
    },
    "matching-d": {"loss.matching": 1.0, "loss.matching_images": "real"},
    "matching-gd": {"loss.matching_images": "both"},
    "adaptive": {"generator.kernels": (1, 1, 2, 4)},
    "deeper": {"generator.blocks": (2, 2, 2, 2), "discriminator.blocks": (1, 2, 2, 2)},
    "clip": {"loss.contrastive": 0.1},
    "multi-scale": {
        "discriminator.levels": 4,
        "discriminator.every_stage": True,
        "discriminator.minibatch_std": False,
        "loss.level_weights": (0.4, 0.2, 0.2, 0.2),
    },
    "vision": {"loss.vision": 0.1},
    "scale-up": {
        "generator.channels": (256, 256, 128, 64),
        "generator.kernels": (1, 1, 2, 4),
        "discriminator.channels": (64, 128, 256, 256),
    },
}
"""What each row of Table 1 changes in the row before it, as dotted keys.

The table names its rows only; what "tuned" tunes, and all sizes, are our choice. "matching-d" shows
D real images with another caption; "matching-gd" generated ones as well.
"""


def ladder(row: str) -> TrainBaseConfig:
    """A row of the ablation, with all rows before it, at 32 px."""
    tree: dict[str, Any] = {section: dict(values) for section, values in _PLAIN.items()}
    for name, changes in LADDER.items():
        for key, value in changes.items():
            section, _, field = key.partition(".")
            tree[section][field] = value
        if name == row:
            break
    return TrainBaseConfig.model_validate({**tree, "batch_size": 16})


PRESETS: dict[str, Callable[[], TrainStage]] = {
    "paper_64": paper_64,
    "paper_64_to_512": paper_64_to_512,
    "paper_128_to_1024": paper_128_to_1024,
    "imagenet_256": imagenet_256,
    "imagenet_64_to_256": imagenet_64_to_256,
    "stylegan_t_lite_64": stylegan_t_lite_64,
    "stylegan_t_full_64": stylegan_t_full_64,
    "stylegan_t_small_32": stylegan_t_small_32,
    "small_32": TrainBaseConfig,
    "small_32_to_128": TrainUpsamplerConfig,
    **{f"ladder-{row}": functools.partial(ladder, row) for row in LADDER},
}
"""Name → a training section; called anew each time."""


def preset(name: str) -> TrainStage:
    """A named configuration.

    Raises:
        ValueError: unknown; the message names the nearest and all.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{nearest(name, PRESETS)}: {', '.join(PRESETS)}")
    return PRESETS[name]()
