"""The loader against its own decoder: what order, reading, checking and batching cost.

Both run on one thread and see the same pictures. `decode` has the bytes of every picture in memory
and only decodes them to arrays; `loader` is `ShardLoader.batches` without its cache of pictures.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from data.shards.loader import ShardLoader
from data.shards.manifest import Entry, Index
from data.shards.write import COLUMNS, ShardWriter, encoded, write_index

CASES = ((64, "png", 1024), (256, "jpg", 384), (512, "jpg", 192))
"""Side in px, codec, pictures."""
FORMATS = {"png": "PNG", "jpg": "JPEG"}
BATCH, SHARDS, ROUNDS = 32, 8, 9
TARGET = 0.95


class Time(NamedTuple):
    """Seconds of one pass over all pictures."""

    wall: float
    processor: float


def picture(side: int, number: int) -> Image.Image:
    """Soft shapes under a little grain, which compress about as photographs do."""
    random = np.random.default_rng([side, number])
    coarse = random.integers(256, size=(side // 16, side // 16, 3), dtype=np.uint8)
    soft = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    grain = random.normal(0, 3, (side, side, 3))
    return Image.fromarray((np.asarray(soft) + grain).clip(0, 255).astype(np.uint8))


def write_shards(folder: Path, side: int, codec: str, num: int) -> None:
    """Shards as the filter stage writes them."""
    folder.mkdir()
    entries: list[Entry] = []
    for shard, numbers in enumerate(np.array_split(np.arange(num), SHARDS)):
        writer = ShardWriter(folder, f"train-{shard:05d}")
        for number in numbers.tolist():
            row = {**dict.fromkeys(COLUMNS), "key": f"{number:013d}", "caption": f"no. {number}"}
            writer.add(row, encoded(picture(side, number), codec), codec)
        entries.append(writer.commit("bench"))
    known = {"resolution": side, "codec": codec, "samples": num, "classes": (), "unlabelled": num}
    known |= {"shards": tuple(entries)}
    write_index(folder, Index.model_validate(known))


def members(folder: Path) -> list[bytes]:
    """The bytes of every picture."""
    found = []
    for entry in json.loads((folder / "index.json").read_text())["shards"]:
        tar = (folder / entry["name"]).read_bytes()
        for row in pq.read_table((folder / entry["name"]).with_suffix(".parquet")).to_pylist():
            found.append(tar[row["offset"] : row["offset"] + row["size"]])
    return found


def timed(run: Callable[[], object]) -> Time:
    """Seconds that one call takes."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return Time(time.perf_counter() - wall, time.process_time() - processor)


def compare(side: int, codec: str, num: int, rounds: int = ROUNDS) -> float:
    """Print and return the loader's images/s as a share of the decoder's."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "shards"
        write_shards(folder, side, codec, num)
        pictures = members(folder)
        stream = ShardLoader(folder, batch_size=BATCH, seed=0, cache_mb=0).batches()

        def decode() -> None:
            for data in pictures:
                np.asarray(Image.open(io.BytesIO(data), formats=[FORMATS[codec]]))

        def load() -> None:
            for _ in islice(stream, num // BATCH):
                pass

        decode()  # to warm up
        load()
        pairs = [(timed(decode), timed(load)) for _ in range(rounds)]
        stream.close()  # type: ignore[attr-defined]
    speed = {
        name: num / statistics.median(pair[i].wall for pair in pairs)
        for i, name in enumerate(("decode", "loader"))
    }
    share = statistics.median(a.wall / b.wall for a, b in pairs)
    processor = statistics.median(a.processor / b.processor for a, b in pairs)
    print(
        f"{side} px {codec}: decode {speed['decode']:,.0f} images/s  loader "
        f"{speed['loader']:,.0f} images/s  (×{share:.3f}; by processor time ×{processor:.3f})",
        flush=True,
    )
    return share


def main() -> None:
    """All cases; says so where the loader falls short of the target."""
    for case in CASES:
        if compare(*case) < TARGET:
            print(f"  below {TARGET}: the loader costs too much", flush=True)


if __name__ == "__main__":
    main()
