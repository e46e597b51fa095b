"""Which process is meant: by its number and the kernel's count of its start."""

import os
import subprocess
import sys

import psutil
import pytest

from flows.record import owners
from flows.safety.processes import is_alive, start_ticks
from tests import forks
from tests.flows.conftest import wait_for


def test_a_process_is_known_by_its_number_and_its_start():
    assert is_alive(os.getpid())
    assert is_alive(os.getpid(), start_ticks())
    assert not is_alive(os.getpid(), start_ticks() - 1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        ticks = start_ticks(child.pid)
        assert ticks > start_ticks()
        assert is_alive(child.pid, ticks)
        child.kill()
        child.wait()
    assert not is_alive(child.pid, ticks)
    assert start_ticks(child.pid) is None


@pytest.mark.skipif(sys.platform != "linux", reason="threads are seen in Linux's /proc")
def test_a_process_lives_as_long_as_any_of_its_threads():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", forks.HEADLESS], **pipes) as child:
        assert child.stdout.readline() == "up\n"
        wait_for(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, 20)
        assert is_alive(child.pid)
        assert is_alive(child.pid, start_ticks(child.pid))
        child.kill()
        wait_for(lambda: not is_alive(child.pid), 20)
        assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE  # nobody waited


def test_a_process_may_be_called_anything(tmp_path):
    script = tmp_path / "a) R 1 (b"
    script.write_text("#!/bin/sh\nread line\n")
    script.chmod(0o700)
    with subprocess.Popen([script], stdin=subprocess.PIPE) as child:
        assert start_ticks(child.pid) >= start_ticks()
        assert is_alive(child.pid, start_ticks(child.pid))


def test_a_run_names_its_process_without_a_clock():
    assert owners.me()["process.start_ticks"] == str(start_ticks())
