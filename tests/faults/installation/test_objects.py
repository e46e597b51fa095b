"""The object store goes away in the middle of training and comes back."""

import time

import pytest
import s3fs

from flows.config import PipelineConfig
from tests.faults.installation.conftest import LOGGED, Installation, logged, mlflow_states
from tests.flows.gate import gate_to

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

URL = "s3://broken/outputs"


@pytest.fixture(scope="module")
def gate(s3_server):
    with gate_to(s3_server.port) as gate:
        yield gate


@pytest.fixture(scope="module")
def site(tmp_path_factory, s3_server, gate):
    folder = tmp_path_factory.mktemp("site")
    extra = {
        **s3_server.environment,
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{gate.port}",
        "GIGAGAN_STORE_CACHE": str(folder / "mirrors"),
    }
    installation = Installation(folder, extra)
    try:
        installation.start()
        yield installation
    finally:
        installation.stop()


@pytest.fixture
def bucket(s3_server, prepared):
    """A store on S3, filled up to `filter`."""
    fs = s3fs.S3FileSystem(**s3_server.options, use_listings_cache=False)
    fs.mkdir("broken")
    fs.put(f"{prepared}/store/", "broken/outputs/", recursive=True)
    return fs


def test_an_object_store_that_refuses_for_a_minute_costs_nothing(site, gate, bucket, monkeypatch):
    monkeypatch.setenv("GIGAGAN_STORE_CACHE", site.extra["GIGAGAN_STORE_CACHE"])
    mirror = PipelineConfig(store=URL).store_path
    run = site.submit("train-base/smoke", URL, overrides={"save_every_s": 1})
    site.wait_for_checkpoint(run, mirror)
    gate.shut()
    time.sleep(60)
    gate.open()
    site.wait(run, "COMPLETED")
    assert "does not answer" in site.log(run)
    assert logged(mirror) == LOGGED
    assert mlflow_states(mirror)["train-base"] == ["FINISHED"]
    assert len(bucket.glob("broken/outputs/train-base/*/manifest.json")) == 1
    assert len(bucket.glob("broken/outputs/train-base/*/snapshot.safetensors")) == 1
