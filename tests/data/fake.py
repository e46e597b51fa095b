"""A tiny finished download, made of Pillow pictures: what the stages behind it start from."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.layout import ImageShard
from data.schema import FATES, LIST

ASKED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def encoded(image: Image.Image, codec: str = "PNG", **options: Any) -> bytes:
    """The file of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, codec, **options)
    return buffer.getvalue()


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture unlike those of other seeds, reproducible."""
    digest = hashlib.sha256(str(seed).encode()).digest() * 2
    return Image.frombytes("RGB", (5, 4), digest[:60]).resize(size, Image.Resampling.BICUBIC)


def row(number: int, data: bytes | None = b"", **columns: Any) -> dict[str, Any]:
    """A row that was asked for; `data` is its picture (a made-up one), or None: it failed."""
    return {
        "url": f"http://127.0.0.1/{number}.png",
        "caption": f"a picture of the number {number}",
        "source": "fake",
        "row": number,
        "data": encoded(noise(number)) if data == b"" else data,
        "fate": "ok" if data is not None else "http_404",
        **columns,
    }


def download(root: Path, parts: Sequence[Sequence[Sequence[dict[str, Any]]]]) -> Path:
    """Write parts of shards of rows, as `data.layout` says; returns `root`."""
    for name in ("lists", "fates"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for number, shards in enumerate(parts):
        rows = [one for shard in shards for one in shard]
        pq.write_table(_table(rows, LIST), root / "lists" / f"{number:05d}.parquet")
        with pq.ParquetWriter(root / "fates" / f"{number:05d}.parquet", FATES) as fates:
            for place, shard in enumerate(shards):
                known = write_shard(ImageShard(root, number, place), shard)
                fates.write_table(_table(known, FATES), row_group_size=max(1, len(known)))
    rows_of = [sum(map(len, shards)) for shards in parts]
    index = {"funnel": [["listed", 0, sum(rows_of)]], "parts": rows_of}
    (root / "lists" / "index.json").write_text(json.dumps(index))
    return root


def write_shard(shard: ImageShard, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write one shard's files, members in reverse order; returns its rows with their keys."""
    shard.stem.parent.mkdir(parents=True, exist_ok=True)
    digits = len(str(len(rows) - 1))
    known = []
    with tarfile.open(shard.tar, "w") as archive:
        for place, one in reversed(list(enumerate(rows))):
            member = f"{shard.number:05d}{place:0{digits}d}.jpg"
            data = one["data"]
            digest = None if data is None else hashlib.sha256(data).hexdigest()
            stamps = {"asked_from": ASKED, "asked_until": ASKED, "sha256": digest}
            known.append({"key": shard.key(member), **stamps, **one})
            if data is not None:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
                text = one["caption"].encode()
                info = tarfile.TarInfo(member.replace(".jpg", ".txt"))
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text))
    known.reverse()
    listed = [{"key": one["key"], "url": one["url"], "status": one["fate"]} for one in known]
    pq.write_table(pa.Table.from_pylist(listed), shard.stem.with_suffix(".parquet"))
    shard.stem.with_name(f"{shard.stem.name}_stats.json").write_text("{}")
    return known


def _table(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    columns = [[one.get(name) for one in rows] for name in schema.names]
    return pa.table(
        [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema
    )
