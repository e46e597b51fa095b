"""The TrainJob of a job: nodes, command, volumes, rights.

The operator sets the PET_* variables from which torchrun knows its node and where all meet. The
store is a claim that pods and pipeline mount at the same path. Secrets are named here, never
written.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any
from urllib.parse import urlsplit

from flows.kubernetes.pools import CONFINED_CONTAINER, CONFINED_POD
from flows.launch.command import SAVE_S, Job, LaunchError
from flows.resources import KubernetesResources, is_secret

GROUP, VERSION = "trainer.kubeflow.org", "v1alpha1"
DIGEST = "gigagan.flows/digest"
"""Annotation that tells the same job from another one of its name."""
SCRATCH = "20Gi"
"""Disk of the node that a pod has for compiled kernels, temporary files and its log."""


def manifest(job: Job) -> dict[str, Any]:
    """The TrainJob, complete with the digest of all that decides what runs."""
    resources, asked = job.resources, job.resources.kubernetes
    _check_reachable(job)
    spec = {
        "runtimeRef": {"name": asked.runtime},
        "trainer": {
            "image": asked.image,
            "command": _command(job),
            "numNodes": resources.nodes,
            "numProcPerNode": resources.processes,
            "env": _environment(job),
            "resourcesPerNode": _quantities(asked),
        },
        "runtimePatches": [
            {
                "manager": "gigagan.flows/launch",
                "trainingRuntimeSpec": _at("template.spec.replicatedJobs", [_patch(asked)]),
            }
        ],
    }
    if resources.deadline_hours:  # should the pipeline not live to see it
        spec["activeDeadlineSeconds"] = round(resources.deadline_hours * 3600)
    labels = {"app.kubernetes.io/name": "gigagan", "app.kubernetes.io/managed-by": "gigagan-flows"}
    if asked.queue:
        labels["kueue.x-k8s.io/queue-name"] = asked.queue
    digest = hashlib.sha256(json.dumps([spec, asked.queue], sort_keys=True).encode()).hexdigest()
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": job.name,
            "namespace": asked.namespace,
            "labels": labels,
            "annotations": {DIGEST: digest[:16]},
        },
        "spec": spec,
    }


def _command(job: Job) -> list[str]:
    """Nodes and where they meet come from PET_*; ranks start again by themselves on one only.

    Among several the static meeting place that the operator prepares knows no second time.
    """
    restarts = job.resources.max_restarts if job.resources.nodes == 1 else 0
    options = [f"--max-restarts={restarts}", f"--shutdown-timeout={SAVE_S}"]
    return ["torchrun", *options, "-m", *job.module]


def _environment(job: Job) -> list[dict[str, Any]]:
    asked = job.resources.kubernetes
    plain = {"PYTHONUNBUFFERED": "1", **job.variables}
    if job.resources.threads:
        plain["OMP_NUM_THREADS"] = str(job.resources.threads)
    for name, value in plain.items():
        if is_secret(name, value):
            raise LaunchError(
                f"{name} is or holds a secret and would stand in the manifest: put it into a "
                "Kubernetes secret and name that in kubernetes.env_from_secrets"
            )
    named = {name: source.split("/") for name, source in asked.env_from_secrets.items()}
    return [
        *({"name": name, "value": value} for name, value in sorted(plain.items())),
        *(
            {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
            for name, (secret, key) in sorted(named.items())
        ),
    ]


def _quantities(asked: KubernetesResources) -> dict[str, dict[str, str]]:
    """Requests equal limits: what was promised is what there is."""
    gpus = str(asked.gpus) if asked.gpus else None
    quantities = {"cpu": asked.cpu, "memory": asked.memory, "nvidia.com/gpu": gpus}
    given = {name: value for name, value in quantities.items() if value}
    given["ephemeral-storage"] = SCRATCH
    return {"requests": given, "limits": dict(given)}


def _patch(asked: KubernetesResources) -> dict[str, Any]:
    """What the runtime's pods get beyond the container: volumes, place, rights, time to save."""
    volumes = [
        {"name": "store", "persistentVolumeClaim": {"claimName": asked.claim}},
        {"name": "tmp", "emptyDir": {"sizeLimit": SCRATCH}},
    ]
    mounts = [
        {"name": "store", "mountPath": asked.mount_path},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if asked.shm:
        memory = {"medium": "Memory", "sizeLimit": asked.shm}
        volumes.append({"name": "shm", "emptyDir": memory})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    node = {"name": "node", "volumeMounts": mounts, "securityContext": CONFINED_CONTAINER}
    pod = {
        "nodeSelector": asked.node_selector,
        "tolerations": [item.model_dump(exclude_none=True) for item in asked.tolerations],
        "serviceAccountName": asked.service_account,
        "imagePullSecrets": [{"name": name} for name in asked.image_pull_secrets],
        "terminationGracePeriodSeconds": SAVE_S + 30,
        "securityContext": CONFINED_POD,
        "volumes": volumes,
        "containers": [node],
    }
    given = {name: value for name, value in pod.items() if value}
    return {"name": "node", "template": _at("spec.template.spec", given)}


def _at(path: str, leaf: Any) -> Any:
    for name in reversed(path.split(".")):
        leaf = {name: leaf}
    return leaf


def _check_reachable(job: Job) -> None:
    """Pods see the store where we see it, and a tracking server, not a file of ours."""
    mount = job.resources.kubernetes.mount_path or ""
    if not f"{job.folder}/".startswith(f"{mount.rstrip('/')}/"):
        raise LaunchError(
            f"the store ({job.folder}) is not below kubernetes.mount_path = {mount}, where pods "
            "mount the claim: set `store` to a folder there, and mount the claim here, too"
        )
    uri = job.variables.get("MLFLOW_TRACKING_URI", "")
    if uri and urlsplit(uri).hostname in (None, "localhost", "127.0.0.1", "::1"):
        scheme = urlsplit(uri).scheme
        raise LaunchError(
            f"MLFLOW_TRACKING_URI ({scheme}) names this machine, which pods do not reach: "
            "start an MLflow server for all and set it to its address"
        )
