"""The download stage: metadata → original bytes in tars, and one row per URL with its fate.

img2dataset does the work as a process of its own, with the fetch of fetch.py. Its exit code says
little, so this module judges by what lies on disk: a shard is done when its statistics are
written and every row of it is accounted for. Running again does only what is missing.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from shutil import disk_usage, rmtree

import pyarrow as pa
import pyarrow.parquet as pq

from data import demo, metadata
from data.config import DownloadConfig
from data.fetch import SETTINGS, FetchSettings
from data.report import Funnel, Progress, Report, Step, silent
from data.schema import FATES

FULL_BYTES = 1 << 16
"""A disk with less free space than this is full."""
ATTEMPTS = 2
"""Runs of img2dataset before shards that it did not finish are an error."""


class IncompleteDownloadError(RuntimeError):
    """img2dataset ended, or stood still, before every shard was done."""


def run(
    out: Path,
    config: DownloadConfig,
    *,
    processes: int = 1,
    threads: int = 32,
    progress: Progress = silent,
) -> Report:
    """Fetch everything that the metadata lists into `out`; resume what an earlier run left.

    Writes `metadata.parquet`, `images/*.tar` with `.parquet`, `fates.parquet`, `report.json`, and
    for the embedded source `heldout/` and `site/truth.parquet`.

    Raises:
        MetadataError: see metadata.prepare.
        ValueError: `out` was begun with settings that give other rows or shards.
        IncompleteDownloadError: shards are still missing; run again to fetch only those.
    """
    out.mkdir(parents=True, exist_ok=True)
    _hold_to_plan(out, config)
    embedded = config.source == "embedded"
    lists = config.metadata
    if embedded:
        lists = tuple(str(out / "site" / name) for name in ("laion.parquet", "coyo.parquet"))
        if not (out / "report.json").exists():
            demo.build(out, config.embedded, progress=progress)

    funnel = _listed(out, lists, config)
    missing = _missing(out, config)
    if missing:
        with demo.serve(out / "site") if embedded else nullcontext(None) as port:
            connect_to = {demo.HOST: f"127.0.0.1:{port}"} if embedded else {}
            _fetch(out, config, connect_to, processes, threads, progress)
        missing = _missing(out, config)

    report = _account(out, funnel)
    if missing:
        raise IncompleteDownloadError(
            f"{len(missing)} image shards of {out / 'images'} are not done (first: {missing[0]}); "
            f"{out / 'img2dataset.log'} says more; run again to fetch only these"
        )
    report.save(out / "report.json")
    rmtree(out / "site" / "files", ignore_errors=True)  # every byte of use is in the tars now
    return report


def _hold_to_plan(out: Path, config: DownloadConfig) -> None:
    """Refuse to resume with settings under which keys would name other rows."""
    limits = {*FetchSettings.model_fields}
    plan = config.model_dump(mode="json", exclude=limits)
    path = out / "plan.json"
    if not path.exists():
        path.write_text(json.dumps(plan, indent=1))
        return
    begun = json.loads(path.read_text())
    if changed := sorted(name for name in plan if begun.get(name) != plan[name]):
        raise ValueError(
            f"{out} was begun with other settings ({', '.join(f'download.{n}' for n in changed)}); "
            "resume with those it was begun with (plan.json), or give another folder"
        )


def _listed(out: Path, lists: tuple[str, ...], config: DownloadConfig) -> Funnel:
    """The pre-filter's funnel; its table is made once."""
    path, funnel_path = out / "metadata.parquet", out / "metadata.json"
    if not funnel_path.exists():
        funnel = metadata.prepare(lists, path, config)
        funnel_path.write_text(json.dumps(funnel))
    return [Step(*step) for step in json.loads(funnel_path.read_text())]


