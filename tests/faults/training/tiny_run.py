"""The processes of the tests of whole runs: a tiny run, and faults that strike it.

`train ARGUMENTS` is `python -m gigagan.training` with an encoder that needs no weights, `torchrun
ARGUMENTS` two of them under torchrun, and `equal IMAGES PARTS` a step that is compared.
"""

import errno
import hashlib
import io
import json
import os
import resource
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch._dynamo  # an optimizer imports it when it is made, which takes seconds
import torch.nn.functional as F
from PIL import Image

from data.shards.loader import Batch, ShardLoader
from data.shards.manifest import SIDECAR, Entry, Index
from gigagan.config import AugmentConfig, HealthConfig, SystemConfig
from gigagan.losses import prediction_weights
from gigagan.models import pretrained
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import ImageEncoder, ImageFeatures
from gigagan.models.generator import Generator
from gigagan.models.vision import VisionAidedDiscriminator
from gigagan.training import __main__ as training_main
from gigagan.training import checkpoint, logs, loop, step
from gigagan.training.augment import Augment
from gigagan.training.auxiliary import Auxiliary
from gigagan.training.captions import CaptionFeatures, RecentCaptions
from gigagan.training.distributed.reducer import GradientReducer
from gigagan.training.distributed.world import World, join
from gigagan.training.inputs import draw, split
from gigagan.training.logs import Log
from gigagan.training.run import Run
from tests.gigagan.small import BASE, WordEncoder

SIDE, NUM_SAMPLES, PER_SHARD = 8, 13, 5
FAULTS, RANK = "TINY_FAULTS", "RANK"
LABELS = ("large", "small")
CONFIG = BASE.model_copy(
    update={
        "loss": BASE.loss.model_copy(update={"recent_captions": 7}),
        "optimizer": BASE.optimizer.model_copy(update={"warmup_images": 32}),
        "augment": AugmentConfig(
            diffaugment=("translation",), ada=True, ada_target=-0.9, ada_every=3, ada_images=40
        ),
        "health": HealthConfig(max_rollbacks=2, stall_seconds=100),
        "system": SystemConfig(collective_timeout_s=20),
        "precision": "fp32",
        "total_images": 56,
        "sample_images": 28,
        "keep_checkpoints": 2,
        "milestone_images": 24,
    }
)


def write_shards(folder: Path, num_samples: int = NUM_SAMPLES) -> Path:
    """Shards as the filter stage writes them: noise, and captions that differ in a word or two.

    The label is a picture's size, as its caption says it.
    """
    folder.mkdir(parents=True)
    entries = []
    for shard, start in enumerate(range(0, num_samples, PER_SHARD)):
        tar = folder / f"train-{shard:05d}.tar"
        places = range(start, min(start + PER_SHARD, num_samples))
        with tarfile.open(tar, "w") as archive:
            rows = [add_sample(archive, place) for place in places]
        sidecar = tar.with_suffix(".parquet")
        pq.write_table(pa.Table.from_pylist(rows, SIDECAR), sidecar)
        contents, told = tar.read_bytes(), sidecar.read_bytes()
        entries.append(
            Entry(
                name=tar.name,
                samples=len(rows),
                bytes=len(contents),
                sha256=digest(contents),
                index_bytes=len(told),
                index_sha256=digest(told),
            )
        )
    index = Index(
        resolution=SIDE,
        codec="png",
        samples=num_samples,
        classes=LABELS if num_samples else (),
        unlabelled=0,
        shards=tuple(entries),
    )
    (folder / "index.json").write_text(index.text())
    return folder


