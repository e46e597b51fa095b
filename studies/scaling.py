"""How do loss and KID fall with a network's width, its pictures, and the compute it is given?

One recipe, all of whose channel counts are multiplied by powers of √2, on nested parts of the same
pictures. `regression` is the warm start's generator alone, measured by its own loss on held-out
captions (combinations never trained); `adversarial` the whole game, measured by KID.

- `run` works off the queue; it may be stopped at any moment, and be started on several machines.
- `status` says what is done; `report` prints the tables of docs/paper.md and draws the plot.

There is no attention: what it costs grows otherwise than what convolutions cost. A part of the
pictures is so many of every concept (by a seeded order, at least one), so that all parts are asked
for the same held-out captions. The rate is constant and weights are averaged, so that each reading
is that of a training of its own length (Hägele et al. 2024, arXiv:2405.18392).
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from bench.predict import count
from data.config import FilterConfig
from data.shards import write as shards
from data.shards.manifest import INDEX
from gigagan.common.files import filled_aside
from gigagan.config import TrainBaseConfig
from gigagan.config.presets import preset
from gigagan.evaluation import drawing, judging
from gigagan.evaluation.heldout import read_heldout, subset
from gigagan.evaluation.judges.distances import mmd2, mmd2_interval
from gigagan.evaluation.judges.features import square
from gigagan.evaluation.report.results import write_json
from gigagan.evaluation.setting import setting
from gigagan.inference.sampler import load
from gigagan.models import pretrained, snapshot
from gigagan.models.base import features_of
from gigagan.models.generator import Generator
from gigagan.models.layers import pyramid
from gigagan.models.pixels import from_uint8
from gigagan.models.summary import summarize
from gigagan.training.captions import CaptionFeatures
from studies import _law, _queue, _scaling_plot
from studies import _scaling_tables as tables
from studies._queue import Place, Record, Training

RESULTS = Path("docs/paper/scaling")
IMAGES = Path("docs/images")
COMPUTE = "compute.json"
"""What training on an image takes, counted; among the results."""
SIDE = 32
STEPS_OF_WIDTH = (-2, -1, 0, 1)
"""Powers of √2 by which all channel counts are multiplied."""
SHARES = (1.0, 0.125, 0.375)
"""Of every concept's pictures; the extremes say most, and come first."""
REGRESSION = {str(images): images for images in (1_000, 2_000, 4_000, 8_000)}
ADVERSARIAL = {str(images): images for images in (1_600, 3_200)}
"""Images seen at readings."""
KINDS = ("regression", "longer", "adversarial")
"""`longer` are regressions of the smaller widths up to the compute of the largest one."""
REPEATS = (1, 2)
"""Further seeds of the regression of width 1 on all pictures: how far seeds lie apart."""
DRAWN = 128
"""Pictures of each KID."""
RESAMPLES = 300
_NEVER = 10**9
_BATCH = 64


def width_of(step: int) -> float:
    """What channel counts are multiplied by."""
    return round(2 ** (step / 2), 3)


def config_of(kind: str, step: int) -> TrainBaseConfig:
    """A kind's training at a width; its length is left open."""

    def wide(*channels: int) -> list[int]:
        return [round(c * 2 ** (step / 2)) for c in channels]

    (style,) = wide(128)
    generator = {"channels": wide(96, 96, 48, 24), "kernels": [1] * 4, "attention": [0] * 4}
    generator |= {"style_dim": style, "text": {"width": style, "depth": 0}}
    critic = {"channels": wide(24, 48, 96, 96), "attention": [0] * 4, "halving": "mean"}
    tree: dict[str, Any] = {
        "generator": generator,
        "discriminator": {**critic, "text": {"width": style, "depth": 0}},
        "loss": {"matching": 0.5, "contrastive": 0, "vision": 0},
        "optimizer": {"warmup_images": 400, "r1_weight": 1.0, "generator_rate": 0.8},
    }
    if kind != "adversarial":  # for good: its rate begins to fall at four fifths of `images`
        tree["warm_start"] = {"images": _NEVER}
    return TrainBaseConfig.model_validate(tree)


