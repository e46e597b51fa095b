"""img2dataset with our fetch in the place of its own: the process that run.py starts.

`python -m data.download.collect JOB.json` runs it on one part. All that is patched in img2dataset
is patched here; tests/data/test_collect.py holds it against the installed version:

    downloader.download_image      replaced by `Worker.answer`, the vetted fetch: its own vets no
                                   address, bounds no body and reads no robots.txt
    main.Downloader                replaced by `VettedDownloader`: img2dataset carries it to other
                                   processes (spawned ones, Ray, Spark), and it puts the vetted
                                   fetch in its place wherever it arrives
    WebDatasetSampleWriter.write   overridden in `PictureWriter`: else captions and JSON stand in
                                   the tars a second time
    main.LoggerProcess             replaced by `ThreadLogger`: a process of its own, only to print
                                   a speed now and then, imports all of this once more
    LocalFileSystem.glob           for the part's folder only, whose name may look like a pattern
    large packages                 empty or absent while it is imported (`_without`), which saves
                                   time and memory in every process

Were the fetch ever left out, nothing would be fetched: a row asks for "EXPECTED URL", which no
other fetch takes for an address, and parts.py refuses rows whose errors are not ours.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection, util
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from data.download.processes import VETTED, WITHOUT, Job, Pulse
from data.web.addresses import RefusedError
from data.web.fetch import Fetcher, FetchSettings


class _NoPandas:
    """Says that pandas is not installed, or pyarrow would import it for its first array."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("pandas is not needed here", name=name)


@contextmanager
def _without(names: list[str]) -> Iterator[None]:
    """Import what is imported inside as if these packages were not installed, or empty.

    img2dataset imports them wherever it works, by way of webdataset too, and needs none of them
    for original bytes: 5 of 7 s of each process's start, and 650 of its 840 MB.
    """
    absent = [name for name in names if name not in sys.modules]
    for name in absent:
        optional = name in ("torch", "ray")  # whoever imports these can do without
        sys.modules[name] = None if optional else types.ModuleType(name)  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
        if "pandas" in absent:
            sys.meta_path.insert(0, _NoPandas)


with _without(os.environ.get(WITHOUT, "").split()):
    from img2dataset import downloader, logger, writer

Fetched = tuple[int, io.BytesIO | None, str | None]
"""What img2dataset expects of a fetch: row, stream or None, error or None."""


class PictureWriter(writer.WebDatasetSampleWriter):
    """Tars of pictures alone: what else is known of a row stands once, in its table."""

    def write(
        self, img_str: bytes | None, key: str, caption: str | None, meta: dict[str, Any]
    ) -> None:
        """Add one row, and its picture if it has one."""
        if img_str is not None:
            self.tarwriter.write({"__key__": key, self.encode_format: img_str})
        self.buffered_parquet_writer.write(meta)


class ThreadLogger(logger.LoggerProcess):
    """img2dataset's log of its speed, written by a thread of the process that begins it."""

    def start(self) -> None:
        """Begin to look for finished shards."""
        self._thread = threading.Thread(target=self.run, daemon=True)
        self._thread.start()

    def join(self, timeout: float | None = None) -> None:
        """Let it say the last, and wait for that."""
        self.q.put("stop")
        self._thread.join(timeout)
        self.q.close()

    def terminate(self) -> None:
        """Nothing: it ends with the process."""


class VettedDownloader(downloader.Downloader):
    """img2dataset's worker, fetching with ours. Its settings travel inside it."""

    fetch: FetchSettings
    pulses: Path

    def __call__(self, row: tuple[int, str]) -> tuple[bool, tuple[int, str]]:
        """Download one shard; (whether it is done, the shard)."""
        worker = Worker.here(self.fetch, self.pulses)
        with worker.at_work():
            done: tuple[bool, tuple[int, str]] = super().__call__(row)
        return done


class Worker:
    """This process as img2dataset's worker: one fetcher for all its threads, and one pulse."""

    current: Worker | None = None

    def __init__(self, settings: FetchSettings, pulses: Path) -> None:
        self.settings = settings
        if settings.hosts_cache:  # one a machine: on another, its folder is not there yet
            Path(settings.hosts_cache).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.fetcher = Fetcher(settings)
        self.pulse = Pulse(pulses)
        util.Finalize(None, self.pulse.leave, exitpriority=0)  # not called when we are killed

    @classmethod
    def here(cls, settings: FetchSettings, pulses: Path) -> Worker:
        """The worker of this process, made at its first shard of a job."""
        worker = cls.current
        if worker is None or (worker.settings, worker.pulse.folder) != (settings, pulses):
            worker = cls.current = cls(settings, pulses)
            downloader.download_image = worker.answer
        return worker

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Say that a shard is in hand while the block lasts."""
        self.pulse.begin()
        try:
            yield
        finally:
            self.pulse.end()

    def answer(self, row: tuple[int, str], *args: object, **options: object) -> Fetched:
        """What stands where img2dataset's `download_image` was; its options are ours already."""
        key, request = row
        expected, _, url = request.partition(" ")
        try:
            body = self.fetcher.fetch(url, None if expected == "-" else expected)
            return key, io.BytesIO(body), None
        except RefusedError as refusal:
            return key, None, f"{VETTED}{refusal.fate}: {refusal}"
        except Exception as error:
            return key, None, f"{VETTED}fault: {type(error).__name__}: {error}"
        finally:
            self.pulse.beat()


