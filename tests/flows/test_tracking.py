"""The record in MLflow, on a database file."""

import os
import subprocess
import sys

import pytest

from flows.stage import Context, Stage, Store
from flows.tracking import DIGEST_LENGTH, Tracker, TrackingError, flatten, tracking_uri

KEY = "0123456789abcdef" * 4


def made(context: Context) -> None:
    (context.path / "grid.png").write_bytes(b"picture")
    (context.path / "weights.bin").write_bytes(b"large")
    (context.path / "report.json").write_text("{}")


STAGE = Stage("download", 1, made)


@pytest.fixture
def tracker(config):
    return Tracker(config.name, config.store_path)


@pytest.fixture
def output(config):
    store = Store(config.store_path)
    with store.lease(STAGE, KEY):
        context = Context(store.directory(STAGE, KEY), config.download)
        made(context)
        context.metrics["rows"] = 7.0
        return store.commit(STAGE, KEY, context, inputs={})


def start(tracker: Tracker, *, fresh: bool = False, parent: str | None = None) -> str:
    return tracker.start_stage(
        STAGE, KEY, {"a": {"b": 1}}, parent=parent, fresh=fresh, tags={"colour": "red"}
    )


def test_a_stage_run_lies_in_its_own_experiment_below_the_pipelines_run(tracker):
    parent = tracker.start_pipeline("flow-1", {"x": 1}, {})
    run = tracker.client.get_run(start(tracker, parent=parent))
    experiment = tracker.client.get_experiment(run.info.experiment_id)
    assert experiment.name == f"{tracker.name}/download"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["fingerprint"] == KEY[:16]
    assert run.data.tags["colour"] == "red"
    assert run.data.params == {"a.b": "1"}
    assert tracker.pipeline_of("flow-1") == parent
    assert tracker.pipeline_of("flow-2") is None


def test_an_attempt_that_broke_off_goes_on_in_its_old_run(tracker):
    first = start(tracker)
    with pytest.raises(RuntimeError), tracker.status_of(first):
        raise RuntimeError
    assert start(tracker) == first
    assert tracker.client.get_run(first).info.status == "RUNNING"
    assert start(tracker, fresh=True) != first


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_the_status_says_how_a_run_ended(tracker, error, status):
    run = start(tracker, fresh=True)
    if error is None:
        with tracker.status_of(run):
            pass
    else:
        with pytest.raises(error), tracker.status_of(run):
            raise error
    assert tracker.client.get_run(run).info.status == status


def test_settings_are_written_once_and_new_ones_are_added(tracker):
    run = start(tracker)
    tracker.params(run, {"a": {"b": 2}, **{f"k{i}": i for i in range(230)}})
    params = tracker.client.get_run(run).data.params
    assert params["a.b"] == "1"
    assert len(params) == 231


def test_outputs_are_a_dataset_figures_and_pictures(tracker, output):
    run = start(tracker)
    tracker.outputs(run, output)
    record = tracker.client.get_run(run)
    (dataset,) = record.inputs.dataset_inputs
    assert dataset.dataset.digest == output.content[:DIGEST_LENGTH]
    assert record.data.metrics == {"final/rows": 7.0}
    names = {artifact.path for artifact in tracker.client.list_artifacts(run)}
    assert names == {"grid.png", "report.json"}


def test_inputs_are_datasets_by_content(tracker, tmp_path):
    run = start(tracker)
    tracker.inputs(run, {"shards": tmp_path}, {"shards": "c" * 64})
    (dataset,) = tracker.client.get_run(run).inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("shards", "c" * DIGEST_LENGTH)
    assert dataset.tags[0].value == "input:shards"


def test_figures_are_copied_to_the_pipelines_run(tracker, output):
    parent = tracker.start_pipeline("flow-3", {}, {})
    tracker.adopt(parent, STAGE, output, "abc", "skipped")
    record = tracker.client.get_run(parent)
    assert record.data.metrics == {"download/rows": 7.0}
    assert record.data.tags["stage.download"] == "skipped: abc"


def test_an_output_that_the_database_does_not_know_is_recorded_again(tracker, config, output):
    manifest = Store(config.store_path).manifest(STAGE, KEY)
    run = tracker.recall(STAGE, manifest, output)
    record = tracker.client.get_run(run)
    assert record.info.status == "FINISHED"
    assert record.data.metrics == {"final/rows": 7.0}
    assert tracker.recall(STAGE, manifest, output.model_copy(update={"mlflow_run_id": run})) == run


def test_running_runs_of_dead_processes_are_ended(tracker):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead, alive = start(tracker, fresh=True), start(tracker, fresh=True)
    tracker.client.set_tag(dead, "pid", str(child.pid))
    tracker.reconcile(tracker.experiment("download"))
    assert tracker.client.get_run(dead).info.status == "KILLED"
    assert tracker.client.get_run(alive).info.status == "RUNNING"


def test_a_training_process_logs_to_the_run_it_is_given(tracker):
    run = start(tracker)
    code = (
        "import os, mlflow; run = os.environ['MLFLOW_RUN_ID'];"
        "mlflow.MlflowClient().log_metric(run, 'loss', 0.5, step=3)"
    )
    env = {**os.environ, **tracker.child_environment(run)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    (metric,) = tracker.client.get_metric_history(run, "loss")
    assert (metric.value, metric.step) == (0.5, 3)


def test_a_server_that_does_not_answer_is_named_at_once(config, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9 does not answer") as error:
        Tracker(config.name, config.store_path)
    assert "secret" not in str(error.value)


def test_the_database_lies_beside_the_store(config, runs):
    assert tracking_uri(config.store_path) == f"sqlite:///{runs}/mlflow.db"


def test_flatten_joins_keys_with_dots():
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}
