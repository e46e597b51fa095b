"""`python -m gigagan evaluate`: networks, or pictures that are there, to numbers and a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigagan.commands.options import Commands, adapters, add_adapters, add_networks, devices
from gigagan.common.exits import PROGRESS, tell
from gigagan.config import EvaluateConfig

if TYPE_CHECKING:
    from PIL.Image import Image

_EXAMPLES = """examples:
  python -m gigagan evaluate --heldout captions.json --out results
  python -m gigagan evaluate --protocol gigagan-coco2014-256 --out results \\
      --heldout coco/annotations/captions_val2014.json \\
      --base base.safetensors --upsampler upsampler.safetensors
  python -m gigagan evaluate --drawn theirs/ --heldout captions.json --out results
  python -m gigagan evaluate --compare a/results.json b/results.json
"""


def add(commands: Commands) -> None:
    """Its arguments."""
    command = commands.add_parser(
        "evaluate",
        help="measure on captions with pictures, by a named protocol",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_networks(command, has_team=True)
    add_adapters(command)
    command.add_argument("--config", type=Path, help="JSON or YAML of an evaluation section")
    command.add_argument("--protocol", help="named rules; --protocols lists them")
    command.add_argument("--num-images", type=int, help="captions (the protocol's, or all)")
    command.add_argument("--heldout", type=Path, help="COCO captions file or folder")
    command.add_argument(
        "--drawn", type=Path, help="measure these: a folder with fake_images/ and captions.txt"
    )
    command.add_argument("--aligner", type=Path, help="the filter's aligner.safetensors")
    command.add_argument("--shards", type=Path, help="training tars, searched for neighbours")
    command.add_argument("--statistics", type=Path, help="features of reference sets, kept here")
    command.add_argument("--out", type=Path, help="folder of the results")
    command.add_argument("--protocols", action="store_true", help="list the protocols and stop")
    command.add_argument(
        "--compare", nargs="+", type=Path, metavar="RESULTS", help="several in one table"
    )


def run(args: argparse.Namespace) -> None:
    """Measure and print the table; or list protocols; or compare results."""
    if args.protocols:
        return _list()
    if args.compare:
        return _compare(args.compare)
    if args.out is None:
        raise ValueError("nowhere to write: give --out FOLDER")
    from gigagan.evaluation import measure
    from gigagan.evaluation.report.results import table, unpaired

    config = _config(args)
    captions = Path(config.captions) if config.captions else args.heldout
    if captions is None:
        raise ValueError("nothing to evaluate on: give --heldout, or captions in the config")

    def progress(what: str, done: int, total: int | None) -> None:
        print(f"{done}/{total} {what}", flush=True)
        tell(PROGRESS, [what, done, total])

    common: dict[str, Any] = {"devices": devices(args), "statistics": args.statistics}
    common["progress"] = progress
    if args.drawn is not None:
        results = measure.score(
            args.drawn, captions, args.out, config, aligner=args.aligner, **common
        )
    else:
        results = _drawn_by(args, captions, config, common)
    print("\n".join([table(results), *unpaired(results["protocol"])]))
    print(f"{args.out / 'report.html'} shows it with pictures")


def _drawn_by(
    args: argparse.Namespace, captions: Path, config: EvaluateConfig, common: dict[str, Any]
) -> dict[str, Any]:
    """The results of networks, which are opened once for every device."""
    from gigagan.evaluation import enlarge, measure, protocol
    from gigagan.evaluation.devices import Team
    from gigagan.inference.sampler import load, or_published

    base, upsampler = or_published(args.base, args.upsampler)
    given = adapters(args)
    samplers = [load(base, upsampler, adapters=given, device=d) for d in common["devices"]]
    team, condition = Team(samplers), samplers[0].condition
    common["snapshots"] = samplers[0].snapshots

    def upscale(images: list[Image], prompts: list[str], seed: int) -> list[Image]:
        with team.one() as sampler:
            return sampler.upscale(images, prompts, seed=seed, cut=True, faithful=False)

    def sample(prompts: list[str], seed: int, truncation: float) -> list[Image]:
        with team.one() as sampler:
            return sampler.sample(
                prompts, seed=seed, truncation=truncation, batch_size=config.batch_size, cut=True
            )

    if protocol.named(config.protocol).task == "upsample":
        told = samplers[0].upsampler_condition
        common |= {"asks": told.asks, "classes": told.classes}
        return enlarge.evaluate(upscale, captions, args.out, config, **common)
    reads_text = condition.asks == "text"
    to_dissect = (samplers[0].base, samplers[0].encoder) if reads_text else None
    return measure.evaluate(
        sample,
        captions,
        args.out,
        config,
        aligner=args.aligner,
        shards=args.shards,
        generator=to_dissect,
        asks=condition.asks,
        classes=condition.classes,
        is_cut=condition.is_cut,
        **common,
    )


def _config(args: argparse.Namespace) -> EvaluateConfig:
    from gigagan.common.settings import load

    given = {name: getattr(args, name) for name in ("protocol", "num_images")}
    given = {name: value for name, value in given.items() if value is not None}
    return load(EvaluateConfig, "evaluate", args.config, [], **given)


def _list() -> None:
    from gigagan.evaluation.protocol import PROTOCOLS

    for rules in PROTOCOLS.values():
        counts = f"{rules.num_generated:,} against {rules.num_real:,}" if rules.num_real else "any"
        print(f"{rules.name}\n    {rules.about}; pictures: {counts}\n    {rules.source}")


def _compare(files: list[Path]) -> None:
    from gigagan.evaluation import protocol
    from gigagan.evaluation.report.results import compare, read_results

    results = [read_results(path) for path in files]
    print(compare(results, [str(path) for path in files], protocol.differing))
