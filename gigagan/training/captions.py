"""Frozen text features, computed once for every distinct caption while they fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gigagan.models.encoders import TextEncoder, TextFeatures

ENCODE_BATCH = 64


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
