"""Does the ablation of GigaGAN's Table 1 reproduce, row by row, at a size that a CPU can train?

- `cost` measures on one core what an image costs in every row; equal time follows from it.
- `run` works off the queue: every row with every seed, measured at equal images and at equal time.
  It may be stopped at any moment, and be started on several machines that share a folder.
- `status` says what is done; `report` prints the tables of docs/paper.md and draws the curves.
- `grid` draws the same captions by every row, from the pictures that `run` left in `--out`.

Rows are the presets `ladder-…` (the paper's losses alone), and two that no paper has: the last but
one with a warm start, and the same generator before a projected critic.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gigagan.common.exits import PREEMPTED
from gigagan.config import TrainBaseConfig
from gigagan.config.presets import LADDER, ladder
from gigagan.evaluation.report.results import write_json
from studies import _ladder, _queue
from studies._ladder import report as report
from studies._queue import Place, Training

RESULTS, COST = Path("docs/paper/ladder"), "cost.json"
IMAGES, MINUTES = 5_000, 3.0
"""Images, and minutes of one core, at which rows are compared; the paper's saw 25.6 M images."""
SEEDS = 3
FULL = "vision"
"""The row that has everything but the last one's width."""
WIDEST = "scale-up"
_OPTIMIZER = {"warmup_images": 800, "ema_half_life_images": 2_000}
_WARM = {"gradients": 0.5, "head_start_images": 800, "ramp_images": 800}
_PROJECTED: dict[str, Any] = {
    "discriminator": {"kind": "projected"},
    "loss": {
        "adversarial": "hinge",
        "matching": 0.5,
        "matching_images": "real",
        "contrastive": 0.0,
        "vision": 0.0,
    },
    "optimizer": {
        **_OPTIMIZER,
        "lr": 1e-3,
        "generator_rate": 2.0,
        "r1_weight": 0.0,
        "weight_decay": 0.0,
        "attention_weight_decay": 0.0,
    },
    "augment": {"diffaugment": ["translation", "cutout"]},
}
ROWS = (*LADDER, "warm-start", "projected")


class Terms(NamedTuple):
    """On what terms rows are compared; cost.json of the results has them."""

    images: int
    """Equal images: so many."""
    minutes: float
    """Equal time: so many minutes of a core, or of a GPU; 0: only equal images are compared."""
    milliseconds: Mapping[str, float]
    """What an image takes, by row; of the row with a warm start, in that."""

    def in_time(self, row: str) -> int:
        """Images of a row in that time, whole steps."""
        left, images, cost = 60e3 * self.minutes, 0, self.milliseconds[row]
        if row == "warm-start":
            images = warm_images(self.images)
            left, cost = left - images * cost, self.milliseconds[FULL]
        return _queue.BATCH * round((images + left / cost) / _queue.BATCH)


def terms_of(results: Path) -> Terms:
    """The ladder's terms.

    Raises:
        ValueError: it was not measured yet what images cost.
    """
    file = results / COST
    if not file.exists():
        raise ValueError(f"there is no {file}: run `python -m studies.ladder cost` first")
    known = json.loads(file.read_text())
    return Terms(known["images"], known["minutes"], known["milliseconds"])


def warm_images(images: int) -> int:
    """How many of so many images a warm start takes."""
    return images * 2 // 5


def config_of(row: str, images: int = IMAGES) -> TrainBaseConfig:
    """A row's training where so many images are compared; its length is left open.

    CLIP's and the vision-aided loss begin after a quarter, and rise in another.
    """
    tree = ladder(row if row in LADDER else FULL).model_dump(mode="json")
    if row == "projected":
        return TrainBaseConfig.model_validate({**tree, **_PROJECTED})
    begins = images * 24 // 100
    tree["loss"] |= {"auxiliary_start_images": begins, "ramp_images": begins}
    tree["optimizer"] |= _OPTIMIZER
    if row == "warm-start":
        tree["warm_start"] = {"images": warm_images(images), **_WARM}
    return TrainBaseConfig.model_validate(tree)


