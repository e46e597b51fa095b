"""The data half step by step: `python -m data STEP --help`. Says what happens, decides nothing."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # each step imports what it needs when it runs, so that help comes at once
    from data.report import Funnel, Report

OVERVIEW = """\
From lists of URLs and captions to training shards, one step at a time:

    metadata   lists → OUT/lists: the rows worth asking for, in a seeded order
    download   lists → OUT/images, OUT/fates: original bytes, and what became of each row
    score      a download → OUT/scores, OUT/embeddings: what models say of each picture
    filter     scores → OUT/kept.parquet, and the training shards of what is kept
    shards     kept.parquet → training shards, without filtering anew
    folders    pictures of this machine, a folder or a label for each class → training shards
    coco       COCO 2014 and 2017, and the captions of an evaluation
    inspect    what is in a shard or table, with a contact sheet

Every step resumes: run the same command again after any interruption. Of two commands that write
one folder the second waits.
"""
EPILOG = """\
example, from a list to shards:
    python -m data download work/download --set source=metadata \\
        --set 'metadata=[lists/*.parquet]' --set contact=me@example.org --workers 8
    python -m data score work/scores --download work/download --workers 4
    python -m data filter work/filtered --scores work/scores --download work/download \\
        --set min_similarity=0.28
    python -m data inspect work/filtered/shards/128/train-00000.tar --out sheet.png

GIGAGAN_DEBUG=1 shows the traceback of an error.
"""
DEFAULT_ENCODERS = "gigagan.scoring:encoders"


def main(arguments: list[str] | None = None) -> int:
    """Run one step; the exit status: 0, 1 for an error, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `… | head` has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        return 0
    except Exception as error:
        if os.environ.get("GIGAGAN_DEBUG") == "1":
            traceback.print_exc()
        print(f"error: {_line(error)}", file=sys.stderr)
        return 1
    return 0


def _line(error: Exception) -> str:
    """An error on one line; its type too, unless its text is written for people."""
    text = " ".join(str(error).split())
    is_written = isinstance(error, ValueError | OSError | RuntimeError) and text
    return text if is_written else f"{type(error).__name__}: {text}"


# ---- the steps ---------------------------------------------------------------------------------


def _metadata(options: argparse.Namespace) -> None:
    from data.config import DownloadConfig
    from data.lists import metadata
    from gigagan.common.console import shown

    given = {"metadata": tuple(options.lists), "source": "metadata"} if options.lists else {}
    config = _config(DownloadConfig, "download", options, **given)
    if not config.metadata:
        raise ValueError("no lists: name them after OUT, or as --set 'metadata=[…]'")
    config = config.model_copy(update={"source": "metadata"})
    with _writing(options.out), shown() as progress:
        funnel = metadata.prepare(
            config.metadata,
            options.out,
            config,
            workers=options.workers,
            backend=options.backend,
            progress=progress,
        )
    _print_funnel(funnel)


def _download(options: argparse.Namespace) -> None:
    from data.config import DownloadConfig
    from data.download import run as download
    from data.lists import metadata
    from gigagan.common.console import shown

    lists = metadata.listed(options.out)
    begun = {**lists, **download.begun(options.out)}
    usual = {name: begun[name] for name in DownloadConfig.model_fields if name in begun}
    config = _config(DownloadConfig, "download", options, usual)
    if lists and config.source != lists["source"]:
        raise ValueError(
            f"{options.out} has lists of {lists['metadata'][0]}, and download.source "
            f"is {config.source!r}: leave that out, or give another folder"
        )
    with _writing(options.out), shown() as progress:
        report = download.run(
            options.out,
            config,
            processes=options.workers,
            threads=options.threads,
            verify=options.verify,
            progress=progress,
        )
    _print_report(report)


