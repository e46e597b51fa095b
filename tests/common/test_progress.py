import io

import pytest
from rich.console import Console

from gigagan.common import progress
from gigagan.common.console import shown
from gigagan.common.progress import Lines, amount, clock


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.21, "4.2 s"), (75, "1:15"), (7205, "2:00:05"), (59.6, "1:00")]
)
def test_a_time_is_read_off_a_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("value", "is_bytes", "text"),
    [
        *((12_800, False, "12,800"), (0.314159, False, "0.314"), (7, False, "7")),
        *((999, True, "999 B"), (1.23e9, True, "1.23 GB"), (5e12, True, "5 TB")),
    ],
)
def test_an_amount_is_short(value, is_bytes, text):
    assert amount(value, is_bytes) == text


def test_a_line_comes_now_and_then_with_rate_and_time_left(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    told = Lines(lines.append, every_s=10)
    for seconds, done in ((0, 0), (9, 90), (10, 100), (15, 150), (20, 300)):
        now[0] = seconds
        told("images", done, 1000)
        told("file, bytes", done * 1000, None)
    assert lines == [
        "images 100/1,000 (10%), 10/s, 1:30 left",
        "file 100 kB, 10 kB/s",
        "images 300/1,000 (30%), 20/s, 0:35 left",
        "file 300 kB, 20 kB/s",
    ]


def test_a_terminal_has_bars_and_a_pipe_has_lines():
    for is_terminal in (True, False):
        out = io.StringIO()
        with shown(Console(file=out, force_terminal=is_terminal, width=80)) as told:
            for done in range(3):
                told("pictures [1]", done, 3)
        assert ("pictures [1]" in out.getvalue()) is is_terminal  # a line comes after ten seconds
