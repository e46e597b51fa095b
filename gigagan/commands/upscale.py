"""`python -m gigagan upscale`: pictures to larger ones."""

from __future__ import annotations

import argparse
from pathlib import Path

from gigagan.commands.options import Commands, add_networks


def add(commands: Commands) -> None:
    """Its arguments."""
    command = commands.add_parser("upscale", help="enlarge pictures of the upsampler's input size")
    add_networks(command)
    command.add_argument("images", nargs="+", type=Path, help="pictures")
    command.add_argument("--prompt", required=True, help="what they show")
    command.add_argument("--out", type=Path, default=Path("upscaled"), help="folder (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the latents (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Enlarge and save."""
    from PIL import Image

    from gigagan.inference.sampler import load

    sampler = load(args.base, args.upsampler, device=args.device)
    images = [Image.open(path).convert("RGB") for path in args.images]
    args.out.mkdir(parents=True, exist_ok=True)
    large = sampler.upscale(images, [args.prompt] * len(images), seed=args.seed)
    for path, picture in zip(args.images, large, strict=True):
        target = args.out / f"{path.stem}.png"
        picture.save(target)
        print(target)
