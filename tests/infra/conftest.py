"""Where the files of infra/ are, what every pod keeps to, and the servers of the flows' tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kubernetes.utils.quantity import parse_quantity

from flows.serve import services
from tests.flows.conftest import postgres, s3_server, wait_for  # noqa: F401  (fixtures)

ROOT = Path(__file__).resolve().parents[2]
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


def pod_specs(tree):
    """Every pod's specification in a document, whatever kind of thing it belongs to."""
    if isinstance(tree, dict):
        if isinstance(tree.get("containers"), list):
            yield tree
        tree = list(tree.values())
    for part in tree if isinstance(tree, list) else ():
        yield from pod_specs(part)


def assert_confined(pod, *, has_claims):
    """A pod runs as a user on a read-only root, within limits; `has_claims`: its disks are kept."""
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert min(security["runAsUser"], security["runAsGroup"]) > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not has_claims or security["fsGroup"] == security["runAsGroup"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    scratch = 0
    for volume in pod.get("volumes", ()):
        assert "hostPath" not in volume
        if (empty := volume.get("emptyDir")) is not None:
            size = parse_quantity(empty["sizeLimit"])
            scratch += size if empty.get("medium") != "Memory" else 0
    mounted = set()
    for container in [*pod.get("initContainers", ()), *pod["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, container["name"]
        requests, limits = (container["resources"][kind] for kind in ("requests", "limits"))
        assert {"cpu", "memory", "ephemeral-storage"} <= requests.keys()
        assert {"memory", "ephemeral-storage"} <= limits.keys()
        assert re.search(r":[\w.-]*\d|@sha256:", container["image"]), container["image"]
        mounted |= {mount["name"] for mount in container.get("volumeMounts", ())}
    assert mounted >= {volume["name"] for volume in pod.get("volumes", ())}
    room = [c["resources"]["limits"]["ephemeral-storage"] for c in pod["containers"]]
    assert scratch <= sum(map(parse_quantity, room)), "evicted before its scratch is full"


def tool(name):
    """A program, or a skipped test that says what to install."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return beside or pytest.skip(f"{name} is not installed")
