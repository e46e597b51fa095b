"""`python -m gigagan play`: a page on this machine to play with a model."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from gigagan.commands.options import Commands, adapters, add_adapters, add_networks, device


def add(commands: Commands) -> None:
    """Add the command `play` with its arguments."""
    command = commands.add_parser("play", help="a page to play with a model, on this machine")
    add_networks(command)
    add_adapters(command)
    command.add_argument("--host", default="127.0.0.1", help="address to serve on (%(default)s)")
    command.add_argument("--port", type=int, default=7860, help="(%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C; the folder of its files goes with it."""
    from gigagan.inference import page
    from gigagan.inference.sampler import load

    sampler = load(args.base, args.upsampler, adapters=adapters(args), device=device(args))
    if args.host not in page.LOOPBACK:
        print(
            f"warning: {args.host} lets other machines draw here; nothing asks who they are",
            file=sys.stderr,
        )
    with tempfile.TemporaryDirectory(prefix="gigagan-play-") as folder:
        page.prepare(Path(folder), args.host)
        address = page.serve(page.Table(sampler, Path(folder)), host=args.host, port=args.port)
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            signal.pause()
        except KeyboardInterrupt:  # open pages are not waited for: the server's thread is a daemon
            print("ended", file=sys.stderr)
