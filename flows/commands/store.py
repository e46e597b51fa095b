"""`python -m flows store ls | show | verify | gc | rm`: what housekeeping finds, on a terminal."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from flows import progress
from flows.commands.options import UsageError, add_debug, say, store_of
from flows.config import PipelineConfig, StageName
from gigagan.common.progress import amount

if TYPE_CHECKING:
    from flows.storage.housekeeping import Item, Record, Verdict
    from flows.storage.store import Store

COLOURS = {"complete": "green", "unfinished": "yellow", "in use": "cyan", "damaged": "red"}


def add_parsers(commands: Any) -> None:
    """The command's options."""
    top = commands.add_parser("store", help="list, show, verify or clean up the store")
    actions = top.add_subparsers(required=True, metavar="ACTION")
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument("--store", help="folder or URL of all outputs (default: runs/store)")

    def action(name: str, command: Any, help: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = actions.add_parser(name, parents=[chosen], help=help)
        add_debug(parser)
        parser.set_defaults(command=command)
        return parser

    ls = action("ls", ls_command, "all outputs with their state, size, age and users")
    ls.add_argument("--json", action="store_true", help="as JSON")
    show = action("show", show_command, "manifest, settings, inputs and files of one output")
    show.add_argument("key", help="beginning of a key, or STAGE/KEY")
    verify = action("verify", verify_command, "read every file again; status 1 on damage")
    verify.add_argument("keys", nargs="*", metavar="KEY", help="only these (default: all)")
    gc = action("gc", gc_command, "delete what nothing refers to; without --yes only say what")
    rm = action("rm", rm_command, "delete outputs by name, also those of runs that are forgotten")
    rm.add_argument("keys", nargs="+", metavar="KEY", help="beginning of a key, or STAGE/KEY")
    for parser in (gc, rm):
        parser.add_argument("--yes", action="store_true", help="delete")
    gc.add_argument(
        "--older-than", default="0d", metavar="AGE", help="keep what is younger, as in 12h, 7d, 2w"
    )
    gc.add_argument(
        "--unfinished", action="store_true", help="delete unfinished outputs, too: none resumes"
    )


def ls_command(arguments: argparse.Namespace) -> None:
    """List the outputs."""
    from flows.storage import housekeeping

    found = housekeeping.items(_store(arguments))
    users = housekeeping.used_by(found)
    if arguments.json:
        print(json.dumps([_as_json(item, users[item.name]) for item in found], indent=1))
        return
    numbers = ("size", "age", "users")
    columns = [
        Column(name, no_wrap=True, justify="right" if name in numbers else "left")
        for name in ("stage", "key", "state", "size", "age", "MLflow", "users")
    ]
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), pad_edge=False)  # within 80 columns
    for item in found:
        run = (item.manifest and item.manifest.mlflow_run_id) or ""
        by = f"{len(users[item.name]) or ''}"
        state = f"[{COLOURS[item.state]}]{item.state}[/]"
        age = _age(item.age)
        table.add_row(item.stage, item.key, state, _bytes(item.bytes), age, run[:8], by)
    console = Console()
    console.print(table)
    for item in found:
        if item.note:
            say(console, f"{item.name}: {escape(item.note)}")
    total = _bytes(sum(item.bytes for item in found))
    where = escape(str(_store(arguments)))
    say(console, f"{housekeeping.states(found)}: {total} in {where}")


def show_command(arguments: argparse.Namespace) -> None:
    """Show one output."""
    from flows.storage import housekeeping

    store = _store(arguments)
    found = housekeeping.items(store)
    item = housekeeping.pick(found, arguments.key)
    console = Console()
    where = store.place(item.stage, item.key)
    console.print(f"[bold]{item.name}[/] {item.state} {escape(item.note)}", soft_wrap=True)
    say(console, f"in {escape(str(where))}, {_bytes(item.bytes)}")
    console.print(f"used by: {', '.join(housekeeping.used_by(found)[item.name]) or 'nothing'}")
    if item.manifest is None:
        return
    console.print_json(item.manifest.model_dump_json(exclude={"files"}))
    table = Table("file", Column("bytes", justify="right"), "sha256", box=None)
    for entry in item.manifest.files:
        table.add_row(
            escape(entry.path), f"{entry.size:,}", (entry.sha256 or "by other files")[:16]
        )
    console.print(table)


