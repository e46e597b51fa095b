"""What a stage runs on: processes, nodes, and the cluster that provides them.

Resources never enter a stage's key, and nothing secret is ever part of them.
"""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from gigagan.common.settings import Frozen

REMOTE = frozenset({"slurm", "kubernetes"})
"""Backends that run a stage's process as a job of a cluster."""
SECRET = re.compile(
    r"PASSWORD|PASSWD|SECRET|CREDENTIAL|APIKEY|(?:^|_)(?:TOKEN|KEY|AUTH)(?:_|$)", re.IGNORECASE
)
"""Names of environment variables that hold what nobody else may read."""

_PROCESS = {"backend", "processes", "threads", "max_restarts", "env"}
_PROCESS |= {"nodes", "deadline_hours", "slurm", "kubernetes"}
USED = {
    "download": {"processes"},
    "score": {"processes", "executor", "gpus"},
    "filter": {"processes", "executor"},
    "train_base": _PROCESS,
    "train_upsampler": _PROCESS,
    "evaluate": _PROCESS,
    "adapt": _PROCESS,
}
"""What each stage makes use of; the data stages work in the pipeline's own process."""


def is_secret(name: str, value: str) -> bool:
    """Whether a variable's name speaks of a secret, or its value is a URL with a password."""
    return bool(SECRET.search(name)) or has_password(value)


def has_password(url: str) -> bool:
    """Whether a URL holds a password."""
    try:
        return urlsplit(url).password is not None
    except ValueError:
        return False


