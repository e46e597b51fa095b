"""Trainings that a study compares, as a queue that any free hour goes on with.

A training has a name, settings and the numbers of images at which it is measured. What was measured
of it is a small JSON file among the study's results, which belong into the repository: a training
that has one is not done again, on no machine. One that was stopped goes on from its checkpoint,
and any number of processes may work on one queue, for each claims a training by a lock.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from gigagan.common.exits import PREEMPTED
from gigagan.config import EvaluateConfig, TrainBaseConfig
from gigagan.evaluation.report.results import write_json
from gigagan.training import __main__ as training
from gigagan.training import loop
from gigagan.training.distributed.world import join
from gigagan.training.relay import LINES, TIME
from studies.learning import Snapshot, evaluated

Record = dict[str, Any]
"""What a file of results holds."""
BATCH = 16
TRIAL_STEPS, SKIPPED_STEPS = 40, 8
"""Of a trial of one phase; the first ones are not counted."""
_NEVER = 10**9


@dataclasses.dataclass(frozen=True)
class Training:
    """One training of a study."""

    name: str
    """Of its folder and of its file of results."""
    about: Mapping[str, Any]
    """What the study calls it: row, seed, width, …"""
    config: TrainBaseConfig
    """Its settings; their `total_images` do not count."""
    readings: Mapping[str, int]
    """What a measurement is called, and after how many images it is made."""
    shards: Path | None = None
    """Pictures of its own; None: the study's."""
    measure: Callable[[Training, Place, str], Record] | None = None
    """What is measured of a reading's snapshot; None: what `judged` says."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a study reads and writes."""

    shards: Path
    """Training pictures, such as shards/032 of the stage filter."""
    heldout: Path
    """Held-out pictures of the stage download."""
    out: Path
    """Folders of trainings: checkpoints, snapshots, pictures; large, not for the repository."""
    results: Path
    """A small JSON file a training; for the repository."""

    def folder(self, name: str) -> Path:
        """Of one training."""
        return self.out / name

    def record(self, name: str) -> Path:
        """What was measured of it."""
        return self.results / f"{name}.json"

    def pictures(self, name: str, reading: str) -> Path:
        """What it drew then; beside all others', so that they share statistics."""
        return self.out / "evaluations" / f"{name}-{reading}"

    @property
    def aligner(self) -> Path | None:
        """The one that the filter fitted, if these shards are a filter's."""
        file = self.shards.parent.parent / "aligner.safetensors"
        return file if file.exists() else None


def judged(**changes: Any) -> EvaluateConfig:
    """How snapshots are measured: 256 pictures, by distances, names and agreement; no looks."""
    plain: dict[str, Any] = {"sweep": (), "speed_batches": (), "neighbours": 0}
    plain |= {"num_images": 256, "naming_splits": (), "resamples": 100}
    plain |= {"diversity_prompts": 0, "dissect_captions": 0, **changes}
    return EvaluateConfig.model_validate(plain)


def fitted(config: TrainBaseConfig, **changes: Any) -> TrainBaseConfig:
    """Settings as a study trains: one thread, no looks on the way, a checkpoint now and then."""
    tree = config.model_dump(mode="json")
    tree |= {"num_probe_captions": 0, "sample_images": _NEVER, "checkpoint_images": 2_000}
    tree |= {"system": {"loader_threads": 1}, "batch_size": BATCH, **changes}
    return TrainBaseConfig.model_validate(tree)


# ---- one training ------------------------------------------------------------------------------


def train(one: Training, place: Place, is_asked_to_stop: Callable[[], bool]) -> None:
    """Train to each reading and measure there, then write the record; goes on where it was.

    Raises:
        loop.Preempted: asked to stop; the same call goes on.
    """
    folder = place.folder(one.name)
    folder.mkdir(parents=True, exist_ok=True)
    _lend_text_features(place.out, folder)
    clock, world = _Clock(folder / "cpu.json"), join()
    found: dict[str, Any] = {}
    for reading, images in sorted(one.readings.items(), key=lambda pair: pair[1]):
        snapshot = folder / f"{reading}.safetensors"
        if not snapshot.exists():
            config = fitted(one.config, total_images=images)
            with clock:
                training.run(
                    config,
                    folder,
                    one.shards or place.shards,
                    None,
                    world,
                    is_asked_to_stop=is_asked_to_stop,
                )
            clock.note(reading)
            _keep_text_features(place.out, folder)
            (folder / "snapshot.safetensors").rename(snapshot)
        found[reading] = {
            "images": images,
            **clock.noted[reading],
            **(one.measure or _measured)(one, place, reading),
        }
    place.results.mkdir(parents=True, exist_ok=True)
    write_json(place.record(one.name), rounded(_record(one, place, found)))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _measured(one: Training, place: Place, reading: str) -> Record:
    torch.set_grad_enabled(False)
    try:
        results = evaluated(
            Snapshot(place.folder(one.name) / f"{reading}.safetensors"),
            place.heldout,
            place.pictures(one.name, reading),
            judged(),
            aligner=place.aligner,
        )
    finally:
        torch.set_grad_enabled(True)
    parts = ("metrics", "intervals", "reference")
    return {part: results[part] for part in parts}


