"""Seeds: what may be one, and how others follow from it."""

from __future__ import annotations

import argparse
import hashlib
from typing import Annotated

from pydantic import Field

LARGEST = 2**63 - 1
"""What every generator of random numbers that we use takes."""

Seed = Annotated[int, Field(ge=0, le=LARGEST)]
"""A field that holds a seed."""


def derived(seed: int, *places: int) -> int:
    """The seed of one place (a step, a picture of a list), from 0 to `LARGEST`.

    By hashing: no two pairs of seed and place share a stream, as they do where one is multiplied
    and the other added, and nothing overflows.
    """
    digest = hashlib.sha256(" ".join(map(str, (seed, *places))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def argument(text: str) -> int:
    """A seed of a command line, as argparse's `type`."""
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed <= LARGEST:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no seed: give a whole number from 0 to 2^63 - 1 ({LARGEST})"
        )
    return seed