def trainings(place: Place, kinds: Sequence[str] = KINDS) -> list[Training]:
    """The queue, what says most first."""
    grid = [(step, share) for share in SHARES for step in STEPS_OF_WIDTH]
    cross = [(step, share) for step, share in grid if step == 0 or share == 1]
    games = [("adversarial", *cell, 0) for cell in cross]
    games += [("adversarial", *cell, 0) for cell in grid if cell not in cross]
    regressions = [("regression", *cell, 0) for cell in grid]
    regressions += [("regression", 0, 1.0, seed) for seed in REPEATS]
    longer = [("longer", step, 1.0, 0) for step in STEPS_OF_WIDTH[:-1]]
    n = len(STEPS_OF_WIDTH)
    cells = [*regressions[: 2 * n], *longer[:1], *games[:n], *longer[1:]]
    cells += [*regressions[2 * n :], *games[n:]]
    return [_training(place, *cell) for cell in cells if cell[0] in kinds]


def _training(place: Place, kind: str, step: int, share: float, seed: int) -> Training:
    width = width_of(step)
    return Training(
        f"{kind}-width-{width:g}-share-{share:g}-seed-{seed}",
        {"kind": kind, "width": width, "share": share, "seed": seed},
        config_of(kind, step).model_copy(update={"seed": seed}),
        lengths_of(kind, step),
        None if share == 1 else _folder_of_part(place, share),
        kid_of_drawn if kind == "adversarial" else heldout_loss,
    )


def lengths_of(kind: str, step: int) -> dict[str, int]:
    """After how many images a training is measured; with √2 more channels an image costs twice."""
    if kind != "longer":
        return REGRESSION if kind == "regression" else ADVERSARIAL
    doublings = range(1, STEPS_OF_WIDTH[-1] - step + 1)
    return {f"{(n := max(REGRESSION.values()) << i)}": n for i in doublings}


# ---- parts of the pictures -----------------------------------------------------------------------


def _folder_of_part(place: Place, share: float) -> Path:
    return place.out / f"pictures-{share:g}" / f"{SIDE:03d}"


def write_part(place: Place, share: float) -> None:
    """Shards of a share of every concept's pictures, unless they are there.

    Raises:
        ValueError: the study's shards are not those of a filter.
    """
    folder = _folder_of_part(place, share)
    kept = place.shards.parent.parent / "kept.parquet"
    if (folder / INDEX).exists():
        return
    if not kept.exists():
        raise ValueError(
            f"there is no {kept}, of which parts of the pictures are chosen: give --shards as the "
            "stage filter left them, such as …/filter/KEY/shards/032"
        )
    table = pq.read_table(kept)
    chosen = part_of(table["key"].to_pylist(), table["label"].to_pylist(), share)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filled_aside(folder.parent / "kept.parquet") as partial:
        pq.write_table(table.filter([key in chosen for key in table["key"].to_pylist()]), partial)
    config = FilterConfig(resolutions=(SIDE,))
    shards.write(folder.parent / "kept.parquet", place.heldout.parent, folder.parent, config)


def part_of(keys: Sequence[str], labels: Sequence[str | None], share: float) -> set[str]:
    """Keys of that share of every label's pictures, at least one; a smaller share's are among them.

    Their order is that of a hash of the key.
    """
    pairs = sorted(
        (label or "", sha256(key.encode()).digest(), key)
        for key, label in zip(keys, labels, strict=True)
    )
    chosen: set[str] = set()
    for _, group in groupby(pairs, key=lambda pair: pair[0]):
        ordered = [key for *_, key in group]
        chosen |= set(ordered[: max(round(share * len(ordered)), 1)])
    return chosen


