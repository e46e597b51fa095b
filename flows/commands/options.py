"""What several commands share: the options that choose settings, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
from rich.console import Console

from flows.config import USUAL, PipelineConfig, StageName
from gigagan.common.settings import parse_assignments

DEFAULT_PRESET = "demo"


class UsageError(Exception):
    """The command line asks for something that is not there."""


def say(console: Console, markup: str) -> None:
    """Print text as it is: no line is broken, and no number coloured."""
    console.print(markup, soft_wrap=True, highlight=False)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """The option that every command has."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks and Prefect's log")


def add_record(parser: argparse.ArgumentParser) -> None:
    """Options that say which record is meant."""
    parser.add_argument(
        "--preset", default=DEFAULT_PRESET, help="the one that was run (default: demo)"
    )
    parser.add_argument("--store", help="folder or URL of all outputs (default: the preset's)")


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Options that choose settings and stages."""
    parser.add_argument(
        "--preset", default=DEFAULT_PRESET, help="settings to start from (default: demo)"
    )
    parser.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, as in --set filter.min_similarity=0.2; may be repeated",
    )
    parser.add_argument("--store", help="folder or URL of all outputs (default: the preset's)")
    parser.add_argument(
        "--stages", nargs="+", metavar="STAGE", help="run only these; their inputs must be there"
    )
    parser.add_argument(
        "--force", nargs="+", default=[], metavar="STAGE", help="discard the output of these first"
    )
    parser.add_argument(
        "--upstream",
        action="append",
        default=[],
        metavar="STAGE=WHERE",
        help="let this output stand for a stage: a key, an MLflow run, a folder or URL",
    )


def configured(arguments: argparse.Namespace) -> PipelineConfig:
    """The preset with the changes of the command line."""
    return PipelineConfig.preset(arguments.preset).override(overrides_of(arguments))


def overrides_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The changes of the command line; a store is relative to where it was typed."""
    return {**parse_assignments(arguments.assignments), **store_of(arguments)}


def recorded(arguments: argparse.Namespace) -> PipelineConfig:
    """The configuration whose record is meant; a folder is relative to where it was typed."""
    return PipelineConfig.preset(arguments.preset).override(store_of(arguments))


def store_of(arguments: argparse.Namespace) -> dict[str, str]:
    """What `--store` changes."""
    return {} if arguments.store is None else {"store": located(arguments.store)}


def located(store: str) -> str:
    """A store as typed: a URL, or a folder relative to where it was typed.

    Raises:
        UsageError: it is neither, or a file lies where its folder would.
    """
    scheme, sign, rest = store.partition("://")
    if sign and scheme != "file":
        known = "::" in scheme or scheme in fsspec.available_protocols()
        if not known or not rest.strip("/"):
            raise UsageError(f"--store {store!r}: give a folder, or a URL such as s3://bucket/name")
        return store
    typed = rest if sign else store
    if not typed.strip():
        raise UsageError(f"--store {store!r}: give a folder, or a URL such as s3://bucket/name")
    try:
        path = Path(typed).expanduser().absolute()
    except RuntimeError as error:
        raise UsageError(f"--store {store!r}: there is no such user's home") from error
    above = next(above for above in (path, *path.parents) if above.exists())
    if not above.is_dir():
        raise UsageError(f"--store {store!r}: {above} is a file: give a folder")
    return str(path)


def deployment_of(preset: str) -> str:
    """Name of the full pipeline's deployment with that preset."""
    return "full-pipeline" if preset == DEFAULT_PRESET else preset


def named_stages(names: Sequence[str] | None) -> list[StageName]:
    """Stages by name, in the pipeline's order; all the usual ones when none is named."""
    unknown = [name for name in names or () if name not in list(StageName)]
    if unknown:
        raise UsageError(f"unknown stage {unknown[0]!r}: the stages are {', '.join(StageName)}")
    return [stage for stage in StageName if stage in (USUAL if names is None else names)]
