"""The command line: `python -m flows run | submit | ui | bootstrap | worker | presets`."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows import progress, settings, store_command
from flows.config import PRESETS, PipelineConfig, StageName, parse_assignments, presets

if TYPE_CHECKING:
    from flows.registry import Registry
    from flows.stage import StageOutput

DEFAULT_PRESET = "demo"
INTERRUPTED = 130


class UsageError(Exception):
    """The command line asks for something that is not there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a known failure becomes one message and a status."""
    arguments = parser().parse_args(argv)
    settings.apply()
    console = Console(stderr=True)
    try:
        return int(arguments.command(arguments) or 0)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on where it stopped")
        return INTERRUPTED
    except Exception as error:
        if arguments.debug:
            raise
        console.print(f"[red]error:[/] {escape(explain(error))}", highlight=False, soft_wrap=True)
        return 1


def explain(error: Exception) -> str:
    """One clear message for an error, with what to do about it."""
    if isinstance(error, ModuleNotFoundError) and error.name is None:
        return str(error)  # one of ours: it knows the package
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the package of module {error.name!r} is not installed: `make demo` installs "
            "everything, or use `pip install --no-deps -r requirements.lock`"
        )
    if full := next((e for e in _causes(error) if _is_full_disk(e)), None):
        name = getattr(full, "filename", None)
        where = f" for {name}" if name else ""
        return f"no space left on the disk{where}: make room, then run the same command again"
    text = str(error)
    if isinstance(error, (RuntimeError, ValueError, UsageError)) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The innermost first: what is said last may be a consequence (a status not written)."""
    if error is not None:
        yield from _causes(error.__cause__ or error.__context__)
        yield error


def _is_full_disk(error: BaseException) -> bool:
    is_sqlite = "database or disk is full" in str(error)
    return is_sqlite or (isinstance(error, OSError) and error.errno == errno.ENOSPC)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks and Prefect's log")
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument(
        "--preset", default=DEFAULT_PRESET, help="settings to start from (default: demo)"
    )
    chosen.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, as in --set filter.min_similarity=0.2; may be repeated",
    )
    chosen.add_argument("--store", help="folder of all outputs (default: the preset's)")
    chosen.add_argument(
        "--stages", nargs="+", metavar="STAGE", help="run only these; their inputs must be there"
    )
    chosen.add_argument(
        "--force", nargs="+", default=[], metavar="STAGE", help="discard the output of these first"
    )

    chosen.add_argument(
        "--upstream",
        action="append",
        default=[],
        metavar="STAGE=WHERE",
        help="let this output stand for a stage: a key, an MLflow run, a folder or URL",
    )

    top = argparse.ArgumentParser(
        prog="python -m flows",
        description="Download, score, filter, train, upsample, evaluate: one pipeline.",
        epilog=f"Stages: {', '.join(StageName)}.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", parents=[common, chosen], help="run the pipeline in this process"
    )
    run.add_argument("--dry-run", action="store_true", help="show settings and plan, then stop")
    run.set_defaults(command=run_command)

    submit = commands.add_parser(
        "submit", parents=[common, chosen], help="run a deployment on a Prefect worker and watch it"
    )
    submit.set_defaults(command=submit_command)

    ui = commands.add_parser("ui", parents=[common], help="open the Prefect and MLflow pages")
    ui.add_argument("--store", help="folder of all outputs (default: runs/store)")
    ui.add_argument("--prefect-port", type=int, help="default: 4200, or a free one")
    ui.add_argument("--mlflow-port", type=int, help="default: 5000, or a free one")
    ui.set_defaults(command=ui_command)

    bootstrap = commands.add_parser(
        "bootstrap",
        parents=[common],
        help="create pool, limit, automation and deployments on a Prefect server",
    )
    bootstrap.add_argument(
        "--gpu-jobs", type=int, help="GPU stages at a time (default: what the server has, or 1)"
    )
    bootstrap.add_argument("--pool", default=settings.POOL, help="work pool (default: local)")
    bootstrap.add_argument(
        "--type",
        choices=["process", "kubernetes"],
        default="process",
        help="how workers of the pool start flows (default: as processes)",
    )
    bootstrap.add_argument(
        "--job-variable",
        dest="job_variables",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the pool's job template, for all deployments, as in image=REGISTRY/IMAGE:TAG",
    )
    bootstrap.set_defaults(command=bootstrap_command)

    worker = commands.add_parser(
        "worker", parents=[common], help="run a Prefect worker on this machine"
    )
    worker.set_defaults(command=worker_command)

    compare = commands.add_parser(
        "compare", parents=[common], help="show runs side by side in MLflow's page"
    )
    compare.add_argument("stage", nargs="?", help="its runs (default: runs of the whole pipeline)")
    compare.add_argument("--no-open", action="store_true", help="print the page, open no browser")
    _add_record(compare)
    compare.set_defaults(command=compare_command)

    champion = commands.add_parser(
        "champion", parents=[common], help="show, set or roll back the best evaluated model"
    )
    champion.add_argument("action", nargs="?", choices=["show", "set", "rollback"], default="show")
    champion.add_argument("version", nargs="?", help="for set: the version that becomes champion")
    _add_record(champion)
    champion.set_defaults(command=champion_command)

    store_command.add_parser(commands, [common])

    render = commands.add_parser(
        "render", parents=[common, chosen], help="print what a stage would start, and start nothing"
    )
    render.add_argument("stage", metavar="STAGE", help="train-base, train-upsampler or evaluate")
    render.set_defaults(command=render_command)

    listing = commands.add_parser("presets", parents=[common], help="list the presets")
    listing.set_defaults(command=presets_command)
    return top


