"""Run a Python module in processes of its own: stream its output, never leave it behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flows import progress
from flows.config import ROOT, Resources
from flows.stage import Context

LOG = "output.log"
"""Name of the file in a stage's output that keeps what its process printed."""
TAIL_LINES = 20
GRACE_S = 20.0
PREEMPTED = 75
"""Exit status of a training that was asked to stop and has saved its state."""


class LaunchError(RuntimeError):
    """A command ended with a non-zero status; the message ends with its last lines."""


def command(module: Sequence[str], resources: Resources) -> list[str]:
    """The command line that runs `module` (its name, then its arguments) on these resources."""
    if resources.backend == "torchrun":
        run = ["torch.distributed.run", "--standalone"]
        run += [f"--nproc-per-node={resources.processes}"]
        # A rank that dies takes the others with it; all begin again from the checkpoint.
        run += [f"--max-restarts={resources.max_restarts}", "-m"]
        return [sys.executable, "-m", *run, *module]
    return [sys.executable, "-m", *module]


def environment(resources: Resources, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child: ours, and no more threads than cores."""
    ranks = resources.processes if resources.backend == "torchrun" else 1
    threads = resources.threads or max(1, len(os.sched_getaffinity(0)) // ranks)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        **extra,
        **resources.env,
    }


def launch(
    module: Sequence[str],
    resources: Resources,
    *,
    log_file: Path,
    log: Callable[[str], None] = print,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a module to its end, each line of its output going to `log` and to `log_file`.

    The child stays in our process group: Prefect cancels by a signal to the group. It gets
    SIGTERM when we leave by an exception. Raises `LaunchError` on a non-zero exit status.
    """
    argv = command(module, resources)
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    child = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment(resources, env or {}),
    )
    assert child.stdout is not None
    try:
        with log_file.open("a") as file, child.stdout as lines:
            for line in lines:
                file.write(line)
                file.flush()
                tail.append(line.rstrip())
                log(line.rstrip())
        status = child.wait()
    except BaseException:
        _terminate(child)
        raise
    if status == PREEMPTED:
        raise LaunchError(
            f"{' '.join(module[:2])} was asked to stop and has saved its state: the same command "
            f"goes on from there (its output: {log_file})"
        )
    if status:
        ended = f"exited with status {status}" if status > 0 else f"was ended by signal {-status}"
        raise LaunchError(
            f"{' '.join(module[:2])} {ended}; its whole output is in {log_file}, "
            "and ends with:\n" + "\n".join(f"  {line}" for line in tail)
        )


def stage_process(context: Context, module: Sequence[str], *, out: str) -> None:
    """Run a stage's body as a module: `--config FILE`, `out` DIRECTORY, and `--INPUT PATH` each.

    A line of its output that holds `DONE/TOTAL` moves the progress.
    """
    config = context.path / "config.json"
    config.write_text(context.config.model_dump_json(indent=2))
    arguments = ["--config", str(config), out, str(context.path)]
    for name, path in context.inputs.items():
        arguments += [f"--{name}", str(path)]
    show = progress.from_output("images", context.progress)

    def listen(line: str) -> None:
        context.log(line)
        show(line)

    launch(
        [*module, *arguments],
        context.resources,
        log_file=context.path / LOG,
        log=listen,
        env=context.env,
    )


def _terminate(child: subprocess.Popen[str]) -> None:
    child.terminate()
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
