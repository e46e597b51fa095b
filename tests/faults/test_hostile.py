"""The first three stages over a hostile site, killed in each of them, with every row accounted."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient

from flows.safety.slots import GPU_LIMIT
from tests.flows.conftest import prefect_server  # noqa: F401  # a fixture

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def slots(prefect_server):  # noqa: F811
    """More than one: a killed process keeps its own for minutes."""
    with SyncPrefectClient(prefect_server) as client:
        client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, 4)
        yield
        client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("slots")
def test_every_row_of_a_hostile_site_ends_in_one_place_through_three_kills(
    prefect_server,  # noqa: F811
    tmp_path,
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bench.hostile", "--rows", "150", "--port", str(port)]
    parts = ["--", "--set", "download.rows_per_part=80"]  # two: each starts its own processes
    environment = {**os.environ, "PREFECT_API_URL": prefect_server}
    done = subprocess.run(
        [*command, "--out", str(tmp_path), *parts],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    log = tmp_path / "run.log"
    said = log.read_text()[-2000:] if log.exists() else ""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:] + said
    result = json.loads((tmp_path / "result.json").read_text())
    killed = [attempt["killed_in"] for attempt in result["attempts"]]
    assert killed == ["download", "score", "filter", None]
    assert result["asked"] == sum(result["fates"].values())
    assert result["listed"] == result["asked"] + result["dropped before the download"]
    assert result["fates"]["ok"] == sum(result["verdicts"].values())
    assert "fates other than the pages' own: none" in done.stdout
