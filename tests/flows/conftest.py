"""A Prefect server and an MLflow database for a test session; stages that take no time."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from unittest import mock

import psutil
import pytest

from flows.serve import settings

settings.apply()

from flows.config import PipelineConfig  # noqa: E402
from flows.record.tracking import Tracker  # noqa: E402
from flows.serve import services  # noqa: E402
from flows.stage import Context  # noqa: E402
from flows.stages import download, evaluate, filter, score, train_base, train_upsampler  # noqa: E402
from tests.once import made_once, prefect_home  # noqa: E402


@pytest.fixture(scope="session")
def prefect_server():
    """A temporary Prefect server with a database of its own; its API's address.

    Prefect's harness for tests does the same, and imports all of the server into this process.
    """
    from prefect.context import _temporary_global_settings_context, get_settings_context
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    port = services.free_port()
    api = f"http://127.0.0.1:{port}/api"
    with (
        tempfile.TemporaryDirectory() as folder,
        temporary_settings({PREFECT_API_URL: api}),
        _temporary_global_settings_context(get_settings_context()),
    ):
        server = _start_prefect(prefect_home(Path(folder)), port)
        try:
            wait_for(lambda: services.answers(f"{api}/health"), 300)
            yield api
            APILogWorker.instance().drain()
        finally:
            server.terminate()
            server.wait()


def _start_prefect(home: Path, port: int) -> subprocess.Popen:
    """Only what answers requests: no pages, no services that look after schedules and events."""
    environment = {
        **{name: value for name, value in os.environ.items() if "DATABASE" not in name},
        "PREFECT_HOME": str(home),
        "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }
    factory = ["uvicorn", "--factory", "prefect.server.api.server:create_app"]
    where = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    return subprocess.Popen([sys.executable, "-m", *factory, *where], env=environment)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder for a store and a tracking database."""
    folder = tmp_path_factory.mktemp("runs")
    new_record(folder / "mlflow.db")
    return folder


def new_record(file: Path) -> None:
    """MLflow's database as a first command leaves it; its tables take seconds to make."""

    def make(home: Path) -> None:
        Tracker("new", home / "store")

    with mock.patch.dict(os.environ):
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        made = made_once("mlflow", make)
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(made / "mlflow.db", file)


@dataclasses.dataclass(frozen=True)
class S3:
    """A server that speaks S3, in a process of its own."""

    endpoint: str
    process: subprocess.Popen
    environment: dict[str, str]
    """What a client's process needs: endpoint and (made up) keys."""

    @property
    def port(self) -> int:
        """The endpoint's."""
        return int(self.endpoint.rpartition(":")[2])

    @property
    def options(self) -> dict:
        """Keyword arguments of s3fs."""
        return {"endpoint_url": self.endpoint, "key": "testing", "secret": "testing"}

    def bucket(self) -> str:
        """A new bucket's name; made without a client, whose session takes half a second."""
        name = f"bucket-{uuid.uuid4().hex}"
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        urllib.request.urlopen(request).close()
        return name


