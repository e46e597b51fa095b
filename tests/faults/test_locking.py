"""Of two commands that write one folder the second waits, however the first ends."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

import data.__main__ as command
from data import coco
from data.download.processes import LOCK, only_writer
from data.look import inspect
from data.schema import SCORES

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from data.download.processes import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
    Path(sys.argv[1], "written").touch()
"""


def hold(out: Path, seconds: float) -> subprocess.Popen:
    """A process that writes a folder for a while."""
    arguments = [sys.executable, "-c", HOLD, str(out), str(seconds)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def is_locked(lock: Path) -> bool:
    """Whether somebody has this lock."""
    if not lock.exists():
        return False
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_the_second_waits_and_says_for_whom(tmp_path, capsys):
    out = tmp_path / "out"
    with hold(out, 1.5) as first, only_writer(out):
        assert (out / "written").exists()
    said = capsys.readouterr().err
    assert said.startswith(f"{out} is being written by process {first.pid} on ")
    assert said.endswith(": waiting\n")
    assert not (out / LOCK).exists()


def test_one_that_was_killed_holds_nobody_up(tmp_path, capsys):
    with hold(tmp_path, 100) as first:
        first.kill()
    with only_writer(tmp_path):
        pass
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_of_many_never_two_write(tmp_path):
    inside, most = [], []

    def write() -> None:
        for _ in range(20):
            with only_writer(tmp_path):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=write) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 100


def test_other_folders_and_other_files_do_not_wait(tmp_path):
    with (
        only_writer(tmp_path),
        only_writer(tmp_path / "below"),
        only_writer(tmp_path / "a.png", is_file=True),
        only_writer(tmp_path / "b.png", is_file=True),
    ):
        assert is_locked(tmp_path / LOCK)


@pytest.mark.parametrize(
    ("arguments", "function"),
    [
        (["metadata", "OUT", "a.parquet"], "lists.metadata.prepare"),
        (["download", "OUT"], "download.run.run"),
        (["score", "OUT", "--download", "d", "--encoders", "json:dumps"], "score.run.run"),
        (["filter", "OUT", "--scores", "s", "--download", "d"], "filter.run.run"),
        (["shards", "OUT", "--download", "d", "--kept", "KEPT"], "shards.write.write"),
        (["coco", "fetch", "OUT"], "coco.fetch"),
    ],
)
def test_every_step_holds_its_folder_while_it_writes(tmp_path, monkeypatch, arguments, function):
    module, name = function.rsplit(".", 1)
    held = []

    def work(*_, **__):
        held.append(is_locked(tmp_path / "new" / LOCK))
        raise ValueError("enough")

    stand_in = SimpleNamespace(**{name: work}, BASE_URL="", begun=lambda out: {})
    monkeypatch.setitem(sys.modules, f"data.{module}", stand_in)
    monkeypatch.setattr(f"data.{module}", stand_in, raising=False)
    pq.write_table(SCORES.empty_table(), tmp_path / "kept.parquet")
    paths = {"OUT": str(tmp_path / "new"), "KEPT": str(tmp_path / "kept.parquet")}
    given = [paths.get(word, word) for word in arguments]
    assert command.main(given) == 1
    assert held == [True]
    assert not (tmp_path / "new").exists()


def test_commands_that_write_one_file_hold_it(tmp_path, monkeypatch):
    held = []

    def write(*arguments, **settings):
        out = settings.get("sheet") or arguments[-1]
        held.append(is_locked(out.with_name(f".{out.name}{LOCK}")))
        raise ValueError("enough")

    monkeypatch.setattr(inspect, "look", write)
    chosen = SimpleNamespace(write=write)
    monkeypatch.setattr(coco, "evaluation_captions", lambda *_: chosen)
    monkeypatch.setattr(coco, "write_heldout", write)
    out = str(tmp_path / "file")
    assert command.main(["inspect", "s.tar", "--out", out]) == 1
    assert command.main(["coco", "captions", "c.json", "--out", out]) == 1
    assert command.main(["coco", "captions", "c.json", "--heldout", out]) == 1
    assert held == [True, True, True]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_downloads_into_one_folder_both_end_well(tmp_path):
    out = tmp_path / "out"
    small = "{max_concepts: 12, pictures_per_style: 1, size_px: 64, unseen_concepts: 3}"
    words = ["--set", f"embedded={small}", "--set", "rows_per_shard=70"]
    start = [sys.executable, "-m", "data", "download", str(out), *words]
    first = subprocess.Popen(start, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (out / LOCK).exists():
        assert first.poll() is None
        time.sleep(0.05)
    second = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.wait() == 0, first.stderr.read()
    first.stderr.close()
    assert second.returncode == 0, second.stderr
    assert f"is being written by process {first.pid}" in second.stderr
