import subprocess
import sys

import pytest

from gigagan.training.stall import StallWatch

HANGS = """
import sys, time
from pathlib import Path
from gigagan.training.stall import StallWatch

def wait_for_nobody():
    time.sleep(60)

with StallWatch(Path(sys.argv[1]), float(sys.argv[2])) as watch:
    watch.beat()
    if sys.argv[3] == "pause":
        watch.pause()
        time.sleep(1.5)
    elif sys.argv[3] == "beat":
        for _ in range(5):
            time.sleep(0.3)
            watch.beat()
    else:
        wait_for_nobody()
"""


def hang(folder, seconds, how):
    return subprocess.run(
        [sys.executable, "-c", HANGS, str(folder), str(seconds), how],
        capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip


def test_a_process_that_hangs_ends_and_names_the_function_in_a_file(tmp_path):
    done = hang(tmp_path, 1, "hang")
    assert done.returncode != 0
    assert "wait_for_nobody" in (tmp_path / "stall.txt").read_text()
    assert str(tmp_path / "stall.txt") in done.stderr


@pytest.mark.parametrize("how", ["pause", "beat"])
def test_a_process_that_goes_on_or_pauses_is_left_alone(tmp_path, how):
    assert hang(tmp_path, 1, how).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_watch_of_zero_seconds_does_nothing(tmp_path):
    with StallWatch(tmp_path, 0) as watch:
        watch.beat()
        watch.pause()
    assert list(tmp_path.iterdir()) == []


def test_traces_of_an_earlier_attempt_stay_and_are_pointed_at(tmp_path, capsys):
    (tmp_path / "stall-rank3.txt").write_text("earlier")
    StallWatch(tmp_path, 60, rank=3).close()
    assert (tmp_path / "stall-rank3.txt").read_text() == "earlier"
    assert "stall-rank3.txt" in capsys.readouterr().err
