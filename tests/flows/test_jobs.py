"""Jobs in Kubernetes, against an API server of our own whose containers are real processes."""

import json
import sys
import threading
from pathlib import Path

import pytest
import yaml

from flows.config import Resources
from flows.kubernetes.jobs import SEEN, TrainJob, _sortable
from flows.kubernetes.manifest import DIGEST, manifest
from flows.launch import LaunchError
from flows.launch import cluster as remote
from flows.launch.command import Job, Output
from tests.flows.conftest import wait_for
from tests.flows.fake_kubernetes import TOKEN, Cluster
from tests.flows.jobs import ONE_RANK, TRAINING, in_background, run, state

NAME = "train-base-01234567"


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """No waiting between questions."""
    monkeypatch.setattr(remote, "POLL_S", 0.2)
    monkeypatch.setattr(remote, "OUTAGE_S", 60.0)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster, and a kubeconfig that leads there."""
    server = Cluster()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    kubeconfig(tmp_path / "kubeconfig", server.url)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    # The client's default path is read once, when it is imported.
    from kubernetes.config import kube_config

    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    yield server
    server.close()
    thread.join()


def kubeconfig(path, url, token=TOKEN):
    tree = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": url}}],
        "users": [{"name": "test", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    }
    path.write_text(yaml.safe_dump(tree))


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """An output's folder; `torchrun` is one rank without torchrun."""
    folder = tmp_path / "store/train-base/0123456789abcdef"
    folder.mkdir(parents=True)
    (tmp_path / "tiny.py").write_text(TRAINING)
    (tmp_path / "bin").mkdir()
    light = ONE_RANK.replace('|| [ "$2" = torch.distributed.run ]', "")
    (tmp_path / "bin/torchrun").write_text(light.format(python=sys.executable))
    (tmp_path / "bin/torchrun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin")
    return folder


def resources(store, **more):
    cluster = {"namespace": "gan", "image": "registry/train:1", "claim": "store"}
    cluster |= {"mount_path": str(store), **more.pop("kubernetes", {})}
    return Resources(backend="kubernetes", kubernetes=cluster, **more)


def training(stage, steps=3, **more):
    """A job of `tiny`; `PYTHONPATH` leads to it."""
    env = {"PYTHONPATH": str(stage.parents[2])}
    asked = resources(stage.parents[1], **more)
    return Job(["tiny", str(stage), str(steps)], asked, stage / "log", env)


@pytest.mark.slow
def test_torchrun_joins_the_pods_from_what_the_operator_tells_them(cluster, stage):
    (stage.parents[2] / "bin/torchrun").unlink()
    lines = []
    run(training(stage, nodes=2, processes=2), lines.append)
    assert "rank 0 of 4 from 0" in lines
    assert {path.name for path in stage.glob("state-*")} == {f"state-{i}" for i in range(4)}
    assert [job["spec"]["trainer"]["numNodes"] for job in cluster.created] == [2]


def test_a_job_runs_its_output_arrives_line_by_line_and_it_is_cleared_away(cluster, stage):
    lines = []
    run(training(stage), lines.append)
    assert "rank 0 of 1 from 0" in lines
    assert (stage / "log").read_text() == "rank 0 of 1 from 0\n"
    assert state(stage) == 3
    wait_for(lambda: not cluster.jobs, 30)


def test_a_failure_brings_the_last_lines_and_the_job_stays_for_inspection(cluster, stage):
    (stage.parents[2] / "tiny.py").write_text("raise SystemExit('no such shards')")
    with pytest.raises(LaunchError, match=r"(?s)failed in Kubernetes.*log.*no such shards"):
        run(training(stage))
    assert list(cluster.jobs) == [NAME]


def test_after_a_failure_the_same_command_makes_another_job(cluster, stage):
    text = (stage.parents[2] / "tiny.py").read_text()
    (stage.parents[2] / "tiny.py").write_text("raise SystemExit('no such shards')")
    with pytest.raises(LaunchError):
        run(training(stage))
    (stage.parents[2] / "tiny.py").write_text(text)
    run(training(stage))
    assert (state(stage), len(cluster.created)) == (3, 2)