def _score(options: argparse.Namespace) -> None:
    from data.config import ScoreConfig
    from data.lists.sources import fingerprint
    from data.score import run as score
    from data.score.encoders import EncoderFactory
    from gigagan.common.console import shown

    config = _config(ScoreConfig, "score", options)
    make_encoders = EncoderFactory(options.encoders, config)
    make_encoders.function()  # a wrong name is an error now, not in every worker
    lists = sorted((options.download / "lists").glob("*.parquet"))
    plan = {
        **config.model_dump(mode="json", exclude={"devices", "batch_size"}),
        "encoders": options.encoders,
        "download": fingerprint(tuple(map(str, lists))),
    }
    with _writing(options.out), _planned(options.out / "plan.json", plan), shown() as progress:
        report = score.run(
            options.out,
            options.download,
            config,
            make_encoders,
            workers=options.workers,
            backend=options.backend,
            gpus=options.gpus,
            progress=progress,
        )
    _print_report(report)


def _filter(options: argparse.Namespace) -> None:
    from data.config import FilterConfig
    from data.filter import run as filtering
    from gigagan.common.console import shown

    config = _config(FilterConfig, "filter", options)
    with _writing(options.out), shown() as progress:
        report = filtering.run(
            options.out,
            options.scores,
            options.download,
            config,
            workers=options.workers,
            backend=options.backend,
            progress=progress,
        )
    _print_report(report)


def _shards(options: argparse.Namespace) -> None:
    from data.config import FilterConfig
    from data.look.tables import opened
    from data.schema import SCORES
    from data.shards import write as shards
    from gigagan.common.console import shown

    config = _config(FilterConfig, "filter", options)
    kept = options.kept or options.out / "kept.parquet"
    if not kept.is_file():
        raise ValueError(f"{kept} is not there: run the filter, or name it with --kept")
    if absent := {*SCORES.names} - {*opened(kept).schema_arrow.names}:
        raise ValueError(
            f"{kept} has no column {min(absent)}: name a kept.parquet of the filter with --kept"
        )
    with _writing(options.out), shown() as progress:
        lost = shards.write(
            kept,
            options.download,
            options.out,
            config,
            workers=options.workers,
            backend=options.backend,
            progress=progress,
        )
    for side in config.resolutions:
        print(f"{options.out / f'{side:03d}'}: training shards at {side} px")
    if lost:
        first = min(lost)
        print(f"{len(lost):,} kept pictures are in no shard (first: {first}: {lost[first]})")


def _folders(options: argparse.Namespace) -> None:
    from data import folders
    from data.config import FilterConfig
    from gigagan.common.console import shown
    from gigagan.common.settings import load

    sides, size = tuple(sorted({*options.resolutions})), options.samples_per_shard
    given = {"resolutions": sides, "codec": options.codec, "samples_per_shard": size}
    chosen = {name: getattr(options, name) for name in ("caption", "heldout", "seed")}
    source = {"src": str(options.src.resolve()), "csv": str(options.csv and options.csv.resolve())}
    plan = _planned(options.out / "plan.json", {**source, **chosen})
    with _writing(options.out), plan, shown() as progress:
        report = folders.shard(
            options.src,
            options.out,
            load(FilterConfig, "filter", None, (), **given),
            listed=options.csv,
            workers=options.workers,
            progress=progress,
            **chosen,
        )
    _print_report(report)
    for side in sides:
        print(f"{options.out / f'{side:03d}'}: training shards at {side} px")
    if options.heldout:
        print(f"{options.out / 'heldout'}: {report.counts['held out']:,} pictures held out")
    if report.funnel[0].rows > report.counts["ok"] + report.counts["held out"]:
        print(f"{options.out / folders.LEFT_OUT}: what was left out, and why")


def _coco_fetch(options: argparse.Namespace) -> None:
    from data import coco
    from gigagan.common.console import shown

    base_url = options.base_url or coco.BASE_URL
    with _writing(options.out), shown() as progress:
        captions = coco.fetch(
            options.out, options.year, options.split, base_url=base_url, progress=progress
        )
    name = f"{options.split}{options.year}"
    print(f"{captions}: captions of {coco.NUM_PICTURES[name]:,} pictures in {options.out / name}")


