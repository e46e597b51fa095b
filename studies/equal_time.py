"""Which critic teaches a generator more in equal processor time? And which changes of one help?

Every setting trains the generator of the preset `demo` on the same shards until one core has worked
for so long; how many images that is, a short trial on the idle machine says first. Then all are
evaluated alike, by captions never trained. `--table critics` compares critics, with and without a
warm start, `recipes` the networks of both papers behind one; `heads` changes what projected heads
weigh there, `discriminator` one thing of GigaGAN's at a time; `options` adds one term of
docs/options.md at a time to a critic from the start, and to heads behind a warm start; `classes`
does so for classes, of which it wants the shards and held-out pictures of the preset emoji-classes.

What is in `--out` is not done again; a training that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from PIL import Image

from flows.config import PipelineConfig
from gigagan.config import TrainBaseConfig
from gigagan.evaluation.heldout import read_heldout
from gigagan.evaluation.report.results import caption_grid
from gigagan.training import __main__ as training
from gigagan.training.distributed.world import World
from studies.learning import Results, Snapshot, drawn_in, evaluated

OWN = ("discriminator", "loss", "optimizer", "augment")
"""Sections that are all of a setting's own; of others it changes what the preset has."""
_OPTIMIZER: dict[str, Any] = {"warmup_images": 800, "ema_half_life_images": 2_000}
_LOSS: dict[str, Any] = {"matching": 0.5, "contrastive": 0, "vision": 0}
_AUGMENT: dict[str, Any] = {"diffaugment": ["translation", "cutout"]}
_AUGSELF: dict[str, Any] = {"augself": 1.0, "augself_generator": 1.0}
MULTI_SCALE: dict[str, Any] = {
    "discriminator": {
        "channels": [24, 48, 96, 96],
        "attention": [0, 0, 0, 0],
        "halving": "mean",
    },
    "loss": _LOSS,
    "optimizer": {**_OPTIMIZER, "lr": 2.5e-3, "generator_rate": 0.8, "r1_weight": 1.0},
}
LOW_PASS = {
    **MULTI_SCALE,
    "discriminator": {**MULTI_SCALE["discriminator"], "halving": "low-pass"},
}
PROJECTED: dict[str, Any] = {
    "discriminator": {"kind": "projected"},
    "loss": {**_LOSS, "adversarial": "hinge", "matching_images": "real"},
    "optimizer": {
        **_OPTIMIZER,
        "lr": 1e-3,
        "generator_rate": 2.0,
        "r1_weight": 0,
        "weight_decay": 0,
        "attention_weight_decay": 0,
    },
    "augment": _AUGMENT,
}
BOTH: dict[str, Any] = {
    **MULTI_SCALE,
    "loss": {
        **_LOSS,
        "vision": 1.0,
        "vision_heads": "projected",
        "auxiliary_every": 1,
        "auxiliary_start_images": 0,
        "ramp_images": 1,
    },
    "augment": _AUGMENT,
}
COLD: dict[str, Any] = {"warm_start": {"images": 0}}
_CLASSES: dict[str, Any] = {
    name: {"text": None, "classes": {"number": 64}} for name in ("generator", "discriminator")
}


