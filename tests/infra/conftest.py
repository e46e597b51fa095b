"""Where the files of infra/ are, and the servers of the flows' tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows import services
from flows.config import ROOT
from tests.flows.conftest import postgres, s3_server, wait_for  # noqa: F401  (fixtures)

INFRA = ROOT / "infra"
DOCKER = INFRA / "docker"
KEPT = ("PATH", "HOME", "PYTHONPATH")


def run(command, env=None, **options):
    """Run a command with nothing but these variables and the ones that processes need."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    options = {"capture_output": True, "text": True, "timeout": 400, "check": False, **options}
    return subprocess.run(command, env=kept | {"LC_ALL": "C.UTF-8"} | (env or {}), **options)


@pytest.fixture
def serve(tmp_path):
    """Start Python modules as servers, each until the test is over: `serve(argv, env, health)`."""
    started = []

    def start(argv, env, health):
        log = (tmp_path / f"{argv[0]}.log").open("w")
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        quiet = {"PREFECT_HOME": str(tmp_path / "prefect"), "DO_NOT_TRACK": "true"}
        quiet |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        quiet |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        process = subprocess.Popen(
            [sys.executable, "-m", *argv],
            env=kept | quiet | env,
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(process)

        def ready():
            assert process.poll() is None, (tmp_path / f"{argv[0]}.log").read_text()[-3000:]
            return services.answers(health)

        wait_for(ready, 240)
        return process

    yield start
    for process in started:
        os.killpg(process.pid, 9)
        process.wait()


def tool(name):
    """A program, or a skipped test that says what to install."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return beside or pytest.skip(f"{name} is not installed")
