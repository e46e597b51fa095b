"""A real installation to break: Prefect server and worker as processes, and a small real store."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.states import Cancelling

from flows.safety.slots import GPU_LIMIT
from flows.serve import services, settings
from tests.flows.conftest import (  # noqa: F401  # fixtures
    postgres,
    prefect_server,
    s3_server,
    wait_for,
)
from tests.once import made_once, prefect_home

MARKER = "OPERATIONS_TEST"
"""Environment variable of all processes of an installation."""
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
SMALL = {"download.embedded.max_concepts": 24, "download.embedded.heldout_pictures": 8}
TINY = {
    **SMALL,
    "train_base.total_images": 192,
    "train_base.checkpoint_images": 32,
    "train_base.log_images": 32,
    "train_base.sample_images": 192,
    "train_base.num_probe_captions": 4,
    "train_base.loss.vision": 0,
    "train_base.loss.contrastive": 0,
    "resources.train_base.backend": "inline",
}
"""Some ten seconds of training in one process, with six checkpoints."""
LOGGED = [32, 64, 96, 128, 160, 192]
"""Its lines of metrics."""


@dataclasses.dataclass
class Installation:
    """A Prefect server with a database, a port and a worker of its own."""

    folder: Path
    extra: dict[str, str] = dataclasses.field(default_factory=dict)
    port: int = dataclasses.field(default_factory=services.free_port)
    marker: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    server: subprocess.Popen | None = None
    worker: subprocess.Popen | None = None

    def __post_init__(self) -> None:
        prefect_home(self.folder / "prefect")

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def environment(self) -> dict[str, str]:
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))},
            **settings.DEFAULTS,
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_SERVICES_REPOSSESSOR_LOOP_SECONDS": "2",
            "PREFECT_SERVER_CONCURRENCY_MAXIMUM_CONCURRENCY_SLOT_WAIT_SECONDS": "2",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PIPELINE_GPU_LEASE_S": "60",
            "OMP_NUM_THREADS": "1",
            MARKER: self.marker,
            **self.extra,
        }

    def start(self) -> None:
        """Server, definitions, worker."""
        self.start_server()
        code = (  # of 35 deployments those that are started here
            "from flows.serve import bootstrap\n"
            "every = bootstrap.deployments()\n"
            "of_smoke = [one for one in every if one['name'] == 'smoke']\n"
            "bootstrap.deployments = lambda: of_smoke\n"
            "bootstrap.bootstrap(zombie_after_s=40)"
        )
        subprocess.run([sys.executable, "-c", code], env=self.environment, check=True)
        self.start_worker()

    def start_server(self) -> None:
        module = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        self.server = self.popen(*module, log="server.log")
        wait_for(lambda: services.answers(f"{self.api}/health"), 120)

    def start_worker(self) -> None:
        self.worker = self.popen(*services.WORKER, log="worker.log")

    def popen(self, *module: str, log: str) -> subprocess.Popen:
        with (self.folder / log).open("a") as file:
            return subprocess.Popen(
                [sys.executable, "-m", *module],
                env=self.environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def command(self, *module: str) -> subprocess.CompletedProcess:
        """Run a module to its end, as a user would."""
        return subprocess.run(
            [sys.executable, "-m", *module],
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )

    def stop(self) -> None:
        """End everything that carries the marker."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for service in (self.server, self.worker):
            if service is not None:
                service.wait()

    @property
    def client(self) -> SyncPrefectClient:
        auth = self.extra.get("PREFECT_API_AUTH_STRING")
        return SyncPrefectClient(self.api, auth_string=auth)

    def submit(self, deployment: str, store: Path, **parameters) -> uuid.UUID:
        """Start a run of a deployment, as the page does."""
        overrides = {**TINY, "store": str(store), **parameters.pop("overrides", {})}
        parameters["overrides"] = overrides
        with self.client as client:
            found = client.read_deployment_by_name(deployment)
            run = client.create_flow_run_from_deployment(found.id, parameters=parameters)
        return run.id

    def cancel(self, run: uuid.UUID) -> None:
        """Press `Cancel`."""
        with self.client as client:
            client.set_flow_run_state(run, Cancelling())

    def retry(self, run: uuid.UUID) -> None:
        """`prefect flow-run retry`."""
        self.command("prefect", "flow-run", "retry", str(run))

    def state(self, run: uuid.UUID):
        with self.client as client:
            return client.read_flow_run(run).state

    def wait(self, run: uuid.UUID, kind: str, seconds: float = 240, past: tuple[str, ...] = ()):
        """Its state once that is of this type; another end is a failure, with the run's log.

        States in `past` may pass by before.
        """

        def ended():
            state = self.state(run)
            if state.type.value == kind:
                return state
            assert state.type.value not in {*ENDED} - {*past}, f"{state!r}\n{self.log(run)}"
            return None

        return wait_for(ended, seconds, 1.0)

    def wait_for_checkpoint(self, run: uuid.UUID, store: Path) -> None:
        """Training has a checkpoint that it did not have, and goes on."""
        known = checkpoints(store)
        for _ in range(120):
            with contextlib.suppress(AssertionError):
                wait_for(lambda: checkpoints(store) - known, 2, 0.1)
                return
            state = self.state(run)
            assert state.type.value not in ENDED, f"{state!r}\n{self.log(run)}"
        pytest.fail(f"no checkpoint\n{self.log(run)}")

    def log(self, run: uuid.UUID) -> str:
        """What the page shows below the run."""
        with self.client as client:
            lines = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])))
        return "\n".join(line.message for line in lines)

    def children(self, run: uuid.UUID) -> list:
        """Runs of stages below a pipeline's."""
        below = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run]))
        with self.client as client:
            return client.read_flow_runs(flow_run_filter=below)

    def slots(self) -> int:
        """Taken slots of the `gpu` limit."""
        with self.client as client:
            return client.read_global_concurrency_limit_by_name(GPU_LIMIT).active_slots

    def processes(self, *words: str, run: uuid.UUID | None = None) -> list[psutil.Process]:
        """Processes of this installation with these words in their command, of this flow run."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                line = " ".join(process.cmdline())
                if (
                    environment.get(MARKER) == self.marker
                    and all(word in line for word in words)
                    and run in (None, _flow_run(environment))
                ):
                    found.append(process)
        return found

    def flow_process(self, run: uuid.UUID) -> psutil.Process:
        """The process that runs a flow."""
        (process,) = self.processes("prefect", "engine", run=run)
        return process

    def training_process(self) -> psutil.Process:
        (process,) = self.processes("gigagan.training")
        return process

    def left_behind(self) -> list[str]:
        """Processes of ours that are neither the server nor the worker."""
        services_ = [p for p in (self.server, self.worker) if p and p.poll() is None]
        known = {process.pid for process in services_}
        for service in services_:
            known |= {child.pid for child in psutil.Process(service.pid).children(recursive=True)}
        others = [process for process in self.processes() if process.pid not in known]
        others += self.processes("gigagan.training") + self.processes("engine")
        found = []
        for process in others:
            with contextlib.suppress(psutil.Error):
                found.append(" ".join(process.cmdline()))
        return found


def _flow_run(environment: dict[str, str]) -> uuid.UUID | None:
    found = environment.get("PREFECT__FLOW_RUN_ID")
    return uuid.UUID(found) if found else None


@pytest.fixture(scope="session")
def prepared(prefect_server) -> Path:  # noqa: F811
    """A folder with a real store up to `filter`, and its MLflow database."""

    def prepare(folder: Path) -> None:
        _run_here(folder, ["download", "score", "filter"], SMALL, prefect_server)
        client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        pipeline = client.get_experiment_by_name("smoke")
        for run in client.search_runs([pipeline.experiment_id]):
            client.delete_run(run.info.run_id)  # tests count their own

    return made_once("store-up-to-filter", prepare)


def stocked(folder: Path, prepared: Path) -> Path:
    """A store of one's own in a folder, filled up to `filter`, with its MLflow database beside."""
    shutil.copytree(prepared / "store", folder / "store")
    shutil.copy(prepared / "mlflow.db", folder)
    return folder / "store"