def rounded(tree: Any) -> Any:
    """Floats to five digits: a record is for people, too."""
    if isinstance(tree, dict):
        return {name: rounded(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [rounded(value) for value in tree]
    return float(f"{tree:.5g}") if isinstance(tree, float) else tree


def _record(one: Training, place: Place, found: Mapping[str, Any]) -> Record:
    return {
        "about": dict(one.about),
        "readings": found,
        "settings": one.config.model_dump(mode="json", exclude_defaults=True),
        "data": data_of(one.shards or place.shards),
        "parameters": _parameters(place.folder(one.name)),
        "milliseconds": _pace(place.folder(one.name)),
        **circumstances(),
    }


def data_of(shards: Path) -> Record:
    """Which pictures were trained on: their number, and one hash over them and their captions.

    Shards themselves differ from download to download, for they say when it was.
    """
    tables = [
        pq.read_table(file, columns=["caption", "sha256"]) for file in shards.glob("*.parquet")
    ]
    rows = sorted(
        f"{row['sha256']} {row['caption']}\n" for table in tables for row in table.to_pylist()
    )
    resolution = json.loads((shards / "index.json").read_text())["resolution"]
    digest = sha256("".join(rows).encode()).hexdigest()
    return {"pictures": len(rows), "resolution": resolution, "pictures_sha256": digest}


def circumstances() -> Record:
    """Versions and hardware that stand beside every figure."""
    packages = ("gigagan-pipeline", "torch", "numpy")
    return {
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "hardware": {"processor": _processor(), "threads": torch.get_num_threads(), **_gpu()},
    }


def _processor() -> str:
    """Its model, and whether it multiplies bf16 itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    named = {name.strip(): value.strip() for name, value in pairs}
    flags = set(named.get("flags", "").split())
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if kind in flags]
    return f"{named.get('model name', platform.machine())} ({', '.join(kinds)})"


def _gpu() -> dict[str, str]:
    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _parameters(folder: Path) -> int:
    """Of the generator."""
    with safe_open(next(folder.glob("*.safetensors")), framework="pt") as file:
        shapes = (file.get_slice(name).get_shape() for name in file.keys())  # noqa: SIM118
        return sum(torch.Size(shape).numel() for shape in shapes)


def _pace(folder: Path) -> float | None:
    """Milliseconds of processor time an image, R1 and all: the median between lines of the log.

    None for a training too short to have two lines. Measuring, and a new process, fall between
    lines as well, but between few.
    """
    lines = map(json.loads, (folder / LINES).read_text().splitlines())
    at = [(line["images"], line["cpu_seconds"]) for line in lines if "cpu_seconds" in line]
    pairs = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(at)]
    each = [1e3 * cpu / images for images, cpu in pairs if images and cpu > 0]
    return statistics.median(each) if each else None


def _peak_mb() -> float:
    """Most memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class _Clock:
    """Processor time of a training over all attempts, up to their last checkpoints."""

    def __init__(self, file: Path) -> None:
        self.file = file
        state: Record = {"seconds": 0.0, "noted": {}}
        if file.exists():
            state = json.loads(file.read_text())
        self.seconds: float = state["seconds"]
        self.noted: dict[str, dict[str, float]] = state["noted"]

    def __enter__(self) -> None:
        self._started = time.process_time()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.process_time() - self._started
        self._write()

    def note(self, reading: str) -> None:
        """What it took until this reading; memory only of the first, before judges came in."""
        self.noted[reading] = {"cpu_seconds": round(self.seconds, 1)}
        if len(self.noted) == 1:
            self.noted[reading]["peak_mb"] = round(_peak_mb())
        self._write()

    def _write(self) -> None:
        write_json(self.file, {"seconds": self.seconds, "noted": self.noted})


def _lend_text_features(out: Path, folder: Path) -> None:
    """Captions are encoded once a study, not once a training."""
    common, own = out / training.TEXT_FEATURES, folder / training.TEXT_FEATURES
    if common.exists() and not own.exists():
        os.link(common, own)


def _keep_text_features(out: Path, folder: Path) -> None:
    common, own = out / training.TEXT_FEATURES, folder / training.TEXT_FEATURES
    if own.exists() and not common.exists():
        with contextlib.suppress(FileExistsError):
            os.link(own, common)


# ---- what an image costs -----------------------------------------------------------------------


def milliseconds(config: TrainBaseConfig, place: Place) -> float:
    """Time that an image takes on this core, or GPU, R1 and all, by a short training.

    By the lines of its log, without its first steps; captions are encoded before.
    """
    folder = place.out / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _lend_text_features(place.out, folder)
    B, every = BATCH, config.optimizer.r1_every
    images = B * (SKIPPED_STEPS + TRIAL_STEPS)
    config = fitted(config, total_images=images, checkpoint_images=_NEVER, log_images=8 * B)
    world = join()
    training.run(config, folder, place.shards, None, world)
    _keep_text_features(place.out, folder)
    lines = [json.loads(line) for line in (folder / LINES).read_text().splitlines()]
    clock = "cpu_seconds" if world.device.type == "cpu" else TIME  # a GPU works while we wait
    at = {line["images"]: line[clock] for line in lines if "cpu_seconds" in line}
    first, last = B * SKIPPED_STEPS, B * (SKIPPED_STEPS + TRIAL_STEPS // every * every)
    return 1e3 * (at[last] - at[first]) / (last - first)


# ---- the queue ---------------------------------------------------------------------------------


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this training is ours until the end of the block, and nobody else's."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def work(
    trainings: Sequence[Training],
    place: Place,
    command: Sequence[str],
    *,
    cores: Sequence[int],
    minutes: float | None,
) -> bool:
    """Do what has no record, one training a core at a time; whether none is left undone.

    `command` with `--one NAME CORE SECONDS` behind it is to do one.
    After `minutes` what runs writes a checkpoint and ends.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes

    def on(core: int) -> None:
        for one in trainings:
            with claimed(place.folder(one.name)) as is_ours:
                if not is_ours or place.record(one.name).exists():
                    continue
                left = _NEVER if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    return
                print(f"{one.name}: core {core}", flush=True)
                started = time.monotonic()
                _one(command, one, place, core, left)
                print(f"{one.name}: {(time.monotonic() - started) / 60:.1f} min", flush=True)

    with concurrent.futures.ThreadPoolExecutor(len(cores)) as pool:
        list(pool.map(on, cores))
    return all(place.record(one.name).exists() for one in trainings)


def _one(command: Sequence[str], one: Training, place: Place, core: int, seconds: float) -> None:
    """A process of its own, so that its memory is its own."""
    arguments = [sys.executable, "-m", *command, "--one", one.name, str(core), f"{seconds:.0f}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GIGAGAN_CORES": "off"}
    path = place.folder(one.name) / "log.txt"
    with path.open("a") as log:
        done = subprocess.run(arguments, env=environment, stdout=log, stderr=log)
    if done.returncode not in (0, PREEMPTED):
        raise RuntimeError(f"{one.name}: status {done.returncode}, {path} says why")


def do_one(trainings: Sequence[Training], place: Place, name: str, core: int, seconds: int) -> int:
    """What a process of `work` does; returns its exit status."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    ends = time.monotonic() + seconds
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    one = next(one for one in trainings if one.name == name)
    try:
        train(one, place, lambda: bool(asked) or time.monotonic() > ends)
    except loop.Preempted as preempted:
        print(preempted)
        return PREEMPTED
    return 0


def records(results: Path) -> list[Record]:
    """All that was measured, by name."""
    return [json.loads(path.read_text()) for path in sorted(results.glob("*-seed-*.json"))]


def status(trainings: Sequence[Training], place: Place) -> str:
    """A line a training: done, running, how far, or waiting."""
    lines = []
    for one in trainings:
        if place.record(one.name).exists():
            how = "done"
        else:
            with claimed(place.folder(one.name)) as is_ours:
                seen = _images_seen(place.folder(one.name))
                goal = max(one.readings.values())
                how = f"{seen:,} of {goal:,} images" if seen else "waiting"
                how += "" if is_ours else ", running"
        lines.append(f"{one.name:<36} {how}")
    return "\n".join(lines)


def _images_seen(folder: Path) -> int:
    file = folder / LINES
    lines = file.read_text().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["images"]) if lines else 0
