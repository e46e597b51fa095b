"""What a Prefect server needs before it can run us: pool, limit, automation, deployments.

Idempotent: a second call changes nothing but to the current definitions.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from datetime import timedelta
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType, WorkerStatus
from prefect.events import AutomationCore, EventTrigger, Posture
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists

from flows import settings
from flows.conductor import GPU_LIMIT
from flows.config import ROOT, PipelineConfig

DEPLOYMENTS = ROOT / "infra" / "prefect.yaml"
ZOMBIES = "crash-zombie-runs"
ZOMBIE_AFTER = timedelta(seconds=90)


class BootstrapError(RuntimeError):
    """The server refused a definition."""


def bootstrap(gpu_jobs: int = 1) -> None:
    """Create or update everything on the server of `PREFECT_API_URL`."""
    with get_client(sync_client=True) as client:
        make_pool(client)
        make_gpu_limit(client, gpu_jobs)
        make_zombie_automation(client)
    deploy()


def make_pool(client: SyncPrefectClient) -> None:
    """The work pool whose worker runs flows as processes of this machine."""
    with contextlib.suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=settings.POOL, type="process"))


def make_gpu_limit(client: SyncPrefectClient, gpu_jobs: int) -> None:
    """How many training jobs run at a time; others queue. A missing limit would limit nothing."""
    client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, gpu_jobs)


def make_zombie_automation(client: SyncPrefectClient) -> None:
    """Mark runs as crashed that send no heartbeats any more: worker and flow died together."""
    states = ("Completed", "Failed", "Cancelled", "Crashed")
    automation = AutomationCore(
        name=ZOMBIES,
        description="Flow runs whose heartbeats stopped become Crashed.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{s}" for s in states)},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=ZOMBIE_AFTER,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"no heartbeat for {ZOMBIE_AFTER.seconds} s: its process is gone",
            )
        ],
    )
    known = client.read_automations_by_name(ZOMBIES)
    if known:
        client.update_automation(known[0].id, automation)
    else:
        client.create_automation(automation)


def has_worker() -> bool:
    """Whether a worker of our pool is alive."""
    with get_client(sync_client=True) as client:
        workers = client.read_workers_for_work_pool(settings.POOL)
    return any(worker.status == WorkerStatus.ONLINE for worker in workers)


def deploy() -> None:
    """Register the deployments of infra/prefect.yaml."""
    command = ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(DEPLOYMENTS)]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise BootstrapError(f"`{' '.join(command)}` failed:\n{tail}")


def preset_step(preset: str) -> dict[str, Any]:
    """A build step of infra/prefect.yaml: the settings of a preset, as `{{ ID.config }}`."""
    return {"config": PipelineConfig.preset(preset).model_dump(mode="json", exclude_unset=True)}
