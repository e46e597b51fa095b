"""What takes long to make and never differs: made once, for all processes of a test run."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

MIGRATE = """
import asyncio
from prefect.server.database import provide_database_interface
asyncio.run(provide_database_interface().create_db())
"""
FOLDER = "TEST_RUN_FOLDER"
"""Environment variable: the folder of this test run, which its first process makes."""


def open_run() -> None:
    """Make the folder of this test run, unless a process above this one has."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="tests-")


def close_run() -> None:
    """Delete it; for the process that made it."""
    shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True)


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills; other processes wait for it. Copy what you change."""
    folder = Path(os.environ[FOLDER]) / name
    folder.mkdir(exist_ok=True)
    done = folder.with_suffix(".done")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(folder)
            done.touch()
    return folder


def prefect_home(folder: Path) -> Path:
    """A new home of Prefect with its database migrated already, which takes a server seconds."""

    def migrate(home: Path) -> None:
        known = {name: v for name, v in os.environ.items() if not name.startswith("PREFECT_")}
        subprocess.run(
            [sys.executable, "-c", MIGRATE], env={**known, "PREFECT_HOME": str(home)}, check=True
        )

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(made_once("prefect", migrate) / "prefect.db", folder)
    return folder