# ---- what is measured ----------------------------------------------------------------------------


@torch.no_grad()
def heldout_loss(one: Training, place: Place, reading: str) -> Record:
    """The regression's loss on held-out captions, with its standard error over them."""
    g, _ = snapshot.load(place.folder(one.name) / f"{reading}.safetensors")
    assert isinstance(g, Generator)
    names, captions, real_NCHW = _heldout(place)
    random = torch.Generator().manual_seed(0)
    z_NZ = torch.randn(len(names), g.config.latent_dim, generator=random)
    found = []
    for start in range(0, len(names), _BATCH):
        rows = slice(start, start + _BATCH)
        drawn = g(z_NZ[rows], features_of(g, names[rows], captions))
        found.append(losses_of(drawn, from_uint8(real_NCHW[rows])))
    loss_N = torch.cat(found).double()
    error = float(loss_N.std() / len(loss_N) ** 0.5)
    return {"loss": float(loss_N.mean()), "standard_error": error}


def kid_of_drawn(one: Training, place: Place, reading: str) -> Record:
    """KID of some held-out captions' pictures and its 95 % interval: no more, as it is dear."""
    folder = place.pictures(one.name, reading)
    at = setting(
        _queue.judged(resolution=SIDE, num_images=DRAWN),
        folder,
        statistics=folder.parent / "statistics",
    )
    everything = read_heldout(place.heldout)
    captions = subset(everything, at.config.num_images, at.config.seed).captions
    sampler = load(place.folder(one.name) / f"{reading}.safetensors")
    drawn, _ = drawing.draw(
        lambda rows, seed: sampler.sample(captions[rows], seed=seed, cut=True), len(captions), at
    )
    with torch.no_grad():
        ours_ND, real_MD = judging.features_of(drawn, everything.all_pictures, at)["inception"]
    low, high, _ = mmd2_interval(ours_ND, real_MD)
    return {"kid": mmd2(ours_ND, real_MD), "interval": [low, high]}


def losses_of(drawn: Sequence[torch.Tensor], real_NCHW: torch.Tensor) -> torch.Tensor:
    """Mean |x − y| over the levels of the pyramid of each picture, N: the warm start's loss."""
    pairs = zip(drawn, pyramid(real_NCHW, len(drawn)), strict=True)
    return torch.stack([(x - y).abs().flatten(1).mean(1) for x, y in pairs]).mean(0)


@functools.cache
def _heldout(place: Place) -> tuple[list[str], CaptionFeatures, torch.Tensor]:
    """Captions of combinations never trained, what networks read of them, and pictures, uint8."""
    heldout = read_heldout(place.heldout)
    encoder = pretrained.text_encoder("embedded:minilm-l6", torch.device("cpu"))
    captions = CaptionFeatures(encoder, torch.device("cpu"))
    file = place.out / "heldout-features.pt"
    captions.load(file)
    if captions.warm(heldout.captions):
        captions.save(file)
    pictures = np.stack([np.asarray(square(path, SIDE)) for path in heldout.pictures])
    return heldout.captions, captions, torch.from_numpy(pictures).permute(0, 3, 1, 2)


def count_compute() -> Record:
    """Multiply-adds of training on one image, by kind and width; and of what is predicted.

    A backward of the regression counts as two forwards; R1 counts for its share of the steps.
    """
    by_kind: dict[str, dict[str, float]] = {"regression": {}, "adversarial": {}}
    for step in STEPS_OF_WIDTH:
        name = f"{width_of(step):g}"
        forward = summarize(config_of("regression", step).generator).multiply_adds
        by_kind["regression"][name] = 3 * forward
        by_kind["adversarial"][name] = _of_a_game(config_of("adversarial", step))
    paper = preset("paper_64")
    assert isinstance(paper, TrainBaseConfig)
    parameters = summarize(paper.generator).parameters
    paper_64 = {"multiply_adds": _of_a_game(paper), "parameters": parameters}
    return {**by_kind, "paper_64": {**paper_64, "images": paper.total_images}}


