"""The command line of the package: `python -m gigagan train | describe | sample | …`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from gigagan.commands import blind, describe, edit, evaluate, export, play, sample, upscale

FAILED = 1
COMMANDS = (describe, sample, edit, upscale, play, export, evaluate, blind)


def parser() -> argparse.ArgumentParser:
    """All commands."""
    p = argparse.ArgumentParser(
        prog="python -m gigagan",
        description="Text-to-image GANs: train, draw, edit, enlarge, measure.",
    )
    commands = p.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train a network", add_help=False)
    for command in COMMANDS:
        command.add(commands)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        from gigagan.training.__main__ import main as train

        return train(argv[1:])
    args = parser().parse_args(argv)
    command = next(c for c in COMMANDS if c.__name__.endswith(f".{args.command}"))
    try:
        command.run(args)
    except (ValueError, OSError) as error:
        if os.environ.get("GIGAGAN_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
