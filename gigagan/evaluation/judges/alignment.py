"""Do pictures show what their captions say, and do several of one caption differ?

Pure functions of features or pixels, but for the CLIP score, which runs the model that is named.
Shape letters: N M pictures, P prompts, Z latents per prompt, H W image, C colour, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigagan.evaluation.judges.features import Picture, clip_image_vectors
from gigagan.evaluation.protocol import CLIP_PREFIX
from gigagan.models import pretrained
from gigagan.models.openclip import OpenClipText

_PROBE_PX = 8


def mean_similarity(images_ND: Tensor, texts_ND: Tensor) -> float:
    """Mean cosine of every picture with its own caption, both as vectors of one space."""
    return F.cosine_similarity(images_ND.double(), texts_ND.double(), dim=1).mean().item()


def similarities(images_ND: Tensor, texts_ND: Tensor) -> np.ndarray:
    """Cosine [N] of every picture with its own caption."""
    found: np.ndarray = F.cosine_similarity(images_ND.double(), texts_ND.double(), dim=1).numpy()
    return found


def recalled(k: int, images_ND: Tensor, texts_ND: Tensor) -> np.ndarray:
    """1 where a picture's own caption is among the k nearest of all N, else 0: R@k is the mean."""
    found: np.ndarray = (_own_ranks(images_ND, texts_ND) <= k).double().numpy()
    return found


def recall_at(
    k: int, images_MD: Tensor, texts_ND: Tensor, own: Sequence[int] | None = None
) -> float:
    """R@k: share of pictures whose own caption is among the k nearest of all N; chance k / N.

    `own` has the places of the captions of M pictures, where there are not as many as captions.
    """
    return (_own_ranks(images_MD, texts_ND, own) <= k).double().mean().item()


class ProbeRank(NamedTuple):
    """Result of `pixel_probe_rank`."""

    median_rank: float
    """1 if every picture finds its own; the chance is that of unrelated pictures."""
    chance: float


def pixel_probe_rank(generated_NHWC: np.ndarray, real_NHWC: np.ndarray) -> ProbeRank:
    """Rank of the real picture of the same caption among all N, by coarse layout alone.

    Pictures are pooled to 8×8 pixels, the mean of each set is removed, and cosines are compared.
    Backgrounds take part: with 8 of them, a model that gets them right and draws one shape for
    all prompts reaches a rank near N / 16. `shape_rank` leaves them out.
    """
    ranks_N = _own_ranks(_probe(generated_NHWC), _probe(real_NHWC))
    return ProbeRank(ranks_N.median().item(), (len(ranks_N) + 1) / 2)


def shape_rank(
    generated_NHWC: np.ndarray, real_NHWC: np.ndarray, backgrounds: Sequence[str]
) -> float:
    """Mean rank of the own real picture among those on the same background, scaled to [0, 1].

    0 if every picture finds its own, 0.5 by chance: what is left of `pixel_probe_rank` when colour
    does not help, so that one shape for all prompts shows. Backgrounds with one picture are left
    out; raises ValueError if none has two.
    """
    scaled: list[Tensor] = []
    for name in sorted(set(backgrounds)):
        rows = np.array([i for i, other in enumerate(backgrounds) if other == name])
        if len(rows) > 1:
            ranks_N = _own_ranks(_probe(generated_NHWC[rows]), _probe(real_NHWC[rows]))
            scaled.append((ranks_N - 1) / (len(rows) - 1))
    if not scaled:
        raise ValueError("no two pictures share a background: shape_rank compares within one")
    return torch.cat(scaled).mean().item()


def _probe(pictures_NHWC: np.ndarray) -> Tensor:
    x_NCHW = torch.from_numpy(np.ascontiguousarray(pictures_NHWC)).permute(0, 3, 1, 2).double()
    pooled_ND = F.adaptive_avg_pool2d(x_NCHW, _PROBE_PX).flatten(1)
    return pooled_ND - pooled_ND.mean(dim=0)


def _own_ranks(queries_MD: Tensor, keys_ND: Tensor, own: Sequence[int] | None = None) -> Tensor:
    """Rank from 1 [M] of each query's own key by cosine; equal keys share the mean of their ranks.

    Query n's own key is n, or `own[n]`.
    """
    own_M = torch.arange(len(keys_ND)) if own is None else torch.tensor(own, dtype=torch.int64)
    if len(queries_MD) != len(own_M):
        raise ValueError(f"{len(queries_MD)} queries and {len(own_M)} keys are not pairs")
    cosine_MN = F.normalize(queries_MD.double(), dim=1) @ F.normalize(keys_ND.double(), dim=1).T
    cosine_MN = cosine_MN.round(decimals=12)  # ties must not hang on the order of additions
    own_M1 = cosine_MN.gather(1, own_M[:, None])
    above_M = (cosine_MN > own_M1).sum(dim=1)
    others_level_M = (cosine_MN == own_M1).sum(dim=1) - 1
    return 1 + above_M + others_level_M / 2


