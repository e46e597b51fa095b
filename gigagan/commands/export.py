"""`python -m gigagan export`: a snapshot for publication."""

from __future__ import annotations

import argparse
from pathlib import Path

from gigagan.commands.options import Commands


def add(commands: Commands) -> None:
    """Its arguments."""
    command = commands.add_parser("export", help="a snapshot at half its size, for publication")
    command.add_argument("snapshot", type=Path, help="what training wrote")
    command.add_argument("out", type=Path, help="the file to write, weights as bfloat16")


def run(args: argparse.Namespace) -> None:
    """Round the weights and save."""
    import torch

    from gigagan.models import snapshot

    network, about = snapshot.load(args.snapshot)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    snapshot.save(args.out, network, about, dtype=torch.bfloat16)
    sizes = [path.stat().st_size / 1e6 for path in (args.snapshot, args.out)]
    print(f"{args.out}: {sizes[1]:.1f} MB of {sizes[0]:.1f} MB")
