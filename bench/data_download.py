"""Images a second of the download against img2dataset's own command, from one local site.

Both store the original bytes with their sha256, with as many processes and threads, in
alternating order. Ours vets each fetch, keeps no `.json` beside a picture, and checks every shard.
"""

from __future__ import annotations

import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data import demo
from data.config import DownloadConfig
from data.download import processes
from data.download import run as download

PICTURES = 3000
SIDE = 256
"""Of a picture, px: some 35 kB as a JPEG of quality 90."""
PROCESSES = 1
THREADS = 32
ROWS_PER_SHARD = 1000


def main(rounds: int = 3) -> None:
    """Print both speeds, their ratio, and the most memory that ours used."""
    with tempfile.TemporaryDirectory() as name, _served(Path(name)) as port:
        lists = Path(name) / "rows.parquet"
        urls = [f"http://127.0.0.1:{port}/{number}.jpg" for number in range(PICTURES)]
        captions = [f"picture number {number}" for number in range(PICTURES)]
        pq.write_table(pa.table({"url": urls, "caption": captions}), lists)
        times: dict[str, list[float]] = {"ours": [], "img2dataset": []}
        inside: dict[str, list[float]] = {"ours": [], "img2dataset": []}
        peaks: list[int] = []
        for number in range(rounds):
            for what, run in (("ours", _ours), ("img2dataset", _theirs)):
                out = Path(name) / f"{what}-{number}"
                started = time.perf_counter()
                run(lists, out, peaks)
                times[what].append(time.perf_counter() - started)
                inside[what].append(_busy_s(out))
        _show("with start and end", times)
        _show("within shards alone", inside)
        print(f"memory of the download's processes: {max(peaks) / 1e9:.2f} GB at most")


def _show(title: str, seconds: dict[str, list[float]]) -> None:
    speeds = {name: PICTURES / statistics.median(found) for name, found in seconds.items()}
    ratio = speeds["ours"] / speeds["img2dataset"]
    shown = "  ".join(f"{name} {speed:.0f} images/s" for name, speed in speeds.items())
    print(f"{title}: {shown}  (ours ×{ratio:.2f})", flush=True)


def _busy_s(out: Path) -> float:
    """Seconds of all shards together, as img2dataset's statistics have them."""
    found = [path.read_text() for path in out.rglob("*_stats.json")]
    assert sum(int(re.search(r'"successes": (\d+)', text)[1]) for text in found) == PICTURES
    return sum(float(re.search(r'"duration": ([\d.e-]+)', text)[1]) for text in found)


@contextmanager
def _served(folder: Path) -> Iterator[int]:
    """The site, in a process of its own: its work is nobody's."""
    files = folder / "files"
    files.mkdir()
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        coarse = rng.integers(0, 256, (SIDE // 4, SIDE // 4, 3), np.uint8)
        stream = io.BytesIO()
        Image.fromarray(coarse).resize((SIDE, SIDE)).save(stream, "jpeg", quality=90)
        (files / f"{number}.jpg").write_bytes(stream.getvalue())
    script = (
        "import sys; from pathlib import Path; from data import demo\n"
        "with demo.serve(Path(sys.argv[1])) as port: print(port, flush=True); sys.stdin.read()\n"
    )
    root = str(Path(demo.__file__).resolve().parents[1])
    server = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        yield int(server.stdout.readline())
    finally:
        server.kill()
        server.wait()


def _ours(lists: Path, out: Path, peaks: list[int]) -> None:
    config = DownloadConfig(
        source="metadata",
        metadata=(str(lists),),
        contact="bench@example.org",
        min_side=None,
        max_aspect=None,
        max_unsafe=None,
        max_watermark=None,
        allow_private_addresses=True,
        host_connections=THREADS,  # one host: the limit that matters on the web would be all
        rows_per_shard=ROWS_PER_SHARD,
    )
    measured = processes.Session.memory

    def memory(session: processes.Session, enough: int = 0) -> int:
        peaks.append(measured(session))
        return peaks[-1]

    processes.Session.memory = memory  # type: ignore[method-assign]
    try:
        download.run(out, config, processes=PROCESSES, threads=THREADS)
    finally:
        processes.Session.memory = measured  # type: ignore[method-assign]


def _theirs(lists: Path, out: Path, peaks: list[int]) -> None:
    options = {
        "url_list": lists,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": out,
        "output_format": "webdataset",
        "disable_all_reencoding": True,
        "compute_hash": "sha256",
        "extract_exif": False,
        "number_sample_per_shard": ROWS_PER_SHARD,
        "processes_count": PROCESSES,
        "thread_count": THREADS,
        "enable_wandb": False,
    }
    subprocess.run(
        [sys.executable, "-m", "img2dataset.main", *(f"--{k}={v}" for k, v in options.items())],
        check=True, env={**os.environ, **processes.QUIET}, capture_output=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
