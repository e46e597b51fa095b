"""What people report of tools that run pipelines, tried as they would: a tiny download."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.conftest import prefect_server  # noqa: F401  # a fixture
from tests.once import prefect_home

ROOT = Path(__file__).parents[3]
SMALL = {"max_concepts": 8, "unseen_concepts": 2, "heldout_pictures": 4}
TINY = ["--preset", "smoke", "--stages", "download"]
TINY += [word for n, v in SMALL.items() for word in ("--set", f"download.embedded.{n}={v}")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flows(prefect_server, tmp_path_factory):  # noqa: F811
    """`python -m flows …` as a user runs it, with no record but the store's own."""
    out = ("MLFLOW_TRACKING_URI", "PREFECT_HOME")
    known = {name: value for name, value in os.environ.items() if name not in out}
    known |= {"PREFECT_API_URL": prefect_server}
    known |= {"GIGAGAN_RUNS": str(tmp_path_factory.mktemp("runs"))}

    def flows(*words, cwd=ROOT, without=(), **environment):
        kept = {name: value for name, value in known.items() if name not in without}
        return subprocess.run(
            [sys.executable, "-m", "flows", *map(str, words)],
            capture_output=True, text=True, check=False, cwd=cwd, timeout=400,
            env={**kept, **environment},
        )  # fmt: skip

    return flows


def told(done, status=0):
    """What it printed, on one line."""
    assert done.returncode == status, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return " ".join((done.stdout + done.stderr).split())


@pytest.fixture(scope="module")
def ran(flows, tmp_path_factory):
    """A folder with a store of one download and its record, in a place with an odd name."""
    folder = tmp_path_factory.mktemp("my%20data [v1] #1")
    told(flows("run", *TINY, "--store", folder / "old/store"))
    return folder


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_gc_deletes_nothing_that_another_record_does_not_know(flows, ran, tmp_path):
    store = ran / "old/store"
    before = files(store)
    empty = f"sqlite:///{tmp_path}/empty.db"
    done = flows("store", "gc", "--yes", "--store", store, MLFLOW_TRACKING_URI=empty)
    assert "empty.db" in " ".join((done.stdout + done.stderr).split()).replace(" ", "")
    assert files(store) == before
    assert "0 B" in told(flows("store", "gc", "--yes", "--store", store))


def test_a_proxy_is_not_asked_for_what_is_here(flows, ran):
    proxy = "http://127.0.0.1:9"
    done = flows("run", *TINY, "--store", ran / "old/store", http_proxy=proxy, HTTP_PROXY=proxy)
    assert "skipped" in told(done)


def test_an_empty_state_file_of_the_server_counts_as_none(flows, ran, tmp_path):
    home = prefect_home(tmp_path)
    (home / "server.json").write_text("")
    where = ["--store", ran / "old/store"]
    done = flows("run", *TINY, *where, without=["PREFECT_API_URL"], PREFECT_HOME=str(home))
    assert "skipped" in told(done)


def test_a_relative_record_means_the_place_where_the_command_was_typed(flows, ran, tmp_path):
    record = {"MLFLOW_TRACKING_URI": "sqlite:///rec.db"}
    told(flows("run", *TINY, "--store", "./st", cwd=tmp_path, **record))
    assert (tmp_path / "rec.db").is_file()
    assert not (ROOT / "rec.db").exists()
    said = told(flows("store", "gc", "--store", "./st", cwd=tmp_path, **record))
    assert "0 B" in said


def test_a_moved_store_takes_its_record_along(flows, ran):
    (ran / "old").rename(ran / "new")
    try:
        other = ["--set", "download.embedded.seed=5"]
        told(flows("run", *TINY, *other, "--store", ran / "new/store"))
        assert not (ran / "old").exists()
        assert [name for name in files(ran / "new") if name.startswith("mlartifacts/")]
    finally:
        (ran / "new").rename(ran / "old")


def test_a_dry_run_says_skip_whatever_does_not_decide_the_output(flows, ran):
    free = ["download.timeout_s=11", "download.contact=you@example.org", "download.max_memory_gb=2"]
    words = [word for setting in free for word in ("--set", setting)]
    said = told(flows("run", "--dry-run", *TINY, *words, "--store", ran / "old/store"))
    assert "skip" in said
    assert "contact" in said.partition("Plan in")[2], "it says what it was made with"


def test_a_port_that_answers_otherwise_is_no_prefect_server(flows, ran):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/api/"
        done = flows("run", *TINY, "--store", ran / "old/store", PREFECT_API_URL=url)
    assert done.returncode != 0
    assert url.rstrip("/") in " ".join(done.stderr.split())
