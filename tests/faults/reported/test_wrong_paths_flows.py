"""Every path and address that `python -m flows` takes, with what is wrong: one line, status 1.

The line names the thing, nothing is started, and nothing is left behind.
"""

import os

import pytest

from flows.__main__ import main
from flows.serve import services

SMOKE = ("--preset", "smoke")
STORE_COMMANDS = [
    ("run", *SMOKE),
    ("run", *SMOKE, "--dry-run"),
    ("submit", *SMOKE),
    ("render", "train-base", *SMOKE),
    ("ui",),
    ("champion",),
    ("compare", "--no-open"),
    ("store", "ls"),
    ("store", "show", "ab"),
    ("store", "verify"),
    ("store", "gc"),
    ("store", "rm", "ab"),
]
STORES = {
    "{bin}": "is a file",
    "{bin}/below": "is a file",
    "file://{bin}": "is a file",
    "": "give a folder, or a URL such as s3://bucket/name",
    " ": "give a folder, or a URL such as s3://bucket/name",
    "foo://bucket/x": "give a folder, or a URL such as s3://bucket/name",
    "s3://": "give a folder, or a URL such as s3://bucket/name",
    "://": "give a folder, or a URL such as s3://bucket/name",
    "~nobody-of-this-name/x": "no such user's home",
}
RECORD_COMMANDS = [
    ("run", *SMOKE),
    ("ui",),
    ("champion",),
    ("compare", "--no-open"),
    ("store", "gc"),
]
RECORDS = {
    "{bin}": "neither server nor database",
    "file://{folder}": "neither server nor database",
    "relative/folder": "neither server nor database",
    "foo://x": "neither server nor database",
    "sqlite:///{folder}": "neither server nor database",
    "sqlite:///{bin}": "file is not a database",
}
UPSTREAMS = {
    "{missing}": "has no manifest",
    "{folder}": "has no manifest",
    "{bin}": "has no manifest",
    "{foreign}": "manifest.json is not one of ours (stage: Field required)",
    "{broken}": "manifest.json is not one of ours",
    "foo://bucket/x": "Protocol not known: foo",
    "ab": "no output of filter in",
    "not-a-key": "give the beginning of a key",
    "": "write it as STAGE=WHERE",
}
ASSIGNMENTS = {
    "filter.min_side": "write key=value",
    "=3": "write key=value",
    "": "write key=value",
    "download.metadata=[a": "download.metadata=[a: the value is not YAML",
    "resources.score.env={a: !!python/object:os.system x}": "the value is not YAML",
    "name=a/b": "name = 'a/b'",
    "evaluate.captions=7": "evaluate.captions = 7",
}
PRESETS = ["", "../demo", "{bin}", "smoke.yaml"]
KEYS = ["", "..", "/", "zz", "ab/", "nope/ab", "ab", "a" * 65]


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch):
    """A server that would start is a failure; the environment is as before."""
    before = dict(os.environ)
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)

    def start(*_, **__):
        raise AssertionError("a server was started")

    monkeypatch.setattr(services, "prefect_api", start)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def things(tmp_path, monkeypatch):
    """Wrong things by name, and a folder of everything that a command may leave."""
    monkeypatch.setenv("GIGAGAN_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    found = {name: tmp_path / name for name in ("bin", "folder", "missing", "foreign", "broken")}
    found["bin"].write_bytes(bytes(range(256)) * 20)
    for name in ("folder", "foreign", "broken"):
        found[name].mkdir()
    (found["foreign"] / "manifest.json").write_text('{"images": []}')
    (found["broken"] / "manifest.json").write_bytes(b"\xff\x00{")
    (tmp_path / "store").mkdir()
    return {name: str(path) for name, path in found.items()}


@pytest.fixture
def refused(things, tmp_path, capsys):
    """Run a command that is to be refused in one line that has this text, and to leave nothing."""

    def check(text, *arguments):
        before = _files(tmp_path)
        status = main([argument.format(**things) for argument in arguments])
        said = capsys.readouterr().err.splitlines()
        assert (status, len(said)) == (1, 1), said
        assert said[0].startswith("error: ")
        assert text.format(**things) in said[0]
        assert "--debug" not in said[0]
        assert _files(tmp_path) == before

    return check


def _files(folder):
    """All files, but for what Prefect and SQLite keep in a home that any command makes."""
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    return {path for path in found if path.parts[0] != "runs"}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("command", STORE_COMMANDS, ids=" ".join)
def test_a_store_that_is_none(refused, command, store):
    refused(STORES[store], *command, "--store", store)


@pytest.mark.parametrize("command", [c for c in STORE_COMMANDS if c[0] == "store"], ids=" ".join)
def test_a_store_that_is_not_there(refused, command):
    refused("'missing': there is no such folder", *command, "--store", "missing")


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("command", RECORD_COMMANDS, ids=" ".join)
def test_a_record_that_is_none(refused, monkeypatch, things, command, record):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", record.format(**things))
    refused(RECORDS[record], *command, "--store", "store")


@pytest.mark.parametrize("where", UPSTREAMS)
def test_an_upstream_that_is_none(refused, where):
    command = ("run", *SMOKE, "--dry-run", "--store", "store", "--upstream", f"filter={where}")
    refused(UPSTREAMS[where], *command)


@pytest.mark.parametrize("item", ASSIGNMENTS)
@pytest.mark.parametrize("command", ["run", "submit"])
def test_a_setting_that_is_none(refused, command, item):
    escaped = item.replace("{", "{{").replace("}", "}}")
    refused(ASSIGNMENTS[item], command, *SMOKE, "--store", "store", "--set", escaped)


@pytest.mark.parametrize("item", ["x", "=1", "", "a=[1"])
def test_a_job_variable_that_is_none(refused, item):
    refused("--job-variable", "bootstrap", "--job-variable", item)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("command", ["run", "submit", "champion", "compare"])
def test_a_preset_that_is_none(refused, command, preset):
    refused("unknown preset", command, "--preset", preset, "--store", "store")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("action", ["show", "verify", "rm"])
def test_a_key_that_is_none(refused, action, key):
    refused(repr(key) if key in ("", "..") else key, "store", action, key, "--store", "store")


@pytest.mark.parametrize("port", ["0", "-1", "99999"])
def test_a_port_that_is_none(refused, port):
    refused(f"port {port} is none", "ui", f"--mlflow-port={port}")


@pytest.mark.parametrize("variable", ["PREFECT_HOME", "GIGAGAN_RUNS"])
def test_a_home_that_is_a_file(things, capsys, monkeypatch, variable):
    monkeypatch.undo()
    monkeypatch.setenv(variable, things["bin"])
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    if variable == "GIGAGAN_RUNS":
        monkeypatch.delenv("PREFECT_HOME", raising=False)
    assert main(["bootstrap"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {things['bin']}")
    assert line.endswith("to a folder that can")
