"""A current folder that cannot be written, and a user without a home."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows import places
from flows.config import PipelineConfig

LOOKS = [["--help"], ["presets"], ["store", "ls"], ["run", "--preset", "smoke", "--dry-run"]]
LOOKS += [["render", "train-base", "--preset", "smoke"]]
WRITES = [["run", "--preset", "smoke"], ["submit", "--preset", "smoke"], ["ui"], ["bootstrap"]]
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that nobody may write to."""
    folder = tmp_path_factory.mktemp("folder")
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


def _keep_to_rights() -> None:
    """Let root be refused what its files' rights refuse; others have no such power to drop."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def flows(folder, *arguments, code, **environment):
    """Run code in a folder."""
    inherited = {
        name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={"OMP_NUM_THREADS": "1", **inherited, **environment},
        preexec_fn=_keep_to_rights,
        capture_output=True,
        text=True,
        check=False,
    )


IN_TURN = """
import json, os, runpy, sys
said = {}
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    files = [os.memfd_create(name) for name in ("out", "err")]
    before = [os.dup(number) for number in (1, 2)]
    for number, file in enumerate(files, 1):
        os.dup2(file, number)
    try:
        runpy.run_module("flows", run_name="__main__")
    except SystemExit as left:
        status = left.code
    for number, stream in enumerate((sys.stdout, sys.stderr), 1):
        stream.flush()
        os.dup2(before[number - 1], number)
    texts = [os.pread(file, os.fstat(file).st_size, 0).decode() for file in files]
    said[" ".join(arguments)] = status, *texts
print(json.dumps(said))
"""
"""Runs commands one after the other: most of what one takes is what Python imports for it."""


@pytest.fixture(scope="module")
def said(folder):
    """Status, output and errors of each command in that folder."""
    done = flows(folder, json.dumps([*LOOKS, *WRITES]), code=IN_TURN)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_the_copy_cannot_be_written(folder):
    done = flows(folder, code="open('x', 'w')")
    assert "Permission denied: 'x'" in done.stderr


@pytest.mark.parametrize("arguments", LOOKS, ids=" ".join)
def test_what_only_looks_works_where_nothing_can_be_written(said, arguments):
    status, output, errors = said[" ".join(arguments)]
    assert (status, errors) == (0, "")
    assert output


@pytest.mark.parametrize("arguments", WRITES, ids=" ".join)
def test_what_writes_names_the_variable_that_moves_it(folder, said, arguments):
    status, _, errors = said[" ".join(arguments)]
    assert status == 1
    (line,) = errors.splitlines()
    assert line.startswith(f"error: {folder}/runs") or f"store {folder}/runs" in line
    assert line.endswith("to a folder that can")


def test_one_variable_moves_all_that_commands_leave(folder, tmp_path):
    code = """
import os
from flows import places
from flows.serve import settings
settings.apply()
from flows.serve.services import Service
places.make(settings.home())
print(os.environ["PREFECT_HOME"], Service("x", ["this"]).log, places.runs(), sep="\\n")
"""
    done = flows(folder, code=code, GIGAGAN_RUNS=f"{tmp_path}/our runs")
    runs = f"{tmp_path}/our runs"
    assert done.stdout.splitlines() == [f"{runs}/prefect", f"{runs}/logs/x.log", runs]


def test_a_user_without_name_and_home_keeps_what_has_no_other_place_in_runs(folder, tmp_path):
    code = """
import pwd, sys
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
from pathlib import Path
from flows.__main__ import main
assert main(["run", "--preset", "smoke", "--dry-run"]) == 0
from flows.record import owners
print(Path.home())
print(owners.user().isdecimal())
"""
    done = flows(folder, code=code, GIGAGAN_RUNS=str(tmp_path))
    assert done.stderr == ""
    assert done.stdout.splitlines()[-2:] == [str(tmp_path), "True"]


def test_a_relative_place_is_so_to_where_the_command_was_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIGAGAN_RUNS", "here")
    assert places.runs() == tmp_path / "here"
    monkeypatch.setenv("GIGAGAN_RUNS", "")
    assert places.runs() == tmp_path / "runs"


@pytest.mark.parametrize(
    ("store", "place"),
    [
        ("runs/store", "here/store"),
        ("./runs/a/b", "here/a/b"),
        ("s3://bucket/x", "here/mirror/s3-bucket-x-8092328c"),
    ],
)
def test_the_stores_in_runs_move_along(tmp_path, monkeypatch, store, place):
    monkeypatch.delenv("GIGAGAN_STORE_CACHE", raising=False)
    monkeypatch.setenv("GIGAGAN_RUNS", str(tmp_path / "here"))
    assert PipelineConfig(store=store).store_path == tmp_path / place
    assert PipelineConfig(store="else/store").store_path == Path.cwd() / "else/store"
