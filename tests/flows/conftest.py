"""A Prefect server and an MLflow database for a test session; stages that take no time."""

import dataclasses
import json
from pathlib import Path

import pytest

from flows import settings

settings.apply()

from flows import download, evaluate, filter, score, train_base, train_upsampler  # noqa: E402
from flows.config import PipelineConfig  # noqa: E402
from flows.stage import Context  # noqa: E402


@pytest.fixture(scope="session")
def prefect_server():
    """A temporary Prefect server with a database of its own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder for a store and a tracking database, whose schema takes seconds to make."""
    return tmp_path_factory.mktemp("runs")


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
        monkeypatch.setattr(module, "STAGE", _with(module.STAGE, body, names))
    return names


def _with(stage, body, names):
    def run(context: Context) -> None:
        names.append(stage.name)
        context.progress("work", 1, 2)
        body(context)

    return dataclasses.replace(stage, run=run)


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
