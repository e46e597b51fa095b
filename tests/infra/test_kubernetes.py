"""infra/k8s: both overlays render to what a cluster takes, confine every pod, hold no secret."""

import ipaddress
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubernetes.utils.quantity import parse_quantity

from data.web.addresses import is_public
from flows.config import PipelineConfig
from flows.kubernetes.manifest import manifest
from flows.launch.command import Job
from gigagan.common.settings import parse_assignments
from tests.infra.conftest import INFRA, assert_confined, pod_specs, run, tool

K8S = INFRA / "k8s"
VERSION = "1.32"
OVERLAYS = ["small", "gpu-cluster"]
CUSTOM = ("kueue.x-k8s.io/", "trainer.kubeflow.org/")
CLUSTER_WIDE = {"Namespace", "ClusterQueue", "ResourceFlavor"}


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request):
    """The documents that an overlay renders to."""
    done = run([tool("kubectl"), "kustomize", K8S / "overlays" / request.param])
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def kinds(documents, *names):
    return [document for document in documents if document["kind"] in names]


def named(documents, kind, name):
    (found,) = [d for d in kinds(documents, kind) if d["metadata"]["name"] == name]
    return found


def pods(documents):
    """Pod templates by the name of their owner."""
    owners = kinds(documents, "Deployment", "StatefulSet", "Job")
    return {owner["metadata"]["name"]: owner["spec"]["template"] for owner in owners}


def containers(template):
    return [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]


def variables(documents):
    """Every container's variables: (pod, name, where from)."""
    for name, template in pods(documents).items():
        for container in containers(template):
            for variable in container.get("env", ()):
                yield name, variable["name"], variable


OTHERS = {"kustomization.yaml", "resources.yaml"}  # the latter is settings of ours
SOURCES = sorted(path for path in K8S.rglob("*.yaml") if path.name not in OTHERS)


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(K8S)) for path in SOURCES])
def test_every_file_is_valid_as_it_stands(path):
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents
    for document in documents:
        if not document["apiVersion"].startswith(CUSTOM):
            kubernetes_validate.validate(document, VERSION, strict=True)


def test_every_document_is_valid_and_in_our_namespace(overlay):
    for document in overlay:
        if not document["apiVersion"].startswith(CUSTOM):
            kubernetes_validate.validate(document, VERSION, strict=True)
        namespace = None if document["kind"] in CLUSTER_WIDE else "gigagan"
        assert document["metadata"].get("namespace") == namespace, document["metadata"]
    names = [(d["kind"], d["metadata"]["name"]) for d in overlay]
    assert len(set(names)) == len(names)


def test_every_pod_is_confined_and_limited(overlay):
    found = []
    for document in overlay:
        for pod in pod_specs(document):
            found.append(document["metadata"]["name"])
            assert_confined(pod, has_claims="volumeClaimTemplates" in document["spec"])
    assert sorted(found) == sorted(pods(overlay))
    enforced = named(overlay, "Namespace", "gigagan")["metadata"]["labels"]
    assert enforced["pod-security.kubernetes.io/enforce"] == "restricted"


def test_whatever_serves_is_probed_and_one_pod_alone_talks_to_the_cluster(overlay):
    for owner in kinds(overlay, "Deployment", "StatefulSet"):
        (container,) = owner["spec"]["template"]["spec"]["containers"]
        assert "livenessProbe" in container, owner["metadata"]["name"]
    for service in kinds(overlay, "Service"):
        template = pods(overlay)[service["metadata"]["name"]]
        assert service["spec"]["selector"] == template["metadata"]["labels"]
        assert "readinessProbe" in template["spec"]["containers"][0]
    tokens = {
        name
        for name, template in pods(overlay).items()
        if template["spec"].get("automountServiceAccountToken", True)
    }
    assert tokens == {"worker"}


def test_secrets_come_by_reference_and_every_one_is_in_the_example(overlay):
    assert not kinds(overlay, "Secret")
    known = {}
    for document in yaml.safe_load_all((K8S / "secrets.example.yaml").read_text()):
        known[document["metadata"]["name"]] = set(document["stringData"])
    used = set()
    for _, name, variable in variables(overlay):
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        if reference:
            used.add((reference["name"], reference["key"]))
        elif re.search(r"PASSWORD|SECRET|AUTH_STRING|ACCESS_KEY", name):
            assert variable["value"].startswith(("/run/secrets/", "client", "PREFECT_API"))
    assert all(key in known[secret] for secret, key in used)
    mounted = {("postgres", "password")}
    assert used | mounted == {(secret, key) for secret, keys in known.items() for key in keys}


