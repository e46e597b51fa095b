"""The servers as infra/ starts them: databases made and migrated, passwords asked for."""

import base64
import contextlib
import json
import runpy
import sys
import urllib.error
import urllib.request
from itertools import groupby

import boto3
import mlflow
import numpy as np
import psycopg2
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.__main__ import main
from flows.serve import bootstrap, services
from tests.infra.conftest import DOCKER, run, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.flow]
PASSWORDS = {"PREFECT_DB_PASSWORD": "prefects-own", "MLFLOW_DB_PASSWORD": "mlflows-own"}
AUTH = "admin:a-password-of-the-server"
ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "long-enough-for-it"}


def script(name, *arguments, env):
    """Run one of the images' scripts; returns what it printed."""
    done = run([sys.executable, DOCKER / name, *arguments], env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def make_databases(postgres):
    """Make roles and databases on a server that asks those roles for passwords."""
    rules = postgres.folder / "data" / "pg_hba.conf"
    asked = "host all prefect,mlflow 127.0.0.1/32 scram-sha-256\n"
    rules.write_text(asked + rules.read_text())
    postgres.sql("select pg_reload_conf()")
    superuser = {"PGHOST": "127.0.0.1", "PGPORT": str(postgres.port), "PGUSER": "postgres"}

    def make(passwords=PASSWORDS):
        return script("make-databases", env=superuser | passwords)

    make()
    return make


def login(postgres, role, password):
    """Whether Postgres lets a role in."""
    options = {"host": "127.0.0.1", "port": postgres.port, "dbname": role}
    with contextlib.suppress(psycopg2.OperationalError):
        psycopg2.connect(user=role, password=password, **options).close()
        return True
    return False


def test_databases_are_made_once_and_a_second_run_rotates_passwords(postgres, make_databases):
    owners = "select datname || ' ' || pg_get_userbyid(datdba) from pg_database order by 1"
    before = postgres.sql(owners)
    assert {"mlflow mlflow", "mlflow_users mlflow", "prefect prefect"} <= set(before.splitlines())
    assert login(postgres, "prefect", "prefects-own")
    assert not login(postgres, "prefect", "mlflows-own")

    make_databases(PASSWORDS | {"PREFECT_DB_PASSWORD": "it's another; 100%"})
    assert login(postgres, "prefect", "it's another; 100%")
    assert not login(postgres, "prefect", "prefects-own")
    make_databases()
    assert postgres.sql(owners) == before


def test_buckets_are_made_where_they_are_missing(s3_server):
    assert "bucket one: made" in script("make-buckets", "one", env=s3_server.environment)
    again = script("make-buckets", "--wait", "5", "one", "two", env=s3_server.environment)
    assert again.splitlines() == ["bucket one: there", "bucket two: made"]


def test_an_s3_server_that_is_not_there_is_waited_for_and_then_said():
    env = {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{services.free_port()}"}
    env |= {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "eu"}
    env |= {"AWS_MAX_ATTEMPTS": "1"}
    done = run([sys.executable, DOCKER / "make-buckets", "--wait", "1", "one"], env)
    assert done.returncode == 1
    assert "make-buckets: Could not connect" in done.stderr
    assert "Traceback" not in done.stderr


def ask(url, auth=None, body=None):
    """Status of a request, with Basic credentials or without."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    if auth:
        request.add_header("Authorization", f"Basic {base64.b64encode(auth.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.loads(response.read() or "null")
    except urllib.error.HTTPError as error:
        return error.code, None


@pytest.fixture
def prefect(postgres, make_databases, tmp_path, serve):
    """A Prefect server with a password, on a database that was migrated before it started."""
    database = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": (
            f"postgresql+asyncpg://prefect@127.0.0.1:{postgres.port}/prefect"
        ),
        "PGPASSWORD": PASSWORDS["PREFECT_DB_PASSWORD"],
        "PREFECT_HOME": str(tmp_path / "prefect"),
    }
    script("migrate", "prefect", env=database)
    port = services.free_port()
    api = f"http://127.0.0.1:{port}/api"
    server = {
        "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false",
        "PREFECT_SERVER_API_AUTH_STRING": AUTH,
        "PREFECT_SERVER_UI_API_URL": "/api",
    }
    serve(["prefect", "server", "start", "--port", str(port)], database | server, f"{api}/health")
    return api


def assert_tells_its_health_to_all_and_the_rest_to_who_knows_the_password(prefect):
    assert ask(f"{prefect}/health")[0] == 200
    assert ask(f"{prefect}/ready")[0] == 200
    assert ask(f"{prefect}/flows/count", body=b"{}")[0] == 401
    assert ask(f"{prefect}/flows/count", "admin:wrong", b"{}")[0] == 401
    assert ask(f"{prefect}/flows/count", AUTH, b"{}") == (200, 0)
    # The page finds its server wherever a tunnel ends.
    assert ask(f"{prefect.removesuffix('/api')}/ui-settings")[1]["api_url"] == "/api"


def bootstrapped(prefect, password):
    """The status of `flows bootstrap` with a password."""
    with temporary_settings({PREFECT_API_URL: prefect, PREFECT_API_AUTH_STRING: password}):
        return main(["bootstrap"])


def test_prefect_lets_definitions_and_a_worker_in_with_the_password(
    prefect, serve, tmp_path, monkeypatch, capsys
):
    assert_tells_its_health_to_all_and_the_rest_to_who_knows_the_password(prefect)
    monkeypatch.setenv("PREFECT_API_URL", prefect)
    monkeypatch.setenv("PREFECT_UI_URL", prefect)  # which a command sets
    every = bootstrap.deployments()
    of_flow = [list(of) for _, of in groupby(every, lambda one: one["entrypoint"])]
    chosen = [of[place % len(of)] for place, of in enumerate(of_flow)]
    assert len(chosen) == len({one["entrypoint"] for one in every})
    assert all(any(one["parameters"] == other["parameters"] for one in chosen) for other in every)
    monkeypatch.setattr(bootstrap, "deployments", lambda: chosen)
    assert bootstrapped(prefect, "admin:wrong") == 1
    assert "401" in capsys.readouterr().err
    assert bootstrapped(prefect, AUTH) == 0
    assert ask(f"{prefect}/deployments/count", AUTH, b"{}") == (200, len(chosen))

    client = {"PREFECT_API_URL": prefect, "PREFECT_HOME": str(tmp_path / "client")}
    port = str(services.free_port())
    serve(
        [
            "prefect",
            "worker",
            "start",
            "--pool",
            "local",
            "--type",
            "process",
            "--with-healthcheck",
        ],
        client | {"PREFECT_API_AUTH_STRING": AUTH, "PREFECT_WORKER_WEBSERVER_PORT": port},
        f"http://127.0.0.1:{port}/health",
    )
    workers = f"{prefect}/work_pools/local/workers/filter"
    online = wait_for(lambda: ask(workers, AUTH, b"{}")[1], 30)
    assert [worker["status"] for worker in online] == ["ONLINE"]


@pytest.fixture(scope="module")
def mlflow_env(postgres, make_databases, s3_server, tmp_path_factory):
    """Variables of an MLflow server with users on Postgres and S3, whose databases are migrated."""
    pytest.importorskip("flask_wtf", reason="`--app-name basic-auth` needs mlflow[auth]")
    folder = tmp_path_factory.mktemp("mlflow")
    address = f"mlflow@127.0.0.1:{postgres.port}"
    ini = (DOCKER / "mlflow-auth.ini").read_text()
    assert "mlflow@postgres:5432" in ini
    (folder / "auth.ini").write_text(ini.replace("mlflow@postgres:5432", address))
    env = {
        **s3_server.environment,
        "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://{address}/mlflow",
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "PGPASSWORD": PASSWORDS["MLFLOW_DB_PASSWORD"],
    }
    script("migrate", "mlflow", env=env)
    return env


@pytest.mark.parametrize("has_users", [True, False])
def test_migrating_a_second_time_changes_nothing(postgres, mlflow_env, monkeypatch, has_users):
    def tables():
        versions = "select version_num from alembic_version"
        users = "select version_num from alembic_version_auth"
        return postgres.sql(versions, "mlflow"), postgres.sql(users, "mlflow_users")

    before = tables()
    assert "" not in before
    for name, value in mlflow_env.items():
        monkeypatch.setenv(name, value)
    if not has_users:
        monkeypatch.delenv("MLFLOW_AUTH_CONFIG_PATH")
    monkeypatch.setattr(sys, "argv", ["migrate", "mlflow"])
    runpy.run_path(str(DOCKER / "migrate"), run_name="__main__")
    assert tables() == before


@pytest.fixture
def mlflow_server(mlflow_env, s3_server, serve, monkeypatch):
    """An MLflow server with users, on Postgres and S3 as in compose.yaml, and its bucket."""
    bucket = "mlflow"
    script("make-buckets", bucket, env=s3_server.environment)
    port = services.free_port()
    page = f"http://127.0.0.1:{port}"
    argv = ["mlflow", "server", "--app-name=basic-auth", "--workers=1", f"--port={port}"]
    argv += [f"--artifacts-destination=s3://{bucket}", "--allowed-hosts=127.0.0.1:*"]
    secrets = {
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN["MLFLOW_TRACKING_PASSWORD"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key that signs sessions",
    }
    serve(argv, mlflow_env | secrets, f"{page}/health")
    for name, value in ADMIN.items():
        monkeypatch.setenv(name, value)
    return page, bucket


def test_mlflow_takes_pictures_from_who_knows_the_password_and_refuses_strangers(
    mlflow_server, s3_server, tmp_path, monkeypatch
):
    page, bucket = mlflow_server
    client = MlflowClient(page)
    run_id = client.create_run(client.create_experiment("pictures")).info.run_id
    picture_HWC = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    client.log_image(run_id, picture_HWC, key="grid", step=3)
    mlflow.flush_artifact_async_logging()
    wait_for(lambda: len(client.list_artifacts(run_id, "images")) >= 1, 30)
    names = [found.path for found in client.list_artifacts(run_id, "images")]
    assert any(name.endswith(".png") for name in names)
    assert client.download_artifacts(run_id, names[0], str(tmp_path))
    store = boto3.client(
        "s3",
        endpoint_url=s3_server.endpoint,
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
        region_name="us-east-1",
    )
    keys = [item["Key"] for item in store.list_objects_v2(Bucket=bucket)["Contents"]]
    assert any(run_id in key and key.endswith(".png") for key in keys)

    assert services.answers(f"{page}/health")
    search = f"{page}/api/2.0/mlflow/experiments/search"
    assert ask(search, body=b'{"max_results": 1}')[0] == 401
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-wrong-password")
    with pytest.raises(MlflowException, match="401"):
        MlflowClient(page).search_experiments()
