"""`python -m gigagan blind`: can one name what is drawn? A numbered sheet, and a score.

Whoever answers sees neither captions nor key, and has the names to choose from.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigagan.commands.options import Commands, add_drawing, add_networks, device, provenance

if TYPE_CHECKING:
    from PIL import Image

KEY, SHEET, NAMES, ANSWERS = "key.json", "sheet.png", "names.txt", "answers.txt"
TRAINED_ON = "trained_on.json"
"""Beside the package's networks: `template`, `styles`, `backgrounds` and the `names`, each with its
article, that they were trained on."""
_MIN_CELL_PX = 160
_COLUMNS = 6
_EXAMPLES = """examples:
  python -m gigagan blind                                # the package's networks
  python -m gigagan blind --base base.safetensors --heldout heldout --split combination
  python -m gigagan blind --heldout heldout --real --out blind-real    # can real ones be named?
  python -m gigagan blind --answers blind/answers.txt

Look at sheet.png, write a name of names.txt after each number in answers.txt, then have it scored.
key.json has the answers."""


def add(commands: Commands) -> None:
    """Add the command `blind` with its arguments."""
    command = commands.add_parser(
        "blind",
        help="can one name the pictures? a numbered sheet, and a score of the answers",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_networks(command)
    add_drawing(command)
    command.add_argument("--heldout", type=Path, help="folder with a gallery.json of captions")
    command.add_argument(
        "--split", help="of its captions: trained, unseen or (default) combination, never trained"
    )
    command.add_argument("--real", action="store_true", help="show its real pictures instead")
    command.add_argument("--count", type=int, default=24, help="pictures (%(default)s)")
    command.add_argument("--out", type=Path, default=Path("blind"), help="folder (%(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace a sheet and its answers")
    command.add_argument("--answers", type=Path, help="score this file; its key lies beside it")


def run(args: argparse.Namespace) -> None:
    """Write a sheet with what belongs to it, or score the answers to one."""
    if args.answers is not None:
        print(score(args.answers))
        return
    if args.count < 2:
        raise ValueError(f"--count {args.count}: give 2 or more, else there is nothing to choose")
    if (args.out / KEY).exists() and not args.overwrite:
        raise ValueError(f"{args.out} holds a sheet: choose another --out, or --overwrite")
    asked = _from_gallery(args) if args.heldout else _from_package(args)
    pictures, about = _real(asked) if args.real else _drawn(asked, args)
    settings = {"seed": args.seed, "split": args.split, "real": args.real, **about}
    write(args.out, asked, pictures, settings)
    print(
        f"{args.out / SHEET} shows {len(asked)} pictures; write a name of {args.out / NAMES} after "
        f"each number in {args.out / ANSWERS}, then: python -m gigagan blind --answers "
        f"{args.out / ANSWERS}"
    )


@dataclass(frozen=True)
class Asked:
    """One picture of a sheet."""

    name: str
    caption: str
    real: Path | None = None


def _from_gallery(args: argparse.Namespace) -> list[Asked]:
    """A caption of each of `--count` concepts, drawn by the seed."""
    import numpy as np

    from gigagan.evaluation.heldout import SPLITS, read_gallery

    split = args.split or "combination"
    if split not in SPLITS:
        raise ValueError(f"--split {split}: choose one of {', '.join(SPLITS)}")
    folder = args.heldout.parent if args.heldout.is_file() else args.heldout
    gallery = read_gallery(folder)
    if gallery is None:
        raise ValueError(
            f"{args.heldout}: there is no gallery.json: give the download stage's heldout"
        )
    works = [work for work in gallery.works if work.split == split]
    names = sorted({work.concept for work in works})
    _check_count(args, names, f"{folder} has {{}} concepts of the split {split!r}")
    random = np.random.default_rng(args.seed)
    asked = []
    for name in random.permutation(names)[: args.count].tolist():
        own = [work for work in works if work.concept == name]
        work = own[int(random.integers(len(own)))]
        asked.append(Asked(name, work.caption, work.picture))
    return asked


def _from_package(args: argparse.Namespace) -> list[Asked]:
    """Captions of what the package's networks were trained on, drawn by the seed."""
    import numpy as np

    from gigagan.inference.sampler import PUBLISHED

    needs = [f"--{name}" for name in ("real", "split", "base") if getattr(args, name)]
    if needs:
        raise ValueError(f"{needs[0]} needs --heldout FOLDER: the captions come from its gallery")
    file = PUBLISHED / TRAINED_ON
    if not file.is_file():
        raise ValueError(
            f"{file} is not there, which lists what the package's networks were trained on: give "
            "--heldout FOLDER with a gallery.json"
        )
    known = json.loads(file.read_text(encoding="utf-8"))
    _check_count(args, known["names"], "the package's networks know {} things")
    random = np.random.default_rng(args.seed)
    asked = []
    for name in random.permutation(known["names"])[: args.count].tolist():
        style, background = (str(random.choice(known[of])) for of in ("styles", "backgrounds"))
        caption = known["template"].format(style=style, name=name, background=background)
        asked.append(Asked(_bare(name), caption))
    return asked


def _check_count(args: argparse.Namespace, names: Sequence[str], found: str) -> None:
    if len(names) < args.count:
        raise ValueError(f"--count {args.count}, but {found.format(len(names))}: give fewer")


