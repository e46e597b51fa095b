"""One stage under Prefect and MLflow: skip it or run it, and leave links both ways."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.runtime import flow_run
from prefect.states import Completed, State
from prefect.utilities.urls import url_for

from flows import guardian, progress, registry
from flows.aftermath import await_server, close_left_behind, outlive_worker, reclaim, spare
from flows.config import PipelineConfig
from flows.metering import metered
from flows.slots import GPU_LIMIT, gpu_slot
from flows.stage import Context, Progress, Stage, StageOutput
from flows.store import Resolved, Store
from flows.tracking import Tracker
from flows.upstream import locate

__all__ = ["GPU_LIMIT", "Outcome", "conduct", "prefect_tags"]

ARTIFACT_EVERY_S = 5.0
ARTIFACT_AGAIN_S = 60.0
"""After one that failed: each try may take a minute of Prefect's own retries."""

Outcome = StageOutput | State[StageOutput]
"""What a stage flow returns: its output, or a state named Skipped around it."""


def conduct(
    stage: Stage,
    overrides: Mapping[str, Any],
    force: bool,
    config: PipelineConfig,
    upstream: Mapping[str, str] | None = None,
) -> Outcome:
    """Bring a stage up to date, inside a flow run.

    `upstream` names outputs by stage, to be read instead of those of the configuration.

    Returns its output, as data of a state named Skipped when there was nothing to do.
    """
    config = config.override(overrides)
    outlive_worker()
    with spare("runs that an accident left as Running"):
        close_left_behind()
    store = Store.of(config)
    store.prepare()
    tracker = Tracker(config.name, store.root)
    named = locate(store, upstream or {}, tracker.output_of)
    resolved = store.resolve(stage, config, upstream=named, check=True)
    parent = _pipeline_run(tracker)
    # A retry of a forced run goes on where it broke off.
    force = force and (flow_run.run_count or 1) <= 1

    if not force and (output := store.lookup(stage, resolved.key)):
        return _skip(stage, store, tracker, resolved, output, parent)
    with store.lease(stage, resolved.key, on_wait=_waiting(stage)) as lease:
        # The run that held the lease before may have made it.
        if not force and (output := store.lookup(stage, resolved.key)):
            return _skip(stage, store, tracker, resolved, output, parent)
        mark = str(store.directory(stage, resolved.key))
        if left := guardian.end_left_behind(mark):
            get_run_logger().warning("ended processes of a run that died: %s", left)
        _clear(stage, store, resolved.key, force)

        section = getattr(config, stage.section)
        run_id = tracker.start_stage(
            stage,
            resolved.key,
            section.model_dump(mode="json"),
            parent=parent,
            fresh=force,
            tags=prefect_tags(),
        )
        started = time.monotonic()
        progress.reporter().started(stage.name, str(store.directory(stage, resolved.key)))
        try:
            with tracker.status_of(run_id):
                tracker.inputs(run_id, resolved, section.model_dump(mode="json"))
                _link(stage, tracker, run_id)
                context = _context(stage, config, store, resolved)
                context.env = tracker.child_environment(run_id)
                context.progress = lease.watched(context.progress)
                store.begin(stage, resolved.key, context.progress)
                store.fetch(resolved, context.progress)
                with (
                    gpu_slot() if stage.gpu else nullcontext(),
                    guardian.guarding(mark),
                    metered(tracker.client, run_id),
                    store.saving(stage, resolved.key, lease, config.save_every_s, context.log),
                ):
                    stage.run(context)
                output = store.commit(
                    stage,
                    resolved.key,
                    context,
                    inputs=resolved.contents,
                    origins=resolved.origins,
                    check=lease.check,
                    mlflow_run_id=run_id,
                    seconds=time.monotonic() - started,
                )
                tracker.outputs(run_id, output)
                _register(stage, store, tracker, resolved, output, run_id)
        except BaseException as error:
            note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            progress.reporter().ended(stage.name, "failed", time.monotonic() - started, note)
            if isinstance(error, Exception):  # not when asked to stop
                await_server()
            raise
    if parent:
        tracker.adopt(parent, stage, output, run_id, "ran")
    _summarise(stage, output, tracker, run_id)
    note = progress.figures(output.metrics)
    progress.reporter().ended(stage.name, "done", output.seconds, note)
    await_server()
    return output


def prefect_tags() -> dict[str, str]:
    """Tags that lead from an MLflow run to the flow run that wrote it."""
    url = url_for("flow-run", flow_run.id) or ""
    return {
        "prefect.flow_run_id": str(flow_run.id),
        "prefect.flow_run_name": flow_run.name or "",
        "prefect.flow_run_url": url,
        "mlflow.note.content": f"[Flow run {flow_run.name} in Prefect]({url})",
    }


