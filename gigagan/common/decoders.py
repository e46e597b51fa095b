"""Processes that decode what strangers send: a picture costs no more than its time, and itself.

Codecs are C code, which no thread can be stopped in, and some crash. So pictures go to processes
that the kernel ends: after some time of the processor, which neither load nor waiting shortens.
What is started here never fetches and never writes.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from gigagan.common import pictures
from gigagan.common.pictures import UndecodableError

SECONDS = 30.0
"""Of a processor, for one picture: 100 megapixels take 2 to 7, JPEG 2000 half of one a megabyte."""
CRASHES = 2
"""A picture that ends its decoder so often is broken; once may be the system, short of memory."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Decoders:
    """Runs functions of untrusted bytes in processes, which are started as threads need them."""

    def __init__(self, seconds: float = SECONDS, at_once: int = 64) -> None:
        self.seconds = seconds
        self._turns = threading.BoundedSemaphore(at_once)
        self._idle: list[subprocess.Popen[bytes]] = []
        self._alone = tempfile.TemporaryFile()  # noqa: SIM115  # locked by its processes
        atexit.register(self.close)

    def run(
        self,
        function: Callable[Arguments, Result],
        *arguments: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Result:
        """`function(*arguments)`, from any thread; all of it must be picklable.

        Raises:
            UndecodableError: `too slow` or `broken`, when it took too long or crashed.
            RuntimeError: no process can be started.
            Exception: what the function raises.
        """
        with self._turns:
            for _ in range(CRASHES):
                child = self._child()
                try:
                    pickle.dump((function, arguments, options), child.stdin)
                    child.stdin.flush()
                    is_fine, answer = pickle.load(child.stdout)
                except (EOFError, BrokenPipeError, ConnectionResetError, pickle.UnpicklingError):
                    status = _ended(child)
                except BaseException:
                    child.kill()
                    _ended(child)
                    raise
                else:
                    self._idle.append(child)
                    if is_fine:
                        return answer
                    raise answer
                if status == -signal.SIGPROF:
                    why = f"more than {self.seconds:g} s of a processor"
                    raise UndecodableError("too slow", why)
                if status >= 0:  # not the picture's doing
                    raise RuntimeError(
                        f"a process that decodes pictures ended with status {status}, and what it "
                        "wrote to the standard error says why"
                    )
        raise UndecodableError("broken", f"ends its decoder with {signal.Signals(-status).name}")

    def _child(self) -> Any:
        """An idle process that lives, or a new one; its pipes are open."""
        while True:
            try:
                child = self._idle.pop()
            except IndexError:
                break
            if child.poll() is None:
                return child
            _ended(child)
        lock = self._alone.fileno()
        places = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "gigagan.common.decoders", str(self.seconds), str(lock)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(places),
                "OMP_NUM_THREADS": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[lock],
        )

    def close(self) -> None:
        """End the idle processes; others end when their picture does."""
        while self._idle:
            child = self._idle.pop()
            child.kill()
            _ended(child)


def _ended(child: subprocess.Popen[bytes]) -> int:
    """Status of a process that ends, its pipes closed."""
    for pipe in (child.stdin, child.stdout):
        with suppress(OSError):  # what was not sent will never be
            if pipe is not None:
                pipe.close()
    return child.wait()


@cache
def shared() -> Decoders:
    """The decoders of this process, for pictures that are decoded whole."""
    return Decoders()


# ---- inside such a process ---------------------------------------------------------------------


def main(seconds: float, lock: int | None = None) -> None:
    """Answer one question after the other, until there are no more."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # codecs that print must not answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with suppress(OSError):  # short of memory, the system ends us and not who decodes
        Path("/proc/self/oom_score_adj").write_text("1000")
    if lock is not None:
        pictures.alone = _Lock(lock)
    while True:
        try:
            function, arguments, options = pickle.load(questions)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer = pickle.dumps((True, function(*arguments, **options)))
        except Exception as error:
            answer = pickle.dumps((False, _portable(error)))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            answers.write(answer)
            answers.flush()
        except BrokenPipeError:  # nobody is there any more
            os._exit(0)


def _portable(error: Exception) -> Exception:
    """The error itself, if it survives the way to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class _Lock(AbstractContextManager[None]):
    """One that no two processes hold, and that ends with its holder; on an open file."""

    def __init__(self, file: int) -> None:
        self.file = file

    def __enter__(self) -> None:
        fcntl.lockf(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.lockf(self.file, fcntl.LOCK_UN)


if __name__ == "__main__":
    main(float(sys.argv[1]), *map(int, sys.argv[2:]))