def _with(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of both, key by key."""
    return {
        name: {**base.get(name, {}), **changes.get(name, {})} for name in (base | dict(changes))
    }


_CRITICS = {
    "multi-scale": LOW_PASS,
    "multi-scale, halving by the mean": MULTI_SCALE,
    "projected heads": PROJECTED,
    "both": BOTH,
}
TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "critics": {
        **{f"{name}, warm start": setting for name, setting in _CRITICS.items()},
        **{name: _with(setting, COLD) for name, setting in _CRITICS.items()},
    },
    "discriminator": {
        name: _with(_with(MULTI_SCALE, COLD), changes)
        for name, changes in {
            "as in the preset": {},
            "A1 low-pass before halving": {"discriminator": {"halving": "low-pass"}},
            "A2 z as strong as the caption": {"generator": {"latent_gain": 1.0}},
            "A5 the largest picture, the last prediction": {
                "loss": {"level_weights": [0.7, 0.2, 0.1], "intermediate": 0.03}
            },
            "A6 logits begin without the caption": {"discriminator": {"caption_std": 0.0}},
            "A7 32, 64, 128, 128 maps": {"discriminator": {"channels": [32, 64, 128, 128]}},
            "A8 residual branches weigh 1": {
                "discriminator": {"residual_gain": 1.0},
                "generator": {"residual_gain": 1.0},
            },
            "A13 translation and cutout": {"augment": {"diffaugment": ["translation", "cutout"]}},
            "A14 matching 0.3": {"loss": {"matching": 0.3}},
        }.items()
    },
    "options": {
        **{
            name: _with(_with(MULTI_SCALE, COLD), changes)
            for name, changes in {
                "multi-scale": {},
                "multi-scale, AdaptiveMix": {"options": {"adaptive_mix": 1.0}},
                "multi-scale, entropy": {"options": {"entropy": 0.1}},
                "multi-scale, conditioning augmentation": {
                    "generator": {"text": {"conditioning_augmentation": True}},
                    "options": {"conditioning_kl": 1.0},
                },
                "multi-scale, DiffAugment": {"augment": _AUGMENT},
                "multi-scale, DiffAugment, AugSelf": {"augment": _AUGMENT, "options": _AUGSELF},
            }.items()
        },
        **{
            name: _with(PROJECTED, changes)
            for name, changes in {
                "heads, warm start": {},
                "heads, warm start, AdaptiveMix": {"options": {"adaptive_mix": 1.0}},
                "heads, warm start, entropy": {"options": {"entropy": 0.1}},
                "heads, warm start, AugSelf": {"options": _AUGSELF},
            }.items()
        },
    },
    "classes": {
        name: _with(_with(_with(MULTI_SCALE, COLD), _CLASSES), changes)
        for name, changes in {
            "by class": {},
            "by class, ADC": {"options": {"classifier": 1.0}},
        }.items()
    },
    "recipes": {
        "GigaGAN's generator and critic": MULTI_SCALE,
        "GigaGAN's generator, StyleGAN-T's critic": PROJECTED,
        "StyleGAN-T's generator and critic": {
            **PROJECTED,
            "generator": {"kind": "stylegan-t", "channels": [128, 64, 32]},
        },
    },
    "heads": {
        name: _with(PROJECTED, changes)
        for name, changes in {
            "adversarial 0.15": {},
            "adversarial 0.5": {"warm_start": {"adversarial": 0.5}},
            "adversarial 1.5": {"warm_start": {"adversarial": 1.5}},
            "adversarial 0.5, regression 1": {
                "warm_start": {"adversarial": 0.5, "regression": 1.0}
            },
            "adversarial 0.5, D every second step": {
                "warm_start": {"adversarial": 0.5},
                "optimizer": {"discriminator_every": 2},
            },
        }.items()
    },
}
"""Table → row → sections of the training that differ from the preset's."""

METRICS = {
    "naming_pixels_r1_combination": "own picture nearest of 64",
    "naming_judge_r1_combination": "… by the judge",
    "class_accuracy_nearest_mean": "class accuracy",
    "kid": "KID × 10³",
    "fid": "FID",
    "background_colour_accuracy": "background",
    "shape_rank": "shape rank",
}
NUM_ROWS, CELL_PX = 6, 96
TRIAL_IMAGES = 640
HOW = "training.json"


class Cost(NamedTuple):
    """Milliseconds of processor time that one image takes."""

    warm: float
    """In a warm start."""
    game: float
    """Behind it, R1 and all."""


class Place(NamedTuple):
    """Where a study reads and writes."""

    shards: Path
    heldout: Path
    out: Path

    def folder(self, name: str, seed: int) -> Path:
        """Of one training."""
        slug = "".join(c if c.isalnum() else "-" for c in name).replace("--", "-")
        return self.out / f"{slug}-seed-{seed}"

    def evaluation(self, name: str, seed: int) -> Path:
        """What was measured of it; beside all others, so that they share statistics."""
        return self.out / "evaluations" / self.folder(name, seed).name


def config_of(setting: Mapping[str, Any], **changes: Any) -> TrainBaseConfig:
    """The preset's training with these sections changed; only the last picture is looked at."""
    tree = PipelineConfig.preset("demo").train_base.model_dump(mode="json")
    for section in OWN:
        tree.pop(section)
    for section, values in setting.items():
        is_other = "kind" in values  # another network, of which the preset has nothing
        tree[section] = {**({} if is_other else tree.get(section, {})), **values}
    tree |= {"num_probe_captions": 0, "sample_images": 10**9, "system": {"loader_threads": 1}}
    tree["precision"] = "fp32"  # the same on every CPU
    return TrainBaseConfig.model_validate({**tree, **changes})


def trial(setting: Mapping[str, Any], place: Place, folder: Path) -> Cost:
    """What images cost, by the slope of processor time over two stretches of a short training."""
    config = config_of(setting)
    warm = TRIAL_IMAGES if config.warm_start.images else 0
    config = config_of(
        {**setting, "warm_start": {"images": warm, "head_start_images": 0, "ramp_images": 1}},
        total_images=warm + 2 * TRIAL_IMAGES,
        checkpoint_images=10**9,
    )
    clock: list[float] = []

    def tick() -> bool:
        clock.append(time.process_time())
        return False

    _train(config, place, folder, tick)
    B = config.batch_size
    skip, seam, end = 4, warm // B, len(clock) - 1  # the last step ends with a picture
    of = {
        "warm": 1e3 * (clock[seam - 1] - clock[skip]) / (seam - 1 - skip) / B if warm else 0.0,
        "game": 1e3 * (clock[end - 1] - clock[seam + skip]) / (end - 1 - seam - skip) / B,
    }
    return Cost(**of)


def lasting(
    setting: Mapping[str, Any], cost: Cost, seconds: float, warm_share: float, seed: int
) -> TrainBaseConfig:
    """A training that takes so many seconds of a core, a share of them in its warm start."""
    has_warm_start = config_of(setting).warm_start.images > 0
    share = warm_share if has_warm_start else 0.0
    warm = _whole(1e3 * share * seconds / cost.warm) if share else 0
    total = warm + _whole(1e3 * (1 - share) * seconds / cost.game)
    changes = {
        "warm_start": {**setting.get("warm_start", {}), "images": warm},
        "optimizer": {**setting["optimizer"], "cooldown_images": _whole(0.1 * (total - warm))},
    }
    return config_of({**setting, **changes}, total_images=total, seed=seed)


def _whole(images: float) -> int:
    """Whole steps, and at least one."""
    return max(16 * round(images / 16), 16)


def _train(config: TrainBaseConfig, place: Place, folder: Path, tick: Callable[[], bool]) -> None:
    training.run(config, folder, place.shards, None, World(), is_asked_to_stop=tick)


def train_one(config: TrainBaseConfig, place: Place, folder: Path) -> None:
    """Train on this thread, and note what it took."""
    started = time.process_time()
    _train(config, place, folder, lambda: False)
    noted = {"images": config.total_images, "seconds": time.process_time() - started}
    (folder / HOW).write_text(json.dumps(noted))


def measure_one(place: Place, name: str, seed: int) -> Results:
    """Evaluate its snapshot, if that has not been done."""
    torch.set_grad_enabled(False)
    config = PipelineConfig.preset("demo").evaluate.model_copy(
        update={"sweep": (), "speed_batches": (), "neighbours": 0, "diversity_prompts": 0}
    )
    snapshot = Snapshot(place.folder(name, seed) / "snapshot.safetensors")
    return evaluated(snapshot, place.heldout, place.evaluation(name, seed), config)


def run_all(args: argparse.Namespace, place: Place) -> None:
    """Trials one after the other, then as many trainings at a time as `--cores` has."""
    rows = _rows(args)
    place.out.mkdir(parents=True, exist_ok=True)
    jobs = [(name, seed) for seed in range(args.seeds) for name in rows]
    for name in rows:
        _again(args, "trial", name, 0, args.cores[0])
    free: queue.Queue[int] = queue.Queue()
    for core in args.cores:
        free.put(core)

    def work(job: tuple[str, int]) -> None:
        core = free.get()
        try:
            _again(args, "train", *job, core)
        finally:
            free.put(core)
        print(f"{job[0]}, seed {job[1]}: done", flush=True)

    with concurrent.futures.ThreadPoolExecutor(len(args.cores)) as pool:
        list(pool.map(work, jobs))


def _again(args: argparse.Namespace, what: str, name: str, seed: int, core: int) -> None:
    """This module in a process of its own, on one core with one thread."""
    command = [sys.executable, "-m", "studies", "equal_time", "--table", args.table]
    command += ["--shards", args.shards, "--heldout", args.heldout, "--out", args.out]
    command += ["--minutes", args.minutes, "--warm-share", args.warm_share]
    command += ["--one", what, name, seed, core]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GIGAGAN_CORES": "off"}
    folder = Place(args.shards, args.heldout, args.out).folder(name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{what}.log"
    with path.open("a") as log:
        done = subprocess.run(list(map(str, command)), env=environment, stdout=log, stderr=log)
    if done.returncode:
        raise RuntimeError(f"{name}, seed {seed}: status {done.returncode}, {path} says why")


def do_one(args: argparse.Namespace, place: Place) -> None:
    """What a process of `run_all` does."""
    what, name, seed, core = args.one[0], args.one[1], int(args.one[2]), int(args.one[3])
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    setting, cost_file = TABLES[args.table][name], place.folder(name, 0) / "cost.json"
    if what == "trial":
        if not cost_file.exists():
            cost = trial(setting, place, place.folder(name, 0) / "trial")
            cost_file.write_text(json.dumps(cost._asdict()))
        return
    cost, folder = Cost(**json.loads(cost_file.read_text())), place.folder(name, seed)
    config = lasting(setting, cost, 60 * args.minutes, args.warm_share, seed)
    if not (folder / HOW).exists():
        train_one(config, place, folder)
    elif (had := json.loads((folder / HOW).read_text())["images"]) != config.total_images:
        raise ValueError(
            f"{folder} was trained on {had} images, not {config.total_images}: give another --out, "
            "or the --minutes and --warm-share of before"
        )
    measure_one(place, name, seed)


def _rows(args: argparse.Namespace) -> list[str]:
    return [name for name in TABLES[args.table] if args.rows is None or name in args.rows]


def write_table(args: argparse.Namespace, place: Place) -> None:
    """All that has been measured, in Markdown and as pictures of the same captions."""
    heads = ["", "images", "minutes", *METRICS.values()]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    last: Results | None = None
    shown: dict[str, Path] = {}
    for name in _rows(args):
        found = []
        for seed in range(args.seeds):
            folder = place.folder(name, seed)
            if (file := place.evaluation(name, seed) / "results.json").exists():
                found.append((json.loads((folder / HOW).read_text()), json.loads(file.read_text())))
        if not found:
            continue
        shown[name] = place.evaluation(name, 0)
        last = found[-1][1]
        cells = [f"{mean(how['images'] for how, _ in found):,.0f}"]
        cells.append(f"{mean(how['seconds'] for how, _ in found) / 60:.1f}")
        for metric in METRICS:
            cells.append(" · ".join(_shown(metric, r["metrics"]) for _, r in found))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    assert last is not None, "nothing was measured yet"
    for kind in ("real", "chance"):
        cells = [_shown(metric, last["reference"][kind]) for metric in METRICS]
        lines.append(f"| {kind} | | | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (place.out / f"{args.table}.md").write_text(text)
    _draw(place, shown, args.table)
    print(text)


def _shown(metric: str, values: Mapping[str, float]) -> str:
    value = values.get(metric)
    if value is None:
        return "–"
    return f"{1e3 * value:.0f}" if metric == "kid" else f"{value:.3g}"


def _draw(place: Place, folders: Mapping[str, Path], table: str) -> None:
    """Captions never trained, a row each: a column a setting, the real picture last."""
    everything = read_heldout(place.heldout)
    assert everything.gallery is not None
    works = {w.caption: w for w in everything.gallery.works if w.split == "combination"}
    drawn = [drawn_in(folder) for folder in folders.values()]
    captions = [c for c in works if all(c in pictures for pictures in drawn)]
    if not captions:  # classes are all trained
        return
    captions = captions[:: max(len(captions) // NUM_ROWS, 1)][:NUM_ROWS]
    rows = [
        (c, [*(Image.open(found[c]) for found in drawn), Image.open(works[c].picture)])
        for c in captions
    ]
    title = f"the {len(folders)} rows of {table}.md from left to right, then the real picture"
    caption_grid(rows, title=title, cell_px=CELL_PX).save(place.out / f"{table}.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Do what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=TABLES, default="critics")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="some rows of it")
    parser.add_argument("--shards", type=Path, required=True, help="folder such as shards/032")
    parser.add_argument("--heldout", type=Path, required=True, help="folder with a gallery.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.0, help="of one core, a training")
    parser.add_argument("--warm-share", type=float, default=0.4, help="of that, in a warm start")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    place = Place(args.shards, args.heldout, args.out)
    if args.one:
        do_one(args, place)
        return
    run_all(args, place)
    write_table(args, place)


if __name__ == "__main__":
    main()
