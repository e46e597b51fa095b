"""What a stage starts does not outlive the process that started it, however that went."""

import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

from flows.config import Resources
from flows.safety import guardian
from tests.flows.conftest import wait_for
from tests.flows.jobs import launch

SLEEPER = "import time; time.sleep(100)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"


@pytest.fixture
def parent(tmp_path):
    """Start a process that guards a child and grandchild of this code; returns all three."""
    started = []

    def start(code: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
        script = textwrap.dedent(f"""
            import subprocess, sys
            from flows.safety import guardian
            with guardian.guarding({str(tmp_path)!r}):
                inner = "import subprocess, sys; run = [sys.executable, '-c', sys.argv[1]];"
                inner += "subprocess.Popen(run, start_new_session=True); exec(sys.argv[1])"
                subprocess.Popen([sys.executable, "-c", inner, {code!r}]).wait()
        """)
        process = subprocess.Popen([sys.executable, "-c", script])
        started.append(process)
        wait_for(lambda: len(guardian.marked(str(tmp_path))) == 2, 30)
        return process, guardian.marked(str(tmp_path))

    yield start
    for process in started:
        process.kill()
        process.wait()
    guardian.end(str(tmp_path), 0.1)


def test_sigkill_of_the_parent_ends_children_and_theirs_in_other_sessions(parent):
    process, children = parent(SLEEPER)
    process.kill()
    process.wait()
    wait_for(lambda: not any(child.is_running() for child in children), 10)


def test_what_ignores_sigterm_is_killed_after_the_grace(parent, tmp_path):
    process, children = parent(STUBBORN)
    os.kill(process.pid, signal.SIGSTOP)
    assert sorted(guardian.end(str(tmp_path), 0.5)) == sorted(child.pid for child in children)
    assert guardian.marked(str(tmp_path)) == []


def test_other_marks_and_the_end_of_the_block_end_nothing(tmp_path):
    with guardian.guarding(str(tmp_path)):
        child = subprocess.Popen([sys.executable, "-c", SLEEPER])
    try:
        assert guardian.MARK not in os.environ
        assert guardian.end(str(tmp_path / "other")) == []
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_what_a_stopping_child_says_is_heard_and_does_not_break_it(tmp_path, monkeypatch):
    (tmp_path / "saver.py").write_text(
        textwrap.dedent("""
            import pathlib, signal, sys, time
            def save(*_):
                for part in range(3):
                    print("saving", part, flush=True)
                    time.sleep(0.1)
                pathlib.Path(sys.argv[1]).touch()
                sys.exit(75)
            signal.signal(signal.SIGTERM, save)
            print("ready", flush=True)
            time.sleep(100)
        """)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def cancel(line: str) -> None:
        raise KeyboardInterrupt

    log, saved = tmp_path / "log", tmp_path / "saved"
    with pytest.raises(KeyboardInterrupt):
        launch(["saver", str(saved)], Resources(), log_file=log, log=cancel)
    assert saved.exists()
    assert log.read_text().splitlines() == ["ready", *(f"saving {part}" for part in range(3))]
