"""`run`, `submit`, `render` and `presets`: the pipeline itself."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from flows import progress
from flows.commands.options import (
    UsageError,
    add_choice,
    add_debug,
    configured,
    deployment_of,
    named_stages,
    overrides_of,
    say,
)
from flows.config import PRESETS, PipelineConfig, StageName, presets
from flows.serve import settings
from gigagan.common.progress import clock

if TYPE_CHECKING:
    from flows.stage import StageOutput

STARTING = "starting Prefect, or finding it: seconds, a minute where its database is new …"


def add_parsers(commands: Any) -> None:
    """The commands' options."""
    run = commands.add_parser("run", help="run the pipeline in this process")
    run.add_argument("--dry-run", action="store_true", help="show settings and plan, then stop")
    submit = commands.add_parser("submit", help="run a deployment on a Prefect worker and watch it")
    render = commands.add_parser("render", help="print what a stage would start, and start nothing")
    render.add_argument("stage", metavar="STAGE", help="train-base, train-upsampler or evaluate")
    listing = commands.add_parser("presets", help="list the presets")
    add_debug(listing)
    listing.set_defaults(command=presets_command)
    for parser, command in (
        (run, run_command),
        (submit, submit_command),
        (render, render_command),
    ):
        add_debug(parser)
        add_choice(parser)
        parser.set_defaults(command=command)


def run_command(arguments: argparse.Namespace) -> None:
    """Run the pipeline here, with a Prefect server for as long as it takes."""
    config = configured(arguments)
    stages, force = named_stages(arguments.stages), named_stages(arguments.force)
    if not arguments.debug:
        settings.quiet()
    if arguments.dry_run:
        _show_plan(config, stages, force, arguments.upstream)
        return
    from flows.record import relocation
    from flows.record.tracking import tracking_uri
    from flows.serve import services
    from flows.stages.outside import lacking
    from flows.storage import upstream
    from flows.storage.store import Store

    store = Store.of(config)
    store.prepare()
    named = upstream.parse(arguments.upstream)
    for stage in stages:
        # What the store has an output of may be up to date: the run itself looks.
        if stage not in named and not store.keys(stage) and (lacks := lacking(config, stage)):
            raise UsageError("; ".join(lacks))
    relocation.relocate(tracking_uri(store.root), store.root)
    console = Console()
    console.print(STARTING)
    with services.prefect_api():
        from prefect.logging.handlers import APILogHandler

        from flows.stages.full_pipeline import full_pipeline

        console.print(f"Prefect page while this runs: {os.environ['PREFECT_UI_URL']}")
        with progress.reporting(console) as reporter:
            try:
                outputs = full_pipeline(stages=stages, force=force, upstream=named, config=config)
            finally:
                APILogHandler().flush()  # while the server is there
    _show_results(console, config, outputs, reporter.endings)


def submit_command(arguments: argparse.Namespace) -> int:
    """Run a deployment on a worker, starting what is missing; its end is our exit status."""
    configured(arguments)  # refuse now what the run would refuse
    parameters = {
        "overrides": overrides_of(arguments),
        "stages": named_stages(arguments.stages),
        "force": named_stages(arguments.force),
    }
    from flows.serve import services
    from flows.storage import upstream

    parameters["upstream"] = upstream.parse(arguments.upstream)
    console = Console()
    console.print(STARTING)
    with services.prefect_api():
        from flows.commands.watch import watch
        from flows.serve.bootstrap import bootstrap, has_worker, start_run

        console.print(f"Prefect page: {os.environ['PREFECT_UI_URL']}")
        console.print("registering the deployments of all presets: it may take a minute or two …")
        bootstrap()
        is_there = has_worker()
        if not is_there:
            console.print("starting a worker for as long as this command runs …")
        with nullcontext() if is_there else services.running("worker", services.WORKER):
            deployment = f"full-pipeline/{deployment_of(arguments.preset)}"
            run = start_run(deployment, parameters)
            page = f"{os.environ['PREFECT_UI_URL']}/runs/flow-run/{run.id}"
            console.print(f"run {run.name} of {deployment}: {page}", soft_wrap=True)
            return 0 if watch(run.id, console).is_completed() else 1


