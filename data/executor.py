"""Runs one function over many items on local processes or on a Ray cluster; survives dead workers.

Each worker has at most one item in hand, so that a death is laid at the door of one item, and
costs no other worker anything. It never keeps more items or results than there are workers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

Item = TypeVar("Item")
Backend = Literal["processes", "ray"]


class TaskError(RuntimeError):
    """An item that failed, or that kept ending its worker; the text names it and says why."""


def each(
    function: Callable[..., Any],
    items: Iterable[Item],
    *,
    workers: int = 1,
    backend: Backend = "processes",
    setup: Callable[[int], Any] | None = None,
    attempts: int = 3,
    gpus: float = 0.0,
) -> Iterator[tuple[Item, Any]]:
    """Yield (item, `function(item)`) as they are done, each item exactly once.

    With `setup` it is `function(item, state)`, where `state = setup(number)` is made once in each
    worker, numbered from 0. Function, setup and items must be picklable. One local worker is this
    process itself. Items must be idempotent: one whose worker died, or whose node did, is run
    again from the start. `gpus` is the share of a CUDA device that Ray gives each worker.

    Raises:
        TaskError: the function or the setup raised, or a worker died `attempts` times on an item.
    """
    if workers < 1 or attempts < 1:
        raise ValueError(f"workers is {workers} and attempts {attempts}: give 1 or more of each")
    if backend not in ("processes", "ray"):
        raise ValueError(f"backend is {backend!r}: choose 'processes' or 'ray'")
    if backend == "processes" and workers == 1:
        yield from _here(function, items, setup)
        return
    pool: _Workers = (
        _Actors(function, setup, gpus) if backend == "ray" else _Processes(function, setup, workers)
    )
    try:
        yield from _drive(pool, items, workers, attempts)
    finally:
        pool.stop()


def _here(
    function: Callable[..., Any], items: Iterable[Item], setup: Callable[[int], Any] | None
) -> Iterator[tuple[Item, Any]]:
    """Everything in this process."""
    state: tuple[Any, ...] | None = None
    for item in items:
        try:
            if state is None:
                state = _state(setup, 0)
            result = function(item, *state)
        except Exception as error:
            what = "setting up" if state is None else item
            raise TaskError(f"{what}: {type(error).__name__}: {error}") from error
        yield item, result


def _state(setup: Callable[[int], Any] | None, number: int) -> tuple[Any, ...]:
    """What the function gets beside the item."""
    return () if setup is None else (setup(number),)


# ---- handing out -------------------------------------------------------------------------------


class _Done(NamedTuple):
    result: Any


class _Failed(NamedTuple):
    """Something raised; text, because not every exception survives being sent."""

    error: str
    trace: str


class _Died(NamedTuple):
    how: str


_Outcome = _Done | _Failed | _Died


@dataclass
class _Task:
    item: Any
    deaths: int = 0


class _Tasks:
    """What is still to be run: true while there is any. At most `ahead` items are taken early."""

    def __init__(self, items: Iterable[Any], ahead: int) -> None:
        self._items = iter(items)
        self._waiting = deque(_Task(item) for item in islice(self._items, ahead))

    def __bool__(self) -> bool:
        if not self._waiting:
            self._waiting.extend(_Task(item) for item in islice(self._items, 1))
        return bool(self._waiting)

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> _Task:
        return self._waiting.popleft()

    def again(self, task: _Task) -> None:
        self._waiting.append(task)


class _Workers(Protocol):
    """Workers by number, each of which does one thing at a time."""

    def start(self, number: int) -> None:
        """Begin to set up a worker, in the place of the one that had this number."""

    def give(self, number: int, item: Any) -> None:
        """Let an idle worker run an item."""

    def wait(self) -> list[tuple[int, _Outcome]]:
        """Wait until some workers are done with what they do: setting up counts as well."""

    def stop(self) -> None:
        """End all workers at once."""


def _drive(
    pool: _Workers, items: Iterable[Any], workers: int, attempts: int
) -> Iterator[tuple[Any, Any]]:
    """Keep the workers busy. An item goes only to a worker that is set up, so that the others do
    everything where a cluster that lost a node has no room for a new one."""
    tasks = _Tasks(items, ahead=workers)
    idle: list[int] = []
    busy: dict[int, _Task] = {}
    lost: Counter[int] = Counter()  # deaths of each worker while it was set up

    def hand_out() -> None:
        while idle and tasks:
            busy[idle[-1]] = tasks.take()
            number = idle.pop()
            pool.give(number, busy[number].item)

    for number in range(len(tasks)):
        pool.start(number)
    while tasks or busy:
        results = []
        for number, outcome in pool.wait():
            task = busy.pop(number, None)
            match outcome:
                case _Failed(error, trace):
                    what = f"setting up worker {number}" if task is None else task.item
                    failure = TaskError(f"{what}: {error}")
                    failure.add_note(trace)  # for who asks for a traceback
                    raise failure
                case _Done(result):
                    idle.append(number)
                    results += [] if task is None else [(task.item, result)]
                case _Died(how):
                    lost[number] += task is None
                    _limit(number, lost[number], task, attempts, how)
                    if task is not None:
                        tasks.again(task)
                    pool.start(number)
        hand_out()
        yield from results  # while the workers are busy again


def _limit(number: int, lost: int, task: _Task | None, attempts: int, how: str) -> None:
    """Count a death, and give up at the last one that is allowed."""
    what: Any = f"setting up worker {number}"
    if task is not None:
        task.deaths += 1
        what, lost = task.item, task.deaths
    if lost >= attempts:
        raise TaskError(
            f"{what}: ended its worker {lost} times (last: {how}); look for what it was doing, and "
            "give it more memory or fewer workers if the system ended it"
        )


# ---- processes ---------------------------------------------------------------------------------


class _Processes:
    """One process and one pipe a worker. They end with this process, however that ends."""

    def __init__(
        self, function: Callable[..., Any], setup: Callable[[int], Any] | None, workers: int
    ) -> None:
        self._function, self._setup, self._workers = function, setup, workers
        self._context = multiprocessing.get_context("spawn")  # threads do not survive a fork
        self._pool: dict[int, tuple[SpawnProcess, connection.Connection]] = {}
        self._awaited: dict[connection.Connection, int] = {}

    def start(self, number: int) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(theirs, self._function, self._setup, number), daemon=True
        )
        with _threads_shared_by(self._workers):
            process.start()
        theirs.close()  # so that its end is the end of the pipe
        self._pool[number] = process, ours
        self._awaited[ours] = number

    def give(self, number: int, item: Any) -> None:
        _, pipe = self._pool[number]
        self._awaited[pipe] = number
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `wait` finds it dead
            pipe.send(item)

    def wait(self) -> list[tuple[int, _Outcome]]:
        outcomes: list[tuple[int, _Outcome]] = []
        for pipe in connection.wait(list(self._awaited)):
            assert isinstance(pipe, connection.Connection)
            number = self._awaited.pop(pipe)
            try:
                outcomes.append((number, pipe.recv()))
            except (EOFError, OSError):  # also in the middle of a message
                process, _ = self._pool[number]
                process.join()
                pipe.close()
                outcomes.append((number, _Died(f"exit code {process.exitcode}")))
        return outcomes

    def stop(self) -> None:
        for process, _ in self._pool.values():
            process.kill()
        for process, pipe in self._pool.values():
            process.join()
            pipe.close()


@contextlib.contextmanager
def _threads_shared_by(workers: int) -> Iterator[None]:
    """Let processes started in here use their share of the cores, unless it is already set."""
    name = "OMP_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(max(1, len(os.sched_getaffinity(0)) // workers))
    try:
        yield
    finally:
        del os.environ[name]


def _work(
    pipe: connection.Connection,
    function: Callable[..., Any],
    setup: Callable[[int], Any] | None,
    number: int,
) -> None:
    """What a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    outcome = _attempt(_state, setup, number)
    state = outcome.result if isinstance(outcome, _Done) else ()
    pipe.send(outcome if isinstance(outcome, _Failed) else _Done(None))
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        outcome = _attempt(function, item, *state)
        try:
            pipe.send(outcome)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:  # a result that cannot be pickled
            pipe.send(_failed(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _attempt(function: Callable[..., Any], *arguments: Any) -> _Done | _Failed:
    try:
        return _Done(function(*arguments))
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> _Failed:
    return _Failed(f"{type(error).__name__}: {error}", traceback.format_exc())


# ---- Ray ---------------------------------------------------------------------------------------


class _Actors:
    """One Ray actor a worker, wherever the cluster has room."""

    def __init__(
        self, function: Callable[..., Any], setup: Callable[[int], Any] | None, gpus: float
    ) -> None:
        self._ray = _ray()
        self._is_ours = not self._ray.is_initialized()
        if self._is_ours:  # joins RAY_ADDRESS where it is set
            self._ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        # Restarts are ours to count: Ray's own would hide which item ends its worker.
        options = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        self._actor = self._ray.remote(**options)(_Actor)
        self._function, self._setup = self._ray.put(function), self._ray.put(setup)
        self._pool: dict[int, Any] = {}
        self._awaited: dict[Any, int] = {}

    def start(self, number: int) -> None:
        self._pool[number] = self._actor.remote(self._function, self._setup, number)
        self._awaited[self._pool[number].prepare.remote()] = number

    def give(self, number: int, item: Any) -> None:
        self._awaited[self._pool[number].run.remote(item)] = number

    def wait(self) -> list[tuple[int, _Outcome]]:
        done, _ = self._ray.wait(list(self._awaited), num_returns=1)
        return [(self._awaited.pop(reference), self._outcome(reference)) for reference in done]

    def _outcome(self, reference: Any) -> _Outcome:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # a result that cannot be pickled
            return _failed(error)
        except self._ray.exceptions.RayError as error:  # the actor, its node, or the result is lost
            return _Died(f"{type(error).__name__}: {error}")

    def stop(self) -> None:
        for actor in self._pool.values():
            self._ray.kill(actor)
        if self._is_ours:
            self._ray.shutdown()


class _Actor:
    """A worker on a Ray cluster."""

    def __init__(
        self, function: Callable[..., Any], setup: Callable[[int], Any] | None, number: int
    ) -> None:
        self._function, self._setup, self._number = function, setup, number
        self._state: tuple[Any, ...] = ()

    def prepare(self) -> _Outcome:
        """Set up; apart from the constructor, so that an error comes back as text."""
        outcome = _attempt(_state, self._setup, self._number)
        if isinstance(outcome, _Failed):
            return outcome
        self._state = outcome.result
        return _Done(None)

    def run(self, item: Any) -> _Outcome:
        """Run one item."""
        return _attempt(self._function, item, *self._state)


def _ray() -> Any:
    """The library, kept from phoning home."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "backend 'ray' needs Ray: run `pip install .[ray]`, or choose 'processes'"
        ) from error
    return ray
