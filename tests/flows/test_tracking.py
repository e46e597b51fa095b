"""The record in MLflow, on a database file."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from flows.record.lineage import DIGEST_LENGTH
from flows.record.metering import metered
from flows.record.tracking import Tracker, TrackingError, flatten, tracking_uri
from flows.stage import Context, Stage
from flows.storage.store import Resolved, Store
from tests.flows.conftest import wait_for
from tests.flows.outputs import evaluated, reading

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
        store.place(STAGE.name, KEY).resume()
        context = Context(store.place(STAGE.name, KEY).folder, config.download)
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


def test_inputs_are_datasets_by_content_that_name_who_made_them(tracker, config):
    made = evaluated(config, 1, 0.3, runs={"filter": "f" * 32})
    run = start(tracker)
    shards = made.base.path.parent.parent / "filter" / made.output.key[:16] / "shards/032"
    filtered = Store.of(config).lookup(Stage("filter", 2, made_nothing), made.output.key)
    resolved = reading(config, 2, shards=(Stage("filter", 2, made_nothing), filtered, "shards/032"))
    tracker.inputs(run, resolved, {})
    (dataset,) = tracker.client.get_run(run).inputs.dataset_inputs
    assert dataset.dataset.digest == resolved.contents["shards"][:DIGEST_LENGTH]
    assert str(shards) in dataset.dataset.source
    assert {tag.key: tag.value for tag in dataset.tags} == {
        "mlflow.data.context": "input:shards",
        "stage": "filter",
        "fingerprint": made.output.key[:16],
        "run_id": "f" * 32,
    }


def test_lists_of_urls_are_inputs_without_their_credentials(tracker):
    run = start(tracker)
    lists = ["s3://bucket/a.parquet", "https://me:pass@host/b.parquet?X-Amz-Signature=abc"]
    resolved = Resolved("k", {}, {"metadata": "d" * 64})
    tracker.inputs(run, resolved, {"metadata": lists})
    found = tracker.client.get_run(run).inputs.dataset_inputs
    assert {entry.dataset.name.partition("?")[0] for entry in found} == {
        "metadata/a.parquet",
        "metadata/b.parquet",
    }
    assert {entry.dataset.digest for entry in found} == {"d" * DIGEST_LENGTH}
    assert not any(
        secret in str(found[i].dataset.source) for i in (0, 1) for secret in ("pass", "abc")
    )


def test_the_record_leads_from_the_evaluation_back_to_the_lists(tracker, config):
    """Through MLflow's API alone: models, the runs that made them, their inputs, their makers."""
    names = ["download", "filter", "train-base", "train-upsampler", "evaluate"]
    runs = {}
    for name in names:
        stage = Stage(name, 1, made_nothing)
        runs[name] = tracker.start_stage(stage, KEY, {}, parent=None, fresh=True, tags={})
    made = evaluated(config, 3, 0.3, runs=runs)
    store = Store.of(config)
    for name in names:
        stage = Stage(name, 1, made_nothing)
        output = store.lookup(stage, made.output.key)
        if name.startswith("train"):
            filtered = store.lookup(Stage("filter", 1, made_nothing), made.output.key)
            shards = (Stage("filter", 1, made_nothing), filtered, "shards/032")
            tracker.inputs(runs[name], reading(config, 3, shards=shards), {})
        if name == "filter":
            fetched = store.lookup(Stage("download", 1, made_nothing), made.output.key)
            fates = (Stage("download", 1, made_nothing), fetched, "fates")
            tracker.inputs(runs[name], reading(config, 3, fates=fates), {})
        if name == "evaluate":
            tracker.inputs(runs[name], made.resolved, {})
        tracker.outputs(runs[name], output)

    client = tracker.client
    read = client.get_run(runs["evaluate"]).inputs.model_inputs
    models = {m.model_type: m for m in (client.get_logged_model(i.model_id) for i in read)}
    assert set(models) == {"train-base", "train-upsampler"}
    base = models["train-base"]
    assert base.tags["uri"] == (made.base.path / "snapshot.safetensors").as_uri()
    assert len(base.tags["sha256"]) == 64
    training = client.get_run(base.source_run_id)
    assert [m.model_id for m in training.outputs.model_outputs] == [base.model_id]
    filtering = client.get_run(maker(training, "input:shards"))
    fetching = client.get_run(maker(filtering, "input:fates"))
    (listed,) = [d for d in fetching.inputs.dataset_inputs if context(d) == "input:metadata"]
    assert listed.dataset.name == "metadata/laion.parquet"
    tracker.outputs(runs["train-base"], made.base)  # said twice, recorded once
    assert len(client.get_run(runs["train-base"]).outputs.model_outputs) == 1


def maker(run, wanted):
    (found,) = [d for d in run.inputs.dataset_inputs if context(d) == wanted]
    return {tag.key: tag.value for tag in found.tags}["run_id"]


def context(dataset):
    return {tag.key: tag.value for tag in dataset.tags}["mlflow.data.context"]


def made_nothing(context):
    pass


def test_figures_are_copied_to_the_pipelines_run(tracker, output):
    parent = tracker.start_pipeline("flow-3", {}, {})
    tracker.copy_to_pipeline(parent, STAGE, output, "abc", "skipped")
    record = tracker.client.get_run(parent)
    assert record.data.metrics == {"download/rows": 7.0}
    assert record.data.tags["stage.download"] == "skipped: abc"


