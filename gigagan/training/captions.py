"""Captions in training: their frozen features, computed once, and mismatched ones to refuse."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gigagan.models.encoders import TextEncoder, TextFeatures

ENCODE_BATCH = 64


class RecentCaptions:
    """The last captions that training saw, from which a hard mismatched one is chosen.

    A batch alone holds few captions that differ from a given one in little.
    """

    def __init__(self, size: int) -> None:
        self._recent: deque[tuple[str, frozenset[str]]] = deque(maxlen=size)

    def add(self, captions: Sequence[str]) -> None:
        """Remember a batch; the oldest are forgotten."""
        self._recent += [(c, _words(c)) for c in captions]

    def nearest(self, caption: str, uniform: float) -> str | None:
        """Another caption that shares as large a part of its words as any, or None.

        By Jaccard index: the same style and background of another thing, say. Of several, `uniform`
        in [0, 1) decides.
        """
        words = _words(caption)
        shared = [(len(words & w) / len(words | w), c) for c, w in self._recent if c != caption]
        most = max((share for share, _ in shared), default=0.0)
        best = [c for share, c in shared if share == most]
        return best[int(uniform * len(best))] if best else None


def derange(captions: Sequence[str], order: Sequence[int], uniform: float) -> list[int | None]:
    """For each caption of a batch the index of another one; nobody gets its own or an equal one.

    Equal captions are laid side by side, groups in the order in which `order` (a permutation) names
    them, and all is rotated by a random number of places, at least the largest group's size. Where
    one caption fills more than half the batch, some of its samples get None.
    """
    B = len(captions)
    groups: dict[str, list[int]] = {}
    for index in order:
        groups.setdefault(captions[index], []).append(index)
    laid = [index for group in groups.values() for index in group]
    largest = max(map(len, groups.values()))
    shift = largest + int(uniform * max(B - 2 * largest + 1, 0))
    partner: list[int | None] = [None] * B
    for place, index in enumerate(laid):
        other = laid[(place + shift) % B]
        partner[index] = other if captions[other] != captions[index] else None
    return partner


def mismatch(
    captions: Sequence[str],
    recent: RecentCaptions,
    *,
    rows: range,
    is_hard_B: Sequence[bool],
    uniform_B: Sequence[float],
    order_B: Sequence[int],
    rotation: float,
) -> list[str | None]:
    """A wrong caption for each of some rows: a hard one, or the batch deranged; None if all equal.

    `captions` are those of the global batch, which is deranged as a whole, and `rows` those that
    this rank trains on. All randomness is in the arguments: numbers in [0, 1) and a permutation.
    """
    partners = derange(captions, order_B, rotation)
    wrong: list[str | None] = []
    for row in rows:
        partner = partners[row]
        searches = is_hard_B[row] or partner is None
        nearest = recent.nearest(captions[row], uniform_B[row]) if searches else None
        wrong.append(nearest or (None if partner is None else captions[partner]))
    return wrong


def _words(caption: str) -> frozenset[str]:
    return frozenset(caption.lower().replace(",", " ").split())


class CaptionFeatures:
    """Captions → `TextFeatures`, remembering half-precision features of what it has seen.

    A new caption is only remembered while there is room: a set of millions is encoded per batch.
    """

    def __init__(
        self, encoder: TextEncoder, device: torch.device, *, max_captions: int = 50_000
    ) -> None:
        self.encoder = encoder
        self.device = device
        self.max_captions = max_captions
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def warm(
        self,
        captions: Sequence[str],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> int:
        """Encode captions beforehand, those of like length together (less padding); how many."""
        todo = sorted(set(captions) - self._known.keys(), key=lambda c: (len(c), c))
        todo = todo[: self.max_captions - len(self._known)]
        for start in range(0, len(todo), ENCODE_BATCH):
            batch = todo[start : start + ENCODE_BATCH]
            self._known.update(self._encode(batch))
            progress(start + len(batch), len(todo))
        return len(todo)

    def means(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Mean token D and mean pooled vector P over captions, each of which counts once."""
        tokens, pooled, num_tokens = [], [], 0
        for start in range(0, len(captions), ENCODE_BATCH):
            features = self(captions[start : start + ENCODE_BATCH])
            tokens.append((features.tokens_BLD * features.mask_BL[..., None]).sum((0, 1)).double())
            pooled.append(features.pooled_BD.sum(0).double())
            num_tokens += int(features.mask_BL.sum())
        token_D, pooled_P = torch.stack(tokens).sum(0), torch.stack(pooled).sum(0)
        return (token_D / num_tokens).float(), (pooled_P / len(captions)).float()

    def save(self, path: Path) -> None:
        """Keep what is known on disk, for other ranks and later attempts."""
        partial = path.with_name(path.name + ".partial")
        torch.save({"encoder": self.encoder.name, "features": self._known}, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Know what was saved, if there is a readable file of the same encoder."""
        try:
            saved = torch.load(path, weights_only=True)
        except Exception:  # damaged or absent: it will be computed, and written, again
            return
        if saved.get("encoder") == self.encoder.name:
            self._known |= saved["features"]

    def __call__(self, captions: Sequence[str]) -> TextFeatures:
        """Features of a batch, padded to its longest caption, on the device."""
        unseen = sorted(set(captions) - self._known.keys())
        fresh = self._encode(unseen) if unseen else {}
        if len(self._known) + len(fresh) <= self.max_captions:
            self._known.update(fresh)
        rows = [fresh[c] if c in fresh else self._known[c] for c in captions]
        lengths = [len(tokens) for tokens, _ in rows]
        tokens_BLD = torch.nn.utils.rnn.pad_sequence([t for t, _ in rows], batch_first=True)
        mask_BL = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return TextFeatures(
            tokens_BLD.to(self.device).float(),
            mask_BL.to(self.device),
            torch.stack([p for _, p in rows]).to(self.device).float(),
        )

    def _encode(self, captions: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        features = self.encoder.encode(captions)
        tokens, pooled = features.tokens_BLD.cpu().half(), features.pooled_BD.cpu().half()
        lengths = features.mask_BL.sum(1).tolist()
        # A clone, not a view: a view would keep the whole padded batch alive.
        return {
            c: (tokens[i, : lengths[i]].clone(), pooled[i].clone()) for i, c in enumerate(captions)
        }
