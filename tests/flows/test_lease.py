"""One writer at a time: on a folder and on S3, between threads and processes that are killed."""

import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import threading
import time

import psutil
import pytest

from flows.safety import processes
from flows.stage import BusyError
from flows.storage.lease import Holder, Lease, LocalBoard, holder
from flows.storage.objects import Remote, RemoteBoard
from tests import forks
from tests.flows.conftest import wait_for


@pytest.fixture(params=["folder", "s3"])
def board(request, tmp_path):
    """The files of a lease, on each kind of store."""
    if request.param == "folder":
        return LocalBoard(tmp_path / "lease")
    url = f"s3://{request.getfixturevalue('s3').bucket()}/store"
    return RemoteBoard(Remote(url).below("lease"))


def other(**changes) -> Holder:
    """A holder on another machine that is silent from now on."""
    return Holder.me().model_copy(update={"host": "elsewhere", "space": "elsewhere", **changes})


def leave(board, there: Holder, number: int = 1) -> None:
    assert board.create(number, there.model_dump_json().encode())


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_released_lease_is_free_for_the_next_one_and_numbers_are_not_used_again(board):
    for number in (1, 2, 3):
        lease = Lease(board, "x", stale_s=60.0)
        lease.acquire()
        assert board.newest() == number
        assert holder(board).pid == os.getpid()
        lease.release()
        assert holder(board) is None


def test_who_comes_second_says_whom_it_waits_for_and_gets_it_after_release(board):
    first, second, said = Lease(board, "the output", stale_s=60.0), None, []
    first.acquire()

    def tell(message: str) -> None:
        said.append(message)
        threading.Timer(0.2, first.release).start()

    second = Lease(board, "the output", stale_s=3.0, on_wait=tell)
    second.acquire()
    (message,) = said
    assert "the output" in message
    assert f"process {os.getpid()} on " in message
    second.release()


def test_waiting_is_said_again_now_and_then(board, monkeypatch):
    monkeypatch.setattr("flows.storage.lease.TELL_EVERY_S", 0.1)
    leave(board, other())
    said = []
    lease = Lease(board, "x", stale_s=1.5, on_wait=said.append)
    lease.acquire()
    lease.release()
    assert len(said) >= 2
    assert "on elsewhere since" in said[0]


def test_a_holder_that_died_here_is_replaced_at_once(board):
    leave(board, other(space=processes.here(), pid=dead_pid()))
    lease = Lease(board, "x", stale_s=3600.0)
    lease.acquire()
    lease.release()


def test_a_later_process_with_the_number_of_the_dead_holder_is_not_taken_for_it(board):
    ticks = processes.start_ticks() - 1000
    leave(board, other(space=processes.here(), pid=os.getpid(), start_ticks=ticks))
    lease = Lease(board, "x", stale_s=3600.0)
    lease.acquire()
    lease.release()


@pytest.mark.parametrize("step_s", [-3600, -30, 2, 5, 3600])
def test_a_holder_lives_on_when_the_clock_is_set(board, monkeypatch, step_s):
    leave(board, Holder.me())
    clock = psutil._pslinux.boot_time
    before = psutil.Process().create_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: clock() + step_s)
    assert psutil.Process().create_time() == pytest.approx(before + step_s, abs=0.5)
    assert holder(board).pid == os.getpid()
    with pytest.raises(BusyError, match="is being written by process"):
        Lease(board, "x", stale_s=3600.0).acquire(wait=False)


def test_a_holder_that_does_not_say_when_it_started_is_told_by_its_number_alone(board):
    leave(board, other(space=processes.here(), pid=os.getpid(), start_ticks=None))
    assert holder(board).pid == os.getpid()
    leave(board, other(space=processes.here(), pid=dead_pid(), start_ticks=None), 2)
    assert holder(board) is None


def test_a_process_number_of_another_container_says_nothing_here(board):
    leave(board, other(pid=dead_pid()))
    with pytest.raises(AssertionError, match="waits"):
        Lease(board, "x", stale_s=3600.0, on_wait=refuse_to_wait).acquire()


def refuse_to_wait(message: str) -> None:
    raise AssertionError("waits")


def test_a_holder_elsewhere_is_replaced_when_its_heart_stands_still(board):
    leave(board, other())
    lease = Lease(board, "x", stale_s=0.5)
    lease.acquire()
    assert board.newest() == 2
    lease.release()


def test_a_holder_whose_heart_beats_is_waited_for_longer_than_silence_would_be(board):
    beating = Lease(board, "x", stale_s=0.6)
    beating._me = other()
    beating.acquire()
    said = []
    with pytest.raises(BusyError, match="on elsewhere"):
        Lease(board, "x", stale_s=2.0, on_wait=said.append).acquire(wait=False)
    assert not beating.is_lost
    beating.release()


@pytest.mark.parametrize("body", [b"", b"{", b'{"pid": 1}', b"null"])
def test_a_file_that_says_nothing_counts_as_a_silent_holder(board, body):
    assert board.create(1, body)
    lease = Lease(board, "x", stale_s=0.5)
    lease.acquire()
    assert board.newest() == 2
    lease.release()