def test_an_output_that_the_database_does_not_know_is_recorded_again(tracker, config, output):
    manifest = Store(config.store_path).manifest(STAGE, KEY)
    nothing = Resolved(KEY, {}, {})
    run = tracker.complete_record(STAGE, manifest, output, nothing)
    record = tracker.client.get_run(run)
    assert record.info.status == "FINISHED"
    assert record.data.metrics == {"final/rows": 7.0}
    output = output.model_copy(update={"mlflow_run_id": run})
    assert tracker.complete_record(STAGE, manifest, output, nothing) == run


def test_running_runs_of_dead_processes_are_ended(tracker):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead, alive = start(tracker, fresh=True), start(tracker, fresh=True)
    tracker.client.set_tag(dead, "pid", str(child.pid))
    tracker.reconcile(tracker.experiment("download"))
    assert tracker.client.get_run(dead).info.status == "KILLED"
    assert tracker.client.get_run(alive).info.status == "RUNNING"


def test_a_process_id_that_is_used_again_does_not_keep_a_run_alive(tracker):
    reused, alive = start(tracker, fresh=True), start(tracker, fresh=True)
    tracker.client.set_tag(reused, "process.start_ticks", "1000")
    tracker.reconcile(tracker.experiment("download"))
    assert tracker.client.get_run(reused).info.status == "KILLED"
    assert tracker.client.get_run(alive).info.status == "RUNNING"


def test_a_key_that_is_taken_over_ends_the_runs_of_the_other_host(tracker):
    parent = tracker.start_pipeline("flow-far", {}, {})
    far, other = start(tracker, fresh=True, parent=parent), start_key(tracker, "f" * 64)
    for run in (parent, far, other):
        tracker.client.set_tag(run, "host", "elsewhere")
        tracker.client.set_tag(run, "process.machine", "elsewhere boot pid")
    mine = tracker.start_pipeline("flow-near", {}, {})
    start(tracker, fresh=True, parent=mine)
    states = {run: tracker.client.get_run(run).info.status for run in (parent, far, other, mine)}
    assert states == {parent: "KILLED", far: "KILLED", other: "RUNNING", mine: "RUNNING"}


def start_key(tracker, key):
    return tracker.start_stage(STAGE, key, {}, parent=None, fresh=True, tags={})


def test_secrets_are_hidden_in_settings_tags_and_texts(tracker, config, output, monkeypatch):
    monkeypatch.setenv("MINE_API_KEY", "sk-very-secret-value")
    (output.path / "report.json").write_text(
        '{"db_password": "hunter2", "note": "s3://a:b@host/x"}'
    )
    (output.path / "page.html").write_text("key: sk-very-secret-value")
    settings = {"env": {"HF_TOKEN": "t0ken"}, "url": "postgres://me:pw@host/db", "tokens": 7}
    run = tracker.start_stage(
        STAGE, KEY, settings, parent=None, fresh=True, tags={"link": "https://u:pw@host"}
    )
    tracker.outputs(run, output)
    record = tracker.client.get_run(run).data
    assert record.params == {"env.HF_TOKEN": "<hidden>", "url": "postgres://host/db", "tokens": "7"}
    assert record.tags["link"] == "https://host"
    texts = [
        Path(tracker.client.download_artifacts(run, name)).read_text()
        for name in ("report.json", "page.html")
    ]
    assert texts == ['{"db_password": "<hidden>", "note": "s3://host/x"}', "key: <hidden>"]


def test_a_link_that_leaves_the_output_is_not_uploaded(tracker, output, tmp_path):
    (tmp_path / "private.json").write_text("{}")
    (output.path / "stolen.json").symlink_to(tmp_path / "private.json")
    run = start(tracker, fresh=True)
    tracker.outputs(run, output)
    assert "stolen.json" not in {a.path for a in tracker.client.list_artifacts(run)}


def test_the_load_of_the_machine_is_logged_and_goes_on_in_the_next_attempt(tracker, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    run = start(tracker, fresh=True)
    name = "system/cpu_utilization_percentage"

    def logged():
        return tracker.client.get_metric_history(run, name)

    with metered(tracker.client, run):
        first = wait_for(logged, 30)
    with metered(tracker.client, run):
        wait_for(lambda: len(logged()) > len(first) + 1, 30)
    steps = [metric.step for metric in logged()]
    assert steps == sorted(steps)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    silent = start(tracker, fresh=True)
    wait_for(lambda: not any(t.name == "meter" for t in threading.enumerate()), 30)
    before = threading.active_count()
    with metered(tracker.client, silent):
        assert threading.active_count() == before


def test_a_server_that_does_not_answer_is_named_at_once(config, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9 does not answer") as error:
        Tracker(config.name, config.store_path)
    assert "secret" not in str(error.value)


def test_the_database_lies_beside_the_store(config, runs):
    assert tracking_uri(config.store_path) == f"sqlite:///{runs}/mlflow.db"


def test_flatten_joins_keys_with_dots():
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}


def test_what_the_server_refuses_is_not_tried_again(tracker):
    calls = []

    def refused():
        calls.append(1)
        return tracker.client.get_run("f" * 32)

    with pytest.raises(MlflowException, match="not found"):
        tracker.retry(refused)
    assert len(calls) == 1
