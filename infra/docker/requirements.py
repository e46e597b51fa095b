"""Write what each image installs, as subsets of requirements.lock; resolves and downloads nothing.

    python infra/docker/requirements.py            # services.txt, pipeline.txt, train.txt
    python infra/docker/requirements.py --check    # exit 1 when they are out of date

A subset is the closure of a few packages over the metadata of what is installed here, so run it in
the environment of the lock (`make setup`).
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGET = {
    "python_version": "3.11",
    "python_full_version": "3.11.14",
    "sys_platform": "linux",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
}
"""What the images are, whatever machine this runs on."""
SERVICES = ("prefect", "mlflow[auth]", "psycopg2-binary", "boto3")
"""Servers and their backends: no torch."""
EXTRAS = ("demo", "ray", "cluster")
"""What a conductor needs beyond the project's own dependencies."""
CUDA = re.compile(r"nvidia-|cuda-|triton")
"""Not in the conductor's image, whose torch is the one for CPUs."""


class LockError(RuntimeError):
    """The lock lacks a package that an image needs."""


def main() -> int:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    try:
        stale = {name: text for name, text in files().items() if _read(HERE / name) != text}
    except LockError as error:
        sys.exit(f"error: {error}")
    for name, text in stale.items():
        if check:
            print(f"{HERE / name} is out of date: run python {Path(__file__).name}")
        else:
            (HERE / name).write_text(text)
    return int(check and bool(stale))


def files() -> dict[str, str]:
    """Text of each file by name."""
    extras = PROJECT["project"]["optional-dependencies"]
    pipeline = [*PROJECT["project"]["dependencies"], *(r for e in EXTRAS for r in extras[e])]
    return {
        "services.txt": _text(closure(SERVICES)),
        "pipeline.txt": _text(name for name in closure(pipeline) if not CUDA.match(name)),
        "train.txt": _text(closure(pipeline)),
    }


def closure(roots: Iterable[str]) -> set[str]:
    """Names of all that these requirements need, as far as the lock has it.

    Raises `LockError` where the lock lacks something that it does not leave out on purpose.
    """
    known, left_out = lock(), _left_out()
    todo = [Requirement(root) for root in roots]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen or name in left_out["excluded"]:
            continue
        if name not in known:
            raise LockError(f"{name} is needed and not in requirements.lock: add it there")
        seen.add((name, extras))
        if name not in left_out["bare"]:
            todo += _needs(name, extras)
    return {name for name, _ in seen}


def lock() -> dict[str, list[str]]:
    """Lines of requirements.lock by package."""
    lines: dict[str, list[str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        lines.setdefault(canonicalize_name(line.partition("==")[0]), []).append(line)
    return lines


def _needs(name: str, extras: frozenset[str]) -> list[Requirement]:
    try:
        declared = [Requirement(text) for text in requires(name) or ()]
    except PackageNotFoundError as error:
        raise LockError(
            f"{name} is in the lock and not installed here: run `make setup`"
        ) from error
    return [
        need
        for need in declared
        if need.marker is None
        or any(need.marker.evaluate({**TARGET, "extra": extra}) for extra in extras or {""})
        or need.marker.evaluate({**TARGET, "extra": ""})
    ]


def _left_out() -> dict[str, set[str]]:
    """Packages that the lock never has, and those that it has without their requirements."""
    uv = PROJECT["tool"]["uv"]
    return {
        "excluded": set(uv["exclude-dependencies"]),
        "bare": {entry["name"] for entry in uv["dependency-metadata"]},
    }


def _text(names: Iterable[str]) -> str:
    known = lock()
    lines = [line for name in sorted(names) for line in known[name]]
    return "# Written by requirements.py from requirements.lock.\n" + "\n".join(lines) + "\n"


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
