"""A tracking server that dies and comes back, as a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from flows.record import outages
from flows.record.registry import Registry, register_evaluation
from flows.record.tracking import Tracker, TrackingError
from flows.serve import services
from flows.stages import evaluate, train_base
from flows.storage.store import Store
from gigagan.training.logs import Log
from tests.flows.conftest import wait_for
from tests.flows.outputs import commit, evaluated, key

pytestmark = pytest.mark.slow


class Server:
    """An MLflow server on a database file; it keeps its port when it starts again."""

    def __init__(self, folder):
        self.folder = folder
        self.port = services.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, cwd=self.folder
            )
        wait_for(lambda: services.answers(f"{self.url}/health"), 120)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Server(tmp_path_factory.mktemp("server"))


@pytest.fixture
def server(home, monkeypatch):
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    home.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", home.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setattr(outages, "PATIENCE_S", 1.0)
    monkeypatch.setattr(outages, "PAUSE_S", 0.2)
    yield home
    home.kill()


@pytest.fixture
def tracker(config, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    return Tracker(config.name, config.store_path)


def start(tracker, number=1, stage=train_base.STAGE):
    return tracker.start_stage(stage, key(number), {}, parent=None, fresh=False, tags={})


def steps(tracker, run, name="loss"):
    return [metric.step for metric in tracker.client.get_metric_history(run, name)]


def shown(tracker, run):
    names = {artifact.path for artifact in tracker.client.list_artifacts(run, "images")}
    return sorted(name.split("+")[2] for name in names if name.endswith(".png"))


def test_a_server_killed_while_training_logs_loses_no_figure_and_no_picture(
    tracker, server, tmp_path, monkeypatch
):
    run = start(tracker)
    monkeypatch.setenv("MLFLOW_RUN_ID", run)
    log = Log(tmp_path, 100)
    log.start(0)
    log.scalars(1, {"loss": 1.0})
    wait_for(lambda: steps(tracker, run) == [1], 60)
    server.kill()
    for images in (2, 3):
        log.scalars(images, {"loss": 1.0})
        log.picture(images, "grid", Image.new("RGB", (5, 7)))
    server.start()
    log.scalars(4, {"loss": 1.0})
    log.close()
    assert steps(tracker, run) == [1, 2, 3, 4]
    assert shown(tracker, run) == ["2", "3"]


def test_a_server_that_is_gone_at_the_end_costs_the_record_and_not_the_output(
    tracker, server, config
):
    store = Store.of(config)
    run = start(tracker, 5)
    lines = '{"images": 2, "time": 5.0, "loss": 0.5}\n'
    files = {"snapshot.safetensors": "weights", "metrics.jsonl": lines}
    output = commit(config, train_base.STAGE, 5, files, metrics={"images_seen": 2.0}, run_id=run)
    server.kill()
    with (
        pytest.raises(
            TrackingError, match="is complete and kept; start the server and run"
        ) as told,
        tracker.status_of(run),
    ):
        tracker.outputs(run, output)
    assert str(output.path) in str(told.value)
    server.start()

    tracker = Tracker(config.name, config.store_path)
    assert tracker.client.get_run(run).info.status == "RUNNING"
    found = store.lookup(train_base.STAGE, key(5))
    manifest = store.manifest(train_base.STAGE, key(5))
    resolved = evaluated(config, 6, 0.3).resolved
    assert tracker.complete_record(train_base.STAGE, manifest, found, resolved) == run
    record = tracker.client.get_run(run)
    assert record.info.status == "FINISHED"
    assert record.data.metrics["final/images_seen"] == 2.0
    assert steps(tracker, run) == [2]
    assert len(record.outputs.model_outputs) == 1


def test_an_error_of_the_stage_is_not_hidden_by_a_server_that_is_gone(tracker, server):
    run = start(tracker, 7)
    server.kill()
    with pytest.raises(ZeroDivisionError), tracker.status_of(run):
        raise ZeroDivisionError
    server.start()


def test_a_pair_is_registered_through_a_server_and_stays_its_champion(tracker, config):
    made = evaluated(config, 8, 0.3)
    run = start(tracker, 8, evaluate.STAGE)
    store = Store.of(config)
    said = register_evaluation(tracker, store, made.resolved, made.output, run)
    assert "none → 1" in said
    registry = Registry(tracker.client, tracker.name)
    path = tracker.client.download_artifacts(run, "registered/model_card.md")
    assert registry.champion().description in Path(path).read_text()
