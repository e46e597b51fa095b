"""The command line of the package: `python -m gigagan train | describe | sample | …`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gigagan.config import EvaluateConfig, TrainBaseConfig
from gigagan.config.presets import PRESETS, PUBLISHED, preset

FAILED = 1


def parser() -> argparse.ArgumentParser:
    """All commands."""
    p = argparse.ArgumentParser(
        prog="python -m gigagan", description="Text-to-image GANs: train, draw, enlarge, measure."
    )
    commands = p.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train a network", add_help=False)

    describe = commands.add_parser(
        "describe", help="a preset's layers, shapes, parameters and multiply-adds"
    )
    describe.add_argument("preset", metavar="PRESET", help=", ".join(PRESETS))

    sample = commands.add_parser("sample", help="draw pictures from prompts")
    _networks(sample)
    sample.add_argument("prompts", nargs="*", help="one picture each")
    sample.add_argument("--from-file", type=Path, help="a text file with a prompt per line")
    sample.add_argument("--out", type=Path, default=Path("samples"), help="folder (%(default)s)")
    sample.add_argument("--seed", type=int, default=0, help="of the latents (%(default)s)")
    sample.add_argument("--count", type=int, default=1, help="pictures per prompt (%(default)s)")
    sample.add_argument(
        "--truncation", type=float, default=1.0, help="below 1: typical, less varied (%(default)s)"
    )
    sample.add_argument("--batch-size", type=int, default=16, help="at once (%(default)s)")

    upscale = commands.add_parser("upscale", help="enlarge pictures of the upsampler's input size")
    _networks(upscale)
    upscale.add_argument("images", nargs="+", type=Path, help="pictures")
    upscale.add_argument("--prompt", required=True, help="what they show")
    upscale.add_argument("--out", type=Path, default=Path("upscaled"), help="folder (%(default)s)")
    upscale.add_argument("--seed", type=int, default=0, help="of the latents (%(default)s)")

    export = commands.add_parser("export", help="a snapshot at half its size, for publication")
    export.add_argument("snapshot", type=Path, help="what training wrote")
    export.add_argument("out", type=Path, help="the file to write, weights as bfloat16")

    evaluate = commands.add_parser("evaluate", help="measure on captions with pictures")
    _networks(evaluate)
    evaluate.add_argument("--config", type=Path, help="JSON of an evaluation section")
    evaluate.add_argument("--heldout", type=Path, help="COCO captions file or folder")
    evaluate.add_argument("--aligner", type=Path, help="the filter's aligner.safetensors")
    evaluate.add_argument("--out", type=Path, required=True, help="folder of the results")
    return p


def _networks(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--base", type=Path, help="snapshot of the base generator (default: the package's)"
    )
    command.add_argument(
        "--upsampler", type=Path, help="snapshot of the upsampler (default: with no --base, too)"
    )
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1… (%(default)s)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        from gigagan.training.__main__ import main as train

        return train(argv[1:])
    args = parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = {
        "describe": _describe,
        "sample": _sample,
        "upscale": _upscale,
        "export": _export,
        "evaluate": _evaluate,
    }[args.command]
    try:
        run(args)
    except (ValueError, OSError) as error:
        if os.environ.get("GIGAGAN_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return 0


def _describe(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from gigagan.models.summary import summarize

    config = preset(args.preset)
    drawing = config.generator if isinstance(config, TrainBaseConfig) else config.upsampler
    # Where it is no terminal there is no width to keep to.
    console = Console(width=None if sys.stdout.isatty() else 120)
    for network in (drawing, config.discriminator):
        found = summarize(network)
        table = Table(title=f"{args.preset}: {found.network}", title_justify="left")
        for column in ("layer", "kind", "output"):
            table.add_column(column)
        for column in ("parameters", "multiply-adds"):
            table.add_column(column, justify="right")
        for row in found.rows:
            numbers = f"{row.parameters:,}", f"{row.multiply_adds:,}"
            table.add_row(row.name, row.kind, row.shapes, *numbers)
        table.add_section()
        table.add_row("all", "", "", f"{found.parameters:,}", f"{found.multiply_adds:,}")
        without_text = found.parameters - found.parameters_of_text
        if found.parameters_of_text:
            table.add_row("all but text", "", "", f"{without_text:,}", "")
        published = PUBLISHED.get(args.preset, {}).get(found.network)
        if published:
            ours = without_text if found.network == "Generator" else found.parameters
            difference = f"ours {ours / published - 1:+.2%}"
            table.add_row("paper", "", "", f"{published:,.0f}", difference)
        console.print(table)
    print(
        "Multiply-adds of one image's forward pass: convolutions and matrix products; without the "
        "frozen text encoder."
    )


def _sample(args: argparse.Namespace) -> None:
    from gigagan.inference.sampler import load

    listed = args.from_file.read_text().splitlines() if args.from_file else []
    prompts = [p for p in [*args.prompts, *listed] if p.strip()]
    if not prompts:
        raise ValueError("no prompts: give some, or --from-file")
    if args.count < 1:
        raise ValueError(f"--count {args.count}: give 1 or more")
    repeated = [p for p in prompts for _ in range(args.count)]
    pictures = load(args.base, args.upsampler, device=args.device).sample(
        repeated,
        seed=args.seed,
        truncation=args.truncation,
        batch_size=args.batch_size,
        progress=lambda done, total: print(f"\r{done}/{total} pictures", end="", file=sys.stderr),
    )
    print(file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    for number, (prompt, picture) in enumerate(zip(repeated, pictures, strict=True)):
        path = args.out / f"{number:04d}.png"
        picture.save(path)
        print(f"{path}\t{prompt}")


def _upscale(args: argparse.Namespace) -> None:
    from PIL import Image

    from gigagan.inference.sampler import load

    sampler = load(args.base, args.upsampler, device=args.device)
    images = [Image.open(path).convert("RGB") for path in args.images]
    args.out.mkdir(parents=True, exist_ok=True)
    large = sampler.upscale(images, [args.prompt] * len(images), seed=args.seed)
    for path, picture in zip(args.images, large, strict=True):
        target = args.out / f"{path.stem}.png"
        picture.save(target)
        print(target)


def _export(args: argparse.Namespace) -> None:
    import torch

    from gigagan.models import snapshot

    network, about = snapshot.load(args.snapshot)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    snapshot.save(args.out, network, about, dtype=torch.bfloat16)
    sizes = [path.stat().st_size / 1e6 for path in (args.snapshot, args.out)]
    print(f"{args.out}: {sizes[1]:.1f} MB of {sizes[0]:.1f} MB")


def _evaluate(args: argparse.Namespace) -> None:
    from gigagan.evaluation import protocol, report
    from gigagan.inference.sampler import load, or_published

    text = args.config.read_text() if args.config else "{}"
    config = EvaluateConfig.model_validate_json(text)
    captions = Path(config.captions) if config.captions else args.heldout
    if captions is None:
        raise ValueError("nothing to evaluate on: give --heldout, or captions in the config")
    sampler = load(args.base, args.upsampler, device=args.device)
    base, upsampler = or_published(args.base, args.upsampler)
    snapshots = {"base": base} | ({"upsampler": upsampler} if upsampler else {})

    def progress(what: str, done: int, total: int | None) -> None:
        print(f"{done}/{total} {what}", flush=True)

    results = protocol.evaluate(
        lambda prompts, seed: sampler.sample(
            prompts, seed=seed, truncation=config.truncation, batch_size=config.batch_size
        ),
        captions,
        args.out,
        config,
        aligner=args.aligner,
        snapshots=snapshots,
        device=args.device,
        progress=progress,
    )
    print(report.table(results))


if __name__ == "__main__":
    sys.exit(main())
