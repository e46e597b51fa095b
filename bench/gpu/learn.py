"""Part `learn`: a base on all emoji in the minutes that are left, then an upsampler.

The real loop, config, checkpoints and probes' measure; only pictures come from memory. How long
each phase of the warm start lasts follows from a few measured steps, so that the time is used.

Shape letters: N pictures, H W image, C colour.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter
from torch import nn

from bench.gpu import emoji
from bench.gpu.record import PACK, SIZE, Record, leave
from gigagan import losses
from gigagan.config import TrainBaseConfig, TrainStage
from gigagan.evaluation import enlarge, naming
from gigagan.evaluation.judges import fidelity
from gigagan.evaluation.report.results import caption_grid
from gigagan.models import snapshot
from gigagan.models.discriminator import Discriminator
from gigagan.models.generator import Generator
from gigagan.models.pixels import from_uint8, to_uint8
from gigagan.models.text import TextBranch
from gigagan.models.upsampler import Upsampler
from gigagan.training import acceleration, checkpoint, loop, step
from gigagan.training.augment import Augment
from gigagan.training.captions import CaptionFeatures
from gigagan.training.distributed.world import World
from gigagan.training.logs import Log
from gigagan.training.probes import Look, Probe

TICK_S = 30.0
"""Seconds between two looks."""
BASE_SHARE = 0.68
"""Of the time that is left after the preparation; the rest is the upsampler's."""
MARGIN = 0.85
"""Of its time a training is planned to use: speed may fall."""
WARM_SHARE = 0.6
"""Of a training's time that is regression alone."""
ASKED, DRAWN = 256, 64
TRIAL_STEPS = 40

FULL: dict[str, Any] = {
    "base": {
        "batch_size": 256,
        "channels": [320, 256, 128, 64, 32],
        "d_channels": [32, 64, 128, 192, 192],
        "lr": 0.005,
    },
    "upsampler": {"batch_size": 64, "px": 256},
}
SMALL: dict[str, Any] = {
    "base": {
        "batch_size": 16,
        "channels": [32, 16, 16, 8, 8],
        "d_channels": [8, 8, 16, 16, 16],
        "lr": 0.005,
    },
    "upsampler": {"batch_size": 2, "px": 256},
}


CRITIC: dict[str, Any] = {
    "loss": {"adversarial": "logistic", "matching_images": "half"},
    "optimizer": {
        "lr": 2.5e-3,
        "generator_rate": 0.8,
        "discriminator_every": 2,
        "r1_weight": 1.0,
        "weight_decay": 1e-5,
        "attention_weight_decay": 0.01,
    },
    "augment": {"diffaugment": ()},
}
"""GigaGAN's discriminator in place of the preset's heads, whose encoder is not packed."""


def base_config(size: dict[str, Any], preset: dict[str, Any]) -> dict[str, Any]:
    """The preset's base at 64 px and the batch of a GPU, with GigaGAN's discriminator."""
    kernels = [1] * 5
    config = json.loads(json.dumps(preset))
    config["batch_size"] = size["batch_size"]
    config["generator"] |= {
        "channels": size["channels"],
        "kernels": kernels,
        "blocks": kernels,
        "attention": [0] * 5,
    }
    config["discriminator"] = {
        "channels": size["d_channels"],
        "blocks": [1, 1, 1, 0, 0],
        "attention": [0] * 5,
        "levels": 3,
        "halving": "mean",
    }
    for section, values in CRITIC.items():
        config[section] |= values
    config["warm_start"]["lr"] = size["lr"]
    return config


def upsampler_config(size: dict[str, Any], preset: dict[str, Any]) -> dict[str, Any]:
    """The preset's upsampler from 64 to 256 px."""
    config = json.loads(json.dumps(preset))
    config["batch_size"] = size["batch_size"]
    config["upsampler"]["input_resolution"] = size["px"] // 4
    config["discriminator"] |= {
        "channels": [8, *config["discriminator"]["channels"]],
        "blocks": [0] * 7,
        "attention": [0] * 7,
    }
    return config


