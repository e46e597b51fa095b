"""`python -m gigagan dissect`: which units of a generator draw which concept."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gigagan.commands.options import Commands, add_overwrite, check, device, provenance

if TYPE_CHECKING:
    from gigagan.evaluation.dissect import Dissection
    from gigagan.evaluation.probing import Grid

FOUND, SHEET = "dissect.json", "dissect.png"
_THINGS = 8
_EXAMPLES = """examples:
  python -m gigagan dissect                                      # the package's network
  python -m gigagan dissect --concepts "a padlock" "an umbrella" "a banana" --level 8
  python -m gigagan dissect --untrained --out dissect-untrained  # what chance and layout alone give
  python -m gigagan dissect --styles flat --backgrounds pink teal white --off 12
  python -m gigagan dissect --template "flat emoji of {} on a teal background" \\
      --concepts "a red apple" "a banana" "a bell"
"""


def add(commands: Commands) -> None:
    """Add the command `dissect` with its arguments."""
    command = commands.add_parser(
        "dissect",
        help="which units of a generator draw which concept, and what happens without them",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--base", help="snapshot, or models:/NAME@ALIAS (the package's)")
    command.add_argument("--device", help="cpu, cuda, cuda:1… (the first CUDA device, or the CPU)")
    for name, default in (
        ("concepts", f"things to draw, with articles (the first {_THINGS} of the package's list)"),
        ("styles", "(the package's)"),
        ("backgrounds", "colours (the package's)"),
    ):
        command.add_argument(f"--{name}", nargs="+", metavar="NAME", help=default)
    command.add_argument("--template", help="a prompt with {} for the concept (the package's)")
    command.add_argument(
        "--level", type=int, help="side of the maps in px (the last level but one)"
    )
    command.add_argument("--off", type=int, help="best units to switch (an eighth of the level's)")
    command.add_argument("--latents", type=int, default=4, help="of each prompt (%(default)s)")
    command.add_argument("--units", type=int, default=8, help="rows of the sheet (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the latents (%(default)s)")
    command.add_argument("--out", type=Path, default=Path("dissect"), help="folder (%(default)s)")
    command.add_argument(
        "--untrained", action="store_true", help="a new network of the same shape, to compare with"
    )
    add_overwrite(command)


def run(args: argparse.Namespace) -> None:
    """Dissect, print the table, write dissect.json and dissect.png."""
    import torch

    from gigagan.common.console import shown
    from gigagan.evaluation.dissect import dissect
    from gigagan.evaluation.report.results import write_json
    from gigagan.evaluation.report.units import looks
    from gigagan.inference.prompts import check_prompt
    from gigagan.inference.sampler import load
    from gigagan.models.base import base_generator

    check(args)
    if (args.out / FOUND).exists() and not args.overwrite:
        raise ValueError(f"{args.out} holds a dissection: choose another --out, or --overwrite")
    grid = _grid(args)
    sampler = load(args.base, device=device(args))
    grid = replace(grid, captions=[check_prompt(c, sampler.encoder) for c in grid.captions])
    settings = {"level": args.level, "latents": args.latents, "off": args.off, "seed": args.seed}
    network = sampler.base
    if args.untrained:
        torch.manual_seed(args.seed)
        network = base_generator(network.config).eval().to(sampler.device)
    with shown() as progress:
        found = dissect(network, sampler.encoder, grid, progress=progress, **settings)
    about = provenance({} if args.untrained else {"base": sampler.snapshots["base"]})
    about |= {"untrained": args.untrained, "template": args.template}
    args.out.mkdir(parents=True, exist_ok=True)
    looks(found, args.units).sheet().save(args.out / SHEET, optimize=True)
    write_json(args.out / FOUND, {**about, **found.told()})
    print(table(found, args.units))
    print(f"{args.out / SHEET} shows units and changes", file=sys.stderr)


def _grid(args: argparse.Namespace) -> Grid:
    """The prompts: of one's own template, or of what the package's networks were trained on."""
    from gigagan.commands.blind import TRAINED_ON
    from gigagan.evaluation.probing import BACKGROUND, STYLE, THING, Grid
    from gigagan.inference.sampler import PUBLISHED

    if args.template is not None:
        if args.styles or args.backgrounds:
            raise ValueError("--template has one place, {}: leave --styles and --backgrounds out")
        if args.template.count("{}") != 1:
            raise ValueError(f"--template {args.template!r}: it needs {{}} once, for the concept")
        if not args.concepts:
            raise ValueError("--template needs --concepts NAME NAME …")
        return Grid.fill(args.template.replace("{}", "{concept}"), {"concept": args.concepts})
    known = json.loads((PUBLISHED / TRAINED_ON).read_text(encoding="utf-8"))
    args.template = known["template"].replace("{name}", f"{{{THING}}}")
    axes = {
        THING: args.concepts or known["names"][:_THINGS],
        STYLE: args.styles or known["styles"],
        BACKGROUND: args.backgrounds or known["backgrounds"],
    }
    return Grid.fill(args.template, axes)


def table(found: Dissection, count: int) -> str:
    """Axes against chance, the units of highest IoU, and what switching a concept's does."""
    lines = [f"{'axis':<12}{'mean IoU':>9}{'chance':>8}{'99 %':>7}  units above that"]
    for axis, figures in found.told()["axes"].items():
        lines.append(
            f"{axis:<12}{figures['mean_best_iou']:>9.3f}{figures['null_mean']:>8.3f}"
            f"{figures['null_99']:>7.3f}  {figures['units_above_null_99']} of "
            f"{found.settings['units']}"
        )
    lines += ["", f"{'unit':>4}  {'IoU':>5}  concept"]
    lines += [f"{u['unit']:>4}  {u['iou']:.3f}  {u['concept']}" for u in found.units()[:count]]
    head = f"{found.settings['off']} best units (as many random ones)"
    lines += ["", f"{head:<38}{'inside':>14}{'outside':>14}{'kept':>12}{'ACE':>15}"]
    for switched in found.switched:
        best, random = switched.effect, switched.random
        lines.append(
            f"{switched.concept:<38}{best.inside:>7.1%} ({random.inside:.1%}){best.outside:>7.1%} "
            f"({random.outside:.1%}){best.kept:>6.0%} ({random.kept:.0%}){best.ace:>8.3f} "
            f"({random.ace:.3f})"
        )
    return "\n".join(lines)
