"""infra/compose: it renders, holds no secret, listens here alone, is confined, starts in order."""

import os
import re
import stat
from pathlib import Path

import pytest
import yaml

from tests.infra.conftest import DOCKER, INFRA, run, tool

COMPOSE = INFRA / "compose"
FILES = ["compose.yaml", "compose.gpu.yaml"]
VARIABLE = re.compile(r"\$\{?(\w+)(:-[^}]+\})?")
"""A variable of the compose files, and its default."""
ONCE = {"s3-init", "databases", "prefect-migrate", "mlflow-migrate", "bootstrap"}
"""Services that run to their end."""


def program(folder, name, text):
    """A program of that name for the head of PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def render(folder, *files, **variables):
    """What podman-compose makes of the files."""
    compose = tool("podman-compose")
    env = program(folder, "podman", "echo podman version 5.4.0")  # it only asks for that
    command = [compose, *(part for name in files for part in ("-f", COMPOSE / name)), "config"]
    done = run(command, env | variables)
    assert done.returncode == 0, done.stderr
    assert "not set" not in done.stderr
    return yaml.safe_load(done.stdout)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The files without and with GPUs."""
    folder = tmp_path_factory.mktemp("bin")
    return render(folder, "compose.yaml"), render(folder, *FILES)


@pytest.fixture
def services(rendered):
    return rendered[0]["services"]


def variables():
    """Variables of the compose files with their defaults; where several, the first file's."""
    found = {}
    for name in FILES:
        for variable, default in VARIABLE.findall((COMPOSE / name).read_text()):
            found.setdefault(variable, default[2:-1])
    return found


def test_only_limits_and_images_come_from_outside_and_each_has_a_default():
    for variable, default in variables().items():
        assert re.fullmatch(r"[A-Z0-9_]+_(MEMORY|CPUS|PIDS|SHM|TMP|IMAGE)", variable)
        assert default, variable


def size(text):
    """Bytes of a size as Docker writes it."""
    return int(text[:-1]) << {"m": 20, "g": 30}[text[-1]]


@pytest.mark.parametrize("gpus", [False, True])
def test_every_service_is_confined_and_limited(rendered, gpus):
    for name, service in rendered[gpus]["services"].items():
        assert service["read_only"], name
        assert service["init"], name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & service.keys()
        assert float(service["cpus"]) > 0, name
        assert 0 < int(service["pids_limit"]) <= 8192, name
        memory = size(service.get("shm_size", "64m"))
        for mount in service["tmpfs"]:
            memory += size(re.search(r"size=(\w+)", mount)[1])
        assert memory < size(service["mem_limit"]), f"{name}: in memory, and more than it has"
        assert re.search(r":[\w.-]*\d|@sha256:", service["image"]), f"{name} is not pinned"


def test_limits_are_what_variables_say(tmp_path):
    named = {name: "3" for name in variables() if name.endswith(("_CPUS", "_PIDS"))}
    named |= {name: "7g" for name in variables() if name.endswith(("_MEMORY", "_SHM"))}
    for service in render(tmp_path, "compose.yaml", **named)["services"].values():
        found = {str(service[name]) for name in ("cpus", "pids_limit", "mem_limit")}
        assert found == {"3", "7g"}


def test_kernels_that_the_worker_compiles_can_be_loaded(rendered):
    for document in rendered:
        (tmp,) = document["services"]["worker"]["tmpfs"]
        assert tmp.startswith("/tmp:")
        assert "exec" in tmp.split(":")[1].split(",")


def peers(document, name):
    """Who shares a network with a service."""
    services = document["services"]
    ours = set(services[name]["networks"])
    return {other for other in services if ours & set(services[other]["networks"])} - {name}


@pytest.mark.parametrize("gpus", [False, True])
def test_whoever_downloads_reaches_the_servers_and_not_the_database(rendered, gpus):
    document = rendered[gpus]
    assert peers(document, "worker") == {"prefect", "mlflow", "s3", "s3-init", "bootstrap"}
    migrations = {"prefect-migrate", "mlflow-migrate"}
    assert peers(document, "postgres") == {"prefect", "mlflow", "databases"} | migrations


def test_only_the_worker_and_what_has_a_page_reach_beyond_this_machine(rendered):
    document, _ = rendered
    inside = {name for name, network in document["networks"].items() if network.get("internal")}
    outside = {
        name: set(service["networks"]) - inside
        for name, service in document["services"].items()
        if set(service["networks"]) - inside
    }
    assert outside == {"worker": {"web"}, "prefect": {"pages"}, "mlflow": {"pages"}}


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


def test_images_are_built_on_what_their_files_say_unless_a_variable_says_otherwise(rendered):
    for document in rendered:
        for service in document["services"].values():
            if "build" not in service:
                continue
            dockerfile = (DOCKER.parents[1] / service["build"]["dockerfile"]).read_text()
            arguments = dict(line.split("=", 1) for line in service["build"]["args"])
            for name, image in re.findall(r"^ARG (\w*IMAGE)=(.*)$", dockerfile, re.MULTILINE):
                assert arguments[name] == image