def planned(config: dict[str, Any], *, images: int, warm: int, rate: float) -> TrainStage:
    """The same for a run of so many images; looks come every `TICK_S` at `rate` images/s."""
    batch = config["batch_size"]
    steps = lambda n: max(round(n / batch), 1) * batch  # noqa: E731
    tick = steps(rate * TICK_S)
    config = json.loads(json.dumps(config))
    config |= {
        "total_images": steps(images),
        "checkpoint_images": 1 << 40,
        "sample_images": tick,
        "snapshot_images": tick,
        "log_images": max(steps(rate * 5), 20 * batch),
        "precision": "auto",
    }
    later = max(images - warm, 0)
    config["warm_start"] |= {
        "images": steps(warm),
        "head_start_images": later // 10,
        "ramp_images": max(later // 10, 1),
    }
    config["optimizer"] |= {
        "warmup_images": min(50 * batch, images // 10),
        "cooldown_images": images // 10,
        "ema_half_life_images": max(images // 30, batch),
    }
    adapter: TypeAdapter[TrainStage] = TypeAdapter(TrainStage)
    return adapter.validate_python(config)


@dataclass
class Room:
    """What both trainings share."""

    record: Record
    pack: Path
    out: Path
    device: torch.device
    captions: CaptionFeatures
    is_small: bool
    ends: float = field(default=0.0)
    """By `time.monotonic`, when the training in progress must end."""


class BaseLook:
    """R@1 by 16×16 px of never-trained combinations and trained looks, and a sheet."""

    def __init__(self, room: Room, made: emoji.Emoji) -> None:
        self.room, self.emoji = room, made
        self.gallery = made.gallery()
        self.pooled_GP = made.pooled(naming.PX)
        count = 32 if room.is_small else ASKED
        self.asked = {split: made.of(split, count) for split in ("combination", "trained")}

    @torch.no_grad()
    def look(self, generator: nn.Module) -> Look:
        """Draw and measure; one line of the results and one picture."""
        assert isinstance(generator, Generator)
        scalars: dict[str, float] = {}
        for split, places in self.asked.items():
            drawn_NHWC = self._draw(generator, places)
            ranks = naming.pixel_ranks(
                self.gallery, places, naming.pooled(drawn_NHWC), self.pooled_GP
            )
            scalars[f"probe/naming_r1_{split}"] = float((ranks.rank_N <= 1).mean())
            scalars["probe/naming_chance"] = float((1 / ranks.count_N).mean())
            if split == "combination":
                sheet = self._sheet(drawn_NHWC, places)
        self.room.record.picture("base", sheet)
        self.room.record.line("look", kind="base", **scalars)
        return Look(sheet, scalars)

    def _draw(self, generator: Generator, places: list[int]) -> np.ndarray:
        random = torch.Generator().manual_seed(1)
        parts = []
        for start in range(0, len(places), DRAWN):
            rows = places[start : start + DRAWN]
            z = torch.randn(len(rows), generator.config.latent_dim, generator=random)
            text = self.room.captions([self.emoji.looks[i].caption for i in rows])
            parts.append(to_uint8(generator(z.to(self.room.device), text)[0]))
        return np.concatenate(parts)

    def _sheet(self, drawn_NHWC: np.ndarray, places: list[int]) -> Image.Image:
        count = min(48, len(places))
        real_NHWC = self.emoji.compose(places[:count]).permute(0, 2, 3, 1).cpu().numpy()
        rows = [
            (self.emoji.looks[i].caption, [Image.fromarray(drawn), Image.fromarray(real)])
            for i, drawn, real in zip(places, drawn_NHWC, real_NHWC, strict=False)
        ]
        title = "combinations never trained: generated, real"
        return caption_grid(rows, title=title, cell_px=96, columns=6)


class UpsamplerLook:
    """PSNR beside the three plain enlargements, of things it has never seen, and a sheet."""

    def __init__(self, room: Room, made: emoji.Emoji) -> None:
        self.room, self.emoji = room, made
        count = 8 if room.is_small else 64
        self.places = made.of("unseen", count) or made.of("combination", count)
        self.real_NHWC = made.compose(self.places).permute(0, 2, 3, 1).cpu().numpy()

    @torch.no_grad()
    def look(self, generator: nn.Module) -> Look:
        """Enlarge and measure; one line of the results and one picture."""
        assert isinstance(generator, Upsampler)
        side = generator.config.input_resolution
        lanczos = Image.Resampling.LANCZOS
        small = [Image.fromarray(x).resize((side, side), lanczos) for x in self.real_NHWC]
        made_NHWC = self._enlarge(generator, small)
        scalars = {"probe/psnr": float(fidelity.psnr(made_NHWC, self.real_NHWC).mean())}
        plain = {how: enlarge.plainly(small, self.emoji.px, how) for how in enlarge.PLAIN}
        for how, pictures_NHWC in plain.items():
            found = fidelity.psnr(pictures_NHWC, self.real_NHWC).mean()
            scalars[f"probe/psnr_{how}"] = float(found)
        rows = [
            (self.emoji.looks[i].caption, [Image.fromarray(x) for x in row])
            for i, *row in zip(
                self.places[:8], plain["bicubic"], made_NHWC, self.real_NHWC, strict=False
            )
        ]
        title = "things never trained: bicubic, ours, original"
        sheet = caption_grid(rows, title=title, cell_px=self.emoji.px, columns=2)
        self.room.record.picture("upsampler", sheet)
        self.room.record.line("look", kind="upsampler", **scalars)
        return Look(sheet, scalars)

    def _enlarge(self, generator: Upsampler, small: list[Image.Image]) -> np.ndarray:
        random = torch.Generator().manual_seed(4)
        parts = []
        for start in range(0, len(small), 8):
            rows = small[start : start + 8]
            pixels = np.stack([np.asarray(picture) for picture in rows])
            small_NCHW = from_uint8(torch.from_numpy(pixels).permute(0, 3, 1, 2))
            noise_NCHW = torch.randn(small_NCHW.shape, generator=random)
            z = torch.randn(len(rows), generator.config.latent_dim, generator=random)
            text = self.room.captions(
                [self.emoji.looks[i].caption for i in self.places[start : start + 8]]
            )
            inputs = (x.to(self.room.device) for x in (small_NCHW, noise_NCHW, z))
            parts.append(to_uint8(generator(*inputs, text)[0]))
        return np.concatenate(parts)


class NoLook:
    """Looks at nothing, for trials of speed."""

    def look(self, generator: nn.Module) -> Look:
        """An empty picture and no figures."""
        return Look(Image.new("RGB", (8, 8)), {})


def train(
    room: Room,
    config: TrainStage,
    made: emoji.Emoji,
    probe: Probe,
    run_dir: Path,
    *,
    loader: emoji.EmojiLoader | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> loop.Result:
    """As `gigagan.training` does it, with pictures that lie on the device.

    Raises:
        Preempted: its time is over, or `stop` says so.
    """
    acceleration.prepare(config.system, room.device)
    torch.manual_seed(config.seed)
    is_base = isinstance(config, TrainBaseConfig)
    generator = Generator(config.generator) if is_base else Upsampler(config.upsampler)
    networks = generator.to(room.device), Discriminator(config.discriminator).to(room.device)
    loader = loader or emoji.EmojiLoader(made, batch_size=config.batch_size)
    some = loader.captions_between(0, min(len(loader.trained), 256 if room.is_small else 4_000))
    for network in networks:
        for branch in (m for m in network.modules() if isinstance(m, TextBranch)):
            if branch.is_centred:
                branch.centre(*room.captions.means(some))
    weights = losses.prediction_weights(
        config.discriminator.pairs, config.loss.level_weights, intermediate=config.loss.intermediate
    )
    players = step.Players(*networks, weights, None, None, Augment(config.augment))
    run_dir.mkdir(parents=True, exist_ok=True)
    log = Log(run_dir, config.total_images)
    return loop.train(
        config,
        players,
        room.captions,
        loader,
        probe,
        run_dir,
        log,
        World(device=room.device),
        is_asked_to_stop=lambda: stop() or time.monotonic() > room.ends,
    )


def speed(room: Room, config: dict[str, Any], made: emoji.Emoji, *, is_warm: bool) -> float:
    """Images a second of one phase: the second half of a trial, as its log says it."""
    steps = 6 if room.is_small else TRIAL_STEPS
    images = steps * config["batch_size"]
    trial = planned(config, images=images, warm=images if is_warm else 0, rate=1.0)
    changed = trial.model_dump() | {"log_images": images // 2, "sample_images": 1 << 40}
    if not is_warm:  # from the first step, as it is after the warm start
        changed["warm_start"] |= {"images": config["batch_size"]}
    run_dir = room.out / "trial" / f"{trial.kind}-{is_warm}"
    adapter: TypeAdapter[TrainStage] = TypeAdapter(TrainStage)
    train(room, adapter.validate_python(changed), made, NoLook(), run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return float([x["images_per_second"] for x in lines if "images_per_second" in x][-1])


def one_training(
    room: Room, kind: str, config: dict[str, Any], made: emoji.Emoji, seconds: float
) -> dict[str, object]:
    """Trials, a plan, the training, and the snapshot in half precision."""
    began = time.monotonic()
    room.ends = float("inf")  # trials are short
    all_warm = kind == "upsampler"  # as the presets have it
    warm_rate = speed(room, config, made, is_warm=True)
    later_rate = warm_rate if all_warm else speed(room, config, made, is_warm=False)
    room.ends = began + seconds
    left = MARGIN * max(room.ends - time.monotonic(), 1.0)
    share = 1.0 if all_warm else WARM_SHARE
    warm = int(share * left * warm_rate)
    images = warm + int((1 - share) * left * later_rate)
    room.record.line(
        "plan",
        kind=kind,
        warm_images_per_second=round(warm_rate, 1),
        images_per_second=round(later_rate, 1),
        images=images,
        warm_images=warm,
    )
    stage = planned(config, images=images, warm=warm, rate=warm_rate)
    probe = (BaseLook if kind == "base" else UpsamplerLook)(room, made)
    run_dir = room.out / kind
    is_whole = True
    try:
        train(room, stage, made, probe, run_dir)
    except loop.Preempted:  # what there is by now: the checkpoint that it has just written
        is_whole, room.ends = False, float("inf")
        newest = checkpoint.latest(run_dir / "checkpoints")
        assert newest is not None
        seen = json.loads(newest.with_suffix(".json").read_text())["images_seen"]
        train(room, stage.model_copy(update={"total_images": seen}), made, probe, run_dir)
    network, about = snapshot.load(run_dir / "snapshot.safetensors")
    about |= {"trained_on": "the packed emoji", "whole": is_whole}
    snapshot.save(room.record.out / f"{kind}.safetensors", network, about, dtype=torch.bfloat16)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    return {"images": about["images_seen"], "whole": is_whole, "parameters_millions": millions}


def main() -> int:
    """Prepare, train the base, and the upsampler in what is left."""
    record = Record.of_environment("learn")
    pack = Path(os.environ[PACK])
    is_small = os.environ[SIZE] == "small"
    size = SMALL if is_small else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    presets = json.loads((pack / "pack.json").read_text())["presets"]
    encoder = emoji.text_encoder(pack, device)
    captions = CaptionFeatures(encoder, device, max_captions=1 << 20, max_mb=16_384)
    room = Room(record, pack, Path(tempfile.mkdtemp(prefix="learn-")), device, captions, is_small)
    base = emoji.load(pack, 64, device)
    wanted = sorted({look.caption for look in base.looks}) if not is_small else []
    record.line("prepared", pictures=len(base.looks), captions=captions.warm(wanted))

    def of(kind: str, share: float) -> dict[str, object]:
        made = base if kind == "base" else emoji.load(pack, size["upsampler"]["px"], device)
        make = base_config if kind == "base" else upsampler_config
        config = make(size[kind], presets[f"train_{kind}"])
        return one_training(room, kind, config, made, share * (record.left - 5))

    shares = {"base": BASE_SHARE, "upsampler": 1.0}
    done = [
        record.attempt(kind, lambda k=kind, s=share: of(k, s), needs=20)
        for kind, share in shares.items()
    ]
    shutil.rmtree(room.out, ignore_errors=True)
    return 0 if all(done) else 1


if __name__ == "__main__":
    leave(main())
