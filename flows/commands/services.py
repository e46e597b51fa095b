"""`ui`, `bootstrap` and `worker`: what a pipeline runs on."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any, NoReturn

from rich.console import Console

from flows.commands.options import UsageError, add_debug, store_of
from flows.config import PipelineConfig
from flows.serve import settings
from gigagan.common.settings import parse_assignments


def add_parsers(commands: Any) -> None:
    """The commands' options."""
    ui = commands.add_parser("ui", help="open the Prefect and MLflow pages")
    ui.add_argument("--store", help="folder or URL of all outputs (default: runs/store)")
    ui.add_argument("--prefect-port", type=int, help="default: 4200, or a free one")
    ui.add_argument("--mlflow-port", type=int, help="default: 5000, or a free one")
    ui.set_defaults(command=ui_command)

    bootstrap = commands.add_parser(
        "bootstrap",
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

    worker = commands.add_parser("worker", help="run a Prefect worker on this machine")
    worker.set_defaults(command=worker_command)
    for parser in (ui, bootstrap, worker):
        add_debug(parser)


def ui_command(arguments: argparse.Namespace) -> None:
    """Serve both pages until Ctrl-C."""
    from flows.serve import services, ui

    for port in (arguments.prefect_port, arguments.mlflow_port):
        if port is not None and not 0 < port < 65536:
            raise UsageError(f"port {port} is none: give one from 1 to 65535")
        if port and not services.port_is_free(port):
            raise UsageError(f"port {port} is in use: name another, or none to get a free one")
    store = PipelineConfig().override(store_of(arguments)).store_path
    ui.serve(store, Console(), arguments.prefect_port, arguments.mlflow_port)


def bootstrap_command(arguments: argparse.Namespace) -> None:
    """Prepare a Prefect server: the one of PREFECT_API_URL, or the database in runs/."""
    from flows.serve import services

    variables = parse_assignments(arguments.job_variables, "--job-variable")
    with services.prefect_api() as api:
        from flows.serve.bootstrap import bootstrap

        bootstrap(
            arguments.gpu_jobs,
            pool=arguments.pool,
            kind=arguments.type,
            job_variables=variables,
        )
        Console().print(f"{api}: pool, limit, automation and deployments are up to date")


def worker_command(arguments: argparse.Namespace) -> NoReturn:
    """Become a worker of the server that PREFECT_API_URL names, or that runs here."""
    from flows.serve import services

    services.use_running_api()
    # A shell's `&` has us ignore SIGINT, by which Prefect's worker ends itself on SIGTERM.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.execv(sys.executable, [sys.executable, "-m", *services.WORKER])
