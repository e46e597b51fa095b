"""The part of a Kubernetes API that TrainJobs need, over HTTP; containers are real processes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from flows.serve import services

JOBS = re.compile(r"/apis/trainer.kubeflow.org/v1alpha1/namespaces/gan/trainjobs(?:/([\w-]+))?")
PODS = re.compile(r"/api/v1/namespaces/gan/pods(?:/([\w-]+)/log)?")
TOKEN = "token-of-a-test"


def now():
    """As Kubernetes writes it, with nanoseconds of which zeros at the end are dropped."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f").rstrip("0") + "Z"


class Pod:
    """A container that runs as a process of this machine."""

    def __init__(self, job, index, environment):
        trainer = job["spec"]["trainer"]
        name = job["metadata"]["name"]
        self.name, self.index, self.lines = f"{name}-node-0-{index}-x7k2p", index, []
        self.created, self.conditions = now(), []
        self.environment = environment
        self.process = subprocess.Popen(
            trainer["command"],
            env={**os.environ, **environment, "PET_NODE_RANK": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        with self.process.stdout as lines:
            for line in lines:
                self.lines.append((now(), line.rstrip("\n")))
        self.process.wait()

    @property
    def phase(self):
        status = self.process.poll()
        return "Running" if status is None else "Failed" if status else "Succeeded"

    def strike(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def show(self, job):
        labels = {
            "jobset.sigs.k8s.io/jobset-name": job,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(self.index),
        }
        return {
            "metadata": {"name": self.name, "labels": labels, "creationTimestamp": self.created},
            "status": {"phase": self.phase, "conditions": self.conditions},
        }


class Cluster(ThreadingHTTPServer):
    """Namespace `gan` of a cluster with Kubeflow Trainer."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.jobs, self.pods, self.created, self.paths = {}, {}, [], []
        self.secrets = {}
        self.answers_with = None
        """A status that every request gets."""
        self.is_queued = False
        self.troubles = []
        """Conditions of pods that do not start."""

    def create(self, job):
        """As the operator does: an admitted job gets its pods."""
        name = job["metadata"]["name"]
        self.created.append(job)
        self.jobs[name], self.pods[name] = job, []
        if self.is_queued:
            condition = {"type": "Suspended", "status": "True", "reason": "Suspended"}
            job["status"] = {"conditions": [condition | {"lastTransitionTime": now()}]}
        else:
            self.admit(name)

    def admit(self, name):
        job = self.jobs[name]
        job["status"] = {"conditions": []}
        if self.troubles:
            return
        trainer = job["spec"]["trainer"]
        environment = {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(services.free_port()),
        }
        for variable in trainer["env"]:
            source = variable.get("valueFrom", {}).get("secretKeyRef")
            secret = self.secrets[source["name"]][source["key"]] if source else None
            environment[variable["name"]] = secret or variable["value"]
        self.pods[name] = [Pod(job, i, environment) for i in range(trainer["numNodes"])]
        threading.Thread(target=self._supervise, args=(job, self.pods[name])).start()

    def _supervise(self, job, pods):
        for pod in pods:
            pod.reader.join()
        failed = any(pod.phase == "Failed" for pod in pods)
        kind, reason = ("Failed", "JobsFailed") if failed else ("Complete", "JobsCompleted")
        condition = {"type": kind, "status": "True", "reason": reason, "message": f"jobset {kind}"}
        job["status"] = {"conditions": [condition | {"lastTransitionTime": now()}]}

    def delete(self, name):
        """Its pods first, in their grace period."""
        job = self.jobs[name]
        job["metadata"].setdefault("deletionTimestamp", now())

        def finish():
            for pod in self.pods[name]:
                pod.strike(signal.SIGTERM)
                pod.reader.join()
            if self.jobs.get(name) is job:
                del self.jobs[name], self.pods[name]

        threading.Thread(target=finish).start()

    def evict(self, name, index=0):
        """A node is drained: its pod is killed, and says why."""
        pod = self.pods[name][index]
        reason = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
        pod.conditions.append(reason | {"lastTransitionTime": now()})
        for each in self.pods[name]:
            each.strike(signal.SIGKILL)

    def close(self):
        for pods in self.pods.values():
            for pod in pods:
                pod.strike(signal.SIGKILL)
                pod.reader.join()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """The HTTP of it."""

    def do_GET(self):
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if self._is_refused():
            return
        if found := JOBS.fullmatch(url.path):
            self._answer_with_job(found[1])
        elif (found := PODS.fullmatch(url.path)) and found[1]:
            self._log(found[1], query)
        elif found:
            self._list(query)
        else:
            self._status(404, "the server could not find the requested resource")

    def do_POST(self):
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_refused():
            return
        name = job["metadata"]["name"]
        if not JOBS.fullmatch(self.path):
            self._status(404, "the server could not find the requested resource")
        elif name in self.server.jobs:
            self._status(409, f'trainjobs.trainer.kubeflow.org "{name}" already exists')
        else:
            self.server.create(job)
            self._json(201, job)

    def do_DELETE(self):
        name = JOBS.fullmatch(urlsplit(self.path).path)[1]
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._is_refused():
            return
        if name in self.server.jobs:
            self.server.delete(name)
        self._answer_with_job(name)

    def _is_refused(self):
        self.server.paths.append(f"{self.command} {self.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._status(401, "Unauthorized")
            return True
        if status := self.server.answers_with:
            self._status(*status)
        return bool(status)

    def _answer_with_job(self, name):
        if job := self.server.jobs.get(name):
            self._json(200, job)
        else:
            self._status(404, f'trainjobs.trainer.kubeflow.org "{name}" not found')

    def _list(self, query):
        name = query["labelSelector"].partition("=")[2]
        items = [pod.show(name) for pod in self.server.pods.get(name, [])]
        if self.server.troubles and name in self.server.jobs:
            metadata = {"name": f"{name}-node-0-0-q", "labels": {}, "creationTimestamp": now()}
            status = {"phase": "Pending", "conditions": self.server.troubles}
            items.append({"metadata": metadata, "status": status})
        self._json(200, {"kind": "PodList", "apiVersion": "v1", "items": items})

    def _log(self, name, query):
        pods = [pod for pods in self.server.pods.values() for pod in pods if pod.name == name]
        if not pods:
            self._status(404, f'pods "{name}" not found')
            return
        assert (query["container"], query["timestamps"]) == ("node", "true")
        text = "".join(f"{stamp} {line}\n" for stamp, line in list(pods[0].lines))
        self._send(200, text.encode(), "text/plain")

    def _status(self, code, message):
        self._json(code, {"kind": "Status", "status": "Failure", "message": message, "code": code})

    def _json(self, code, value):
        self._send(code, json.dumps(value).encode(), "application/json")

    def _send(self, code, body, kind):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Keep quiet."""
