"""Arguments that several commands share, and how a picture is told of."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = object


def add_networks(command: argparse.ArgumentParser, has_team: bool = False) -> None:
    """Which networks, and where they run: on one device, or on several at a time."""
    command.add_argument(
        "--base", help="snapshot of the base generator, or models:/NAME@ALIAS (the package's)"
    )
    command.add_argument(
        "--upsampler", help="snapshot of the upsampler (with no --base the package's)"
    )
    default = "every CUDA device" if has_team else "the first CUDA device"
    names = "cpu, cuda:1, or several as cuda:0,cuda:1" if has_team else "cpu, cuda, cuda:1…"
    command.add_argument("--device", help=f"{names} ({default}; without any the CPU)")


def device(args: argparse.Namespace) -> str:
    """The one device of `--device`."""
    found = devices(args)
    if args.device is not None and "," in args.device:
        raise ValueError(f"--device {args.device}: this command works on one")
    return found[0]


def devices(args: argparse.Namespace) -> tuple[str, ...]:
    """Those of `--device`, or every CUDA device, or the CPU."""
    import torch

    from gigagan.evaluation.devices import parse

    return parse(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def add_drawing(command: argparse.ArgumentParser) -> None:
    """What decides a picture beside its prompt."""
    command.add_argument("--seed", type=int, default=0, help="of the latents (%(default)s)")
    command.add_argument(
        "--truncation", type=float, default=1.0, help="below 1: typical, less varied (%(default)s)"
    )
    command.add_argument(
        "--cut", action="store_true", help="cut prompts that are longer than the encoder reads"
    )


def provenance(snapshots: Mapping[str, Path]) -> dict[str, Any]:
    """Version and hashes of the networks: part of what a picture's file says."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("gigagan-pipeline")
    except PackageNotFoundError:
        ours = "unknown"
    return {"version": ours, "snapshots": {n: _sha256(p) for n, p in snapshots.items()}}


def tell(path: Path, about: Mapping[str, Any], **more: object) -> None:
    """One line of JSON on stdout for each picture."""
    print(json.dumps({"path": str(path), **about, **more}, ensure_ascii=False), flush=True)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, which stdout's lines of JSON do not mix with."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
