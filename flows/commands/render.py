"""What a stage would start on its resources, as text. Starts nothing, makes nothing."""

from __future__ import annotations

from flows import launch
from flows.config import PipelineConfig, StageName
from flows.record import scrub
from flows.record.tracking import child_environment, tracking_uri
from flows.stage import Context, MissingInputError, Stage
from flows.stages import adapt, evaluate, train_base
from flows.stages.full_pipeline import STAGES
from flows.storage.store import Resolved, Store
from gigagan.common.settings import SettingsError

PROCESSES = {
    StageName.TRAIN_BASE: train_base.PROCESS,
    StageName.TRAIN_UPSAMPLER: train_base.PROCESS,
    StageName.EVALUATE: evaluate.PROCESS,
    StageName.ADAPT: adapt.PROCESS,
}
UNKNOWN = "KEY"
"""Instead of a key that follows from what is not there yet."""
RUN = "RUN"
"""Instead of the id of the MLflow run that is made when the stage starts."""


def rendered(name: StageName, config: PipelineConfig) -> str:
    """A command line, a batch script or a manifest, without the values of our secrets.

    Raises `SettingsError` for stages without a process, and `LaunchError` for what would not start.
    """
    if name not in PROCESSES:
        raise SettingsError(
            f"{name} works in the pipeline's own process: only "
            f"{', '.join(PROCESSES)} start another one"
        )
    stage, store = STAGES[name], Store.of(config)
    try:
        resolved = store.resolve(stage, config)
    except MissingInputError:
        resolved = _assumed(stage, config, store)
    context = Context(
        path=store.place(name, resolved.key).folder,
        config=getattr(config, stage.section),
        inputs=resolved.paths,
        resources=getattr(config.resources, stage.section),
        env=child_environment(tracking_uri(store.root), RUN),
    )
    text = scrub.text(launch.render(context, PROCESSES[name])).rstrip("\n")
    # At the end: a batch script begins with its interpreter.
    key = (
        f"; {UNKNOWN} follows from inputs that are not there yet" if resolved.key == UNKNOWN else ""
    )
    return f"{text}\n# {RUN} is the id of the MLflow run that is made when it starts{key}"


def _assumed(stage: Stage, config: PipelineConfig, store: Store) -> Resolved:
    """As if all inputs were there."""
    needs = stage.needs(config).items()
    folders = {name: store.place(need.stage.name, UNKNOWN).folder for name, need in needs}
    return Resolved(UNKNOWN, {name: folders[name] / need.under for name, need in needs}, {})
