"""Re-thresholding and near-duplicate search over a million synthetic rows: seconds and memory."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.config import FilterConfig
from data.filter.duplicates import near_duplicates
from data.filter.select import select
from data.schema import MINIATURE, SCORES

NUM_ROWS = 1_000_000
ROWS_A_FILE = 1000
FILES_A_PART = 1000
TWINS = 0.2
"""Share of the rows that are a changed copy of another."""


def main() -> None:
    """Seconds to select anew by another threshold, and to find near duplicates."""
    phash_N, miniature_ND, area_N = _looks(np.random.default_rng(0))
    for bits in (0, 4, 8):
        seconds, processor = _timed(near_duplicates, phash_N, miniature_ND, area_N, bits, 12.0)
        _show(f"near duplicates at {bits} bits", seconds, processor)
    white = np.random.default_rng(1).permutation(NUM_ROWS)[: NUM_ROWS // 10]
    phash_N[white] = 1 << 63
    miniature_ND[white] = np.random.default_rng(2).integers(240, 256, (len(white), 48))
    seconds, processor = _timed(near_duplicates, phash_N, miniature_ND, area_N, 4, 12.0)
    _show("… at 4 bits, a tenth of all nearly white", seconds, processor)
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder) / "scores", *_looks(np.random.default_rng(0)))
        for number, config in enumerate(
            (
                FilterConfig(min_similarity=0.2, max_phash_distance=None),
                FilterConfig(min_similarity=0.2),
                FilterConfig(min_similarity=0.3),
                FilterConfig(min_similarity=None, top_similarity=0.3),
            )
        ):
            seconds, processor = _timed(select, Path(folder) / str(number), Path(folder), config)
            asked = config.model_dump(exclude_defaults=True)
            _show(f"select with {asked}", seconds, processor)


def _timed(run: Callable[..., object], *arguments: object) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    started, busy = time.perf_counter(), time.process_time()
    run(*arguments)
    return time.perf_counter() - started, time.process_time() - busy


def _show(what: str, seconds: float, processor: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{what}: {seconds:.1f} s, {processor:.1f} s of a core; peak {peak:.2f} GB", flush=True)


def _looks(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes, miniatures and areas; some rows are others with one bit of the hash flipped."""
    phash_N = rng.integers(0, 2**64, NUM_ROWS, np.uint64)
    miniature_ND = rng.integers(0, 256, (NUM_ROWS, 3 * MINIATURE**2), np.uint8)
    copies = rng.permutation(NUM_ROWS)[: int(TWINS * NUM_ROWS)]
    sources = rng.integers(0, NUM_ROWS, len(copies))
    flip = np.uint64(1) << rng.integers(0, 64, len(copies)).astype(np.uint64)
    phash_N[copies] = phash_N[sources] ^ flip
    miniature_ND[copies] = miniature_ND[sources]
    return phash_N, miniature_ND, rng.integers(1, 2000, NUM_ROWS).astype(np.float64) * 100


def _write(folder: Path, phash_N: np.ndarray, miniature_ND: np.ndarray, area_N: np.ndarray) -> None:
    """Score files of these rows."""
    rng = np.random.default_rng(3)
    for start in range(0, NUM_ROWS, ROWS_A_FILE):
        part, number = divmod(start // ROWS_A_FILE, FILES_A_PART)
        rows = range(start, min(start + ROWS_A_FILE, NUM_ROWS))
        few = slice(rows.start, rows.stop)
        columns: dict[str, Any] = {
            "key": [f"{part:05d}{number:05d}{row - start:03d}" for row in rows],
            "url": [f"https://host{row % 977}.example/pictures/{row}.jpg" for row in rows],
            "caption": [f"a picture of the thing with number {row}" for row in rows],
            "sha256": [f"{row:064x}" for row in rows],
            "width": (area_N[few] / 100).astype(np.int32) + 100,
            "height": np.full(len(rows), 1000, np.int32),
            "similarity": rng.normal(0.25, 0.1, len(rows)).astype(np.float32),
            "aesthetic": rng.normal(50, 10, len(rows)).astype(np.float32),
            "unsafe": rng.beta(1, 9, len(rows)).astype(np.float32),
            "phash": phash_N[few],
            "miniature": [miniature.tobytes() for miniature in miniature_ND[few]],
        }
        arrays = [
            pa.array(columns[field.name], field.type)
            if field.name in columns
            else pa.nulls(len(rows), field.type)
            for field in SCORES
        ]
        table = pa.table(arrays, schema=SCORES)
        path = folder / f"{part:05d}" / f"{number:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