def test_an_exception_here_lets_the_job_save_and_leaves_none_behind(cluster, stage):
    def interrupt(line):
        if line.startswith("rank 0"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(training(stage, steps=10_000), interrupt)
    assert cluster.jobs == {}
    assert any("propagationPolicy=Foreground" in path for path in cluster.paths)
    assert state(stage) < 10_000


def test_a_running_job_is_adopted_with_the_lines_that_nobody_heard(cluster, stage):
    job = training(stage, steps=30)
    orphan = TrainJob(job, Output(str))
    orphan.start()
    wait_for(lambda: state(stage) > 0, 60)
    lines = []
    run(job, lines.append)
    assert any("is there already and is followed" in line for line in lines)
    assert lines.count("rank 0 of 1 from 0") == 1
    assert (state(stage), len(cluster.created)) == (30, 1)


def test_an_adopted_job_does_not_repeat_what_was_heard(cluster, stage):
    job = training(stage, steps=30)
    first = TrainJob(job, Output(str))
    first.start()
    wait_for(lambda: first.poll() is None and (stage / SEEN).exists(), 60)
    lines = []
    run(job, lines.append)
    assert "rank 0 of 1 from 0" not in lines
    assert (stage / "log").read_text() == "rank 0 of 1 from 0\n"


def test_a_job_of_that_name_with_another_command_is_not_touched(cluster, stage):
    TrainJob(training(stage, steps=10_000), Output(str)).start()
    message = f"another command.*kubectl -n gan delete trainjob {NAME}"
    with pytest.raises(LaunchError, match=message):
        run(training(stage, steps=5))
    assert "deletionTimestamp" not in cluster.jobs[NAME]["metadata"]


def test_a_lost_pod_means_all_start_again_from_the_checkpoint(cluster, stage):
    lines = []
    thread, errors = in_background(training(stage, steps=40), lines)
    reached = wait_for(lambda: state(stage), 60)
    cluster.evict(NAME)
    thread.join()
    assert errors == []
    assert any("lost a pod (DeletionByTaintManager)" in line for line in lines)
    begun = [int(line.split()[-1]) for line in lines if line.startswith("rank 0")]
    assert begun[0] == 0
    assert begun[1] >= reached
    assert (state(stage), len(cluster.created)) == (40, 2)


def test_restarts_are_bounded(cluster, stage):
    thread, errors = in_background(training(stage, steps=10_000, max_restarts=1), [])
    for attempt in (1, 2):
        wait_for(lambda n=attempt: len(cluster.created) == n and cluster.pods.get(NAME), 60)
        cluster.evict(NAME)
    thread.join()
    assert "lost 2 times" in str(errors[0])


def test_a_job_that_somebody_deletes_is_not_started_again(cluster, stage):
    thread, errors = in_background(training(stage, steps=10_000), [])
    wait_for(lambda: state(stage), 60)
    cluster.delete(NAME)
    thread.join()
    assert errors
    assert len(cluster.created) == 1


def test_a_queued_job_says_so_and_starts_when_it_is_admitted(cluster, stage):
    cluster.is_queued = True
    lines = []
    thread, errors = in_background(training(stage, kubernetes={"queue": "gpu"}), lines)
    wait_for(lambda: any("waits in queue gpu" in line for line in lines), 60)
    cluster.admit(NAME)
    thread.join()
    assert (errors, state(stage)) == ([], 3)


def test_a_pod_that_finds_no_node_says_why_and_the_deadline_ends_it(cluster, stage):
    message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu"
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    cluster.troubles = [condition | {"message": message}]
    lines = []
    with pytest.raises(LaunchError, match="deadline_hours"):
        run(training(stage, deadline_hours=2 / 3600), lines.append)
    assert any(message in line for line in lines)
    assert cluster.jobs == {}


def test_an_api_server_that_is_away_for_a_while_is_asked_again(cluster, stage):
    lines = []
    cluster.answers_with = 503, "etcd leader changed"
    thread, errors = in_background(training(stage), lines)
    wait_for(lambda: any("answers 503" in line for line in lines), 60)
    cluster.answers_with = None
    thread.join()
    assert (errors, state(stage)) == ([], 3)


def test_an_api_server_that_stays_away_is_an_error(cluster, stage, monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "OUTAGE_S", 0.5)
    kubeconfig(tmp_path / "kubeconfig", "http://127.0.0.1:9")
    with pytest.raises(LaunchError, match=r"127.0.0.1:9 is out of reach.*given up"):
        run(training(stage))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, "Unauthorized"), "renew the kubeconfig or the token"),
        ((403, 'User "x" cannot get resource "trainjobs"'), "(?s)cannot get.*infra/k8s"),
        ((404, "the server could not find the requested resource"), "install Kubeflow Trainer"),
        ((422, "metadata.name is too long"), "refuses train-base-01234567.*too long"),
    ],
)
def test_a_refusal_comes_with_its_remedy(cluster, stage, answer, message):
    cluster.answers_with = answer
    with pytest.raises(LaunchError, match=message):
        run(training(stage))


