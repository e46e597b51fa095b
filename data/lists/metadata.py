"""Any source's metadata → our lists: pre-filtered, without exact duplicates, in a seeded order.

    1. every list is scanned by itself: rows that pass go to lists/_scatter, sorted by digest
    2. digests are cut into as many equal ranges as parts are wanted; each gathers its rows
    3. the parts get their names, and lists/index.json is written last

The digest is of seed and URL. So rows of one URL meet in one part, rows of one host are spread over
all, and no step holds more than a part. Nothing here looks at a picture.
"""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from data.config import DownloadConfig
from data.executor import Backend, each
from data.layout import PART_DIGITS
from data.lists.prefilter import columns_of, reasons
from data.lists.scatter import GatherJob, ScanJob, commit, gather, opened, scan
from data.lists.sources import Source, absolute, find, fingerprint, is_there
from data.report import Funnel, Step
from data.schema import MetadataError
from gigagan.common.progress import Progress, silent

__all__ = ["fingerprint", "listed", "prepare"]

READ_BY_US = (
    *(
        "source",
        "columns",
        "allow_withdrawn",
        "unique",
        "max_rows",
        "seed",
        "rows_per_part",
        "min_side",
        "max_aspect",
    ),
    *("min_caption_words", "min_caption_chars", "max_unsafe", "max_watermark"),
    *("min_similarity_b32", "min_similarity_l14", "min_aesthetic"),
)
"""Settings that decide what the lists hold."""


def prepare(
    files: tuple[str, ...],
    out: Path,
    config: DownloadConfig,
    *,
    workers: int = 1,
    backend: Backend = "processes",
    progress: Progress = silent,
) -> Funnel:
    """Write `out/lists/PPPPP.parquet` (schema.LIST) and `index.json`; return the funnel.

    A second call returns the funnel at once; one after a kill does what is missing, and gives the
    same to the byte. While it works, the passing rows of all lists are on disk twice.

    Raises:
        MetadataError: a list that cannot be read, is withdrawn or lacks a column that a rule reads;
            no row left; or `out` has lists that were made with other settings or of other files.
    """
    lists = out.resolve() / "lists"
    if (lists / "index.json").exists():
        return _finished(lists, tuple(map(str, files)), config)
    sources = find(tuple(map(str, files)))
    for source in sources:  # before anything is written or read, so that a bad one is told at once
        columns_of(source, config)
    made_of = {"files": [s.absolute for s in sources], "contents": _contents(sources)}
    _hold_to_plan(lists, {**_settings(config), **made_of})
    scans = _scan_jobs(lists / "_scatter", sources, config)
    pool = _Workers(workers, backend)
    _scan_all(scans, pool, progress)
    try:
        funnel = _funnel(scans, config)
    except MetadataError:
        rmtree(lists)  # there is nothing to go on with
        raise
    gathers = _gather_all(scans, funnel[-1].rows, config, pool, progress)
    counts = [json.loads(job.done.read_text()) for job in gathers]
    rows, same = (sum(count[name] for count in counts) for name in ("rows", "same"))
    beyond = funnel[-1].rows - rows - same
    if beyond:
        funnel.append(Step("max_rows", beyond, rows + same))
    funnel.append(Step(f"same {config.unique}", same, rows))
    parts = _name_parts(lists, gathers)
    commit(
        lists / "index.json",
        {"funnel": funnel, "parts": parts, "settings": _settings(config), **made_of},
    )
    rmtree(lists / "_scatter")
    return funnel


def listed(out: Path) -> dict[str, Any]:
    """Settings under which `out` has its lists, if they are made of files of the user's."""
    path = out / "lists" / "index.json"
    index = _read_index(path) if path.exists() else {}
    settings: dict[str, Any] = index.get("settings", {})
    if settings.get("source") != "metadata":
        return {}
    return {**settings, "metadata": tuple(index["files"])}


