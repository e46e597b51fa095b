"""Servers go away in the middle of training and come back; nothing they keep is a secret.

Prefect on PostgreSQL and with a password, MLflow as a server: a shared installation.
"""

import signal
import subprocess

import pytest
from prefect.states import Crashed

from flows.safety.aftermath import SILENT
from flows.serve import services
from tests.faults.installation.conftest import (
    LOGGED,
    Installation,
    kill,
    logged,
    mlflow_states,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECRETS = {
    "PREFECT_API_AUTH_STRING": "admin:pw-of-prefect-61b2",
    "MLFLOW_TRACKING_USERNAME": "someone",
    "MLFLOW_TRACKING_PASSWORD": "pw-of-mlflow-93d1",
    "AWS_SECRET_ACCESS_KEY": "key-of-aws-07fa",
}
NEVER = ("pw-of-prefect-61b2", "pw-of-mlflow-93d1", "key-of-aws-07fa")


@pytest.fixture(scope="module")
def mlflow_port():
    return services.free_port()


@pytest.fixture(scope="module")
def site(tmp_path_factory, postgres, mlflow_port):
    postgres.sql("create database broken")
    database = postgres.url("broken", "postgresql+asyncpg")
    extra = {
        **SECRETS,
        "PREFECT_SERVER_API_AUTH_STRING": SECRETS["PREFECT_API_AUTH_STRING"],
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow_port}",
    }
    installation = Installation(tmp_path_factory.mktemp("shared"), extra)
    try:
        installation.start()
        yield installation
    finally:
        installation.stop()


class Mlflow:
    """An MLflow server on the database beside a store."""

    def __init__(self, site, store, port):
        self.site, self.store, self.port = site, store, port
        self.start()

    def start(self):
        module = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        module += [
            "--workers",
            "1",
            "--backend-store-uri",
            f"sqlite:///{self.store.parent}/mlflow.db",
        ]
        module += ["--artifacts-destination", str(self.store.parent / "mlartifacts")]
        self.process = self.site.popen(*module, log="mlflow.log")
        wait_for(lambda: services.answers(f"http://127.0.0.1:{self.port}/health"), 120)

    def kill(self):
        import psutil

        family = [*psutil.Process(self.process.pid).children(recursive=True), self.process]
        kill(*family)
        self.process.wait()


@pytest.fixture
def mlflow(site, store, mlflow_port):
    server = Mlflow(site, store, mlflow_port)
    yield server
    server.kill()


def test_sigkill_and_restart_of_the_prefect_server_in_mid_run_cost_nothing(site, store, mlflow):
    run = site.submit("train-base/smoke", store)
    site.wait_for_checkpoint(run, store)
    kill(site.server)
    site.server.wait()
    wait_for(lambda: logged(store) == LOGGED, 90)  # training neither sees nor minds it
    site.start_server()
    # The server has seen no heartbeats, and may say so before it hears of the run.
    site.wait(run, "COMPLETED", past=("CRASHED",))
    assert logged(store) == LOGGED
    assert mlflow_states(store)["train-base"] == ["FINISHED"]


def test_a_run_that_is_taken_for_dead_says_that_it_lives(site, store, mlflow):
    run = site.submit("train-base/smoke", store, overrides={"train_base.total_images": 160})
    site.wait_for_checkpoint(run, store)
    with site.client as client:
        client.set_flow_run_state(run, Crashed(message=f"{SILENT} for 90 s"), force=True)
    alive = site.wait(run, "RUNNING", 60, past=("CRASHED",))
    assert "its process lives" in alive.message
    site.wait(run, "COMPLETED")
    assert mlflow_states(store)["train-base"] == ["FINISHED"]


def test_sigkill_and_restart_of_the_mlflow_server_in_mid_run_cost_nothing(site, store, mlflow):
    run = site.submit("train-base/smoke", store)
    site.wait_for_checkpoint(run, store)
    mlflow.kill()
    wait_for(lambda: logged(store) == LOGGED, 90)
    mlflow.start()
    site.wait(run, "COMPLETED")
    assert logged(store) == LOGGED
    assert mlflow_states(store)["train-base"] == ["FINISHED"]


def test_a_restart_of_the_database_in_mid_run_costs_nothing_and_no_secret_is_recorded_anywhere(
    site, store, mlflow, postgres
):
    run = site.submit("train-base/smoke", store)
    site.wait_for_checkpoint(run, store)
    postgres.stop(signal.SIGINT)
    postgres.start()
    site.wait(run, "COMPLETED")
    assert logged(store) == LOGGED
    assert mlflow_states(store)["train-base"] == ["FINISHED"]

    dump = subprocess.run(
        [postgres.bin / "pg_dump", postgres.url("broken")], check=True, capture_output=True
    ).stdout
    folders = [store.parent, site.folder]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert str(run).encode() in dump
    assert any(path.name == "output.log" for path in files)
    for secret in NEVER:
        assert secret.encode() not in dump
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
