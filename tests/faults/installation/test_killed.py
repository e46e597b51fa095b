"""A process is killed in the middle of training: what is seen, what is left, what goes on."""

import pytest

from tests.faults.installation.conftest import (
    LOGGED,
    kill,
    logged,
    mlflow_states,
    output,
    sha256,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_sigkill_of_the_flow_crashes_the_run_and_a_retry_resumes_to_equal_weights(
    site, store, weights
):
    run = site.submit("full-pipeline/smoke", store, stages=["train-base"])
    site.wait_for_checkpoint(run, store)
    training = site.training_process()
    kill(site.flow_process(run))
    assert "exited with status code: -9" in site.wait(run, "CRASHED").message
    wait_for(lambda: not training.is_running(), 30)
    (child,) = site.children(run)  # until its heartbeats are missed, which a slow machine sees here
    assert child.state.type.value in {"RUNNING", "CRASHED"}

    # The worker's last word on the crash, which would overwrite an earlier retry.
    wait_for(lambda: "worker - Check whether" in (site.folder / "worker.log").read_text(), 60)
    site.retry(run)
    site.wait(run, "COMPLETED")
    # A child that was taken for dead before the retry runs again itself; else a second one does.
    states = sorted(child.state.type.value for child in site.children(run))
    assert states in (["COMPLETED"], ["COMPLETED", "CRASHED"])
    assert logged(store) == LOGGED
    assert sha256(output(store) / "snapshot.safetensors") == weights
    assert mlflow_states(store) == {"smoke": ["FINISHED"], "train-base": ["FINISHED"]}


def test_sigkill_of_training_fails_the_run_with_its_last_lines_and_a_retry_resumes(site, store):
    run = site.submit("train-base/smoke", store)
    site.wait_for_checkpoint(run, store)
    kill(site.training_process())
    message = site.wait(run, "FAILED").message
    assert "ended by signal 9" in message
    assert "output.log" in message
    assert mlflow_states(store)["train-base"] == ["FAILED"]
    assert site.slots() == 0

    site.retry(run)
    site.wait(run, "COMPLETED")
    assert logged(store) == LOGGED
    assert mlflow_states(store)["train-base"] == ["FINISHED"]


def test_sigkill_of_worker_and_flow_is_noticed_by_missing_heartbeats(site, store):
    run = site.submit("train-base/smoke", store)
    site.wait_for_checkpoint(run, store)
    training, flow = site.training_process(), site.flow_process(run)
    kill(site.worker, flow)
    site.worker.wait()
    wait_for(lambda: not training.is_running(), 30)
    assert site.state(run).type.value == "RUNNING"
    assert site.slots() == 1
    site.start_worker()
    assert "no heartbeat" in site.wait(run, "CRASHED", 180).message
    assert mlflow_states(store)["train-base"] == ["RUNNING"]

    site.retry(run)  # waits until the dead run's slot is free
    site.wait(run, "COMPLETED")
    assert logged(store) == LOGGED
    assert mlflow_states(store)["train-base"] == ["FINISHED"]


def test_sigkill_of_the_worker_leaves_the_flow_to_run_to_its_end(site, store):
    run = site.submit("train-base/smoke", store)
    site.wait_for_checkpoint(run, store)
    kill(site.worker)
    site.worker.wait()
    try:
        site.wait(run, "COMPLETED")
    finally:
        site.start_worker()
    assert logged(store) == LOGGED
    assert mlflow_states(store)["train-base"] == ["FINISHED"]
