"""Runs are cancelled, are in each other's way, or find no room."""

import contextlib
import shutil
import subprocess

import pytest

from tests.faults.installation.conftest import (
    LOGGED,
    logged,
    mlflow_states,
    output,
    outputs,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


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


def test_a_second_training_waits_for_the_gpu_slot_and_one_of_the_same_key_for_the_output(
    site, store
):
    first = site.submit("train-base/smoke", store)
    site.wait_for_checkpoint(first, store)
    other = site.submit("train-base/smoke", store, overrides={"train_base.seed": 7})
    same = site.submit("train-base/smoke", store)
    wait_for(lambda: "waiting for the limit 'gpu': 1 of its 1 slots" in site.log(other), 60)
    assert site.slots() == 1
    assert site.wait(first, "COMPLETED")
    assert site.wait(same, "COMPLETED").name == "Skipped"
    site.wait(other, "COMPLETED")
    assert [logged(store, folder) for folder in outputs(store)] == [LOGGED, LOGGED]
    assert mlflow_states(store)["train-base"] == ["FINISHED", "FINISHED"]


@pytest.fixture
def disk(tmp_path):
    """A disk of 60 MB: a checkpoint takes 49."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk needs the right to mount one: {error}")
    yield folder
    with contextlib.suppress(subprocess.CalledProcessError):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_fails_the_run_by_that_name_and_a_retry_resumes(site, prepared, disk):
    store = disk / "store"
    shutil.copytree(prepared / "store", store)
    shutil.copy(prepared / "mlflow.db", disk)
    run = site.submit("train-base/smoke", store)
    assert "No space left on device" in site.wait(run, "FAILED").message
    assert mlflow_states(store)["train-base"] == ["FAILED"]

    subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
    site.retry(run)
    site.wait(run, "COMPLETED")
    assert logged(store) == LOGGED
    assert mlflow_states(store)["train-base"] == ["FINISHED"]
