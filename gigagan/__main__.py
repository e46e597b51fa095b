"""The command line of the package: `python -m gigagan train | describe | sample | …`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

FAILED, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        if os.environ.get("GIGAGAN_DEBUG"):
            raise
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(argv: list[str]) -> int:
    if argv[:1] == ["train"]:
        from gigagan.training.__main__ import main as train

        return train(argv[1:])
    # Not before `main`: an interrupt may come while modules are read.
    from gigagan.commands import (
        adapt,
        blind,
        describe,
        dissect,
        edit,
        evaluate,
        export,
        influence,
        play,
        sample,
        upscale,
    )

    commands = (
        describe, sample, edit, upscale, play, export, evaluate, blind, dissect, influence, adapt,
    )  # fmt: skip
    parser = argparse.ArgumentParser(
        prog="python -m gigagan",
        description="Text-to-image GANs: train, draw, edit, enlarge, measure.",
    )
    known = parser.add_subparsers(dest="command", required=True)
    known.add_parser("train", help="train a network", add_help=False)
    for command in commands:
        command.add(known)
    args = parser.parse_args(argv)
    name = "adapt" if args.command == "unlearn" else args.command
    command = next(c for c in commands if c.__name__.endswith(f".{name}"))
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
