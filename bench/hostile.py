"""Many rows over a hostile site through download, score and filter, killed on the way.

Three lists in the columns of Re-LAION, COYO and DataComp name good and hostile pages of
tests/data/hostile.py, with planted duplicates, nulls, wrong hashes and listed defects. The pipeline
is killed once in each stage and begun again. In the end every listed row must be in exactly one
place, and the memory of all its processes is reported.

    python -m bench.hostile --rows 100000
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from hashlib import md5, sha256
from pathlib import Path
from types import ModuleType

import imagehash
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "tests" / "data" / "hostile.py"
HOSTS = 200
SHARDS = 100
"""About as many image shards, whatever the number of rows, unless they were too small."""
ROWS_PER_SHARD = 10
"""A shard has at least as many."""
GOOD = 0.86
"""Share of the rows that name a good page."""
PLANTED = ("duplicate", "null_size", "small", "unsafe", "wrong_hash", "no_caption")
SOURCES = ("relaion", "coyo", "datacomp")
STAGES = ("download", "score", "filter")
Row = dict[str, object]


def site() -> ModuleType:
    """The hostile site's module, which lies among the tests."""
    spec = importlib.util.spec_from_file_location("hostile", SITE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hostile"] = module
    spec.loader.exec_module(module)
    return module


# ---- the lists ---------------------------------------------------------------------------------


def write_lists(folder: Path, num_rows: int, seed: int) -> None:
    """`relaion.parquet`, `coyo.parquet`, `datacomp.parquet`, and `truth.parquet` with each plan."""
    rng = np.random.default_rng(seed)
    pages = site().PAGES
    hostile = sorted(path for path in pages if not path.startswith("/good/"))
    plans: list[Row] = []
    while len(plans) < num_rows:
        number = len(plans)
        is_good = rng.random() < GOOD
        path = f"/good/{number}.{rng.choice(['jpg', 'png', 'webp'])}"
        path = path if is_good else _address(str(rng.choice(hostile)), number)
        plant = str(rng.choice(PLANTED)) if is_good and rng.random() < 0.12 else "none"
        plan: Row = {
            "url": f"http://host-{rng.integers(HOSTS):03d}.test{path}",
            "caption": f"a picture of thing {number} on a plain background",
            "path": path,
            "plant": plant,
            "source": str(rng.choice(SOURCES)),
        }
        plans.append(plan)
        if plant == "duplicate" and len(plans) < num_rows:
            plans.append(plan | {"caption": f"thing {number} once more, seen elsewhere"})
    with ProcessPoolExecutor(2) as pool:
        facts = pool.map(_facts, [str(plan["path"]) for plan in plans], chunksize=500)
    plans = [_listed(plan, fact) for plan, fact in zip(plans, facts, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    for source, table in _tables(plans).items():
        pq.write_table(table, folder / f"{source}.parquet")
    truth = [{k: row[k] for k in ("url", "caption", "path", "plant")} for row in plans]
    pq.write_table(pa.Table.from_pylist(truth), folder / "truth.parquet")


def _address(page: str, number: int) -> str:
    """A page's path, made one of its own by a number."""
    return f"{page}{number}.png" if page.endswith("/") and page != "/" else f"{page}?{number}"


def _page(path: str) -> str:
    """The page that a path leads to."""
    bare = path.partition("?")[0]
    return bare if bare in _SITE.PAGES else bare[: bare.rfind("/") + 1]


def _facts(path: str) -> tuple[str, str, str, int, int] | None:
    """md5, sha256, perceptual hash and size of a good page's picture."""
    if not path.startswith("/good/"):
        return None
    codec = _SITE.CODECS[path.rpartition(".")[2]]
    body = _SITE.encoded(_SITE.picture(_SITE.number_of(path)), codec)
    with Image.open(io.BytesIO(body)) as image:
        seen = image.convert("RGB")
        return (
            md5(body).hexdigest(),
            sha256(body).hexdigest(),
            str(imagehash.phash(seen)),
            *seen.size,
        )


_SITE = site()


def _listed(plan: Row, fact: tuple[str, str, str, int, int] | None) -> Row:
    """A row with what its list says of the picture, planted lies among it."""
    plant = plan["plant"]
    digest, sha, phash, width, height = fact or (None, None, None, 256, 256)
    if plant == "wrong_hash":
        digest, sha, phash = "0" * 32, "0" * 64, f"{int(str(phash), 16) ^ (2**64 - 1):016x}"
    return plan | {
        "md5": digest,
        "sha256": sha,
        "phash": phash,
        "width": None if plant == "null_size" else 20 if plant == "small" else width,
        "height": height,
        "unsafe": 0.97 if plant == "unsafe" else 0.02,
        "watermark": 0.01,
        "caption": None if plant == "no_caption" else plan["caption"],
    }


def _tables(rows: Sequence[Row]) -> dict[str, pa.Table]:
    """The three lists in their sources' columns."""
    names = {
        "relaion": {
            "url": "url", "caption": "caption", "original_width": "width",
            "original_height": "height", "md5": "md5", "punsafe": "unsafe",
            "pwatermark": "watermark",
        },
        "coyo": {
            "url": "url", "text": "caption", "width": "width", "height": "height",
            "image_phash": "phash", "nsfw_score_opennsfw2": "unsafe",
            "watermark_score": "watermark",
        },
        "datacomp": {
            "url": "url", "text": "caption", "original_width": "width",
            "original_height": "height", "sha256": "sha256",
            # DataComp ships neither, and the rules on them ask for both.
            "punsafe": "unsafe", "pwatermark": "watermark",
        },
    }  # fmt: skip
    tables = {}
    for source, columns in names.items():
        own = [row for row in rows if row["source"] == source]
        tables[source] = pa.table(
            {theirs: [row[ours] for row in own] for theirs, ours in columns.items()}
        )
    return tables


# ---- running and killing -----------------------------------------------------------------------


class Memory:
    """Proportional memory of a process and all its descendants, its peak since the start."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._process = psutil.Process(pid)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._is_over.wait(0.5):
            total = 0
            with contextlib.suppress(psutil.Error):
                for process in [self._process, *self._process.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        total += process.memory_full_info().pss
            self.peak = max(self.peak, total)

    def stop(self) -> int:
        """End watching; the peak in bytes."""
        self._is_over.set()
        self._thread.join()
        return self.peak


@contextlib.contextmanager
def serving(port: int) -> Iterator[None]:
    """The site in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, str(SITE), "--port", str(port)], stdout=subprocess.DEVNULL
    )
    try:
        time.sleep(2)
        yield
    finally:
        process.kill()
        process.wait()


def command(store: Path, lists: Path, port: int, rows: int, arguments: Sequence[str]) -> list[str]:
    """The pipeline's first three stages over the lists."""
    hosts = {f"host-{i:03d}.test": f"127.0.0.1:{port}" for i in range(HOSTS)}
    sources = [str(lists / f"{name}.parquet") for name in SOURCES]
    settings = {
        "download.source": "metadata",
        "download.metadata": sources,
        "download.connect_to": hosts,
        "download.contact": "bench@example.org",
        "download.rows_per_shard": rows_per_shard(rows),
        "download.rows_per_part": max(ROWS_PER_SHARD, 3 * rows // 10),
        "download.timeout_s": 2,
        "download.total_deadline_s": 6,
        "download.host_connections": 64,
        "download.stall_s": 60,
        "score.take_over": ["unsafe", "watermark"],
        "score.nsfw": None,
        **{f"resources.{stage}.processes": 2 for stage in STAGES},
        "filter.min_similarity": None,
        "filter.min_side": 32,
        "filter.resolutions": [32, 64],
        "filter.samples_per_shard": rows_per_shard(rows),
    }
    run = [sys.executable, "-m", "flows", "run", "--preset", "smoke", "--store", str(store)]
    run += ["--stages", *STAGES]
    for key, value in settings.items():
        run += ["--set", f"{key}={json.dumps(value)}"]
    return [*run, *arguments]


def rows_per_shard(rows: int) -> int:
    """Rows of an image shard, and samples of a training shard."""
    return max(ROWS_PER_SHARD, rows // SHARDS)


def run_and_kill(
    argv: Sequence[str], store: Path, log: Path, shards: int
) -> list[dict[str, object]]:
    """Begin again after a kill in each stage; what was killed where, and each attempt's peak."""
    attempts: list[dict[str, object]] = []
    for stage in (*STAGES, None):
        with log.open("ab") as sink:
            process = subprocess.Popen(
                argv, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
            )
        memory, begun = Memory(process.pid), time.monotonic()
        try:
            while process.poll() is None and not _is_amid(stage, store, shards):
                time.sleep(0.2)
            was_running = process.poll() is None
            if was_running and stage != "score":  # there only the parent: its children must notice
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            status = process.wait()
        finally:
            peak = memory.stop()
        took = time.monotonic() - begun
        attempts.append({"killed_in": stage if was_running else None, "status": status})
        attempts[-1] |= {"peak_gb": round(peak / 1e9, 2), "seconds": round(took)}
        print(attempts[-1], flush=True)
        time.sleep(3)  # what must end by itself has time to
    if attempts[-1]["status"] != 0:
        raise SystemExit(f"the last attempt failed; see {log}")
    return attempts


MARKS = {
    "download": "download/*/images/*/*_stats.json",
    "score": "score/*/scores/*/*.parquet",
    "filter": "filter/*/shards/*/*.tar",
}
"""Files that a stage writes one after another, below the store."""


def _is_amid(stage: str | None, store: Path, shards: int) -> bool:
    """Whether a stage has got well under way."""
    if stage is None or (stage == "download" and not store.is_dir()):
        return False
    return sum(1 for _ in store.glob(MARKS[stage])) >= max(1, AMID[stage] * shards)


AMID = {"download": 0.3, "score": 0.3, "filter": 0.1}
"""Share of the shards after which a stage is killed."""


# ---- the account -------------------------------------------------------------------------------


def account(store: Path, lists: Path) -> dict[str, object]:
    """Follow every listed row to its end; raises where one is lost or counted twice."""
    manifests = [next((store / stage).glob("*/manifest.json")) for stage in STAGES]
    download, score, filtered = (manifest.parent for manifest in manifests)
    listed = sum(pq.read_metadata(lists / f"{name}.parquet").num_rows for name in SOURCES)
    report = json.loads((download / "report.json").read_text())
    steps = report["funnel"]
    _same("listed rows", listed, steps[0]["rows"])
    _same("the funnel's end", listed - sum(s["dropped"] for s in steps), report["counts"]["ok"])

    fates = ds.dataset(download / "fates").to_table(columns=["key", "url", "fate"])
    keys = fates["key"].to_pylist()
    _same("distinct keys of fates", len(keys), len({*keys}))
    _same("distinct addresses", len(keys), len({*fates["url"].to_pylist()}))
    ok = {k for k, fate in zip(keys, fates["fate"].to_pylist(), strict=True) if fate == "ok"}
    members = [key for tar in download.glob("images/*/*.tar") for key in _members(tar)]
    _same("pictures in tars", Counter(members), Counter(ok))
    scored = ds.dataset(score / "scores").to_table(columns=["key"])["key"].to_pylist()
    _same("scored pictures", Counter(scored), Counter(ok))
    verdicts = pq.read_table(filtered / "verdicts.parquet")
    _same("verdicts", Counter(verdicts["key"].to_pylist()), Counter(ok))
    pairs = zip(*(verdicts[name].to_pylist() for name in ("key", "verdict")), strict=True)
    kept = {key for key, verdict in pairs if verdict == "ok"}
    for folder in (filtered / "shards").iterdir():
        samples = [key for tar in folder.glob("*.tar") for key in _training_keys(tar)]
        _same(f"samples at {folder.name} px", Counter(samples), Counter(kept))
    _as_planned(fates, lists)
    return {
        "listed": listed,
        "dropped before the download": listed - len(keys),
        "asked": len(keys),
        "fates": report["counts"],
        "verdicts": dict(Counter(verdicts["verdict"].to_pylist()).most_common()),
    }


def _same(what: str, first: object, second: object) -> None:
    if first != second:
        raise SystemExit(f"{what} do not add up: {str(first)[:200]} against {str(second)[:200]}")


def _members(tar: Path) -> Iterator[str]:
    with tarfile.open(tar) as archive:
        for name in archive.getnames():
            if name.endswith(".jpg"):
                yield tar.parent.name + name.removesuffix(".jpg")


def _training_keys(tar: Path) -> Iterator[str]:
    with tarfile.open(tar) as archive:
        yield from (n.removesuffix(".txt") for n in archive.getnames() if n.endswith(".txt"))


def _as_planned(fates: pa.Table, lists: Path) -> None:
    """Each page's rows must have met the fate that the page's author gives it."""
    truth = {row["url"]: row for row in pq.read_table(lists / "truth.parquet").to_pylist()}
    pages = _SITE.PAGES
    wrong: Counter[tuple[str, str]] = Counter()
    for url, fate in zip(fates["url"].to_pylist(), fates["fate"].to_pylist(), strict=True):
        plan = truth[url]
        page = _page(plan["path"])
        expected = {pages[page][0]}
        if plan["plant"] == "wrong_hash":
            expected = {"hash_mismatch", "ok"}  # COYO has only a perceptual hash
        if fate not in expected:
            wrong[page, fate] += 1
    print("fates other than the pages' own:", dict(wrong) or "none", flush=True)


def main() -> None:
    """Write the lists, run, kill, account."""
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "hostile")
    parser.add_argument("--port", type=int, default=8931)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", help="further arguments of `python -m flows run`")
    arguments = parser.parse_args()
    lists, store = arguments.out / "lists", arguments.out / "store"
    if not (lists / "truth.parquet").exists():
        write_lists(lists, arguments.rows, arguments.seed)
    argv = command(store, lists, arguments.port, arguments.rows, arguments.settings)
    with serving(arguments.port):
        shards = arguments.rows // rows_per_shard(arguments.rows)
        attempts = run_and_kill(argv, store, arguments.out / "run.log", shards)
    result = {"rows": arguments.rows, "attempts": attempts, **account(store, lists)}
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
