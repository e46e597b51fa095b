"""Child processes: output, exit status, termination, environment."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.config import Resources
from flows.launch import LaunchError
from flows.launch.command import Job, Output, argv, environment
from flows.safety.processes import is_alive
from tests.flows.jobs import launch

INLINE = Resources(backend="inline")


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
            "from flows.launch import local; from flows.launch.command import Job, Output;"
            f"job = Job({child!r}, Resources(backend='inline'), Path({str(tmp_path / 'log')!r}));"
            "local.run(job, Output(print))",
        ],
        env=environment(Job([], INLINE, tmp_path / "log")),
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


def job(tmp_path=Path("/store/train-base/0123456789abcdef"), env=(), **resources):
    resources = Resources(**{"backend": "inline", **resources})
    return Job(["m", "--x"], resources, tmp_path / "log", dict(env))


def test_torchrun_is_one_node_with_that_many_processes():
    assert argv(job(backend="torchrun", processes=3))[1:] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=3",
        "--max-restarts=3",
        "--shutdown-timeout=120",
        "-m",
        "m",
        "--x",
    ]


def test_ranks_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
    env = environment(job(env={"B": "2"}, backend="torchrun", processes=3))
    assert env["OMP_NUM_THREADS"] == "2"
    assert env["B"] == "2"
    assert environment(job(threads=5))["OMP_NUM_THREADS"] == "5"


def test_every_attempt_at_an_output_has_the_same_name_and_port():
    assert job().name == "train-base-01234567"
    assert job().port == job(threads=5).port
    assert 20_000 <= job().port < 30_000
    assert job().port != job(Path("/store/train-base/1123456789abcdef")).port


@pytest.mark.parametrize("folder", ["/tmp/Über_x/Y.Z", "/1/2", "/a/b-"])
def test_a_name_is_a_dns_label(folder):
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", job(Path(folder)).name)


def test_facts_among_the_lines_are_for_programs():
    seen, lines = [], []
    output = Output(lines.append, lambda *said: seen.append(said))
    for line in [
        '{"hardware": "2 × cpu"}',
        "128/1,000 images  27.9/s",
        '{"progress": ["images", 128, 1000]}\n',
        '{"progress": ["pictures", 3, null]}',
        '{"progress": "a line of somebody else"}',
        '{"stopped": "preempted"}',
    ]:
        output.take(line)
    assert seen == [("images", 128, 1000), ("pictures", 3, None)]
    assert lines == ["128/1,000 images  27.9/s", '{"progress": "a line of somebody else"}']
    assert list(output.tail) == lines
    assert output.has_saved


def test_the_last_words_are_those_before_the_report_of_torchrun():
    output = Output(str)
    for line in ["before", "ValueError: no such shards"]:
        output.take(line)
    output.take("E1123 23:58:34.1 7 torch/distributed/elastic/x.py:874] failed (exitcode: 1)")
    for number in range(40):
        output.take(f"report {number}")
    text = str(output.error(job(), "exited with status 1"))
    assert text.endswith("  before\n  ValueError: no such shards")


@pytest.mark.slow
def test_under_torchrun_too_a_training_that_saved_is_not_called_a_failure(module, tmp_path):
    child = module(
        "import os, signal, sys, time\n"
        "def stop(*_):\n"
        '    os.write(1, b\'{"stopped": "preempted"}\\n\')\n'
        "    os._exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "os.write(1, f'ready {os.getppid()}\\n'.encode())\n"
        "time.sleep(60)\n"
    )

    def stop(line: str) -> None:
        if line.startswith("ready"):
            os.kill(int(line.split()[1]), signal.SIGTERM)

    with pytest.raises(LaunchError, match="asked to stop and has saved its state"):
        launch(child, Resources(backend="torchrun"), log_file=tmp_path / "log", log=stop)


def test_a_backend_is_imported_when_it_is_used():
    code = (
        "import flows.launch, flows.launch.slurm, sys;"
        "print([name for name in ('kubernetes', 'torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
