"""Do the networks draw their training pictures again, and does z change the answer?

- `run` draws captions of three kinds (trained; never-trained combinations; concepts never trained)
  with two latents each, finds the nearest training picture of each by three encoders, and writes a
  JSON file a network, one of the real pictures, and a sheet. Networks that have a file are skipped.
- `report` prints the tables of docs/paper.md and draws the curves, from these files alone.

A picture is a near-copy if it is nearer to a training picture than all but 5 % of the training
pictures are to one of another concept. The three samples are those of Meehan et al. 2020: training,
drawn, and real but independent.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gigagan.common.files import sha256_of
from gigagan.evaluation.heldout import SPLITS, Work, read_heldout
from gigagan.evaluation.judges.neighbours import closest
from gigagan.evaluation.naming import choose
from gigagan.evaluation.report.results import caption_grid, write_json
from gigagan.inference.sampler import PUBLISHED, Sampler, load
from studies import _queue
from studies._copies import ENCODERS, changes
from studies._memorisation import report as report
from studies._near import (
    CELL_PX,
    LATENTS,
    SHARE,
    SHOWN,
    Found,
    Real,
    Trained,
    concepts,
    mean,
    spread,
)
from studies._queue import Record
from studies.learning import Snapshot

RESULTS, IMAGES = Path("docs/paper/memorisation"), Path("docs/images")
ROWS = ("stylegan2", "matching-gd", "vision", "warm-start", "projected")
"""Of the ladder."""
PLANTED = 256
"""Training pictures of which changed copies must be found."""


# ---- real pictures: are copies found, and nothing else? -----------------------------------------


def calibrated(trained: Trained, real: Mapping[str, Real]) -> Record:
    """Near-copies of real pictures, of half of training in the other, and of planted ones."""
    order = np.random.default_rng(0).permutation(len(trained.works))
    one, other = np.array_split(order, 2)
    planted, concept_M = order[:PLANTED], concepts(trained.works)
    changed = {
        name: [change(trained.pictures[i]) for i in planted] for name, change in changes().items()
    }
    found: Record = {}
    for name, encode in ENCODERS.items():
        limit, x_MD = trained.limits[name], trained.features[name]
        near = {
            kind: mean(some.far[name] < limit, concepts(some.works)) for kind, some in real.items()
        }
        halves_N = closest(x_MD[one], x_MD[other])[0][:, 0]
        near["half"] = mean(halves_N < limit, concept_M[one])
        copies = {}
        for change, pictures in changed.items():
            far_N, row_N = trained.find(name, encode(pictures))
            copies[change] = {
                "near": mean(far_N < limit, concept_M[planted]),
                "source": mean(row_N == planted, concept_M[planted]),
            }
        spreads = {kind: spread(some.far[name], limit) for kind, some in real.items()}
        found[name] = {"limit": limit, "near": near, "planted": copies, "spread": spreads}
    return found


# ---- drawn pictures -----------------------------------------------------------------------------


def measured(
    sampler: Sampler, works: Sequence[Work], real_R: Mapping[str, np.ndarray], trained: Trained
) -> tuple[Record, Image.Image]:
    """What a network draws for these captions: a record, and a strip of the sheet.

    A latent is a seed; pictures are the base's own, not enlarged.
    """
    captions = [work.caption for work in works]
    rounds = [sampler.sample(captions, seed=z, upscale=False) for z in range(LATENTS)]
    pictures = [picture for some in rounds for picture in some]
    works = [*works] * LATENTS
    found = {name: Found.by(name, pictures, works, trained) for name in ENCODERS}
    concept_N = concepts(works)
    encoders = {name: one.record(real_R[name], concept_N) for name, one in found.items()}
    agreement = {
        f"{a}, {b}": found[a].agreement(found[b], concept_N) for a, b in combinations(ENCODERS, 2)
    }
    strip = next(iter(found.values())).strip(pictures, trained)
    return {"captions": len(captions), "encoders": encoders, "agreement": agreement}, strip


# ---- all of it ----------------------------------------------------------------------------------


def snapshots(ladder: Path | None, rows: Sequence[str], seeds: int) -> dict[str, Path]:
    """The package's base, and what the ladder has trained so far of these rows, at equal images.

    Raises:
        ValueError: the ladder has trained none of them.
    """
    found = {"package-seed-0": PUBLISHED / "emoji-32.safetensors"}
    if ladder is not None:
        names = [f"{row}-seed-{seed}" for row in rows for seed in range(seeds)]
        files = {name: ladder / name / "images.safetensors" for name in names}
        found |= {name: file for name, file in files.items() if file.is_file()}
        if len(found) == 1:
            raise ValueError(
                f"there is no {files[names[0]]}, nor another row's: give --out of "
                "`python -m studies.ladder run`"
            )
    return found


def run(
    shards: Path, heldout: Path, networks: Mapping[str, Path], results: Path, strips: Path
) -> None:
    """Measure each network that has no file among the results yet, and first real pictures.

    Raises:
        ValueError: pictures or snapshots are not there, or do not belong together.
    """
    everything = read_heldout(heldout)
    gallery = everything.gallery
    if gallery is None:
        raise ValueError(f"{heldout} has no gallery.json: give that of the embedded source")
    left = {name: path for name, path in networks.items() if not _is_measured(name, path, results)}
    if not left:
        return
    about = {"data": _queue.data_of(shards), "share": SHARE, "latents": LATENTS}
    about |= _queue.circumstances()
    limits = _known_limits(results, about)
    trained = Trained.read(shards, gallery.works, limits)
    among = {
        "trained": {gallery.places[work.caption] for work in trained.works},
        "combination": {gallery.places[caption] for caption in everything.captions},
        "unseen": None,
    }
    works = {
        split: [gallery.works[i] for i in choose(gallery, split, among=among[split])]
        for split in SPLITS
    }
    never = {
        "combination": [gallery.works[i] for i in sorted(among["combination"] or ())],
        "unseen": [work for work in gallery.works if work.split == "unseen"],
    }
    real = {split: Real.of(some, trained) for split, some in never.items()}
    results.mkdir(parents=True, exist_ok=True)
    strips.mkdir(parents=True, exist_ok=True)
    if limits is None:
        content = {"encoders": calibrated(trained, real), **about}
        write_json(results / "real.json", _queue.rounded(content))
    for name, path in left.items():
        sampler, splits = load(path), {}
        for split in SPLITS:
            reference = real["unseen" if split == "unseen" else "combination"]
            splits[split], strip = measured(sampler, works[split], reference.far, trained)
            strip.save(strips / f"{name}-{split}.png")
        row, seed = name.rsplit("-seed-", 1)
        seen = {"row": row, "seed": int(seed), "images": Snapshot(path).images_seen}
        content = {"about": {**seen, "sha256": sha256_of(path)}, "splits": splits, **about}
        write_json(results / f"{name}.json", _queue.rounded(content))
        print(f"{name}: measured", flush=True)


def _known_limits(results: Path, about: Record) -> dict[str, float] | None:
    """Of near-copies by encoder, if real pictures of this very training set were measured."""
    file = results / "real.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    if [known.get(part) for part in ("data", "share")] != [about["data"], about["share"]]:
        return None
    found = {name: one["limit"] for name, one in known["encoders"].items()}
    return found if found.keys() == ENCODERS.keys() else None


def _is_measured(name: str, path: Path, results: Path) -> bool:
    """Whether there is a record, of this very file."""
    file = results / f"{name}.json"
    return file.exists() and json.loads(file.read_text())["about"]["sha256"] == sha256_of(path)


def draw_sheet(path: Path, strips: Path, names: Sequence[str]) -> None:
    """Every network's pictures nearest to training ones, a row each, three kinds of captions.

    Raises:
        ValueError: strips of a network were left elsewhere.
    """
    rows = []
    blank = Image.new("RGB", (CELL_PX, CELL_PX), "white")
    for name in names:
        cells: list[Image.Image] = []
        for file in (strips / f"{name}-{split}.png" for split in SPLITS):
            if not file.is_file():
                raise ValueError(
                    f"there is no {file} for the sheet, which stays as it was: give --out of the "
                    f"run that measured {name}, or remove its record"
                )
            strip = Image.open(file)
            lefts = range(0, strip.width, CELL_PX)
            cells += [strip.crop((left, 0, left + CELL_PX, CELL_PX)) for left in lefts]
            cells.append(blank)
        rows.append((name, cells[:-1]))
    shares = ", ".join(f"{share:.0%}" for share in SHOWN[1:])
    title = "drawn beside the nearest training picture: captions trained, never-trained "
    title += f"combinations, concepts never trained; the nearest, and at {shares} of captions; "
    title += "framed: near-copies"
    caption_grid(rows, title=title, cell_px=CELL_PX).save(path, optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what was asked for; returns the exit status."""
    p = argparse.ArgumentParser(
        prog="python -m studies.memorisation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("command", choices=("run", "report"))
    p.add_argument("--shards", type=Path, help="folder such as shards/032 of the stage filter")
    p.add_argument("--heldout", type=Path, help="held-out pictures of the stage download")
    p.add_argument("--ladder", type=Path, help="--out of the ladder, whose snapshots are measured")
    p.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help="of the ladder")
    p.add_argument("--seeds", type=int, default=2, help="of each row (%(default)s)")
    p.add_argument(
        "--out", type=Path, default=Path("runs/memorisation"), help="strips (%(default)s)"
    )
    p.add_argument("--results", type=Path, default=RESULTS, help="JSON files (%(default)s)")
    p.add_argument("--images", type=Path, default=IMAGES, help="sheet and curves (%(default)s)")
    args = p.parse_args(argv)
    if args.command == "run" and not (args.shards and args.heldout):
        p.error("give --shards and --heldout: what the stages filter and download left")
    try:
        if args.command == "run":
            networks = snapshots(args.ladder, args.rows, args.seeds)
            with torch.inference_mode():
                run(args.shards, args.heldout, networks, args.results, args.out)
            draw_sheet(args.images / "memorisation-sheet.png", args.out, list(networks))
        for name, table in report(args.results, args.images).items():
            print(f"\n{name}\n\n{table}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
