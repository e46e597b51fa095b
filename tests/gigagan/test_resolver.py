"""`models:/…` addresses to files, on a registry that is a database file."""

import hashlib
import shutil

import pytest
from mlflow import MlflowClient

import gigagan.inference.sampler
from gigagan.inference import resolver
from gigagan.models.snapshot import SnapshotError

NAME = "pair"


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    uri = f"sqlite:///{tmp_path_factory.mktemp('record')}/mlflow.db"
    MlflowClient(uri).create_registered_model(NAME)
    return uri


@pytest.fixture
def client(record, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", record)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    return MlflowClient(record)


@pytest.fixture
def files(tmp_path):
    found = {role: tmp_path / f"{role} é.safetensors" for role in resolver.ROLES}
    for role, path in found.items():
        path.write_text(role)
    return found


def register(client, files, **changes):
    """A version as the pipeline registers it; returns its number."""
    tags = {}
    for role, path in files.items():
        tags[f"{role}.uri"] = path.as_uri()
        tags[f"{role}.sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    tags |= changes
    version = client.create_model_version(NAME, "file:///nowhere", tags=tags)
    client.set_registered_model_alias(NAME, "champion", version.version)
    return version.version


def test_an_alias_and_a_version_lead_to_both_files(client, files):
    number = register(client, files)
    expected = (files["base"], files["upsampler"])
    assert resolver.resolve(f"models:/{NAME}@champion") == expected
    assert resolver.resolve(f"models:/{NAME}/{number}") == expected


def test_a_changed_file_is_refused(client, files):
    register(client, files)
    files["upsampler"].write_text("other")
    with pytest.raises(SnapshotError, match="is not what was evaluated"):
        resolver.resolve(f"models:/{NAME}@champion")


def test_a_lost_file_is_named(client, files):
    register(client, files)
    files["base"].unlink()
    with pytest.raises(SnapshotError, match=r"base é\.safetensors is gone"):
        resolver.resolve(f"models:/{NAME}@champion")


def test_a_remote_file_is_fetched_once_and_again_when_its_copy_is_damaged(
    client, files, tmp_path, monkeypatch
):
    monkeypatch.setenv(resolver.CACHE_VARIABLE, str(tmp_path / "cache"))
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/base", files["base"].read_bytes())
    register(client, files, **{"base.uri": "memory://bucket/base"})
    base, _ = resolver.resolve(f"models:/{NAME}@champion")
    assert (base.parent, base.read_text()) == (tmp_path / "cache" / "snapshots", "base")
    base.write_text("damaged")
    assert resolver.resolve(f"models:/{NAME}@champion")[0].read_text() == "base"
    memory.rm("/bucket", recursive=True)
    assert resolver.resolve(f"models:/{NAME}@champion")[0] == base
    base.unlink()
    with pytest.raises(SnapshotError, match="memory://bucket/base cannot be read"):
        resolver.resolve(f"models:/{NAME}@champion")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("models:/pair", "write models:/NAME@ALIAS"),
        ("models:/../etc@champion", "write models:/NAME@ALIAS"),
        ("models:/nobody@champion", "is not in the registry"),
        ("models:/pair/999", "is not in the registry"),
    ],
)
def test_other_addresses_are_refused_with_what_would_do(client, address, message):
    with pytest.raises(SnapshotError, match=message):
        resolver.resolve(address)


def test_a_version_of_another_making_is_refused(client, files):
    register(client, files, **{"base.sha256": ""})
    with pytest.raises(SnapshotError, match="was not registered by the pipeline"):
        resolver.resolve(f"models:/{NAME}@champion")


def test_without_a_server_the_variable_is_named(monkeypatch, tmp_path):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlflow.is_tracking_uri_set", lambda: False)
    with pytest.raises(SnapshotError, match="set MLFLOW_TRACKING_URI"):
        resolver.resolve("models:/pair@champion")
    assert list(tmp_path.iterdir()) == []  # no database is left behind


@pytest.mark.parametrize("place", ["my%20data", "a#b", "a?b", "é ü"])
def test_the_pipelines_own_record_is_found_whatever_signs_its_path_holds(
    client, record, files, tmp_path, monkeypatch, place
):
    register(client, files)
    (tmp_path / place / "runs").mkdir(parents=True)
    shutil.copy(record.removeprefix("sqlite:///"), tmp_path / place / "runs" / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr("mlflow.is_tracking_uri_set", lambda: False)
    monkeypatch.chdir(tmp_path / place)
    before = sorted(tmp_path.rglob("*"))
    assert resolver.resolve(f"models:/{NAME}@champion") == (files["base"], files["upsampler"])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_database_that_is_not_there_is_named_and_not_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    for uri in ("sqlite:///rec.db", f"sqlite+pysqlite:///{tmp_path}/rec.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(SnapshotError, match=r"/rec\.db is no file"):
            resolver.resolve("models:/pair@champion")
    assert list(tmp_path.iterdir()) == []


def test_a_registered_pair_draws_what_its_files_draw(client, files):
    published = gigagan.inference.sampler.PUBLISHED
    pair = {
        "base": published / "emoji-32.safetensors",
        "upsampler": published / "emoji-32-to-128.safetensors",
    }
    register(client, pair)
    (ours,) = gigagan.load(f"models:/{NAME}@champion").sample(["a red heart"], seed=3)
    (theirs,) = gigagan.load().sample(["a red heart"], seed=3)
    assert ours.tobytes() == theirs.tobytes()
