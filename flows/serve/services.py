"""Servers and workers as child processes that leave nothing behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from flows import places
from flows.safety import guardian, processes
from flows.serve import settings
from gigagan.common.files import write_aside

HOST = "127.0.0.1"
WORKER = ["prefect", "worker", "start", "--pool", settings.POOL, "--type", "process"]
"""The module and arguments of a worker of this machine's pool."""
READY_S = 300.0
"""A new database takes a minute, on a machine that is busy with other work several."""
GRACE_S = 15.0


class ServiceError(RuntimeError):
    """A server cannot start; the message says why."""


class Service:
    """A Python module that runs until it is stopped."""

    def __init__(
        self,
        name: str,
        module: Sequence[str],
        health: str | None = None,
        env: Mapping[str, str] | None = None,
    ):
        self.name = name
        self.health = health
        self.log = places.runs() / "logs" / f"{name}.log"
        places.make(self.log.parent)
        with self.log.open("w") as log:
            # A group of its own, so that stopping it takes its workers along.
            self.process = subprocess.Popen(
                [sys.executable, "-m", *module],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Return once it answers; raises `ServiceError` with its last lines if it does not."""
        deadline = time.monotonic() + READY_S
        while self.health and not answers(self.health):
            ended = self.process.poll() is not None
            if ended or time.monotonic() > deadline:
                tail = "\n".join(self.log.read_text().splitlines()[-10:])
                what = "ended at once" if ended else f"did not answer within {READY_S:.0f} s"
                raise ServiceError(f"{self.name} {what}; {self.log} ends with:\n{tail}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End it and all that it started."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S)
        self._signal(signal.SIGKILL)  # for what it left in its group
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@contextmanager
def running(
    name: str,
    module: Sequence[str],
    health: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a service during the block, which begins when it answers."""
    mark = _mark(name)
    with guardian.watching(mark):
        service = Service(name, module, health, {**(env or {}), guardian.MARK: mark})
        try:
            service.wait_until_ready()
            yield service.process
        finally:
            service.stop()


@contextmanager
def prefect_api(port: int | None = None) -> Iterator[str]:
    """The API of a Prefect server: `PREFECT_API_URL`, one of ours that runs, or a new one.

    A new one ends with the block, or with the last command that uses it: others find it by its
    record. Sets `PREFECT_API_URL` and `PREFECT_UI_URL`.
    """
    if given := _given():
        if not (found := _answering(given)):
            raise ServiceError(
                f"PREFECT_API_URL is {given}, where no Prefect server answers: "
                "start it, or unset PREFECT_API_URL"
            )
        _announce(found)
        yield found
        return
    places.make(settings.home())
    with ExitStack() as stack:
        users = stack.enter_context(_locked("server.users", fcntl.LOCK_SH))
        with _locked("server.start", fcntl.LOCK_EX):  # two on one database would quarrel
            api = _recorded() or stack.enter_context(_server(port or choose_port(4200), users))
        _announce(api)
        try:
            yield api
        finally:
            for name in ("PREFECT_API_URL", "PREFECT_UI_URL"):
                os.environ.pop(name, None)


@contextmanager
def _server(port: int, users: IO[bytes]) -> Iterator[str]:
    """A new server and its record; left to its guardian where others use it at the block's end."""
    api, mark = f"http://{HOST}:{port}/api", _mark("prefect")
    module = ["prefect", "server", "start", "--host", HOST, "--port", str(port)]
    # Its pages would ask port 4200, whatever ours is.
    env = {"PREFECT_SERVER_UI_API_URL": api, guardian.MARK: mark}
    keeper = guardian.start(mark, Path(users.name))
    service = Service("prefect", module, f"{api}/health", env)
    try:
        service.wait_until_ready()
        write_aside(_record_file(), json.dumps(_record(api, service.process.pid)), has_rivals=True)
        yield api
    finally:
        if _is_free(users):
            _record_file().unlink(missing_ok=True)
            service.stop()
            keeper.kill()
            keeper.communicate()
        else:
            print(f"{api}: other commands use this server, which ends with them", file=sys.stderr)
            assert keeper.stdin is not None, "it is a pipe"
            keeper.stdin.close()


def use_running_api() -> None:
    """Point to the server of `PREFECT_API_URL`, or of another of our commands."""
    api = _given() or _recorded()
    if api is None:
        raise ServiceError(
            "no Prefect server runs here: start one with `python -m flows ui`, "
            "or set PREFECT_API_URL"
        )
    _announce(_answering(api) or api)


def choose_port(preferred: int) -> int:
    """That port if it is free, else any free one."""
    return preferred if port_is_free(preferred) else free_port()


def port_is_free(port: int) -> bool:
    """Whether a server could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    """Whether a GET of this address succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _mark(name: str) -> str:
    return f"{name} of process {os.getpid()}, {time.time_ns()}"


@contextmanager
def _locked(name: str, how: int) -> Iterator[IO[bytes]]:
    """A file of Prefect's home, locked until the block ends or this process is gone."""
    with (settings.home() / name).open("ab") as file:
        fcntl.flock(file, how)
        yield file


def _is_free(lock: IO[bytes]) -> bool:
    """Whether nobody else holds a lock of that file; then it is ours alone."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _record_file() -> Path:
    return settings.home() / "server.json"


def _record(api: str, pid: int) -> dict[str, Any]:
    """What tells a server of ours from whatever has its port or process number later."""
    ticks = processes.start_ticks(pid)
    return {"api": api, "pid": pid, "start_ticks": ticks, "machine": processes.here()}


def _read_record() -> dict[str, Any]:
    """The record of a server; empty where there is none, or where it is damaged."""
    try:
        record = json.loads(_record_file().read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _recorded() -> str | None:
    """The server on our database that another of our commands runs: two would quarrel."""
    record = _read_record()
    api, pid = record.get("api"), record.get("pid")
    if not isinstance(api, str) or not isinstance(pid, int) or record != _record(api, pid):
        return None
    return api if processes.is_alive(pid) and answers(f"{api}/health") else None


def _given() -> str | None:
    """`PREFECT_API_URL` as Prefect's own client takes it: a slash at its end means nothing."""
    return os.environ.get("PREFECT_API_URL", "").strip().rstrip("/") or None


def _answering(address: str) -> str | None:
    """The API at an address that may lack its `/api`; None where none answers.

    That one is asked first: without it a server sends its page, whatever is asked.
    """
    spellings = [address] if address.endswith("/api") else [f"{address}/api", address]
    return next((api for api in spellings if answers(f"{api}/health")), None)


def _announce(api: str) -> None:
    os.environ["PREFECT_API_URL"] = api
    os.environ.setdefault("PREFECT_UI_URL", api.removesuffix("/api"))
