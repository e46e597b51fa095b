"""Captions in training: their frozen features, computed once, and mismatched ones to refuse."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gigagan.common.files import filled_aside
from gigagan.models.encoders import TextEncoder, TextFeatures
from gigagan.training.transfer import place

ENCODE_BATCH = 64
LENGTH_STEP = 8
"""Batches are padded to a multiple of so many tokens: few lengths, hence few compiled versions."""


class RecentCaptions:
    """The last captions that training saw, from which a hard mismatched one is chosen.

    A batch alone holds few captions that differ from a given one in little.
    """

    def __init__(self, size: int) -> None:
        self._recent: deque[tuple[str, frozenset[str]]] = deque(maxlen=size)

    def add(self, captions: Sequence[str]) -> None:
        """Remember a batch; the oldest are forgotten."""
        self._recent += [(c, _words(c)) for c in captions]

    def nearest(self, captions: Sequence[str], uniform: Sequence[float]) -> list[str | None]:
        """For each another caption that shares as large a part of its words as any, or None.

        By Jaccard index: the same style and background of another thing, say. Of several,
        `uniform` in [0, 1) decides.
        """
        if not captions or not self._recent:
            return [None] * len(captions)
        asked = [_words(caption) for caption in captions]
        column = {word: i for i, word in enumerate(dict.fromkeys(w for a in asked for w in a))}
        in_asked_QW = _indicator(asked, column)
        in_recent_NW = _indicator([words for _, words in self._recent], column)
        shared_QN = (in_asked_QW @ in_recent_NW.T).astype(np.float64)  # whole numbers: exact
        own_Q = np.array([len(words) for words in asked])
        theirs_N = np.array([len(words) for _, words in self._recent])
        union_QN = own_Q[:, None] + theirs_N - shared_QN
        share_QN = shared_QN / np.maximum(union_QN, 1)
        number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        own_number_Q = np.array([number[caption] for caption in captions])
        their_number_N = np.array([number.get(caption, -1) for caption, _ in self._recent])
        share_QN[own_number_Q[:, None] == their_number_N] = -1
        recent = [caption for caption, _ in self._recent]
        found: list[str | None] = []
        for share_N, chance in zip(share_QN, uniform, strict=True):
            best = np.flatnonzero(share_N == share_N.max())
            is_own = share_N[best[0]] < 0
            found.append(None if is_own else recent[best[int(chance * len(best))]])
        return found


def _indicator(sets: Sequence[frozenset[str]], column: dict[str, int]) -> np.ndarray:
    """Which of the words that have a column are in each set: 0 or 1."""
    found = np.zeros((len(sets), max(len(column), 1)), np.float32)
    for row, words in zip(found, sets, strict=True):
        row[[column[word] for word in words if word in column]] = 1
    return found


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
    for position, index in enumerate(laid):
        other = laid[(position + shift) % B]
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
    searching = [row for row in rows if is_hard_B[row] or partners[row] is None]
    nearest = recent.nearest([captions[r] for r in searching], [uniform_B[r] for r in searching])
    found = dict(zip(searching, nearest, strict=True))
    wrong: list[str | None] = []
    for row in rows:
        partner = partners[row]
        wrong.append(found.get(row) or (None if partner is None else captions[partner]))
    return wrong


def _words(caption: str) -> frozenset[str]:
    return frozenset(caption.lower().replace(",", " ").split())


class CaptionFeatures:
    """Captions → `TextFeatures`, remembering half-precision features of what it has seen.

    They lie in one table on the device, so that a step moves row numbers and no features. A new
    caption is only remembered while there is room: a set of millions is encoded per batch.

    Shape letters: N captions, L tokens, D width of a token's features, P of the pooled vector.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        device: torch.device,
        *,
        max_captions: int = 50_000,
        max_mb: float = 2_048,
    ) -> None:
        self.encoder = encoder
        self.device = device
        self.max_captions = max_captions
        self.max_bytes = max_mb * 2**20
        self._row: dict[str, int] = {}
        self._length: list[int] = []
        self._tokens_NLD = torch.empty(0, 0, encoder.width, dtype=torch.half, device=device)
        self._pooled_NP = torch.empty(0, encoder.pooled_width, dtype=torch.half, device=device)

    def warm(
        self,
        captions: Sequence[str],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> int:
        """Encode captions beforehand, those of like length together (less padding); how many."""
        todo = sorted(set(captions) - self._row.keys(), key=lambda c: (len(c), c))
        todo = todo[: self.max_captions - len(self._row)]
        num_before = len(self._row)
        for start in range(0, len(todo), ENCODE_BATCH):
            batch = todo[start : start + ENCODE_BATCH]
            if not self._remember(batch, self._encode(batch)):
                break
            progress(start + len(batch), len(todo))
        return len(self._row) - num_before

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
        tokens_NLD, pooled_NP = self._tokens_NLD.cpu(), self._pooled_NP.cpu()
        known = {
            caption: (tokens_NLD[row, : self._length[row]].clone(), pooled_NP[row].clone())
            for caption, row in self._row.items()
        }
        with filled_aside(path) as partial:
            torch.save({"encoder": self.encoder.name, "features": known}, partial)

    def load(self, path: Path) -> None:
        """Know what was saved, if there is a readable file of the same encoder."""
        try:
            saved = torch.load(path, weights_only=True)
        except Exception:  # damaged or absent: it will be computed, and written, again
            return
        if saved.get("encoder") != self.encoder.name:
            return
        new = {c: parts for c, parts in saved["features"].items() if c not in self._row}
        if new:
            tokens, pooled = (list(parts) for parts in zip(*new.values(), strict=True))
            lengths = [len(x) for x in tokens]
            padded_NLD = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
            self._remember(list(new), (padded_NLD, lengths, torch.stack(pooled)))

    def __call__(self, captions: Sequence[str]) -> TextFeatures:
        """Features of a batch on the device, padded to its longest caption or a little more."""
        unseen = sorted(set(captions) - self._row.keys())
        row, table_NLD, pooled_NP = self._row, self._tokens_NLD, self._pooled_NP
        length = self._length
        if unseen:
            encoded = self._encode(unseen)
            if self._remember(unseen, encoded):
                table_NLD, pooled_NP = self._tokens_NLD, self._pooled_NP
            else:  # no room: a table for this batch alone
                known = sorted(set(captions) & self._row.keys())
                rows_N = place(torch.tensor([row[c] for c in known], dtype=torch.long), self.device)
                parts = (table_NLD[rows_N], pooled_NP[rows_N])
                table_NLD = _stacked(parts[0], encoded[0].to(self.device))
                pooled_NP = torch.cat([parts[1], encoded[2].to(self.device)])
                length = [length[row[c]] for c in known] + encoded[1]
                row = {caption: i for i, caption in enumerate([*known, *unseen])}
        rows = [row[caption] for caption in captions]
        lengths = [length[i] for i in rows]
        longest = -(-max(lengths) // LENGTH_STEP) * LENGTH_STEP
        rows_B, lengths_B = place(torch.tensor([rows, lengths]), self.device)
        tokens_BLD = table_NLD[:, :longest].index_select(0, rows_B).float()
        mask_BL = torch.arange(tokens_BLD.shape[1], device=self.device) < lengths_B[:, None]
        return TextFeatures(tokens_BLD, mask_BL, pooled_NP.index_select(0, rows_B).float())

    def _encode(self, captions: Sequence[str]) -> Encoded:
        """Half-precision tokens N L D, zero beyond a caption's end; lengths; pooled vectors."""
        features = self.encoder.encode(captions)
        tokens_NLD = (features.tokens_BLD * features.mask_BL[..., None]).half()
        return tokens_NLD, features.mask_BL.sum(1).tolist(), features.pooled_BD.half()

    def _remember(self, captions: Sequence[str], encoded: Encoded) -> bool:
        """Append to the table, which grows by half; False, and nothing happens, without room."""
        tokens_NLD, lengths, pooled_NP = encoded
        used, num = len(self._row), len(self._row) + len(captions)
        longest = max(*lengths, self._tokens_NLD.shape[1], 1)
        longest = -(-longest // LENGTH_STEP) * LENGTH_STEP
        size = len(self._tokens_NLD)
        bytes_each = self._tokens_NLD.element_size() * self.encoder.width * longest
        most = min(self.max_captions, int(self.max_bytes // bytes_each))
        if num > most:
            return False
        if num > size or longest > self._tokens_NLD.shape[1]:
            size = max(num, min(size * 3 // 2, most))
            table_NLD = self._tokens_NLD.new_zeros(size, longest, self.encoder.width)
            table_NLD[:used, : self._tokens_NLD.shape[1]] = self._tokens_NLD[:used]
            pooled = self._pooled_NP.new_zeros(size, self.encoder.pooled_width)
            pooled[:used] = self._pooled_NP[:used]
            self._tokens_NLD, self._pooled_NP = table_NLD, pooled
        L = min(tokens_NLD.shape[1], longest)
        self._tokens_NLD[used:num, :L] = tokens_NLD[:, :L].to(self.device)
        self._pooled_NP[used:num] = pooled_NP.to(self.device)
        self._length += lengths
        self._row |= {caption: used + i for i, caption in enumerate(captions)}
        return True


Encoded = tuple[Tensor, list[int], Tensor]
"""Tokens N L D and their numbers, and pooled vectors N P, both in half precision."""


def _stacked(first_NLD: Tensor, second_NLD: Tensor) -> Tensor:
    """One table of two, as long as the longer."""
    longest = max(first_NLD.shape[1], second_NLD.shape[1], LENGTH_STEP)
    longest = -(-longest // LENGTH_STEP) * LENGTH_STEP
    padded = [
        torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[1])) for x in (first_NLD, second_NLD)
    ]
    return torch.cat(padded)
