"""Where a generator fails: captions by what they ask for, and how well each kind is met.

A caption's kinds are found by words alone, so that a reader can see why it is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gigagan.evaluation.judges.statistics import mean_interval

_WORDS = {
    "count": "two three four five six seven eight nine ten several many couple pair dozen group",
    "colour": "red orange yellow green blue purple violet pink brown black white grey gray teal"
    " gold golden silver",
    "place": "above below behind beside under underneath between left right inside outside near"
    " against",
    "person": "man men woman women person people boy girl child children kid kids baby lady guy"
    " face player rider",
    "animal": "cat cats dog dogs horse horses bird birds cow cows sheep elephant elephants bear"
    " zebra zebras giraffe giraffes fish lion tiger rabbit monkey snake pig",
    "food": "food pizza sandwich cake fruit apple banana bread cheese salad vegetable vegetables"
    " meat plate bowl soup rice coffee wine",
    "vehicle": "car cars bus truck train plane airplane bicycle bike motorcycle boat ship",
    "negation": "no not without never nothing none",
}
_PATTERNS = {
    kind: re.compile(rf"\b({'|'.join(words.split())})\b", re.IGNORECASE)
    for kind, words in _WORDS.items()
} | {
    "written text": re.compile(r"[\"“”«»]|\b(says|saying|written|reads|letters?)\b", re.IGNORECASE)
}
_LONG = 15
OTHER = "other"


def categories(
    captions: Sequence[str], labels: Mapping[str, Mapping[int, str]] | None = None
) -> dict[str, list[int]]:
    """Rows of the captions by kind; one may be of several, one of none is `other`.

    Kinds are by words (counts, colours, places, persons, animals, food, vehicles, negation, written
    text) and by length (over 15 words); `labels` adds kinds that the set itself knows, by rows, as
    in `background: teal`.
    """
    found: dict[str, list[int]] = {}
    for row, caption in enumerate(captions):
        kinds = [kind for kind, pattern in _PATTERNS.items() if pattern.search(caption)]
        if len(caption.split()) > _LONG:
            kinds.append(f"over {_LONG} words")
        kinds += [f"{name}: {own[row]}" for name, own in (labels or {}).items() if row in own]
        for kind in kinds or [OTHER]:
            found.setdefault(kind, []).append(row)
    return found


@dataclass(frozen=True)
class CategoryRow:
    """One kind of captions: how many, how well they are met, and which are met worst."""

    name: str
    count: int
    mean: float
    low: float | None
    """95 % interval of the mean; one caption has none."""
    high: float | None
    worst: list[int]


def by_category(values: Sequence[float], groups: Mapping[str, Sequence[int]]) -> list[CategoryRow]:
    """The mean value of each kind, worst kind first."""
    all_N = np.asarray(values, np.float64)
    rows = []
    for name, members in groups.items():
        own = all_N[list(members)]
        low, high, _ = mean_interval(own) or (None, None, None)
        order = [members[i] for i in np.argsort(own, kind="stable")[:3]]
        rows.append(CategoryRow(name, len(own), float(own.mean()), low, high, order))
    return sorted(rows, key=lambda row: row.mean)