def trainings(results: Path, rows: Sequence[str] = ROWS, seeds: int = SEEDS) -> list[Training]:
    """The queue: all rows with the first seed, then all with the second, …

    Further seeds of the widest row, which takes as long as four others, come last.

    Raises:
        ValueError: it was not measured yet what images cost.
    """
    terms = terms_of(results)
    queue = [(row, seed) for seed in range(seeds) for row in rows]
    queue.sort(key=lambda pair: pair[1] > 0 and pair[0] == WIDEST)
    return [
        Training(
            f"{row}-seed-{seed}",
            {"row": row, "seed": seed},
            config_of(row, terms.images).model_copy(update={"seed": seed}),
            {"images": terms.images, **({"time": terms.in_time(row)} if terms.minutes else {})},
        )
        for row, seed in queue
    ]


def measure_cost(place: Place, rows: Sequence[str], images: int, minutes: float) -> None:
    """Add what images cost in these rows to cost.json, which also keeps the ladder's terms."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    known: dict[str, float] = {}
    if (place.results / COST).exists():
        images, minutes, milliseconds = terms_of(place.results)
        known = dict(milliseconds)
    for row in rows:
        if row in known:
            continue
        config = config_of(row, images)
        if row != "warm-start":
            config = _with_everything_on(config)
        known[row] = round(_queue.milliseconds(config, place), 2)
        place.results.mkdir(parents=True, exist_ok=True)
        terms = Terms(images, minutes, known)._asdict()
        write_json(place.results / COST, {**terms, **_queue.circumstances()})
        print(f"{row}: {known[row]} ms an image", flush=True)


def _with_everything_on(config: TrainBaseConfig) -> TrainBaseConfig:
    """Losses that begin later begin at once."""
    loss = config.loss.model_copy(update={"auxiliary_start_images": 0, "ramp_images": 1})
    return config.model_copy(update={"loss": loss})


def main(argv: Sequence[str] | None = None) -> int:
    """Do what was asked for; returns the exit status."""
    p = argparse.ArgumentParser(
        prog="python -m studies.ladder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("command", choices=("cost", "run", "status", "report", "grid"))
    p.add_argument("--shards", type=Path, help="folder such as shards/032 of the stage filter")
    p.add_argument("--heldout", type=Path, help="held-out pictures of the stage download")
    p.add_argument(
        "--out", type=Path, default=Path("runs/ladder"), help="checkpoints (%(default)s)"
    )
    p.add_argument("--results", type=Path, default=RESULTS, help="JSON files (%(default)s)")
    p.add_argument("--images", type=Path, default=Path("docs/images"), help="pictures go here")
    p.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help="some rows")
    p.add_argument("--seeds", type=int, default=SEEDS)
    p.add_argument(
        "--at-images", type=int, default=IMAGES, help="for cost: where rows are compared"
    )
    p.add_argument(
        "--at-minutes", type=float, default=MINUTES, help="… and at which time; 0: not at all"
    )
    p.add_argument("--cores", type=int, nargs="+", default=[0], help="one training each")
    p.add_argument("--minutes", type=float, help="then stop, with checkpoints (when all is done)")
    p.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.command in ("cost", "run", "grid") and not (args.shards and args.heldout):
        p.error("give --shards and --heldout: what the stages filter and download left")
    place = Place(args.shards or Path(), args.heldout or Path(), args.out, args.results)
    if args.command == "cost":
        measure_cost(place, args.rows, args.at_images, args.at_minutes)
        return 0
    if args.command == "report":
        print("\n\n".join(report(args.results, args.images).values()))
        return 0
    todo = trainings(args.results, args.rows, args.seeds)
    if args.one:
        return _queue.do_one(todo, place, args.one[0], *map(int, args.one[1:]))
    if args.command == "status":
        print(_queue.status(todo, place))
        return 0
    if args.command == "grid":
        pictures = args.out / "evaluations"
        reading = "time" if terms_of(args.results).minutes else "images"
        path = args.images / ("ladder-grid.png" if reading == "time" else "ladder-grid-images.png")
        _ladder.draw_grid(path, args.heldout, pictures, reading)
        return 0
    command = ["studies.ladder", "run", "--shards", str(args.shards), "--heldout"]
    command += [str(args.heldout), "--out", str(args.out), "--results", str(args.results)]
    command += ["--seeds", str(args.seeds), "--rows", *args.rows]
    is_done = _queue.work(todo, place, command, cores=args.cores, minutes=args.minutes)
    return 0 if is_done else PREEMPTED


if __name__ == "__main__":
    sys.exit(main())
