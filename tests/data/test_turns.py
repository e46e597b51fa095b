"""Whose turn it is to ask a host."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from data.web import turns as module
from data.web.addresses import RefusedError
from data.web.turns import Turns


def test_no_more_than_a_few_ask_a_host_at_once():
    turns, lock, now, most = Turns(3), threading.Lock(), {"a": 0, "b": 0}, {"a": 0, "b": 0}

    def ask(number):
        host = "ab"[number % 2]
        with turns.taken(host, 0, 10):
            with lock:
                now[host] += 1
                most[host] = max(most[host], now[host])
            time.sleep(0.02)
            with lock:
                now[host] -= 1

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(40)))
    assert most == {"a": 3, "b": 3}
    assert not turns._hosts  # and nothing is left of them


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_requests_start_a_delay_apart(monkeypatch):
    clock, turns, starts = Clock(), Turns(5), []
    monkeypatch.setattr(module, "time", clock)
    for host in "aaba":
        with turns.taken(host, 7, 30) as waited:
            starts.append((host, clock.now, waited))
    assert starts == [("a", 1000, 0), ("a", 1007, 7), ("b", 1007, 0), ("a", 1014, 7)]


def test_a_turn_beyond_patience_is_refused_at_once(monkeypatch):
    clock, turns = Clock(), Turns(5)
    monkeypatch.setattr(module, "time", clock)
    with turns.taken("a", 3600, 1):
        pass
    with pytest.raises(RefusedError, match="in 3600 s"), turns.taken("a", 3600, 30):
        pass
    assert clock.now == 1000
    with turns.taken("b", 3600, 30) as waited:
        assert waited == 0


def test_a_host_whose_connections_are_all_in_use_is_busy():
    turns = Turns(1)
    with (
        turns.taken("a", 0, 1),
        pytest.raises(RefusedError) as caught,
        turns.taken("a", 0, 0.1),
    ):
        pass
    assert caught.value.fate == "host_busy"


def test_a_host_that_was_asked_too_often_is_left_alone():
    turns = Turns(5)
    turns.pause("a", 100)
    with pytest.raises(RefusedError, match="its turn would come in 100 s"), turns.taken("a", 0, 30):
        pass
