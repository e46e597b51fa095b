"""The download stage, with the real img2dataset over real HTTP, and everything killed in turn."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.config import DownloadConfig
from data.download import parts, processes
from data.download import run as download
from data.layout import ImageShard, image_shards
from data.lists import metadata
from tests import forks

ROOT = Path(__file__).resolve().parents[2]
FATES = {
    "none": {"ok"},
    "wrong_caption": {"ok"},
    "missing": {"http_404"},
    "no_host": {"dns"},
    "opt_out": {"opt_out"},
    "robots": {"robots_txt"},
    "web_page": {"not_an_image"},
    "truncated": {"ok", "not_an_image"},  # a whole header passes; decoding finds out
    "small": {"ok"},
    "long": {"ok"},
    "sixteen_bit": {"ok"},
    "rotated": {"ok"},
    "duplicate_row": {"ok"},
    "same_bytes": {"ok"},
    "near_duplicate": {"ok"},
}


def test_each_planted_defect_ends_with_its_fate(downloaded):
    out, _ = downloaded
    truth = pq.read_table(out / "site" / "truth.parquet").to_pylist()
    kind = {(row["url"], row["caption"]): row["defect"] for row in truth}
    fates = defaultdict(set)
    for row in _fates(out):
        fates[kind[row["url"], row["caption"]]].add(row["fate"])
    assert set(fates) <= set(FATES)  # the other kinds never get past the metadata
    assert len(fates) > 10
    assert all(found <= FATES[defect] for defect, found in fates.items()), fates


def test_counts_add_up_from_listed_rows_to_pictures(downloaded):
    out, report = downloaded
    listed = sum(
        pq.read_metadata(out / "site" / f"{n}.parquet").num_rows for n in ("laion", "coyo")
    )
    assert report.funnel[0].rows == listed
    assert report.funnel[-1].rows == report.counts["ok"]
    assert sum(report.counts.values()) == sum(
        pq.read_metadata(path).num_rows for path in (out / "lists").glob("*.parquet")
    )
    assert sum(step.dropped for step in report.funnel) + report.counts["ok"] == listed
    assert json.loads((out / "report.json").read_text())["counts"] == report.counts
    opted_out = sum(report.counts.get(fate, 0) for fate in parts.OPT_OUTS)
    assert sum(report.details["opt_outs"].values()) == opted_out > 0


def test_the_tars_hold_exactly_the_pictures_that_are_ok(downloaded):
    out, report = downloaded
    keys = _keys_in_tars(out)
    ok = [row for row in _fates(out) if row["fate"] == "ok"]
    assert sorted(keys) == sorted(row["key"] for row in ok)
    assert all(row["sha256"] for row in ok)
    assert report.counts["ok"] == len(keys)


def test_fates_have_one_row_group_a_shard_and_enclosing_times(downloaded):
    out, _ = downloaded
    shards = list(image_shards(out))
    assert [shard.tar for shard in shards] == sorted(out.glob("images/*/*.tar"))
    for shard in shards:
        for row in shard.fates().to_pylist():
            assert row["key"].startswith(shard.name)
            assert row["asked_from"] <= row["asked_until"]


def test_running_again_fetches_nothing_even_with_other_limits(downloaded, config):
    out, report = downloaded
    before = {path: path.stat().st_mtime_ns for path in out.glob("images/*/*")}
    changed = config.model_copy(update={"retries": 3, "distributor": "ray", "stall_s": 77.0})
    assert download.run(out, changed) == report
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("images/*/*")}


def test_a_flipped_bit_is_fetched_again_when_every_byte_is_read(downloaded, config, tmp_path):
    out = shutil.copytree(downloaded[0], tmp_path / "out")
    shard = next(image_shards(out))
    with tarfile.open(shard.tar) as archive:
        place = archive.next().offset_data + 40
    data = bytearray(shard.tar.read_bytes())
    data[place] ^= 1
    shard.tar.write_bytes(data)
    told = {
        path: path.read_bytes() for path in out.rglob("*") if path.suffix in (".parquet", ".json")
    }
    report = download.run(out, config, verify=True)
    assert (report.metrics["damaged"], report.metrics["mended"]) == (1, 1)
    assert shard.tar.stat().st_size == len(data)
    assert _pictures(out) == _pictures(downloaded[0])
    assert {path: path.read_bytes() for path in told} == told
    assert {path.name for path in out.iterdir()} == {path.name for path in downloaded[0].iterdir()}
    assert download.run(out, config, verify=True).metrics["damaged"] == 0


def test_what_processes_of_one_machine_share_goes_with_the_work(tmp_path, config):
    with download._local(tmp_path, config) as folder:
        assert Path(folder).parent == tmp_path
    with download._local(tmp_path, config.model_copy(update={"distributor": "ray"})) as folder:
        assert Path(folder).parent != tmp_path  # each machine has its own


def test_another_shard_size_on_resume_is_refused(downloaded, config):
    out, _ = downloaded
    changed = config.model_copy(update={"rows_per_shard": 60})
    with pytest.raises(ValueError, match=r"begun with other settings \(download\.rows_per_shard\)"):
        download.run(out, changed)


def test_the_web_is_not_asked_without_a_contact(tmp_path):
    config = DownloadConfig(source="metadata", metadata=("rows.parquet",))
    with pytest.raises(ValueError, match=r"download\.contact is null"):
        download.run(tmp_path, config)


def test_a_standstill_shorter_than_a_fetch_is_refused():
    with pytest.raises(ValueError, match="one fetch may take twice total_deadline_s"):
        DownloadConfig(total_deadline_s=30, stall_s=60)


def test_more_shards_than_keys_can_number_are_refused(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "index.json").write_text('{"funnel": [], "parts": [3, 300001]}')
    with pytest.raises(ValueError, match="largest has 100001 shards: keys have room"):
        download._parts(tmp_path, DownloadConfig(rows_per_shard=3))


def test_a_slower_pace_has_fewer_threads_then_fewer_processes():
    pace, seen = download.Pace(3, 5), []
    while pace:
        seen.append((pace.processes, pace.threads))
        pace = pace.halved()
    assert seen == [(3, 5), (3, 2), (3, 1), (1, 1)]


@pytest.mark.parametrize("damage", ["cut tar", "other tar", "no table", "cut table", "no tar"])
def test_a_damaged_shard_is_not_done(downloaded, tmp_path, damage):
    shard, keys = _copied_shard(downloaded[0], tmp_path)
    assert parts.check(shard, keys).rows == len(keys)
    with pytest.raises(parts.DamagedShardError, match="rows were asked for"):
        parts.check(shard, keys[:-1])
    table = shard.stem.with_suffix(".parquet")
    match damage:
        case "cut tar":
            os.truncate(shard.tar, shard.tar.stat().st_size // 2)
        case "other tar":
            shutil.copy(downloaded[0] / "images" / "00000" / "00001.tar", shard.tar)
        case "no table":
            table.unlink()
        case "cut table":
            os.truncate(table, table.stat().st_size // 2)
        case "no tar":
            shard.tar.unlink()
    with pytest.raises(parts.DamagedShardError):
        parts.check(shard, keys)


def test_statistics_that_are_being_written_are_waited_for(downloaded, tmp_path):
    shard, keys = _copied_shard(downloaded[0], tmp_path)
    stats = shard.stem.with_name(f"{shard.stem.name}_stats.json")
    os.truncate(stats, stats.stat().st_size // 2)
    assert parts.check(shard, keys) is None


def test_sizes_of_a_tar_are_those_that_tarfile_reads(downloaded):
    tar = next(image_shards(downloaded[0])).tar
    with tarfile.open(tar) as archive:
        assert parts.sizes_in(tar) == {member.name: member.size for member in archive}


def test_an_error_that_is_not_of_our_fetch_is_an_alarm(downloaded, tmp_path):
    shard, keys = _copied_shard(downloaded[0], tmp_path)
    path = shard.stem.with_suffix(".parquet")
    results = pq.read_table(path)
    errors = [e and e.removeprefix(processes.VETTED) for e in results["error_message"].to_pylist()]
    place = results.schema.get_field_index("error_message")
    pq.write_table(results.set_column(place, "error_message", pa.array(errors)), path)
    listed = next(image_shards(downloaded[0])).fates()
    with pytest.raises(parts.UnvettedFetchError, match="not from our fetch"):
        parts.fates_of(shard, keys, listed)


def test_img2datasets_own_fetch_cannot_read_our_requests(site):
    script = (
        "import sys; from data.download import collect; own = collect.downloader.download_image\n"
        "for request in sys.argv[1:]: print(own((3, request), 5, None, None)[2])\n"
        "import pyarrow; pyarrow.array([1]); print('pandas' in sys.modules)\n"
    )
    direct = f"http://127.0.0.1:{site.port}/1.png"
    listed = pa.table(
        {"url": [direct] * 3, "md5": [None, "ab", "ab"], "sha256": [None, None, "cd"]}
    )
    asked = parts.requests(listed, True).to_pylist()
    assert asked == [f"- {direct}", f"md5:ab {direct}", f"sha256:cd {direct}"]
    assert parts.requests(listed, False).to_pylist() == [f"- {direct}"] * 3
    env = {**os.environ, processes.WITHOUT: " ".join(processes.UNUSED)}
    said = subprocess.run(
        [sys.executable, "-c", script, direct, *asked],
        check=True, env=env, cwd=ROOT, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    assert said[0] == "None"  # it fetches an address, even a private one
    assert all("unknown url type" in error for error in said[1:4])
    assert said[4:] == ["False"]
    assert not site.asked["/robots.txt"]


def test_a_worker_that_is_gone_without_leaving_counts_as_killed(tmp_path):
    script = (
        "import sys; from pathlib import Path; from data.download.processes import Pulse\n"
        "pulse = Pulse(Path(sys.argv[1])); pulse.begin(); pulse.beat()\n"
        "print('ready', flush=True); sys.stdin.read(); pulse.end(); pulse.leave()\n"
    )
    for leaves in (True, False):
        worker = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        assert worker.stdout.readline() == b"ready\n"
        assert [(sign.pid, sign.busy) for sign in processes.signs(tmp_path)] == [(worker.pid, True)]
        assert processes.killed(tmp_path) is None
        if not leaves:
            worker.kill()
        worker.communicate()
        assert (processes.killed(tmp_path) is None) == leaves


def test_memory_and_end_of_a_session_reach_its_grandchildren():
    script = (
        "import subprocess, sys, time\n"
        "child = 'import os, time; os.setpgrp(); held = bytes(range(256)) * 300_000; '\n"
        "child += 'print(1, flush=True); time.sleep(600)'\n"
        "subprocess.Popen([sys.executable, '-c', child]); time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], start_new_session=True, stdout=subprocess.PIPE
    )
    session = processes.Session(process)
    try:
        assert process.stdout.readline() == b"1\n"
        members = session.members()
        assert len(members) == 2
        assert 76_800_000 < session.memory() <= session.memory(1 << 40)
        members[-1].suspend()
    finally:
        session.end()
    assert session.members() == []


@pytest.mark.skipif(sys.platform != "linux", reason="threads are seen in Linux's /proc")
def test_a_session_has_a_member_until_the_last_of_its_threads_has_ended():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", forks.HEADLESS]
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        session = processes.Session(process)
        assert process.stdout.readline() == b"up\n"
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert [member.pid for member in session.members()] == [process.pid]
        assert session.memory() >= 0  # what it has is not told any more
        session.end()
        assert session.members() == []


def test_only_a_busy_worker_that_falls_silent_stands_still(tmp_path):
    watch = processes.Watch(
        SimpleNamespace(memory=lambda enough: 0),
        SimpleNamespace(distributor="multiprocessing", pulses=tmp_path),
        stall_s=0.2,
        max_memory_gb=1,
    )
    pulse = processes.Pulse(tmp_path)
    for rows in range(3):  # idle, while something grows
        assert watch.trouble(rows) is None
        time.sleep(0.15)
    pulse.begin()
    assert watch.trouble(3) is None
    time.sleep(0.3)
    assert "has answered no row" in watch.trouble(4)


# From here on with a site of its own


class Site:
    """Numbered pictures on a loopback port: each 7th is missing, each 11th a web page."""

    def __init__(self) -> None:
        self.pause_s = 0.0
        self.asked: Counter[str] = Counter()
        self.port = 0

    def url(self, number: int) -> str:
        return f"http://pictures.test/{number}.png"

    def fate(self, number: int) -> str:
        return "http_404" if number % 7 == 0 else "not_an_image" if number % 11 == 0 else "ok"

    def body(self, number: int) -> bytes:
        if self.fate(number) == "not_an_image":
            return b"<!doctype html>"
        stream = io.BytesIO()
        Image.new("RGB", (5, 3), (number % 256, number // 256, 7)).save(stream, "png")
        return stream.getvalue()

    def write_list(self, path: Path, rows: int, **columns: list[object]) -> None:
        numbers = range(rows)
        own = {"url": [self.url(n) for n in numbers], "caption": [f"picture {n}" for n in numbers]}
        pq.write_table(pa.table({**own, **columns}), path)

    def config(self, path: Path, **changes: object) -> DownloadConfig:
        return DownloadConfig(
            **{
                "source": "metadata",
                "metadata": (str(path),),
                "contact": "test@example.org",
                "connect_to": {"pictures.test": f"127.0.0.1:{self.port}"},
                "min_side": None,
                "max_aspect": None,
                "max_unsafe": None,
                "max_watermark": None,
                "min_caption_words": 1,
                "host_connections": 64,
                "rows_per_shard": 20,
                **changes,
            }
        )


@contextmanager
def _serving():
    """A site of its own until the block ends."""
    made = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name, _, suffix = self.path.strip("/").partition(".")
            number = int(name) if suffix == "png" else 0
            found = suffix == "png" and made.fate(number) != "http_404"
            made.asked[self.path] += 1
            if suffix == "png":
                time.sleep(made.pause_s)
            body = made.body(number) if found else b""
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture
def site():
    with _serving() as made:
        yield made


def _holds_every_row_once(out: Path, site: Site, rows: int) -> None:
    fates = _fates(out)
    assert Counter(row["url"] for row in fates) == Counter(map(site.url, range(rows)))
    assert [row["url"] for row in fates] == _listed(out)
    number = {site.url(n): n for n in range(rows)}
    assert all(row["fate"] == site.fate(number[row["url"]]) for row in fates)
    ok = {row["key"]: row for row in fates if row["fate"] == "ok"}
    pictures = _pictures(out)
    assert pictures.keys() == ok.keys()
    for key, body in pictures.items():
        assert body == site.body(number[ok[key]["url"]])
        assert hashlib.sha256(body).hexdigest() == ok[key]["sha256"]
    assert json.loads((out / "report.json").read_text())["counts"] == Counter(
        map(site.fate, range(rows))
    )


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory):
    """(site, its list, folder, settings, progress told) of two parts; no hash is asked for."""
    folder = tmp_path_factory.mktemp("parts")
    told: list[tuple[str, int, int]] = []
    with _serving() as site:
        site.write_list(folder / "rows.parquet", 50, md5=["0" * 32] * 50)
        config = site.config(folder / "rows.parquet", rows_per_part=30, verify_hashes=False)
        download.run(folder / "out", config, threads=8, progress=lambda *now: told.append(now))
        yield site, folder / "rows.parquet", folder / "out", config, told


@pytest.mark.slow
def test_many_parts_hold_the_rows_of_one_in_the_same_order(in_parts, tmp_path):
    site, rows, out, config, _ = in_parts
    _holds_every_row_once(out, site, 50)
    assert len(list(out.glob("fates/*.parquet"))) == 2
    whole = config.model_copy(update={"rows_per_part": 1000})
    metadata.prepare((str(rows),), tmp_path, whole)
    assert len(list(tmp_path.glob("lists/*.parquet"))) == 1
    assert [row["url"] for row in _fates(out)] == _listed(tmp_path)


@pytest.mark.slow
def test_progress_rises_to_all_rows_of_all_parts(in_parts):
    told = in_parts[-1]
    done = [done for what, done, total in told if what == "downloading"]
    assert done == sorted(done)
    assert told[-1] == ("downloading", 50, 50)


@pytest.mark.slow
def test_bytes_of_another_hash_are_taken_where_none_is_asked_for(in_parts):
    site, _, out, *_ = in_parts
    assert {row["url"]: row["fate"] for row in _fates(out)} == {
        site.url(n): site.fate(n) for n in range(50)
    }


@pytest.mark.slow
def test_bytes_of_another_hash_are_refused_by_a_worker_and_by_its_successor(site, tmp_path):
    md5 = [hashlib.md5(site.body(n)).hexdigest() for n in range(30)]
    md5[5], md5[6] = "0" * 32, None
    site.write_list(tmp_path / "rows.parquet", 30, md5=pa.array(md5, pa.string()))
    out = tmp_path / "out"
    download.run(out, site.config(tmp_path / "rows.parquet", rows_per_shard=5))
    fates = {row["url"]: row["fate"] for row in _fates(out)}
    assert fates == {site.url(n): "hash_mismatch" if n == 5 else site.fate(n) for n in range(30)}
    # img2dataset ends a worker after five shards, which is no trouble.
    assert len(list(image_shards(out))) == 6
    assert "begun anew" not in (out / "img2dataset.log").read_text()


@contextmanager
def _running(out: Path, config: DownloadConfig, **options: object):
    """The stage in a process of its own, once a shard more is done and others are in hand."""
    script = (
        "import json, sys; from pathlib import Path\n"
        "from data import config\n"
        "from data.download import run as download\n"
        "chosen = config.DownloadConfig.model_validate_json(sys.argv[2])\n"
        "download.run(Path(sys.argv[1]), chosen, **json.loads(sys.argv[3]))\n"
    )
    arguments = [str(out), config.model_dump_json(), json.dumps(options)]
    before = _done(out)
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=ROOT)
    try:
        _await(process, lambda: len(_done(out)) > len(before) and _busy(out))
        yield process
    finally:
        with_children = [process.pid, *(p.pid for p in _tree(process.pid))]
        for pid in reversed(with_children):
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _await(process: subprocess.Popen, claim):
    """What `claim()` returns once it is true, while a process runs."""
    end = time.monotonic() + 120
    while not (found := claim()):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < end, "nothing came of it in two minutes"
        time.sleep(0.02)
    return found


def _tree(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True) if psutil.pid_exists(pid) else []


def _busy(out: Path) -> list[int]:
    """Living workers with a shard in hand."""
    found = [int(path.stem.partition("@")[0]) for path in out.glob("work/pulses-*/*.busy")]
    return [pid for pid in found if _is_alive(pid)]


def _is_alive(pid: int) -> bool:
    """And no zombie, which a killed orphan is until the system sees to it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _done(out: Path) -> dict[str, int]:
    """When each finished shard was."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("images/*/*_stats.json")}


@pytest.mark.slow
def test_a_download_that_is_killed_twice_resumes_to_every_row_exactly_once(site, tmp_path):
    site.write_list(tmp_path / "rows.parquet", 180)
    site.pause_s = 0.05
    out, config = tmp_path / "out", site.config(tmp_path / "rows.parquet")
    done: dict[str, int] = {}
    for victim in ("the stage alone", "everything"):
        with _running(out, config, processes=2, threads=2) as process:
            tree = _tree(process.pid)
            process.kill()
            for child in tree if victim == "everything" else []:
                child.kill()
            process.wait()
            _, alive = psutil.wait_procs(tree, timeout=20)  # they notice by themselves
            assert not alive
        assert {name: _done(out)[name] for name in done} == done
        assert len(done) < len(_done(out)) < 9
        done = _done(out)
    site.pause_s = 0.0
    download.run(out, config, threads=4)
    _holds_every_row_once(out, site, 180)
    assert {name: _done(out)[name] for name in done} == done
    assert not list(out.glob("work")) + list(out.glob("images/*/_tmp"))


@pytest.mark.slow
def test_a_download_whose_processes_die_or_stand_still_ends_as_if_nothing_had_been(site, tmp_path):
    site.write_list(tmp_path / "rows.parquet", 200)
    site.pause_s = 0.05
    out = tmp_path / "out"
    config = site.config(tmp_path / "rows.parquet", total_deadline_s=4, stall_s=9)

    log = out / "img2dataset.log"
    with _running(out, config, processes=2, threads=2) as process:
        worker = _await(process, lambda: _busy(out))[0]
        os.kill(worker, signal.SIGKILL)
        _await(
            process,
            lambda: f"worker {worker}@" in (said := log.read_text()) and "was killed" in said,
        )
        (leader,) = _await(process, lambda: psutil.Process(process.pid).children())
        _await(process, lambda: _busy(out))
        leader.kill()
        _await(process, lambda: "ended with status -9" in log.read_text())
        os.kill(_await(process, lambda: _busy(out))[0], signal.SIGSTOP)
        assert process.wait(120) == 0
    assert "has answered no row" in log.read_text()
    _holds_every_row_once(out, site, 200)


@pytest.mark.slow
def test_too_much_memory_makes_it_go_on_with_fewer_threads(site, tmp_path, monkeypatch):
    site.write_list(tmp_path / "rows.parquet", 60)
    out = tmp_path / "out"
    readings = iter([5e9, 6e9])
    monkeypatch.setattr(processes.Session, "memory", lambda *_: next(readings, 1e9))
    download.run(out, site.config(tmp_path / "rows.parquet"), threads=8)
    assert json.loads((out / "plan.json").read_text())["rows_per_shard"] == 20
    said = (out / "img2dataset.log").read_text()
    assert "the processes use 5.00 GB, 4.00 allowed" in said
    assert "going on with 1 processes of 2 threads" in said
    _holds_every_row_once(out, site, 60)


@pytest.mark.slow
def test_memory_that_no_pace_can_save_is_an_error_with_a_remedy(site, tmp_path):
    site.write_list(tmp_path / "rows.parquet", 20)
    config = site.config(tmp_path / "rows.parquet", max_memory_gb=0.01)
    with pytest.raises(download.IncompleteDownloadError, match=r"raise download\.max_memory_gb"):
        download.run(tmp_path / "out", config, threads=1)


@pytest.mark.slow
def test_a_full_disk_is_said_to_be_one(site, tmp_path, monkeypatch):
    site.write_list(tmp_path / "rows.parquet", 20)
    monkeypatch.setattr(download, "disk_usage", lambda path: SimpleNamespace(free=4096))
    with pytest.raises(OSError, match="No space left") as caught:
        download.run(tmp_path / "out", site.config(tmp_path / "rows.parquet"))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.slow
@pytest.mark.parametrize("distributor", ["ray", "pyspark"])
def test_the_vetted_fetch_holds_wherever_the_work_is_carried(site, tmp_path, distributor):
    if find_spec(distributor) is None or (distributor == "pyspark" and not shutil.which("java")):
        pytest.skip(f"{distributor} is not installed")
    site.write_list(tmp_path / "rows.parquet", 60)
    config = site.config(tmp_path / "rows.parquet", distributor=distributor)
    download.run(tmp_path / "out", config, threads=4)
    _holds_every_row_once(tmp_path / "out", site, 60)
    assert site.asked["/robots.txt"] >= 1


def _fates(out: Path) -> list[dict[str, object]]:
    return [row for shard in image_shards(out) for row in shard.fates().to_pylist()]


def _listed(out: Path) -> list[str]:
    """The URLs of the lists, in their order."""
    tables = [pq.read_table(path) for path in sorted(out.glob("lists/*.parquet"))]
    return [url for table in tables for url in table["url"].to_pylist()]


def _pictures(out: Path) -> dict[str, bytes]:
    """Each picture by its key; none may come twice."""
    found: dict[str, bytes] = {}
    for shard in image_shards(out):
        with tarfile.open(shard.tar) as archive:
            for member in archive:
                key = shard.key(member.name)
                assert key not in found
                found[key] = archive.extractfile(member).read()
    return found


def _keys_in_tars(out: Path) -> list[str]:
    return list(_pictures(out))


def _copied_shard(out: Path, folder: Path) -> tuple[ImageShard, list[str]]:
    """The first shard of a download in a folder of its own, and img2dataset's keys of it."""
    first = next(image_shards(out))
    shard = ImageShard(folder, first.part, first.number)
    shard.stem.parent.mkdir(parents=True)
    for path in first.stem.parent.glob(f"{first.stem.name}*"):
        shutil.copy(path, shard.stem.parent)
    return shard, [
        key.removeprefix(f"{first.part:05d}") for key in first.fates()["key"].to_pylist()
    ]
