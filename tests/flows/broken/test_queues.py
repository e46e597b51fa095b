"""Runs are cancelled, and runs are in each other's way."""

import pytest

from tests.flows.broken.conftest import LOGGED, logged, mlflow_states, output, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_cancel_in_mid_training_saves_its_state_and_a_new_run_resumes_from_it(site, store):
    run = site.submit("full-pipeline/smoke", store, stages=["train-base"])
    site.wait_for_checkpoint(run, store)
    site.cancel(run)
    site.wait(run, "CANCELLED")
    wait_for(lambda: not site.processes("gigagan.training"), 30)
    assert mlflow_states(store) == {"smoke": ["KILLED"], "train-base": ["KILLED"]}
    assert site.slots() == 0
    assert "asked to stop" in (output(store) / "output.log").read_text()

    again = site.submit("full-pipeline/smoke", store, stages=["train-base"])
    site.wait(again, "COMPLETED")
    assert set(logged(store)) >= set(LOGGED)
    assert mlflow_states(store)["train-base"] == ["FINISHED"]
    (child,) = site.children(run)
    assert child.state.is_final()


def test_a_second_training_waits_for_the_gpu_slot_and_says_so(site, store):
    first = site.submit("train-base/smoke", store)
    site.wait_for_checkpoint(first, store)
    second = site.submit("train-base/smoke", store, overrides={"train_base.seed": 7})
    wait_for(lambda: "waiting for the limit 'gpu': 1 of its 1 slots" in site.log(second), 60)
    assert site.slots() == 1
    site.wait(first, "COMPLETED")
    site.wait(second, "COMPLETED")
    assert mlflow_states(store)["train-base"] == ["FINISHED", "FINISHED"]


def test_a_second_run_of_the_same_key_waits_and_takes_over_the_output(site, store):
    first = site.submit("train-base/smoke", store)
    site.wait_for_checkpoint(first, store)
    second = site.submit("train-base/smoke", store)
    site.wait(first, "COMPLETED")
    assert site.wait(second, "COMPLETED").name == "Skipped"
    assert logged(store) == LOGGED
    assert mlflow_states(store)["train-base"] == ["FINISHED"]
