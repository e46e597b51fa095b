"""What is launched: a module on resources, as a command line and an environment."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flows.config import Resources
from gigagan.common import exits
from gigagan.common.exits import read_fact
from gigagan.common.progress import Progress, silent

LOG = "output.log"
"""Name of the file in a stage's output that keeps what its process printed."""
TAIL_LINES = 20
REPORT_LINES = 80
"""Lines of torchrun's own report on a failure, at most."""
REPORT = re.compile(r"torch/distributed/elastic\S* failed \(exitcode")
"""How it begins."""
SAVE_S = 120
"""Seconds that a training has for it before it is killed."""


class LaunchError(RuntimeError):
    """A command did not reach its end; the message says why, and what it printed last."""


@dataclass(frozen=True)
class Job:
    """One run of a module, on this machine or in a cluster."""

    module: Sequence[str]
    """Its name, then its arguments."""
    resources: Resources
    log_file: Path
    """Gets all that it prints, after what earlier attempts did."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables of this run, none of them secret."""

    @property
    def folder(self) -> Path:
        """The output that it makes."""
        return self.log_file.parent

    @property
    def name(self) -> str:
        """`<stage>-<key[:8]>`: the same for every attempt, and a valid DNS label."""
        stage, key = self.folder.parent.name, self.folder.name[:8]
        label = re.sub(r"[^a-z0-9]+", "-", f"{stage}-{key}".lower()).strip("-")
        return label if label[:1].isalpha() else f"job-{label}"

    @property
    def port(self) -> int:
        """Where the nodes meet: below the ports that systems hand out by themselves."""
        return 20_000 + int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 10_000

    @property
    def title(self) -> str:
        """For messages."""
        return " ".join(self.module[:2])

    @property
    def variables(self) -> dict[str, str]:
        """What is set for it on purpose."""
        return {**self.env, **self.resources.env}


class Output:
    """What a job prints: each line to a listener, the last ones kept for an error message.

    Facts (`gigagan.common.exits`) among the lines move the progress or are kept, and go no further.
    """

    def __init__(self, listener: Callable[[str], None], progress: Progress = silent):
        self._listener, self._progress = listener, progress
        self.tail: deque[str] = deque(maxlen=TAIL_LINES + REPORT_LINES)
        self.has_saved = False
        """Whether it said that it stopped in an orderly way."""

    def take(self, line: str) -> None:
        """The next line."""
        line = line.rstrip()
        match read_fact(line):
            case (exits.PROGRESS, [str(what), int(done), int() | None as total]):
                self._progress(what, done, total)
            case (exits.STOPPED, _):
                self.has_saved = True
            case (exits.HARDWARE, _):  # the model card reads it in the log file
                pass
            case _:
                self.tail.append(line)
                self._listener(line)

    def say(self, text: str) -> None:
        """A line of our own about the job."""
        self._listener(text)

    def error(self, job: Job, what: str) -> LaunchError:
        """The error of a job that ended in another way than at its end."""
        if self.has_saved:
            return LaunchError(
                f"{job.title} was asked to stop and has saved its state: the same command "
                f"goes on from there (its output: {job.log_file})"
            )
        lines = "\n".join(f"  {line}" for line in self._last_words())
        ending = f", and ends with:\n{lines}" if lines else ""
        return LaunchError(f"{job.title} {what}; its whole output is in {job.log_file}{ending}")

    def _last_words(self) -> list[str]:
        """The last lines before torchrun's report, which says no more than that it failed."""
        said = list(self.tail)
        reports = [i for i, line in enumerate(said) if REPORT.search(line)]
        return said[: reports[-1] if reports else None][-TAIL_LINES:]


def argv(job: Job, *, python: str = sys.executable) -> list[str]:
    """The command line on this machine."""
    if job.resources.backend == "inline":
        return [python, "-m", *job.module]
    return torchrun(
        job, "--standalone", f"--nproc-per-node={job.resources.processes}", python=python
    )


def torchrun(job: Job, *options: str, python: str = sys.executable) -> list[str]:
    """A rank that dies takes the others with it; all begin again from the checkpoint."""
    return [
        *(python, "-m", "torch.distributed.run", *options),
        *(f"--max-restarts={job.resources.max_restarts}", f"--shutdown-timeout={SAVE_S}"),
        *("-m", *job.module),
    ]


def environment(job: Job) -> dict[str, str]:
    """The environment of a child: ours, and no more threads than cores."""
    ranks = job.resources.processes if job.resources.backend == "torchrun" else 1
    threads = job.resources.threads or max(1, len(os.sched_getaffinity(0)) // ranks)
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        **job.variables,
    }