def _missing(out: Path, config: DownloadConfig) -> list[str]:
    """Names of the image shards that are not done."""
    rows = pq.read_metadata(out / "metadata.parquet").num_rows
    num_shards = -(-rows // config.rows_per_shard)
    names = (f"{shard:05d}" for shard in range(num_shards))
    return [name for name in names if not (out / "images" / f"{name}_stats.json").exists()]


def _fetch(
    out: Path,
    config: DownloadConfig,
    connect_to: dict[str, str],
    processes: int,
    threads: int,
    progress: Progress,
) -> None:
    """Run img2dataset until nothing is missing, at most `ATTEMPTS` times."""
    limits = {
        name: getattr(config, name) for name in FetchSettings.model_fields if name != "connect_to"
    }
    settings = FetchSettings(**limits, connect_to=connect_to)
    job = out / "img2dataset.json"
    images = out / "images"
    images.mkdir(exist_ok=True)
    job.write_text(json.dumps(_job(out, config, processes, threads), indent=1))
    for _ in range(ATTEMPTS):
        missing = len(_missing(out, config))
        if not missing:
            return
        rmtree(images / "_tmp", ignore_errors=True)
        with _img2dataset(job, settings, out / "img2dataset.log") as process:
            _watch(
                process,
                images,
                config,
                progress,
                total=pq.read_metadata(out / "metadata.parquet").num_rows,
            )


def _job(out: Path, config: DownloadConfig, processes: int, threads: int) -> dict[str, object]:
    """Arguments of img2dataset: original bytes with their sha256, as webdataset tars."""
    return {
        "url_list": str(out / "metadata.parquet"),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": str(out / "images"),
        "output_format": "webdataset",
        "disable_all_reencoding": True,
        "compute_hash": "sha256",
        "extract_exif": False,
        "number_sample_per_shard": config.rows_per_shard,
        "processes_count": processes,
        "thread_count": threads,
        "retries": 0,  # the fetch retries by itself, where it can help
        "max_shard_retry": 1,
    }


@contextmanager
def _img2dataset(
    job: Path, settings: FetchSettings, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """The process, in our process group so that it ends with us; ended when the block is left."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    quiet = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}  # both phone out else
    env = {**os.environ, **quiet, "PYTHONPATH": path, SETTINGS: settings.model_dump_json()}
    command = [sys.executable, "-m", "data.fetch", str(job.resolve())]
    with log.open("ab") as sink:
        process = subprocess.Popen(command, env=env, stdout=sink, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()  # its workers watch it, and end within a second
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _watch(
    process: subprocess.Popen[bytes],
    images: Path,
    config: DownloadConfig,
    progress: Progress,
    *,
    total: int,
) -> None:
    """Report rows done until the process ends; give up on it when its files stop growing.

    Raises OSError (ENOSPC) when that is because the disk is full.
    """
    patience = 60 + 4 * config.total_deadline_s
    size, changed = -1, time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        progress("downloading", _rows_done(images), total)
        now = sum(path.stat().st_size for path in images.iterdir() if path.is_file())
        if now != size:
            size, changed = now, time.monotonic()
        elif disk_usage(images).free < FULL_BYTES:
            # img2dataset logs a failed write and waits; nobody would learn why.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(images))
        elif time.monotonic() - changed > patience:
            return  # a killed worker leaves img2dataset waiting for ever
    progress("downloading", _rows_done(images), total)


def _rows_done(images: Path) -> int:
    done = 0
    for path in images.glob("*_stats.json"):
        try:
            done += json.loads(path.read_text())["count"]
        except ValueError:
            continue  # being written
    return done


def _account(out: Path, funnel: Funnel) -> Report:
    """Write `fates.parquet`: every row of the metadata with what became of it."""
    listed = pq.read_table(out / "metadata.parquet", columns=["key", "url", "caption"])
    results: dict[str, tuple[str, str | None, str | None]] = {}
    for stats in sorted((out / "images").glob("*_stats.json")):
        shard = pq.read_table(
            stats.with_name(stats.name.replace("_stats.json", ".parquet")),
            columns=["key", "status", "error_message", "sha256"],
        )
        for row in shard.to_pylist():
            results[row["key"]] = _fate(row)
    nothing = ("not_attempted", None, None)
    fates = [results.get(key, nothing) for key in listed["key"].to_pylist()]
    fate, detail, sha256 = (list(column) for column in zip(*fates, strict=True))
    table = pa.table([*listed.columns, fate, detail, sha256], names=FATES.names).cast(FATES)
    partial = out / "fates.partial"
    pq.write_table(table, partial)
    partial.replace(out / "fates.parquet")

    counts = dict(Counter(fate).most_common())
    failed = {name: count for name, count in counts.items() if name != "ok"}
    rows = table.num_rows
    for name, count in failed.items():
        rows -= count
        funnel = [*funnel, Step(name, count, rows)]
    asked = table.num_rows
    metrics = {"listed": funnel[0].rows, "asked": asked, "ok": rows, "ok_share": rows / asked}
    return Report(counts, funnel, {name: float(value) for name, value in metrics.items()})


def _fate(row: dict[str, str | None]) -> tuple[str, str | None, str | None]:
    """(class, detail, sha256) of one row of img2dataset's table."""
    if row["status"] == "success":
        return "ok", None, row["sha256"]
    fate, _, detail = (row["error_message"] or "unknown").partition(": ")
    return fate, detail or None, None
