"""The wheel, in an environment without the checkout: every command that README names works."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "gigagan", "data", "flows")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment with the wheel and the packages that are installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:  # a copy: setuptools builds in the folder itself
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-c", BUILD, folder], cwd=source, check=True, stdout=subprocess.DEVNULL
    )
    (wheel,) = folder.glob("*.whl")
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python, place = venv / "bin/python", "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([python, "-c", place], check=True, capture_output=True, text=True)
    site = Path(found.stdout.strip())
    # As a mere folder: the .pth file in it that names the checkout is not read.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))
    install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    subprocess.run([sys.executable, *install], check=True)
    shutil.rmtree(source)
    return python


def commands():
    """`PACKAGE COMMAND` of every command line in README."""
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"python -m (gigagan|data|flows) ([a-z][a-z-]*)", text)
    return sorted({f"{package} {command}" for package, command in found})


LOADS = """
import contextlib, io, json, sys
from importlib import import_module

def said(package, *words):
    text = io.StringIO()
    sys.argv = [package, *words]
    with contextlib.redirect_stdout(text):
        try:
            status = getattr(import_module(f"{package}.__main__"), "main")([*words])
        except SystemExit as end:
            status = end.code
    return status, text.getvalue()

helps = {line: said(*line.split(), "--help")[0] for line in sys.argv[1:]}
import data, flows, gigagan
from data import concepts
from flows.serve import bootstrap
loaded = {}
for deployment in bootstrap.deployments():
    module, _, name = deployment["entrypoint"].rpartition(".")
    loaded[deployment["entrypoint"]] = callable(getattr(import_module(module), name))
print(json.dumps({
    "helps": helps,
    "files": [package.__file__ for package in (data, flows, gigagan)],
    "list": concepts.LIST.is_file(),
    "loaded": loaded,
    "plan": said("flows", "run", "--preset", "smoke", "--dry-run"),
}))
"""


def start(python, folder, *words):
    """What a process of that interpreter prints in an empty folder."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [python, *words],
        cwd=folder,
        env={"OMP_NUM_THREADS": "1", "COLUMNS": "400", **kept},  # folds no path
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder, the current one of what is started."""
    return tmp_path_factory.mktemp("current")


@pytest.fixture(scope="module")
def found(python, folder):
    """What one process finds in the environment; each costs seconds of imports."""
    return json.loads(start(python, folder, "-c", LOADS, *commands()).splitlines()[-1])


def test_every_command_of_readme_is_there(found):
    assert [line for line, status in found["helps"].items() if status] == []
    assert sorted(found["helps"]) == commands()
    assert all("site-packages" in line for line in found["files"])


def test_a_preset_is_planned_in_runs_of_the_current_folder(found, folder):
    status, plan = found["plan"]
    assert status == 0
    assert f"Plan in {folder}/runs/store" in plan


def test_every_entry_point_of_a_deployment_loads_and_the_list_of_things_is_there(found):
    assert len(found["loaded"]) > 5
    assert all(found["loaded"].values())
    assert found["list"]


def test_the_package_draws_a_picture(python, folder):
    words = ["gigagan", "sample", "a red apple", "--out", "out", "--no-upscale"]
    told = json.loads(start(python, folder, "-m", *words))
    assert (folder / told["path"]).stat().st_size > 500