def _add_record(parser: argparse.ArgumentParser) -> None:
    """Options that say which record is meant."""
    parser.add_argument(
        "--preset", default=DEFAULT_PRESET, help="the one that was run (default: demo)"
    )
    parser.add_argument("--store", help="folder or URL of all outputs (default: the preset's)")


def configured(arguments: argparse.Namespace) -> PipelineConfig:
    """The preset with the changes of the command line."""
    return PipelineConfig.preset(arguments.preset).override(overrides_of(arguments))


def overrides_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The changes of the command line; a store is relative to where it was typed."""
    overrides = parse_assignments(arguments.assignments)
    if arguments.store:
        overrides["store"] = store_command.located(arguments.store)
    return overrides


def deployment_of(preset: str) -> str:
    """Name of the full pipeline's deployment with that preset."""
    return "full-pipeline" if preset == DEFAULT_PRESET else preset


def named_stages(names: Sequence[str] | None) -> list[StageName]:
    """Stages by name, in the pipeline's order; all when none is named."""
    unknown = [name for name in names or () if name not in list(StageName)]
    if unknown:
        raise UsageError(f"unknown stage {unknown[0]!r}: the stages are {', '.join(StageName)}")
    return [stage for stage in StageName if names is None or stage in names]


def run_command(arguments: argparse.Namespace) -> None:
    """Run the pipeline here, with a Prefect server for as long as it takes."""
    config = configured(arguments)
    stages, force = named_stages(arguments.stages), named_stages(arguments.force)
    if not arguments.debug:
        settings.quiet()
    if arguments.dry_run:
        _show_plan(config, stages, force, arguments.upstream)
        return
    from flows import services, upstream
    from flows.store import Store

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
    from flows import services, upstream

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


def ui_command(arguments: argparse.Namespace) -> None:
    """Serve both pages until Ctrl-C."""
    from flows import services, ui

    for port in (arguments.prefect_port, arguments.mlflow_port):
        if port and not services.port_is_free(port):
            raise UsageError(f"port {port} is in use: name another, or none to get a free one")
    store = Path(arguments.store).absolute() if arguments.store else PipelineConfig().store_path
    ui.serve(store, Console(), arguments.prefect_port, arguments.mlflow_port)


def bootstrap_command(arguments: argparse.Namespace) -> None:
    """Prepare a Prefect server: the one of PREFECT_API_URL, or the database in runs/."""
    from flows import services

    with services.prefect_api() as api:
        from flows.bootstrap import bootstrap

        bootstrap(
            arguments.gpu_jobs,
            pool=arguments.pool,
            kind=arguments.type,
            job_variables=parse_assignments(arguments.job_variables, "--job-variable"),
        )
        Console().print(f"{api}: pool, limit, automation and deployments are up to date")


def worker_command(arguments: argparse.Namespace) -> NoReturn:
    """Become a worker of the server that PREFECT_API_URL names, or that runs here."""
    from flows import services

    services.use_running_api()
    os.execv(sys.executable, [sys.executable, "-m", *services.WORKER])


def compare_command(arguments: argparse.Namespace) -> None:
    """Show the page that compares runs; serve it until Ctrl-C where none is served."""
    from flows import compare

    stage = named_stages([arguments.stage])[0] if arguments.stage else None
    config = _recorded(arguments)
    compare.compare(config, stage, Console(), browse=not arguments.no_open and sys.stdout.isatty())


def champion_command(arguments: argparse.Namespace) -> None:
    """Show the registered versions, or move the title between them."""
    from flows.registry import Registry
    from flows.tracking import Tracker

    config = _recorded(arguments)
    if (arguments.action == "set") != bool(arguments.version):
        raise UsageError("write `champion set VERSION`, `champion rollback` or `champion`")
    registry = Registry(Tracker(config.name, config.store_path).client, config.name)
    console = Console()
    if arguments.action == "set":
        console.print(registry.choose(arguments.version))
    elif arguments.action == "rollback":
        console.print(registry.roll_back())
    else:
        _show_versions(console, registry)


def _show_versions(console: Console, registry: Registry) -> None:
    from flows.registry import score_under

    champion = registry.champion()
    table = Table(title=f"{registry.name} in the registry", title_justify="left", box=None)
    for column in ("version", "", "decides", "protocol", "evaluated", "note"):
        table.add_column(column, overflow="fold")
    for version in registry.versions():
        title = "champion" if champion and version.version == champion.version else ""
        note = version.tags.get("champion.withdrawn") or version.tags.get("champion.reason", "")
        protocol = version.tags.get("protocol", "")
        score = score_under(version, protocol)
        run = version.tags.get("evaluation.run_id", "")
        shown = f"{score.metric} {score.value:.4g}"
        table.add_row(f"{version.version}", title, shown, protocol, run[:8], escape(note))
    console.print(table)


def _recorded(arguments: argparse.Namespace) -> PipelineConfig:
    """The configuration whose record is meant; a folder is relative to where it was typed."""
    store = arguments.store
    if store and "://" not in store:
        store = str(Path(store).absolute())
    return PipelineConfig.preset(arguments.preset).override({"store": store} if store else {})


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
    from flows.upstream import parse

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
    from flows.tracking import Tracker

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


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