class SlurmResources(Frozen):
    """How a job asks Slurm for nodes; the store and the interpreter lie on a shared folder."""

    partition: str | None = None
    """Partition (queue) of the job; null: the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that each node must have, as in `a100&nvlink`."""
    exclude: str | None = None
    """Nodes never to use, as in `node[3,7]`."""
    gpus_per_node: int | None = Field(None, ge=1)
    """GPUs of each node; null: ask for none."""
    cpus_per_task: int | None = Field(None, ge=1)
    """Cores of each node's one task, which its processes share; null: the cluster's default."""
    mem_gb: int | None = Field(None, ge=1)
    """Memory of each node in GB; null: the cluster's default."""
    time_hours: float | None = Field(None, gt=0)
    """Time limit of one job in hours. Two minutes before it ends training is asked to save, and
    another job goes on from there, `max_restarts` times. Null: `deadline_hours`, or else the
    partition's own limit."""
    python: str | None = None
    """Interpreter on the nodes; null: the one that runs the pipeline, or `python` in an image."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the start, as in `module load cuda`. Nothing secret: they are in the
    job's script."""
    container_image: str | None = None
    """Image that Slurm's container plugin (pyxis) runs the processes in; the store is mounted."""
    parameters: dict[str, str] = Field({})
    """Further options of sbatch by long name, as in `{reservation: gan, exclusive: ""}`."""

    @field_validator("setup")
    @classmethod
    def _no_secrets(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        for name, value in re.findall(r"(\w+)=(\S*)", "\n".join(lines)):
            if is_secret(name, value):
                raise ValueError(
                    f"{name} looks like a secret, and the script is kept: set it in the "
                    "environment of the worker, which Slurm jobs inherit"
                )
        return lines

    @field_validator("parameters")
    @classmethod
    def _known_to_sbatch(cls, parameters: dict[str, str]) -> dict[str, str]:
        for name, value in parameters.items():
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or "\n" in value:
                raise ValueError(f"{name!r}: give long names of sbatch options, without dashes")
        return parameters


class Toleration(Frozen):
    """A taint of nodes that the pods may run on all the same."""

    key: str | None = None
    """Name of the taint; null: every taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Whether its value counts."""
    value: str | None = None
    """The value, with `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Null: every effect."""


class KubernetesResources(Frozen):
    """How a TrainJob of Kubeflow Trainer v2 asks for pods, one on each node."""

    namespace: str = "gigagan"
    """Namespace of job and pods."""
    context: str | None = None
    """Context of the kubeconfig; null: the current one, or the pod that the pipeline runs in."""
    image: str | None = None
    """Image of the training pods; it holds the project, and `python` runs it. Required."""
    image_pull_secrets: tuple[str, ...] = ()
    """Secrets with the registry's credentials."""
    runtime: str = "torch-distributed"
    """ClusterTrainingRuntime that the job is made from."""
    queue: str | None = None
    """LocalQueue of Kueue that admits the job; null: it starts at once."""
    gpus: int = Field(0, ge=0)
    """GPUs (nvidia.com/gpu) of each pod."""
    cpu: str | None = None
    """Cores of each pod as a Kubernetes quantity, as in `16` or `500m`."""
    memory: str | None = None
    """Memory of each pod as a Kubernetes quantity, as in `64Gi`."""
    shm: str | None = None
    """Size of /dev/shm as a Kubernetes quantity; it counts as memory. Null: the node's 64 MB."""
    claim: str | None = None
    """PersistentVolumeClaim (ReadWriteMany) that holds the store. Required."""
    mount_path: str | None = None
    """Where the claim is mounted, in training pods as in the pipeline's own: the store lies
    below. Required."""
    node_selector: dict[str, str] = Field({})
    """Labels that a node must have."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that pods may run on."""
    service_account: str | None = None
    """ServiceAccount of the pods; training itself asks nothing of the cluster."""
    env_from_secrets: dict[str, str] = Field({})
    """Environment variables whose values Kubernetes takes from its secrets, as in
    `{AWS_SECRET_ACCESS_KEY: s3-credentials/secret-key}`: variable to SECRET/KEY."""

    @field_validator("env_from_secrets")
    @classmethod
    def _name_and_key(cls, sources: dict[str, str]) -> dict[str, str]:
        for name, source in sources.items():
            if not re.fullmatch(r"[a-z0-9.-]+/[\w.-]+", source):
                # Not the value: somebody may have put the secret itself there.
                raise ValueError(f"{name}: write the name of a secret and its key as SECRET/KEY")
        return sources


class Resources(Frozen):
    """What a stage runs on. Never part of its key: other hardware makes the same output."""

    backend: Literal["auto", "inline", "torchrun", "slurm", "kubernetes"] = "auto"
    """How a training or an evaluation starts: one plain process, torchrun on this machine, or
    torchrun in a job of a cluster. `auto` looks at this machine when it starts. A training gets a
    rank on each GPU, or, without any, a rank of one thread on each core that nobody else uses
    where its networks are small, and one process with a thread on each where they are not. An
    evaluation is one process."""
    processes: int = Field(1, ge=1)
    """Processes: ranks on each node for training, workers for data stages. With `auto`, 1 leaves
    the number open: one process whatever there is free is `inline`."""
    nodes: int = Field(1, ge=1)
    """Nodes of a cluster's job."""
    threads: int | None = Field(None, ge=1)
    """Threads of each process; null shares the cores out evenly, with `auto` those that nobody
    else uses."""
    max_restarts: int = Field(3, ge=0)
    """How often a training starts again from its last checkpoint: all ranks, after one died; the
    cluster's job, after a node was lost or taken away or its time was over."""
    deadline_hours: float | None = Field(None, gt=0)
    """Hours after which a cluster's job is given up, its time in the queue included; null: never.
    Training is asked to save first."""
    executor: Literal["processes", "ray"] = "processes"
    """Where data stages run their shards: processes of this machine, or a Ray cluster (the one of
    RAY_ADDRESS, or a local one)."""
    gpus: float = Field(0.0, ge=0)
    """Share of a CUDA device that Ray gives each worker; without it workers see none."""
    env: dict[str, str] = Field({})
    """Further environment variables for child processes; nothing secret."""
    slurm: SlurmResources = SlurmResources()
    """For the backend `slurm`."""
    kubernetes: KubernetesResources = KubernetesResources()
    """For the backend `kubernetes`."""

    @property
    def is_remote(self) -> bool:
        """Whether a cluster runs the stage's process."""
        return self.backend in REMOTE

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if is_secret(name, value):
                raise ValueError(
                    f"{name} looks like a secret, and settings are recorded in many places: "
                    "set it in the environment of the worker, which child processes and Slurm "
                    "jobs inherit; for pods use kubernetes.env_from_secrets"
                )
        return env

    @model_validator(mode="after")
    def _agree(self) -> Resources:
        for name in ("nodes", "deadline_hours"):
            if not self.is_remote and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} = {getattr(self, name)} with backend {self.backend}: "
                    "only a cluster's job has it (slurm, kubernetes)"
                )
        if self.backend == "kubernetes":
            for name in ("image", "claim", "mount_path"):
                if not getattr(self.kubernetes, name):
                    raise ValueError(f"backend kubernetes needs kubernetes.{name}")
        return self


class ResourcesConfig(Frozen):
    """Resources of every stage."""

    download: Resources = Resources()
    """For the download."""
    score: Resources = Resources()
    """For scoring; a process per device."""
    filter: Resources = Resources()
    """For selection and sharding."""
    train_base: Resources = Resources()
    """For training the base generator."""
    train_upsampler: Resources = Resources()
    """For training the upsampler."""
    evaluate: Resources = Resources()
    """For the evaluation."""
    adapt: Resources = Resources()
    """For adapting a base."""

    @model_validator(mode="after")
    def _used(self) -> ResourcesConfig:
        """What would be ignored without a word is refused."""
        for stage, used in USED.items():
            given: Resources = getattr(self, stage)
            for name in type(given).model_fields.keys() - used:
                if getattr(given, name) != type(given).model_fields[name].default:
                    raise ValueError(
                        f"{stage}.{name} = {getattr(given, name)!r} has no effect: "
                        f"this stage uses {', '.join(sorted(used))}"
                    )
            if "backend" in used and given.backend == "inline" and given.processes > 1:
                raise ValueError(
                    f"{stage}.processes = {given.processes} with backend inline, which is one "
                    "process: choose auto, torchrun, slurm or kubernetes"
                )
        for stage in ("evaluate", "adapt"):
            given = getattr(self, stage)
            if (ranks := given.processes * given.nodes) > 1:
                raise ValueError(f"{stage} has {ranks} processes: it works in one")
        return self
