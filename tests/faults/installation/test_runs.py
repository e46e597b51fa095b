"""What becomes of runs: one is broken again and again, others are in each other's way.

One test goes on where the last one left its run; each of them can be run alone as well.
"""

import contextlib
import dataclasses
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from tests.faults.installation.conftest import (
    LOGGED,
    Installation,
    assert_nothing_is_left_behind,
    installed,
    kill,
    logged,
    mlflow_states,
    outputs,
    sha256,
    stocked,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OTHER = {"train_base.seed": 7}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with installed(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(site):
    yield
    assert_nothing_is_left_behind(site)


# Runs that are in each other's way


@pytest.fixture(scope="module")
def store(tmp_path_factory, prepared):
    return stocked(tmp_path_factory.mktemp("shared"), prepared)


@pytest.fixture(scope="module")
def cancelled(site, store):
    """A run of a pipeline of another seed that was cancelled in mid-training."""
    stages = {"stages": ["train-base"], "overrides": OTHER}
    run = site.submit("full-pipeline/smoke", store, **stages)
    site.wait_for_checkpoint(run, store)
    site.cancel(run)
    site.wait(run, "CANCELLED")
    return run


@pytest.fixture(scope="module")
def first(site, store, cancelled):
    """A run that nobody disturbs."""
    run = site.submit("train-base/smoke", store)
    site.wait_for_checkpoint(run, store)
    return run


def of_seed(store: Path, seed: int) -> Path:
    """The output of train-base in a store that was made with a seed."""
    (found,) = [
        folder
        for folder in outputs(store)
        if f'"seed": {seed}' in (folder / "config.json").read_text()
    ]
    return found


def test_cancel_in_mid_training_saves_its_state_and_frees_its_slot(site, store, cancelled):
    wait_for(lambda: not site.processes("gigagan.training"), 30)
    assert mlflow_states(store.parent) == {"smoke": ["KILLED"], "train-base": ["KILLED"]}
    assert site.slots() == 0
    assert "asked to stop" in (of_seed(store, 7) / "output.log").read_text()
    wait_for(lambda: all(child.state.is_final() for child in site.children(cancelled)), 60)


def test_a_second_training_waits_for_the_gpu_slot_and_one_of_the_same_key_for_the_output(
    site, store, first
):
    other = site.submit("train-base/smoke", store, overrides=OTHER)
    same = site.submit("train-base/smoke", store)
    wait_for(lambda: "waiting for the limit 'gpu': 1 of its 1 slots" in site.log(other), 60)
    assert site.slots() == 1
    site.wait(first, "COMPLETED")
    assert site.wait(same, "COMPLETED").name == "Skipped"
    site.wait(other, "COMPLETED")
    assert logged(of_seed(store, 0)) == LOGGED
    # The run that was cancelled has been gone on with, from where it was.
    assert "resumed at" in (of_seed(store, 7) / "output.log").read_text()
    assert set(logged(of_seed(store, 7))) >= set(LOGGED)
    assert mlflow_states(store.parent)["train-base"] == ["FINISHED", "FINISHED"]


# A run that is broken in every way


@dataclasses.dataclass
class Broken:
    """A run of a pipeline up to train-base, in a store on a disk of its own."""

    site: Installation
    store: Path
    run: uuid.UUID | None = None

    def go_on(self) -> uuid.UUID:
        """Start it, or again: `prefect flow-run retry`."""
        if self.run is None:
            stages = {"stages": ["train-base"]}
            self.run = self.site.submit("full-pipeline/smoke", self.store, **stages)
        else:
            self.site.retry(self.run)
        return self.run

    def in_training(self) -> uuid.UUID:
        """Start it, or again, up to a checkpoint."""
        run = self.go_on()
        self.site.wait_for_checkpoint(run, self.store)
        return run

    @property
    def states(self) -> dict[str, list[str]]:
        """What MLflow says of it."""
        return mlflow_states(self.store.parent)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """The folder of a disk of its own; None without the right to mount one."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    yield folder
    with contextlib.suppress(subprocess.CalledProcessError):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@pytest.fixture(scope="module")
def broken(site, disk, prepared, tmp_path_factory):
    return Broken(site, stocked(disk or tmp_path_factory.mktemp("disk"), prepared))


# The first of them: Prefect can overlook the only heartbeat that a retry has sent.
def test_sigkill_of_worker_and_flow_is_noticed_by_missing_heartbeats(site, broken):
    run = broken.in_training()
    training, flow = site.training_process(), site.flow_process(run)
    kill(site.worker, flow)
    site.worker.wait()
    site_says = site.state(run).type.value, site.slots()
    site.start_worker()
    assert site_says == ("RUNNING", 1)
    wait_for(lambda: not training.is_running(), 30)
    assert "no heartbeat" in site.wait(run, "CRASHED", 180).message
    assert broken.states == {"smoke": ["RUNNING"], "train-base": ["RUNNING"]}


def test_a_full_disk_fails_the_run_by_that_name(site, broken, disk):
    if disk is None:
        pytest.skip("a disk of its own needs the right to mount one")
    resize(disk, shutil.disk_usage(disk).used + 20 * 10**6)  # a checkpoint takes 49
    try:
        # A retry, which waits until the dead run's slot is free.
        assert "No space left on device" in site.wait(broken.go_on(), "FAILED").message
    finally:
        resize(disk, 400 * 10**6)
    assert broken.states == {"smoke": ["FAILED"], "train-base": ["FAILED"]}


def test_sigkill_of_training_fails_the_run_with_its_last_lines(site, broken):
    run = broken.in_training()
    kill(site.training_process())
    message = site.wait(run, "FAILED").message
    assert "ended by signal 9" in message
    assert "output.log" in message
    assert broken.states == {"smoke": ["FAILED"], "train-base": ["FAILED"]}
    assert site.slots() == 0


def test_sigkill_of_the_flow_crashes_the_run(site, broken):
    run = broken.in_training()
    training = site.training_process()
    kill(site.flow_process(run))
    assert "exited with status code: -9" in site.wait(run, "CRASHED").message
    wait_for(lambda: not training.is_running(), 30)
    # The worker's last word on the crash, which would overwrite an earlier retry.
    wait_for(lambda: "worker - Check whether" in (site.folder / "worker.log").read_text(), 60)


def test_sigkill_of_the_worker_leaves_the_flow_to_run_to_its_end_with_equal_weights(
    site, broken, first, store
):
    run = broken.in_training()
    kill(site.worker)
    site.worker.wait()
    try:
        site.wait(run, "COMPLETED")
    finally:
        site.start_worker()
    # All retries are one run; a child that was taken for dead before a retry runs again itself.
    states = [child.state.type.value for child in site.children(run)]
    assert states.count("COMPLETED") == 1
    assert {*states} <= {"COMPLETED", "CRASHED", "FAILED"}
    assert broken.states == {"smoke": ["FINISHED"], "train-base": ["FINISHED"]}
    assert logged(of_seed(broken.store, 0)) == LOGGED

    site.wait(first, "COMPLETED")
    weights = [of_seed(where, 0) / "snapshot.safetensors" for where in (broken.store, store)]
    assert sha256(weights[0]) == sha256(weights[1])