def test_without_a_cluster_the_error_says_how_to_name_one(stage, monkeypatch, tmp_path):
    from kubernetes.config import kube_config

    nowhere = str(tmp_path / "nowhere")
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", nowhere)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(LaunchError, match="set KUBECONFIG"):
        run(training(stage))


def test_secrets_reach_the_pods_by_name_only(cluster, stage, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-this-machine")
    cluster.secrets = {"s3": {"secret": "plainly-seen"}}
    asked = {"env_from_secrets": {"AWS_SECRET_ACCESS_KEY": "s3/secret"}}
    (stage.parents[2] / "tiny.py").write_text(
        "import os; print(len(os.environ['AWS_SECRET_ACCESS_KEY']))"
    )
    lines = []
    run(training(stage, kubernetes=asked), lines.append)
    assert str(len("plainly-seen")) in lines
    text = json.dumps(cluster.created)
    assert "plainly-seen" not in text
    assert "of-this-machine" not in text


@pytest.mark.parametrize(
    "variables",
    [
        {"MLFLOW_TRACKING_PASSWORD": "x"},
        {"MLFLOW_TRACKING_URI": "http://user:pass@mlflow:5000"},
    ],
)
def test_a_secret_of_the_run_is_refused_before_it_gets_into_a_manifest(variables):
    job = Job(["m"], resources("/store"), Path("/store/train-base/01/log"), variables)
    with pytest.raises(LaunchError, match="env_from_secrets") as error:
        manifest(job)
    assert "pass@" not in str(error.value)


@pytest.mark.parametrize("uri", ["sqlite:////runs/mlflow.db", "http://127.0.0.1:5000"])
def test_a_tracking_server_that_pods_cannot_reach_is_refused(uri):
    env = {"MLFLOW_TRACKING_URI": uri}
    job = Job(["m"], resources("/store"), Path("/store/train-base/01/log"), env)
    with pytest.raises(LaunchError, match="start an MLflow server"):
        manifest(job)


def test_a_store_outside_the_claim_is_refused():
    job = Job(["m"], resources("/store"), Path("/storeroom/train-base/01/log"))
    with pytest.raises(LaunchError, match=r"not below kubernetes\.mount_path"):
        manifest(job)


FULL = {
    "queue": "gpu",
    "gpus": 8,
    "cpu": "64",
    "memory": "500Gi",
    "shm": "64Gi",
    "node_selector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}],
    "service_account": "trainer",
    "image_pull_secrets": ["registry"],
    "env_from_secrets": {"AWS_SECRET_ACCESS_KEY": "s3/secret"},
}


@pytest.mark.parametrize("asked", [{}, FULL])
def test_the_manifest_is_a_valid_trainjob(asked):
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    given = resources("/store", nodes=3, processes=8, deadline_hours=2, kubernetes=asked)
    tree = manifest(Job(["m"], given, Path("/store/train-base/0123456789/log")))
    parsed = TrainerV1alpha1TrainJob.from_dict(json.loads(json.dumps(tree)))
    # What the models do not know is dropped when they are written again.
    assert parsed.to_dict() == tree


def test_the_manifest_holds_what_was_asked_for():
    given = resources("/store", nodes=3, processes=8, kubernetes=FULL)
    tree = manifest(Job(["m", "--x"], given, Path("/store/train-base/0123456789/log")))
    assert tree["metadata"]["name"] == NAME
    assert tree["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    trainer = tree["spec"]["trainer"]
    assert trainer["command"][0] == "torchrun"
    assert trainer["command"][-3:] == ["-m", "m", "--x"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (3, 8)
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "8"
    patch = tree["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    pod = patch["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert [volume["name"] for volume in pod["volumes"]] == ["store", "tmp", "shm"]
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]


def test_the_digest_tells_other_commands_and_resources_apart():
    log = Path("/store/train-base/0123456789/log")

    def digest(module, **more):
        tree = manifest(Job(module, resources("/store", **more), log))
        return tree["metadata"]["annotations"][DIGEST]

    assert digest(["m"]) == digest(["m"])
    assert len({digest(["m"]), digest(["m", "-x"]), digest(["m"], nodes=2)}) == 3


def test_times_sort_although_zeros_at_their_end_are_dropped():
    stamps = ["2026-01-01T00:00:01Z", "2026-01-01T00:00:01.05Z", "2026-01-01T00:00:01.1Z"]
    assert sorted(stamps, key=_sortable) == stamps
