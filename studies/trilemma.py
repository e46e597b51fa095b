"""Quality, coverage and speed of every generator that runs here, by one code on one set.

The trilemma of generative learning (Xiao, Kreis, Vahdat 2022, arXiv:2112.07804), on held-out emoji:

- `train` trains StyleGAN-T's generator for three minutes of a core.
- `judge` draws and measures each model that has no record yet, and real pictures by the same rules.
- `time` times all models in turns, on one core that nothing else may use meanwhile.
- `report` prints the tables of docs/paper.md and draws the picture.

A model is a snapshot of ours or, where it is a folder, what `studies quality train-rival` left.
The package's networks and real pictures are always there. What papers publish stands apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench import model as networks
from bench import rivals
from gigagan.common.files import sha256_of
from gigagan.config import TrainBaseConfig
from gigagan.config.presets import preset
from gigagan.evaluation import measure, naming
from gigagan.evaluation.heldout import Asks, read_heldout
from gigagan.evaluation.report.results import write_json
from gigagan.evaluation.setting import Sample
from gigagan.inference.sampler import Sampler, load
from gigagan.models.snapshot import read_about
from studies import _queue, _trilemma, quality
from studies._queue import Place, Training
from studies._trilemma import ENLARGED, PACKAGE, PAIR, REAL, REAL_128, report

RESULTS, IMAGES = Path("docs/paper/trilemma"), Path("docs/images")
TRAINING = "training"
RECORDS = (RESULTS / TRAINING, Path("docs/paper/ladder"))
"""What was measured of snapshots when they were trained."""
MINUTES = 3.0
"""Of one core, for which StyleGAN-T's generator is trained: as every row of the ladder is."""
NUM, BATCH, ROUNDS = 256, 16, 9
FREE, PATIENCE = 0.97, 90.0
"""Share of its time for which a call must have had the core, and seconds of trying for that."""
_Key = tuple[str, str]
"""A model, and what it does."""
ALWAYS = (REAL, PACKAGE, REAL_128, ENLARGED, PAIR)


@dataclass(frozen=True)
class Model:
    """Something that draws."""

    px: int
    """Side to which its pictures and the real ones are brought before they are compared."""
    asks: Asks
    sample: Sample
    about: Mapping[str, Any] = field(default_factory=dict)
    """Parameters, file, and the training as far as it is known."""
    draw: Callable[[int], object] | None = None
    """Makes so many pictures, of captions that were read before; None: nothing to be timed."""
    read: Callable[[], object] | None = None
    """Reads one caption, as if it came for the first time."""
    known: Mapping[str, Any] | None = None
    """What a study's queue measured of it, by the same rules."""


# ---- what draws --------------------------------------------------------------------------------


def opened(
    given: Mapping[str, Path], place: Place, records: Sequence[Path] = ()
) -> dict[str, Model]:
    """Real pictures, the package's networks and the given ones, by name.

    `records` are folders of what queues measured, which is not measured again.

    Raises:
        ValueError: a file or folder is of another kind, or not there.
    """
    captions, pair = read_heldout(place.heldout).captions, load()
    base = load(pair.snapshots["base"])
    found = {
        REAL: _real(place.heldout, 32),
        PACKAGE: _ours(base, captions),
        REAL_128: _real(place.heldout, 128),
        ENLARGED: _ours(base, captions, side=128),
        PAIR: _ours(pair, captions),
    }
    for name, path in given.items():
        if path.is_dir():
            found[name] = _rival(path)
        else:
            known = _of_queue(path, records)
            found[name] = replace(_ours(load(path), captions), known=known)
    return found


def _of_queue(snapshot: Path, records: Sequence[Path]) -> dict[str, Any] | None:
    """What was measured of FOLDER/READING.safetensors, by the record FOLDER.json."""
    for file in (folder / f"{snapshot.parent.name}.json" for folder in records):
        record = json.loads(file.read_text()) if file.exists() else {"readings": {}}
        if snapshot.stem in record["readings"]:
            told = ("versions", "hardware")
            return {**record["readings"][snapshot.stem], **{part: record[part] for part in told}}
    return None


