"""Servers go away in the middle of training and come back; nothing they keep is a secret.

Prefect on PostgreSQL and with a password, MLflow as a server, the store on S3: a shared
installation. All that breaks while the store is away breaks the same run.
"""

import signal
import subprocess
import time

import psutil
import pytest
import s3fs
from prefect.states import Crashed

from flows.config import PipelineConfig
from flows.safety.aftermath import SILENT
from flows.serve import services
from tests.faults.installation.conftest import (
    LOGGED,
    assert_nothing_is_left_behind,
    installed,
    kill,
    logged,
    mlflow_states,
    outputs,
    wait_for,
)
from tests.flows.gate import gate_to

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BUCKET = "broken/outputs"
SECRETS = {
    "PREFECT_API_AUTH_STRING": "admin:pw-of-prefect-61b2",
    "MLFLOW_TRACKING_USERNAME": "someone",
    "MLFLOW_TRACKING_PASSWORD": "pw-of-mlflow-93d1",
    "AWS_SECRET_ACCESS_KEY": "key-of-aws-07fa",
}
NEVER = ("pw-of-prefect-61b2", "pw-of-mlflow-93d1", "key-of-aws-07fa")
AWAY_S = 60


@pytest.fixture(scope="module")
def gate(s3_server):
    with gate_to(s3_server.port) as gate:
        yield gate


@pytest.fixture(scope="module")
def bucket(s3_server, prepared):
    """A store on S3, filled up to `filter`."""
    fs = s3fs.S3FileSystem(**s3_server.options, use_listings_cache=False)
    fs.mkdir("broken")
    fs.put(f"{prepared}/store/", f"{BUCKET}/", recursive=True)
    return fs


@pytest.fixture(scope="module")
def mlflow_port():
    return services.free_port()


@pytest.fixture(scope="module")
def site(tmp_path_factory, postgres, s3_server, gate, mlflow_port):
    postgres.sql("create database broken")
    database = postgres.url("broken", "postgresql+asyncpg")
    folder = tmp_path_factory.mktemp("shared")
    extra = {
        **s3_server.environment,
        **SECRETS,
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{gate.port}",
        "GIGAGAN_STORE_CACHE": str(folder / "mirrors"),
        "PREFECT_SERVER_API_AUTH_STRING": SECRETS["PREFECT_API_AUTH_STRING"],
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow_port}",
    }
    with installed(folder, extra) as site:
        yield site


@pytest.fixture(scope="module")
def mirror(site, bucket):
    """The local copy of the store."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("GIGAGAN_STORE_CACHE", site.extra["GIGAGAN_STORE_CACHE"])
        return PipelineConfig(store=f"s3://{BUCKET}").store_path


class Mlflow:
    """An MLflow server on the database of a folder."""

    def __init__(self, site, folder, port):
        self.site, self.folder, self.port = site, folder, port
        self.start()

    def start(self):
        module = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        module += ["--workers", "1"]
        module += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        module += ["--artifacts-destination", str(self.folder / "mlartifacts")]
        self.process = self.site.popen(*module, log="mlflow.log")
        wait_for(lambda: services.answers(f"http://127.0.0.1:{self.port}/health"), 120)

    def kill(self):
        family = [*psutil.Process(self.process.pid).children(recursive=True), self.process]
        kill(*family)
        self.process.wait()


@pytest.fixture(scope="module")
def mlflow(site, mlflow_port):
    server = Mlflow(site, site.folder, mlflow_port)
    yield server
    server.kill()
    assert_nothing_is_left_behind(site)


@pytest.fixture(scope="module")
def away(site, mlflow, mirror, gate):
    """A run in mid-training, and when the object store began to refuse: it cannot end now."""
    run = site.submit("train-base/smoke", f"s3://{BUCKET}", overrides={"save_every_s": 1})
    site.wait_for_checkpoint(run, mirror)
    gate.shut()
    return run, time.monotonic()


def assert_complete(site, bucket, mirror, number: int) -> None:
    """This many outputs are in the mirror and the bucket, and MLflow knows of them."""
    assert [logged(folder) for folder in outputs(mirror)] == [LOGGED] * number
    for name in ("manifest.json", "snapshot.safetensors"):
        assert len(bucket.glob(f"{BUCKET}/train-base/*/{name}")) == number
    assert mlflow_states(site.folder)["train-base"] == ["FINISHED"] * number


def test_a_restart_of_the_database_in_mid_run_costs_nothing(site, away, postgres):
    run, _ = away
    postgres.stop(signal.SIGINT)
    postgres.start()
    wait_for(lambda: site.state(run).type.value == "RUNNING", 60)


def test_a_run_that_is_taken_for_dead_says_that_it_lives(site, away):
    run, _ = away
    with site.client as client:
        client.set_flow_run_state(run, Crashed(message=f"{SILENT} for 90 s"), force=True)
    alive = site.wait(run, "RUNNING", 60, past=("CRASHED",))
    assert "its process lives" in alive.message


def test_an_object_store_that_refuses_for_a_minute_costs_nothing(site, away, gate, bucket, mirror):
    run, began = away
    time.sleep(max(began + AWAY_S - time.monotonic(), 0))
    gate.open()
    site.wait(run, "COMPLETED")
    assert "does not answer" in site.log(run)
    assert_complete(site, bucket, mirror, 1)


def test_sigkill_and_restart_of_the_prefect_and_mlflow_servers_in_mid_run_cost_nothing(
    site, mlflow, bucket, mirror
):
    run = site.submit("train-base/smoke", f"s3://{BUCKET}", overrides={"train_base.seed": 7})
    site.wait_for_checkpoint(run, mirror)
    number = len(outputs(mirror))
    kill(site.server)
    mlflow.kill()
    site.server.wait()
    # Training neither sees nor minds it.
    wait_for(lambda: [logged(folder) for folder in outputs(mirror)] == [LOGGED] * number, 120)
    mlflow.start()
    site.start_server()
    # The server has seen no heartbeats, and may say so before it hears of the run.
    site.wait(run, "COMPLETED", past=("CRASHED",))
    assert_complete(site, bucket, mirror, number)


def test_no_secret_of_the_environment_is_recorded_anywhere(site, away, bucket, postgres):
    run, _ = away
    dump = subprocess.run(
        [postgres.bin / "pg_dump", postgres.url("broken")], check=True, capture_output=True
    ).stdout
    assert str(run).encode() in dump
    files = [path for path in site.folder.rglob("*") if path.is_file()]
    assert any(path.name == "output.log" for path in files)
    stored = {name: bucket.cat_file(name) for name in bucket.find(BUCKET)}
    assert stored
    for secret in NEVER:
        assert secret.encode() not in dump
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
        assert [name for name, content in stored.items() if secret.encode() in content] == []