def test_the_example_holds_placeholders_and_the_script_fills_all_of_them():
    example = (K8S / "secrets.example.yaml").read_text()
    values = [
        value
        for document in yaml.safe_load_all(example)
        for value in document["stringData"].values()
    ]
    assert set(values) == {"CHANGE-ME"}

    done = run(
        [K8S / "make-secrets"], {"AWS_ACCESS_KEY_ID": "given", "AWS_SECRET_ACCESS_KEY": "it"}
    )
    assert done.returncode == 0, done.stderr
    secrets = list(yaml.safe_load_all(done.stdout))
    made = {secret["metadata"]["name"]: secret["stringData"] for secret in secrets}
    assert [set(data) for data in made.values()] == [
        set(document["stringData"]) for document in yaml.safe_load_all(example)
    ]
    client = made["client"]
    assert (client["AWS_ACCESS_KEY_ID"], client["AWS_SECRET_ACCESS_KEY"]) == ("given", "it")
    assert re.fullmatch(r"admin:[A-Za-z0-9]{40}", client["PREFECT_API_AUTH_STRING"])
    random = [*made["postgres"].values(), made["mlflow"]["secret-key"]]
    assert len({*random, client["MLFLOW_TRACKING_PASSWORD"]}) == len(random) + 1
    assert "CHANGE-ME" not in "".join(random)
    for secret in secrets:
        kubernetes_validate.validate(secret, VERSION, strict=True)


