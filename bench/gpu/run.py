"""Runs the parts, each in a process of its own with a limit of time, and says how each ended."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.record import LOG, OUT, PACK, RESULTS, SECONDS, SIZE, append

PARTS = {"right": 60.0, "fast": 120.0, "learn": 380.0}
"""Parts in their order, and the seconds that each may take."""
GRACE_S = 15.0
"""A part that is past its limit is asked to stop, and killed so much later."""
DEFAULT_PACK = Path("gpu-pack")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description="Prove, measure and train on the GPU of this machine; without one, or with "
        "--size small, the same on the CPU in small. `python -m bench gpu --pack-only` lays down "
        "what it needs on a machine that has PyTorch and no network.",
    )
    p.add_argument("--pack", type=Path, default=DEFAULT_PACK, help="the packed folder")
    p.add_argument("--pack-only", action="store_true", help="lay it down here, and run nothing")
    p.add_argument("--out", type=Path, default=Path("gpu-out"), help="results and pictures")
    p.add_argument(
        "--parts",
        default=",".join(f"{name}={seconds:g}" for name, seconds in PARTS.items()),
        help="parts and their seconds (%(default)s)",
    )
    p.add_argument("--size", choices=("full", "small"), default="full", help="small: a rehearsal")
    return p


def parse_parts(text: str) -> dict[str, float]:
    """`right=60,fast` → seconds by part.

    Raises:
        ValueError: an unknown part, or no number.
    """
    found: dict[str, float] = {}
    for piece in text.split(","):
        name, equals, seconds = piece.partition("=")
        if name not in PARTS:
            raise ValueError(f"--parts {text}: {name!r} is none of {', '.join(PARTS)}")
        try:
            found[name] = float(seconds) if equals else PARTS[name]
        except ValueError:
            raise ValueError(f"--parts {text}: {seconds!r} is no number of seconds") from None
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Pack, or run the parts; 1 if a part did not come to its end."""
    args = parser().parse_args(argv)
    if args.pack_only:
        from bench.gpu import pack  # what it needs is not on a bare machine

        pack.lay_down(args.pack)
        return 0
    try:
        parts = parse_parts(args.parts)
    except ValueError as error:
        parser().error(str(error))
    if not (args.pack / "pack.json").is_file():
        print(
            f"error: {args.pack} is no packed folder: make it with `make gpu-pack` where the "
            "project is installed, and carry it here, or name it with --pack",
            file=sys.stderr,
        )
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    statuses = [
        run_part(name, seconds, pack_folder=args.pack, out=args.out, size=args.size)
        for name, seconds in parts.items()
    ]
    print(f"results: {args.out / RESULTS}", flush=True)
    return int(any(status != "ok" for status in statuses))


def run_part(name: str, seconds: float, *, pack_folder: Path, out: Path, size: str) -> str:
    """Run one part; `ok`, `failed` or `out of time`, which is a line of the results as well."""
    site = (pack_folder / "site").resolve()
    paths = [str(Path.cwd()), str(site), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # for products that repeat themselves to the bit
        SECONDS: str(seconds),
        PACK: str(pack_folder.resolve()),
        OUT: str(out.resolve()),
        SIZE: size,
    }
    began = time.monotonic()
    with (out / LOG).open("a") as log:
        log.write(f"\n== {name}\n")
        log.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", f"bench.gpu.{name}"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it started ends with it
        )
        status = _wait(process, seconds)
    took = round(time.monotonic() - began, 1)
    end: dict[str, object] = {"part": name, "name": "end", "status": status, "seconds": took}
    append(out / RESULTS, end | {"exit": process.returncode})
    return status


def _wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    try:
        return "ok" if process.wait(seconds) == 0 else "failed"
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGKILL)
        process.wait()
    return "out of time"


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    sys.exit(main())
