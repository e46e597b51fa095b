"""Whose turn it is to ask a host: a few at once, and none too soon after another."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from data.web.addresses import RefusedError


@dataclass
class _Turn:
    """The state of one host: who asks it, and when it may be asked again."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    asking: int = 0
    """Threads that are asking it now."""
    wanting: int = 0
    """Threads that are asking it or waiting to."""
    free_from: float = 0.0
    """When the next request may start, monotonic seconds."""


class Turns:
    """Lets a few ask one host at once, and none too soon after another."""

    def __init__(self, connections: int) -> None:
        self.connections = connections
        self._lock = threading.Lock()
        self._hosts: dict[str, _Turn] = {}

    @contextmanager
    def taken(self, host: str, delay_s: float, patience_s: float) -> Iterator[float]:
        """A turn to ask `host`, with the seconds that were waited for it.

        Raises:
            RefusedError: `host_busy`, when the turn would not come within `patience_s` seconds.
        """
        with self._lock:
            turn = self._hosts.setdefault(host, _Turn())
            turn.wanting += 1
        try:
            begun = time.monotonic()
            self._enter(turn, delay_s, begun + patience_s)
            try:
                yield time.monotonic() - begun
            finally:
                with turn.changed:
                    turn.asking -= 1
                    turn.changed.notify()
        finally:
            self._leave(host, turn)

    def pause(self, host: str, seconds: float) -> None:
        """The host says that it was asked too often: none asks it for so long."""
        with self._lock:
            turn = self._hosts.setdefault(host, _Turn())
            turn.free_from = max(turn.free_from, time.monotonic() + seconds)

    def _enter(self, turn: _Turn, delay_s: float, latest: float) -> None:
        with turn.changed:
            start = max(turn.free_from, time.monotonic())
            if start > latest:  # known beforehand: nobody waits in vain
                wait_s = start - time.monotonic()
                raise RefusedError("host_busy", f"its turn would come in {wait_s:.0f} s")
            turn.free_from = start + delay_s if delay_s else turn.free_from
        if (early := start - time.monotonic()) > 0:
            time.sleep(early)
        with turn.changed:
            free = turn.changed.wait_for(
                lambda: turn.asking < self.connections, latest - time.monotonic()
            )
            if not free:
                raise RefusedError("host_busy", f"{self.connections} connections in use")
            turn.asking += 1

    def _leave(self, host: str, turn: _Turn) -> None:
        with self._lock:
            turn.wanting -= 1
            if not turn.wanting and turn.free_from <= time.monotonic():
                self._hosts.pop(host, None)
            if len(self._hosts) > 10_000:
                now = time.monotonic()
                idle = [h for h, t in self._hosts.items() if not t.wanting and t.free_from <= now]
                for name in idle:
                    del self._hosts[name]
