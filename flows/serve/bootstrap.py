"""What a Prefect server needs before it can run us: pool, limit, automations, deployments.

Idempotent: a second call changes nothing but to the current definitions.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.events import AutomationCore, EventTrigger, Posture
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.importtools import from_qualified_name
from prefect.utilities.templating import apply_values
from rich.console import Console

from flows import progress
from flows.config import PipelineConfig
from flows.safety.aftermath import SILENT
from flows.safety.slots import GPU_LIMIT
from flows.serve import settings

DEPLOYMENTS = Path(__file__).with_name("prefect.yaml")
ZOMBIES = "crash-zombie-runs"
ZOMBIE_AFTER_S = 90.0
"""Silence after which a run is taken for dead; three of its heartbeats."""


class BootstrapError(RuntimeError):
    """The server has something else under one of our names."""


def bootstrap(
    gpu_jobs: int | None = None,
    *,
    pool: str = settings.POOL,
    kind: str = "process",
    job_variables: Mapping[str, Any] | None = None,
    zombie_after_s: float = ZOMBIE_AFTER_S,
) -> None:
    """Create or update everything on the server of `PREFECT_API_URL`.

    `gpu_jobs` sets how many stages may hold a GPU at a time (None keeps what the server has, at
    first 1). `kind` is the type of the work pool, `process` or `kubernetes`; `job_variables` are
    those of all deployments. Raises `BootstrapError` when the pool exists with another type.
    """
    with get_client(sync_client=True) as client:
        make_pool(client, pool, kind)
        make_gpu_limit(client, gpu_jobs)
        make_zombie_automation(client, zombie_after_s)
        deploy(client, pool, job_variables)


def make_pool(client: SyncPrefectClient, name: str, kind: str) -> None:
    """The work pool whose workers run flows: as processes of their machine, or as pods."""
    template = _kubernetes_template() if kind == "kubernetes" else None
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        pool = WorkPoolCreate(name=name, type=kind, base_job_template=template or {})
        client.create_work_pool(pool)
        return
    if found.type != kind:
        raise BootstrapError(
            f"the work pool {name!r} is of type {found.type!r}, not {kind!r}: name another pool, "
            f"or delete it with `prefect work-pool delete {name}`"
        )
    if template:
        client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))


def _kubernetes_template() -> dict[str, Any]:
    template: dict[str, Any] = import_module("flows.kubernetes.pools").template()
    return template  # a room that is entered where it is asked for: its packages are an extra


def make_gpu_limit(client: SyncPrefectClient, gpu_jobs: int | None) -> None:
    """How many GPU stages run at a time; others queue. A missing limit would limit nothing."""
    if gpu_jobs is None:
        try:
            client.read_global_concurrency_limit_by_name(GPU_LIMIT)
        except ObjectNotFound:
            gpu_jobs = 1
    if gpu_jobs is not None:
        client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, gpu_jobs)


def make_zombie_automation(client: SyncPrefectClient, after_s: float) -> None:
    """Mark runs as crashed that send no heartbeats any more: worker and flow died together."""
    ends = ("Completed", "Failed", "Cancelled", "Crashed")
    automation = AutomationCore(
        name=ZOMBIES,
        description="Flow runs whose heartbeats stopped become Crashed.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{end}" for end in ends)},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=after_s),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"{SILENT} for {after_s:g} s: its process is gone",
            )
        ],
    )
    known = client.read_automations_by_name(ZOMBIES)
    if known:
        client.update_automation(known[0].id, automation)
    else:
        client.create_automation(automation)


def has_worker() -> bool:
    """Whether a worker of this machine's pool is alive."""
    with get_client(sync_client=True) as client:
        workers = client.read_workers_for_work_pool(settings.POOL)
    return any(worker.status == WorkerStatus.ONLINE for worker in workers)


def start_run(deployment: str, parameters: dict[str, Any]) -> FlowRun:
    """Let a worker run a deployment."""
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(deployment)
        return client.create_flow_run_from_deployment(found.id, parameters=parameters)


def deploy(
    client: SyncPrefectClient, pool: str, job_variables: Mapping[str, Any] | None = None
) -> None:
    """Register the deployments of prefect.yaml in a work pool.

    `prefect deploy --all --prefect-file flows/serve/prefect.yaml` does the same for the pool in
    that file, five times as slowly: it derives the form of every deployment anew.
    """
    flows: dict[str, tuple[UUID, dict[str, Any], str | None]] = {}
    found = deployments()
    with progress.reporting(Console()) as reporter:
        for number, deployment in enumerate(found, 1):
            entrypoint = deployment["entrypoint"]
            if entrypoint not in flows:
                flow: Flow[..., Any] = load_flow_from_entrypoint(entrypoint)
                form = flow.parameters.model_dump_for_openapi()
                flows[entrypoint] = client.create_flow(flow), form, about(flow)
            flow_id, form, description = flows[entrypoint]
            client.create_deployment(
                flow_id,
                deployment["name"],
                entrypoint=entrypoint,
                description=description,
                parameters=deployment["parameters"],
                parameter_openapi_schema=form,
                enforce_parameter_schema=True,
                tags=deployment["tags"],
                work_pool_name=pool,
                job_variables=dict(job_variables or deployment["work_pool"]["job_variables"]),
                pull_steps=[],
            )
            reporter.progress("bootstrap", "deployments", number, len(found))


def about(flow: Flow[..., Any]) -> str:
    """What a flow does; Prefect's form shows what its docstring says of each parameter."""
    return (flow.description or "").partition("\nArgs:")[0].strip()


def deployments() -> list[dict[str, Any]]:
    """What prefect.yaml declares, with its build steps run and their results put in."""
    document = yaml.safe_load(DEPLOYMENTS.read_text())
    results = {}
    for step in document["build"]:
        ((function, inputs),) = step.items()
        arguments = {name: value for name, value in inputs.items() if name != "id"}
        results[inputs["id"]] = from_qualified_name(function)(**arguments)
    return list(apply_values(document["deployments"], results))


def preset_step(preset: str) -> dict[str, Any]:
    """A build step of prefect.yaml: the settings of a preset, as `{{ ID.config }}`."""
    return {"config": PipelineConfig.preset(preset).model_dump(mode="json", exclude_unset=True)}


def folder_step() -> dict[str, str]:
    """A build step of prefect.yaml: the current folder, as `{{ ID.folder }}`."""
    return {"folder": str(Path.cwd())}