def _ours(sampler: Sampler, captions: Sequence[str], side: int | None = None) -> Model:
    """A sampler, its pictures plainly enlarged to `side` where one is given."""

    def sample(captions: list[str], seed: int, truncation: float) -> list[Image.Image]:
        drawn = sampler.sample(captions, seed=seed, truncation=truncation, cut=True)
        return drawn if side is None else [p.resize((side, side), _LANCZOS) for p in drawn]

    parts = [part for part in (sampler.base, sampler.upsampler) if part is not None]
    path = sampler.snapshots["base"]
    about = {
        "parameters": sum(p.numel() for part in parts for p in part.parameters()),
        "images": (read_about(path) or {}).get("images_seen"),
        "sha256": {kind: sha256_of(file) for kind, file in sampler.snapshots.items()},
    }
    return Model(
        side or sampler.resolution,
        "text",
        sample,
        about,
        draw=lambda count: sample(list(captions[:count]), 0, 1.0),
        read=lambda: sampler.encoder.encode(captions[:1]),
    )


_LANCZOS = Image.Resampling.LANCZOS


def _rival(folder: Path) -> Model:
    """gigagan-pytorch as it was trained, unconditional."""
    note = folder / "state.json"
    if not note.is_file():
        raise ValueError(
            f"{folder} has no state.json: give what `python -m studies quality train-rival` wrote, "
            "or a snapshot's file"
        )
    told = json.loads(note.read_text())
    run = quality.Run(folder, told["layout"], told["side"], batch=told["batch"], seed=told["seed"])
    about = {
        "parameters": sum(p.numel() for p in run.trainer.G.parameters()),
        "images": run.images_seen,
        "cpu_seconds": round(run.cpu_seconds, 1),
        "layout": told["layout"],
    }
    drawn = (Image.fromarray(x_HWC) for _ in range(1) for x_HWC in run.sample(NUM))
    return Model(told["side"], "nothing", _in_order(drawn), about, draw=run.sample)


def _real(heldout: Path, px: int) -> Model:
    """Training pictures, a concept each as far as they go: what a perfect generator draws."""
    gallery = read_heldout(heldout).gallery
    if gallery is None:
        raise ValueError(f"{heldout} has no gallery.json: give the held-out set of the download")
    places = naming.choose(gallery, "trained", count=NUM)
    return Model(
        px, "nothing", _in_order(Image.open(gallery.works[place].picture) for place in places)
    )


def _in_order(pictures: Iterator[Image.Image]) -> Sample:
    """Gives away pictures that are there, whatever is asked."""
    return lambda captions, seed, truncation: list(itertools.islice(pictures, len(captions)))


# ---- what is measured --------------------------------------------------------------------------


def judge(models: Mapping[str, Model], place: Place) -> None:
    """Write a record for each model that has none, by the protocol of the ladder."""
    place.results.mkdir(parents=True, exist_ok=True)
    for name, model in models.items():
        if place.record(name).exists():
            continue
        found = model.known or _judged(name, model, place)
        about = {"px": model.px, "asks": model.asks, **model.about}
        if model.known is not None:
            about |= {"cpu_seconds": found["cpu_seconds"]}
        parts = ("metrics", "intervals", "reference", "versions", "hardware")
        write_json(place.record(name), {"about": about, **{part: found[part] for part in parts}})
        print(f"{name}: KID × 10³ {1e3 * found['metrics']['kid']:.0f}", flush=True)


def _judged(name: str, model: Model, place: Place) -> dict[str, Any]:
    changes = {} if model.px == 32 else {"naming_captions": 0}  # told by 16×16 pixels anyway
    results = measure.evaluate(
        model.sample,
        place.heldout,
        place.pictures("trilemma", name),
        _queue.judged(num_images=NUM, resolution=model.px, **changes),
        aligner=place.aligner,
        asks=model.asks,
        statistics=place.out / "evaluations" / "statistics",
    )
    return {**_queue.rounded(results), **_queue.circumstances()}