def add_sample(archive: tarfile.TarFile, place: int) -> dict:
    """Its row of the sidecar."""
    png, random = io.BytesIO(), np.random.default_rng(place)
    pixels = random.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(png, "PNG")
    key, picture = f"{place:08d}", png.getvalue()
    label = LABELS[place % 2 == 0]
    caption = f"a {label} thing number{place % 9}"
    offset = archive.offset + tarfile.BLOCKSIZE
    for kind, content in (("png", picture), ("txt", caption.encode())):
        member = tarfile.TarInfo(f"{key}.{kind}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    values = (key, caption, label, offset, len(picture), digest(picture))
    return dict(zip(SIDECAR.names, values, strict=True))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Faults


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(at, act, count=1):
    """Before G's update of the step at this position, the `count`-th time."""
    judge, met = Run.judge, []

    def fatal(self, name, *rest):
        if name == "g" and self.images_seen == at:
            met.append(at)
            if len(met) == count:
                act()
        return judge(self, name, *rest)

    Run.judge = fatal


def kill_in_step(at, count=1):
    at_step(at, die, count)


def leave_in_step(at):
    at_step(at, lambda: os._exit(3))


def terminate_in_step(at):
    at_step(at, lambda: os.kill(os.getpid(), signal.SIGTERM))


def lose_tar(at, path, share=None, keep_bytes=None):
    ShardLoader.AHEAD = 0  # so that the tar is lost before its pictures were read
    if share is not None:
        ShardLoader.CORRUPT_SHARE = share

    def lose():
        if keep_bytes is None:
            Path(path).unlink()
        else:
            os.truncate(path, keep_bytes)

    at_step(at, lose)


def kill_in_save(at):
    """With half of a checkpoint's bytes in its file."""
    save = torch.save

    def torn(state, file):
        if not Path(getattr(file, "name", "")).name.startswith(f"images-{at:010d}.pt"):
            return save(state, file)
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        die()

    torch.save = torn


def kill_at_rename(to, is_done=False):
    replace = Path.replace

    def fatal(self, target):
        if Path(target).name != to:
            return replace(self, target)
        if is_done:
            replace(self, target)
        die()

    Path.replace = fatal


def kill_in_line(at):
    """With half of a line of the log in its file."""
    scalars = Log.scalars

    def torn(self, images_seen, values):
        if images_seen == at:
            with (self.run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"images": images_seen, **values})[:20])
            die()
        scalars(self, images_seen, values)

    Log.scalars = torn


def small_files(at):
    """No file can grow beyond 20 kB while these checkpoints are written."""
    save = checkpoint.save

    def limited(directory, images_seen, *rest, **options):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if images_seen in at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            return save(directory, images_seen, *rest, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    checkpoint.save = limited


def full_disk(at):
    save = torch.save

    def refused(state, file):
        if Path(getattr(file, "name", "")).name in {f"images-{n:010d}.pt.partial" for n in at}:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(state, file)

    torch.save = refused


def not_a_number(start, stop):
    """The captions' features of these positions."""
    inputs = loop.draw

    def poisoned(*args, **options):
        found = inputs(*args, **options)
        if not start <= found.images_seen < stop:
            return found
        nan = torch.full_like(found.text.pooled_BD, float("nan"))
        return found._replace(text=found.text._replace(pooled_BD=nan))

    loop.draw = poisoned


# The same step on several ranks and on one


class Pixels(ImageEncoder):
    """A linear map of the picture, and the picture as its only stage."""

    name, width, stage_channels, image_size = "test:pixels", 11, (3,), None

    def forward(self, x_BCHW):
        small = F.avg_pool2d(x_BCHW, 8).flatten(1)
        matrix = torch.randn(small.shape[1], 11, generator=torch.Generator().manual_seed(5))
        return ImageFeatures(small @ matrix.to(small), [x_BCHW])


class Space:
    scale = 3.0

    def embed_images(self, pooled_BD):
        return F.normalize(pooled_BD)

    def embed_captions(self, captions, text):
        return F.normalize(text.pooled_BD)


def doubled(x):
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(doubled, x))
    return type(x)(map(doubled, x)) if isinstance(x, list | tuple) else x