def background_colour_accuracy(
    images_NHWC: np.ndarray, names: Sequence[str], palette: Mapping[str, Sequence[int]]
) -> float:
    """Share of pictures whose border is nearest, of all colours in `palette`, to the one named.

    The border's colour is the median of its outermost 1/32 on every side; colours are compared in
    RGB. Chance is 1 / len(palette). Raises ValueError for a name that the palette lacks.
    """
    unknown = set(names) - palette.keys()
    if unknown:
        raise ValueError(f"colours {sorted(unknown)} are not in the palette {sorted(palette)}")
    if len(names) != len(images_NHWC):
        raise ValueError(f"{len(images_NHWC)} pictures but {len(names)} colour names")
    colour_names = list(palette)
    palette_K3 = np.array([palette[name] for name in colour_names], np.float64)
    _, H, W, _ = images_NHWC.shape
    width = max(1, H // 32)
    is_border_HW = np.ones((H, W), bool)
    is_border_HW[width : H - width, width : W - width] = False
    border_N3 = np.median(images_NHWC[:, is_border_HW], axis=1)
    nearest_N = np.square(border_N3[:, None] - palette_K3).sum(axis=2).argmin(axis=1)
    return float(
        np.mean([colour_names[i] == name for i, name in zip(nearest_N, names, strict=True)])
    )


def z_sensitivity(images_PZHWC: np.ndarray) -> float:
    """How far the latent moves a pixel at a fixed prompt: mean standard deviation over z.

    In units of the range [-1, 1]. Near zero the model ignores its latent.
    """
    return float((images_PZHWC.astype(np.float64) / 127.5).std(axis=1).mean())


def lpips_diversity(images_PZHWC: np.ndarray, distance: nn.Module) -> float:
    """Mean LPIPS over pairs of pictures of the same prompt; higher is more diverse."""
    device = next(distance.parameters()).device
    x_PZCHW = torch.from_numpy(np.ascontiguousarray(images_PZHWC)).permute(0, 1, 4, 2, 3)
    pairs = list(combinations(range(images_PZHWC.shape[1]), 2))
    per_prompt = []
    with torch.no_grad():
        for x_ZCHW in x_PZCHW:
            x_ZCHW = x_ZCHW.to(device) / 127.5 - 1
            first, second = zip(*pairs, strict=True)
            per_prompt.append(distance(x_ZCHW[list(first)], x_ZCHW[list(second)]).mean().item())
    return float(np.mean(per_prompt))


def clip_score_per_picture(
    pictures: Sequence[Picture],
    captions: Sequence[str],
    name: str,
    *,
    prefix: str = CLIP_PREFIX,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
) -> np.ndarray:
    """Cosine [N] of picture and caption under an open_clip model, without a factor.

    `name` is `open_clip:ViT-B-32/openai` or the like, and belongs beside any number. Pictures get
    the model's own preparation: short side by bicubic, centre crop.
    """
    settings: dict[str, Any] = {"device": device, "batch_size": batch_size}
    texts_ND = clip_text_vectors(captions, name, prefix=prefix, **settings)
    encoder = pretrained.image_encoder(name, device)
    return similarities(clip_image_vectors(pictures, encoder, **settings), texts_ND)


def clip_text_vectors(
    captions: Sequence[str],
    name: str,
    *,
    prefix: str = CLIP_PREFIX,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
) -> Tensor:
    """Captions in an open_clip model's joint space [N, D], on the CPU, not normalised.

    The prefix stands before the caption, which is the authors' insertion of its tokens after the
    start token: both cut what is beyond the context and keep the end token.
    """
    encoder = pretrained.text_encoder(name, device)
    if not isinstance(encoder, OpenClipText):
        raise ValueError(f"{name!r} is not a CLIP: a CLIP score needs open_clip:ARCHITECTURE/TAG")
    parts = []
    for start in range(0, len(captions), batch_size):
        batch = captions[start : start + batch_size]
        parts.append(encoder.embed([prefix + caption for caption in batch]).cpu())
    return torch.cat(parts)
