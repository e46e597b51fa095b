"""MLflow by run ids: one experiment a stage, all runs of a pipeline under one parent.

The active run of `mlflow.start_run` is never used: it is local to a thread, and takes
`MLFLOW_RUN_ID` out of the environment that a training process needs.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunStatus
from mlflow.exceptions import MlflowException

from flows.stage import MANIFEST, Manifest, Stage, StageOutput, is_alive

PIPELINE = "full-pipeline"
DIGEST_LENGTH = 36
"""Longest digest that MLflow's dataset table takes."""
PUBLISHED = (".png", ".json", ".html", ".md", ".txt")
SHEETS = "sheets"
"""Folder of an output whose pictures are shown in a folder of their own."""
"""What lies at the top of an output with one of these endings is shown with its run."""
LOCAL_UI = "http://127.0.0.1:5000"
"""Where `python -m flows ui` shows a tracking database that is a file."""


class TrackingError(RuntimeError):
    """The tracking server does not answer."""


def tracking_uri(store: Path) -> str:
    """`MLFLOW_TRACKING_URI`, or a database file beside the store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.parent / 'mlflow.db'}"


class Tracker:
    """Writes the record of one pipeline (a `name`, a store) to one tracking server."""

    def __init__(self, name: str, store: Path):
        self.name = name
        self.uri = tracking_uri(store)
        self._artifacts = None if self.is_server else (store.parent / "mlartifacts").as_uri()
        if self.is_server:
            self._probe()
        else:
            store.parent.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(self.uri)

    @property
    def is_server(self) -> bool:
        """Whether a server keeps the record, rather than a database file."""
        return self.uri.startswith(("http://", "https://"))

    def run_url(self, run_id: str) -> str:
        """The page of a run."""
        experiment = self.client.get_run(run_id).info.experiment_id
        return f"{self._page}/#/experiments/{experiment}/runs/{run_id}"

    def compare_url(self, stage: str | None = None) -> str:
        """The page that overlays the curves of all runs of a stage, or of all pipelines."""
        # Without these two parameters the page opens in a mode made for language models.
        mode = "workflowType=machine_learning&compareRunsMode=CHART"
        return f"{self._page}/#/experiments/{self.experiment(stage)}/runs?{mode}"

    def child_environment(self, run_id: str) -> dict[str, str]:
        """What lets a training process log to a run."""
        return {"MLFLOW_TRACKING_URI": self.uri, "MLFLOW_RUN_ID": run_id}

    def experiment(self, stage: str | None = None) -> str:
        """Id of a stage's experiment (of the pipeline's without one), made when needed."""
        name = f"{self.name}/{stage}" if stage else self.name
        found = self.client.get_experiment_by_name(name)
        if found is None:
            location = f"{self._artifacts}/{name}" if self._artifacts else None
            try:
                return str(self.client.create_experiment(name, artifact_location=location))
            except MlflowException:  # another run made it a moment ago
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def find(self, experiment: str, tags: Mapping[str, str]) -> str | None:
        """The newest run with these tags."""
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        newest = ["attributes.start_time DESC"]
        runs = self.client.search_runs([experiment], query, max_results=1, order_by=newest)
        return runs[0].info.run_id if runs else None

    def start_pipeline(
        self, flow_run_id: str, config: Mapping[str, Any], tags: Mapping[str, str]
    ) -> str:
        """Open the run of a pipeline; a retried flow run goes on in its old one."""
        experiment = self.experiment()
        self.reconcile(experiment)
        identity = {"prefect.flow_run_id": flow_run_id}
        old = self.find(experiment, identity)
        run_id = self._open(experiment, PIPELINE, {**identity, **tags}, old)
        self.params(run_id, config)
        return run_id

    def pipeline_of(self, flow_run_id: str) -> str | None:
        """The run of the pipeline that a flow run started, if it started one."""
        return self.find(self.experiment(), {"prefect.flow_run_id": flow_run_id})

    def start_stage(
        self,
        stage: Stage,
        key: str,
        config: Mapping[str, Any],
        *,
        parent: str | None,
        fresh: bool,
        tags: Mapping[str, str],
    ) -> str:
        """Open the run of a stage.

        An attempt that broke off goes on in its old run, so that its curves have no seam;
        `fresh` starts another.
        """
        experiment = self.experiment(stage.name)
        self.reconcile(experiment)
        identity = {"stage": stage.name, "fingerprint": key[:16]}
        old = None if fresh else self.find(experiment, identity)
        if parent:
            tags = {**tags, "mlflow.parentRunId": parent}
        run_id = self._open(experiment, f"{stage.name}-{key[:8]}", {**identity, **tags}, old)
        self.params(run_id, config)
        return run_id

    @contextmanager
    def status_of(self, run_id: str) -> Iterator[None]:
        """End a run as FINISHED, FAILED or KILLED, as the block ends."""
        status = "KILLED"  # signals and cancellations are no `Exception`
        try:
            yield
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            self.client.set_terminated(run_id, status)

    def inputs(self, run_id: str, paths: Mapping[str, Path], contents: Mapping[str, str]) -> None:
        """Record what a run reads, by content digest."""
        for name, path in paths.items():
            self._dataset(run_id, name, path, contents[name], f"input:{name}")

    def outputs(self, run_id: str, output: StageOutput) -> None:
        """Record what a stage made: dataset, headline figures, pictures and reports."""
        self._dataset(run_id, output.stage, output.path, output.content, "output")
        self.metrics(run_id, output.metrics, prefix="final/")
        self.client.set_tag(run_id, "store.path", str(output.path))
        for path in sorted(output.path.iterdir()):
            if path.suffix in PUBLISHED and path.name != MANIFEST:
                self.client.log_artifact(run_id, str(path))
        for path in sorted(output.path.glob(f"{SHEETS}/*.png")):
            self.client.log_artifact(run_id, str(path), SHEETS)

    def adopt(self, parent: str, stage: Stage, output: StageOutput, run_id: str, how: str) -> None:
        """Copy a stage's headline figures to the pipeline's run, with the way to its own."""
        self.metrics(parent, output.metrics, prefix=f"{stage.name}/")
        self.client.set_tag(parent, f"stage.{stage.name}", f"{how}: {run_id}")

    def recall(self, stage: Stage, manifest: Manifest, output: StageOutput) -> str:
        """The run of an output that is up to date, made good where it lacks something.

        A process that died between its commit and its last words, or a new tracking database,
        leave outputs without a complete record.
        """
        run_id = output.mlflow_run_id
        try:
            if run_id and self.client.get_run(run_id).info.status == "FINISHED":
                return run_id
        except MlflowException:  # this database does not know the run
            run_id = None
        if run_id is None:
            experiment = self.experiment(stage.name)
            identity = {"stage": stage.name, "fingerprint": output.key[:16]}
            run_id = self.find(experiment, identity) or self._open(
                experiment, f"{stage.name}-{output.key[:8]}", identity, None
            )
            self.params(run_id, manifest.config)
        with self.status_of(run_id):
            self.outputs(run_id, output)
        return run_id

    def params(self, run_id: str, config: Mapping[str, Any]) -> None:
        """Log settings; those that a run has stay as they are, for they are write-once."""
        known = self.client.get_run(run_id).data.params
        new = [Param(key, str(value)) for key, value in flatten(config).items() if key not in known]
        for start in range(0, len(new), 100):
            self.client.log_batch(run_id, params=new[start : start + 100])

    def metrics(self, run_id: str, values: Mapping[str, float], *, prefix: str = "") -> None:
        """Log figures."""
        now = int(time.time() * 1000)
        batch = [Metric(prefix + key, float(value), now, 0) for key, value in values.items()]
        if batch:
            self.client.log_batch(run_id, metrics=batch)

    def reconcile(self, experiment: str) -> None:
        """End runs that are RUNNING in the record but whose process on this host is dead."""
        query = f"attributes.status = 'RUNNING' and tags.`host` = '{socket.gethostname()}'"
        for run in self.client.search_runs([experiment], query):
            pid = run.data.tags.get("pid", "")
            if pid.isdigit() and not is_alive(int(pid)):
                self.client.set_terminated(run.info.run_id, "KILLED")

    def _open(self, experiment: str, name: str, tags: Mapping[str, str], old: str | None) -> str:
        tags = {**tags, "host": socket.gethostname(), "pid": str(os.getpid())}
        if old is None:
            tags = {**tags, "mlflow.user": _user(), "mlflow.source.name": "flows"}
            run = self.client.create_run(experiment, run_name=name, tags=tags)
            return str(run.info.run_id)
        self.client.update_run(old, status=RunStatus.to_string(RunStatus.RUNNING))
        for key, value in tags.items():
            self.client.set_tag(old, key, value)
        return old

    def _dataset(self, run_id: str, name: str, path: Path, digest: str, context: str) -> None:
        with warnings.catch_warnings():  # it has two names for local files
            warnings.simplefilter("ignore", UserWarning)
            source = resolve_dataset_source(str(path))
        digest = digest[:DIGEST_LENGTH]
        dataset = MetaDataset(source, name=name, digest=digest)  # type: ignore[abstract]
        tag = InputTag("mlflow.data.context", context)
        self.client.log_inputs(run_id, [DatasetInput(dataset._to_mlflow_entity(), [tag])])

    @property
    def _page(self) -> str:
        address = self.uri if self.is_server else os.environ.get("MLFLOW_UI_URL", LOCAL_UI)
        return address.rstrip("/")

    def _probe(self) -> None:
        """Fail at once instead of after MLflow's four minutes of retries."""
        try:
            urllib.request.urlopen(f"{self.uri.rstrip('/')}/health", timeout=10).close()
        except urllib.error.HTTPError:
            return  # it answers; a proxy may hide its health page
        except OSError as error:
            where = re.sub(r"//[^@/]*@", "//", self.uri)  # no password in a message
            raise TrackingError(
                f"MLflow at {where} does not answer ({error}): start it, or unset "
                "MLFLOW_TRACKING_URI to record to a file beside the store"
            ) from error


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())
