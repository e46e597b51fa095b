"""Servers that we start: who can reach them, and with what."""

import contextlib
import http.server
import json
import os
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
from prefect.client.orchestration import SyncPrefectClient

from flows.serve import services
from tests.flows.conftest import listening_on, wait_for
from tests.once import prefect_home

PASSWORD = "admin:only-for-us"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("GIGAGAN_RUNS", str(tmp_path))
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    for name in ("PREFECT_API_URL", "PREFECT_UI_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def test_a_service_does_not_outlive_its_command_however_that_ends(tmp_path):
    port = services.free_port()
    page = f"http://127.0.0.1:{port}"
    code = f"""
import time
from flows.serve import services
with services.running("pages", ["http.server", "{port}", "--bind", "127.0.0.1"], {page!r}):
    time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as command:
        wait_for(lambda: services.answers(page), 60)
        command.kill()
    wait_for(lambda: not services.answers(page), 30)


@pytest.fixture
def prefect():
    """Address of what answers as Prefect does: its page, but below /api only what is there."""

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            is_there = self.path == "/api/health" or not self.path.startswith("/api/")
            self.send_response(200 if is_there else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def record_file(tmp_path):
    """Where a command writes which server it runs."""
    (tmp_path / "prefect").mkdir()
    return tmp_path / "prefect" / "server.json"


@pytest.mark.parametrize("spelling", ["{}/api", "{}/api/", "{}/api//", " {}/api ", "{}", "{}/"])
def test_an_api_is_found_by_any_spelling_of_its_address(prefect, monkeypatch, spelling):
    monkeypatch.setenv("PREFECT_API_URL", spelling.format(prefect))
    with services.prefect_api() as api:
        assert api == os.environ["PREFECT_API_URL"] == f"{prefect}/api"
        assert os.environ["PREFECT_UI_URL"] == prefect
    monkeypatch.setenv("PREFECT_API_URL", spelling.format(prefect))
    services.use_running_api()
    assert os.environ["PREFECT_API_URL"] == f"{prefect}/api"
    os.environ.pop("PREFECT_UI_URL")


def test_an_address_where_no_server_answers_is_named(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api/")
    with (
        pytest.raises(services.ServiceError, match=r"is http://127\.0\.0\.1:9/api, where no"),
        services.prefect_api(),
    ):
        pass


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"7", b"{}", b'{"pid": 1}', b'{"api": 1, "pid": "x"}', b"\xff\0"],
)
def test_a_record_of_a_server_that_is_damaged_counts_as_none(record_file, content):
    record_file.write_bytes(content)
    with pytest.raises(services.ServiceError, match="no Prefect server runs here"):
        services.use_running_api()


def test_a_server_of_another_command_is_used_while_its_process_lives(prefect, record_file):
    record = services._record(f"{prefect}/api", os.getpid())
    record_file.write_text(json.dumps(record))
    services.use_running_api()
    assert os.environ.pop("PREFECT_API_URL") == f"{prefect}/api"
    os.environ.pop("PREFECT_UI_URL")
    for change in ({"start_ticks": 7}, {"machine": "another boot"}):
        record_file.write_text(json.dumps(record | change))
        with pytest.raises(services.ServiceError, match="no Prefect server runs here"):
            services.use_running_api()


SERVER = """
import http.server, sys
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Page).serve_forever()
"""
COMMAND = """
import sys
from flows.serve import services, settings
settings.apply()
with services.prefect_api(int(sys.argv[1])) as api:
    print(api, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Start a command that uses a server until its input ends; returns it and the server's API."""
    fake = tmp_path / "fake/prefect"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "__main__.py").write_text(SERVER)
    environment = {**os.environ, "PYTHONPATH": str(fake.parent)}
    started = []

    def start(port):
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(port)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", ["its end", "a kill"])
def test_a_server_of_ours_lives_as_long_as_one_of_the_commands_that_use_it(command, how):
    (first, api), (second, same) = command(services.free_port()), command(services.free_port())
    assert api == same
    if how == "a kill":
        first.kill()
    _, said = first.communicate()
    if how == "its end":
        assert said == f"{api}: other commands use this server, which ends with them\n"
    third, again = command(services.free_port())
    assert (again, services.answers(api)) == (api, True)
    for process in (second, third):
        assert services.answers(api)
        assert process.communicate() == ("", "")
    wait_for(lambda: not services.answers(api), 30)
    fourth, other = command(services.free_port())  # waits for the end of the one before
    assert other != api
    assert fourth.communicate() == ("", "")
    assert not services.answers(other)


def test_two_commands_that_start_at_once_share_one_server(command):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(command, [services.free_port(), services.free_port()]))
    assert len({api for _, api in found}) == 1


def test_the_record_of_a_server_is_whole_replaces_an_empty_one_and_goes_with_it(
    command, record_file
):
    record_file.touch()
    process, api = command(services.free_port())
    assert json.loads(record_file.read_text())["api"] == api
    process.communicate()
    assert not record_file.exists()
    assert not services.answers(api)


@pytest.mark.slow
def test_a_server_of_ours_in_a_home_of_any_name_is_on_the_loopback_only_and_keeps_to_its_password(
    tmp_path,
):
    name = "feature%2Fx of my data #1 ?x"
    home = prefect_home(tmp_path / name)
    environment = {name: value for name, value in os.environ.items() if "DATABASE" not in name}
    environment |= {"PREFECT_SERVER_API_AUTH_STRING": PASSWORD, "PREFECT_HOME": str(home)}
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(services.free_port())],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        api = command.stdout.readline().strip()
        assert listening_on(api) == {"127.0.0.1"}
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{api}/admin/version")
        with SyncPrefectClient(api, auth_string=PASSWORD) as client:
            client.create_flow_from_name("a flow")
        assert command.communicate() == ("", "")
    assert command.returncode == 0
    with contextlib.closing(sqlite3.connect(home / "prefect.db")) as database:
        assert database.execute("SELECT name FROM flow").fetchall() == [("a flow",)]
    assert {path.name for path in tmp_path.iterdir()} == {name, "logs"}