def one_step(config, world, num_parts):
    """Gradients of D with its heads, of G, and metrics, as the loop accumulates them."""
    torch.manual_seed(3)
    g, d = Generator(config.generator).double(), Discriminator(config.discriminator).double()
    heads = VisionAidedDiscriminator((3,), text_width=config.discriminator.condition_width)
    auxiliary = Auxiliary(config.loss, Pixels(), Space(), heads.double(), world)
    with torch.no_grad():
        for p in [*g.parameters(), *d.parameters()]:
            p += 0.1 * torch.randn_like(p)  # nothing that starts at zero stays there
    weights = prediction_weights(
        config.discriminator.pairs, config.loss.level_weights, intermediate=0.3
    )
    players = step.Players(g, d, weights, auxiliary, None, Augment(config.augment))
    reducers = [GradientReducer(world, *m, bucket_mb=0.01) for m in ((d, heads), (g,))]

    B = config.batch_size
    random = torch.Generator().manual_seed(1)
    pictures = torch.randint(256, (B, 3, SIDE, SIDE), generator=random, dtype=torch.uint8)
    planned = [f"thing number{i % 5}" if i % 3 else "the same" for i in range(B)]
    rows = world.rows(B)
    own = slice(rows.start, rows.stop)
    batch = Batch(pictures[own], planned[own], ["key"] * len(rows), planned)
    captions = CaptionFeatures(WordEncoder(), torch.device("cpu"))
    inputs = draw(
        config, players.augment, captions, RecentCaptions(9), batch, 0, world, augmented_share=0.6
    )
    assert all(inputs.has_other_B)
    # The second half has no other captions at all.
    has_other_B = tuple(row % 3 < 2 and row < B // 2 for row in world.rows(B))
    inputs = inputs._replace(has_other_B=has_other_B)
    inputs = doubled(inputs)

    parts = split(inputs, num_parts)
    share, metrics, found = 1 / num_parts, {}, []
    fakes = [step.synthesize(g, part) for part in parts]
    for part, fake in zip(parts, fakes, strict=True):
        loss, terms = step.discriminator_loss(players, config, part, fake, auxiliary_strength=1.0)
        (share * loss).backward()
        step.add(metrics, terms, share)
    for i, part in enumerate(parts):
        if i == num_parts - 1:
            reducers[0].arm()
        penalty, terms = step.r1_loss(players, part)
        (0.7 * share * penalty).backward()
        step.add(metrics, terms, share)
    reducers[0].finish()
    found += [p.grad for m in (d, heads) for p in m.parameters()]
    loop._require_grad(False, d, heads)
    for i, (part, fake) in enumerate(zip(parts, fakes, strict=True)):
        if i == num_parts - 1:
            reducers[1].arm()
        loss, terms = step.generator_loss(players, config, part, fake, auxiliary_strength=1.0)
        (share * loss).backward()
        step.add(metrics, terms, share)
    reducers[1].finish()
    return found + [p.grad for p in g.parameters()], metrics


def equal_steps(matching_images, num_parts):
    """A rank's step is that of one process with the whole batch."""
    world = join(20)
    loss = CONFIG.loss.model_copy(
        update={
            "matching_images": matching_images,
            "generator_matching": 0.3,
            "vision": 0.4,
            "vision_resolution": 32,
            # A contrast is over one micro-batch of all ranks.
            "contrastive": 0.5 if num_parts == 1 else 0.0,
        }
    )
    judge = CONFIG.discriminator.model_copy(update={"minibatch_std": True})
    config = CONFIG.model_copy(update={"batch_size": 16, "loss": loss, "discriminator": judge})
    ours, metrics = one_step(config, world, num_parts)
    theirs, expected = one_step(config, World(), 1)
    assert sum(p is not None for p in theirs) > 40
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert list(metrics) == list(expected)
    for name, value in metrics.items():
        # The mean over those that have another caption; the only figure that is not a sum.
        if name == "d/logit_mismatch" or (num_parts > 1 and name == "g/contrastive"):
            continue
        got = world.mean(value).double()
        torch.testing.assert_close(got, expected[name].double(), rtol=1e-6, atol=1e-9)
    world.leave()
    return 0


# Processes


def train(argv):
    """The training process with planted faults, on all ranks or on one."""
    for fault in json.loads(os.environ.get(FAULTS, "[]")):
        name, rank = fault.pop("fault"), fault.pop("rank", None)
        if rank is None or str(rank) == os.environ.get(RANK, "0"):
            globals()[name](**fault)
    pretrained.text_encoder = lambda name, device: WordEncoder()
    logs.draw_health = lambda *_: None  # a page of charts takes longer than the run
    Log.health = lambda self, limits: None
    return training_main.main(argv)


def torchrun(argv):
    """torchrun's own agent with two ranks, which are forks of it and no new Pythons."""
    from torch.distributed import run

    alone = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # as --standalone says
    words = [*alone, "--nproc-per-node=2", "--start-method=fork", __file__]
    config, _, _ = run.config_from_args(run.parse_args(words))
    run.elastic_launch(config, entrypoint=ranked)(argv)
    return 0


def ranked(argv):
    sys.exit(train(argv))


def perform(argv):
    if argv[0] == "equal":
        return equal_steps(argv[1], int(argv[2]))
    return {"train": train, "torchrun": torchrun}[argv[0]](argv[1:])
