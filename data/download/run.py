"""The download stage: metadata → original bytes in tars, and one row per URL with its fate.

img2dataset does the work, one part after the other, as processes of its own (collect.py) with the
fetch of fetch.py. Its exit code says little, so counts on disk decide what is done (parts.py), and
signs of life when it must be begun anew (processes.py). Running again does only what is missing.
What was damaged since is found when asked for, as that reads every byte (originals.py, mend.py).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import disk_usage, rmtree
from typing import Any

from data import demo, originals
from data.config import LIMITS, DownloadConfig
from data.download import mend
from data.download.parts import Part, Shelf, Summary
from data.download.processes import TOO_MUCH_MEMORY, Job, Watch, session
from data.layout import PART_DIGITS, SHARD_DIGITS
from data.lists import metadata
from data.report import Funnel, Report, Step
from data.web.fetch import FetchSettings
from gigagan.common.files import write_aside
from gigagan.common.progress import Progress, silent

FULL_BYTES = 1 << 16
"""A disk with less free space than this is full."""
ATTEMPTS = 3
"""Runs of img2dataset in succession that finish no shard before that is an error."""
LOG_BYTES = 50_000_000
"""A longer log of img2dataset is set aside, and the one before it forgotten."""
TICK_S = 0.2
"""Seconds between two looks at the files."""

_log = logging.getLogger(__name__)


class IncompleteDownloadError(RuntimeError):
    """img2dataset ended, or stood still, before every shard was done."""


def run(
    out: Path,
    config: DownloadConfig,
    *,
    processes: int = 1,
    threads: int = 32,
    verify: bool = False,
    progress: Progress = silent,
) -> Report:
    """Fetch everything that the metadata lists into `out`; resume what an earlier run left.

    With `verify`, every picture that is there is read as well, and those that are damaged are
    fetched again; the metrics `damaged` and `mended` say of how many, and the fates why others
    cannot be had again.

    Writes what layout.py names, `report.json`, and for the embedded source `heldout/` and
    `site/truth.parquet`. Opt-outs are rows of the fates: `opt_out` and `robots_txt`, with what
    said so in `detail`, and the times between which it did.

    Raises:
        MetadataError: see metadata.prepare.
        ValueError: impossible settings, or such as give other rows than `out` was begun with.
        IncompleteDownloadError: shards are still missing; run again to fetch only those.
        OSError: ENOSPC, the disk is full.
    """
    _refuse_impossible(config)
    out.mkdir(parents=True, exist_ok=True)
    _hold_to_plan(out, config)
    lists = config.metadata
    if config.source == "embedded":
        lists = tuple(str(out / "site" / name) for name in ("laion.parquet", "coyo.parquet"))
        if not (out / "report.json").exists():
            demo.build(out, config.embedded, progress=progress)

    funnel = metadata.prepare(lists, out, config, workers=processes, progress=progress)
    parts = _parts(out, config)
    missing = [part for part in parts if not part.fates.exists()]
    if missing:
        _collect_all(
            missing, out, config, Pace(processes, threads), _PartsProgress(parts, progress)
        )

    verified = _verify(out, config, Pace(processes, threads), progress) if verify else {}
    report = _report(parts, funnel)
    report.save(out / "report.json")
    rmtree(out / "site" / "files", ignore_errors=True)  # every byte of use is in the tars now
    return replace(report, metrics=report.metrics | verified)


def _verify(out: Path, config: DownloadConfig, pace: Pace, progress: Progress) -> dict[str, float]:
    """Fetch again what is damaged; how many pictures that was, and how many it is no more."""
    damaged = originals.verify(out, workers=pace.processes, progress=progress)
    mended = 0
    if damaged:
        with _workshop(out) as folder:
            site = out
            if config.source == "embedded":  # its pictures are rendered anew, beside all else
                site = folder
                demo.build(site, config.embedded, progress=progress)
            with _connections(site, config) as connect_to:
                settings = FetchSettings.of(config, connect_to)
                fates = mend.mend(out, damaged, settings, threads=pace.threads, progress=progress)
        _log.warning("damaged pictures, asked for again: %s", dict(fates.most_common()))
        mended = fates["ok"]
    return {"damaged": float(len(damaged)), "mended": float(mended)}


def _refuse_impossible(config: DownloadConfig) -> None:
    if config.source == "metadata" and config.contact is None:
        raise ValueError(
            "download.contact is null: who asks strangers for their pictures says where they "
            "reach them; give an e-mail address, or a page that has one"
        )
    if config.source == "embedded":
        demo.split(config.embedded)


def begun(out: Path) -> dict[str, Any]:
    """Settings with which a download was begun, but for LIMITS; empty where none was."""
    path = out / "plan.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _hold_to_plan(out: Path, config: DownloadConfig) -> None:
    """Refuse to resume with settings under which keys would name other rows."""
    plan = config.model_dump(mode="json", exclude={*LIMITS})
    found = begun(out)
    if not found:
        write_aside(out / "plan.json", json.dumps(plan, indent=1))
        return
    found = {"columns": {}, **found}
    if changed := sorted(name for name in plan if found.get(name) != plan[name]):
        raise ValueError(
            f"{out} was begun with other settings ({', '.join(f'download.{n}' for n in changed)}); "
            "resume with those it was begun with (plan.json), or give another folder"
        )


def _parts(out: Path, config: DownloadConfig) -> list[Part]:
    """Every part of the lists, done or not."""
    rows = json.loads((out / "lists" / "index.json").read_text(encoding="utf-8"))["parts"]
    size = config.rows_per_shard
    parts = [Part(out, number, count, size) for number, count in enumerate(rows)]
    if len(parts) > 10**PART_DIGITS or any(p.num_shards > 10**SHARD_DIGITS for p in parts):
        raise ValueError(
            f"{len(parts)} parts, of which the largest has {max(p.num_shards for p in parts)} "
            f"shards: keys have room for {10**PART_DIGITS} and {10**SHARD_DIGITS}; raise "
            "download.rows_per_part or download.rows_per_shard"
        )
    return parts


@dataclass(frozen=True)
class Pace:
    """How much is done at once."""

    processes: int
    threads: int

    def halved(self) -> Pace | None:
        """The next slower one: fewer threads before fewer processes. None at the slowest."""
        if self.threads > 1:
            return replace(self, threads=self.threads // 2)
        return replace(self, processes=self.processes // 2) if self.processes > 1 else None


class _PartsProgress:
    """Progress over all parts, from the rows done of the present one."""

    def __init__(self, parts: list[Part], progress: Progress) -> None:
        self.total = sum(part.rows for part in parts)
        self.before = sum(part.rows for part in parts if part.fates.exists())
        self.progress = progress

    def __call__(self, rows: int) -> None:
        self.progress("downloading", self.before + rows, self.total)


def _collect_all(
    parts: list[Part], out: Path, config: DownloadConfig, pace: Pace, progress: _PartsProgress
) -> None:
    """Fetch the parts, one after the other."""
    with (
        _connections(out, config) as connect_to,
        _workshop(out) as folder,
        _local(folder, config) as local,
    ):
        settings = FetchSettings.of(config, connect_to, str(Path(local, "hosts.sqlite")))
        for part in parts:
            collector = _Collector(
                part, config, settings, folder, out / "img2dataset.log", progress
            )
            pace = collector.collect(pace)
            part.write_fates(collector.shelf.done)
            progress.before += part.rows


@contextmanager
def _connections(out: Path, config: DownloadConfig) -> Iterator[dict[str, str]]:
    """Hosts that are found elsewhere than their name says; the embedded source's is served here."""
    if config.source != "embedded":
        yield config.connect_to
        return
    with demo.serve(out / "site") as port:
        yield {**config.connect_to, demo.HOST: f"127.0.0.1:{port}"}


