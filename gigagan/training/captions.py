"""Captions in training: their frozen features, computed once, and mismatched ones to refuse."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gigagan.models.encoders import TextEncoder, TextFeatures

ENCODE_BATCH = 64


class RecentCaptions:
    """The last captions that training saw, from which a sample's mismatched one is chosen.

    A batch alone holds few captions that differ from a given one in little.
    """

    def __init__(self, size: int) -> None:
        self._recent: deque[tuple[str, frozenset[str]]] = deque(maxlen=size)

    def add(self, captions: Sequence[str]) -> None:
        """Remember a batch; the oldest are forgotten."""
        self._recent += [(c, _words(c)) for c in captions]

    def choose(
        self, captions: Sequence[str], is_hard_B: Sequence[bool], uniform_B: Sequence[float]
    ) -> list[str | None]:
        """For each caption another one, or None where all are equal to it.

        A hard one shares as large a part of its words as any (Jaccard index): the same style and
        background of another thing, say. Others are drawn evenly. `uniform_B` in [0, 1) decides.
        """
        chosen: list[str | None] = []
        for caption, is_hard, uniform in zip(captions, is_hard_B, uniform_B, strict=True):
            others = [entry for entry in self._recent if entry[0] != caption]
            if is_hard and others:
                words = _words(caption)
                shared = [len(words & w) / len(words | w) for _, w in others]
                most = max(shared)
                others = [entry for entry, s in zip(others, shared, strict=True) if s == most]
            chosen.append(others[int(uniform * len(others))][0] if others else None)
        return chosen


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
    ) -> None:
        """Encode captions beforehand, those of like length together (less padding)."""
        todo = sorted(set(captions) - self._known.keys(), key=lambda c: (len(c), c))
        todo = todo[: self.max_captions - len(self._known)]
        for start in range(0, len(todo), ENCODE_BATCH):
            batch = todo[start : start + ENCODE_BATCH]
            self._known.update(self._encode(batch))
            progress(start + len(batch), len(todo))

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
