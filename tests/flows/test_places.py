"""A checkout that cannot be written, and a user without a home."""

import ctypes
import os
import shutil
import subprocess
import sys

import pytest

from flows import places
from flows.config import ROOT, PipelineConfig

LOOKS = [["--help"], ["presets"], ["store", "ls"], ["run", "--preset", "smoke", "--dry-run"]]
LOOKS += [["render", "train-base", "--preset", "smoke"]]
WRITES = [["run", "--preset", "smoke"], ["submit", "--preset", "smoke"], ["ui"], ["bootstrap"]]
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the package that nobody may write to."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "flows", root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    for folder, _, files in os.walk(root):
        for name in files:
            os.chmod(f"{folder}/{name}", 0o444)  # noqa: PTH101
        os.chmod(folder, 0o555)  # noqa: PTH101
    yield root
    for folder, _, _ in os.walk(root):
        os.chmod(folder, 0o755)  # noqa: PTH101


def _keep_to_rights() -> None:
    """Let root be refused what its files' rights refuse; others have no such power to drop."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def flows(checkout, *arguments, code=None, **environment):
    """Run a command of a checkout; the packages beside it are those of the real one."""
    inherited = {
        name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ
    }
    command = ["-c", code] if code else ["-m", "flows", *arguments]
    return subprocess.run(
        [sys.executable, *command],
        cwd=checkout,
        env={
            "PYTHONPATH": f"{checkout}:{ROOT}",
            "OMP_NUM_THREADS": "1",
            **inherited,
            **environment,
        },
        preexec_fn=_keep_to_rights,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_copy_cannot_be_written(checkout):
    done = flows(checkout, code="open('x', 'w')")
    assert "Permission denied: 'x'" in done.stderr


@pytest.mark.parametrize("arguments", LOOKS, ids=" ".join)
def test_what_only_looks_works_where_nothing_can_be_written(checkout, arguments):
    done = flows(checkout, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize("arguments", WRITES, ids=" ".join)
def test_what_writes_names_the_variable_that_moves_it(checkout, arguments):
    done = flows(checkout, *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {checkout}/runs") or f"store {checkout}/runs" in line
    assert line.endswith("to a folder that can")


def test_one_variable_moves_all_that_commands_leave(checkout, tmp_path):
    code = """
import os
from flows import places
from flows.serve import settings
settings.apply()
from flows.serve.services import Service
places.make(settings.home())
print(os.environ["PREFECT_HOME"], Service("x", ["this"]).log, places.runs(), sep="\\n")
"""
    done = flows(checkout, code=code, GIGAGAN_RUNS=f"{tmp_path}/our runs")
    runs = f"{tmp_path}/our runs"
    assert done.stdout.splitlines() == [f"{runs}/prefect", f"{runs}/logs/x.log", runs]


def test_a_user_without_name_and_home_keeps_what_has_no_other_place_in_runs(checkout, tmp_path):
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
    done = flows(checkout, code=code, GIGAGAN_RUNS=str(tmp_path))
    assert done.stderr == ""
    assert done.stdout.splitlines()[-2:] == [str(tmp_path), "True"]


def test_a_relative_place_is_so_to_where_the_command_was_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIGAGAN_RUNS", "here")
    assert places.runs() == tmp_path / "here"
    monkeypatch.setenv("GIGAGAN_RUNS", "")
    assert places.runs() == ROOT / "runs"


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
    assert PipelineConfig(store="else/store").store_path == ROOT / "else/store"
