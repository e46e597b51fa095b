"""The way from a run folder to MLflow, with a client that can be told to fail."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from gigagan.training.logs import Log
from gigagan.training.relay import MARK, Relay


class Client:
    """Remembers what it was sent; fails while `is_down`."""

    def __init__(self):
        self.metrics = []
        self.pictures = []
        self.files = []
        self.is_down = False

    def log_batch(self, run_id, metrics):
        self._answer()
        self.metrics += [(m.key, m.step, m.value, m.timestamp) for m in metrics]

    def log_image(self, run_id, image, key, step, synchronous):
        self._answer()
        self.pictures.append((key, step))

    def log_artifact(self, run_id, path):
        self._answer()
        self.files.append(path)

    def list_artifacts(self, run_id, path):
        self._answer()
        return [
            SimpleNamespace(path=f"images/{key}+step+{step}+timestamp+1+abc.png")
            for key, step in self.pictures
        ]

    def _answer(self):
        if self.is_down:
            raise ConnectionError("http://me:secret@host refused")

    def steps(self):
        return [step for _, step, _, _ in self.metrics]


@pytest.fixture
def client():
    return Client()


@pytest.fixture
def relay(tmp_path, client):
    return Relay(tmp_path, "run", client)


def write(folder, *positions):
    with (folder / "metrics.jsonl").open("a") as file:
        for images in positions:
            file.write(json.dumps({"images": images, "time": 10.5, "loss": images / 2}) + "\n")


def test_lines_become_metrics_at_their_time_and_position(tmp_path, client, relay):
    write(tmp_path, 2, 3)
    relay.catch_up()
    assert client.metrics == [("loss", 2, 1.0, 10500), ("loss", 3, 1.5, 10500)]
    relay.catch_up()
    assert len(client.metrics) == 2


def test_what_failed_is_sent_when_the_server_is_back(tmp_path, client, relay):
    write(tmp_path, 2)
    client.is_down = True
    with pytest.raises(ConnectionError):
        relay.catch_up()
    client.is_down = False
    write(tmp_path, 3)
    relay.catch_up()
    assert client.steps() == [2, 3]


def test_the_next_process_goes_on_where_the_last_stopped(tmp_path, client, relay):
    write(tmp_path, 2)
    relay.catch_up()
    write(tmp_path, 3)
    Relay(tmp_path, "run", client).catch_up()
    assert client.steps() == [2, 3]


def test_another_run_gets_everything(tmp_path, client, relay):
    write(tmp_path, 2)
    relay.catch_up()
    Relay(tmp_path, "other", client).catch_up()
    assert client.steps() == [2, 2]


def test_a_torn_last_line_waits_for_its_end(tmp_path, client, relay):
    write(tmp_path, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"images": 3, "lo')
        file.flush()
        relay.catch_up()
        assert client.steps() == [2]
        file.write('ss": 1.0}\n')
    relay.catch_up()
    assert client.steps() == [2, 3]


def test_pictures_are_sent_once_whoever_sends_them(tmp_path, client, relay):
    (tmp_path / "samples").mkdir()
    for step in (0, 7):
        Image.new("RGB", (2, 3)).save(tmp_path / f"samples/grid-{step:09d}.png")
    relay.catch_up()
    (tmp_path / MARK).unlink(missing_ok=True)
    Relay(tmp_path, "run", client).catch_up()
    assert client.pictures == [("grid", 0), ("grid", 7)]


def test_lines_after_a_rollback_are_sent_though_the_file_was_shorter(tmp_path, client, relay):
    log = Log(tmp_path, 10)
    log._relay = relay
    log.start(0)
    for images in (2, 4, 6):
        log.scalars(images, {"loss": 1.0})
    assert relay.close(10)
    log.start(2)  # back to a checkpoint
    log._relay = Relay(tmp_path, "run", client)
    log.scalars(4, {"loss": 0.5})
    assert log._relay.close(10)
    assert client.steps() == [2, 4, 6, 4]
    assert client.metrics[-1][2] == 0.5


def test_training_does_not_wait_for_a_server_that_is_gone(tmp_path, client):
    said = []
    client.is_down = True
    log = Log(tmp_path, 10)
    log._relay = relay = Relay(tmp_path, "run", client, warn=said.append)
    log.start(0)
    began = threading.active_count()
    for images in range(100):
        log.scalars(images, {"loss": 1.0})
    while not said:
        time.sleep(0.01)
    assert threading.active_count() <= began + 1
    assert "metrics.jsonl" in said[0]
    assert "training goes on" in said[0]
    assert "secret" not in said[0]
    assert not relay.close(0.1)
    client.is_down = False
    assert relay.close(30)
    assert client.steps() == list(range(100))


def test_without_a_run_nothing_is_sent(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    assert Relay.from_environment(tmp_path, print) is None