def measure_speed(models: Mapping[str, Model], file: Path) -> None:
    """Write median milliseconds of everything, and of upsamplers of one size without weights.

    Raises:
        ValueError: another process used the core meanwhile.
    """
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, model in models.items():
        if model.draw is not None:
            calls[name, "picture"] = partial(model.draw, 1)
            calls[name, "batch"] = partial(model.draw, BATCH)
        if model.read is not None:
            calls[name, "caption"] = model.read
    upsamplers = {"aura-sr": rivals.upsample("aura_sr", 1), "ours": networks.upsample(1)}
    for name, (_, made) in upsamplers.items():
        calls[name, "enlarge"] = made["upsample"]
    found: dict[str, dict[str, float]] = {}
    for (name, what), milliseconds in _medians(calls).items():
        found.setdefault(name, {})[what] = round(milliseconds, 2)
    for name, (parts, _) in upsamplers.items():
        found[name]["parameters"] = sum(p.numel() for p in parts["upsampler"].parameters())
    told = {"batch": BATCH, "rounds": ROUNDS, "milliseconds": found}
    write_json(file, {**told, **_queue.circumstances()})


def _medians(calls: Mapping[_Key, Callable[[], object]]) -> dict[_Key, float]:
    """Milliseconds of each, all taken in turns after a first time that does not count."""
    times: dict[_Key, list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS + 1):
        for key, call in calls.items():
            times[key].append(_undisturbed_ms(call))
    return {key: statistics.median(found[1:]) for key, found in times.items()}


def _undisturbed_ms(call: Callable[[], object]) -> float:
    """Of a call during which nothing else used the core; others are made again."""
    gives_up = time.perf_counter() + PATIENCE
    while True:
        started, used = time.perf_counter(), time.process_time()
        call()
        seconds = time.perf_counter() - started
        share = (time.process_time() - used) / seconds
        if share >= FREE:
            return 1e3 * seconds
        if time.perf_counter() > gives_up:
            raise ValueError(
                f"other processes had the core for {1 - share:.0%} of the time, and did not end in "
                f"{PATIENCE:.0f} seconds: wait until it is free"
            )


def train(place: Place) -> None:
    """StyleGAN-T's generator, by the queue's rules; the same call goes on where it was."""
    config = preset("stylegan_t_small_32")
    assert isinstance(config, TrainBaseConfig)
    images = BATCH * round(60e3 * MINUTES / _queue.milliseconds(config, place) / BATCH)
    one = Training("stylegan-t-seed-0", {"row": "stylegan-t"}, config, {"time": images})
    _queue.train(one, place, lambda: False)


# ---- the command line --------------------------------------------------------------------------


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals) or name in ALWAYS or "/" in name:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give NAME=PATH, with a name other than {', '.join(ALWAYS)}"
        )
    return name, Path(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what was asked for; returns the exit status."""
    p = argparse.ArgumentParser(
        prog="python -m studies.trilemma",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("command", choices=("train", "judge", "time", "report"))
    p.add_argument("--shards", type=Path, help="folder such as shards/032 of the stage filter")
    p.add_argument("--heldout", type=Path, help="held-out pictures of the stage download")
    p.add_argument("--models", type=_named, nargs="+", default=[], metavar="NAME=PATH")
    p.add_argument(
        "--records", type=Path, nargs="+", default=RECORDS, help="of queues (%(default)s)"
    )
    p.add_argument("--out", type=Path, default=Path("runs/trilemma"), help="pictures (%(default)s)")
    p.add_argument("--results", type=Path, default=RESULTS, help="JSON files (%(default)s)")
    p.add_argument("--images", type=Path, default=IMAGES, help="the plot goes here (%(default)s)")
    args = p.parse_args(argv)
    for name in ("shards", "heldout") if args.command != "report" else ():
        given: Path | None = getattr(args, name)
        if given is None or not given.exists():
            p.error(f"--{name} {given}: give what the stages filter and download left")
    try:
        if args.command == "report":
            print("\n\n".join(report(args.results, args.images).values()))
        else:
            _work(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        remedy = "pip install --no-deps -r bench/requirements.txt"
        print(f"error: {error}: {remedy}", file=sys.stderr)
        return 1
    return 0


def _work(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    place = Place(args.shards, args.heldout, args.out, args.results / _trilemma.MODELS)
    if args.command == "train":
        train(replace(place, results=args.results / TRAINING))
        return
    with torch.no_grad():
        models = opened(dict(args.models), place, args.records)
        if args.command == "judge":
            judge(models, place)
        else:
            measure_speed(models, args.results / _trilemma.SPEED)


if __name__ == "__main__":
    sys.exit(main())
