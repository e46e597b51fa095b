"""A store, its record and its artifacts are moved together, into folders of any name."""

import shutil
from pathlib import Path

import pytest
from sqlalchemy import make_url

from flows.config import PipelineConfig
from flows.databases import absolute, sqlite_file, sqlite_uri
from flows.record import compare
from flows.record.registry import Registry, register_evaluation
from flows.record.tracking import Tracker, tracking_uri
from flows.serve import services, ui
from flows.stage import Stage
from flows.storage.store import Store
from tests.flows.conftest import listening_on, new_record
from tests.flows.outputs import evaluated

KEY = "0123456789abcdef" * 4
STAGE = Stage("download", 1, lambda context: None)
NAMES = [
    "my data",
    "my%20data",
    "feature%2Fx",
    "50% #1 ?x=1",
    "grün 中",
    "a;b&c+d",
    "a:b@c",
    "[v1]",
]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder for a store and its record."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "old"
    new_record(folder / "mlflow.db")
    return folder


def record(tracker: Tracker, file: str) -> str:
    """A run that has an artifact."""
    run = tracker.start_stage(STAGE, KEY, {}, parent=None, fresh=True, tags={})
    tracker.client.log_text(run, "said", file)
    return run


def kept_in(folder: Path) -> set[str]:
    """Names of all artifacts below a folder."""
    return {path.name for path in (folder / "mlartifacts").rglob("*") if path.is_file()}


def text(tracker: Tracker, run: str, file: str) -> str:
    return Path(tracker.client.download_artifacts(run, file)).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_moved_record_finds_its_artifacts_and_puts_new_ones_beside_its_store(home, name):
    run = record(Tracker("moved", home / "store"), "first.txt")
    new = home.rename(home.parent / name)
    home.touch()  # the old place cannot be made
    tracker = Tracker("moved", new / "store")
    assert text(tracker, run, "first.txt") == "said"
    record(tracker, "second.txt")
    assert kept_in(new) == {"first.txt", "second.txt"}
    again = new.rename(home.parent / "again")
    tracker = Tracker("moved", again / "store")
    assert text(tracker, run, "first.txt") == "said"
    left = {path.name for path in home.parent.iterdir()}
    assert left == {"old", "again"}  # no folder by half of a name, or by a quoted one


def test_a_copy_of_a_record_does_not_write_to_where_it_was_copied_from(home):
    run = record(Tracker("copied", home / "store"), "first.txt")
    new = home.parent / "new"
    shutil.copytree(home, new)
    tracker = Tracker("copied", new / "store")
    record(tracker, "second.txt")
    assert (kept_in(home), kept_in(new)) == ({"first.txt"}, {"first.txt", "second.txt"})
    assert text(Tracker("copied", home / "store"), run, "first.txt") == "said"


def test_a_record_that_stores_share_goes_on_where_its_artifacts_are(home, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri(home / "mlflow.db"))
    other = home.parent / "other" / "store"
    run = record(Tracker("shared", home / "store"), "first.txt")
    tracker = Tracker("shared", other)
    record(tracker, "second.txt")
    assert kept_in(home) == {"first.txt", "second.txt"}
    tracker.client.set_tag(run, "store.path", f"{home}/store/download/{KEY[:16]}")
    shutil.rmtree(home / "mlartifacts")
    record(Tracker("shared", other), "third.txt")
    assert kept_in(other.parent) == {"third.txt"}
    found = tracker.client.get_run(run)
    assert found.info.artifact_uri.startswith(other.parent.as_uri())
    assert found.data.tags["store.path"].startswith(f"{home}/store/")


def test_the_champion_is_found_where_the_store_is_now(home):
    config = PipelineConfig(name="moved", store=str(home / "store"))
    made = evaluated(config, 1, 0.3)
    tracker = Tracker("moved", home / "store")
    run = tracker.start_stage(STAGE, KEY, {}, parent=None, fresh=True, tags={})
    store = Store.of(config)
    register_evaluation(tracker, store, made.resolved, made.output, run)
    new = home.rename(home.parent / "new home")
    version = Registry(Tracker("moved", new / "store").client, "moved").champion()
    name = made.base.path.name
    assert (
        version.tags["base.uri"]
        == (new / "store" / "train-base" / name / "snapshot.safetensors").as_uri()
    )
    assert version.source.startswith(new.as_uri())


@pytest.mark.slow
def test_a_page_of_ours_shows_a_record_in_a_folder_of_any_name_on_the_loopback_only(home):
    new = home.rename(home.parent / NAMES[3])
    tracker = Tracker("shown", new / "store")
    record(tracker, "first.txt")
    with ui.mlflow_page(new / "store", services.free_port()) as page:
        assert compare.shows(page, tracker, "download")
        assert listening_on(page) == {"127.0.0.1"}
    assert {path.name for path in home.parent.iterdir()} == {new.name}


@pytest.mark.parametrize("name", NAMES)
def test_the_address_of_a_database_leads_to_its_file(tmp_path, name):
    file = tmp_path / name / "mlflow.db"
    for driver in ("", "+aiosqlite"):
        assert make_url(sqlite_uri(file, driver)).database == str(file)
        assert sqlite_file(sqlite_uri(file, driver)) == file


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("sqlite:///rec.db", "sqlite:///{here}/rec.db"),
        ("sqlite:///./a b/rec.db?timeout=5", "sqlite:///{here}/a b/rec.db?timeout=5"),
        ("sqlite+pysqlite:///rec.db", "sqlite+pysqlite:///{here}/rec.db"),
        ("sqlite+aiosqlite:///rec.db", "sqlite+aiosqlite:///{here}/rec.db"),
        ("sqlite:////srv/rec.db", "sqlite:////srv/rec.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("sqlite://", "sqlite://"),
        ("sqlite:///file:rec.db?uri=true", "sqlite:///file:rec.db?uri=true"),
        ("http://host:5000", "http://host:5000"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
    ],
)
def test_a_relative_address_means_the_folder_where_it_is_read_first(
    tmp_path, monkeypatch, given, meant
):
    monkeypatch.chdir(tmp_path)
    first = absolute(given)
    assert first == meant.format(here=tmp_path)
    monkeypatch.chdir("/")
    assert absolute(first) == first


def test_a_record_with_a_relative_address_is_the_one_of_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///rec.db")
    assert tracking_uri(tmp_path / "store") == f"sqlite:///{tmp_path}/rec.db"