def test_a_script_that_is_cut_short_prints_no_part_of_a_secret(tmp_path):
    stub = tmp_path / "tr"  # from its fifth call on it is ended after five letters
    stub.write_text(
        f"#!/bin/sh\necho >> {tmp_path}/calls\n"
        f'[ $(wc -l < {tmp_path}/calls) -lt 5 ] && exec /usr/bin/tr "$@"\necho abcde\n'
    )
    stub.chmod(0o755)
    done = run([K8S / "make-secrets"], {"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert (done.returncode, done.stdout) == (1, "")
    assert "too short" in done.stderr


def test_one_of_two_keys_is_refused():
    done = run([K8S / "make-secrets"], {"AWS_ACCESS_KEY_ID": "given"})
    assert (done.returncode, done.stdout) == (1, "")
    assert "set both" in done.stderr


def test_roles_are_as_small_as_they_can_be(overlay):
    assert not kinds(overlay, "ClusterRole", "ClusterRoleBinding")
    for role in kinds(overlay, "Role"):
        for rule in role["rules"]:
            assert not {"*", "secrets", "pods/exec"} & {*rule["resources"], *rule["verbs"]}
    for binding in kinds(overlay, "RoleBinding"):
        assert binding["roleRef"]["name"] == binding["metadata"]["name"]
        (subject,) = binding["subjects"]
        named(overlay, "ServiceAccount", subject["name"])


def policies(overlay, labels):
    """Network policies that select a pod with these labels."""
    for policy in kinds(overlay, "NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        if _selects(selector, labels):
            yield policy


def _selects(selector, labels):
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", ()):
        values = expression.get("values")
        if expression["operator"] == "Exists" and expression["key"] not in labels:
            return False
        if expression["operator"] == "In" and labels.get(expression["key"]) not in values:
            return False
    return True


CONDUCTOR = {"gigagan/role": "conductor"}
TRAINING = {"jobset.sigs.k8s.io/jobset-name": "train-base-0123abcd"}


def _server(name):
    return {"app.kubernetes.io/name": name}


def may_reach(overlay, source, target, port):
    """Whether policies let a pod with some labels reach a pod with others."""

    def allowed(rules, side, other):
        return any(
            any(
                _selects(peer["podSelector"], other) for peer in rule[side] if "podSelector" in peer
            )
            and (not rule.get("ports") or port in {p["port"] for p in rule["ports"]})
            for rule in rules
        )

    out = [rule for p in policies(overlay, source) for rule in p["spec"].get("egress", ())]
    into = [rule for p in policies(overlay, target) for rule in p["spec"].get("ingress", ())]
    return allowed(out, "to", target) and allowed(into, "from", source)


@pytest.mark.parametrize(
    ("source", "target", "port", "expected"),
    [
        (CONDUCTOR, "prefect", 4200, True),
        (CONDUCTOR, "mlflow", 5000, True),
        (CONDUCTOR, "postgres", 5432, False),
        (TRAINING, "mlflow", 5000, True),
        (TRAINING, "prefect", 4200, False),
        (TRAINING, "postgres", 5432, False),
        (_server("worker"), "prefect", 4200, True),
        (_server("worker"), "mlflow", 5000, False),
        (_server("prefect"), "postgres", 5432, True),
        (_server("mlflow"), "postgres", 5432, True),
        (_server("databases"), "postgres", 5432, True),
        ({"app": "a stranger"}, "prefect", 4200, False),
        ({"app": "a stranger"}, "postgres", 5432, False),
    ],
)
def test_pods_reach_what_they_need_and_nothing_else(overlay, source, target, port, expected):
    assert may_reach(overlay, source, _server(target), port) is expected


def test_training_pods_reach_each_other_and_no_address_of_the_web(overlay):
    assert may_reach(overlay, TRAINING, TRAINING, 29500)
    assert not may_reach(overlay, CONDUCTOR, TRAINING, 29500)
    wide = [block for block in blocks(overlay, TRAINING) if block.prefixlen < 24]
    assert not wide


def blocks(overlay, labels):
    """Networks that a pod may reach, whatever is excepted."""
    for policy in policies(overlay, labels):
        for rule in policy["spec"].get("egress", ()):
            for peer in rule["to"]:
                if "ipBlock" in peer:
                    yield ipaddress.ip_network(peer["ipBlock"]["cidr"])


def downloads_from(overlay, address):
    """Whether the downloader's own policy lets it reach an address."""
    ip = ipaddress.ip_address(address)
    rules = named(overlay, "NetworkPolicy", "conductor")["spec"]["egress"]
    found = [peer["ipBlock"] for rule in rules for peer in rule["to"] if "ipBlock" in peer]
    return any(
        ip in ipaddress.ip_network(block["cidr"])
        and not any(ip in ipaddress.ip_network(hole) for hole in block["except"])
        for block in found
        if ipaddress.ip_network(block["cidr"]).version == ip.version
    )


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1::1946"])
def test_the_downloader_reaches_public_addresses(overlay, address):
    assert is_public(address)
    assert downloads_from(overlay, address)


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.0.0.1", "10.96.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254"),
        *("172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1", "192.168.1.1"),
        *("198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1"),
        *("255.255.255.255", "::", "::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "fc00::1"),
        *("fd00:ec2::254", "fe80::1", "ff02::1", "2001:db8::1", "2002:a00:1::1"),
    ],
)
def test_the_downloader_reaches_no_private_address(overlay, address):
    assert not is_public(address)
    assert not downloads_from(overlay, address)


def test_the_gpu_queue_is_the_one_that_our_quota_covers():
    documents = list(yaml.safe_load_all((K8S / "overlays/gpu-cluster/queue.yaml").read_text()))
    queue = named(documents, "ClusterQueue", "gigagan")["spec"]
    (group,) = queue["resourceGroups"]
    (flavor,) = group["flavors"]
    assert flavor["name"] == named(documents, "ResourceFlavor", "gpu")["metadata"]["name"]
    assert [quota["name"] for quota in flavor["resources"]] == group["coveredResources"]
    assert "nvidia.com/gpu" in group["coveredResources"]
    assert named(documents, "LocalQueue", "gpu")["spec"] == {"clusterQueue": "gigagan"}
    assert queue["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] == "gigagan"


@pytest.fixture
def trainjob():
    """The TrainJob of a training on the example resources."""
    text = (K8S / "resources.yaml").read_text()
    config = PipelineConfig.preset("laion-64").override(parse_assignments([f"resources={text}"]))
    log = Path("/app/runs/store/train-base/0123456789abcdef/log")
    return manifest(Job(["m"], config.resources.train_base, log))


def test_training_pods_are_confined_and_limited(trainjob):
    trainer = trainjob["spec"]["trainer"]
    (pod,) = pod_specs(trainjob["spec"]["runtimePatches"])
    (node,) = pod["containers"]
    whole = {**node, "image": trainer["image"], "resources": trainer["resourcesPerNode"]}
    assert_confined({**pod, "containers": [whole]}, has_claims=True)
    assert {"mountPath": "/tmp", "name": "tmp"} in node["volumeMounts"]


def test_the_queue_has_a_quota_for_all_that_training_pods_ask_for(trainjob):
    documents = list(yaml.safe_load_all((K8S / "overlays/gpu-cluster/queue.yaml").read_text()))
    (group,) = named(documents, "ClusterQueue", "gigagan")["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    quotas = {quota["name"]: quota["nominalQuota"] for quota in flavor["resources"]}
    trainer = trainjob["spec"]["trainer"]
    for name, amount in trainer["resourcesPerNode"]["requests"].items():
        assert parse_quantity(amount) * trainer["numNodes"] <= parse_quantity(quotas[name]), name


def test_a_budget_guards_only_what_has_a_second_replica(overlay):
    for budget in kinds(overlay, "PodDisruptionBudget"):
        selector = budget["spec"]["selector"]["matchLabels"]
        (owner,) = [
            document
            for document in kinds(overlay, "Deployment", "StatefulSet")
            if document["spec"]["selector"]["matchLabels"] == selector
        ]
        assert owner["spec"]["replicas"] > budget["spec"]["minAvailable"]
