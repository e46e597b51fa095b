"""`python -m gigagan sample`: prompts to pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gigagan.commands.options import Commands, add_networks


def add(commands: Commands) -> None:
    """Its arguments."""
    command = commands.add_parser("sample", help="draw pictures from prompts")
    add_networks(command)
    command.add_argument("prompts", nargs="*", help="one picture each")
    command.add_argument("--from-file", type=Path, help="a text file with a prompt per line")
    command.add_argument("--out", type=Path, default=Path("samples"), help="folder (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the latents (%(default)s)")
    command.add_argument("--count", type=int, default=1, help="pictures per prompt (%(default)s)")
    command.add_argument(
        "--truncation", type=float, default=1.0, help="below 1: typical, less varied (%(default)s)"
    )
    command.add_argument("--batch-size", type=int, default=16, help="at once (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Draw and save."""
    from gigagan.inference.sampler import load

    listed = args.from_file.read_text().splitlines() if args.from_file else []
    prompts = [p for p in [*args.prompts, *listed] if p.strip()]
    if not prompts:
        raise ValueError("no prompts: give some, or --from-file")
    if args.count < 1:
        raise ValueError(f"--count {args.count}: give 1 or more")
    repeated = [p for p in prompts for _ in range(args.count)]
    pictures = load(args.base, args.upsampler, device=args.device).sample(
        repeated,
        seed=args.seed,
        truncation=args.truncation,
        batch_size=args.batch_size,
        progress=lambda done, total: print(f"\r{done}/{total} pictures", end="", file=sys.stderr),
    )
    print(file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    for number, (prompt, picture) in enumerate(zip(repeated, pictures, strict=True)):
        path = args.out / f"{number:04d}.png"
        picture.save(path)
        print(f"{path}\t{prompt}")
