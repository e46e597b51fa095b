"""The training process: `python -m gigagan.training`, or torchrun of the same module."""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from data.shards.loader import CorruptShardsError, ShardLoader
from gigagan.common.exits import FAILED, HARDWARE, PREEMPTED, STOPPED, tell
from gigagan.common.files import write_aside
from gigagan.config import (
    GeneratorConfig,
    StyleTConfig,
    TextConfig,
    TrainStage,
    UpsamplerConfig,
    with_class_names,
)
from gigagan.evaluation.heldout import Heldout, read_heldout
from gigagan.models import pretrained
from gigagan.models.classes import ClassNumbers, Nothing
from gigagan.models.encoders import TextEncoder
from gigagan.models.text import Reader, TextBranch
from gigagan.training import acceleration, loop, step
from gigagan.training.augment import Augment
from gigagan.training.auxiliary import Auxiliary, auxiliary_losses
from gigagan.training.captions import CaptionFeatures
from gigagan.training.checkpoint import WriteError
from gigagan.training.distributed.world import World, join
from gigagan.training.guard import Divergence
from gigagan.training.logs import Log
from gigagan.training.tasks import task_of

CENTRE_CAPTIONS = 10_000
WARM_SAMPLES = 500_000
"""Captions of larger sets are not even counted before the first step."""
TEXT_FEATURES = "text-features.pt"
_EXPECTED = (ValueError, OSError, Divergence, WriteError, CorruptShardsError)
"""What has a message of its own; other errors come with their traceback."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m gigagan.training",
        description="Train the base generator or the upsampler. The same command goes on from the "
        "last checkpoint of its run folder.",
    )
    p.add_argument("--config", type=Path, required=True, help="JSON of a training section")
    p.add_argument("--run-dir", type=Path, required=True, help="where everything is written")
    p.add_argument(
        "--shards", required=True, help="folder of shards and index.json, or a URL such as s3://…"
    )
    p.add_argument("--heldout", type=Path, help="COCO captions file or folder, for the probes")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit status."""
    args = parser().parse_args(argv)
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # Kubernetes; Slurm's --signal
        signal.signal(number, lambda *_: stop.set())
    world: World | None = None
    try:
        config = read_config(args.config)
        world = join(config.system.collective_timeout_s)
        run(config, args.run_dir, args.shards, args.heldout, world, is_asked_to_stop=stop.is_set)
        world.leave()
    except loop.Preempted as preempted:
        print(f"{preempted}; the same command goes on from there", flush=True)
        tell(STOPPED, "preempted")
        return PREEMPTED
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("GIGAGAN_DEBUG"):
            raise
        if not isinstance(error, _EXPECTED):
            traceback.print_exc()
        rank = f"rank {world.rank}: " if world is not None and world.size > 1 else ""
        print(f"error: {rank}{error}", file=sys.stderr, flush=True)
        if world is not None and world.size > 1:
            sys.stdout.flush()
            os._exit(FAILED)  # taking leave of a group waits for those who wait for us
        return FAILED
    return 0


def read_config(path: Path) -> TrainStage:
    """A training section from JSON; its `kind` says which.

    Raises:
        ValueError: unreadable, or with unknown keys or values out of bounds.
    """
    try:
        adapter: TypeAdapter[TrainStage] = TypeAdapter(TrainStage)
        return adapter.validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: {error}") from error


