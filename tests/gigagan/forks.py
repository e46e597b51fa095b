"""Processes of tests, forked from one that has everything imported: that takes seconds in each.

A module of such a process has `perform(argv)`, which returns an exit status.
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
RAISED = 70
"""Exit status of a process that ended in an exception."""
# Packages that are installed bring a `tests` of their own, which would be found instead of ours.
START = """
import sys, types
tests = sys.modules["tests"] = types.ModuleType("tests")
tests.__path__ = [sys.argv[1]]
from tests.gigagan import forks
forks.serve(sys.argv[2])
"""


class Server:
    """Starts processes that perform what a module says."""

    def __init__(self, module):
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(ROOT / "tests"), module], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert json.loads(self.process.stdout.readline()) == "ready"

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def ranks(self, argv, folder, *, num_ranks=1, num_local=None, env=None, seconds=(60, 60)):
        """Exit statuses and outputs of one process, or of a group as torchrun starts it.

        Nobody ends one for the other; after so many seconds the first is ended, or another.
        """
        folder.mkdir(exist_ok=True, parents=True)
        env = dict(env or {})
        if num_ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            env |= {"WORLD_SIZE": str(num_ranks)}
            env |= {"LOCAL_WORLD_SIZE": str(num_local)} if num_local else {}
        outputs = [folder / f"output{rank}.txt" for rank in range(num_ranks)]
        pids = []
        for rank, output in enumerate(outputs):
            output.unlink(missing_ok=True)
            local = rank % (num_local or num_ranks)
            own = env | ({"RANK": str(rank), "LOCAL_RANK": str(local)} if num_ranks > 1 else {})
            pids.append(self.ask(argv=argv, env=own, output=str(output)))
        first, later = seconds
        statuses = [
            self.ask(pid=pid, seconds=later if rank else first) for rank, pid in enumerate(pids)
        ]
        return statuses, [output.read_text() for output in outputs]

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=10)


def serve(module):
    """One JSON request per line, one answer per line."""
    perform = importlib.import_module(module).perform
    gc.collect()
    gc.freeze()  # or each process would look through all that was imported, again and again
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            print(json.dumps(_wait(request["pid"], request["seconds"])), flush=True)
        elif (pid := os.fork()) == 0:
            _run(perform, request)
        else:
            print(json.dumps(pid), flush=True)


def _run(perform, request):
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["env"])
    status = RAISED
    try:
        status = perform(request["argv"])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait(pid, seconds):
    """The exit status; a process that is too slow is ended, and has none."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None
