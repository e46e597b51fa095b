"""flows/kubernetes/pools.py: a template that follows Prefect's own and renders to a valid job."""

import asyncio
import copy
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml
from prefect_kubernetes import KubernetesWorker
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from flows.kubernetes import pools
from tests.infra.conftest import INFRA, assert_confined

DEFAULT = KubernetesWorker.get_default_base_job_template()
MISPLACED = ("parallelism", "completions")
"""Fields of a job that Prefect's own template has in the pod; the API server drops them."""


def job(**variables):
    """The job of a flow run, made by Prefect's own templating."""
    # A client is only asked for blocks, which the template has none of: no server is needed.
    made = KubernetesWorkerJobConfiguration.from_template_and_values(
        pools.template(), variables, client=object()
    )
    configuration = asyncio.run(made)
    configuration.env |= {"PREFECT_API_URL": "http://prefect:4200/api"}
    configuration.command = "prefect flow-run execute"
    configuration._populate_env_in_manifest()
    configuration._populate_command_if_not_present()
    configuration._propagate_labels_to_pod()
    return configuration.job_manifest


def valid(manifest):
    """The manifest's pod, after strict validation of all but what Prefect itself misplaces."""
    checked = copy.deepcopy(manifest)
    for name in MISPLACED:
        del checked["spec"]["template"]["spec"][name]
    kubernetes_validate.validate(checked, "1.32", strict=True)
    return checked["spec"]["template"]["spec"]


def test_the_template_has_all_of_the_installed_default():
    ours = pools.template()
    assert ours["variables"]["properties"].keys() > DEFAULT["variables"]["properties"].keys()
    for name, variable in DEFAULT["variables"]["properties"].items():
        kept = {**ours["variables"]["properties"][name], "default": variable.get("default")}
        assert kept == {**variable, "default": variable.get("default")}
    configuration = {**ours["job_configuration"], "job_manifest": None}
    assert configuration == {**DEFAULT["job_configuration"], "job_manifest": None}
    assert contains(
        ours["job_configuration"]["job_manifest"], DEFAULT["job_configuration"]["job_manifest"]
    )


def contains(ours, theirs):
    """Whether a tree has everything of another."""
    if isinstance(theirs, dict):
        return all(key in ours and contains(ours[key], value) for key, value in theirs.items())
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(contains, ours, theirs))
    return ours == theirs


def test_making_a_template_leaves_the_installed_one_as_it_is():
    pools.template()
    assert KubernetesWorker.get_default_base_job_template() == DEFAULT
    assert pools.template() == pools.template()


def test_the_defaults_make_a_valid_confined_job_without_gpus():
    manifest = job()
    pod = valid(manifest)
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] in (0, "0")
    assert container["image"] == "gigagan-pipeline:0.1.0"
    assert_confined(pod, has_claims=True)
    assert pod["securityContext"]["runAsUser"] == pools.USER
    assert manifest["metadata"]["namespace"] == pools.NAMESPACE
    assert manifest["spec"]["template"]["metadata"]["labels"]["gigagan/role"] == "conductor"
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"/dev/shm", "/tmp", "/app/runs"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        v["name"] for v in pod["volumes"]
    }


def test_variables_reach_the_pod():
    pod = valid(
        job(
            gpus=2,
            node_selector={"pool": "a100"},
            tolerations=[{"key": "reserved", "operator": "Exists"}],
            shm_size="32Gi",
            scratch="3Gi",
            store_claim="other",
            store_path="/mnt/store",
            secret="s",
            settings="c",
            image="registry.example.org/x:1",
            memory_limit="7Gi",
        )
    )
    (container,) = pod["containers"]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == 2
    assert container["resources"]["limits"]["memory"] == "7Gi"
    assert pod["nodeSelector"] == {"pool": "a100"}
    assert pod["tolerations"] == [{"key": "reserved", "operator": "Exists"}]
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
    assert volumes["tmp"]["emptyDir"] == {"sizeLimit": "3Gi"}
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["ephemeral-storage"] == "3Gi"
    assert volumes["store"]["persistentVolumeClaim"] == {"claimName": "other"}
    assert {"name": "store", "mountPath": "/mnt/store"} in container["volumeMounts"]
    assert container["envFrom"] == [{"configMapRef": {"name": "c"}}, {"secretRef": {"name": "s"}}]
    assert container["image"] == "registry.example.org/x:1"


@pytest.mark.parametrize("name", pools.VARIABLES)
def test_every_variable_is_used_and_explained(name):
    text = str(pools.template()["job_configuration"])
    assert f"{{{{ {name} }}}}" in text
    assert pools.VARIABLES[name]["description"].endswith(".")


def test_what_the_template_names_is_in_the_manifests():
    documents = [
        document
        for path in (INFRA / "k8s/base").glob("*.yaml")
        for document in yaml.safe_load_all(path.read_text())
        if document["kind"] != "Kustomization"
    ]
    documents += yaml.safe_load_all((INFRA / "k8s/secrets.example.yaml").read_text())
    there = {(document["kind"], document["metadata"]["name"]) for document in documents}
    defaults = {name: variable["default"] for name, variable in pools.VARIABLES.items()}
    assert ("ServiceAccount", pools.PRESETS["service_account_name"]) in there
    assert ("Namespace", pools.NAMESPACE) in there
    assert ("PersistentVolumeClaim", defaults["store_claim"]) in there
    assert ("Secret", defaults["secret"]) in there
    assert ("ConfigMap", defaults["settings"]) in there


def test_without_the_package_the_error_names_it():
    code = (
        "import sys; sys.modules['prefect_kubernetes'] = None\n"
        "from flows.kubernetes import pools\n"
        "try: pools.template()\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=INFRA.parent, check=True
    )
    assert "pip install .[cluster]" in done.stdout
