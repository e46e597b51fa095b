"""Arguments that several commands share, and how a picture is told of."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigagan.common.files import sha256_of

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


def add_adapters(command: argparse.ArgumentParser) -> None:
    """Which adapters of the base, if any."""
    command.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="add an adapter's updates to the base, times a weight (1); may be repeated",
    )


def adapters(args: argparse.Namespace) -> list[tuple[str, float]]:
    """Files and weights of `--adapter`; what follows the last colon is a weight if it reads so."""
    pairs = []
    for given in args.adapter:
        file, _, amount = given.rpartition(":")
        try:
            pairs.append((file, float(amount)) if file else (given, 1.0))
        except ValueError:
            if not Path(given).exists():
                raise ValueError(f"--adapter {given}: {amount!r} is no weight") from None
            pairs.append((given, 1.0))
    return pairs


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


def add_overwrite(command: argparse.ArgumentParser) -> None:
    """Whether what another call, or somebody, wrote may go."""
    command.add_argument(
        "--overwrite", action="store_true", help="replace files that are there and differ"
    )


def check(args: argparse.Namespace) -> None:
    """Numbers that several commands take, as far as they can be judged without a network.

    Raises:
        ValueError: one is out of its range.
    """
    for name, least in {
        "seed": 0,
        "style_seed": 0,
        "count": 1,
        "batch_size": 1,
        "times": 1,
        "latents": 1,
        "units": 1,
    }.items():
        value = getattr(args, name, None)
        if value is not None and not least <= value < 2**63:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give {least} to 2^63 - 1")
    truncation = getattr(args, "truncation", 1)
    if not 0 <= truncation <= 1:
        raise ValueError(f"--truncation {truncation}: give a value from 0 to 1")


def is_made(
    path: Path,
    about: Mapping[str, Any],
    *,
    overwrite: bool,
    read: Callable[[Path], Mapping[str, Any] | None],
) -> bool:
    """Whether the file is there and is what `about` says; `read` gives what a file says of itself.

    Raises:
        ValueError: another file has the name, and it is not to be overwritten.
    """
    if overwrite or not path.exists():
        return False
    if read(path) != json.loads(json.dumps(about)):
        raise ValueError(
            f"{path} is there and was made otherwise: write to another place, or --overwrite"
        )
    return True


def check_sheet(path: Path, *, overwrite: bool) -> None:
    """A sheet of pictures is made again with them; ValueError where the name is somebody else's."""
    from gigagan.inference.pictures import read_about

    if path.exists() and not overwrite and (read_about(path) or {}).get("sheet") != path.stem:
        raise ValueError(f"{path} is there and no sheet of ours: choose another --out")


def provenance(snapshots: Mapping[str, Path]) -> dict[str, Any]:
    """Version and hashes of the networks: part of what a picture's file says."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("gigagan-pipeline")
    except PackageNotFoundError:
        ours = "unknown"
    return {"version": ours, "snapshots": {n: sha256_of(p) for n, p in snapshots.items()}}


def tell(path: Path, about: Mapping[str, Any], **more: object) -> None:
    """One line of JSON on stdout for each picture."""
    print(json.dumps({"path": str(path), **about, **more}, ensure_ascii=False), flush=True)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, which stdout's lines of JSON do not mix with."""
    from gigagan.common.console import shown

    with shown() as progress:
        yield lambda done, total: progress(what, done, total)