def verify_command(arguments: argparse.Namespace) -> int:
    """Read every file; 1 when one is damaged."""
    from flows.stages.full_pipeline import STAGES
    from flows.storage import housekeeping

    store, console = _store(arguments), Console()
    found = housekeeping.items(store)
    chosen = [housekeeping.pick(found, key) for key in arguments.keys] or found
    if not chosen:
        say(console, f"nothing to verify in {escape(str(store))}")
    harmed = 0
    with progress.reporting(console) as reporter:
        for item in chosen:

            def show(what: str, done: int, total: int | None, name: str = item.name) -> None:
                reporter.progress(name, what, done, total)

            damage = housekeeping.verify(store, item, show)
            harm = STAGES[StageName(item.stage)].harm
            if harm and item.manifest and not damage:  # files whose digests others of it hold
                place = store.place(item.stage, item.key)
                place.pull(item.manifest, item.manifest.files, show)
                damage = harm(place.folder, show)
            harmed += damage is not None
            text = escape(damage) if damage else "not finished" if not item.manifest else "good"
            mark = "[red]damaged[/]: " if damage else ""
            say(console, f"{item.name}: {mark}{text}")
    return 1 if harmed else 0


def gc_command(arguments: argparse.Namespace) -> int:
    """Delete what nothing refers to, or say what would be; first the list, then what it lists."""
    from flows.record import references
    from flows.storage import housekeeping

    store, console = _store(arguments), Console()
    age = housekeeping.parse_age(arguments.older_than)
    record = references.ask(store.root)
    _say_asked(console, record)
    verdicts = housekeeping.sweep(store, record, older_than=age, unfinished=arguments.unfinished)
    return _delete(store, verdicts, console, arguments.yes)


def rm_command(arguments: argparse.Namespace) -> int:
    """Delete the outputs that are named, but none that is in use or referred to; 1 if one stays."""
    from flows.record import references
    from flows.storage import housekeeping

    store, console = _store(arguments), Console()
    found = housekeeping.items(store)
    named = {housekeeping.pick(found, key).name for key in arguments.keys}
    record = references.ask(store.root, needed=False)
    _say_asked(console, record)
    verdicts = [v for v in housekeeping.sweep(store, record, named=named) if v.item.name in named]
    status = _delete(store, verdicts, console, arguments.yes)
    return 1 if any(verdict.kept for verdict in verdicts) else status


def _say_asked(console: Console, record: Record) -> None:
    asked = f"asked {record.where}, which knows {len(record.runs)} runs"
    say(console, escape(asked))


def _delete(store: Store, verdicts: Sequence[Verdict], console: Console, yes: bool) -> int:
    """Say what goes and what stays, and let it go if told so; 1 when something is in use by now."""
    from flows.stage import BusyError
    from flows.storage import housekeeping

    for verdict in verdicts:
        text = f"{verdict.item.name} {_bytes(verdict.item.bytes)}"
        line = f"kept    {text}: {escape(verdict.kept)}" if verdict.kept else f"would go {text}"
        console.print(line, soft_wrap=True)
    going = [verdict.item for verdict in verdicts if not verdict.kept]
    if not yes:
        console.print(f"[bold]{_bytes(sum(i.bytes for i in going))} to free: add --yes[/]")
        return 0
    freed, refused = 0, 0
    for item in going:
        try:
            housekeeping.delete(store, item)
            freed += item.bytes
            console.print(f"deleted {item.name}", soft_wrap=True)
        except BusyError as error:
            refused += 1
            console.print(f"kept    {item.name}: {escape(str(error))}", soft_wrap=True)
    console.print(f"[bold]{_bytes(freed)} freed[/]")
    return 1 if refused else 0


def _store(arguments: argparse.Namespace) -> Store:
    from flows.storage.store import Store

    given = store_of(arguments)
    store = Store.of(PipelineConfig().override(given))
    if given and not store.remote and not store.root.is_dir():
        raise UsageError(f"--store {arguments.store!r}: there is no such folder")
    return store


def _as_json(item: Item, users: list[str]) -> dict[str, Any]:
    run = item.manifest.mlflow_run_id if item.manifest else None
    return {
        "stage": item.stage,
        "key": item.manifest.key if item.manifest else item.key,
        "state": item.state,
        "note": item.note,
        "bytes": item.bytes,
        "changed": item.changed.isoformat(),
        "mlflow_run_id": run,
        "used_by": users,
    }


def _bytes(count: int) -> str:
    return amount(count, is_bytes=True)


def _age(age: timedelta) -> str:
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if age.total_seconds() >= seconds:
            return f"{age.total_seconds() / seconds:.0f} {unit}"
    return f"{age.total_seconds():.0f} s"
