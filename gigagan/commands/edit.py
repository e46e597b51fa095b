"""`python -m gigagan edit`: pictures between and across others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigagan.commands.options import (
    Commands,
    adapters,
    add_adapters,
    add_drawing,
    add_networks,
    add_overwrite,
    check,
    check_sheet,
    device,
    is_made,
    progress_bar,
    provenance,
    tell,
)

if TYPE_CHECKING:
    from gigagan.inference.sampler import Sampler

_EXAMPLES = """examples:
  python -m gigagan edit interpolate "flat emoji of a sun" "outlined emoji of a moon" --steps 7
  python -m gigagan edit mix "flat emoji of a bell on a pink background" "… on a teal background"
  python -m gigagan edit swap "flat emoji of a bell" --style-seed 5 --crossover 2
  python -m gigagan edit truncate "flat emoji of a bell" --steps 5
  python -m gigagan edit walk "flat emoji of a sun" "flat emoji of a moon" --out walk.mp4
"""


def add(commands: Commands) -> None:
    """Add the command `edit` with its arguments."""
    raw = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(
        "edit",
        help="interpolate, mix, swap, truncate, walk",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    kinds = command.add_subparsers(dest="kind", required=True)

    def kind(name: str, help: str, out: str = "edited-{}") -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = kinds.add_parser(name, help=help)
        add_networks(parser)
        add_adapters(parser)
        add_drawing(parser)
        parser.add_argument(
            "--out", type=Path, default=Path(out.format(name)), help="(%(default)s)"
        )
        add_overwrite(parser)
        return parser

    one = kind("interpolate", "from one prompt to another at one latent")
    one.add_argument("prompts", nargs=2, metavar="PROMPT")
    one.add_argument("--steps", type=int, default=7, help="pictures (%(default)s)")
    one = kind("mix", "a second prompt in the fine levels")
    one.add_argument("prompts", nargs=2, metavar="PROMPT")
    one.add_argument("--crossover", type=int, help="first level of the second (half of them)")
    one = kind("swap", "coarse levels of one latent, fine ones of another")
    one.add_argument("prompts", nargs=1, metavar="PROMPT")
    one.add_argument("--style-seed", type=int, required=True, help="of the fine levels")
    one.add_argument("--crossover", type=int, help="first level of the second (half of them)")
    one = kind("truncate", "from the typical to the free")
    one.add_argument("prompts", nargs=1, metavar="PROMPT")
    one.add_argument("--steps", type=int, default=5, help="pictures (%(default)s)")
    one = kind("walk", "a way through latents and prompts, as GIF or MP4", "walk.gif")
    one.add_argument("prompts", nargs="+", metavar="PROMPT")
    one.add_argument("--frames", type=int, default=48, help="(%(default)s)")
    one.add_argument("--fps", type=int, default=12, help="(%(default)s)")
    one.add_argument("--no-loop", action="store_true", help="do not come back to the start")


def run(args: argparse.Namespace) -> None:
    """Load the networks, then do the one thing; nothing is written before all of it is checked."""
    from gigagan.inference.sampler import load

    check(args)
    sampler = load(args.base, args.upsampler, adapters=adapters(args), device=device(args))
    args.prompts = [sampler.condition.check(p, cut=args.cut) for p in args.prompts]
    if args.kind == "walk":
        _walk(sampler, args)
    else:
        _write(sampler, _steps(sampler, args), args)


Steps = list[tuple[str, dict[str, Any]]]
"""What each picture is called, and the settings it is drawn with."""


def _steps(sampler: Sampler, args: argparse.Namespace) -> Steps:
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
    if args.kind == "mix":
        mix = Edit(args.prompts[1], "mix", crossover=args.crossover)
        mix.first_level(len(sampler.base.levels))
        second = {"prompt": args.prompts[1]}
        return [("first", {}), ("mixed", {"edit": mix}), ("second", second)]
    swap = Edit(how="style", seed=args.style_seed, crossover=args.crossover)
    swap.first_level(len(sampler.base.levels))
    return [("first", {}), ("swapped", {"edit": swap}), ("second", {"seed": args.style_seed})]


def _write(sampler: Sampler, steps: Steps, args: argparse.Namespace) -> None:
    from PIL import Image

    from gigagan.evaluation.report.results import caption_grid
    from gigagan.inference.pictures import read_about, save_picture

    common = provenance(sampler.snapshots)
    wanted = []
    for number, (name, changes) in enumerate(steps):
        settings: dict[str, Any] = {"seed": args.seed, "truncation": args.truncation, **changes}
        prompt = settings.pop("prompt", args.prompts[0])
        about = {**common, "prompt": prompt, **settings}
        if edit := about.pop("edit", None):
            about["edit"] = edit.told()
        path = args.out / f"{number:03d}.png"
        there = is_made(path, about, overwrite=args.overwrite, read=read_about)
        wanted.append((name, path, about, prompt, settings, there))
    strip = args.out / "strip.png"
    check_sheet(strip, overwrite=args.overwrite)
    drawn: list[Image.Image] = []
    for _, path, _, prompt, settings, there in wanted:
        new = [] if there else sampler.sample([prompt], cut=args.cut, **settings)
        drawn += new or [Image.open(path)]
    for (name, path, about, _, _, there), picture in zip(wanted, drawn, strict=True):
        if not there:
            save_picture(path, picture, about)
        tell(path, about, step=name, skipped=there)
    title = f"{args.kind}: {', '.join(name for name, _ in steps)}"
    rows = [(" to ".join(args.prompts), drawn)]
    save_picture(strip, caption_grid(rows, title=title), {**common, "sheet": "strip"})
    print(f"{strip} shows all of them", file=sys.stderr)


def _walk(sampler: Sampler, args: argparse.Namespace) -> None:
    from gigagan.inference import walk

    walk.check(args.out, frames=args.frames, fps=args.fps)
    about = {
        **provenance(sampler.snapshots),
        "prompts": args.prompts,
        "seed": args.seed,
        "truncation": args.truncation,
        "frames": args.frames,
        "fps": args.fps,
        "loop": not args.no_loop,
    }
    there = is_made(args.out, about, overwrite=args.overwrite, read=walk.read_about)
    if not there:
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
        walk.save(args.out, pictures, fps=args.fps, about=about)
    tell(args.out, about, skipped=there)