def _of_a_game(config: TrainBaseConfig) -> float:
    found = count(config)
    return round(1e9 * (found.gmac + found.r1_gmac / config.optimizer.r1_every))


# ---- the report ----------------------------------------------------------------------------------


def report(results: Path, images: Path) -> dict[str, str]:
    """The tables of docs/paper.md, from the JSON files alone; draws scaling.png into `images`.

    Raises:
        ValueError: too little was measured.
    """
    file = results / COMPUTE
    if not file.exists():
        raise ValueError(f"there is no {file}: run `python -m studies.scaling run` first")
    compute, records = json.loads(file.read_text()), _queue.records(results)
    loss = tables.readings_of(records, ("regression", "longer"), compute["regression"])
    kid = tables.readings_of(records, ("adversarial",), compute["adversarial"])
    if len({one.width for one in loss}) < 3 or len({one.pictures for one in loss}) < 2:
        raise ValueError(
            f"{results} has regressions of fewer than three widths or of one number of pictures, "
            "which is no law: run `python -m studies.scaling run --kinds regression`"
        )
    points = tables.points(loss)
    law_7 = _law.fitted(*points)
    laws_R7 = _law.resampled(law_7, *points, [one.training for one in loss], resamples=RESAMPLES)
    _scaling_plot.draw(images / "scaling.png", loss, kid, law_7, laws_R7)
    return {
        "scaling-loss": tables.of_losses(loss, max(REGRESSION.values())),
        "scaling-law": tables.of_law(law_7, laws_R7, loss),
        "scaling-left-out": tables.width_left_out(loss),
        "scaling-longer": tables.lengths_left_out(loss, max(REGRESSION.values())),
        "scaling-kid": tables.of_kids(kid),
        "scaling-paper": tables.of_paper(law_7, laws_R7, loss, kid, compute["paper_64"]),
    }


# ---- the command line ----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Do what was asked for; returns the exit status."""
    p = argparse.ArgumentParser(
        prog="python -m studies.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("command", choices=("run", "status", "report"))
    p.add_argument("--shards", type=Path, help="folder such as shards/032 of the stage filter")
    p.add_argument("--heldout", type=Path, help="held-out pictures of the stage download")
    p.add_argument(
        "--out", type=Path, default=Path("runs/scaling"), help="checkpoints (%(default)s)"
    )
    p.add_argument("--results", type=Path, default=RESULTS, help="JSON files (%(default)s)")
    p.add_argument("--images", type=Path, default=IMAGES, help="the plot (%(default)s)")
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    p.add_argument("--cores", type=int, nargs="+", default=[0], help="one training each")
    p.add_argument("--minutes", type=float, help="then stop, with checkpoints (when all is done)")
    p.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.command == "run" and not (args.shards and args.heldout):
        p.error("give --shards and --heldout: what the stages filter and download left")
    place = Place(args.shards or Path(), args.heldout or Path(), args.out, args.results)
    todo = trainings(place, args.kinds)
    if args.one:
        return _queue.do_one(todo, place, args.one[0], *map(int, args.one[1:]))
    if args.command == "status":
        print(_queue.status(todo, place))
        return 0
    try:
        if args.command == "report":
            print("\n\n".join(report(args.results, args.images).values()))
            return 0
        for share in SHARES[1:]:
            write_part(place, share)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not (args.results / COMPUTE).exists():
        args.results.mkdir(parents=True, exist_ok=True)
        write_json(args.results / COMPUTE, count_compute())
    command = ["studies.scaling", "run", "--shards", str(args.shards), "--heldout"]
    command += [str(args.heldout), "--out", str(args.out), "--results", str(args.results)]
    command += ["--kinds", *args.kinds]
    _queue.work(todo, place, command, cores=args.cores, minutes=args.minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
