"""A job as a child process of this one: it never outlives an exception here."""

from __future__ import annotations

import shlex
import subprocess

from flows.launch.command import Job, Output, argv, environment
from gigagan.common.exits import PREEMPTED

GRACE_S = 20.0


def run(job: Job, output: Output) -> None:
    """Run a job to its end; `LaunchError` on a non-zero exit status.

    The child stays in our process group: Prefect cancels by a signal to the group. It gets
    SIGTERM when we leave by an exception.
    """
    child = subprocess.Popen(
        argv(job),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment(job),
    )
    assert child.stdout is not None
    with job.log_file.open("a") as file, child.stdout as lines:
        try:
            for line in lines:
                file.write(line)
                file.flush()
                output.take(line)
            status = child.wait()
        except BaseException:
            file.write(_terminate(child))
            raise
    if status:
        output.has_saved |= status == PREEMPTED
        how = f"exited with status {status}" if status > 0 else f"was ended by signal {-status}"
        raise output.error(job, how)


def render(job: Job) -> str:
    """The command line, ready for a shell."""
    variables = {**job.variables, "OMP_NUM_THREADS": environment(job)["OMP_NUM_THREADS"]}
    pairs = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return " ".join([*pairs, shlex.join(argv(job))])


def _terminate(child: subprocess.Popen[str]) -> str:
    """End it, and return its last words: a closed pipe would kill it before its state is saved."""
    child.terminate()
    try:
        return child.communicate(timeout=GRACE_S)[0]
    except subprocess.TimeoutExpired:
        child.kill()
        return child.communicate()[0]
