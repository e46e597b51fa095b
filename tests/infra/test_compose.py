"""infra/compose: it renders, holds no secret, listens here alone, and starts in order."""

import os
import re
import stat
from pathlib import Path

import pytest
import yaml

from tests.infra.conftest import INFRA, run, tool

COMPOSE = INFRA / "compose"
ONCE = {"s3-init", "databases", "prefect-migrate", "mlflow-migrate", "bootstrap"}
"""Services that run to their end."""


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """What podman-compose makes of the files, without and with GPUs."""
    compose = tool("podman-compose")
    stub = tmp_path_factory.mktemp("bin") / "podman"  # rendering only asks for its version
    stub.write_text("#!/bin/sh\necho podman version 5.4.0\n")
    stub.chmod(0o755)

    def render(*files):
        command = [compose, *(part for name in files for part in ("-f", COMPOSE / name)), "config"]
        done = run(command, {"PATH": f"{stub.parent}:{os.environ['PATH']}"})
        assert done.returncode == 0, done.stderr
        assert "not set" not in done.stderr
        return yaml.safe_load(done.stdout)

    return render("compose.yaml"), render("compose.yaml", "compose.gpu.yaml")


@pytest.fixture
def services(rendered):
    return rendered[0]["services"]


def test_no_file_takes_anything_from_the_environment_of_who_starts_it():
    for path in COMPOSE.glob("*.yaml"):
        assert not re.search(r"\$\{?\w", path.read_text()), path


def test_ports_are_bound_to_this_machine(services):
    ports = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert ports == {"prefect": ["127.0.0.1:4200:4200"], "mlflow": ["127.0.0.1:5000:5000"]}


def test_secrets_are_files_and_every_one_named_is_made_and_used(rendered, services, tmp_path):
    declared = rendered[0]["secrets"]
    used = {name for service in services.values() for name in service.get("secrets", ())}
    assert used == set(declared)
    assert made(tmp_path) == {Path(entry["file"]).name for entry in declared.values()}
    for name, service in services.items():
        mounted = {f"/run/secrets/{secret}" for secret in service.get("secrets", ())}
        named = {v for k, v in service.get("environment", {}).items() if k.endswith("_FILE")}
        assert named == mounted, name


def test_nothing_that_looks_like_a_secret_has_a_value(services):
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|_KEY|AUTH_STRING", variable):
                assert variable.endswith("_FILE"), (name, variable)
                assert value.startswith("/run/secrets/")
            assert not re.search(r"://[^/@]*:[^/@]*@", str(value)), (name, variable)


def test_what_runs_on_restarts_and_is_asked_for_its_health(services):
    for name, service in services.items():
        assert service["restart"] == ("no" if name in ONCE else "unless-stopped"), name
        assert ("healthcheck" in service) == (name not in ONCE | {"s3"}), name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert re.search(r":[\w.-]*\d", service["image"]), f"{name} is not pinned"


def test_each_waits_for_what_it_needs(services):
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            if other in ONCE:
                expected = "service_completed_successfully"
            else:
                has_check = "healthcheck" in services[other]
                expected = "service_healthy" if has_check else "service_started"
            assert how["condition"] == expected, (name, other)


def test_the_images_built_are_those_of_infra_docker(services):
    for service in services.values():
        if "build" in service:
            context = Path(service["build"]["context"])
            assert (context / service["build"]["dockerfile"]).is_file()
    assert services["worker"]["image"] == services["bootstrap"]["image"]


def test_with_gpus_the_worker_alone_changes(rendered):
    plain, gpu = (document["services"] for document in rendered)
    assert {name for name in plain if plain[name] != gpu[name]} == {"worker"}
    (device,) = gpu["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert gpu["worker"]["build"]["dockerfile"].endswith("train.Dockerfile")
    assert gpu["worker"]["secrets"] == plain["worker"]["secrets"]


def make_secrets(folder):
    """Run make-secrets in another folder."""
    script = folder / "make-secrets"
    script.write_bytes((COMPOSE / "make-secrets").read_bytes())
    script.chmod(0o755)
    done = run([script])
    assert done.returncode == 0, done.stderr
    return done.stdout


def made(folder):
    make_secrets(folder)
    return {path.name for path in (folder / "secrets").iterdir()}


def test_secrets_are_random_long_private_and_never_made_anew(tmp_path):
    make_secrets(tmp_path)
    before = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert len(set(before.values())) == len(before)
    assert min(map(len, before.values())) > 20
    assert all(re.fullmatch(r"(admin:)?[A-Za-z0-9]+\n", text) for text in before.values())
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700

    (tmp_path / "secrets" / "prefect_auth").unlink()
    assert make_secrets(tmp_path).count("made") == 1
    after = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"prefect_auth"}


def test_git_ignores_secrets():
    done = run(["git", "check-ignore", COMPOSE / "secrets" / "postgres_password"], cwd=INFRA)
    assert done.returncode == 0


def test_every_script_is_sound():
    scripts = [COMPOSE / "make-secrets", INFRA / "docker/with-secrets", INFRA / "k8s/make-secrets"]
    for script in scripts:
        assert os.access(script, os.X_OK)
        assert run(["sh", "-n", script]).returncode == 0
    for name in ("make-databases", "make-buckets", "migrate"):
        assert os.access(INFRA / "docker" / name, os.X_OK)
        compile((INFRA / "docker" / name).read_text(), name, "exec")
    done = run([tool("shellcheck"), *scripts])
    assert done.returncode == 0, done.stdout
