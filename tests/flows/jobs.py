"""Jobs of launchers, run by tests."""

import threading

from flows.launch import LaunchError, _backend
from flows.launch.auto import plan
from flows.launch.command import Job, Output

TRAINING = """
import os, signal, sys, time
from pathlib import Path
out = Path(sys.argv[1])
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: asked.append(1))
rank, ranks = os.environ["RANK"], os.environ["WORLD_SIZE"]
state = out / f"state-{rank}"
done = int(state.read_text()) if state.exists() else 0
os.write(1, f"rank {rank} of {ranks} from {done}\\n".encode())
while done < int(sys.argv[2]):
    if asked:
        if rank == "0":
            os.write(1, b'{"stopped": "preempted"}\\n')
        os._exit(75)
    done += 1
    aside = state.with_suffix(".aside")
    aside.write_text(str(done))
    aside.replace(state)  # killed at any moment, it leaves a whole number
    time.sleep(0.1)
"""
"""Saves after every tenth of a second, and when it is asked to stop."""

ONE_RANK = """#!/bin/sh
while [ "$1" != -m ] || [ "$2" = torch.distributed.run ]; do shift; done
RANK=0 WORLD_SIZE=1 exec {python} "$@"
"""
"""Instead of `python -m torch.distributed.run …`, which takes seconds to start."""


def launch(module, resources, *, log_file, log):
    """Run a module to its end."""
    run(Job(module, plan(resources, None).resources, log_file), log)


def run(job, log=str):
    _backend(job).run(job, Output(log))


def in_background(job, lines):
    """Run a job in a thread; returns it and a list that gets its error."""
    errors = []

    def body():
        try:
            run(job, lines.append)
        except LaunchError as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, errors


def state(stage):
    """How far rank 0 is."""
    path = stage / "state-0"
    return int(path.read_text()) if path.exists() else 0
