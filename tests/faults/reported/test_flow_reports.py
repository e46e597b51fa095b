"""What people report of tools that run pipelines, tried as they would: a tiny download."""

import contextlib
import io
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from flows.__main__ import main
from tests.flows.conftest import prefect_server  # noqa: F401  # a fixture
from tests.once import prefect_home

ROOT = Path(__file__).parents[3]
SMALL = {"max_concepts": 8, "unseen_concepts": 2, "heldout_pictures": 4}
TINY = ["--preset", "smoke", "--stages", "download"]
TINY += [word for n, v in SMALL.items() for word in ("--set", f"download.embedded.{n}={v}")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def variables(prefect_server, tmp_path_factory):  # noqa: F811
    """Variables of a user who has no record but the store's own."""
    known = {name: v for name, v in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    runs = str(tmp_path_factory.mktemp("runs"))
    return known | {"PREFECT_API_URL": prefect_server, "GIGAGAN_RUNS": runs}


@pytest.fixture(scope="module")
def flows(variables):
    """`python -m flows …` as a user types it, run here; returns its status and all that it said."""

    def flows(*words, cwd=ROOT, **environment):
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, {**variables, **environment}, clear=True),
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            status = main([str(word) for word in words])
        return status, out.getvalue() + err.getvalue()

    return flows


def told(done, expect=0):
    """What it printed, on one line."""
    status, said = done
    assert status == expect, said
    assert "Traceback" not in said
    return " ".join(said.split())


@pytest.fixture(scope="module")
def first(variables, tmp_path_factory):
    """A process that makes a store of one download and its record, in a place with an odd name.

    It starts a server of its own, whose state file is there and empty, and its environment names a
    proxy that is not there. Returns the folder and what it said.
    """
    folder = tmp_path_factory.mktemp("my%20data [v1] #1")
    home = prefect_home(tmp_path_factory.mktemp("prefect"))
    (home / "server.json").touch()
    proxy = "http://127.0.0.1:9"
    ours = ("PREFECT_API_URL", "no_proxy", "NO_PROXY")
    known = {name: value for name, value in variables.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-m", "flows", "run", *TINY, "--store", folder / "old/store"],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=400,
        env={**known, "PREFECT_HOME": str(home), "http_proxy": proxy, "HTTP_PROXY": proxy},
    )  # fmt: skip
    return folder, (done.returncode, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def ran(first):
    """The folder of that store."""
    folder, done = first
    told(done)
    return folder


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_gc_deletes_nothing_that_another_record_does_not_know(flows, ran, tmp_path):
    store = ran / "old/store"
    before = files(store)
    empty = f"sqlite:///{tmp_path}/empty.db"
    _, said = flows("store", "gc", "--yes", "--store", store, MLFLOW_TRACKING_URI=empty)
    assert "empty.db" in "".join(said.split())
    assert files(store) == before
    assert "0 B" in told(flows("store", "gc", "--yes", "--store", store))


def test_a_proxy_is_not_asked_for_what_is_here_and_an_empty_state_file_counts_as_none(first):
    _, done = first
    assert "done" in told(done)


def test_what_is_there_is_skipped(flows, ran):
    assert "skipped" in told(flows("run", *TINY, "--store", ran / "old/store"))


def test_a_relative_record_means_the_place_where_the_command_was_typed(flows, tmp_path):
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
        status, said = flows("run", *TINY, "--store", ran / "old/store", PREFECT_API_URL=url)
    assert status != 0
    assert url.rstrip("/") in " ".join(said.split())
