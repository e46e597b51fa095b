"""One stage under Prefect and MLflow: skip it or run it, and leave links both ways."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import update_wrapper
from typing import Any

from prefect import Flow, flow, get_run_logger
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.runtime import flow_run
from prefect.states import Completed, State
from prefect.utilities.callables import parameter_docstrings
from prefect.utilities.urls import url_for

from flows import progress
from flows.config import PipelineConfig
from flows.record import registry
from flows.record.metering import metered
from flows.record.tracking import Tracker
from flows.safety import guardian
from flows.safety.aftermath import (
    await_server,
    close_left_behind,
    ignore_closed_console,
    logging_to_run,
    set_running_again,
    suppressed,
)
from flows.safety.slots import gpu_slot
from flows.stage import Context, Stage, StageOutput
from flows.storage.lease import Lease
from flows.storage.store import Store
from flows.storage.upstream import locate
from gigagan.common.progress import Progress

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
    ignore_closed_console()
    with logging_to_run():
        with suppressed("runs that an accident left as Running"):
            close_left_behind()
        # A retry of a forced run goes on where it broke off.
        force = force and (flow_run.run_count or 1) <= 1
        return _Attempt(stage, config.override(overrides), upstream or {}).outcome(force)


def stage_flow(
    stage: Stage, what: str, *, example: str, reads: str | None, again: str = "run it"
) -> Flow[..., Outcome]:
    """The flow of a stage; Prefect's form shows what its docstring says of each parameter.

    `what` names its output in a sentence, `example` is one of its overrides, `reads` a stage whose
    output it reads, and `again` what happens after its own is discarded.
    """

    def run(
        overrides: dict[str, Any] = {},  # noqa: B006 (a form shows its defaults)
        force: bool = False,
        upstream: dict[str, str] = {},  # noqa: B006
        config: PipelineConfig = PipelineConfig(),
    ) -> Outcome:
        return conduct(stage, overrides, force, config, upstream)

    others = f'`{{"{reads}": WHERE}}` with a key, an MLflow run, a\n            folder or a URL'
    run.__doc__ = f"""Bring {what} up to date.

    Args:
        overrides: settings by dotted key, as in `{example}`
        force: discard its output and {again} again
        upstream: outputs to read instead{f": {others}" if reads else "; this stage reads none"}
        config: all settings; the deployment comes with those of its preset
    """
    run.__name__ = run.__qualname__ = stage.section
    if _made:
        made = _like(_made[0], run, stage.name)
    else:
        made = flow(name=stage.name, persist_result=True)(run)
    _made.append(made)
    return made


_made: list[Flow[..., Outcome]] = []
"""The flows of stages."""


def _like(first: Flow[..., Outcome], run: Callable[..., Outcome], name: str) -> Flow[..., Outcome]:
    """What `flow(…)` makes of a function with the signature of the first flow's.

    Prefect takes a third of a second to derive the form of all settings, and every process that
    runs something makes the flows of all stages. Their forms differ in what is said of parameters.
    """
    made = copy(first)
    update_wrapper(made, run)
    made.fn, made.name, made.description = run, name, inspect.getdoc(run)
    made._entrypoint = f"{run.__module__}:{run.__qualname__}"
    said = parameter_docstrings(made.description)
    described = {
        parameter: {**schema, "description": said[parameter]}
        for parameter, schema in first.parameters.properties.items()
    }
    made.parameters = first.parameters.model_copy(update={"properties": described})
    return made


class _Attempt:
    """One try to bring an output up to date; its configuration and inputs decide which."""

    def __init__(self, stage: Stage, config: PipelineConfig, upstream: Mapping[str, str]):
        self.stage, self.config = stage, config
        self.store = Store.of(config)
        self.store.prepare()
        self.tracker = Tracker(config.name, self.store.root)
        named = locate(self.store, upstream, self.tracker.output_of)
        self.resolved = self.store.resolve(stage, config, upstream=named, check=True)
        self.key = self.resolved.key
        self.place = self.store.place(stage.name, self.key)
        self.parent = _pipeline_run(self.tracker)

    def outcome(self, force: bool) -> Outcome:
        """Skip the stage, or be the only one to run it."""
        if not force and (output := self.store.lookup(self.stage, self.key)):
            return self._skip(output)
        with self.store.lease(self.stage, self.key, on_wait=_waiting(self.stage)) as lease:
            # The run that held the lease before may have made it.
            if not force and (output := self.store.lookup(self.stage, self.key)):
                return self._skip(output)
            self._clear(force)
            with _reported(self.stage, str(self.place.folder)):
                return self._run(lease, fresh=force)

    def _skip(self, output: StageOutput) -> State[StageOutput]:
        manifest = self.store.manifest(self.stage, output.key)
        assert manifest is not None, "looked up a moment ago"
        self.store.fetch_legible(self.stage, output.key)
        run_id = self.tracker.complete_record(self.stage, manifest, output, self.resolved)
        self._register(output, run_id)
        if self.parent:
            self.tracker.copy_to_pipeline(self.parent, self.stage, output, run_id, "skipped")
        self._link(run_id)
        note = f"up to date in {output.path}"
        progress.reporter().ended(self.stage.name, "skipped", 0.0, note)
        return Completed(name="Skipped", message=f"up to date: {output.path}", data=output)

    def _clear(self, force: bool) -> None:
        """End a dead run's processes; delete what must not be resumed, but keep checkpoints."""
        if left := guardian.end_left_behind(self._mark):
            get_run_logger().warning("ended processes of a run that died: %s", left)
        if force:
            self.place.discard()
        elif manifest := self.store.manifest(self.stage, self.key):
            get_run_logger().warning("made again: %s", self.place.damage(manifest))
            self.place.discard(keep=self.stage.scratch)

    def _run(self, lease: Lease, fresh: bool) -> StageOutput:
        settings = getattr(self.config, self.stage.section).model_dump(mode="json")
        run_id = self.tracker.start_stage(
            self.stage, self.key, settings, parent=self.parent, fresh=fresh, tags=prefect_tags()
        )
        started = time.monotonic()
        with self.tracker.status_of(run_id):
            self.tracker.inputs(run_id, self.resolved, settings)
            self._link(run_id)
            context = self._context(run_id, lease)
            self._work(context, run_id, lease, fresh)
            output = self.store.commit(
                self.stage,
                self.key,
                context,
                inputs=self.resolved.contents,
                origins=self.resolved.origins,
                check=lease.check,
                mlflow_run_id=run_id,
                seconds=time.monotonic() - started,
            )
            self.tracker.outputs(run_id, output)
            self._register(output, run_id)
        return self._report_end(output, run_id)

    def _context(self, run_id: str, lease: Lease) -> Context:
        return Context(
            path=self.place.folder,
            config=getattr(self.config, self.stage.section),
            inputs=self.resolved.paths,
            resources=getattr(self.config.resources, self.stage.section),
            env=self.tracker.child_environment(run_id),
            progress=lease.watched(_progress(self.stage)),
            log=get_run_logger().info,
        )

    def _work(self, context: Context, run_id: str, lease: Lease, fresh: bool) -> None:
        """Run the stage's body with what it reads at hand and all that watches over it."""
        self.place.resume(context.progress)
        if not fresh and (
            said := self.store.go_on(self.stage, self.config, self.resolved, context.progress)
        ):
            context.log(said)
        self.store.fetch(self.resolved, context.progress)
        with (
            gpu_slot() if self.stage.gpu else nullcontext(),
            guardian.guarding(self._mark),
            metered(self.tracker.client, run_id),
            self.place.pushing(
                self.config.save_every_s, may=lambda: not lease.is_lost, log=context.log
            ),
        ):
            self.stage.run(context)

    def _report_end(self, output: StageOutput, run_id: str) -> StageOutput:
        """Put the end of the stage where people look for it."""
        if self.parent:
            self.tracker.copy_to_pipeline(self.parent, self.stage, output, run_id, "ran")
        _summarise(self.stage, output, self.tracker, run_id)
        note = progress.figures(output.metrics)
        progress.reporter().ended(self.stage.name, "done", output.seconds, note)
        await_server()
        return output

    @property
    def _mark(self) -> str:
        """Value of the variable that all processes of this output inherit; see `guardian`."""
        return str(self.place.folder)

    def _register(self, output: StageOutput, run_id: str) -> None:
        if self.stage.registers:
            said = registry.register_evaluation(
                self.tracker, self.store, self.resolved, output, run_id
            )
            get_run_logger().info(said)

    def _link(self, run_id: str) -> None:
        link_to(self.tracker.run_url(run_id), f"mlflow-{self.stage.name}")


