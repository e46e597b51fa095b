"""`python -m gigagan sample`: prompts to pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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
    from PIL import Image

    from gigagan.inference.sampler import Sampler

_EXAMPLES = """examples:
  python -m gigagan sample "flat emoji of a violin on a teal background" --count 4
  python -m gigagan sample --from-file prompts.txt --out drawn     # again: goes on where it ended
  python -m gigagan sample "outlined emoji of a bell" --truncation 0.7 | jq .path
  python -m gigagan sample bell 7 --base classes.safetensors       # classes, by name or number
  python -m gigagan sample --count 16 --base any.safetensors       # an unconditional network

One line of JSON for each picture goes to stdout; the same stands in the PNG. In a file of prompts
empty lines and lines that begin with # are passed over."""


def add(commands: Commands) -> None:
    """Add the command `sample` with its arguments."""
    command = commands.add_parser(
        "sample",
        help="draw pictures from prompts",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_networks(command)
    add_adapters(command)
    add_drawing(command)
    command.add_argument(
        "prompts", nargs="*", help="one picture each: words, or a class by name or number"
    )
    command.add_argument("--from-file", type=Path, help="a text file with a prompt per line")
    command.add_argument("--out", type=Path, default=Path("samples"), help="folder (%(default)s)")
    command.add_argument("--count", type=int, default=1, help="pictures per prompt (%(default)s)")
    command.add_argument("--batch-size", type=int, default=16, help="at once (%(default)s)")
    command.add_argument("--no-upscale", action="store_true", help="the base's pictures alone")
    command.add_argument("--grid", action="store_true", help="all of them in grid.png, too")
    add_overwrite(command)


@dataclass(frozen=True)
class _Wanted:
    """One picture: its number decides its file and its latents."""

    number: int
    prompt: str

    def path(self, out: Path) -> Path:
        return out / f"{self.number:06d}.png"


def run(args: argparse.Namespace) -> None:
    """Draw what is not there yet; raises ValueError at the end if a prompt was no good."""
    check(args)
    given = list(_prompts(args))
    if not given and args.from_file:
        raise ValueError(f"{args.from_file} holds no prompts")
    from gigagan.inference.pictures import read_about, save_picture
    from gigagan.inference.prompts import PromptError
    from gigagan.inference.sampler import load

    sampler = load(args.base, args.upsampler, adapters=adapters(args), device=device(args))
    given = _fitting(given, sampler)
    wanted, refused, number = [], 0, 0
    for place, prompt in given:
        try:
            checked = sampler.condition.check(prompt, cut=args.cut)
            wanted += [_Wanted(number + i, checked) for i in range(args.count)]
        except PromptError as error:
            print(f"{place}: {error}", file=sys.stderr)
            refused += 1
        number += args.count  # a bad line takes its numbers along: the others keep theirs

    common = _common(args, sampler)
    missing, there = [], []
    for one in wanted:
        about = {**common, "prompt": one.prompt, "number": one.number}
        path = one.path(args.out)
        if is_made(path, about, overwrite=args.overwrite, read=read_about):
            there.append((path, about))
        else:
            missing.append((one, about))
    grid = args.out / "grid.png"
    if args.grid:
        check_sheet(grid, overwrite=args.overwrite)
    for path, about in there:
        tell(path, about, skipped=True)
    with progress_bar("pictures") as progress:
        for start in range(0, len(missing), args.batch_size):
            batch = missing[start : start + args.batch_size]
            for (one, about), picture in zip(batch, _draw(sampler, batch, args), strict=True):
                save_picture(one.path(args.out), picture, about)
                tell(one.path(args.out), about, skipped=False)
            progress(start + len(batch), len(missing))
    if args.grid and wanted:
        save_picture(grid, _grid(wanted, args), {**common, "sheet": "grid"})
        print(f"{grid} shows all of them", file=sys.stderr)
    if refused:
        raise ValueError(f"{refused} of {len(given)} prompts were not drawn: see above")


def _prompts(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Where each prompt stands, and the prompt."""
    for number, prompt in enumerate(args.prompts, start=1):
        yield f"prompt {number}", prompt
    if args.from_file is None:
        return
    try:
        lines = args.from_file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.from_file} is not UTF-8 text ({error})") from error
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"{args.from_file}:{number}", line


def _fitting(given: list[tuple[str, str]], sampler: Sampler) -> list[tuple[str, str]]:
    """The prompts, or an empty one for a network that reads none; ValueError for the other's."""
    from gigagan.inference.conditions import Untold

    reads_none = isinstance(sampler.condition, Untold)
    if given and reads_none:
        raise ValueError(
            f"the network is unconditional and reads no prompts, {len(given)} were given: leave "
            "them out, --count says how many pictures"
        )
    if not given and not reads_none:
        raise ValueError("no prompts: give some, or --from-file")
    return given or [("picture", "")]


def _common(args: argparse.Namespace, sampler: Sampler) -> dict[str, Any]:
    upscaled = sampler.upsampler is not None and not args.no_upscale
    rules = {"seed": args.seed, "truncation": args.truncation, "upscaled": upscaled}
    return {**provenance(sampler.snapshots), **rules}


def _draw(
    sampler: Sampler, batch: list[tuple[_Wanted, dict[str, Any]]], args: argparse.Namespace
) -> list[Any]:
    """Each picture by its own number, whatever the batch: what is drawn again is the same.

    The number goes into z by the seed's stream and into the upsampler by its place in the list.
    """
    last = max(one.number for one, _ in batch)
    z_BZ = sampler.latents(last + 1, args.seed)[[one.number for one, _ in batch]]
    return sampler.sample(
        [one.prompt for one, _ in batch],
        seed=args.seed,
        truncation=args.truncation,
        batch_size=args.batch_size,
        upscale=not args.no_upscale,
        latents_BZ=z_BZ,
        places=[one.number for one, _ in batch],
        cut=args.cut,
    )


def _grid(wanted: list[_Wanted], args: argparse.Namespace) -> Image.Image:
    from PIL import Image

    from gigagan.evaluation.report.results import caption_grid

    rows = []
    for start in range(0, len(wanted), args.count):
        own = wanted[start : start + args.count]
        rows.append((own[0].prompt, [Image.open(one.path(args.out)) for one in own]))
    return caption_grid(rows, title=f"seed {args.seed}", columns=max(1, 8 // args.count))
