import pytest

from gigagan.common.exits import PREEMPTED, STOPPED, fact, read_fact


def test_a_fact_is_read_back_and_no_other_line_is_one():
    assert read_fact(fact("progress", ["bïlder", 3, None]) + "\n") == (
        "progress",
        ["bïlder", 3, None],
    )
    assert read_fact(fact(STOPPED, PREEMPTED)) == ("stopped", 75)


@pytest.mark.parametrize("line", ["", "128/1000 images", '{"a": 1, "b": 2}', "{}", '{"a', "[1]"])
def test_any_other_line_is_no_fact(line):
    assert read_fact(line) is None
