"""The packed emoji as a training set that lives on the device: no decoding, no waiting.

Shape letters: N glyphs, B batch, C colour, H W image, P pooled pixels, G gallery.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from gigagan.evaluation.heldout import Gallery, Work
from gigagan.models.minilm import MiniLM
from gigagan.training.transfer import place

ASIDE = 4
"""Of a thing's combinations of style and background, a quarter: every fourth is never trained."""
UNSEEN = 16
"""Of the things every sixteenth is never trained."""


class Look(NamedTuple):
    """One combination of a thing, a style and a background."""

    thing: int
    style: int
    background: int
    caption: str
    split: str


@dataclass
class Emoji:
    """Glyphs on the device, and every look of every thing, with its split."""

    glyph_N4HW: Tensor
    """uint8, on the device: colour times α, and α; thing by thing, its styles in turn."""
    background_C3: Tensor
    """0 to 255."""
    looks: list[Look]
    palette: dict[str, tuple[int, int, int]]
    styles: Sequence[str]
    phrases: Sequence[str]

    @property
    def px(self) -> int:
        """Side of a picture."""
        return int(self.glyph_N4HW.shape[2])

    def compose(self, looks: Sequence[int]) -> Tensor:
        """uint8 B C H W on the device, of looks by number."""
        S = len(self.styles)
        chosen = [self.looks[i] for i in looks]
        rows = [[x.thing * S + x.style for x in chosen], [x.background for x in chosen]]
        glyph_B, colour_B = place(torch.tensor(rows), self.glyph_N4HW.device)
        rgba_B4HW = self.glyph_N4HW.index_select(0, glyph_B).float()
        behind = self.background_C3.index_select(0, colour_B)[:, :, None, None]
        made = rgba_B4HW[:, :3] + (1 - rgba_B4HW[:, 3:] / 255) * behind
        return made.round().clamp(0, 255).byte()

    def of(self, split: str, count: int) -> list[int]:
        """Numbers of some looks of a split, the same ones always."""
        places = [i for i, look in enumerate(self.looks) if look.split == split]
        return np.random.default_rng(0).permutation(places)[:count].tolist()

    def gallery(self) -> Gallery:
        """The works that `naming` tells apart from each other."""
        names = list(self.palette)
        works = [
            Work(
                x.caption,
                self.phrases[x.thing],
                self.styles[x.style],
                names[x.background],
                x.split,
                Path(str(i)),
            )
            for i, x in enumerate(self.looks)
        ]
        return Gallery(works)

    def pooled(self, px: int, batch: int = 512) -> np.ndarray:
        """Every look averaged to px × px: G P, values from 0 to 1."""
        parts = []
        for start in range(0, len(self.looks), batch):
            numbers = range(start, min(start + batch, len(self.looks)))
            x = self.compose(numbers).float() / 255
            parts.append(F.adaptive_avg_pool2d(x, px).flatten(1).cpu().numpy())
        return np.concatenate(parts)


def load(pack: Path, side: int, device: torch.device) -> Emoji:
    """The packed pictures of one size."""
    about = json.loads((pack / "pack.json").read_text())
    with np.load(pack / f"glyphs-{side}.npz") as packed:
        data, ends = packed["data"].tobytes(), packed["lengths"].cumsum().tolist()
    pieces = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    with ThreadPoolExecutor(8) as pool:
        glyphs = list(pool.map(_decode, pieces))
    glyph_N4HW = torch.from_numpy(np.stack(glyphs)).permute(0, 3, 1, 2).contiguous()
    things = about["things"] if side == 64 else about["upsampler_things"]
    palette = {name: tuple(rgb) for name, rgb in about["palette"].items()}
    looks = [look for i, thing in enumerate(things) for look in _looks(i, thing, about)]
    return Emoji(
        glyph_N4HW.to(device),
        torch.tensor(list(palette.values()), dtype=torch.float32, device=device),
        looks,
        palette,
        about["styles"],
        [thing["phrase"] for thing in things],
    )


def text_encoder(pack: Path, device: torch.device) -> MiniLM:
    """MiniLM of the packed half-precision weights, in float32; of its words those that occur."""
    folder = pack / "text"
    weights = load_file(folder / "minilm.safetensors")
    ids, rows = weights.pop("word_ids").long(), weights.pop("words").float()
    table = torch.zeros(30_522, rows.shape[1])
    table[ids] = rows
    tensors = {name: value.float() for name, value in weights.items()}
    tensors["embeddings.word_embeddings.weight"] = table
    return MiniLM.of(tensors, folder / "tokenizer.json", device)


def _decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))


def _looks(number: int, thing: dict[str, str], about: dict[str, Any]) -> Iterator[Look]:
    """All combinations of one thing. What is set aside hangs on its name alone."""
    seed = int.from_bytes(hashlib.sha256(thing["cldr"].encode()).digest()[:4], "big")
    rng = np.random.default_rng(seed)
    is_unseen = seed % UNSEEN == 0
    styles, names = about["styles"], list(about["palette"])
    count = len(styles) * len(names)
    aside = set(rng.permutation(count)[: count // ASIDE].tolist())
    for k in range(count):
        style, background = divmod(k, len(names))
        which = int(rng.choice(len(about["templates"]), p=about["template_shares"]))
        split = "unseen" if is_unseen else "combination" if k in aside else "trained"
        template = about["templates"][which if split == "trained" else 0]
        caption = template.format(
            style=styles[style], name=thing["phrase"], background=names[background]
        )
        yield Look(number, style, background, caption, split)


class EmojiBatch(NamedTuple):
    """What the training loop asks of a batch."""

    images_BCHW: Tensor
    captions: list[str]
    planned_captions: list[str]


class EmojiLoader:
    """Batches of trained looks as a function of the position: an epoch is a permutation."""

    def __init__(self, emoji: Emoji, *, batch_size: int, seed: int = 0) -> None:
        self.emoji, self.batch_size, self.seed = emoji, batch_size, seed
        self.trained = [i for i, look in enumerate(emoji.looks) if look.split == "trained"]
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def batches(self, images_seen: int = 0) -> Iterator[EmojiBatch]:
        """Batches from the position `images_seen` on, without end."""
        while True:
            looks = self._between(images_seen, images_seen + self.batch_size)
            captions = [self.emoji.looks[i].caption for i in looks]
            yield EmojiBatch(self.emoji.compose(looks), captions, captions)
            images_seen += self.batch_size

    def captions_between(self, start: int, stop: int) -> list[str]:
        """Captions of the positions from `start` to below `stop`."""
        return [self.emoji.looks[i].caption for i in self._between(start, stop)]

    def _between(self, start: int, stop: int) -> list[int]:
        return [self._at(position) for position in range(start, stop)]

    def _at(self, position: int) -> int:
        epoch, place_in_it = divmod(position, len(self.trained))
        if self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch = (epoch, rng.permutation(self.trained))
        return int(self._epoch[1][place_in_it])