def run(
    config: TrainStage,
    run_dir: Path,
    shards: Path | str,
    heldout_path: Path | None,
    world: World,
    *,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Put the parts together, train, and write `result.json`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    log = Log(run_dir, config.total_images, is_main=world.is_main)
    hardware = f"{world.size} × {world.device.type}, {torch.get_num_threads()} threads"
    log.say(f"{config.kind} on {hardware}")
    tell(HARDWARE, hardware, log.say)
    acceleration.prepare(config.system, world.device)
    loader = _loader(config, shards, world)
    if config.network.classes is not None:
        config = with_class_names(config, loader.classes)
    heldout = read_heldout(heldout_path) if heldout_path else None

    # Networks: the same initial weights on every rank.
    task = task_of(config)
    encoder = task.encoder(world.device)
    torch.manual_seed(config.seed)
    generator = task.generator().to(world.device)
    discriminator = task.discriminator().to(world.device)
    log.say(f"{_millions(generator)} M parameters in G, {_millions(discriminator)} M in D")

    # Frozen models, and what networks read.
    captions = _reader(config.network, world)
    if isinstance(captions, CaptionFeatures):
        _warm(captions, loader, heldout, run_dir / TEXT_FEATURES, world, log)
        _centre(captions, loader, generator, discriminator)
    elif heldout is not None:
        heldout = _asking(heldout, captions, log)
    if isinstance(captions, ClassNumbers):
        captions(config.prompts)  # one of no class shall not wait for the first picture
    auxiliary: Auxiliary | None = None
    if task.has_auxiliary:
        auxiliary = auxiliary_losses(config, loader, captions, run_dir, world, log)
    players = step.Players(
        generator,
        discriminator,
        task.prediction_weights(discriminator),
        auxiliary,
        task.perceptual(world.device),
        Augment(config.augment),
        encoder,
        world,
    )
    probe = task.probe(captions, loader, heldout)
    result = loop.train(
        config,
        players,
        captions,
        loader,
        probe,
        run_dir,
        log,
        world,
        is_asked_to_stop=is_asked_to_stop,
    )
    log.close()
    if world.is_main:
        _write_result(run_dir / "result.json", result)


def _loader(config: TrainStage, shards: Path | str, world: World) -> ShardLoader:
    """The training set.

    Raises:
        ValueError: its pictures have another size than the network's.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    loader = ShardLoader(
        shards,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        threads=acceleration.loader_threads(config.system, world.device, local_ranks=local_ranks),
        reads="caption" if config.network.classes is None else "label",
    )
    resolution = config.network.resolution
    if loader.resolution != resolution:
        raise ValueError(
            f"{shards} holds pictures of {loader.resolution} px, but the {config.kind} that the "
            f"settings describe draws {resolution} px: give the folder {resolution:03d} beside it "
            "(filter.resolutions says which are written), or another network"
        )
    return loader


def _write_result(path: Path, result: loop.Result) -> None:
    """The last probe's figures, for the stage that follows."""
    probes = {n: v for n, v in result.scalars.items() if n.startswith("probe/")}
    figures = {name.removeprefix("probe/"): value for name, value in probes.items()}
    if "images_per_second" in result.scalars:  # not after a resume at the very end
        figures["images_per_second"] = result.scalars["images_per_second"]
    figures["images_seen"] = float(result.images_seen)
    write_aside(path, json.dumps(figures, indent=2))


def _reader(network: GeneratorConfig | StyleTConfig | UpsamplerConfig, world: World) -> Reader:
    """What captions, or names of classes, become for these networks."""
    if network.text is not None:
        return CaptionFeatures(_text_encoder(network.text, world), world.device)
    if network.classes is None:
        return Nothing(world.device)
    return ClassNumbers(network.classes, world.device)


def _asking(heldout: Heldout, reader: Reader, log: Log) -> Heldout | None:
    """Held-out pictures for probes of a network that reads no captions."""
    if not isinstance(reader, ClassNumbers):
        return heldout.without_captions()
    if heldout.labels is None:
        log.say("the held-out pictures have no labels: probes do without them")
        return None
    return heldout.by_class(reader.names)


def _text_encoder(config: TextConfig, world: World) -> TextEncoder:
    """The frozen text encoder, of the widths that the networks were built for."""
    encoder = pretrained.text_encoder(config.encoder, world.device)
    for field, width in {
        "encoder_width": encoder.width,
        "pooled_width": encoder.pooled_width,
    }.items():
        if getattr(config, field) != width:
            raise ValueError(
                f"text.{field} = {getattr(config, field)} does not match the encoder "
                f"{config.encoder}: it gives {width}"
            )
    return encoder


def _warm(
    captions: CaptionFeatures,
    loader: ShardLoader,
    heldout: Heldout | None,
    path: Path,
    world: World,
    log: Log,
) -> None:
    """A small set's captions are encoded before the first step, once for all ranks and attempts."""
    known = loader.captions(limit=WARM_SAMPLES)
    if known is None:
        return
    known += heldout.captions if heldout else []
    if len(set(known)) > captions.max_captions:
        return

    def progress(done: int, total: int) -> None:
        if done == total or done % 1024 < 64:
            log.say(f"text features: {done:,} of {total:,} captions")

    captions.load(path)
    if world.is_main and captions.warm(known, progress):
        captions.save(path)
    world.barrier()
    captions.load(path)


def _centre(captions: CaptionFeatures, loader: ShardLoader, *networks: torch.nn.Module) -> None:
    """Tell the text branches that ask for it what the training captions have in common."""
    found = [m for network in networks for m in network.modules() if isinstance(m, TextBranch)]
    centred = [branch for branch in found if branch.is_centred]
    if centred:
        some = loader.captions_between(0, min(loader.num_samples, CENTRE_CAPTIONS))
        means = captions.means(some)
        for branch in centred:
            branch.centre(*means)


def _millions(network: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f}"


if __name__ == "__main__":
    sys.exit(main())
