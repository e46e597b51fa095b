"""What each training picture does to the model: gradients at checkpoints, compared in pairs.

TracIn (Pruthi et al. 2020) sums ⟨∇ℓ_i, ∇ℓ_j⟩ over checkpoints: how far a step on pair i lowers the
loss of pair j. ℓ is the regression of a warm start, which a caption's picture decides. Compared are
gradients of linear layers that see one vector of a pair, where ∇ℓ_i = δ_i ⊗ a_i, so that products
are exact without a gradient ever being laid out: ⟨∇ℓ_i, ∇ℓ_j⟩ = ⟨δ_i, δ_j⟩ ⟨a_i, a_j⟩.

Shape letters: N pairs of training, M of another set, K neighbours, I O features of a layer, C H W
image, T text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.shards.loader import ShardLoader
from gigagan import losses
from gigagan.common.progress import Progress, silent
from gigagan.evaluation.heldout import read_heldout
from gigagan.evaluation.judges.features import square
from gigagan.models import pretrained, snapshot
from gigagan.models.base import BaseGenerator, features_of
from gigagan.models.layers import EqualLinear, pyramid
from gigagan.models.pixels import from_uint8
from gigagan.models.upsampler import Upsampler
from gigagan.training.captions import CaptionFeatures

LAYERS = ("style_input",)
"""Beginnings of the names of the layers that are compared."""
NEIGHBOURS = 4
EDGES = 0.5
"""`warm_start.gradients` of the regression, as in the presets."""
BATCH, ROWS = 16, 64
MAX_PAIRS = 100_000
"""Every caption is compared with every other, and gradients of all pairs are in memory."""


class Pairs(NamedTuple):
    """Pictures with their captions."""

    keys: list[str]
    captions: list[str]
    images_NCHW: Tensor
    """uint8."""


class Gradients(NamedTuple):
    """∇ℓ of N pairs at one layer, weights and bias together, as δ ⊗ a."""

    outputs_NO: Tensor
    """δ = ∂ℓ_i / ∂(the layer's output)."""
    inputs_NI: Tensor
    """What the layer saw times the gain of its weights, and the gain of its bias as one more."""

    def with_all(self, other: Gradients) -> Tensor:
        """⟨∇ℓ_i, ∇ℓ_j⟩ of each with each of the other's, N M."""
        return (self.outputs_NO @ other.outputs_NO.T) * (self.inputs_NI @ other.inputs_NI.T)

    def norms(self) -> Tensor:
        """‖∇ℓ_i‖, N."""
        return self.outputs_NO.norm(dim=1) * self.inputs_NI.norm(dim=1)

    def cosines(self, others_NK: Tensor) -> Tensor:
        """Cosines of each gradient and those of other rows, N K."""
        units = [F.normalize(part, dim=1) for part in self]
        found = []
        for start in range(0, len(others_NK), ROWS):
            own = slice(start, start + ROWS)
            rows_BK = others_NK[own]
            parts = [torch.einsum("bd,bkd->bk", unit[own], unit[rows_BK]) for unit in units]
            found.append(parts[0] * parts[1])
        return torch.cat(found)


@dataclass
class Influence:
    """What N pairs do, each value summed or averaged over checkpoints and layers."""

    disagreement_N: Tensor
    """−mean cosine with the gradients of the K pairs of the nearest captions: from −1, a step on
    the pair is one on theirs, to 1, it undoes theirs."""
    self_influence_N: Tensor
    """Σ ‖∇ℓ_i‖²: TracIn of a pair on itself."""
    loss_N: Tensor
    """Mean ℓ_i."""
    tracin_N: Tensor | None = None
    """−Σ ⟨∇ℓ_i, mean ∇ℓ_j⟩ over held-out pairs: above 0, a step on the pair does harm there."""


def read_pairs(shards: Path | str) -> tuple[Pairs, int]:
    """Every readable pair of a folder of shards once, and the side of its pictures.

    Raises:
        ValueError: no shards, or more than MAX_PAIRS pairs.
    """
    loader = ShardLoader(shards, batch_size=BATCH, seed=0)
    if loader.num_samples > MAX_PAIRS:
        raise ValueError(
            f"{shards} holds {loader.num_samples:,} pictures, and influence compares at most "
            f"{MAX_PAIRS:,} with each other: give a folder of some of its shards"
        )
    found: dict[str, tuple[str, Tensor]] = {}
    for start, batch in zip(range(0, loader.num_samples, BATCH), loader.batches(), strict=False):
        rows = zip(batch.keys, batch.captions, batch.images_BCHW.unbind(), strict=True)
        for key, caption, image_CHW in list(rows)[: loader.num_samples - start]:
            found[key] = caption, image_CHW
    keys = sorted(found)
    images_NCHW = torch.stack([found[key][1] for key in keys])
    return Pairs(keys, [found[key][0] for key in keys], images_NCHW), loader.resolution


def heldout_pairs(path: Path, side: int) -> Pairs:
    """The pairs of a captions file, its pictures as shards of this side have them."""
    heldout = read_heldout(path)
    pictures = [np.asarray(square(picture, side)) for picture in heldout.pictures]
    images_NCHW = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return Pairs(list(map(str, heldout.pictures)), heldout.captions, images_NCHW)


def neighbours(text_NT: Tensor, count: int) -> Tensor:
    """Rows of the `count` captions nearest to each, its own row left out, N K.

    By the cosine of what captions have beyond their mean, so that of equal pairs any may be first.

    Raises:
        ValueError: there are not that many.
    """
    if len(text_NT) <= count:
        raise ValueError(f"{len(text_NT)} pairs have no {count} others each: give fewer neighbours")
    unit_NT = F.normalize(text_NT - text_NT.mean(0), dim=1)
    found = []
    for start in range(0, len(unit_NT), ROWS):
        cosine_BN = unit_NT[start : start + ROWS] @ unit_NT.T
        cosine_BN[torch.arange(len(cosine_BN)), torch.arange(start, start + len(cosine_BN))] = -2
        found.append(cosine_BN.topk(count, dim=1).indices)
    return torch.cat(found)


def chosen_layers(network: nn.Module, names: Sequence[str]) -> dict[str, EqualLinear]:
    """The linear layers whose names begin so, or end so behind a dot.

    Raises:
        ValueError: there is none of a name.
    """
    linear = {name: m for name, m in network.named_modules() if isinstance(m, EqualLinear)}
    found: dict[str, EqualLinear] = {}
    for wanted in names:
        of_name = {
            n: m for n, m in linear.items() if n.startswith(wanted) or n.endswith(f".{wanted}")
        }
        if not of_name:
            raise ValueError(
                f"no linear layer {wanted!r} in the network: choose among {', '.join(linear)}"
            )
        found |= of_name
    return found


@contextmanager
def _watched(layers: Mapping[str, EqualLinear]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What the layers see and say, by name, while the block runs; they take gradients there."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.ndim != 2 or name in seen:
                raise ValueError(
                    f"{name} sees more than one vector of a pair, so its gradients are no products "
                    "of two vectors: leave it out of --layers"
                )
            seen[name] = inputs[0].detach(), output

        return hook

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        for layer in layers.values():
            layer.requires_grad_(True)
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def gradients(
    layers: Mapping[str, EqualLinear], draw: Callable[[], Sequence[Tensor]], target_NCHW: Tensor
) -> tuple[dict[str, Gradients], Tensor]:
    """∇ℓ of each pair at each layer, by one backward; and ℓ, N. No pair may touch another's."""
    with _watched(layers) as seen:
        loss_N = regressions(draw(), target_NCHW)
    sums = torch.autograd.grad(loss_N.sum(), [output for _, output in seen.values()])
    found = {}
    for (name, (inputs_NI, _)), delta_NO in zip(seen.items(), sums, strict=True):
        layer = layers[name]
        parts = [layer.weight_gain * inputs_NI]
        if layer.bias is not None:
            parts.append(torch.full_like(inputs_NI[:, :1], layer.bias_gain))
        found[name] = Gradients(delta_NO, torch.cat(parts, dim=1))
    return found, loss_N.detach()


def regressions(images: Sequence[Tensor], targets_NCHW: Tensor) -> Tensor:
    """The warm start's loss of each pair, N."""
    targets = pyramid(targets_NCHW, len(images))
    rows = range(len(targets_NCHW))
    return torch.stack([
        losses.regression(
            [x[i : i + 1] for x in images], [y[i : i + 1] for y in targets], gradients=EDGES
        )
        for i in rows
    ])  # fmt: skip


def at_checkpoint(
    generator: BaseGenerator,
    pairs: Pairs,
    captions: CaptionFeatures,
    layers: Mapping[str, EqualLinear],
    progress: Progress = silent,
) -> tuple[dict[str, Gradients], Tensor]:
    """Gradients by layer and losses N of all pairs, all with one latent."""
    random = torch.Generator().manual_seed(0)
    z_1Z = torch.randn(1, generator.config.latent_dim, generator=random).to(captions.device)
    parts: dict[str, list[Gradients]] = {name: [] for name in layers}
    found = []
    for start in range(0, len(pairs.keys), BATCH):
        rows = slice(start, start + BATCH)
        text = features_of(generator, pairs.captions[rows], captions)
        target_NCHW = from_uint8(pairs.images_NCHW[rows].to(captions.device))
        draw = partial(generator, z_1Z.expand(len(target_NCHW), -1), text)
        by_layer, loss_N = gradients(layers, draw, target_NCHW)
        for name, part in by_layer.items():
            parts[name].append(part)
        found.append(loss_N)
        progress("pictures", min(start + BATCH, len(pairs.keys)), len(pairs.keys))
    whole = {
        name: Gradients(*(torch.cat(part) for part in zip(*some, strict=True)))
        for name, some in parts.items()
    }
    return whole, torch.cat(found)


def influence(
    checkpoints: Sequence[Path],
    pairs: Pairs,
    *,
    heldout: Pairs | None = None,
    layers: Sequence[str] = LAYERS,
    num_neighbours: int = NEIGHBOURS,
    device: str = "cpu",
    progress: Progress = silent,
) -> Influence:
    """Compare the pairs' gradients at every checkpoint, each of which counts alike.

    Raises:
        ValueError: a checkpoint is no base generator with text, or of another size than the
            pictures; no such layer; too few pairs.
    """
    side = pairs.images_NCHW.shape[-1]
    text = _opened(checkpoints[0], side, device).config.text
    assert text is not None
    captions = CaptionFeatures(pretrained.text_encoder(text.encoder, device), torch.device(device))
    captions.warm(pairs.captions)
    near_NK = neighbours(_pooled(captions, pairs.captions), num_neighbours)
    cosines, squares, tracin, loss = [], [], [], []
    for number, path in enumerate(checkpoints, 1):
        generator = _opened(path, side, device)
        chosen = chosen_layers(generator, layers)
        told = _at(number, len(checkpoints), progress)
        found, loss_N = at_checkpoint(generator, pairs, captions, chosen, told)
        loss.append(loss_N)
        for one in found.values():
            cosines.append(one.cosines(near_NK).mean(1))
            squares.append(one.norms().square())
        if heldout is not None:
            theirs, _ = at_checkpoint(generator, heldout, captions, chosen)
            tracin += [found[name].with_all(theirs[name]).mean(1) for name in found]
    return Influence(
        -torch.stack(cosines).mean(0),
        torch.stack(squares).sum(0),
        torch.stack(loss).mean(0),
        -torch.stack(tracin).sum(0) if tracin else None,
    )


def _at(number: int, count: int, progress: Progress) -> Progress:
    """Progress at one of several checkpoints."""
    return lambda what, done, total: progress(
        f"{what} at checkpoint {number} of {count}", done, total
    )


def _opened(path: Path, side: int, device: str) -> BaseGenerator:
    network, _ = snapshot.load(path, device=device)
    if isinstance(network, Upsampler) or network.config.text is None:
        raise ValueError(f"{path} is no base generator with text, whose captions could be wrong")
    if network.config.resolution != side:
        raise ValueError(
            f"{path} draws {network.config.resolution} px, but the shards hold pictures of {side} "
            f"px: give the folder {network.config.resolution:03d} beside them"
        )
    return network


def _pooled(captions: CaptionFeatures, some: Sequence[str]) -> Tensor:
    """Pooled vectors of captions, N T."""
    parts = [captions(some[i : i + ROWS]).pooled_BD for i in range(0, len(some), ROWS)]
    return torch.cat(parts)