def _skip(
    stage: Stage,
    store: Store,
    tracker: Tracker,
    resolved: Resolved,
    output: StageOutput,
    parent: str | None,
) -> State[StageOutput]:
    manifest = store.manifest(stage, output.key)
    assert manifest is not None, "looked up a moment ago"
    store.fetch_legible(stage, output.key)
    run_id = tracker.recall(stage, manifest, output, resolved)
    _register(stage, store, tracker, resolved, output, run_id)
    if parent:
        tracker.adopt(parent, stage, output, run_id, "skipped")
    _link(stage, tracker, run_id)
    progress.reporter().ended(stage.name, "skipped", 0.0, f"up to date in {output.path}")
    return Completed(name="Skipped", message=f"up to date: {output.path}", data=output)


def _register(
    stage: Stage,
    store: Store,
    tracker: Tracker,
    resolved: Resolved,
    output: StageOutput,
    run_id: str,
) -> None:
    if said := registry.consider(tracker, store, stage, resolved, output, run_id):
        get_run_logger().info(said)


def _waiting(stage: Stage) -> Callable[[str], None]:
    """Say whom a stage waits for, in Prefect's log and to who watches."""

    def tell(message: str) -> None:
        get_run_logger().warning(message)
        progress.reporter().started(stage.name, message)

    return tell


def _clear(stage: Stage, store: Store, key: str, force: bool) -> None:
    """Remove what must not be resumed: all when forced, a damaged output but its checkpoints."""
    if force:
        store.discard(stage, key)
    elif store.manifest(stage, key):
        get_run_logger().warning("made again: %s", store.damage(stage, key))
        store.discard(stage, key, keep=stage.scratch)


def _context(stage: Stage, config: PipelineConfig, store: Store, resolved: Resolved) -> Context:
    return Context(
        path=store.directory(stage, resolved.key),
        config=getattr(config, stage.section),
        inputs=resolved.paths,
        resources=getattr(config.resources, stage.section),
        progress=_progress(stage),
        log=get_run_logger().info,
    )


def _progress(stage: Stage) -> Progress:
    """Tell the reporter at once, and Prefect's page every few seconds."""
    show = progress.reporter().progress
    artifacts: dict[str, Any] = {}
    due = time.monotonic() + ARTIFACT_EVERY_S  # what is over before that needs no bar

    def report(what: str, done: int, total: int | None) -> None:
        nonlocal due
        show(stage.name, what, done, total)
        if not total or time.monotonic() < due:
            return
        percent = min(100.0, 100.0 * done / total)
        due = time.monotonic() + ARTIFACT_AGAIN_S
        with spare("progress"):
            if what in artifacts:
                update_progress_artifact(artifacts[what], percent)
            else:
                description = f"{stage.name}: {what}"
                artifacts[what] = create_progress_artifact(percent, description=description)
            reclaim()
            due = time.monotonic() + ARTIFACT_EVERY_S

    return report


def _pipeline_run(tracker: Tracker) -> str | None:
    """The MLflow run of the pipeline that this stage is part of."""
    root = flow_run.root_flow_run_id
    return tracker.pipeline_of(str(root)) if root and str(root) != str(flow_run.id) else None


def _link(stage: Stage, tracker: Tracker, run_id: str) -> None:
    url = tracker.run_url(run_id)
    with spare("the link to MLflow"):
        create_link_artifact(url, key=f"mlflow-{stage.name}", description="The run in MLflow.")


def _summarise(stage: Stage, output: StageOutput, tracker: Tracker, run_id: str) -> None:
    """A page about the stage, and the funnel of a report as a table."""
    rows = "\n".join(f"| {key} | {value:.6g} |" for key, value in output.metrics.items())
    markdown = (
        f"## {stage.name}\n\n`{output.path}`\n\n"
        f"[Run in MLflow]({tracker.run_url(run_id)}) · "
        f"[all runs of this stage]({tracker.compare_url(stage.name)})\n\n"
        f"| figure | value |\n|:--|--:|\n{rows}\n"
    )
    with spare("the summary"):
        create_markdown_artifact(markdown, key=f"{stage.name}-summary")
    report = output.path / "report.json"
    funnel = json.loads(report.read_text()).get("funnel") if report.is_file() else None
    if funnel:
        with spare("the funnel"):
            create_table_artifact(funnel, key=f"{stage.name}-funnel", description="Rows left.")
