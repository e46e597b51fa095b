"""Every knob of the networks and of their training. Nothing here imports torch."""

from gigagan.config.networks import (
    BlockConfig,
    ClassConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    StyleConfig,
    TextConfig,
    UpsamplerConfig,
)
from gigagan.config.options import OptionsConfig
from gigagan.config.projected import ProjectedConfig
from gigagan.config.stylegan_t import StyleTConfig, TrainedPart
from gigagan.config.training import (
    FREE_TO_CHANGE,
    GUIDANCE_SIDE,
    AnyDiscriminator,
    AnyGenerator,
    AugmentConfig,
    EvaluateConfig,
    HealthConfig,
    LossConfig,
    OptimizerConfig,
    PhaseConfig,
    SystemConfig,
    TrainBaseConfig,
    TrainConfig,
    TrainStage,
    TrainUpsamplerConfig,
    WarmStartConfig,
    with_class_names,
)

__all__ = [
    "FREE_TO_CHANGE",
    "GUIDANCE_SIDE",
    "AnyDiscriminator",
    "AnyGenerator",
    "AugmentConfig",
    "BlockConfig",
    "ClassConfig",
    "DiscriminatorConfig",
    "EvaluateConfig",
    "GeneratorConfig",
    "HealthConfig",
    "LossConfig",
    "OptimizerConfig",
    "OptionsConfig",
    "PhaseConfig",
    "ProjectedConfig",
    "StyleConfig",
    "StyleTConfig",
    "SystemConfig",
    "TextConfig",
    "TrainBaseConfig",
    "TrainConfig",
    "TrainStage",
    "TrainUpsamplerConfig",
    "TrainedPart",
    "UpsamplerConfig",
    "WarmStartConfig",
    "with_class_names",
]