class _Workers(NamedTuple):
    """Who works."""

    workers: int
    backend: Backend

    def each(
        self,
        function: Callable[..., Any],
        jobs: list[Any],
        setup: Callable[[int], Any] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        """executor.each, without starting workers that would have nothing to do."""
        workers = max(1, min(self.workers, len(jobs)))
        return each(function, jobs, workers=workers, backend=self.backend, setup=setup)


def _settings(config: DownloadConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", include={*READ_BY_US})


def _contents(sources: list[Source]) -> str:
    return fingerprint(tuple(source.path for source in sources))


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"funnel", "parts"} <= {*index}:
            raise ValueError("no funnel and parts in it")
    except (ValueError, TypeError) as error:
        raise MetadataError(
            f"{path} is not what `python -m data metadata` writes ({error}): use another folder"
        ) from error
    return index


def _finished(lists: Path, files: tuple[str, ...], config: DownloadConfig) -> Funnel:
    """The funnel of an earlier call, which must have been of the same."""
    index = _read_index(lists / "index.json")
    wanted = _settings(config)
    made = {"columns": {}, "source": config.source, **index.get("settings", wanted)}
    if changed := [f"{k} {made.get(k)} → {v}" for k, v in wanted.items() if made.get(k) != v]:
        raise MetadataError(
            f"{lists} was made with other settings of the download ({', '.join(changed)}); "
            "set them back, or use another folder"
        )
    if "files" in index and config.source == "metadata":  # the embedded source's are its settings'
        _demand_same(lists, files, index)
    rmtree(lists / "_scatter", ignore_errors=True)
    return [Step(*step) for step in index["funnel"]]


def _demand_same(lists: Path, files: tuple[str, ...], index: dict[str, Any]) -> None:
    """The content decides; files that are gone since are taken by their names."""
    made_of = index["files"]
    if all(fnmatch.filter(made_of, absolute(file)) and not is_there(file) for file in files):
        return
    sources = find(files)
    if _contents(sources) == index["contents"]:
        return
    theirs = [source.absolute for source in sources]
    what = "files of the same names with other contents" if theirs == made_of else _few(made_of)
    raise MetadataError(
        f"{lists} was made of {what}, and {_few(theirs)} would give other rows; name those lists, "
        "or use another folder"
    )


def _few(files: list[str]) -> str:
    """The first few names."""
    rest = len(files) - 3
    return ", ".join(files[:3]) + (f" and {rest:,} more" if rest > 0 else "")


def _hold_to_plan(lists: Path, wanted: dict[str, Any]) -> None:
    """Begin anew if what an unfinished call left is of other lists or settings."""
    plan = lists / "_scatter" / "plan.json"
    if plan.exists() and json.loads(plan.read_text(encoding="utf-8")) == wanted:
        return
    if not plan.parent.exists() and lists.exists() and (strange := next(lists.iterdir(), None)):
        raise MetadataError(
            f"{strange} is not ours, and lists are written to {lists}: give another folder than "
            f"{lists.parent}"
        )
    for part in lists.glob("[0-9]*.parquet"):  # moved before a kill
        part.unlink()
    rmtree(plan.parent, ignore_errors=True)
    plan.parent.mkdir(parents=True)
    commit(plan, wanted)


def _scan_jobs(folder: Path, sources: list[Source], config: DownloadConfig) -> list[ScanJob]:
    sizes = [source.size for source in sources]
    slices = [config.rows_per_part * size // max(1, sum(sizes)) for size in sizes]
    return [
        ScanJob(source, number, folder, config, rows)
        for number, (source, rows) in enumerate(zip(sources, slices, strict=True))
    ]


def _scan_all(jobs: list[ScanJob], pool: _Workers, progress: Progress) -> None:
    missing = [job for job in jobs if not job.done.exists()]
    done = len(jobs) - len(missing)
    progress("reading lists", done, len(jobs))
    for number, (_, problem) in enumerate(pool.each(scan, missing), done + 1):
        if problem:
            raise MetadataError(problem)
        progress("reading lists", number, len(jobs))


def _funnel(jobs: list[ScanJob], config: DownloadConfig) -> Funnel:
    """Steps up to the last rule; raises if that leaves nothing."""
    counts: Counter[str] = Counter()
    for job in jobs:
        counts.update(json.loads(job.done.read_text(encoding="utf-8")))
    left = counts.total()
    funnel: Funnel = [Step("listed", 0, left)]
    for reason, _ in reasons(config):
        left -= counts[reason]
        funnel.append(Step(reason, counts[reason], left))
    if left == 0:
        files = _few([job.source.path for job in jobs])
        if not funnel[0].rows:
            raise MetadataError(
                f"download.metadata: {files} has no rows: give lists that have some"
            )
        worst = max(funnel[1:], key=lambda step: step.dropped)
        raise MetadataError(
            f"no row of {files} is left to ask for; the rule {worst.step!r} dropped most "
            f"({worst.dropped} of {funnel[0].rows}): loosen it in `download`"
        )
    return funnel


def _gather_all(
    scans: list[ScanJob],
    passing: int,
    config: DownloadConfig,
    pool: _Workers,
    progress: Progress,
) -> list[GatherJob]:
    """As many leading parts as `max_rows` needs, all if it is null; the last is cut to fit."""
    folder = scans[0].folder
    count = -(-passing // config.rows_per_part)
    if count > 10**PART_DIGITS:
        raise MetadataError(
            f"{passing} rows make {count} parts, more than keys can number: "
            f"set download.rows_per_part to {-(-passing // 10**PART_DIGITS)} or more"
        )
    unique = ("url",) if config.unique == "url" else ("url", "caption")
    jobs = [GatherJob(number, count, folder, len(scans), unique) for number in range(count)]
    wanted = passing if config.max_rows is None else config.max_rows
    made, rows = 0, 0
    while made < count and rows < wanted:
        # Parts are near equal, so this many more will do, or else a few of the next round.
        more = min(count - made, max(1, -(-(wanted - rows) * count // passing)))
        _gather(jobs[made : made + more], made, pool, progress)
        for job in jobs[made : made + more]:
            rows_of_it = json.loads(job.done.read_text())["rows"]
            made += 1
            if rows + rows_of_it >= wanted and config.max_rows is not None:
                last = GatherJob(job.number, count, folder, len(scans), unique, wanted - rows)
                _gather([last], made - 1, pool, progress)
                return [*jobs[: made - 1], last]
            rows += rows_of_it
    return jobs


def _gather(jobs: list[GatherJob], before: int, pool: _Workers, progress: Progress) -> None:
    missing = [job for job in jobs if not job.done.exists()]
    done, total = before + len(jobs) - len(missing), before + len(jobs)
    progress("writing lists", done, total)
    setup = partial(opened, jobs[0].folder)
    for number, _ in enumerate(pool.each(gather, missing, setup), done + 1):
        progress("writing lists", number, total)


def _name_parts(lists: Path, jobs: list[GatherJob]) -> list[int]:
    """Give parts that have rows their names, in order; return those rows.

    What is not there any more was moved before a kill.
    """
    filled = [rows for job in jobs if (rows := json.loads(job.done.read_text())["rows"])]
    named = [job for job in jobs if json.loads(job.done.read_text())["rows"]]
    for number, (job, rows) in enumerate(zip(named, filled, strict=True)):
        target = lists / f"{number:0{PART_DIGITS}d}.parquet"
        if job.target.exists():
            job.target.replace(target)
        assert pq.read_metadata(target).num_rows == rows, f"{target} is not of this plan"
    return filled
