"""The environment that a command gives to what it starts."""

import http.server
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from sqlalchemy import make_url

from flows.config import PipelineConfig

VARIABLES = ("MLFLOW_TRACKING_URI", "PREFECT_HOME", "no_proxy", "NO_PROXY")


def applied(folder, code="", **environment):
    """What `settings.apply` makes of an environment in a folder; then runs `code`."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in VARIABLES and not name.startswith(("PREFECT_", "MLFLOW_"))
    }
    command = "import os, json; from flows.serve import settings; settings.apply()\n" + code
    done = subprocess.run(
        [sys.executable, "-c", command + "\nprint(json.dumps({**os.environ}))"],
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_relative_is_so_to_where_the_command_was_typed(tmp_path):
    given = {
        "MLFLOW_TRACKING_URI": "sqlite:///rec.db",
        "PREFECT_HOME": "home",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:///p.db",
        "GIGAGAN_STORE_CACHE": "cache",
    }
    found = applied(tmp_path, **given)
    assert {name: found[name] for name in given} == {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/rec.db",
        "PREFECT_HOME": f"{tmp_path}/home",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{tmp_path}/p.db",
        "GIGAGAN_STORE_CACHE": f"{tmp_path}/cache",
    }


@pytest.mark.parametrize("name", ["feature%2Fx", "my%20data", "what?"])
def test_prefects_database_is_in_its_home_whatever_that_is_called(tmp_path, name):
    found = applied(tmp_path, PREFECT_HOME=f"{tmp_path}/{name}")
    address = make_url(found["PREFECT_SERVER_DATABASE_CONNECTION_URL"])
    assert address.database == f"{tmp_path}/{name}/prefect.db"
    assert address.drivername == "sqlite+aiosqlite"


def test_a_plain_home_and_a_database_that_is_named_stay_as_they_are(tmp_path):
    plain = applied(tmp_path, PREFECT_HOME=f"{tmp_path}/my data")
    assert "PREFECT_SERVER_DATABASE_CONNECTION_URL" not in plain
    theirs = "postgresql+asyncpg://me@host/prefect"
    odd = applied(
        tmp_path, PREFECT_HOME=f"{tmp_path}/a%20b", PREFECT_API_DATABASE_CONNECTION_URL=theirs
    )
    assert odd["PREFECT_API_DATABASE_CONNECTION_URL"] == theirs
    assert "PREFECT_SERVER_DATABASE_CONNECTION_URL" not in odd


@contextmanager
def answering():
    """A server on the loopback."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_loopback_is_never_asked_through_a_proxy(tmp_path, host):
    dead = "http://127.0.0.1:9"
    proxies = {"http_proxy": dead, "HTTP_PROXY": dead, "all_proxy": dead, "ALL_PROXY": dead}
    with answering() as port:
        code = f"""
import httpx, requests
from flows.serve import services
url = "http://{host}:{port}/health"
assert services.answers(url)
assert httpx.get(url).status_code == 200
assert requests.get(url).status_code == 200
"""
        applied(tmp_path, code, **proxies)


@pytest.mark.parametrize(
    ("given", "lower", "upper"),
    [
        ({}, "127.0.0.1,localhost,::1", "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "a, b"}, "a,b,127.0.0.1,localhost,::1", "a,b,127.0.0.1,localhost,::1"),
        (
            {"no_proxy": "a,localhost", "NO_PROXY": "b"},
            "a,localhost,127.0.0.1,::1",
            "b,127.0.0.1,localhost,::1",
        ),
        ({"no_proxy": "*"}, "*", "*"),
    ],
)
def test_what_else_goes_without_a_proxy_stays(tmp_path, given, lower, upper):
    found = applied(tmp_path, **given)
    assert found["no_proxy"] == lower
    assert found.get("NO_PROXY", lower) == upper


def test_the_mirror_of_a_store_is_one_place_for_all_commands(tmp_path, monkeypatch):
    from flows.__main__ import main
    from flows.serve import ui

    asked = []
    monkeypatch.setattr(ui, "serve", lambda store, *_: asked.append(store))
    monkeypatch.setenv("GIGAGAN_STORE_CACHE", str(tmp_path))
    assert main(["ui", "--store", "s3://bucket/x"]) == 0
    assert asked == [PipelineConfig(store="s3://bucket/x").store_path]
