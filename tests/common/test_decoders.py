from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from gigagan.common.decoders import Decoders
from gigagan.common.pictures import UndecodableError, open_picture

HERE = Path(__file__).parent
sys.path += [
    str(HERE),
    str(HERE.parent / "data"),
]  # these processes import by name, and other packages are called `tests`
import bombs  # noqa: E402
import decoder_tasks as tasks  # noqa: E402


@pytest.fixture
def decoders():
    made = Decoders(seconds=0.4)
    yield made
    made.close()


def test_answers_and_errors_come_back_whatever_is_printed_meanwhile(decoders):
    assert decoders.run(tasks.doubled, bytes(70_000)) == bytes(140_000)
    with pytest.raises(UndecodableError, match=r"^truncated: ends early$") as caught:
        decoders.run(tasks.refused)
    assert caught.value.kind == "truncated"
    with pytest.raises(RuntimeError, match="UnsendableError: 1 and 2"):
        decoders.run(tasks.unsendable)


def test_one_process_serves_one_after_the_other(decoders):
    assert decoders.run(tasks.pid) == decoders.run(tasks.pid) != os.getpid()


@pytest.mark.parametrize(
    "bomb", [bombs.progressive_bomb(5600, 5600, 90), bombs.gif_of_comments(400_000)]
)
def test_a_picture_that_takes_too_long_is_refused_and_costs_no_other(decoders, bomb):
    assert len(bomb) < 1_000_000
    with pytest.raises(UndecodableError, match=r"^too slow: more than 0\.4 s of a processor"):
        decoders.run(open_picture, bomb)
    small = bombs.progressive_bomb(16, 24, 3)
    assert decoders.run(open_picture, small, at_least=8)[1:] == (16, 24)


def test_waiting_is_no_work(decoders):
    begin, end = decoders.run(tasks.held_alone, 0.9)
    assert end - begin >= 0.9


def test_a_crash_is_the_picture_s_fault_when_it_comes_again(decoders, tmp_path):
    with pytest.raises(UndecodableError, match=r"^broken: ends its decoder with SIGSEGV"):
        decoders.run(tasks.crash)
    assert decoders.run(tasks.crash, tmp_path / "once") == "decoded"


def test_a_process_that_ended_while_it_was_idle_is_replaced(decoders):
    first = decoders.run(tasks.pid)
    os.kill(first, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(first)], timeout=5)
    assert decoders.run(tasks.pid) != first


def test_a_process_that_ends_by_itself_is_no_fault_of_the_picture(decoders):
    with pytest.raises(RuntimeError, match="ended with status 3"):
        decoders.run(tasks.leave)


def test_great_pictures_are_decoded_one_at_a_time(decoders):
    with ThreadPoolExecutor(3) as pool:
        spans = sorted(pool.map(lambda _: decoders.run(tasks.held_alone, 0.2), range(3)))
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_no_more_run_at_once_than_are_allowed():
    few = Decoders(at_once=2)
    with ThreadPoolExecutor(5) as pool:
        pids = set(pool.map(lambda _: few.run(tasks.pid), range(20)))
    few.close()
    assert len(pids) <= 2


def test_the_processes_end_with_the_one_that_started_them():
    script = (
        "import time; from gigagan.common.decoders import Decoders; import decoder_tasks as tasks\n"
        "few = Decoders(); print(few.run(tasks.pid), flush=True); time.sleep(600)"
    )
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    parent = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, stdout=-1
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    end = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.02)
