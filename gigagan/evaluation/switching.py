"""What becomes of a concept when units are switched off, and on (Bau et al. 2019, section 3.2).

Shape letters: N pictures, U units, h w their maps, H W masks, K concepts of an axis, P pairs of
pictures, M switched units, C colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gigagan.evaluation import naming
from gigagan.evaluation.probing import Change, Drawn, Grid, Probe

ON = 0.99
"""Quantile of a unit's values that it is set to when it is switched on; off is 0."""
PAIRS = 8
"""Pictures of a concept, each with one of another concept at the same latent, that are changed."""
CONTROLS = 2
"""Sets of random units that are switched for comparison."""
SETTINGS = {"on": ON, "pairs": PAIRS, "controls": CONTROLS}


@dataclass(frozen=True)
class Effect:
    """What switching some units does to a concept."""

    inside: float
    """Mean change, of 0 to 1, where the concept is in its own pictures, with the units off."""
    outside: float
    """The same elsewhere."""
    kept: float
    """Share of its own pictures that, with the units off, are still nearest (16 × 16 pixels) to
    themselves among those of all concepts of the axis at the same latent."""
    ace: float
    """Average causal effect, E[s | on] − E[s | off] over its own and the others' pictures (Bau et
    al., equation 4), with `on_the_way` from the other's to its own for the segmenter s."""


@dataclass(frozen=True)
class Switched:
    """A concept's best units, switched, against as many random ones."""

    axis: str
    concept: str
    units: list[int]
    iou: list[float]
    effect: Effect
    random: Effect
    """Mean over the sets of random units."""
    pictures: list[Tensor]
    """Own picture, units off, random off; another's, units on, random on: C H W each."""

    def told(self) -> dict[str, Any]:
        """All but the pictures."""
        return {name: value for name, value in asdict(self).items() if name != "pictures"}


class _Pairs(NamedTuple):
    own_P: np.ndarray
    other_P: np.ndarray
    same_KP: np.ndarray
    """What each own picture is told apart from."""
    concept: int
    mask_PHW: Tensor


@dataclass
class Switcher:
    """Switches units in a few pictures of a concept, and of others on its axis."""

    probe: Probe
    grid: Grid
    drawn: Drawn
    masks: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        high = [np.quantile(x_Nhw, ON) for x_Nhw in self.drawn.maps_NUhw.numpy().swapaxes(0, 1)]
        self._high_U = torch.tensor(np.array(high), dtype=torch.float32)
        self._random = np.random.default_rng(0)

    def __call__(self, axis: str, concept: int, iou_U: np.ndarray, count: int) -> Switched:
        """The effect of the `count` units of highest IoU, and of random others."""
        pairs = self._pairs(axis, concept)
        order_U = np.argsort(-iou_U, kind="stable")
        units_M, rest = order_U[:count], order_U[count:]
        controls = [self._random.permutation(rest)[:count] for _ in range(CONTROLS)]
        effect, pictures = self._switch(units_M, pairs)
        found = [self._switch(control_M, pairs) for control_M in controls]
        figures = [list(asdict(effect).values()) for effect, _ in found]
        own, other = (self.drawn.pictures_NCHW[p[0]] for p in (pairs.own_P, pairs.other_P))
        (off, on), (random_off, random_on) = pictures, found[0][1]
        return Switched(
            axis=axis,
            concept=self.grid.axes[axis][concept],
            units=units_M.tolist(),
            iou=iou_U[units_M].tolist(),
            effect=effect,
            random=Effect(*np.mean(figures, axis=0).tolist()),
            pictures=[own, off, random_off, other, on, random_on],
        )

    def _pairs(self, axis: str, concept: int) -> _Pairs:
        same_KN = self.grid.same(axis, len(self.drawn.maps_NUhw))
        same_KP = same_KN[:, self._random.permutation(same_KN.shape[1])[:PAIRS]]
        P = same_KP.shape[1]
        others = self._random.choice(np.delete(np.arange(len(same_KN)), concept), P)
        own_P = same_KP[concept]
        other_P = same_KP[others, np.arange(P)]
        return _Pairs(own_P, other_P, same_KP, concept, self.masks[axis][own_P])

    def _switch(self, units: np.ndarray, pairs: _Pairs) -> tuple[Effect, tuple[Tensor, Tensor]]:
        """Units off everywhere, and on where the concept is; the first of its pictures off, and
        the first of the others' on."""
        P, px, mask_PHW = len(pairs.own_P), self.probe.px, pairs.mask_PHW
        units_M, rows = torch.from_numpy(units), np.concatenate([pairs.own_P, pairs.other_P])
        everywhere = torch.ones(2 * P, px, px, dtype=torch.bool)
        there = F.interpolate(mask_PHW[:, None].float(), size=(px, px), mode="area")[:, 0] >= 0.5
        off = Change(units_M, torch.zeros(len(units)), everywhere)
        on = Change(units_M, self._high_U[units_M], there.repeat(2, 1, 1))
        off_NCHW, on_NCHW = (self.probe.draw(rows, change).pictures_NCHW for change in (off, on))
        own_PCHW, other_PCHW = self.drawn.pictures_NCHW[rows].chunk(2)
        change_PHW = (off_NCHW[:P] - own_PCHW).abs().mean(dim=1) / 2
        ways = own_PCHW.repeat(2, 1, 1, 1), other_PCHW.repeat(2, 1, 1, 1)
        far_off_N, far_on_N = (on_the_way(x, *ways) for x in (off_NCHW, on_NCHW))
        effect = Effect(
            inside=_mean(change_PHW[mask_PHW]),
            outside=_mean(change_PHW[~mask_PHW]),
            kept=float((self._nearest(off_NCHW[:P], pairs) == pairs.concept).mean()),
            ace=float((far_on_N - far_off_N).mean()),
        )
        return effect, (off_NCHW[0], on_NCHW[P])

    def _nearest(self, pictures_PCHW: Tensor, pairs: _Pairs) -> np.ndarray:
        """The concept whose picture, before any change, is the nearest to each [P]."""
        there = F.adaptive_avg_pool2d(self.drawn.pictures_NCHW[pairs.same_KP.ravel()], naming.PX)
        there_KPCHW = there.unflatten(0, pairs.same_KP.shape)
        asked_PCHW = F.adaptive_avg_pool2d(pictures_PCHW, naming.PX)
        found_P: np.ndarray = (there_KPCHW - asked_PCHW).square().sum((2, 3, 4)).argmin(0).numpy()
        return found_P


def on_the_way(x_NCHW: Tensor, end_NCHW: Tensor, start_NCHW: Tensor) -> Tensor:
    """⟨x − a, b − a⟩ / |b − a|²: how far a picture is from a (0) to b (1), in pixels: N."""
    way_NCHW = end_NCHW - start_NCHW
    squares_N = way_NCHW.square().sum(dim=(1, 2, 3)).clamp(min=1e-12)
    return ((x_NCHW - start_NCHW) * way_NCHW).sum(dim=(1, 2, 3)) / squares_N


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else 0.0
