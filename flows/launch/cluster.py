"""A job in a cluster from its start to its end: adopted, followed, restarted, called off.

What a cluster must be able to do for that is `Cluster`; nothing here knows which one it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, TypeVar

from flows.launch.command import SAVE_S, Job, LaunchError, Output

POLL_S = 2.0
"""Seconds between two questions how a job is."""
OUTAGE_S = 1800.0
"""Seconds that a cluster may be out of reach before a stage gives up."""
MARGIN_S = 60.0
"""Seconds, beyond those for saving, that a cluster has to clear a job away."""

Result = TypeVar("Result")


class Unreachable(Exception):  # noqa: N818 - often none: asked again, it answers
    """The cluster did not answer."""


class Ending(NamedTuple):
    """How a job ended."""

    how: Literal["done", "failed", "lost"]
    """`lost`: not by its own fault, so that another one may go on from the checkpoint."""
    why: str


class Cluster(Protocol):
    """A job of ours in a cluster."""

    def start(self) -> None:
        """Adopt the job of this name if it is running, or submit it."""

    def poll(self) -> Ending | None:
        """Pass on what it printed since; None while it waits or runs."""

    def stop(self) -> None:
        """Ask it to save and end."""

    def kill(self) -> None:
        """End it now."""

    @property
    def is_live(self) -> bool:
        """Whether a job of ours may be there."""

    @property
    def handle(self) -> str:
        """The command that ends it by hand."""


def run(cluster: Cluster, job: Job, output: Output) -> None:
    """Bring a job to its end, starting it again when it was lost.

    It is called off when we leave by an exception. Raises `LaunchError`.
    """
    deadline = _deadline(job)
    for restarts in range(job.resources.max_restarts + 1):
        ending = _follow(cluster, job, output, deadline)
        if ending.how == "done":
            return
        if ending.how == "failed":
            raise output.error(job, ending.why)
        output.say(f"{job.name}: {ending.why}")
        if restarts < job.resources.max_restarts:
            output.say(f"{job.name}: starts again from its checkpoint")
            output.has_saved = False
    raise output.error(job, f"was lost {restarts + 1} times, the last time because it {ending.why}")


def patiently(ask: Callable[[], Result], output: Output) -> Result:
    """Ask the cluster until it answers, ever less often; `LaunchError` after `OUTAGE_S`."""
    pause, since = POLL_S, time.monotonic()
    while True:
        try:
            return ask()
        except Unreachable as error:
            if time.monotonic() - since > OUTAGE_S:
                raise LaunchError(f"{error}: given up after {OUTAGE_S / 60:.0f} minutes") from error
            output.say(f"{error}: asked again in {pause:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 60.0)


def _follow(cluster: Cluster, job: Job, output: Output, deadline: float | None) -> Ending:
    """From the start to the end of one job."""
    try:
        cluster.start()
        while (ending := patiently(cluster.poll, output)) is None:
            if deadline and time.monotonic() > deadline:
                raise LaunchError(
                    f"{job.title} did not end within deadline_hours = "
                    f"{job.resources.deadline_hours}: it is called off; the same command goes on "
                    f"from its last checkpoint (its output: {job.log_file})"
                )
            time.sleep(POLL_S)
    except BaseException:
        _call_off(cluster, job, output)
        raise
    return ending


def _call_off(cluster: Cluster, job: Job, output: Output) -> None:
    """Let it save, then see to it that it is gone; a cluster out of reach is said, not raised."""
    if not cluster.is_live:
        return
    output.say(f"{job.name}: called off; it may take {SAVE_S} s to save")
    try:
        cluster.stop()
        until = time.monotonic() + SAVE_S + MARGIN_S
        while cluster.poll() is None and time.monotonic() < until:
            time.sleep(POLL_S)
        cluster.kill()
    except (Unreachable, LaunchError) as error:
        output.say(f"{job.name} may still run ({error}): end it with `{cluster.handle}`")


def _deadline(job: Job) -> float | None:
    hours = job.resources.deadline_hours
    return time.monotonic() + hours * 3600 if hours else None
