"""Child processes: output, exit status, termination, environment."""

import os
import signal
import subprocess
import sys
import time

import pytest

from flows.config import Resources
from flows.launch import LaunchError, command, environment, launch
from flows.stage import is_alive

INLINE = Resources()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module `child` that children can run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(source: str) -> list[str]:
        (tmp_path / "child.py").write_text(source)
        return ["child"]

    return write


def test_output_goes_to_the_callback_and_to_the_file(module, tmp_path):
    lines = []
    child = module("import sys; print('out', sys.argv[1:]); print('err', file=sys.stderr)")
    launch([*child, "--a", "1"], INLINE, log_file=tmp_path / "log", log=lines.append)
    assert sorted(lines) == ["err", "out ['--a', '1']"]
    assert (tmp_path / "log").read_text().splitlines() == lines


def test_a_second_attempt_appends_to_the_log(module, tmp_path):
    child = module("print('hello')")
    for _ in range(2):
        launch(child, INLINE, log_file=tmp_path / "log", log=str)
    assert (tmp_path / "log").read_text() == "hello\nhello\n"


def test_a_failure_brings_status_last_lines_and_log_file(module, tmp_path):
    child = module("print(*range(100), sep='\\n'); raise SystemExit(3)")
    with pytest.raises(LaunchError) as error:
        launch(child, INLINE, log_file=tmp_path / "log", log=str)
    text = str(error.value)
    assert "status 3" in text
    assert str(tmp_path / "log") in text
    assert text.endswith("  99")
    assert "  79" not in text


def test_a_training_that_was_asked_to_stop_is_not_called_a_failure(module, tmp_path):
    child = module("raise SystemExit(75)")
    with pytest.raises(LaunchError, match="asked to stop and has saved its state"):
        launch(child, INLINE, log_file=tmp_path / "log", log=str)


def test_a_signal_is_named(module, tmp_path):
    child = module("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(LaunchError, match="signal 9"):
        launch(child, INLINE, log_file=tmp_path / "log", log=str)


def test_an_exception_in_the_parent_ends_the_child(module, tmp_path):
    child = module("import os, time; print(os.getpid()); time.sleep(60)")
    pids = []

    def fail(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch(child, INLINE, log_file=tmp_path / "log", log=fail)
    assert time.monotonic() - before < 10
    assert not is_alive(pids[0])


def test_a_signal_to_the_group_reaches_the_child(module, tmp_path):
    child = module("import os, time; print(os.getpid(), os.getpgrp()); time.sleep(60)")
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from flows.config import Resources;"
            "from flows.launch import launch;"
            f"launch({child!r}, Resources(), log_file=Path({str(tmp_path / 'log')!r}))",
        ],
        env=environment(INLINE, {}),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pid, group = map(int, parent.stdout.readline().split())
    assert group == parent.pid
    os.killpg(group, signal.SIGTERM)
    parent.wait(10)
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_torchrun_is_one_node_with_that_many_processes():
    argv = command(["gigagan.training", "--x"], Resources(backend="torchrun", processes=3))
    assert argv[1:] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=3",
        "--max-restarts=3",
        "-m",
        "gigagan.training",
        "--x",
    ]


def test_ranks_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
    env = environment(Resources(backend="torchrun", processes=3, env={"A": "1"}), {"B": "2"})
    assert env["OMP_NUM_THREADS"] == "2"
    assert (env["A"], env["B"]) == ("1", "2")
    assert environment(Resources(threads=5), {})["OMP_NUM_THREADS"] == "5"


@pytest.mark.slow
def test_torchrun_starts_every_rank(module, tmp_path):
    lines = []
    # One write: both ranks share the pipe.
    child = module(
        "import os; os.write(1, f\"{os.environ['RANK']} {os.environ['WORLD_SIZE']}\\n\".encode())"
    )
    resources = Resources(backend="torchrun", processes=2)
    launch(child, resources, log_file=tmp_path / "log", log=lines.append)
    assert {"0 2", "1 2"} <= set(lines)
