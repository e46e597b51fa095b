"""A job in a Slurm cluster: one batch script, one torchrun on each node.

It speaks through Slurm's commands, so that what is seen here can be repeated by hand. The store,
the project and the interpreter lie on a shared folder. Variables are inherited, never written into
the script: secrets among them stay out of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flows.launch import cluster as remote
from flows.launch.cluster import Ending, Unreachable, patiently
from flows.launch.command import SAVE_S, Job, LaunchError, Output, torchrun

SCRIPT = ".slurm.sh"
RECORD = ".slurm.json"
"""The job's id, for a person who looks for it."""
STATUS = ".slurm-{id}.status"
"""Exit status of a script: Slurm forgets jobs after minutes where it keeps no accounts."""
TIMEOUT_S = 60.0

LOST = {
    "NODE_FAIL": "lost a node",
    "BOOT_FAIL": "got a node that did not start",
    "PREEMPTED": "had to make room for another job",
    "TIMEOUT": "came to its time limit",
    "REVOKED": "was withdrawn by Slurm",
}
"""Ends after which another job goes on from the checkpoint."""
OVER = {*LOST, "COMPLETED", "FAILED", "CANCELLED", "OUT_OF_MEMORY", "DEADLINE"}
STARTED = {"RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT"}
DAEMON_SILENT = ("Unable to contact", "Connection refused", "timed out", "try again")
UNKNOWN = "Invalid job id"
GONE = (UNKNOWN, "already completing or completed")


def run(job: Job, output: Output) -> None:
    """Run a job to its end; `LaunchError` when it fails."""
    remote.run(SlurmJob(job, output), job, output)


def render(job: Job) -> str:
    """The batch script, and as comments what it inherits of this run."""
    pairs = (f"{name}={shlex.quote(value)}" for name, value in job.variables.items())
    return script(job) + "".join(f"# inherits {pair}\n" for pair in pairs)


def script(job: Job) -> str:
    """The batch script. `$HEAD:PORT` is where the nodes meet; Slurm starts one task on each."""
    resources, slurm = job.resources, job.resources.slurm
    python = slurm.python or ("python" if slurm.container_image else sys.executable)
    command = torchrun(
        job,
        f"--nnodes={resources.nodes}",
        f"--nproc-per-node={resources.processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=$HEAD:{job.port}",
        f"--rdzv-id={job.name}",
        python=python,
    )
    words = [shlex.quote(word) if "$HEAD" not in word else f'"{word}"' for word in command]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{name}{value and '=' + shlex.quote(value)}" for name, value in _options(job)),
        "",
        "set -euo pipefail",
        f"STATUS={shlex.quote(str(job.folder))}/{STATUS.format(id='$SLURM_JOB_ID')}",
        "trap 'echo $? > \"$STATUS\"' EXIT",
        *slurm.setup,
        'HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
        f"srun --kill-on-bad-exit=1 {_container(job)}\\",
        "    " + " ".join(words),
    ]
    return "\n".join(lines) + "\n"


