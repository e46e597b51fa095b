"""`run`, `submit`, `render` and `presets`: the pipeline itself."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows import progress, settings
from flows.commands.options import (
    add_choice,
    add_debug,
    configured,
    deployment_of,
    named_stages,
    overrides_of,
)
from flows.config import PRESETS, PipelineConfig, StageName, presets

if TYPE_CHECKING:
    from flows.stage import StageOutput


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
    from flows import services
    from flows.storage import upstream
    from flows.storage.store import Store

    Store.of(config).prepare()
    named = upstream.parse(arguments.upstream)
    console = Console()
    with services.prefect_api():
        from prefect.logging.handlers import APILogHandler

        from flows.full_pipeline import full_pipeline

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
    from flows import services
    from flows.storage import upstream

    parameters["upstream"] = upstream.parse(arguments.upstream)

    with services.prefect_api():
        from flows.bootstrap import bootstrap, has_worker

        print(f"Prefect page: {os.environ['PREFECT_UI_URL']}", flush=True)
        bootstrap()
        with nullcontext() if has_worker() else services.running("worker", services.WORKER):
            run = [
                "prefect",
                "deployment",
                "run",
                f"full-pipeline/{deployment_of(arguments.preset)}",
            ]
            run += ["--watch", "--params", json.dumps(parameters)]
            return subprocess.run([sys.executable, "-m", *run], check=False).returncode


def render_command(arguments: argparse.Namespace) -> None:
    """Print a stage's command line, batch script or manifest."""
    from flows.render import rendered

    (stage,) = named_stages([arguments.stage])
    print(rendered(stage, configured(arguments)))


def presets_command(arguments: argparse.Namespace) -> None:
    """List the presets with the first line of each file."""
    table = Table(box=None)
    for column in ("preset", "deployment", "what it is"):
        table.add_column(column)
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
    from flows.full_pipeline import plan
    from flows.storage.upstream import parse

    console = Console()
    console.print_json(config.model_dump_json())
    table = Table(
        title=f"Plan in {config.store_url or config.store_path}", title_justify="left", box=None
    )
    for column in ("stage", "action", "key", "why"):
        table.add_column(column, overflow="fold")
    for step in plan(config, stages, force, parse(upstream)):
        table.add_row(step.stage, step.action, (step.key or "")[:16], escape(step.reason))
    console.print(table)


def _show_results(
    console: Console,
    config: PipelineConfig,
    outputs: Mapping[str, StageOutput],
    endings: Sequence[progress.Ending],
) -> None:
    from flows.record.tracking import Tracker

    table = Table(title="Stages", title_justify="left", box=None)
    for column in ("stage", "state", "time", "figures"):
        table.add_column(column)
    for ending in endings:
        metrics = outputs[ending.stage].metrics
        time = progress.clock(ending.seconds)
        table.add_row(ending.stage, ending.state, time, progress.figures(metrics))
    console.print(table)
    results = outputs["evaluate"].path / "results.json" if "evaluate" in outputs else None
    if results is not None and results.is_file():
        from gigagan.evaluation import report

        console.print(f"\n[bold]Result[/] ({results})", soft_wrap=True, highlight=False)
        text = report.table(json.loads(results.read_text()))
        console.print(escape(text), soft_wrap=True, highlight=False)
    if shown := [path for output in outputs.values() for path in pictures(output.path)]:
        console.print("\n[bold]Pictures and reports[/]")
    for path in shown:
        console.print(f"  {path}", soft_wrap=True, highlight=False)
    page = Tracker(config.name, config.store_path).compare_url()
    console.print(
        "\n[bold]Pages[/] (both from `make ui`)\n"
        f"  Prefect  {os.environ.get('PREFECT_UI_URL', 'http://127.0.0.1:4200')}/runs\n"
        f"  MLflow   {page}",
        soft_wrap=True,
        highlight=False,
    )


def pictures(folder: Path) -> list[Path]:
    """What a person would open: pictures and reports at the top, and the newest sample grid."""
    top = [path for path in sorted(folder.iterdir()) if path.suffix in (".png", ".html")]
    samples = sorted(folder.glob("samples/*.png"), key=lambda path: path.stat().st_mtime)
    return top + samples[-1:]