def _real(asked: Sequence[Asked]) -> tuple[list[Image.Image], dict[str, Any]]:
    from gigagan.evaluation.judges.features import open_rgb

    return [open_rgb(one.real) for one in asked if one.real is not None], {}


def _drawn(
    asked: Sequence[Asked], args: argparse.Namespace
) -> tuple[list[Image.Image], dict[str, Any]]:
    from gigagan.inference.sampler import load

    sampler = load(args.base, args.upsampler, device=device(args))
    pictures = sampler.sample(
        [one.caption for one in asked], seed=args.seed, truncation=args.truncation, cut=args.cut
    )
    return pictures, {"truncation": args.truncation, **provenance(sampler.snapshots)}


def write(
    out: Path, asked: Sequence[Asked], pictures: Sequence[Image.Image], settings: dict[str, Any]
) -> None:
    """The sheet, the names in another order, an empty file of answers and, apart, the key."""
    import numpy as np

    from gigagan.evaluation.report.results import caption_grid, write_json

    out.mkdir(parents=True, exist_ok=True)
    side = pictures[0].width
    sheet = caption_grid(
        [(str(number), [picture]) for number, picture in enumerate(pictures, start=1)],
        title="Which is which?",
        cell_px=side * max(1, -(-_MIN_CELL_PX // side)),
        columns=_COLUMNS,
        font_px=26,
    )
    sheet.save(out / SHEET)
    order = np.random.default_rng([settings["seed"], 1]).permutation(len(asked))
    (out / NAMES).write_text("".join(f"{asked[i].name}\n" for i in order), encoding="utf-8")
    lines = [
        f"# A name of {NAMES} after each number, each name once; nothing where you cannot say."
    ]
    lines += [f"{number}:" for number in range(1, len(asked) + 1)]
    (out / ANSWERS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    key = {
        "warning": "These are the answers: answer first.",
        "names": [one.name for one in asked],
        "captions": [one.caption for one in asked],
        **settings,
    }
    write_json(out / KEY, key)


# ---- answers -----------------------------------------------------------------------------------


def _names(key: Path) -> list[str]:
    """The names that a key file lists, in the order of the pictures."""
    try:
        names = json.loads(key.read_text(encoding="utf-8"))["names"]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("its names are no texts")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{key} is not a key that `blind` wrote ({error!r}): write the sheet anew"
        ) from error
    return list(names)


def score(file: Path) -> str:
    """How many are right, how likely that is by guessing, and which are wrong.

    Raises:
        ValueError: a line that is no answer, a number or name that is not there or comes twice.
        FileNotFoundError: no answers, or no key beside them.
    """
    from gigagan.evaluation.judges.statistics import matches_by_chance, share_interval

    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: `blind` writes answers.txt, to be filled in")
    key = file.with_name(KEY)
    if not key.is_file():
        raise FileNotFoundError(
            f"beside {file} there is no {KEY}: leave the answers in the folder that `blind` wrote"
        )
    names = _names(key)
    answers = read_answers(file, names)
    right = sum(answers.get(number) == name for number, name in enumerate(names, start=1))
    low, high = share_interval(right, len(names))[:2]
    chance = matches_by_chance(right, len(answers), len(names))
    lines = [
        f"{right} of {len(names)} right: {right / len(names):.0%} (95 %: {low:.0%} to {high:.0%}). "
        f"Guessing gives {len(answers) / len(names):.2g}; so many or more with p = {chance:.2g}."
    ]
    for number, name in enumerate(names, start=1):
        if answers.get(number) != name:
            lines.append(f"{number}: {name}, answered: {answers.get(number, 'nothing')}")
    return "\n".join(lines)


def read_answers(file: Path, names: Sequence[str]) -> dict[int, str]:
    """Number → name of every line `number: name`; case and articles do not matter.

    Empty lines, lines that begin with # and numbers without a name are passed over.
    """
    known = {_bare(name).casefold(): name for name in names}
    answers: dict[int, str] = {}
    seen: dict[int | str, int] = {}
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}): save it as such") from error
    for place, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{file}:{place}"
        left, colon, right = (part.strip() for part in line.partition(":"))
        if not colon or not left.isdecimal():
            raise ValueError(f"{where}: {line.strip()!r} is no answer: write `number: name`")
        number, given = int(left), _bare(right).casefold()
        if not 1 <= number <= len(names):
            raise ValueError(f"{where}: there is no picture {number}: give 1 to {len(names)}")
        if given and given not in known:
            near = difflib.get_close_matches(given, known, n=1)
            hint = f"did you mean {known[near[0]]!r}?" if near else f"choose one of {NAMES}"
            raise ValueError(f"{where}: {right!r} is none of the names: {hint}")
        for what in (number, known[given]) if given else (number,):
            if what in seen:
                raise ValueError(
                    f"{where}: {what!r} stands in line {seen[what]} already: each number and each "
                    "name once"
                )
            seen[what] = place
        if given:
            answers[number] = known[given]
    return answers


def _bare(name: str) -> str:
    """A name without its article."""
    first, _, rest = name.partition(" ")
    return rest.strip() if rest and first.lower() in ("a", "an", "the") else name
