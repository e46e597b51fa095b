"""The first three stages over a hostile site, killed in each of them, with every row accounted."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_row_of_a_hostile_site_ends_in_one_place_through_three_kills(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bench.hostile", "--rows", "300", "--port", str(port)]
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
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
