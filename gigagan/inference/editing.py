"""Changes to a picture that prompt, seed and truncation decide otherwise."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gigagan.models.text import Text


@dataclass(frozen=True)
class Edit:
    """One change (GigaGAN, section 4.3); the upsampler, finest of all, follows the second side."""

    prompt: str | None = None
    """The second prompt."""
    how: Literal["interpolate", "mix", "style"] = "mix"
    """`interpolate`: t and w of both prompts at one z, by `amount`. `mix`: w and t of the second
    prompt in the levels from `crossover` on. `style`: w of another latent in those levels, of the
    second prompt if there is one, while the tokens stay those of the first."""
    amount: float = 1.0
    """Of an interpolation: 0 is the first prompt, 1 the second."""
    seed: int | None = None
    """Latents of the second style; None takes those of the first."""
    crossover: int | None = None
    """The first level (0 is the coarsest) of the second style; None is half of the levels."""

    def __post_init__(self) -> None:
        if self.how in ("interpolate", "mix") and self.prompt is None:
            raise ValueError(f"an edit by {self.how!r} needs a second prompt")
        if self.how == "style" and self.seed is None and self.prompt is None:
            raise ValueError("an edit by 'style' needs another seed or a second prompt")
        if not 0 <= self.amount <= 1:
            raise ValueError(f"amount={self.amount}: give a value from 0 to 1")

    def first_level(self, levels: int) -> int:
        """Where the second style begins; raises ValueError beyond the network's levels."""
        level = levels // 2 if self.crossover is None else self.crossover
        if not 0 <= level <= levels:
            raise ValueError(f"crossover={level}: the generator has levels 0 to {levels - 1}")
        return level

    def told(self) -> dict[str, Any]:
        """What a picture's metadata say of it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def interpolate(a: Text, b: Text, amount: float) -> Text:
    """Between two texts, or classes, of as many samples; 0 and 1 are the texts themselves.

    Global descriptors are mixed. Attention sees the tokens of both, those of a with their part
    exp(q·k) times 1 − amount, those of b times amount: by the logarithm of that in the mask, which
    it adds. So no token appears or goes at once, near the ends neither.
    """
    if amount in (0, 1):
        return b if amount else a
    if a.global_BT is None or b.global_BT is None:  # a network that reads nothing
        return a
    global_BT = a.global_BT.lerp(b.global_BT, amount)
    if a.local_BLT is None or b.local_BLT is None or a.mask_BL is None or b.mask_BL is None:
        return Text(global_BT=global_BT)
    local_BLT = torch.cat([a.local_BLT, b.local_BLT], dim=1)
    part_BL = torch.cat([a.mask_BL * (1 - amount), b.mask_BL * amount], dim=1)
    return Text(local_BLT, part_BL.to(local_BLT.dtype).log(), global_BT)


def slerp(a: Tensor, b: Tensor, amount: float) -> Tensor:
    """Between two latents along the sphere, so that the norm stays that of a Gaussian's draw."""
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)[..., None]
    angle = cosine.clamp(-1 + 1e-7, 1 - 1e-7).acos()
    mixed = (((1 - amount) * angle).sin() * a + (amount * angle).sin() * b) / angle.sin()
    return mixed
