"""The whole pipeline under Prefect and MLflow, with stages that take no time."""

import pytest
from prefect.client.orchestration import get_client
from prefect.logging.handlers import APILogHandler
from rich.console import Console

from flows.commands.watch import watch
from flows.config import USUAL, StageName
from flows.record.tracking import Tracker
from flows.stage import MissingInputError
from flows.stages import adapt, download, filter, score
from flows.stages.full_pipeline import full_pipeline, plan

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


def states() -> dict[str, str]:
    """Newest state name of each flow."""
    with get_client(sync_client=True) as client:
        newest = sorted(client.read_flow_runs(), key=lambda run: run.created)
        flows = {flow.id: flow.name for flow in client.read_flows()}
    return {flows[run.flow_id]: run.state.name for run in newest}


def log_of_newest(capsys) -> list[str]:
    """What a watcher of the newest pipeline is told of its stages."""
    APILogHandler().flush()
    with get_client(sync_client=True) as client:
        (flow,) = [flow for flow in client.read_flows() if flow.name == "full-pipeline"]
        runs = [run for run in client.read_flow_runs() if run.flow_id == flow.id]
    run = max(runs, key=lambda run: run.created)
    capsys.readouterr()
    assert watch(run.id, Console(width=200)).is_completed()
    shown = [line.partition("  ")[2] for line in capsys.readouterr().out.splitlines()]
    told = [line for line in shown if line.startswith(("stage", *StageName))]
    return [line.partition(" in ")[0].partition(": /")[0] for line in told]


def test_stages_run_in_order_and_leave_a_complete_record(config, ran, capsys):
    assert [step.action for step in plan(config)] == ["run"] * 6
    outputs = full_pipeline(config=config)
    assert ran == list(USUAL) == list(outputs)
    log = log_of_newest(capsys)
    assert log[:6] == [
        "stage 1 of 6, download: Metadata to images.",
        "download started",
        "download done",
        "stage 2 of 6, score: Images to scores.",
        "score started",
        "score done",
    ]
    assert [line for line in log if "done" in line] == [f"{name} done" for name in USUAL]
    assert [step.action for step in plan(config)] == ["skip"] * 6

    tracker = Tracker(config.name, config.store_path)
    (pipeline,) = tracker.client.search_runs([tracker.experiment()])
    assert pipeline.info.status == "FINISHED"
    assert pipeline.info.run_name == pipeline.data.tags["prefect.flow_run_name"]
    assert pipeline.data.metrics["evaluate/kid"] == pytest.approx(0.1)
    assert "/runs/flow-run/" in pipeline.data.tags["prefect.flow_run_url"]
    for name, output in outputs.items():
        run = tracker.client.get_run(output.mlflow_run_id)
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == pipeline.info.run_id
        assert run.data.tags["stage"] == name
    with get_client(sync_client=True) as client:
        keys = {artifact.key for artifact in client.read_artifacts()}
    assert {"mlflow", "mlflow-filter", "pipeline-summary", "filter-funnel"} <= keys

    ran.clear()
    assert full_pipeline({"train_upsampler.seed": 9}, config=config)["evaluate"]
    assert ran == ["train-upsampler"]  # equal weights came out, so nothing after it
    assert states()["full-pipeline"] == "Completed"
    assert {
        states()[name] for name in ("download", "score", "filter", "train-base", "evaluate")
    } == {"Skipped"}


def test_a_stage_runs_alone_on_what_the_store_holds(config, ran):
    with pytest.raises(MissingInputError, match="prefect deployment run score/score"):
        full_pipeline(stages=[StageName.DOWNLOAD, StageName.TRAIN_BASE], config=config)
    score.score(config=config)
    first = filter.filter_(config=config)
    assert ran == ["download", "score", "filter"]
    second = filter.filter_(force=True, config=config)
    assert ran == ["download", "score", "filter", "filter"]
    assert first.content == second.content
    assert first.mlflow_run_id != second.mlflow_run_id


def test_a_failed_stage_goes_on_in_its_folder_and_mlflow_run(config, ran, monkeypatch, capsys):
    def break_off(context):
        (context.path / "half").write_text("done")
        raise OSError("no network")

    only = [StageName.DOWNLOAD]
    with monkeypatch.context() as patch:
        patch.setitem(vars(download.STAGE), "run", break_off)
        with pytest.raises(OSError, match="no network"):
            full_pipeline(stages=only, config=config)
    assert [step.action for step in plan(config, only)] == ["resume"]
    tracker = Tracker(config.name, config.store_path)
    (broken,) = tracker.client.search_runs([tracker.experiment("download")])
    (pipeline,) = tracker.client.search_runs([tracker.experiment()])
    assert broken.info.status == pipeline.info.status == "FAILED"

    output = full_pipeline(stages=only, config=config)["download"]
    assert log_of_newest(capsys)[0].startswith("stage 1 of 1, download: ")
    assert output.mlflow_run_id == broken.info.run_id
    assert (output.path / "half").exists()
    assert tracker.client.get_run(broken.info.run_id).info.status == "FINISHED"


def test_plan_names_what_is_missing(config, ran):
    (step,) = plan(config, [StageName.EVALUATE])
    assert step.action == "missing"
    assert "train-base" in step.reason or "download" in step.reason


def test_adapt_runs_only_where_it_is_named_and_by_the_content_of_what_it_reads(
    config, ran, monkeypatch, tmp_path
):
    seen = []

    def body(context):
        seen.append({name: path.name for name, path in context.inputs.items()})
        (context.path / "report.json").write_text('{"bytes": 9, "new": {"r1_after": 0.5}}')

    monkeypatch.setattr(adapt.launch, "stage_process", lambda context, process: body(context))
    only = [StageName.ADAPT]
    with pytest.raises(MissingInputError, match="are null: give one of them"):
        full_pipeline(stages=only, config=config)
    with pytest.raises(MissingInputError, match=r"adapt.pictures: 'nowhere' is not there"):
        full_pipeline({"adapt.pictures": "nowhere"}, stages=only, config=config)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/captions.txt").write_text("a bell")
    asked = {"adapt.pictures": str(tmp_path / "new")}
    (step,) = plan(config.override(asked), only)
    assert step.action == "missing"
    full_pipeline(config=config)
    assert not seen
    first = full_pipeline(asked, stages=only, config=config)["adapt"]
    assert first.metrics == {"bytes": 9.0, "new_r1_after": 0.5}
    assert seen == [{"base": "snapshot.safetensors", "heldout": "heldout"}]
    (tmp_path / "new").rename(tmp_path / "moved")
    moved = config.override({"adapt.pictures": str(tmp_path / "moved")})
    assert [step.action for step in plan(moved, only)] == ["skip"]
    (tmp_path / "moved/captions.txt").write_text("a key")
    assert [step.action for step in plan(moved, only)] == ["run"]