@contextlib.contextmanager
def start_s3():
    """Run moto's S3; every bucket is gone with it."""
    port = services.free_port()
    endpoint = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: services.answers(f"{endpoint}/moto-api/"), 60)
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ENDPOINT_URL_S3": endpoint,
            "MLFLOW_S3_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        yield S3(endpoint, process, environment)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def s3_server():
    """An S3 server for the session; make a bucket of your own."""
    with start_s3() as server:
        yield server


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The session's S3 server, with the variables that lead this process to it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@dataclasses.dataclass
class Postgres:
    """A PostgreSQL server with a data folder of its own."""

    folder: Path
    port: int
    bin: Path
    process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        self.process = subprocess.Popen(
            [
                *(self.bin / "postgres", "-D", self.folder / "data", "-p", str(self.port)),
                *("-k", self.folder, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **_unprivileged(),
        )
        wait_for(lambda: self.sql("select 1") == "1", 30)

    def stop(self, number: int = signal.SIGINT) -> None:
        """End it: SIGINT drops its connections, SIGKILL is a crash."""
        self.process.send_signal(number)
        self.process.wait(30)

    def sql(self, text: str, database: str = "postgres") -> str:
        """What psql prints for a statement; empty when it fails."""
        done = subprocess.run(
            [self.bin / "psql", "-At", "-c", text, self.url(database)],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip()

    def url(self, database: str, scheme: str = "postgresql") -> str:
        """Address of a database."""
        return f"{scheme}://postgres@127.0.0.1:{self.port}/{database}"


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server for the session; make a database of your own (`create database …`)."""
    found = shutil.which("initdb") or next(
        iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)), None
    )
    if found is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    # Not one of pytest's folders: those are for their owner alone.
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    user = _unprivileged()
    if user:
        os.chown(folder, user["user"], user["group"])
    subprocess.run(
        [
            *(found, "-D", folder / "data", "-U", "postgres"),
            *("--auth=trust", "--encoding=UTF8", "--no-sync"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        **user,
    )
    server = Postgres(folder, services.free_port(), Path(found).resolve().parent)
    server.start()
    yield server
    server.stop(signal.SIGINT)
    shutil.rmtree(folder)


def _unprivileged() -> dict:
    """Options of subprocess for what refuses to run as root."""
    return {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}


def listening_on(url: str) -> set[str]:
    """Addresses at which the port of this URL takes connections."""
    port = urllib.parse.urlsplit(url).port
    connections = psutil.net_connections("tcp")
    return {c.laddr.ip for c in connections if c.status == "LISTEN" and c.laddr.port == port}


def wait_for(claim, seconds: float, every: float = 0.2):
    """Return what `claim()` returns once it is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := claim()):
        assert time.monotonic() < deadline, f"not true after {seconds} s"
        time.sleep(every)
    return found


@pytest.fixture
def config(runs, request, monkeypatch):
    """Settings under a name of its own, recording beside its store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    name = request.node.name.translate({ord(sign): "-" for sign in "[]"})
    return PipelineConfig(name=name, store=str(runs / name))


@pytest.fixture
def ran(monkeypatch):
    """Replace the bodies of the six stages; returns the names of those that ran, in order."""
    names: list[str] = []
    bodies = {
        download: _download,
        score: _score,
        filter: _filter,
        train_base: _train,
        train_upsampler: _train,
        evaluate: _evaluate,
    }
    for module, body in bodies.items():
        monkeypatch.setitem(vars(module.STAGE), "run", _with(module.STAGE, body, names))
    return names


def _with(stage, body, names):
    def run(context: Context) -> None:
        names.append(stage.name)
        context.progress("work", 1, 2)
        body(context)

    return run


def _download(context: Context) -> None:
    write(context.path / "images/00000/00000.tar", "pictures")
    write(context.path / "fates/00000.parquet", f"seed {context.config.embedded.seed}")
    write(context.path / "heldout/captions.json", "{}")
    write(context.path / "report.json", json.dumps({"counts": {"rows": 5}}))
    context.metrics["rows"] = 5.0


def _score(context: Context) -> None:
    fates = (context.inputs["fates"] / "00000.parquet").read_text()
    write(context.path / "scores/00000/00000.parquet", fates)
    context.metrics["scored"] = 5.0


def _filter(context: Context) -> None:
    images = (context.inputs["scores"] / "00000/00000.parquet").read_text()
    for resolution in context.config.resolutions:
        write(context.path / f"shards/{resolution:03d}/train-00000.tar", images)
    write(context.path / "aligner.safetensors", "weights")
    funnel = [{"step": "listed", "rows": 5}, {"step": "kept", "rows": 3}]
    write(context.path / "report.json", json.dumps({"funnel": funnel}))
    context.metrics["kept"] = 3.0


def _train(context: Context) -> None:
    write(context.path / "snapshot.safetensors", context.config.kind)
    write(context.path / "checkpoints/last.pt", "state")
    context.metrics["loss"] = 0.5


def _evaluate(context: Context) -> None:
    base, upsampler = context.inputs["base"], context.inputs["upsampler"]
    assert (base.read_text(), upsampler.read_text()) == ("base", "upsampler")
    write(context.path / "results.json", json.dumps({"metrics": {"kid": 0.1}}))
    context.metrics["kid"] = 0.1


def write(path: Path, text: str) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
