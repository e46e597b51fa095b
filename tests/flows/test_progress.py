import io

from rich.console import Console

from flows.progress import Lines, Log


def test_a_log_and_who_watches_are_both_told_how_far_a_stage_is(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    lines, out = [], io.StringIO()
    log = Log(lines.append, Lines(Console(file=out, width=80)))
    log.started("filter", "in st [v1]")
    for now[0], done in ((0.0, 1), (11.0, 3), (61.0, 7), (70.0, 9)):
        log.progress("filter", "shards", done, 20)
    log.ended("filter", "done", 75.0, "kept 7")
    assert lines == [
        "filter started: in st [v1]",
        "filter: shards 7/20 (35%), 0.0984/s, 2:12 left",
        "filter done in 1:15: kept 7",
    ]
    shown = out.getvalue().splitlines()
    assert [line.partition(",")[0] for line in shown] == [
        "filter started: in st [v1]",
        "filter: shards 3/20 (15%)",
        "filter: shards 7/20 (35%)",
        "filter done in 1:15: kept 7",
    ]
    assert log.also.endings == [("filter", "done", 75.0)]
