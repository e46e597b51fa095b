"""infra/slurm, and the example resources of both clusters: valid, consistent, free of secrets."""

import configparser
import os
import re

import pytest
import yaml

from flows.config import PipelineConfig
from gigagan.common.settings import parse_assignments
from tests.infra.conftest import INFRA, ROOT, run, tool

SLURM = INFRA / "slurm"
PLACES = {"slurm": SLURM / "resources.yaml", "kubernetes": INFRA / "k8s/resources.yaml"}


@pytest.mark.parametrize("backend", PLACES)
@pytest.mark.parametrize("preset", ["laion-64", "smoke"])
def test_example_resources_fit_any_preset_as_the_comment_in_them_says(backend, preset):
    text = PLACES[backend].read_text()
    assert '--set "resources=$(cat infra/' in text
    config = PipelineConfig.preset(preset).override(parse_assignments([f"resources={text}"]))
    training = config.resources.train_base
    assert (training.backend, training.nodes, training.processes) == (backend, 2, 8)
    assert config.resources.train_upsampler == training
    assert config.resources.evaluate.backend == backend
    assert config.resources.evaluate.nodes == config.resources.evaluate.processes == 1


def test_a_rank_has_a_gpu_in_both_examples():
    for backend, path in PLACES.items():
        training = yaml.safe_load(path.read_text())["train_base"]
        cluster = training[backend]
        assert training["processes"] == cluster.get("gpus_per_node", cluster.get("gpus"))


def test_the_example_for_pods_names_what_the_manifests_have():
    cluster = yaml.safe_load(PLACES["kubernetes"].read_text())["train_base"]["kubernetes"]
    queue = (INFRA / "k8s/overlays/gpu-cluster/queue.yaml").read_text()
    names = [d["metadata"]["name"] for d in yaml.safe_load_all(queue) if d["kind"] == "LocalQueue"]
    assert names == [cluster["queue"]]
    secrets = yaml.safe_load_all((INFRA / "k8s/secrets.example.yaml").read_text())
    keys = {f"{s['metadata']['name']}/{key}" for s in secrets for key in s["stringData"]}
    assert set(cluster["env_from_secrets"].values()) <= keys


def test_the_batch_script_is_sound():
    script = SLURM / "worker.sbatch"
    assert run(["bash", "-n", script]).returncode == 0
    done = run([tool("shellcheck"), script])
    assert done.returncode == 0, done.stdout


def fake_cluster(folder):
    """A project whose worker is a stub, and an sbatch that writes down what it is asked."""
    (folder / "infra/docker").mkdir(parents=True)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "infra/docker/with-secrets").write_bytes((INFRA / "docker/with-secrets").read_bytes())
    stubs = {
        # Like Prefect's: told to end, it sends itself SIGINT.
        ".venv/bin/python": 'echo "$*" $TOKEN ${SLURM_JOB_ID-none}; trap "kill -INT $$" TERM; '
        f'trap "echo ended > {folder}/ended; exit 3" INT; while :; do sleep 0.1; done',
        "bin/sbatch": f'echo "$@" > {folder}/asked',
    }
    for name, line in stubs.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n")
    for name in ("infra/docker/with-secrets", *stubs):
        (folder / name).chmod(0o755)
    (folder / "token").write_text("the-secret\n")
    (folder / "worker.env").write_text(f"SECRETS_FOLDER={folder}\nTOKEN_FILE={folder}/token\n")


def test_a_worker_whose_time_is_over_is_stopped_and_submitted_again(tmp_path):
    fake_cluster(tmp_path)
    env = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "17",
        "WORKER_ENV": str(tmp_path / "worker.env"),
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
    }
    # `timeout` sends SIGTERM to the script alone, as `--signal=B:TERM` does.
    done = run(["timeout", "--foreground", "3", "bash", SLURM / "worker.sbatch"], env, timeout=60)
    assert done.stdout.splitlines() == ["-m flows worker the-secret none"]
    assert (tmp_path / "asked").read_text() == "infra/slurm/worker.sbatch\n"
    assert (tmp_path / "ended").exists()


def test_the_service_starts_the_same_worker_with_variables_from_a_file():
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str
    unit.read(SLURM / "worker.service")
    service = unit["Service"]
    assert service["ExecStart"].endswith("/.venv/bin/python -m flows worker")
    wrapper = service["ExecStart"].split()[0].removeprefix("%h/gigagan/")
    assert os.access(ROOT / wrapper, os.X_OK)
    assert service["Restart"] == "always"
    assert service["EnvironmentFile"].endswith("/worker.env")


def test_the_variables_file_names_secrets_and_holds_none():
    lines = (SLURM / "worker.env").read_text().splitlines()
    values = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    for name, value in values.items():
        if re.search(r"PASSWORD|AUTH|SECRET|KEY", name):
            assert value.startswith(values["SECRETS_FOLDER"]), name