def render_command(arguments: argparse.Namespace) -> None:
    """Print a stage's command line, batch script or manifest."""
    from flows.commands.render import rendered

    (stage,) = named_stages([arguments.stage])
    print(rendered(stage, configured(arguments)))


def presets_command(arguments: argparse.Namespace) -> None:
    """List the presets with the first line of each file."""
    table = Table("preset", "deployment", "what it is", box=None)
    for name in presets():
        summary = (PRESETS / f"{name}.yaml").read_text().partition("\n")[0].lstrip("# ")
        table.add_row(name, f"full-pipeline/{deployment_of(name)}", escape(summary))
    Console().print(table)


def _show_plan(
    config: PipelineConfig,
    stages: Sequence[StageName],
    force: Sequence[StageName],
    upstream: Sequence[str],
) -> None:
    from flows.stages.full_pipeline import plan
    from flows.stages.outside import weights
    from flows.storage.upstream import parse

    console = Console()
    console.print_json(config.model_dump_json())
    columns = [Column(name, overflow="fold") for name in ("stage", "action", "key", "why")]
    title = escape(f"Plan in {config.store_url or config.store_path}")
    table = Table(*columns, title=title, title_justify="left", box=None)
    steps = plan(config, stages, force, parse(upstream))
    for step in steps:
        table.add_row(step.stage, step.action, (step.key or "")[:16], escape(step.reason))
    console.print(table)
    for step in steps:
        absent = weights(config, StageName(step.stage)) if step.action != "skip" else []
        for text in (*step.lacks, *absent):
            say(console, f"[red]missing[/] for {step.stage}: {escape(text)}")


def _show_results(
    console: Console,
    config: PipelineConfig,
    outputs: Mapping[str, StageOutput],
    endings: Sequence[progress.Ending],
) -> None:
    from flows.record.compare import shows
    from flows.record.tracking import LOCAL_UI, Tracker

    columns = ("stage", "state", "time", "figures")
    table = Table(*columns, title="Stages", title_justify="left", box=None)
    for ending in endings:
        metrics = outputs[ending.stage].metrics
        time = clock(ending.seconds)
        table.add_row(ending.stage, ending.state, time, progress.figures(metrics))
    console.print(table)
    results = outputs["evaluate"].path / "results.json" if "evaluate" in outputs else None
    if results is not None and results.is_file():
        from gigagan.evaluation.report.results import table as figures

        say(console, f"\n[bold]Result[/] ({escape(str(results))})")
        say(console, escape(figures(json.loads(results.read_text()))))
    if shown := [path for output in outputs.values() for path in pictures(output.path)]:
        console.print("\n[bold]Pictures and reports[/]")
    for path in shown:
        say(console, f"  {escape(str(path))}")
    tracker = Tracker(config.name, config.store_path)
    is_open = tracker.is_server or shows(LOCAL_UI, tracker)
    opens, prefect = f"{ui_of(config)} opens it", os.environ.get("PREFECT_UI_URL")
    pages = {
        "Prefect": f"{prefect}/runs" if prefect else opens,
        "MLflow": tracker.compare_url() if is_open else opens,
    }
    console.print("\n[bold]Pages[/]")
    for name, page in pages.items():
        say(console, f"  {name:8} {escape(page)}")


def ui_of(config: PipelineConfig) -> str:
    """The command that opens the pages of a store."""
    is_default = config.store_path == PipelineConfig().store_path
    store = shlex.quote(config.store_url or str(config.store_path))
    named = "" if is_default else f" --store {store}"
    return f"`python -m flows ui{named}`"


def pictures(folder: Path) -> list[Path]:
    """What a person would open: pictures and reports at the top, and the newest sample grid."""
    top = [path for path in sorted(folder.iterdir()) if path.suffix in (".png", ".html")]
    samples = sorted(folder.glob("samples/*.png"), key=lambda path: path.stat().st_mtime)
    return top + samples[-1:]
