"""The work pool of a Kubernetes cluster: the installed default, and what our pods need on top.

Derived, so that it follows Prefect's own template through upgrades. Names in here are those of
infra/k8s/base; each is a variable of the pool and may be changed in Prefect's form. Talks to no
server and no cluster.
"""

from __future__ import annotations

from typing import Any

POOL = "kubernetes"
"""The pool of the conductors: small CPU pods. GPUs are for the jobs that they launch."""
USER = 10001
"""The user id of the images in infra/docker."""
CONFINED_POD: dict[str, Any] = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    # A store of millions of files is not walked at every start.
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""`securityContext` of conductors' and training's pods, which write to one store as one user."""
CONFINED_CONTAINER: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
"""`securityContext` of their containers: what is written goes to the store or to /tmp."""
NAMESPACE = "gigagan"
PRESETS: dict[str, Any] = {
    "namespace": NAMESPACE,
    "image": "gigagan-pipeline:0.1.0",
    "service_account_name": "conductor",
    "finished_job_ttl": 86400,
    "pod_watch_timeout_seconds": 600,  # a node may have to start first
    "cpu_request": "1",
    "cpu_limit": "8",
    "memory_request": "4Gi",
    "memory_limit": "16Gi",
}
"""Other defaults for variables that Prefect's template has."""
LABELS = {"gigagan/role": "conductor"}
"""What network policies know the pods by."""

VARIABLES: dict[str, dict[str, Any]] = {
    "gpus": {
        "title": "GPUs",
        "description": "nvidia.com/gpu of the pod. A conductor needs none: it launches jobs.",
        "type": "integer",
        "minimum": 0,
        "default": 0,
    },
    "node_selector": {
        "title": "Node selector",
        "description": "Labels that a node must have.",
        "type": "object",
        "additionalProperties": {"type": "string"},
        "default": {},
    },
    "tolerations": {
        "title": "Tolerations",
        "description": "Taints of nodes that the pod may run on.",
        "type": "array",
        "items": {"type": "object"},
        "default": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    },
    "shm_size": {
        "title": "Size of /dev/shm",
        "description": "Shared memory of data loaders; counts as memory of the pod.",
        "type": "string",
        "default": "8Gi",
    },
    "scratch": {
        "title": "Scratch",
        "description": "Disk of the node for /tmp and the log; a pod that needs more is evicted.",
        "type": "string",
        "default": "20Gi",
    },
    "store_claim": {
        "title": "Store",
        "description": "PersistentVolumeClaim of all outputs (ReadWriteMany).",
        "type": "string",
        "default": "store",
    },
    "store_path": {
        "title": "Folder of the store",
        "description": "Where the claim is mounted; the setting `store` is a folder in it.",
        "type": "string",
        "default": "/app/runs",
    },
    "secret": {
        "title": "Secret",
        "description": "Secret whose keys become environment variables (MLflow, S3).",
        "type": "string",
        "default": "client",
    },
    "settings": {
        "title": "Settings",
        "description": "ConfigMap whose keys become environment variables (addresses).",
        "type": "string",
        "default": "client",
    },
}
"""Variables that Prefect's template lacks."""


def template() -> dict[str, Any]:
    """The base job template of the pool `kubernetes`.

    Raises `ModuleNotFoundError` naming the package when prefect-kubernetes is not installed.
    """
    try:
        from prefect_kubernetes import KubernetesWorker
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a Kubernetes pool needs the package prefect-kubernetes: `pip install .[cluster]`"
        ) from error
    made: dict[str, Any] = KubernetesWorker.get_default_base_job_template()
    _add_variables(made["variables"]["properties"])
    job = made["job_configuration"]["job_manifest"]["spec"]
    job["template"]["metadata"] = {"labels": dict(LABELS)}
    pod = job["template"]["spec"]
    pod |= _pod()
    (container,) = pod["containers"]
    limits = container["resources"]["limits"]
    pod["containers"] = [container | _container(limits)]
    return made


def _add_variables(properties: dict[str, Any]) -> None:
    for name, default in PRESETS.items():
        properties[name] = {**properties[name], "default": default}
    properties |= {name: dict(variable) for name, variable in VARIABLES.items()}


def _pod() -> dict[str, Any]:
    """What the pod's specification gets."""
    return {
        "nodeSelector": "{{ node_selector }}",
        "tolerations": "{{ tolerations }}",
        "securityContext": CONFINED_POD,
        # Training that was asked to stop saves its state first.
        "terminationGracePeriodSeconds": 120,
        "enableServiceLinks": False,  # PREFECT_PORT=tcp://… would look like settings
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "{{ shm_size }}"}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "{{ scratch }}"}},
            {"name": "store", "persistentVolumeClaim": {"claimName": "{{ store_claim }}"}},
        ],
    }


def _container(limits: dict[str, Any]) -> dict[str, Any]:
    """What the flow's container gets; its own `env` stays Prefect's."""
    disk = {"ephemeral-storage": "{{ scratch }}"}
    return {
        "resources": {
            "limits": {**limits, **disk, "nvidia.com/gpu": "{{ gpus }}"},
            "requests": {"cpu": "{{ cpu_request }}", "memory": "{{ memory_request }}", **disk},
        },
        "envFrom": [
            {"configMapRef": {"name": "{{ settings }}"}},
            {"secretRef": {"name": "{{ secret }}"}},
        ],
        "securityContext": CONFINED_CONTAINER,
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "store", "mountPath": "{{ store_path }}"},
        ],
    }
