"""Run a stage's Python module, on this machine or as a job of a cluster.

One contract for all: a torchrun command line plus resources. What is printed comes here line by
line, an exception here ends the job, and what was lost goes on from its checkpoint. A backend's
packages are imported when it is used.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from flows.config import Resources
from flows.launch.auto import plan
from flows.launch.command import LOG, Job, LaunchError, Output
from flows.stage import Context

__all__ = ["LOG", "LaunchError", "Process", "render", "stage_process"]

BACKENDS = {
    "inline": "flows.launch.local",
    "torchrun": "flows.launch.local",
    "slurm": "flows.launch.slurm",
    "kubernetes": "flows.kubernetes.jobs",
}
CONFIG = "config.json"


@dataclass(frozen=True)
class Process:
    """What runs a stage's body: `--config FILE`, `out` DIRECTORY, and `--INPUT PATH` each."""

    module: tuple[str, ...]
    """Its name, then what it is always told."""
    out: str
    """The option that takes the output's folder."""

    def job(self, context: Context, resources: Resources) -> Job:
        """It, for this output on these resources."""
        config = context.path / CONFIG
        words = [*self.module, "--config", str(config), self.out, str(context.path)]
        for name, path in context.inputs.items():
            words += [f"--{name}", str(path)]
        return Job(words, resources, context.path / LOG, context.env)


def stage_process(context: Context, process: Process) -> None:
    """Run a stage's body, whose facts of progress are the stage's.

    What `auto` chose is said first, in the log file too, and becomes part of the figures.
    """
    (context.path / CONFIG).write_text(context.config.model_dump_json(indent=2))
    planned = plan(context.resources, context.config)
    job = process.job(context, planned.resources)
    if planned.reason:
        context.metrics |= planned.figures
        with job.log_file.open("a") as file:
            file.write(f"{planned.reason}\n")
        context.log(planned.reason)
    _backend(job).run(job, Output(context.log, context.progress))


def render(context: Context, process: Process) -> str:
    """What `stage_process` would start: a command line, a batch script or a manifest.

    What `auto` chooses now, and why, is a comment above it. Raises `LaunchError` for what would
    not start.
    """
    planned = plan(context.resources, context.config)
    job = process.job(context, planned.resources)
    text: str = _backend(job).render(job)
    return f"# {planned.reason}\n{text}" if planned.reason else text


def _backend(job: Job) -> ModuleType:
    return importlib.import_module(BACKENDS[job.resources.backend])
