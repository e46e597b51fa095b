"""A way to a local server that can be shut: connections break, and new ones are refused."""

import contextlib
import socket
import threading
from collections.abc import Iterator


class Gate:
    """Passes connections of its own port on to another."""

    def __init__(self, target: int):
        self.target = target
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()

    def open(self) -> None:
        """Take connections."""
        listener = socket.create_server(("127.0.0.1", self.port))
        with self._lock:
            self._open = [listener]
        threading.Thread(target=self._accept, args=[listener], daemon=True).start()

    def shut(self) -> None:
        """Break those that are, refuse others."""
        with self._lock:
            closing, self._open = self._open, []
        for connection in closing:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it was shut
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                with self._lock:
                    self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=[one, other], daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(2**16):
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def gate_to(target: int) -> Iterator[Gate]:
    """An open gate to a port of this machine."""
    gate = Gate(target)
    gate.open()
    try:
        yield gate
    finally:
        gate.shut()
