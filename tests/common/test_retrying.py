from itertools import islice

import pytest

from gigagan.common.retrying import pauses, retry


class Flaky:
    """Fails as often as it is told."""

    def __init__(self, failures, error=ConnectionError):
        self.left, self.error = failures, error

    def __call__(self):
        self.left -= 1
        if self.left >= 0:
            raise self.error(self.left)
        return "answer"


def asked(ask, waits, **options):
    """What `retry` returns, and how long it slept."""
    slept = []
    options = {"may_help": lambda error: isinstance(error, ConnectionError), **options}
    try:
        return retry(ask, waits, sleep=slept.append, **options), slept
    except Exception as error:
        return error, slept


def test_pauses_double_up_to_the_longest():
    assert list(pauses(0.5, attempts=5, longest_s=3)) == [0.5, 1, 2, 3]
    assert list(pauses(1, attempts=1)) == []
    assert list(islice(pauses(2, growth=1), 3)) == [2, 2, 2]
    spread = list(pauses(1, attempts=100, growth=1, spread=(0.5, 1)))
    assert 0.5 <= min(spread) < max(spread) <= 1


def test_a_failure_that_passes_is_waited_out():
    assert asked(Flaky(3), pauses(1, attempts=4)) == ("answer", [1, 2, 4])


def test_the_last_error_is_raised_as_it_is():
    error, slept = asked(Flaky(4), pauses(1, attempts=4))
    assert (type(error), error.args, slept) == (ConnectionError, (0,), [1, 2, 4])


def test_what_asking_again_cannot_help_is_raised_at_once():
    error, slept = asked(Flaky(1, KeyError), pauses(1))
    assert (type(error), slept) == (KeyError, [])


def test_patience_ends_it_and_every_wait_is_told():
    told = []
    error, slept = asked(Flaky(9), pauses(1), patience_s=-1)
    assert (type(error), slept) == (ConnectionError, [])
    asked(Flaky(2), pauses(1), on_retry=lambda error, pause: told.append((error.args[0], pause)))
    assert told == [(1, 1), (0, 2)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_nobody_who_leaves_is_held(error):
    with pytest.raises(error):
        retry(Flaky(1, error), pauses(1), may_help=lambda error: True)
