"""Every knob of the networks and of their training. Nothing here imports torch."""

from gigagan.config.networks import (
    BlockConfig,
    ClassConfig,
    DiscriminatorConfig,
    Frozen,
    GeneratorConfig,
    StyleConfig,
    TextConfig,
    UpsamplerConfig,
)
from gigagan.config.training import (
    EvaluateConfig,
    LossConfig,
    OptimizerConfig,
    TrainBaseConfig,
    TrainConfig,
    TrainStage,
    TrainUpsamplerConfig,
)

__all__ = [
    "BlockConfig",
    "ClassConfig",
    "DiscriminatorConfig",
    "EvaluateConfig",
    "Frozen",
    "GeneratorConfig",
    "LossConfig",
    "OptimizerConfig",
    "StyleConfig",
    "TextConfig",
    "TrainBaseConfig",
    "TrainConfig",
    "TrainStage",
    "TrainUpsamplerConfig",
    "UpsamplerConfig",
]
