"""Download → score → filter → base GAN → upsampler → evaluation, under one MLflow run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from flows import progress
from flows.conductor import link_to, prefect_tags
from flows.config import USUAL, PipelineConfig, StageName
from flows.record.tracking import PIPELINE, Tracker
from flows.safety.aftermath import suppressed
from flows.stage import Manifest, MissingInputError, Stage, StageOutput
from flows.stages import (
    adapt,
    download,
    evaluate,
    filter,
    outside,
    score,
    train_base,
    train_upsampler,
)
from flows.storage.store import Store, Upstream
from flows.storage.upstream import locate

ORDER = (
    (download.STAGE, download.download),
    (score.STAGE, score.score),
    (filter.STAGE, filter.filter_),
    (train_base.STAGE, train_base.train_base),
    (train_upsampler.STAGE, train_upsampler.train_upsampler),
    (evaluate.STAGE, evaluate.evaluate),
    (adapt.STAGE, adapt.adapt),
)
"""All stages with their flows, as they run."""
STAGES = {StageName(stage.name): stage for stage, _ in ORDER}
FLOWS = {StageName(stage.name): run for stage, run in ORDER}
ALL = list(USUAL)
"""Those that run unless others are named."""


@flow(name=PIPELINE, persist_result=True)
def full_pipeline(
    overrides: dict[str, Any] = {},  # noqa: B006
    stages: list[StageName] = ALL,
    force: list[StageName] = [],  # noqa: B006
    upstream: dict[str, str] = {},  # noqa: B006
    config: PipelineConfig = PipelineConfig(),
) -> dict[str, StageOutput]:
    """Bring all stages up to date, in order.

    Args:
        overrides: settings by dotted key, as in `{"train_base.total_images": 20000}`
        stages: run only these; what they need must be in the store
        force: discard the output of these and run them again
        upstream: outputs that stand for stages, which then do not run: `{"filter": WHERE}` with
            a key, an MLflow run, a folder or a URL
        config: all settings; the deployment comes with those of its preset
    """
    config = config.override(overrides)
    chosen = [name for name in STAGES if name in stages and name not in upstream]
    refuse_if_lacking(config, chosen, force, upstream)
    Store.of(config).prepare()
    tracker = Tracker(config.name, config.store_path)
    run_id = tracker.start_pipeline(
        str(flow_run.id), config.model_dump(mode="json"), prefect_tags()
    )
    link_to(tracker.run_url(run_id), "mlflow")
    outputs: dict[str, StageOutput] = {}
    log = get_run_logger().info
    try:
        with tracker.status_of(run_id), progress.logged(log):
            for number, name in enumerate(chosen, 1):
                about = PipelineConfig.model_fields[STAGES[name].section].description
                log("stage %d of %d, %s: %s", number, len(chosen), name, about)
                outcome = FLOWS[name](force=name in force, upstream=upstream, config=config)
                outputs[name.value] = cast(StageOutput, outcome)  # Prefect unwraps a state
    finally:
        with suppressed("the summary"):
            create_markdown_artifact(_summary(outputs, tracker, run_id), key="pipeline-summary")
    return outputs


@dataclass(frozen=True)
class Step:
    """What a run would do about one stage, and why."""

    stage: str
    action: str
    """`skip`, `run`, `resume`, `force` or `missing`."""
    key: str | None
    """None while it depends on output that is not there yet."""
    reason: str
    lacks: tuple[str, ...] = ()
    """What it needs from outside the store and is not there."""


def refuse_if_lacking(
    config: PipelineConfig,
    stages: Sequence[StageName],
    force: Sequence[StageName] = (),
    upstream: Mapping[str, str] | None = None,
) -> None:
    """Raise `MissingInputError` when a stage that would run is sure to fail, before any works."""
    if not any(outside.lacking(config, name) for name in stages):
        return
    if lacks := [text for step in plan(config, stages, force, upstream) for text in step.lacks]:
        raise MissingInputError("; ".join(lacks))


def plan(
    config: PipelineConfig,
    stages: Sequence[StageName] = ALL,
    force: Sequence[StageName] = (),
    upstream: Mapping[str, str] | None = None,
) -> list[Step]:
    """What `full_pipeline` would do, without doing it."""
    store = Store.of(config)
    given = _given(config, store, upstream or {})
    pending: list[str] = []  # stages whose output may change, so that later keys are open
    steps = []
    for name in STAGES:
        if name not in stages or name in given:
            continue
        this = STAGES[name]
        makers = {need.stage.name for need in this.needs(config).values()}
        waits_for = [other for other in pending if other in makers]
        step = _step(this, config, store, given, waits_for, name in force)
        if step.action != "skip":
            pending.append(this.name)
            step = replace(step, lacks=tuple(outside.lacking(config, name)))
        steps.append(step)
    return steps


def _given(config: PipelineConfig, store: Store, upstream: Mapping[str, str]) -> Upstream:
    if not upstream:
        return {}  # MLflow is asked only for what names one of its runs
    return locate(store, upstream, lambda run: Tracker(config.name, store.root).output_of(run))


def _step(
    this: Stage,
    config: PipelineConfig,
    store: Store,
    given: Upstream,
    waits_for: list[str],
    force: bool,
) -> Step:
    if waits_for:
        reason = f"its key follows from the output of {', '.join(waits_for)}"
        return Step(this.name, "force" if force else "run", None, reason)
    try:
        resolved = store.resolve(this, config, upstream=given)
    except MissingInputError as error:
        return Step(this.name, "missing", None, str(error))
    key, folder = resolved.key, store.place(this.name, resolved.key)
    if force:
        return Step(this.name, "force", key, f"discards {folder}")
    manifest = store.manifest(this, key)
    if manifest is None:
        if found := store.shorter(this, config, resolved):
            return Step(this.name, "resume", key, f"goes on from {found[1]:,} in {found[0]}")
        if folder.has_work():
            return Step(this.name, "resume", key, f"unfinished in {folder}")
        return Step(this.name, "run", key, "never run with this configuration and input")
    if damage := folder.damage(manifest):
        return Step(this.name, "run", key, damage)
    return Step(
        this.name, "skip", key, f"up to date in {folder}{_made_with(this, config, manifest)}"
    )


def _made_with(this: Stage, config: PipelineConfig, manifest: Manifest) -> str:
    """Which settings an output was made with that are others now, and do not decide it."""
    now = getattr(config, this.section).model_dump(mode="json")
    free = sorted({*this.unkeyed(config)} & manifest.config.keys())
    other = [
        f"{this.section}.{name}" + ("" if isinstance(was, dict) else f" {was}")
        for name in free
        if (was := manifest.config[name]) != now[name]
    ]
    return f" (made with another {', '.join(other)}: --force makes it anew)" if other else ""


def _summary(outputs: dict[str, StageOutput], tracker: Tracker, run_id: str) -> str:
    rows = []
    for name, output in outputs.items():
        page = tracker.run_url(output.mlflow_run_id) if output.mlflow_run_id else ""
        headline = progress.figures(output.metrics)
        rows.append(f"| {name} | `{output.key[:16]}` | {headline} | [run]({page}) |")
    return (
        "## Stages\n\n| stage | key | figures | MLflow |\n|:--|:--|:--|:--|\n"
        + "\n".join(rows)
        + f"\n\n[Pipeline run in MLflow]({tracker.run_url(run_id)}) · "
        + f"[compare pipeline runs]({tracker.compare_url()})\n"
    )
