"""`python -m gigagan edit`: pictures between, across and along others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigagan.commands.options import (
    Commands,
    add_drawing,
    add_networks,
    device,
    progress_bar,
    provenance,
    tell,
)

if TYPE_CHECKING:
    from PIL import Image

    from gigagan.inference.sampler import Sampler

_EXAMPLES = """examples:
  python -m gigagan edit interpolate "flat emoji of a sun" "outlined emoji of a moon" --steps 7
  python -m gigagan edit mix "flat emoji of a bell on a pink background" "… on a teal background"
  python -m gigagan edit swap "flat emoji of a bell" --style-seed 5 --crossover 2
  python -m gigagan edit truncate "flat emoji of a bell" --steps 5
  python -m gigagan edit walk "flat emoji of a sun" "flat emoji of a moon" --out walk.mp4
  python -m gigagan edit direction --without "emoji on a pink background" \\
      --having "emoji on a teal background" --out teal.safetensors
  python -m gigagan edit move "flat emoji of a bell" --along teal.safetensors --strengths -1 0 1 2
"""


def add(commands: Commands) -> None:
    """Its arguments."""
    raw = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(
        "edit",
        help="interpolate, mix, swap, walk, and move along attributes",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    kinds = command.add_subparsers(dest="kind", required=True)

    def kind(name: str, help: str, out: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = kinds.add_parser(name, help=help)
        add_networks(parser)
        add_drawing(parser)
        parser.add_argument("--out", type=Path, default=Path(out), help="(%(default)s)")
        return parser

    one = kind("interpolate", "from one prompt to another at one latent", "edited")
    one.add_argument("prompts", nargs=2, metavar="PROMPT")
    one.add_argument("--steps", type=int, default=7, help="pictures (%(default)s)")
    one = kind("mix", "a second prompt in the fine levels", "edited")
    one.add_argument("prompts", nargs=2, metavar="PROMPT")
    one.add_argument("--crossover", type=int, help="first level of the second (half of them)")
    one = kind("swap", "coarse levels of one latent, fine ones of another", "edited")
    one.add_argument("prompts", nargs=1, metavar="PROMPT")
    one.add_argument("--style-seed", type=int, required=True, help="of the fine levels")
    one.add_argument("--crossover", type=int, help="first level of the second (half of them)")
    one = kind("truncate", "from the typical to the free", "edited")
    one.add_argument("prompts", nargs=1, metavar="PROMPT")
    one.add_argument("--steps", type=int, default=5, help="pictures (%(default)s)")
    one = kind("walk", "a way through latents and prompts, as GIF or MP4", "walk.gif")
    one.add_argument("prompts", nargs="+", metavar="PROMPT")
    one.add_argument("--frames", type=int, default=48, help="(%(default)s)")
    one.add_argument("--fps", type=int, default=12, help="(%(default)s)")
    one.add_argument("--no-loop", action="store_true", help="do not come back to the start")
    one = kind("direction", "find an attribute's direction from pairs of prompts", "direction")
    one.add_argument("--without", nargs="+", required=True, metavar="PROMPT")
    one.add_argument("--having", nargs="+", required=True, metavar="PROMPT")
    one = kind("move", "along such a direction", "edited")
    one.add_argument("prompts", nargs=1, metavar="PROMPT")
    one.add_argument("--along", type=Path, required=True, help="what `direction` wrote")
    one.add_argument("--strengths", nargs="+", type=float, default=[-1, 0, 1], help="(-1 0 1)")
    one.add_argument("--space", choices=("w", "t"), default="w", help="(%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Load the networks, then do the one thing."""
    from gigagan.inference.sampler import load

    sampler = load(args.base, args.upsampler, device=device(args))
    if args.kind == "walk":
        return _walk(sampler, args)
    if args.kind == "direction":
        return _direction(sampler, args)
    steps = _steps(sampler, args)
    _write(sampler, steps, args)
    return None


Steps = list[tuple[str, dict[str, Any]]]
"""What each picture is called, and the settings it is drawn with."""


def _steps(sampler: Sampler, args: argparse.Namespace) -> Steps:
    from gigagan.inference import directions
    from gigagan.inference.editing import Edit

    if args.kind in ("interpolate", "truncate") and args.steps < 2:
        raise ValueError(f"--steps {args.steps}: give 2 or more")
    if args.kind == "interpolate":
        amounts = [i / (args.steps - 1) for i in range(args.steps)]
        return [
            (f"{a:.2f}", {"edit": Edit(args.prompts[1], "interpolate", amount=a)}) for a in amounts
        ]
    if args.kind == "truncate":
        psis = [args.truncation * i / (args.steps - 1) for i in range(args.steps)]
        return [(f"{psi:.2f}", {"truncation": psi}) for psi in psis]
    if args.kind == "move":
        found = directions.load(args.along, sampler)
        return [
            (f"{s:+g}", {"shift": directions.Shift(found, s, args.space)}) for s in args.strengths
        ]
    if args.kind == "mix":
        second = {"edit": Edit(args.prompts[1], "mix", crossover=args.crossover)}
        return [("first", {}), ("mixed", second), ("second", {"prompt": args.prompts[1]})]
    swap = Edit(how="style", seed=args.style_seed, crossover=args.crossover)
    return [("first", {}), ("swapped", {"edit": swap}), ("second", {"seed": args.style_seed})]


def _write(sampler: Sampler, steps: Steps, args: argparse.Namespace) -> None:
    from gigagan.evaluation.report import caption_grid
    from gigagan.inference.editing import Edit
    from gigagan.inference.pictures import save_picture

    drawn: list[Image.Image] = []
    for number, (name, changes) in enumerate(steps):
        settings: dict[str, Any] = {"seed": args.seed, "truncation": args.truncation, **changes}
        prompt = settings.pop("prompt", args.prompts[0])
        (picture,) = sampler.sample([prompt], cut=args.cut, **settings)
        edit = settings.pop("edit", None)
        shift = settings.pop("shift", None)
        about = {**provenance(sampler.snapshots), "prompt": prompt, **settings}
        if isinstance(edit, Edit):
            about["edit"] = edit.told()
        if shift is not None:
            about["along"] = {"file": args.along.name, "strength": shift.strength}
        path = args.out / f"{number:03d}.png"
        save_picture(path, picture, about)
        tell(path, about, step=name)
        drawn.append(picture)
    title = f"{args.kind}: {', '.join(name for name, _ in steps)}"
    rows = [(" to ".join(args.prompts), drawn)]
    caption_grid(rows, title=title).save(args.out / "strip.png")
    print(f"{args.out / 'strip.png'} shows all of them", file=sys.stderr)


def _walk(sampler: Sampler, args: argparse.Namespace) -> None:
    from gigagan.inference import walk

    with progress_bar("frames") as progress:
        pictures = walk.walk(
            sampler,
            args.prompts,
            seed=args.seed,
            frames=args.frames,
            truncation=args.truncation,
            loop=not args.no_loop,
            progress=progress,
        )
    walk.save(args.out, pictures, fps=args.fps)
    tell(args.out, {"prompts": args.prompts, "seed": args.seed, "frames": len(pictures)})


def _direction(sampler: Sampler, args: argparse.Namespace) -> None:
    from gigagan.inference import directions

    path = args.out if args.out.suffix == ".safetensors" else args.out.with_suffix(".safetensors")
    found = directions.find(sampler, args.without, args.having)
    directions.save(path, found)
    tell(path, found.about, norm=float(found.style_S.norm()))
