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
from tests.flows.conftest import new_record, wait_for
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
                command,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
            )
        wait_for(lambda: services.answers(f"{self.url}/health"), 120)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A server that runs for all tests; who kills it starts it again."""
    folder = tmp_path_factory.mktemp("server")
    new_record(folder / "mlflow.db")
    home = Server(folder)
    home.start()
    yield home
    home.kill()


@pytest.fixture
def server(home, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setattr(outages, "PATIENCE_S", 1.0)
    monkeypatch.setattr(outages, "PAUSE_S", 0.2)
    return home


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


def test_a_server_killed_while_stages_run_loses_no_figure_picture_or_output_and_hides_no_error(
    tracker, server, config, tmp_path, monkeypatch
):
    training = start(tracker)
    ended = start(tracker, 5)
    failing = start(tracker, 7)
    monkeypatch.setenv("MLFLOW_RUN_ID", training)
    log = Log(tmp_path, 100)
    log.start(0)
    log.scalars(1, {"loss": 1.0})
    wait_for(lambda: steps(tracker, training) == [1], 60)
    lines = '{"images": 2, "time": 5.0, "loss": 0.5}\n'
    files = {"snapshot.safetensors": "weights", "metrics.jsonl": lines}
    output = commit(config, train_base.STAGE, 5, files, metrics={"images_seen": 2.0}, run_id=ended)

    server.kill()
    for images in (2, 3):
        log.scalars(images, {"loss": 1.0})
        log.picture(images, "grid", Image.new("RGB", (5, 7)))
    with (
        pytest.raises(
            TrackingError, match="is complete and kept; start the server and run"
        ) as told,
        tracker.status_of(ended),
    ):
        tracker.outputs(ended, output)
    assert str(output.path) in str(told.value)
    with pytest.raises(ZeroDivisionError), tracker.status_of(failing):
        raise ZeroDivisionError
    server.start()

    log.scalars(4, {"loss": 1.0})
    log.close()
    assert steps(tracker, training) == [1, 2, 3, 4]
    assert shown(tracker, training) == ["2", "3"]
    tracker = Tracker(config.name, config.store_path)
    assert tracker.client.get_run(ended).info.status == "RUNNING"
    found = Store.of(config).lookup(train_base.STAGE, key(5))
    manifest = Store.of(config).manifest(train_base.STAGE, key(5))
    resolved = evaluated(config, 6, 0.3).resolved
    assert tracker.complete_record(train_base.STAGE, manifest, found, resolved) == ended
    record = tracker.client.get_run(ended)
    assert record.info.status == "FINISHED"
    assert record.data.metrics["final/images_seen"] == 2.0
    assert steps(tracker, ended) == [2]
    assert len(record.outputs.model_outputs) == 1


def test_a_pair_is_registered_through_a_server_and_stays_its_champion(tracker, config):
    made = evaluated(config, 8, 0.3)
    run = start(tracker, 8, evaluate.STAGE)
    store = Store.of(config)
    said = register_evaluation(tracker, store, made.resolved, made.output, run)
    assert "none → 1" in said
    registry = Registry(tracker.client, tracker.name)
    path = tracker.client.download_artifacts(run, "registered/model_card.md")
    assert registry.champion().description in Path(path).read_text()
