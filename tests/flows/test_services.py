"""Servers that we start: who can reach them, and with what."""

import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient

from flows import services, settings, ui
from tests.flows.conftest import wait_for

PASSWORD = "admin:only-for-us"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "RUNS", tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    for name in ("PREFECT_API_URL", "PREFECT_UI_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def listening_on(url: str) -> set[str]:
    """Addresses at which the port of this URL takes connections."""
    port = urllib.parse.urlsplit(url).port
    connections = psutil.net_connections("tcp")
    return {c.laddr.ip for c in connections if c.status == "LISTEN" and c.laddr.port == port}


@pytest.mark.slow
def test_a_prefect_server_of_ours_is_on_the_loopback_only_and_keeps_to_its_password(monkeypatch):
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", PASSWORD)
    with services.prefect_api(services.free_port()) as api:
        assert listening_on(api) == {"127.0.0.1"}
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{api}/admin/version")
        with SyncPrefectClient(api, auth_string=PASSWORD) as client:
            assert client.read_flow_runs() == []


@pytest.mark.slow
def test_an_mlflow_page_of_ours_is_on_the_loopback_only(tmp_path):
    with ui.mlflow_page(tmp_path / "store", services.free_port()) as page:
        assert listening_on(page) == {"127.0.0.1"}


def test_a_service_does_not_outlive_its_command_however_that_ends(tmp_path):
    port = services.free_port()
    page = f"http://127.0.0.1:{port}"
    code = f"""
import pathlib, time
from flows import services, settings
settings.RUNS = pathlib.Path({str(tmp_path)!r})
with services.running("pages", ["http.server", "{port}", "--bind", "127.0.0.1"], {page!r}):
    time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=settings.ROOT) as command:
        wait_for(lambda: services.answers(page), 60)
        command.kill()
    wait_for(lambda: not services.answers(page), 30)
