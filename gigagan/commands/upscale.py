"""`python -m gigagan upscale`: pictures to larger ones."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from gigagan.commands.options import (
    Commands,
    add_networks,
    add_overwrite,
    check,
    device,
    is_made,
    progress_bar,
    provenance,
    tell,
)
from gigagan.common.files import sha256_of

_EXAMPLES = """examples:
  python -m gigagan upscale photo.jpg --prompt "a violin on a table"
  python -m gigagan upscale samples/                 # prompts from the PNGs that `sample` wrote
  python -m gigagan upscale photo.jpg --prompt "…" --times 2

Pictures may have any size: they go through the upsampler in overlapping tiles. Made small again,
the result is the picture itself. A second call passes over what the first one made."""


def add(commands: Commands) -> None:
    """Add the command `upscale` with its arguments."""
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
    command.add_argument("--cut", action="store_true", help="cut a prompt that is too long")
    add_overwrite(command)


def run(args: argparse.Namespace) -> None:
    """Enlarge what can be; raises ValueError at the end if some could not."""
    from gigagan.inference import tiles
    from gigagan.inference.conditions import Untold
    from gigagan.inference.pictures import PictureError, open_picture, read_about, save_picture
    from gigagan.inference.sampler import load

    check(args)
    files = list(_files(args.images))
    targets = _targets(files, args.out)
    sampler = load(args.base, args.upsampler, device=device(args))
    if sampler.upsampler is None:
        raise ValueError(f"{args.base} alone does not enlarge: give --upsampler")
    if args.overlap is not None:
        tiles.starts(0, sampler.upsampler.config.input_resolution, args.overlap)
    told, prompt_of_all = sampler.upsampler_condition, args.prompt
    if prompt_of_all is not None:
        prompt_of_all = told.check(prompt_of_all, cut=args.cut)
    elif isinstance(told, Untold):
        prompt_of_all = ""
    common = {**provenance(sampler.snapshots), "seed": args.seed, "times": args.times}
    common |= {"overlap": args.overlap}
    failed, missing = 0, []
    for path, target in zip(files, targets, strict=True):
        try:
            picture = open_picture(path)
            prompt = prompt_of_all
            if prompt is None:
                prompt = (read_about(path) or {}).get("prompt")
            if prompt is None:
                raise PictureError(f"{path} does not say what it shows: give --prompt")
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        about = {**common, "prompt": prompt, "enlarged_from": path.name}
        about |= {"sha256": sha256_of(path)}
        if is_made(target, about, overwrite=args.overwrite, read=read_about):
            tell(target, about, skipped=True)
        else:
            missing.append((path, target, about))
    for path, target, about in missing:
        picture = open_picture(path)
        try:
            with progress_bar(path.name) as progress:
                for _ in range(args.times):
                    (picture,) = sampler.upscale(
                        [picture],
                        [about["prompt"]],
                        seed=args.seed,
                        overlap=args.overlap,
                        batch_size=args.batch_size,
                        cut=args.cut,
                        progress=progress,
                    )
        except ValueError as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            failed += 1
            continue
        save_picture(target, picture, about)
        tell(target, about, skipped=False, width=picture.width, height=picture.height)
    if failed:
        raise ValueError(f"{failed} of {len(files)} pictures were not enlarged: see above")


def _files(given: list[Path]) -> Iterator[Path]:
    from gigagan.evaluation.heldout import SUFFIXES, pictures_in
    from gigagan.inference.pictures import read_about

    for path in given:
        found = [path]
        if path.is_dir():  # sheets of ours show what lies beside them
            found = [p for p in pictures_in(path) if "sheet" not in (read_about(p) or {})]
        if not found:
            raise ValueError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        yield from found


def _targets(files: list[Path], out: Path) -> list[Path]:
    """Where each goes; raises ValueError if two, or it and itself, would be one file."""
    targets = [out / f"{path.stem}.png" for path in files]
    if len(set(targets)) < len(targets):
        raise ValueError("two pictures have one name: enlarge them into different folders")
    for path, target in zip(files, targets, strict=True):
        if target.exists() and path.exists() and target.samefile(path):
            raise ValueError(f"{path} would be replaced by itself enlarged: choose another --out")
    return targets