@contextmanager
def _reported(stage: Stage, where: str) -> Iterator[None]:
    """Tell who watches of a start and of a failure, and wait to tell the server of it."""
    started = time.monotonic()
    progress.reporter().started(stage.name, where)
    try:
        yield
    except BaseException as error:
        note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        progress.reporter().ended(stage.name, "failed", time.monotonic() - started, note)
        if isinstance(error, Exception):  # not when asked to stop
            await_server()
        raise


def link_to(url: str, key: str) -> None:
    """Show a run's page in MLflow on the page of this flow run."""
    with suppressed("the link to MLflow"):
        create_link_artifact(url, key=key, description="The run in MLflow.")


def prefect_tags() -> dict[str, str]:
    """Tags that lead from an MLflow run to the flow run that wrote it."""
    url = url_for("flow-run", flow_run.id) or ""
    return {
        "prefect.flow_run_id": str(flow_run.id),
        "prefect.flow_run_name": flow_run.name or "",
        "prefect.flow_run_url": url,
        "mlflow.note.content": f"[Flow run {flow_run.name} in Prefect]({url})",
    }


def _waiting(stage: Stage) -> Callable[[str], None]:
    """Say whom a stage waits for, in Prefect's log and to who watches."""

    def tell(message: str) -> None:
        get_run_logger().warning(message)
        progress.reporter().started(stage.name, message)

    return tell


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
        with suppressed("progress"):
            if what in artifacts:
                update_progress_artifact(artifacts[what], percent)
            else:
                description = f"{stage.name}: {what}"
                artifacts[what] = create_progress_artifact(percent, description=description)
            set_running_again()
            due = time.monotonic() + ARTIFACT_EVERY_S

    return report


def _pipeline_run(tracker: Tracker) -> str | None:
    """The MLflow run of the pipeline that this stage is part of."""
    root = flow_run.root_flow_run_id
    return tracker.pipeline_of(str(root)) if root and str(root) != str(flow_run.id) else None


def _summarise(stage: Stage, output: StageOutput, tracker: Tracker, run_id: str) -> None:
    """A page about the stage, and the funnel of a report as a table."""
    rows = "\n".join(f"| {key} | {value:.6g} |" for key, value in output.metrics.items())
    markdown = (
        f"## {stage.name}\n\n`{output.path}`\n\n"
        f"[Run in MLflow]({tracker.run_url(run_id)}) · "
        f"[all runs of this stage]({tracker.compare_url(stage.name)})\n\n"
        f"| figure | value |\n|:--|--:|\n{rows}\n"
    )
    with suppressed("the summary"):
        create_markdown_artifact(markdown, key=f"{stage.name}-summary")
    report = output.path / "report.json"
    funnel = json.loads(report.read_text()).get("funnel") if report.is_file() else None
    if funnel:
        with suppressed("the funnel"):
            create_table_artifact(funnel, key=f"{stage.name}-funnel", description="Rows left.")