def test_an_interrupt_ends_the_wait_and_leaves_the_lease_to_its_holder(board):
    leave(board, other())

    def interrupt(message: str) -> None:
        raise KeyboardInterrupt

    waiting = Lease(board, "x", stale_s=3600.0, on_wait=interrupt)
    with pytest.raises(KeyboardInterrupt):
        waiting.acquire()
    waiting.release()
    assert holder(board).host == "elsewhere"


def test_a_holder_that_was_replaced_does_not_commit_and_its_work_is_ended(board):
    lease = Lease(board, "x", stale_s=1.2)
    lease.acquire()
    lease.check()
    calls = []
    report = lease.watched(lambda *call: calls.append(call))
    report("images", 1, 2)
    leave(board, other(), board.newest() + 1)
    deadline = time.monotonic() + 20
    while not lease.is_lost and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(BusyError, match="taken over"):
        report("images", 2, 2)
    with pytest.raises(BusyError, match="taken over"):
        lease.check()
    assert calls == [("images", 1, 2)]
    lease.release()
    assert holder(board).host == "elsewhere"


def test_a_replaced_holder_is_found_out_at_commit_even_before_its_next_beat(board):
    lease = Lease(board, "x", stale_s=3600.0)
    lease.acquire()
    leave(board, other(), 2)
    with pytest.raises(BusyError, match="taken over"):
        lease.check()
    lease.release()


def test_a_creation_whose_answer_was_lost_is_known_as_ones_own(board, monkeypatch):
    create = board.create

    def deaf(number: int, body: bytes) -> bool:
        create(number, body)
        return create(number, body)  # what a client's repeated request gets to hear

    monkeypatch.setattr(board, "create", deaf)
    lease = Lease(board, "x", stale_s=3600.0)
    lease.acquire()
    assert board.newest() == 1
    lease.release()


CONTENDER = """
import fcntl, os, random, sys, time
from pathlib import Path
from flows.storage import lease
from flows.safety import processes
from flows.storage.lease import Lease, LocalBoard
from flows.storage.objects import Remote, RemoteBoard

os.environ.update(environment)
random.seed(seed)
if stranger:  # nobody can see whether we live: silence must tell
    processes.here = lambda: f"machine of {seed}"
if "://" in where:
    board = RemoteBoard(Remote(where))
else:
    board = LocalBoard(Path(where))
for _ in range(rounds):
    # A busy machine silences who lives: only strangers have nothing else to go by.
    held = Lease(board, "x", stale_s=4.0 if stranger else 30.0)
    try:
        held.acquire()
        with open(witness + ".lock", "w") as lock, open(witness, "a") as log:
            try:  # the kernel knows who is inside, and lets go of it on death
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.write("two\\n")
                log.flush()
            log.write(f"in {os.getpid()}\\n")
            log.flush()
            time.sleep(random.uniform(0.0, 0.3))
            held.check()
            log.write("out\\n")
    finally:
        held.release()
    time.sleep(random.uniform(0, 2))  # let others in
"""


@pytest.mark.slow
@pytest.mark.parametrize("stranger", [False, True], ids=["on one host", "on machines of their own"])
def test_of_processes_that_are_killed_at_random_never_two_hold_it_and_all_get_on(
    board, tmp_path, stranger
):
    where = str(board.folder) if isinstance(board, LocalBoard) else board.remote.url
    witness = tmp_path / "witness"
    luck = random.Random(7)
    seeds = iter(range(1000))

    def start(rounds: int) -> multiprocessing.process.BaseProcess:
        names = {"where": where, "witness": str(witness), "stranger": stranger}
        names |= {"rounds": rounds, "seed": next(seeds), "environment": dict(os.environ)}
        process = forks.context.Process(target=exec, args=(CONTENDER, names))
        process.start()
        return process

    def entered() -> list[int]:
        """Who went in, one after the other."""
        found = re.findall(r"^in (\d+)\n", witness.read_text(), re.MULTILINE)
        return [int(pid) for pid in found]

    witness.touch()

    running = [start(10**6) for _ in range(3)]
    try:
        for kill in range(4):
            enough = len(entered()) + 3
            wait_for(lambda enough=enough: len(entered()) >= enough, 60, every=0.05)
            if kill % 2:
                time.sleep(luck.uniform(0, 0.3))
                victim = luck.randrange(len(running))
            else:  # who went in last is likely to be there still
                victim = [process.pid for process in running].index(entered()[-1])
            running[victim].kill()
            running[victim].join()
            running[victim] = start(10**6)
        last = start(2)
        last.join(120)
        assert last.exitcode == 0
    finally:
        for process in running:
            process.kill()
            process.join()
    text = witness.read_text()
    assert "two" not in text
    assert text.count("out") >= 10


def test_what_a_lease_says_is_plain_json(board):
    lease = Lease(board, "x", stale_s=60.0)
    lease.acquire()
    said = json.loads(board.read(1))
    lease.release()
    assert {"host", "pid", "start_ticks", "since", "beat"} <= said.keys()
