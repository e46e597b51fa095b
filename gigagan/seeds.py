"""Seeds: what may be one, and how others follow from it."""

from __future__ import annotations

import hashlib

LARGEST = 2**63 - 1
"""What every generator of random numbers that we use takes."""


def derived(seed: int, *places: int) -> int:
    """The seed of one place (a step, a picture of a list), from 0 to `LARGEST`.

    By hashing: no two pairs of seed and place share a stream, as they do where one is multiplied
    and the other added, and nothing overflows.
    """
    digest = hashlib.sha256(" ".join(map(str, (seed, *places))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