def _run_here(folder: Path, stages: list[str], changes: dict, api: str) -> None:
    command = ["flows", "run", "--preset", "smoke", "--store", str(folder / "store")]
    for key, value in changes.items():
        command += ["--set", f"{key}={value}"]
    environment = {**os.environ, "PREFECT_API_URL": api, "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    subprocess.run(
        [sys.executable, "-m", *command, "--stages", *stages],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )


@contextlib.contextmanager
def installed(folder: Path, extra: dict[str, str] | None = None) -> Iterator[Installation]:
    """An installation for the tests of a file; those that break server or worker mend it."""
    installation = Installation(folder, extra or {})
    try:
        installation.start()
        yield installation
    finally:
        installation.stop()


def assert_nothing_is_left_behind(site: Installation) -> None:
    """No process of a flow lives on, and every slot is free."""
    wait_for(lambda: not site.left_behind(), 60)
    wait_for(lambda: site.slots() == 0, 60)


def outputs(store: Path) -> list[Path]:
    """Outputs of train-base in a store."""
    return [path for path in (store / "train-base").glob("*") if path.is_dir()]


def checkpoints(store: Path) -> set[Path]:
    """Complete ones of all trainings in a store."""
    return {path for folder in outputs(store) for path in folder.glob("checkpoints/*.json")}


def logged(folder: Path) -> list[int]:
    """Positions of the lines of metrics of an output: gaps and repetitions would show."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry["images"] for entry in map(json.loads, lines) if "images_per_second" in entry]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def mlflow_states(folder: Path) -> dict[str, list[str]]:
    """States of the runs of train-base and of the pipeline in a folder's MLflow database."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = {}
    for experiment in client.search_experiments():
        runs = client.search_runs([experiment.experiment_id])
        found[experiment.name.rpartition("/")[2]] = [run.info.status for run in runs]
    return {name: found[name] for name in ("smoke", "train-base") if found.get(name)}


def kill(*processes: psutil.Process | subprocess.Popen) -> None:
    """All at once, without a chance to say anything."""
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