DOCKER_STUB = """
[ "$*" != "pull --quiet $REFUSED" ] || exit 1
[ "$1 $2" = "image inspect" ] || exit 0
echo "${5%:*}@sha256:$(echo "$5" | sha256sum | cut -c1-64)"
"""


def test_every_image_of_others_can_be_named_by_its_digest(tmp_path):
    env = program(tmp_path, "docker", DOCKER_STUB)
    done = run([COMPOSE / "pin"], env)
    assert (done.returncode, done.stderr) == (0, "")
    pinned = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert set(pinned) == {name for name in variables() if name.endswith("_IMAGE")}
    for service in render(tmp_path, "compose.yaml", **pinned)["services"].values():
        if "build" not in service:
            assert re.fullmatch(r"[\w/]+@sha256:[0-9a-f]{64}", service["image"])
        for argument in service.get("build", {}).get("args", ()):
            assert re.search(r"IMAGE=python@sha256:[0-9a-f]{64}$", argument)


def test_an_image_that_cannot_be_pulled_ends_the_script_without_a_line_for_it(tmp_path):
    env = program(tmp_path, "docker", DOCKER_STUB) | {"REFUSED": "python:3.11.14-bookworm"}
    done = run([COMPOSE / "pin"], env)
    assert done.returncode == 1
    assert "PYTHON_IMAGE" not in done.stdout


def test_with_gpus_the_worker_alone_changes(rendered):
    plain, gpu = (document["services"] for document in rendered)
    assert {name for name in plain if plain[name] != gpu[name]} == {"worker"}
    (device,) = gpu["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert gpu["worker"]["build"]["dockerfile"].endswith("train.Dockerfile")
    assert gpu["worker"]["secrets"] == plain["worker"]["secrets"]


def script_in(folder):
    """make-secrets in another folder, whose secrets/ is open to all, as git makes it."""
    script = folder / "make-secrets"
    script.write_bytes((COMPOSE / "make-secrets").read_bytes())
    script.chmod(0o755)
    (folder / "secrets").mkdir(exist_ok=True)
    (folder / "secrets").chmod(0o755)
    return script


def make_secrets(folder):
    """Run make-secrets in another folder."""
    done = run([script_in(folder)])
    assert done.returncode == 0, done.stderr
    return done.stdout


def made(folder):
    make_secrets(folder)
    return {path.name for path in (folder / "secrets").iterdir()}


def test_the_folder_is_closed_before_the_first_secret_and_stays_so(tmp_path):
    script = script_in(tmp_path)
    look = f"stat -c %a {tmp_path}/secrets >> {tmp_path}/modes"
    env = program(tmp_path / "bin", "head", f'{look}; exec /usr/bin/head "$@"')
    env |= program(tmp_path / "bin", "mv", f'{look}; /usr/bin/mv "$@"; {look}')
    assert run([script], env).returncode == 0
    modes = (tmp_path / "modes").read_text().split()
    assert len(modes) == 8 * 4
    assert set(modes) == {"700"}


@pytest.mark.parametrize("end", ["kill -9 $PPID", "kill -TERM $PPID", ":"])
def test_a_run_that_is_cut_short_leaves_whole_secrets_alone_and_the_next_completes_them(
    tmp_path, end
):
    count = (
        f"echo >> {tmp_path}/calls; [ $(wc -l < {tmp_path}/calls) -ne 3 ] || {{ {end}; exit 1; }}"
    )
    env = program(tmp_path / "bin", "mv", f'{count}; exec /usr/bin/mv "$@"')
    assert run([script_in(tmp_path)], env).returncode != 0
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert_whole(tmp_path, 2)
    assert make_secrets(tmp_path).count("kept") == 2
    assert_whole(tmp_path, 8)


def assert_whole(folder, number):
    """There are that many secrets, each of them complete."""
    found = list((folder / "secrets").glob("[a-z]*"))
    assert len(found) == number
    for path in found:
        assert re.fullmatch(r"(admin:)?[A-Za-z0-9]{20,48}\n", path.read_text()), path


def test_a_secret_that_came_out_short_or_empty_is_none(tmp_path):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/mlflow_password").touch()
    env = program(tmp_path / "bin", "tr", "echo abcde")
    done = run([script_in(tmp_path)], env)
    assert done.returncode == 1
    assert "postgres_password came out too short" in done.stderr
    assert [path.name for path in (tmp_path / "secrets").iterdir()] == ["mlflow_password"]
    assert make_secrets(tmp_path).count("made") == 8
    assert_whole(tmp_path, 8)


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
    scripts = [COMPOSE / "make-secrets", COMPOSE / "pin"]
    scripts += [INFRA / "docker/with-secrets", INFRA / "k8s/make-secrets"]
    for script in scripts:
        assert os.access(script, os.X_OK)
        assert run(["sh", "-n", script]).returncode == 0
    for name in ("make-databases", "make-buckets", "migrate"):
        assert os.access(INFRA / "docker" / name, os.X_OK)
        compile((INFRA / "docker" / name).read_text(), name, "exec")
    done = run([tool("shellcheck"), *scripts])
    assert done.returncode == 0, done.stdout
