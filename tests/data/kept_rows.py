"""A finished download and score stage of a few pictures, without having run either."""

import hashlib
import io
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.layout import ImageShard
from data.schema import SCORES

PER_IMAGE_SHARD, SHARDS_PER_PART = 7, 3
NOON = datetime(2026, 3, 5, 12, tzinfo=UTC)


def colour(place: int) -> tuple[int, int, int]:
    return (5 * place % 256, 255 - 5 * place % 256, place % 256)


def plain(place: int) -> bytes:
    """A picture of one colour, which tells its place."""
    buffer = io.BytesIO()
    Image.new("RGB", (9, 8), colour(place)).save(buffer, "PNG")
    return buffer.getvalue()


def noisy(place: int, width: int = 23, height: int = 19) -> bytes:
    pixels = np.random.default_rng(place).integers(256, size=(height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def shard_at(root: Path, place: int) -> ImageShard:
    part, number = divmod(place // PER_IMAGE_SHARD, SHARDS_PER_PART)
    return ImageShard(root, part, number)


def key_at(place: int) -> str:
    return f"{shard_at(Path(), place).name}{place % PER_IMAGE_SHARD}"


def kind(place: int) -> str | None:
    """Its class; numbers as text, which sort otherwise than numbers."""
    return str(9 + place % 3)


def row(place: int, picture: bytes, caption: str, label: str | None = None) -> dict:
    return {
        "key": key_at(place),
        "url": f"http://host{place % 3}.example/{place}.png",
        "caption": caption,
        "label": label,
        "source": "list-0",
        "row": 100 + place,
        "sha256": hashlib.sha256(picture).hexdigest(),
        "asked_from": NOON + timedelta(seconds=place),
        "asked_until": NOON + timedelta(seconds=place, milliseconds=250),
        "width": 9,
        "height": 8,
        "similarity": 0.1 + place / 1000,
        "aesthetic": None,
        "unsafe": 0.25,
        "watermark": float("nan") if place == 3 else 0.5,
        "phash": 2**63 + place,
        "listed_phash": None,
        "miniature": bytes(48),
        "language": "en",
        "caption_words": 2,
        "caption_chars": len(caption),
        "error": None,
    }


def member(name: str, data: bytes) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, io.BytesIO(data)


def write_kept(
    root: Path,
    count: int,
    picture=plain,
    keep=lambda place: True,
    label=kind,
    caption=lambda place: f"colour {place % 7}",
) -> tuple[Path, Path]:
    """(kept.parquet, download); places of the download that `keep` drops have no row."""
    download, pictures = root / "download", [picture(place) for place in range(count)]
    for start in range(0, count, PER_IMAGE_SHARD):
        tar = shard_at(download, start).tar
        tar.parent.mkdir(parents=True, exist_ok=True)
        places = [*range(start, min(start + PER_IMAGE_SHARD, count))]
        with tarfile.open(tar, "w") as archive:
            for place in reversed(places):  # as they were done, not as they were listed
                name = shard_at(download, place).member(key_at(place))
                archive.addfile(*member(name, pictures[place]))
                archive.addfile(*member(name.replace(".jpg", ".json"), b"{}"))
    rows = [row(i, pictures[i], caption(i), label(i)) for i in range(count) if keep(i)]
    kept = root / "kept.parquet"
    pq.write_table(pa.Table.from_pylist(rows, SCORES), kept, row_group_size=11)
    (download / "plan.json").write_text('{"honour_opt_outs": true}')
    return kept, download