def _coco_captions(options: argparse.Namespace) -> None:
    from data import coco

    chosen = coco.evaluation_captions(options.captions, options.num, options.seed)
    if options.out:
        with _writing(options.out, is_file=True):
            chosen.write(options.out)
    if options.heldout:
        with _writing(options.heldout, is_file=True):
            coco.write_heldout(options.captions, chosen, options.heldout)
    print(f"{len(chosen):,} captions of seed {chosen.seed}, one a picture")
    print(f"sha256 of the list      {chosen.sha256}")
    print(f"sha256 of the captions  {chosen.text_sha256}")


def _inspect(options: argparse.Namespace) -> None:
    from data.look import inspect
    from gigagan.common.console import shown

    alone = _writing(options.out, is_file=True) if options.out else nullcontext()
    with alone, shown() as progress:
        findings = inspect.look(
            options.shard,
            sheet=options.out,
            num=options.num,
            seed=options.seed,
            quick=options.quick,
            progress=progress,
        )
    print(findings)


def _config(
    model: Any, section: str, options: argparse.Namespace, usual: Any = None, **given: Any
) -> Any:
    from gigagan.common.settings import load

    return load(model, section, options.config, options.set, usual, **given)


@contextmanager
def _writing(out: Path, *, is_file: bool = False) -> Iterator[None]:
    """Be the only command that writes there; folders made for nothing go again."""
    from data.download.processes import only_writer

    place = next(p for p in ([] if is_file else [out]) + [*out.parents] if p.exists())
    if not place.is_dir():
        raise ValueError(f"{out} cannot be written: {place} is a file; give another path")
    if is_file and out.is_dir():
        raise ValueError(f"{out} is a folder, and a file is written: give another path")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        with only_writer(out, is_file=is_file):
            yield
    except BaseException:
        below = sorted(out.rglob("*/"), reverse=True) if out in made else []
        for folder in [*below, *made]:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _planned(path: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Refuse to go on in a folder that was begun with other settings, or from other inputs."""
    from data.download.processes import LOCK
    from gigagan.common.files import write_aside

    begun = json.loads(path.read_text(encoding="utf-8")) if path.exists() else plan
    if changed := sorted(name for name in plan if begun.get(name) != plan[name]):
        raise ValueError(
            f"{path.parent} was begun with another {', '.join(changed)} (see {path.name}): go on "
            "with that, or give another folder"
        )
    if not path.exists():
        write_aside(path, json.dumps(plan, indent=1))
    try:
        yield
    except BaseException:
        ours = {path.parent / LOCK, path}
        if all(found in ours or found.is_dir() for found in path.parent.rglob("*")):
            path.unlink()  # nothing was begun
        raise


def _print_funnel(funnel: Funnel) -> None:
    from data.report import Report

    print(Report({}, funnel, {}).table())


def _print_report(report: Report) -> None:
    print(report.table())
    for name, value in report.metrics.items():
        print(f"{name}: {value:.6g}")


# ---- the command line --------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m data", description=OVERVIEW, epilog=EPILOG, formatter_class=_Plain
    )
    steps = parser.add_subparsers(required=True, metavar="STEP", title="steps")
    step = _step(steps, "metadata", _metadata, "lists of URLs → OUT/lists", "download", spread=True)
    step.add_argument(
        "lists", nargs="*", metavar="LIST", help="Parquet, CSV or TSV: paths, globs or URLs"
    )
    step = _step(steps, "download", _download, "lists → original bytes in OUT/images", "download")
    step.add_argument("--threads", type=_count, default=32, help="of each process; 32 by default")
    step.add_argument(
        "--verify",
        action="store_true",
        help="also read every picture that is there, and fetch damaged ones again",
    )
    step = _step(steps, "score", _score, "a download → OUT/scores", "score", spread=True)
    _folder(step, "--download", "OUT of the download")
    step.add_argument(
        "--encoders",
        default=DEFAULT_ENCODERS,
        metavar="MODULE:FUNCTION",
        help="makes the models: f(config, worker) → encoders; by default %(default)s",
    )
    step.add_argument(
        "--gpus", type=float, default=0.0, help="of a Ray worker; 0 by default, parts are shares"
    )
    step = _step(
        steps, "filter", _filter, "scores → what is kept, and shards", "filter", spread=True
    )
    _folder(step, "--scores", "OUT of the scoring")
    _folder(step, "--download", "OUT of the download")
    step = _step(steps, "shards", _shards, "kept.parquet → training shards", "filter", spread=True)
    _folder(step, "--download", "OUT of the download")
    step.add_argument("--kept", type=Path, metavar="FILE", help="by default OUT/kept.parquet")
    _add_folders(steps)
    _add_coco(steps)
    _add_inspect(steps)
    return parser


def _step(
    steps: Any, name: str, run: Any, brief: str, section: str, spread: bool = False
) -> argparse.ArgumentParser:
    """A step that writes to OUT by a section of the settings."""
    step: argparse.ArgumentParser = steps.add_parser(
        name,
        description=f"{brief[0].upper()}{brief[1:]}.\n\n{DETAILS[name]}",
        epilog=section,
        formatter_class=_WithSettings,
    )
    step.set_defaults(run=run)
    step.add_argument("out", type=Path, metavar="OUT", help="folder to write to, or to resume")
    step.add_argument(
        "--config", type=Path, metavar="FILE", help=f"{section} settings, JSON or YAML"
    )
    step.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one setting, as YAML; may be repeated",
    )
    step.add_argument(
        "--workers", type=_count, default=1, metavar="N", help="processes; 1 by default"
    )
    if spread:
        step.add_argument(
            "--backend",
            choices=("processes", "ray"),
            default="processes",
            help="where the workers are: here, or in a Ray cluster",
        )
    return step


def _folder(step: argparse.ArgumentParser, name: str, brief: str) -> None:
    step.add_argument(name, type=Path, required=True, metavar="DIR", help=brief)


def _add_folders(steps: Any) -> None:
    step = steps.add_parser("folders", description=DETAILS["folders"], formatter_class=_Plain)
    step.set_defaults(run=_folders)
    step.add_argument("src", type=Path, metavar="SRC", help="folder with a folder for each class")
    step.add_argument("out", type=Path, metavar="OUT", help="folder to write to, or to resume")
    step.add_argument(
        "--resolutions", type=_count, nargs="+", required=True, metavar="PX", help="sides, px"
    )
    step.add_argument("--codec", choices=("png", "jpg"), default="png", help="png by default")
    step.add_argument(
        "--samples-per-shard", type=_count, default=1000, metavar="N", help="1000 by default"
    )
    step.add_argument(
        "--seed", type=_number, default=0, help="decides the order, and what is held out"
    )
    step.add_argument(
        "--csv", type=Path, metavar="FILE", help="CSV, TSV or Parquet: path in SRC, label, caption"
    )
    step.add_argument(
        "--caption",
        default="a photo of a {label}",
        help="where none is listed; {label} is the class's name, its _ as blanks; by default "
        "'%(default)s'",
    )
    step.add_argument(
        "--heldout", type=_number, default=0, metavar="N", help="pictures of each class set aside"
    )
    step.add_argument(
        "--workers", type=_count, default=1, metavar="N", help="processes; 1 by default"
    )


def _add_coco(steps: Any) -> None:
    coco = steps.add_parser(
        "coco",
        description=DETAILS["coco"],
        formatter_class=_Plain,
    )
    parts = coco.add_subparsers(required=True, metavar="PART", title="parts")
    fetch = parts.add_parser("fetch", help="download, verify, unpack", formatter_class=_Plain)
    fetch.set_defaults(run=_coco_fetch)
    fetch.add_argument("out", type=Path, metavar="OUT", help="folder; zips that lie there are used")
    fetch.add_argument("--year", type=int, choices=(2014, 2017), default=2014)
    fetch.add_argument("--split", choices=("val", "train"), default="val")
    fetch.add_argument(
        "--base-url",
        metavar="URL",
        help="of a mirror with the layout of COCO's own site, which is the default",
    )
    captions = parts.add_parser(
        "captions", help="a seeded list of captions", formatter_class=_Plain
    )
    captions.set_defaults(run=_coco_captions)
    captions.add_argument("captions", type=Path, metavar="CAPTIONS", help="captions_val2014.json")
    captions.add_argument("--num", type=_count, default=30_000, help="captions; 30,000 by default")
    captions.add_argument("--seed", type=int, default=0)
    captions.add_argument("--out", type=Path, metavar="FILE", help="write the list, JSON lines")
    captions.add_argument(
        "--heldout",
        type=Path,
        metavar="FILE",
        help="write a captions file with only these captions, but every picture: what an "
        "evaluation reads, for example OUT/val2014/captions.json beside the pictures",
    )


def _add_inspect(steps: Any) -> None:
    step = steps.add_parser(
        "inspect",
        description=DETAILS["inspect"],
        formatter_class=_Plain,
    )
    step.set_defaults(run=_inspect)
    step.add_argument("shard", type=Path, metavar="SHARD", help="a tar, a Parquet, or a folder")
    step.add_argument("--out", type=Path, metavar="FILE", help="draw a contact sheet, PNG or JPEG")
    step.add_argument("--num", type=_count, default=48, help="pictures on it; 48 by default")
    step.add_argument("--seed", type=int, default=0, help="decides which")
    step.add_argument("--quick", action="store_true", help="read only the pictures' headers")


DETAILS = {
    "metadata": """\
Reads LAION, Re-LAION, COYO, DataComp or plain lists; drops what the settings rule out and exact
duplicates; writes the rest in a seeded order that spreads hosts. Prints the funnel.

    python -m data metadata work/download lists/*.parquet --set min_side=256 --workers 4""",
    "download": """\
Fetches every row once and politely, and says of each what became of it. Where OUT was begun,
or has lists, it goes on with the settings of that; else it makes the lists first.

    python -m data download work/download --config run.yaml --workers 8 --threads 64""",
    "score": """\
Decodes each picture once and writes what the models say of it, shard by shard.

    python -m data score work/scores --download work/download --workers 4 \\
        --set encoder=open_clip:ViT-L-14/openai --set aesthetic=laion-v2""",
    "filter": """\
Chooses by thresholds on scores, sizes and captions, drops near duplicates, writes verdicts, a
report with pictures, and the training shards. No score is computed: another threshold takes
seconds. Captions that are empty or hold control characters always go.

    python -m data filter work/filtered --scores work/scores --download work/download \\
        --set top_similarity=0.3 --set 'resolutions=[64, 512]'""",
    "shards": """\
Writes the training shards of the rows in kept.parquet; those already done stay.

    python -m data shards work/filtered --download work/download --workers 4""",
    "folders": """\
Makes training shards of pictures that are here: of SRC/CLASS/*.jpg, at any depth, or of the files
that a list names with their labels. Pictures that cannot be read are told in OUT/left-out.parquet;
links that lead out of SRC are not followed, hidden files passed over.

    python -m data folders imagenet/train work/imagenet --resolutions 64 256 --codec jpg \\
        --heldout 50 --workers 8""",
    "coco": """\
Fetch a release of COCO as distributed (zips are resumed and verified), or choose the captions of
an evaluation: one of each picture, by the seed, with the hash of the list.

    python -m data coco fetch work/coco --year 2014 --split val
    python -m data coco captions work/coco/annotations/captions_val2014.json --num 30000 \\
        --out captions.jsonl --heldout work/coco/val2014/captions.json""",
    "inspect": """\
Shows what is in a training shard or image shard (or a folder of them): samples, members, sizes,
codecs, captions, damage. Of a Parquet: schema, nulls, first rows, and how often each fate occurs.

    python -m data inspect work/filtered/shards/128/train-00000.tar --out sheet.png --num 48
    python -m data inspect work/download/fates/00000.parquet""",
}


class _Plain(argparse.RawDescriptionHelpFormatter):
    """Texts as they are written."""


class _WithSettings(_Plain):
    """An epilog names a section, whose settings are told; only help itself imports them."""

    def add_text(self, text: str | None) -> None:
        """Part of the help."""
        from data.config import DownloadConfig, FilterConfig, ScoreConfig
        from gigagan.common.settings import described

        models: dict[str, Any] = {
            "download": DownloadConfig,
            "score": ScoreConfig,
            "filter": FilterConfig,
        }
        super().add_text(described(models[text], text) if text and text in models else text)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
