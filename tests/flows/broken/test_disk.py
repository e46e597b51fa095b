"""The disk of the store fills up."""

import contextlib
import shutil
import subprocess

import pytest

from tests.flows.broken.conftest import LOGGED, logged, mlflow_states

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


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
