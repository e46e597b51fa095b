"""`python -m gigagan export`: a snapshot for publication, or for use without PyTorch."""

from __future__ import annotations

import argparse
from pathlib import Path

from gigagan.commands.options import (
    Commands,
    add_overwrite,
    check,
    is_made,
    provenance,
)
from gigagan.common.files import sha256_of

_EXAMPLES = """examples:
  python -m gigagan export runs/…/snapshot.safetensors small.safetensors
  python -m gigagan export published:base bell.onnx --prompt "flat emoji of a bell"
  python -m gigagan export published:upsampler bell-up.onnx --prompt "flat emoji of a bell"

An .onnx holds a network for one prompt: a generator from z, or an upsampler (of one latent, by
--seed) from tiles and noise. It is run once in onnxruntime and held against the original."""


def add(commands: Commands) -> None:
    """Add the command `export` with its arguments."""
    command = commands.add_parser(
        "export",
        help="a snapshot at half its size, or as ONNX for one prompt",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "snapshot", help="what training wrote, or published:base, published:upsampler"
    )
    command.add_argument("out", type=Path, help=".safetensors (weights as bfloat16) or .onnx")
    command.add_argument("--prompt", help="of an .onnx; none if unconditional")
    command.add_argument("--seed", type=int, default=0, help="of an upsampler's latent")
    add_overwrite(command)


def run(args: argparse.Namespace) -> None:
    """Write what the ending of `out` asks for."""
    check(args)
    path = _snapshot(args.snapshot)
    if args.out.exists() and path.exists() and args.out.samefile(path):
        raise ValueError(f"{args.out} would be replaced by itself: give another name")
    if args.out.suffix == ".onnx":
        _onnx(path, args)
    elif args.out.suffix == ".safetensors":
        _halve(path, args)
    else:
        raise ValueError(f"{args.out}: the name must end in .safetensors or .onnx")


def _snapshot(given: str) -> Path:
    from gigagan.inference.sampler import or_published

    base, upsampler = or_published(None, None)
    own = {"published:base": base, "published:upsampler": upsampler}
    return own.get(given) or Path(given)


def _halve(path: Path, args: argparse.Namespace) -> None:
    import torch

    from gigagan.models import snapshot

    network, about = snapshot.load(path)
    about = {**about, "rounded_from": sha256_of(path)}
    if is_made(args.out, about, overwrite=args.overwrite, read=snapshot.read_about):
        print(f"{args.out} is there already")
        return
    snapshot.save(args.out, network, about, dtype=torch.bfloat16)
    sizes = [file.stat().st_size / 1e6 for file in (path, args.out)]
    print(f"{args.out}: {sizes[1]:.1f} MB of {sizes[0]:.1f} MB")


def _onnx(path: Path, args: argparse.Namespace) -> None:
    from gigagan.inference.conditions import Untold, condition_of
    from gigagan.inference.onnx_export import export, read_about
    from gigagan.models import snapshot

    network, _ = snapshot.load(path)
    told = condition_of(network, "cpu")
    if args.prompt is None and not isinstance(told, Untold):
        raise ValueError("an .onnx is of one prompt: give --prompt (of classes: a name or number)")
    prompt = told.check(args.prompt or "")
    about = {**provenance({"network": path}), "prompt": prompt, "seed": args.seed}
    if is_made(args.out, about, overwrite=args.overwrite, read=read_about):
        print(f"{args.out} is there already")
        return
    difference = export(args.out, network, told, prompt, seed=args.seed, about=about)
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {size:.1f} MB, differs from the original by at most {difference:.1e}")
