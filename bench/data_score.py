"""Scoring pictures from their files against the bare encoders on pictures that are decoded already.

One shard of 512 px JPEGs, the embedded encoders: the ratio is what decoding, hashing and tables
cost on top. Decoding goes on in threads while the encoders work, so it wants a core of its own.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from bench.timing import medians
from data.config import ScoreConfig
from data.layout import ImageShard
from data.schema import FATES
from data.score.shard import AT_LEAST, Encoders, score_shard
from gigagan.common.pictures import decode, open_picture

NUM_PICTURES = 64
SIDE = 512
ROUNDS = 3


def main() -> None:
    """Print pictures a second of each way."""
    from gigagan.scoring import encoders

    config = ScoreConfig()
    models = encoders(config)
    with tempfile.TemporaryDirectory() as folder:
        shard, files = _shard(Path(folder))
        images = [open_picture(data, at_least=AT_LEAST).image for data in files]
        captions = sorted({f"a photo of thing number {number}" for number in range(len(files))})
        ways: dict[str, Callable[[], object]] = {
            "bare encoders": partial(_bare, images, captions, models, config.batch_size),
            "scoring": lambda: score_shard(shard, models, config=config, out=Path(folder, "out")),
            "decoding alone": lambda: [decode(data) for data in files],
        }
        times = medians(ways, ROUNDS)
    rates = {name: NUM_PICTURES / (ms / 1e3) for name, ms in times.items()}
    for name, rate in rates.items():
        print(f"{name}: {rate:.1f} pictures/s ({rate / rates['bare encoders']:.1%})", flush=True)


def _bare(images: list[Image.Image], captions: list[str], models: Encoders, batch: int) -> None:
    assert models.image_features is not None
    assert models.text_features is not None
    for start in range(0, len(images), batch):
        models.image_features(images[start : start + batch])
        if models.unsafe is not None:
            models.unsafe(images[start : start + batch])
    models.text_features(captions)


def _shard(root: Path) -> tuple[ImageShard, list[bytes]]:
    """One shard of a finished download, of made-up photographs."""
    rng = np.random.default_rng(0)
    shard = ImageShard(root, 0, 0)
    shard.stem.parent.mkdir(parents=True)
    (root / "fates").mkdir()
    files, rows = [], []
    now = datetime.now(UTC)
    with tarfile.open(shard.tar, "w") as archive:
        for number in range(NUM_PICTURES):
            data = _photograph(rng)
            member = tarfile.TarInfo(f"00000{number:03d}.jpg")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
            files.append(data)
            known = {"key": shard.key(member.name), "url": f"http://a/{number}", "fate": "ok"}
            known["caption"] = f"a photo of thing number {number}"
            known["sha256"] = hashlib.sha256(data).hexdigest()
            rows.append({**known, "asked_from": now, "asked_until": now})
    pq.write_table(pa.Table.from_pylist(rows, FATES), root / "fates" / "00000.parquet")
    return shard, files


def _photograph(rng: np.random.Generator) -> bytes:
    """About as hard to decode as one: noise at several scales, quality 90."""
    image_HWC = np.zeros((SIDE, SIDE, 3))
    for side in (8, 64, SIDE):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        image_HWC += np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) * (8 / side)
    image_HWC *= 255 / image_HWC.max()
    buffer = io.BytesIO()
    Image.fromarray(image_HWC.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
