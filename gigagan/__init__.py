"""Text-to-image GANs: models, losses, training, inference and evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gigagan.inference.sampler import Sampler
    from gigagan.models.adapters import Given

__all__ = ["load"]


def load(
    snapshot: str | None = None,
    upsampler: str | None = None,
    *,
    adapters: Sequence[Given] = (),
    device: str = "cpu",
) -> Sampler:
    """Open a snapshot (and an upsampler's) for sampling; see `gigagan.inference.sampler.load`.

    Without any, those that come with the package.
    """
    from gigagan.inference.sampler import load as load_sampler

    return load_sampler(snapshot, upsampler, adapters=adapters, device=device)


def __getattr__(name: str) -> Any:
    if name == "Sampler":
        from gigagan.inference.sampler import Sampler

        return Sampler
    raise AttributeError(f"module 'gigagan' has no attribute {name!r}")
