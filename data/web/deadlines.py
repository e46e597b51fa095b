"""The end of connections whose request takes too long."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Deadlines:
    """Ends connections whose request outlasts its deadline, wherever it is stuck.

    A socket's own timeout restarts with each byte; a server that drips them would hold a thread
    for ever. One thread a process looks at all of them.
    """

    def __init__(self) -> None:
        self._here = threading.local()
        self._lock = threading.Lock()
        self._watched: dict[int, tuple[float, socket.socket]] = {}
        threading.Thread(target=self._sweep, daemon=True).start()

    @property
    def end(self) -> float:
        """The deadline of the block that this thread is in."""
        return self._here.end

    @contextmanager
    def until(self, end: float) -> Iterator[None]:
        """Connections that this thread opens inside end at `end` (monotonic seconds)."""
        self._here.end = end
        self._here.opened = []
        try:
            yield
        finally:
            with self._lock:
                for key in self._here.opened:
                    self._watched.pop(key)[1].close()

    def watch(self, sock: socket.socket) -> None:
        """Put a new connection under the deadline of the block this thread is in."""
        with self._lock:
            duplicate = socket.socket(fileno=os.dup(sock.fileno()))  # outlives TLS wrapping
            self._watched[id(duplicate)] = (self._here.end, duplicate)
            self._here.opened.append(id(duplicate))

    def _sweep(self) -> None:
        while True:
            time.sleep(0.25)
            now = time.monotonic()
            with self._lock:
                for end, sock in self._watched.values():
                    if now > end:
                        with suppress(OSError):  # already closed by the other side
                            sock.shutdown(socket.SHUT_RDWR)