def main(path: str) -> None:
    """Run img2dataset on the job in a JSON file."""
    job = Job.model_validate_json(Path(path).read_text(encoding="utf-8"))
    end_with_parent(job.parent)
    if job.distributor == "ray":
        _join_ray(job)
    elif job.distributor == "pyspark":
        _join_spark(job)
    _take_literally(job.images)
    # The package's attribute `main` is a function that hides the module.
    module: Any = importlib.import_module("img2dataset.main")
    module.Downloader = _downloader_of(job)
    module.LoggerProcess = ThreadLogger
    module.download(**_arguments(job))


def _downloader_of(job: Job) -> Any:
    """What img2dataset calls where it makes its downloader."""

    def make(**options: Any) -> VettedDownloader:
        made = VettedDownloader(**{**options, "sample_writer_class": PictureWriter})
        made.fetch, made.pulses = job.fetch, job.pulses
        return made

    return make


def _arguments(job: Job) -> dict[str, Any]:
    """Arguments of img2dataset: original bytes with their sha256, as webdataset tars."""
    return {
        "url_list": str(job.requests),
        "input_format": "parquet",
        "url_col": "request",
        "output_folder": str(job.images),
        "output_format": "webdataset",
        "disable_all_reencoding": True,
        "compute_hash": "sha256",
        "extract_exif": False,
        "number_sample_per_shard": job.rows_per_shard,
        "processes_count": job.processes,
        "thread_count": job.threads,
        "distributor": job.distributor,
        "retries": 0,  # the fetch retries by itself, where it can help
        "max_shard_retry": 1,
    }


def _take_literally(folder: Path) -> None:
    """Let no name of `folder` count as a pattern where img2dataset looks what it holds already."""
    plain, name = LocalFileSystem.glob, f"{folder}/"

    def found(self: LocalFileSystem, path: str, **options: Any) -> Any:
        if path.startswith(name):
            return sorted(map(str, folder.glob(path.removeprefix(name))))
        return plain(self, path, **options)

    LocalFileSystem.glob = found


def _join_ray(job: Job) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start one here; with our code on its path.

    Else img2dataset would start one by itself, with a dashboard and as many processes as cores.
    """
    import ray

    environment = {"env_vars": job.environment}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env=environment)
    else:
        ray.init(
            "local",
            num_cpus=job.processes,
            include_dashboard=False,
            object_store_memory=100_000_000,  # shards come and go by files
        )


def _join_spark(job: Job) -> None:
    """Make the session that img2dataset will find: the configured cluster's, or a local one."""
    from pyspark import SparkConf
    from pyspark.sql import SparkSession

    chosen = SparkConf()
    if not chosen.contains("spark.master"):
        chosen.setMaster(f"local[{job.processes}]")
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # else any python3 on the path
    for name, value in job.environment.items():
        chosen.set(f"spark.executorEnv.{name}", value)
    SparkSession.builder.config(conf=chosen).appName("img2dataset").getOrCreate()


def end_with_parent(pid: int | None = None) -> None:
    """End this process as soon as the one that started it is gone: a killed run leaves nothing.

    `pid` is the starter's; a process that multiprocessing spawned learns it by itself.
    """
    wait = _await_spawner if pid is None else _await_end_of
    threading.Thread(target=wait, args=() if pid is None else (pid,), daemon=True).start()


def _await_end_of(pid: int) -> None:
    while os.getppid() == pid:
        time.sleep(0.1)
    os._exit(1)


def _await_spawner() -> None:
    while (parent := multiprocessing.parent_process()) is None:  # the main module comes before it
        time.sleep(0.02)
    connection.wait([parent.sentinel])
    os._exit(1)


if __name__ == "__mp_main__":  # spawned by img2dataset: a worker, or its logger
    end_with_parent()
if __name__ == "__main__":
    # The workers' copy of the downloader must come from a module that they can import.
    importlib.import_module("data.download.collect").main(sys.argv[1])
