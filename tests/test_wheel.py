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


@pytest.fixture
def run(python, tmp_path):
    """Run a module in an empty folder."""

    def run(*words):
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        done = subprocess.run(
            [python, "-m", *words],
            cwd=tmp_path,
            env={"OMP_NUM_THREADS": "1", "COLUMNS": "400", **kept},  # folds no path
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def commands():
    """`PACKAGE COMMAND` of every command line in README."""
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"python -m (gigagan|data|flows) ([a-z][a-z-]*)", text)
    return sorted({f"{package} {command}" for package, command in found})


def test_every_command_of_readme_is_there(python, tmp_path):
    code = """
import sys
from importlib import import_module
for line in sys.argv[1:]:
    package, command = line.split()
    sys.argv = [package, command, "--help"]
    try:
        getattr(import_module(f"{package}.__main__"), "main")([command, "--help"])
    except SystemExit as end:
        assert not end.code, line
import data, flows, gigagan
print(*(package.__file__ for package in (data, flows, gigagan)), sep="\\n")
"""
    done = subprocess.run(
        [python, "-c", code, *commands()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all("site-packages" in line for line in done.stdout.splitlines()[-3:])


def test_the_package_draws_a_picture(run, tmp_path):
    told = json.loads(run("gigagan", "sample", "a red apple", "--out", "out", "--no-upscale"))
    assert (tmp_path / told["path"]).stat().st_size > 500


def test_a_preset_is_planned_in_runs_of_the_current_folder(run, tmp_path):
    plan = run("flows", "run", "--preset", "smoke", "--dry-run")
    assert f"Plan in {tmp_path}/runs/store" in plan


def test_every_entry_point_of_a_deployment_loads_and_the_list_of_things_is_there(python, tmp_path):
    code = """
from importlib import import_module
from data import concepts
from flows.serve import bootstrap
assert concepts.LIST.is_file()
for deployment in bootstrap.deployments():
    module, _, name = deployment["entrypoint"].rpartition(".")
    assert callable(getattr(import_module(module), name))
"""
    subprocess.run([python, "-c", code], cwd=tmp_path, check=True)