def environment(job: Job) -> dict[str, str]:
    """What the job inherits: ours, without what belongs to this process or its own Slurm job."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "PIPELINE_STAGE_", "SLURM_JOB", "SLURM_STEP"))
        and name not in ("OMP_NUM_THREADS", "SLURM_MEM_PER_NODE", "SLURM_CPUS_PER_TASK")
    }
    cores = job.resources.slurm.cpus_per_task or 0
    if threads := job.resources.threads or cores // job.resources.processes:
        ours["OMP_NUM_THREADS"] = str(threads)
    return {**ours, "PYTHONUNBUFFERED": "1", **job.variables}


class SlurmJob:
    """A `remote.Cluster`."""

    def __init__(self, job: Job, output: Output):
        self.job = job
        self.output = output
        self.id: str | None = None
        self._state = ""
        self._lines = Tail(job.log_file)

    @property
    def is_live(self) -> bool:
        """Whether a job of ours may be there."""
        return self.id is not None

    @property
    def handle(self) -> str:
        """The command that ends it by hand."""
        return f"scancel {self.id}"

    def start(self) -> None:
        """Adopt the job of this name if it is running, or submit it."""
        text = script(self.job)
        digest = _digest(text, self.job)
        self._lines.skip()
        self.id, self._state = patiently(lambda: self._find(digest), self.output), ""
        if self.id is None:
            (self.job.folder / SCRIPT).write_text(text)
            self.id = patiently(lambda: self._submit(digest), self.output)
            self.output.say(f"{self.job.name}: submitted as Slurm job {self.id}")
        else:
            self.output.say(
                f"{self.job.name}: Slurm job {self.id} is there already and is followed; "
                f"what it printed before is in {self.job.log_file}"
            )
        record = {"name": self.job.name, "id": self.id}
        (self.job.folder / RECORD).write_text(json.dumps(record))

    def poll(self) -> Ending | None:
        """Pass on what it printed since; None while it waits or runs."""
        state, reason = self._ask()
        self._lines.pass_on(self.output.take)
        if state not in OVER:
            self._announce(state, reason)
            return None
        self._lines.pass_on(self.output.take, is_last=True)
        self.id = None
        return self._ending(state)

    def stop(self) -> None:
        """Ask it to save and end; one that has not started just ends."""
        self._cancel(*(["--signal=TERM"] if self._state in STARTED else []))

    def kill(self) -> None:
        """End it now."""
        if self.id is not None:
            self._cancel()

    def _cancel(self, *options: str) -> None:
        assert self.id is not None
        try:
            _slurm("scancel", *options, self.id)
        except LaunchError as error:
            if not any(sign in str(error) for sign in GONE):
                raise

    def _find(self, digest: str) -> str | None:
        """A job of ours with this name; `LaunchError` when it runs something else."""
        listed = _slurm("squeue", "--me", "--noheader", f"--name={self.job.name}", "--format=%i|%k")
        jobs = [line.strip().split("|") for line in listed.splitlines()]
        for number, comment in jobs:
            if comment != digest:
                raise LaunchError(
                    f"Slurm job {number} has the name {self.job.name} and runs another command "
                    f"(other resources, or another store): wait for it, or `scancel {number}`"
                )
        return jobs[0][0] if jobs else None

    def _submit(self, digest: str) -> str:
        command = ["sbatch", "--parsable", f"--comment={digest}", str(self.job.folder / SCRIPT)]
        answer = _slurm(*command, env=environment(self.job))
        return answer.strip().partition(";")[0]

    def _ask(self) -> tuple[str, str]:
        """Its state and the reason for it; from the script's own mark when Slurm forgot it."""
        assert self.id is not None
        try:
            asked = _slurm(
                "squeue", "--noheader", "--states=all", f"--jobs={self.id}", "--format=%T|%r"
            )
        except LaunchError as error:
            if UNKNOWN not in str(error):
                raise
            asked = ""
        if asked.strip():
            state, _, reason = asked.splitlines()[0].partition("|")
            return state.strip(), reason.strip()
        return self._remember(), ""

    def _remember(self) -> str:
        assert self.id is not None
        mark = self.job.folder / STATUS.format(id=self.id)
        if mark.is_file():
            return "COMPLETED" if mark.read_text().strip() == "0" else "FAILED"
        try:
            told = _slurm("sacct", "-X", "-n", "-P", "-o", "State", "-j", self.id).split()
        except LaunchError:  # no accounts are kept here
            told = []
        return told[0] if told else "NODE_FAIL"

    def _ending(self, state: str) -> Ending:
        if state == "COMPLETED":
            return Ending("done", "")
        if state in LOST:
            return Ending("lost", LOST[state])
        if state == "CANCELLED":
            return Ending("failed", "was cancelled in Slurm")
        if self.output.has_saved:  # before its time limit, or as it was preempted
            return Ending("lost", "was asked by the cluster to stop, and has saved")
        if state == "OUT_OF_MEMORY":
            return Ending("failed", "ran out of memory: raise slurm.mem_gb, or lower batch_size")
        return Ending("failed", f"ended as {state} in Slurm")

    def _announce(self, state: str, reason: str) -> None:
        if state != self._state:
            because = f" ({reason})" if state == "PENDING" and reason != "None" else ""
            self.output.say(f"{self.job.name}: Slurm job {self.id} is {state}{because}")
        self._state = state


class Tail:
    """The growing end of a file."""

    def __init__(self, path: Path):
        self._path = path
        self._position = 0
        self._rest = b""

    def skip(self) -> None:
        """Begin after what is there."""
        self._position = self._path.stat().st_size if self._path.exists() else 0
        self._rest = b""

    def pass_on(self, take: Callable[[str], None], *, is_last: bool = False) -> None:
        """Each line that was completed since; with `is_last` also one without an end."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            new = file.read()
        self._position += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        if is_last and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            take(line.decode(errors="replace"))


def _options(job: Job) -> list[tuple[str, str]]:
    """Options of sbatch by long name; those without a value are switches."""
    slurm, hours = job.resources.slurm, job.resources.slurm.time_hours
    hours = hours or job.resources.deadline_hours
    options = {
        "job-name": job.name,
        "nodes": job.resources.nodes,
        "ntasks-per-node": 1,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "gpus-per-node": slurm.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": f"{slurm.mem_gb}G" if slurm.mem_gb else None,
        "time": f"{max(1, round(hours * 60))}" if hours else None,
        # To the tasks, not the script: training saves and ends.
        "signal": f"TERM@{SAVE_S}",
        "export": "ALL",
        "output": str(job.log_file).replace("%", "%%"),
        "open-mode": "append",
        # What was lost is submitted again from here, where it is counted.
        "no-requeue": "",
        **slurm.parameters,
    }
    return [(name, str(value)) for name, value in options.items() if value is not None]


def _container(job: Job) -> str:
    """Options of srun for pyxis; the store lies at the same place inside."""
    if not (image := job.resources.slurm.container_image):
        return ""
    store = job.folder.parent.parent
    return shlex.join([f"--container-image={image}", f"--container-mounts={store}:{store}"]) + " "


def _digest(script: str, job: Job) -> str:
    text = json.dumps([script, sorted(job.variables.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _slurm(*command: str, env: dict[str, str] | None = None) -> str:
    """What one of Slurm's commands prints; `Unreachable` when its daemon is silent."""
    if shutil.which(command[0]) is None:
        raise LaunchError(
            f"{command[0]} is not on the PATH: the backend slurm needs a host that is set up as a "
            "client of the cluster (a login node)"
        )
    try:
        done = _run(command, env)
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"{command[0]} did not answer for {TIMEOUT_S:.0f} s") from error
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.strip() or f"status {done.returncode}"
    if any(sign in said for sign in DAEMON_SILENT):
        raise Unreachable(f"{command[0]}: {said.splitlines()[-1]}")
    raise LaunchError(f"{command[0]} refused: {said}")


def _run(command: Sequence[str], env: dict[str, str] | None) -> subprocess.CompletedProcess[str]:
    # A group of its own: a signal to ours must not break off a submission half done.
    return subprocess.run(
        command,
        env=env,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TIMEOUT_S,
        check=False,
        start_new_session=True,
    )
