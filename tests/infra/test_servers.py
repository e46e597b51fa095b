"""The servers as infra/ starts them: databases made and migrated, passwords asked for."""

import base64
import contextlib
import json
import sys
import urllib.error
import urllib.request

import boto3
import mlflow
import numpy as np
import psycopg2
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.serve import services
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


def test_migrating_a_second_time_changes_nothing(postgres, make_databases, tmp_path):
    address = f"mlflow@127.0.0.1:{postgres.port}"
    env = {"MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://{address}/mlflow"}
    env |= {"PGPASSWORD": PASSWORDS["MLFLOW_DB_PASSWORD"]}
    versions = []
    for _ in range(2):
        script("migrate", "mlflow", env=env)
        versions.append(postgres.sql("select version_num from alembic_version", "mlflow"))
    assert versions[0] == versions[1] != ""


@pytest.fixture(params=["sqlite", "postgres"])
def prefect(request, tmp_path, serve):
    """A Prefect server with a password, on a database that was migrated before it started."""
    database = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{tmp_path}/p.db"}
    if request.param == "postgres":
        request.getfixturevalue("make_databases")
        address = f"127.0.0.1:{request.getfixturevalue('postgres').port}"
        database = {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://prefect@{address}/prefect",
            "PGPASSWORD": PASSWORDS["PREFECT_DB_PASSWORD"],
        }
    database["PREFECT_HOME"] = str(tmp_path / "prefect")
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


@pytest.mark.parametrize("prefect", ["sqlite"], indirect=True)
def test_prefect_on_sqlite_asks_for_the_password(prefect):
    assert_tells_its_health_to_all_and_the_rest_to_who_knows_the_password(prefect)


@pytest.mark.parametrize("prefect", ["postgres"], indirect=True)
def test_prefect_on_postgres_lets_definitions_and_a_worker_in_with_the_password(
    prefect, serve, tmp_path
):
    assert_tells_its_health_to_all_and_the_rest_to_who_knows_the_password(prefect)
    client = {"PREFECT_API_URL": prefect, "PREFECT_HOME": str(tmp_path / "client")}
    command = [sys.executable, "-m", "flows", "bootstrap"]
    refused = run(
        command, client | {"PREFECT_API_AUTH_STRING": "admin:wrong"}, cwd=DOCKER.parents[1]
    )
    assert refused.returncode == 1
    assert "401" in refused.stderr
    done = run(command, client | {"PREFECT_API_AUTH_STRING": AUTH}, cwd=DOCKER.parents[1])
    assert done.returncode == 0, done.stderr

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


@pytest.fixture(params=["sqlite", "postgres"])
def mlflow_server(request, tmp_path, serve, monkeypatch):
    """An MLflow server with users: SQLite and a folder, or Postgres and S3 as in compose.yaml."""
    pytest.importorskip("flask_wtf", reason="`--app-name basic-auth` needs mlflow[auth]")
    ini = (DOCKER / "mlflow-auth.ini").read_text()
    env = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    users, artifacts = f"sqlite:///{tmp_path}/users.db", str(tmp_path / "artifacts")
    bucket = None
    if request.param == "postgres":
        request.getfixturevalue("make_databases")
        s3 = request.getfixturevalue("s3_server")
        bucket, artifacts = "mlflow", "s3://mlflow"
        script("make-buckets", bucket, env=s3.environment)
        address = (
            f"postgresql+psycopg2://mlflow@127.0.0.1:{request.getfixturevalue('postgres').port}"
        )
        env = {"MLFLOW_BACKEND_STORE_URI": f"{address}/mlflow", **s3.environment}
        env["PGPASSWORD"] = PASSWORDS["MLFLOW_DB_PASSWORD"]
        users = f"{address}/mlflow_users"
    (tmp_path / "auth.ini").write_text(
        ini.replace("postgresql+psycopg2://mlflow@postgres:5432/mlflow_users", users)
    )
    env["MLFLOW_AUTH_CONFIG_PATH"] = str(tmp_path / "auth.ini")
    script("migrate", "mlflow", env=env)
    port = services.free_port()
    page = f"http://127.0.0.1:{port}"
    argv = ["mlflow", "server", "--app-name=basic-auth", "--workers=1", f"--port={port}"]
    argv += [f"--artifacts-destination={artifacts}", "--allowed-hosts=127.0.0.1:*"]
    env["MLFLOW_AUTH_ADMIN_PASSWORD"] = ADMIN["MLFLOW_TRACKING_PASSWORD"]
    env["MLFLOW_FLASK_SERVER_SECRET_KEY"] = "a key that signs sessions"
    serve(argv, env, f"{page}/health")
    for name, value in ADMIN.items():
        monkeypatch.setenv(name, value)
    return page, bucket


def test_mlflow_takes_pictures_from_who_knows_the_password_and_refuses_strangers(
    mlflow_server, request, tmp_path, monkeypatch
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
    if bucket:
        s3 = request.getfixturevalue("s3_server")
        store = boto3.client(
            "s3",
            endpoint_url=s3.endpoint,
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
