"""Hard mismatched captions of a step: all at once, beside one caption after the other."""

from __future__ import annotations

import random

from bench.timing import medians, show
from data.concepts import STYLES, nameable
from data.demo import PALETTE, TEMPLATES
from gigagan.training.captions import RecentCaptions

BATCHES = (16, 64, 256, 1024)
RECENT = 256


def one_by_one(captions: list[str], recent: list[str]) -> list[str]:
    """The largest Jaccard index of each by sets of words, the first of equals."""
    words = {caption: frozenset(caption.replace(",", " ").split()) for caption in recent}
    found = []
    for caption in captions:
        own = frozenset(caption.replace(",", " ").split())
        shares = {c: len(own & w) / len(own | w) for c, w in words.items() if c != caption}
        found.append(max(shares, key=lambda c: shares[c]))
    return found


def main() -> None:
    """Milliseconds a step at four sizes of batch, half of whose captions are hard."""
    rng = random.Random(0)
    every = [
        TEMPLATES[0].format(style=style, name=concept.phrase, background=background)
        for concept in nameable()
        for style in STYLES
        for background in PALETTE
    ]
    for batch in BATCHES:
        seen = rng.sample(every, batch)
        hard, recent = seen[: batch // 2], RecentCaptions(RECENT)
        recent.add(seen)
        kept = seen[-RECENT:]
        times = medians(
            {
                "at once": lambda h=hard, r=recent: r.nearest(h, [0.0] * len(h)),
                "one by one": lambda h=hard, k=kept: one_by_one(h, k),
            },
            rounds=3,
        )
        show(f"batch {batch}", times)


if __name__ == "__main__":
    main()
