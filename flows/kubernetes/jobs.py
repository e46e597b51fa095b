"""A job in a Kubernetes cluster: a TrainJob of Kubeflow Trainer v2, admitted by Kueue.

One of its name that runs is adopted; what has ended makes room for another. Reads and deletes
nothing but that job, its pods and their log.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import yaml

from flows.kubernetes.manifest import DIGEST, GROUP, VERSION, manifest
from flows.launch import cluster as remote
from flows.launch.cluster import Ending, Unreachable, patiently
from flows.launch.command import SAVE_S, Job, LaunchError, Output

PLURAL = "trainjobs"
SEEN = ".kubernetes-seen"
"""Time of the last line that was copied into the log file: an adopted job goes on from there."""
TIMEOUT_S = 30.0
LOG_OVERLAP_S = 30
"""Log lines are asked for again this far back, since clocks differ; known ones are dropped."""
ROLE = "give the pipeline's service account the role of infra/k8s (or `kubectl auth can-i`)"

Result = TypeVar("Result")


def run(job: Job, output: Output) -> None:
    """Run a job to its end; `LaunchError` when it fails."""
    remote.run(TrainJob(job, output), job, output)


def render(job: Job) -> str:
    """The manifest."""
    return yaml.safe_dump(manifest(job), sort_keys=False)


class TrainJob:
    """A `remote.Cluster`."""

    def __init__(self, job: Job, output: Output):
        self.job = job
        self.output = output
        self.is_live = False
        self._asked = job.resources.kubernetes
        self._said = ""
        self._seen = (job.folder / SEEN).read_text() if (job.folder / SEEN).exists() else ""
        self._client = _client(self._asked.context)
        self._heard = 0.0

    @property
    def handle(self) -> str:
        """The command that ends it by hand."""
        return f"kubectl -n {self._asked.namespace} delete trainjob {self.job.name}"

    def start(self) -> None:
        """Adopt the job of this name if it is running, or create it."""
        body = manifest(self.job)
        self._said, self._heard = "", 0.0
        found = patiently(self._get, self.output)
        if found and not _ended(found) and not found["metadata"].get("deletionTimestamp"):
            self._adopt(found, body["metadata"]["annotations"][DIGEST])
            return
        if found:
            patiently(self._delete, self.output)
            self._await_gone()
        patiently(lambda: self._create(body), self.output)
        self.is_live = True
        self.output.say(f"{self.job.name}: created in namespace {self._asked.namespace}")

    def poll(self) -> Ending | None:
        """Pass on what it printed since; None while it waits or runs."""
        found = self._get()
        if found is None:
            self.is_live = False
            return Ending("failed", "was deleted from the cluster")
        pods = self._pods()
        self._pass_on(pods)
        if (condition := _ended(found)) is None:
            self._announce(found, pods)
            return None
        self.is_live = False
        ending = self._ending(condition, pods)
        if ending.how == "done":  # its output is in the store, its log in our file
            self._delete()
        return ending

    def stop(self) -> None:
        """Ask it to save and end."""
        self._delete()

    def kill(self) -> None:
        """What is deleted ends by itself when its grace period is over."""
        if self.is_live:
            self.output.say(f"{self.job.name} is still there: look with `{self.handle} --wait`")

    def _adopt(self, found: Mapping[str, Any], digest: str) -> None:
        if found["metadata"].get("annotations", {}).get(DIGEST) != digest:
            raise LaunchError(
                f"TrainJob {self.job.name} in namespace {self._asked.namespace} runs another "
                f"command (other resources, or another store): wait for it, or `{self.handle}`"
            )
        self.is_live = True
        self.output.say(f"{self.job.name}: is there already and is followed")

    def _get(self) -> dict[str, Any] | None:
        api = self._client.CustomObjectsApi()
        return self._ask(
            lambda: api.get_namespaced_custom_object(
                *self._place, self.job.name, _request_timeout=TIMEOUT_S
            ),
            is_optional=True,
        )

    def _create(self, body: dict[str, Any]) -> None:
        api = self._client.CustomObjectsApi()
        self._ask(
            lambda: api.create_namespaced_custom_object(
                *self._place, body, _request_timeout=TIMEOUT_S
            ),
            known=(409,),  # an answer was lost on its way: it is there
        )

    def _delete(self) -> None:
        api = self._client.CustomObjectsApi()
        # Its pods first: once it is gone, so are they.
        options = {"propagation_policy": "Foreground", "_request_timeout": TIMEOUT_S}
        self._ask(
            lambda: api.delete_namespaced_custom_object(*self._place, self.job.name, **options),
            is_optional=True,
        )

    def _await_gone(self) -> None:
        until = time.monotonic() + SAVE_S + remote.MARGIN_S
        while patiently(self._get, self.output) is not None:
            if time.monotonic() > until:
                raise LaunchError(
                    f"TrainJob {self.job.name} was deleted and does not go: look at its "
                    f"finalizers and pods in namespace {self._asked.namespace}"
                )
            time.sleep(remote.POLL_S)

    def _pods(self) -> list[Any]:
        api = self._client.CoreV1Api()
        labels = f"jobset.sigs.k8s.io/jobset-name={self.job.name}"
        listed = self._ask(
            lambda: api.list_namespaced_pod(
                self._asked.namespace, label_selector=labels, _request_timeout=TIMEOUT_S
            )
        )
        return sorted(listed.items, key=lambda pod: pod.metadata.creation_timestamp)

    def _pass_on(self, pods: list[Any]) -> None:
        """New lines of rank 0, which lives in the pod with index 0."""
        index = "batch.kubernetes.io/job-completion-index"
        first = [pod for pod in pods if (pod.metadata.labels or {}).get(index) == "0"]
        if not first or first[-1].status.phase == "Pending":
            return
        lines = [(time, text) for time, text in self._lines(first[-1]) if time > self._seen]
        with self.job.log_file.open("a") as file:
            for stamp, text in lines:
                self._seen = stamp
                file.write(f"{text}\n")
                file.flush()
                self.output.take(text)
        if lines:
            (self.job.folder / SEEN).write_text(self._seen)

    def _lines(self, pod: Any) -> Iterator[tuple[str, str]]:
        """Lines with their times, from a little before the last question on."""
        api, now = self._client.CoreV1Api(), time.monotonic()
        since = {"since_seconds": round(now - self._heard) + LOG_OVERLAP_S} if self._heard else {}
        text = self._ask(
            lambda: api.read_namespaced_pod_log(
                pod.metadata.name,
                self._asked.namespace,
                container="node",
                timestamps=True,
                _request_timeout=TIMEOUT_S,
                _preload_content=False,
                **since,
            ).data.decode(errors="replace"),
            is_optional=True,
            known=(400,),  # the container has not started, or its node is gone
        )
        if text is not None:
            self._heard = now
        for line in (text or "").splitlines():
            stamp, _, said = line.partition(" ")
            yield _sortable(stamp), said

    def _announce(self, found: Mapping[str, Any], pods: list[Any]) -> None:
        """Say what it waits for, whenever that changes."""
        now = "runs"
        if _condition(found, "Suspended"):
            now = f"waits in queue {self._asked.queue}" if self._asked.queue else "is suspended"
        elif not pods or any(pod.status.phase == "Pending" for pod in pods):
            reasons = [reason for pod in pods for reason in _troubles(pod)]
            now = "waits for its pods" + "".join(f"; {reason}" for reason in sorted({*reasons}))
        if now != self._said:
            self.output.say(f"{self.job.name}: {now}")
        self._said = now

    def _ending(self, condition: Mapping[str, Any], pods: list[Any]) -> Ending:
        if condition["type"] == "Complete":
            return Ending("done", "")
        why = condition.get("message") or condition.get("reason") or "no reason given"
        if condition.get("reason") == "DeadlineExceeded":
            return Ending("failed", "did not end within deadline_hours")
        if taken := [cause for pod in pods if (cause := _disruption(pod))]:
            return Ending("lost", f"lost a pod ({taken[0]})")
        if self.output.has_saved:
            return Ending("lost", "was asked by the cluster to stop, and has saved")
        return Ending("failed", f"failed in Kubernetes ({why})")

    @property
    def _place(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self._asked.namespace, PLURAL

    def _ask(
        self, call: Callable[[], Result], *, is_optional: bool = False, known: tuple[int, ...] = ()
    ) -> Any:
        """An answer of the API server; None for what is not there or `known`."""
        from urllib3.exceptions import HTTPError

        where = self._client.ApiClient().configuration.host
        try:
            return call()
        except self._client.ApiException as error:
            if error.status in known or (is_optional and _is_missing(error)):
                return None
            if error.status in (429, 500, 502, 503, 504):
                raise Unreachable(f"{where} answers {error.status}") from error
            raise LaunchError(self._explain(error, where)) from error
        except (HTTPError, OSError) as error:
            raise Unreachable(f"{where} is out of reach ({type(error).__name__})") from error

    def _explain(self, error: Any, where: str) -> str:
        said = _message(error)
        if error.status == 401:
            return f"{where} does not know us (401): renew the kubeconfig or the token"
        if error.status == 403:
            return f"{where} forbids it ({said}): {ROLE}"
        if error.status == 404 and f'namespaces "{self._asked.namespace}"' in said:
            return f"no namespace {self._asked.namespace}: create it, or set kubernetes.namespace"
        if error.status == 404:
            return f"{where} has no TrainJobs: install Kubeflow Trainer v2 (2.2 or later)"
        return f"{where} refuses {self.job.name} ({error.status}): {said}"


def _client(context: str | None) -> Any:
    try:
        from kubernetes import client, config
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the backend kubernetes needs the package `kubernetes`: pip install kubernetes"
        ) from error
    try:
        # The package looks at KUBECONFIG when it is imported, and only then.
        given = {"config_file": os.environ.get("KUBECONFIG"), "context": context}
        config.load_config(**{name: value for name, value in given.items() if value})
    except (config.ConfigException, OSError) as error:
        raise LaunchError(
            f"no way to a Kubernetes cluster ({error}): set KUBECONFIG, or run the pipeline in a "
            "pod with a service account"
        ) from error
    return client


def _condition(found: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    conditions = found.get("status", {}).get("conditions", [])
    true = [c for c in conditions if c["type"] == kind and c["status"] == "True"]
    return true[0] if true else None


def _ended(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return _condition(found, "Complete") or _condition(found, "Failed")


def _disruption(pod: Any) -> str | None:
    """Why the cluster took a pod away, if it did."""
    for condition in pod.status.conditions or []:
        if condition.type == "DisruptionTarget" and condition.status == "True":
            return str(condition.reason)
    return pod.status.reason if pod.status.reason in ("Evicted", "NodeLost", "Shutdown") else None


def _troubles(pod: Any) -> Iterator[str]:
    """What keeps a pod from starting, as a person would look for it."""
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            yield f"{condition.reason}: {condition.message}"
    for status in pod.status.container_statuses or []:
        if status.state.waiting and status.state.waiting.reason != "ContainerCreating":
            yield str(status.state.waiting.reason)


def _sortable(stamp: str) -> str:
    """RFC 3339 with trailing zeros dropped, as strings that sort by time."""
    seconds, _, fraction = stamp.rstrip("Z").partition(".")
    return f"{seconds}.{fraction:0<9}"


def _is_missing(error: Any) -> bool:
    """A named thing is not there, rather than its kind."""
    return error.status == 404 and "could not find the requested resource" not in _message(error)


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (KeyError, TypeError, ValueError):
        return str(error.body or error.reason)
