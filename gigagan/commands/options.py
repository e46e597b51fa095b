"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = object


def add_networks(command: argparse.ArgumentParser) -> None:
    """Which networks, and where they run."""
    command.add_argument(
        "--base", help="snapshot of the base generator, or models:/NAME@ALIAS (the package's)"
    )
    command.add_argument(
        "--upsampler", help="snapshot of the upsampler (with no --base the package's)"
    )
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1… (%(default)s)")
