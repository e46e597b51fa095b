"""`compare` and `champion`: what MLflow and its registry say."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from flows.commands.options import UsageError, add_debug, add_record, named_stages, recorded
from flows.config import PipelineConfig, presets

if TYPE_CHECKING:
    from flows.record.registry import Registry


def add_parsers(commands: Any) -> None:
    """The commands' options."""
    compare = commands.add_parser("compare", help="show runs side by side in MLflow's page")
    compare.add_argument("stage", nargs="?", help="its runs (default: runs of the whole pipeline)")
    compare.add_argument("--no-open", action="store_true", help="print the page, open no browser")
    compare.set_defaults(command=compare_command)

    champion = commands.add_parser(
        "champion", help="show, set or roll back the best evaluated model"
    )
    champion.add_argument("action", nargs="?", choices=["show", "set", "rollback"], default="show")
    champion.add_argument("version", nargs="?", help="for set: the version that becomes champion")
    champion.set_defaults(command=champion_command)
    for parser in (compare, champion):
        add_debug(parser)
        add_record(parser)


def compare_command(arguments: argparse.Namespace) -> None:
    """Show the page that compares runs; serve it until Ctrl-C where none is served."""
    from flows.record import compare, references

    stage = named_stages([arguments.stage])[0] if arguments.stage else None
    config = recorded(arguments)
    references.known(config.store_path)
    compare.compare(config, stage, Console(), browse=not arguments.no_open and sys.stdout.isatty())


def champion_command(arguments: argparse.Namespace) -> None:
    """Show the registered versions, or move the title between them."""
    from flows.record import references
    from flows.record.registry import Registry
    from flows.record.tracking import Tracker

    config = recorded(arguments)
    if (arguments.action == "set") != bool(arguments.version):
        raise UsageError("write `champion set VERSION`, `champion rollback` or `champion`")
    where = references.known(config.store_path)
    registry = Registry(Tracker(config.name, config.store_path).client, config.name)
    if not registry.versions():
        raise UsageError(f"{where} has no version of {config.name}: {_elsewhere(registry)}")
    console = Console()
    if arguments.action == "set":
        console.print(registry.choose(arguments.version))
    elif arguments.action == "rollback":
        console.print(registry.roll_back())
    else:
        _show_versions(console, registry)


def _elsewhere(registry: Registry) -> str:
    """Which registered models there are instead, and the options that name them."""
    names = {PipelineConfig.preset(preset).name: preset for preset in reversed(presets())}
    there = [
        f"{name} (--preset {names[name]})" if name in names else name
        for name in registry.others()
        if name != registry.name
    ]
    if not there:
        return "an evaluation registers one (--store names another store)"
    return f"there are versions of {', '.join(there)}"


def _show_versions(console: Console, registry: Registry) -> None:
    from flows.record.registry import score_under

    champion = registry.champion()
    names = ("version", "", "decides", "protocol", "evaluated", "note")
    columns = [Column(name, overflow="fold") for name in names]
    title = f"{registry.name} in the registry"
    table = Table(*columns, title=title, title_justify="left", box=None)
    for version in registry.versions():
        title = "champion" if champion and version.version == champion.version else ""
        note = version.tags.get("champion.withdrawn") or version.tags.get("champion.reason", "")
        protocol = version.tags.get("protocol", "")
        score = score_under(version, protocol)
        run = version.tags.get("evaluation.run_id", "")
        shown = f"{score.metric} {score.value:.4g}"
        protocol = escape(protocol)
        table.add_row(f"{version.version}", title, shown, protocol, run[:8], escape(note))
    console.print(table)
