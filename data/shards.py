"""Kept keys → training shards: one set of webdataset tars per resolution, the same to the byte."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.config import FilterConfig
from data.decode import decode, square
from data.report import Progress, silent
from data.score import members


def write(
    kept: pa.Table, images: Path, out: Path, config: FilterConfig, *, progress: Progress = silent
) -> None:
    """Write `out/RES/train-NNNNN.tar` with `.png`, `.txt` and `.json` a sample, and `index.json`.

    `kept` has key, url, caption and sha256, sorted by key. A seeded shuffle decides which shard a
    sample goes to, so that each shard is a fair sample; inside a shard keys ascend. The index is
    written last: a resolution that has one is done.
    """
    folders = {side: out / f"{side:03d}" for side in config.resolutions}
    todo = [side for side, folder in folders.items() if not (folder / "index.json").exists()]
    if not todo:
        return
    order = np.random.default_rng(config.seed).permutation(kept.num_rows)
    groups = [
        np.sort(order[start : start + config.samples_per_shard])
        for start in range(0, len(order), config.samples_per_shard)
    ]
    home = {key: g for g, group in enumerate(groups) for key in kept["key"].take(group).to_pylist()}
    done = 0
    pictures: list[dict[str, dict[int, bytes]]] = [{} for _ in groups]
    for tar in sorted(images.glob("*.tar")):
        for key, data in members(tar):
            if key in home:
                image = decode(data)
                pictures[home[key]][key] = {side: _png(square(image, side)) for side in todo}
                done += 1
                progress("writing training shards", done, kept.num_rows)
    for side in todo:
        folders[side].mkdir(parents=True, exist_ok=True)
        entries = []
        for number, group in enumerate(groups):
            path = folders[side] / f"train-{number:05d}.tar"
            rows = kept.take(group).to_pylist()
            data = _tar(_samples(rows, pictures[number], side))
            path.write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            entries.append(
                {"name": path.name, "samples": len(rows), "bytes": len(data), "sha256": digest}
            )
        index = {"resolution": side, "samples": kept.num_rows, "shards": entries}
        (folders[side] / "index.json").write_text(json.dumps(index, indent=1))


def _png(image: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)  # type: ignore[attr-defined]
    return buffer.getvalue()


def _samples(
    rows: list[dict[str, str]], pictures: dict[str, dict[int, bytes]], side: int
) -> Iterator[tuple[str, bytes]]:
    """(member name, contents) in the order of keys; provenance in the `.json`."""
    for row in rows:
        provenance = {name: row[name] for name in ("key", "url", "caption", "sha256")}
        text = json.dumps(provenance, ensure_ascii=False, sort_keys=True)
        yield f"{row['key']}.png", pictures[row["key"]][side]
        yield f"{row['key']}.txt", row["caption"].encode()
        yield f"{row['key']}.json", text.encode()


def _tar(contents: Iterator[tuple[str, bytes]]) -> bytes:
    """A tar without times, owners or modes of this machine."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in contents:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
