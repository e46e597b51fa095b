"""`python -m flows render`: what would be started."""

import pytest
import yaml

from flows.__main__ import main
from flows.commands import render
from flows.record.tracking import Tracker, child_environment, tracking_uri

CLUSTER = "{image: train:1, claim: store, mount_path: MOUNT}"


def rendered(capsys, tmp_path, stage, *settings):
    words = ["render", stage, "--preset", "smoke", "--store", str(tmp_path / "store")]
    for setting in settings:
        words += ["--set", f"resources.{stage.replace('-', '_')}.{setting}"]
    status = main(words)
    return status, capsys.readouterr()


def test_a_local_stage_is_a_command_line_with_inputs_that_are_not_there_yet(capsys, tmp_path):
    status, shown = rendered(capsys, tmp_path, "train-base", "threads=3")
    assert status == 0
    reason, command, placeholders = shown.out.splitlines()
    assert reason.startswith("# 1 process of 3 threads: ")
    assert " OMP_NUM_THREADS=3 " in command
    assert command.startswith(f"MLFLOW_TRACKING_URI=sqlite:///{tmp_path}/mlflow.db ")
    assert placeholders.startswith("# RUN is the id of the MLflow run")
    assert "; KEY follows from inputs" in placeholders
    assert f"-m gigagan.training --config {tmp_path}/store/train-base/KEY/config.json" in shown.out
    assert f"--shards {tmp_path}/store/filter/KEY/shards/032" in shown.out
    assert not (tmp_path / "store").exists()


def test_a_slurm_stage_is_a_batch_script(capsys, tmp_path):
    _, shown = rendered(capsys, tmp_path, "train-upsampler", "backend=slurm", "nodes=2")
    assert shown.out.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=2" in shown.out
    assert "-m gigagan.training" in shown.out
    assert "\n# inherits MLFLOW_RUN_ID=RUN\n" in shown.out


def test_what_is_rendered_is_told_the_same_as_what_is_started(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    store = tmp_path / "store"
    told = Tracker("x", store).child_environment(render.RUN)
    assert child_environment(tracking_uri(store), render.RUN) == told


def test_a_password_of_the_tracking_server_is_not_printed(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:top-secret@mlflow:5000")
    for backend in ("inline", "slurm"):
        status, shown = rendered(capsys, tmp_path, "train-base", f"backend={backend}")
        assert status == 0
        assert "MLFLOW_TRACKING_URI=http://mlflow:5000" in shown.out
        assert "top-secret" not in shown.out + shown.err


def test_a_kubernetes_stage_is_a_trainjob_that_knows_its_record(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    asked = CLUSTER.replace("MOUNT", str(tmp_path))
    _, shown = rendered(capsys, tmp_path, "evaluate", f"kubernetes={asked}", "backend=kubernetes")
    tree = yaml.safe_load(shown.out)
    assert tree["kind"] == "TrainJob"
    assert "evaluate" in tree["spec"]["trainer"]["command"]
    told = {variable["name"]: variable["value"] for variable in tree["spec"]["trainer"]["env"]}
    assert told["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert told["MLFLOW_RUN_ID"] == "RUN"


def test_a_kubernetes_stage_that_would_not_start_is_not_shown(capsys, tmp_path):
    asked = CLUSTER.replace("MOUNT", str(tmp_path))
    status, shown = rendered(
        capsys, tmp_path, "evaluate", f"kubernetes={asked}", "backend=kubernetes"
    )
    assert (status, shown.out) == (1, "")
    assert "start an MLflow server for all" in shown.err


@pytest.mark.parametrize("stage", ["download", "score", "filter"])
def test_a_data_stage_starts_no_process(capsys, tmp_path, stage):
    status, shown = rendered(capsys, tmp_path, stage)
    assert status == 1
    assert "works in the pipeline's own process" in shown.err
