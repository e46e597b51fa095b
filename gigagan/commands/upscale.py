"""`python -m gigagan upscale`: pictures to larger ones."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gigagan.commands.options import Commands, add_networks, device, progress_bar, provenance, tell

_EXAMPLES = """examples:
  python -m gigagan upscale photo.jpg --prompt "a violin on a table"
  python -m gigagan upscale samples/                 # prompts from the PNGs that `sample` wrote
  python -m gigagan upscale photo.jpg --prompt "…" --times 2

Pictures may have any size: they go through the upsampler in overlapping tiles."""


def add(commands: Commands) -> None:
    """Its arguments."""
    command = commands.add_parser(
        "upscale",
        help="enlarge pictures of any size",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_networks(command)
    command.add_argument("images", nargs="+", type=Path, help="pictures, or folders of them")
    command.add_argument("--prompt", help="what they show (default: what their PNGs say)")
    command.add_argument("--out", type=Path, default=Path("upscaled"), help="folder (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the latents (%(default)s)")
    command.add_argument("--times", type=int, default=1, help="one after the other (%(default)s)")
    command.add_argument(
        "--overlap", type=int, help="of tiles, in pixels of the input (3/8 of a tile)"
    )
    command.add_argument("--batch-size", type=int, default=16, help="tiles at once (%(default)s)")
    command.add_argument("--baked", action="store_true", help="fold the style into convolutions")
    command.add_argument("--cut", action="store_true", help="cut a prompt that is too long")
    command.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(args: argparse.Namespace) -> None:
    """Enlarge what can be; raises ValueError at the end if some could not."""
    from gigagan.inference.pictures import PictureError, open_picture, read_about, save_picture
    from gigagan.inference.sampler import load

    if args.times < 1:
        raise ValueError(f"--times {args.times}: give 1 or more")
    sampler = load(args.base, args.upsampler, device=device(args))
    files = list(_files(args.images))
    targets = [args.out / f"{path.stem}.png" for path in files]
    if len(set(targets)) < len(targets):
        raise ValueError("two pictures have one name: enlarge them into different folders")
    failed = 0
    for path, target in zip(files, targets, strict=True):
        try:
            if target.exists() and not args.overwrite:
                raise PictureError(f"{target} is there: choose another --out, or --overwrite")
            own = read_about(path) or {}
            prompt = args.prompt or own.get("prompt")
            if prompt is None:
                raise PictureError(f"{path} does not say what it shows: give --prompt")
            picture = open_picture(path)
            with progress_bar(path.name) as progress:
                for _ in range(args.times):
                    settings: dict[str, Any] = {"seed": args.seed, "overlap": args.overlap}
                    settings |= {"batch_size": args.batch_size, "baked": args.baked}
                    (picture,) = sampler.upscale(
                        [picture], [prompt], cut=args.cut, progress=progress, **settings
                    )
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        about = {
            **provenance(sampler.snapshots),
            "prompt": prompt,
            "seed": args.seed,
            "times": args.times,
        }
        save_picture(target, picture, {**about, "enlarged_from": path.name})
        tell(target, about, width=picture.width, height=picture.height)
    if failed:
        raise ValueError(f"{failed} of {len(files)} pictures were not enlarged: see above")


def _files(given: list[Path]) -> list[Path]:
    from gigagan.evaluation.heldout import pictures_in

    return [file for path in given for file in (pictures_in(path) if path.is_dir() else [path])]
