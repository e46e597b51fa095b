"""Networks of the product's presets, made narrow enough for tests."""

from __future__ import annotations

from typing import Any, TypeVar

from gigagan.config.networks import (
    DiscriminatorConfig,
    GeneratorConfig,
    StyleConfig,
    UpsamplerConfig,
)

Network = TypeVar("Network", GeneratorConfig, DiscriminatorConfig, UpsamplerConfig)


def width_scaled(config: Network, divisor: int) -> Network:
    """The same network with all widths but the encoder's divided: for tests on small machines.

    Channels are rounded to whole heads, whose width is divided too.
    """
    head = max(config.head_width // divisor, 8)

    def narrow(width: int) -> int:
        return max(round(width / divisor / head), 1) * head

    changes: dict[str, Any] = {"head_width": head}
    for field in ("channels", "down_channels", "up_channels"):
        if hasattr(config, field):
            changes[field] = tuple(map(narrow, getattr(config, field)))
    if isinstance(config, StyleConfig):
        changes["style_dim"] = narrow(config.style_dim)
    if config.text is not None:
        changes["text"] = config.text.model_copy(
            update={"width": narrow(config.text.width), "head_width": head}
        )
    return type(config).model_validate({**config.model_dump(), **changes})