def _local(folder: Path, config: DownloadConfig) -> tempfile.TemporaryDirectory[str]:
    """A folder for what one machine's processes share: in `folder`, of which nothing stays after
    a kill, unless other machines see that too."""
    home = folder if config.distributor == "multiprocessing" else None
    return tempfile.TemporaryDirectory(prefix="hosts-", dir=home)


@contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """A folder for what the processes are given and show, gone when all is fetched."""
    folder = out / "work"
    rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder.resolve()
    rmtree(folder, ignore_errors=True)


@dataclass
class _Collector:
    """Runs img2dataset on one part until every shard is done."""

    part: Part
    config: DownloadConfig
    settings: FetchSettings
    folder: Path
    log: Path
    progress: Callable[[int], None]

    def __post_init__(self) -> None:
        self.shelf = Shelf(self.part)

    def collect(self, pace: Pace) -> Pace:
        """Returns the pace at which the last shard was done, which memory may have lowered."""
        self.shelf.clear()
        if self.shelf.missing:
            requests = self.folder / "requests.parquet"
            self.part.write_requests(requests, verify_hashes=self.config.verify_hashes)
        fruitless, trouble = 0, None
        while missing := self.shelf.missing:
            if fruitless == ATTEMPTS:
                raise self._incomplete(trouble)
            trouble = self._attempt(pace)
            broken = "; ".join(self.shelf.broken.values())
            if trouble := "; ".join(filter(None, [trouble, broken])) or None:
                self._say(f"part {self.part.name}: {trouble}; begun anew")
            self.shelf.clear()
            fruitless = 0 if self.shelf.missing < missing else fruitless + 1
            if self.shelf.missing and (trouble or "").startswith(TOO_MUCH_MEMORY):
                slower, fruitless = pace.halved(), 0
                if slower is None:
                    raise self._incomplete(f"{trouble}; raise download.max_memory_gb")
                pace = slower
                self._say(f"going on with {pace.processes} processes of {pace.threads} threads")
        return pace

    def _attempt(self, pace: Pace) -> str | None:
        """One run of img2dataset; why it was cut short, if it was."""
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        job = Job(
            requests=self.folder / "requests.parquet",
            images=self.part.images.resolve(),
            rows_per_shard=self.config.rows_per_shard,
            processes=pace.processes,
            threads=pace.threads,
            distributor=self.config.distributor,
            fetch=self.settings,
            pulses=Path(tempfile.mkdtemp(prefix="pulses-", dir=self.folder)),
            parent=os.getpid(),
        )
        with session(job, self.folder / "job.json", self.log) as processes:
            limits = {"stall_s": self.config.stall_s, "max_memory_gb": self.config.max_memory_gb}
            return self._watch(Watch(processes, job, **limits))

    def _watch(self, watch: Watch) -> str | None:
        """Report rows done until the processes end, or ail, and then why.

        Raises OSError (ENOSPC) when nothing grows because the disk is full.
        """
        before = None
        while watch.session.runs:
            time.sleep(TICK_S)
            grown = self.shelf.look()
            self.progress(grown[0])
            if grown == before and disk_usage(self.part.images).free < FULL_BYTES:
                # img2dataset logs a failed write and goes on; nobody would learn why.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.part.images))
            before = grown
            if not self.shelf.missing:
                watch.session.wait_briefly()
                return None
            if trouble := watch.trouble(grown):
                return trouble
        self.progress(self.shelf.look()[0])
        status = watch.session.process.poll()
        return f"img2dataset ended with status {status}" if self.shelf.missing else None

    def _incomplete(self, why: str | None) -> IncompleteDownloadError:
        done = {*self.shelf.done}
        first = next(n for n in range(self.part.num_shards) if n not in done)
        return IncompleteDownloadError(
            f"{self.shelf.missing} image shards of {self.part.images} are not done (first: "
            f"{self.part.shard(first).stem.name}): {why}; {self.log} says more; run again to "
            "fetch only these"
        )

    def _say(self, text: str) -> None:
        _log.warning(text)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%F %T')} {text}\n")


def _report(parts: list[Part], funnel: Funnel) -> Report:
    """Counts of all fates, from the summaries that the parts' fates carry."""
    whole = Summary()
    for part in parts:
        whole.add(Summary.load(part.fates))
    counts = dict(whole.fates.most_common())
    asked = rows = sum(counts.values())
    for name, count in counts.items():
        if name != "ok":
            rows -= count
            funnel = [*funnel, Step(name, count, rows)]
    metrics = {
        "listed": funnel[0].rows,
        "asked": asked,
        "ok": rows,
        "ok_share": rows / asked if asked else 0.0,
        "gigabytes": whole.num_bytes / 1e9,
    }
    details = {
        "failures_by_host": dict(whole.hosts.most_common(20)),
        "opt_outs": dict(whole.opt_outs.most_common()),
    }
    return Report(counts, funnel, {n: float(v) for n, v in metrics.items()}, details)
