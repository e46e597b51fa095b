"""MLflow by run ids: one experiment a stage, all runs of a pipeline under one parent.

The active run of `mlflow.start_run` is never used: it is local to a thread, and takes
`MLFLOW_RUN_ID` out of the environment that a training process needs.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.store.entities import PagedList

from flows import places
from flows.databases import absolute, sqlite_file, sqlite_uri
from flows.record import exhibits, lineage, outages, owners, relocation, scrub
from flows.record.outages import T, TrackingError
from flows.stage import Manifest, Stage, StageOutput
from flows.storage.objects import Remote
from flows.storage.place import Place
from flows.storage.store import Resolved

__all__ = ["PIPELINE", "Tracker", "TrackingError", "flatten", "tracking_uri"]

PIPELINE = "full-pipeline"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
"""How addresses of records begin."""
LOCAL_UI = "http://127.0.0.1:5000"
"""Where `python -m flows ui` shows a tracking database that is a file."""

MODE = "workflowType=machine_learning"
"""Without it the page opens in a mode made for language models."""

log = logging.getLogger("flows.record.tracking")


def tracking_uri(store: Path) -> str:
    """`MLFLOW_TRACKING_URI`, or a database file beside the store.

    Raises:
        TrackingError: the variable names neither a server nor a database; MLflow keeps no record
            in folders any more.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given:
        return sqlite_uri(relocation.own_record(store))
    uri = absolute(given)
    file = sqlite_file(uri)
    if given.partition(":")[0].partition("+")[0] not in SCHEMES or (file and file.is_dir()):
        raise TrackingError(
            f"MLFLOW_TRACKING_URI is {scrub.text(given)}, neither server nor database: name one "
            "(http://HOST:PORT, sqlite:////PATH/mlflow.db), or unset it to record to a file beside "
            "the store"
        )
    return uri


def child_environment(uri: str, run_id: str) -> dict[str, str]:
    """Variables that lead a process to a run of the record at `uri`, and bound its waiting."""
    bounds = {name: os.environ.get(name, bound) for name, bound in outages.BOUNDS.items()}
    return {"MLFLOW_TRACKING_URI": uri, "MLFLOW_RUN_ID": run_id, **bounds}


class Tracker:
    """Writes the record of one pipeline (a `name`, a store) to one tracking server."""

    def __init__(self, name: str, store: Path):
        self.name = name
        self.uri = tracking_uri(store)
        self._artifacts = None if self.is_server else relocation.artifacts(store).as_uri()
        for variable, bound in outages.BOUNDS.items():
            os.environ.setdefault(variable, bound)
        if self.is_server:
            self._probe()
        else:
            if not store.parent.is_dir():  # of a record that is only read nothing is written
                places.make(store.parent)
            relocation.relocate(self.uri, store)
        self.client = MlflowClient(self.uri)
        self.models = lineage.Models(self.client)
        self._check_access()

    @property
    def is_server(self) -> bool:
        """Whether a server keeps the record, rather than a database file."""
        return self.uri.startswith(("http://", "https://"))

    def run_url(self, run_id: str) -> str:
        """The page of a run."""
        experiment = self.client.get_run(run_id).info.experiment_id
        return f"{self._page}/#/experiments/{experiment}/runs/{run_id}?{MODE}"

    def compare_url(self, stage: str | None = None, page: str | None = None) -> str:
        """The page that overlays the curves of all runs of a stage, or of all pipelines."""
        mode = f"{MODE}&compareRunsMode=CHART"
        return f"{page or self._page}/#/experiments/{self.experiment(stage)}/runs?{mode}"

    def child_environment(self, run_id: str) -> dict[str, str]:
        """What lets a training process log to a run."""
        return child_environment(self.uri, run_id)

    def experiment_name(self, stage: str | None = None) -> str:
        """What a stage's experiment is called, or the pipeline's."""
        return f"{self.name}/{stage}" if stage else self.name

    def experiment(self, stage: str | None = None) -> str:
        """Id of a stage's experiment (of the pipeline's without one), made when needed."""
        name = self.experiment_name(stage)
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

    def output_of(self, run_id: str) -> tuple[str, str]:
        """Stage and key of what a stage's run made."""
        try:
            tags = self.client.get_run(run_id).data.tags
        except MlflowException as error:
            raise TrackingError(f"MLflow knows no run {run_id}: give another id") from error
        if "stage" not in tags or "fingerprint" not in tags:
            raise TrackingError(f"the MLflow run {run_id} is not one of a stage: give one that is")
        return tags["stage"], tags["fingerprint"]

    def start_pipeline(
        self, flow_run_id: str, config: Mapping[str, Any], tags: Mapping[str, str]
    ) -> str:
        """Open the run of a pipeline; a retried flow run goes on in its old one."""
        experiment = self.experiment()
        self.reconcile(experiment)
        identity = {"prefect.flow_run_id": flow_run_id}
        old = self.find(experiment, identity)
        name = tags.get("prefect.flow_run_name") or PIPELINE
        run_id = self._open(experiment, name, {**identity, **tags}, old)
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
        `fresh` starts another. The caller holds the lease: whoever else has a run of this key
        RUNNING, here or on another machine, has died.
        """
        experiment = self.experiment(stage.name)
        self.reconcile(experiment)
        identity = {"stage": stage.name, "fingerprint": key[:16]}
        self._end_superseded(experiment, identity, parent)
        old = None if fresh else self.find(experiment, identity)
        if parent:
            tags = {**tags, "mlflow.parentRunId": parent}
        run_id = self._open(experiment, f"{stage.name}-{key[:8]}", {**identity, **tags}, old)
        self.params(run_id, config)
        return run_id

    @contextmanager
    def status_of(self, run_id: str) -> Iterator[None]:
        """End a run as FINISHED, FAILED or KILLED, as the block ends."""
        try:
            yield
        except Exception:
            self._end(run_id, "FAILED")
            raise
        except BaseException:  # signals and cancellations are no `Exception`
            self._end(run_id, "KILLED")
            raise
        self.retry(lambda: self.client.set_terminated(run_id, "FINISHED"))

    def retry(self, action: Callable[[], T], kept: Path | None = None) -> T:
        """Do what can be done twice until the server has taken it; see `outages.retry`."""
        return outages.retry(action, self._where, kept)

    def inputs(self, run_id: str, resolved: Resolved, config: Mapping[str, Any]) -> None:
        """Record what a run reads: data by content digest, snapshots as models.

        `config` is the stage's section; it names what lies outside the store.
        """
        datasets = list(lineage.inputs(resolved, config))
        if datasets:
            self.client.log_inputs(run_id, datasets)
        read = [
            self._model(found.manifest, found.place)
            for found in resolved.inputs.values()
            if found.need.under == lineage.SNAPSHOT
        ]
        self.models.are_read(self.client.get_run(run_id), read)

    def outputs(self, run_id: str, output: StageOutput) -> None:
        """Record what a stage made: dataset, model, curves, headline figures, pictures, reports."""
        self.retry(lambda: self._outputs(run_id, output), output.path)

    def copy_to_pipeline(
        self, parent: str, stage: Stage, output: StageOutput, run_id: str, how: str
    ) -> None:
        """Copy a stage's headline figures to the pipeline's run, with the way to its own."""

        def copy() -> None:
            self.metrics(parent, output.metrics, prefix=f"{stage.name}/")
            self.client.set_tag(parent, f"stage.{stage.name}", f"{how}: {run_id}")

        self.retry(copy, output.path)

    def complete_record(
        self, stage: Stage, manifest: Manifest, output: StageOutput, resolved: Resolved
    ) -> str:
        """The run of an output that is up to date, made good where it lacks something.

        A process that died between its commit and its last words, or a new tracking database,
        leave outputs without a complete record.
        """
        run_id = lineage.known(self.client, output.mlflow_run_id)
        if run_id and self.client.get_run(run_id).info.status == "FINISHED":
            return run_id
        if run_id is None:
            experiment = self.experiment(stage.name)
            identity = {"stage": stage.name, "fingerprint": output.key[:16]}
            run_id = self.find(experiment, identity) or self._open(
                experiment, f"{stage.name}-{output.key[:8]}", identity, None
            )
            self.params(run_id, manifest.config)
            self.inputs(run_id, resolved, manifest.config)
        with self.status_of(run_id):
            self.outputs(run_id, output)
        return run_id

    def params(self, run_id: str, config: Mapping[str, Any]) -> None:
        """Log settings; those that a run has stay as they are, for they are write-once."""
        known = self.client.get_run(run_id).data.params
        settings = flatten(config).items()
        new = [Param(key, scrub.value(key, value)) for key, value in settings if key not in known]
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
        for run in self._running(experiment, {"host": socket.gethostname()}):
            if owners.has_died(run):
                self.client.set_terminated(run.info.run_id, "KILLED")

    def _end_superseded(
        self, experiment: str, identity: Mapping[str, str], parent: str | None
    ) -> None:
        """End the RUNNING runs of a key that was taken over, and the pipelines they died with."""
        for run in self._running(experiment, identity):
            self.client.set_terminated(run.info.run_id, "KILLED")
            above = run.data.tags.get("mlflow.parentRunId")
            dead = owners.process(run.data.tags)
            if not above or above == parent or dead == tuple(owners.me().values()):
                continue
            pipeline = self.client.get_run(above)
            if pipeline.info.status == "RUNNING" and owners.process(pipeline.data.tags) == dead:
                self.client.set_terminated(above, "KILLED")

    def _running(self, experiment: str, tags: Mapping[str, str]) -> list[Run]:
        query = "attributes.status = 'RUNNING'"
        query += "".join(f" and tags.`{key}` = '{value}'" for key, value in tags.items())
        return list(self.client.search_runs([experiment], query))

    def _open(self, experiment: str, name: str, tags: Mapping[str, str], old: str | None) -> str:
        tags = {key: scrub.text(value) for key, value in tags.items()} | owners.me()
        if old is None:
            tags = {**tags, "mlflow.user": owners.user(), "mlflow.source.name": "flows"}
            run = self.client.create_run(experiment, run_name=name, tags=tags)
            return str(run.info.run_id)
        self.client.update_run(old, status=RunStatus.to_string(RunStatus.RUNNING))
        for key, value in tags.items():
            self.client.set_tag(old, key, value)
        return old

    def _end(self, run_id: str, status: str) -> None:
        """Set a status on the way out of an error, which a server that is gone must not hide."""
        try:
            self.client.set_terminated(run_id, status)
        except Exception as error:
            log.warning(
                "MLflow could not be told that run %s is %s (%s): the next run of the stage does",
                *(run_id, status, type(error).__name__),
            )

    def _outputs(self, run_id: str, output: StageOutput) -> None:
        from gigagan.training.relay import Relay

        place = place_of(output)
        manifest = place.manifest()
        assert manifest is not None, "an output is complete: it has a manifest"
        Relay(output.path, run_id, self.client).catch_up()
        self.client.log_inputs(run_id, list(lineage.made(manifest, place)))
        if lineage.sha256_of(manifest, lineage.SNAPSHOT):
            model = self._model(manifest, place)
            step = int(output.metrics.get("images_seen", 0))
            self.models.is_made(self.client.get_run(run_id), model, step)
        self.metrics(run_id, output.metrics, prefix="final/")
        self.client.set_tag(run_id, "store.path", scrub.text(str(place)))
        exhibits.publish(self.client, run_id, output.path)

    def _model(self, manifest: Manifest, place: Place) -> str:
        """Id of the model that is the snapshot of an output."""
        return self.models.find_or_make(self.experiment(manifest.stage), manifest, place)

    @property
    def _where(self) -> str:
        return scrub.text(self.uri)

    @property
    def _page(self) -> str:
        address = self._where if self.is_server else os.environ.get("MLFLOW_UI_URL", LOCAL_UI)
        return address.rstrip("/")

    def _probe(self) -> None:
        """Fail at once instead of after a client's retries."""
        try:
            urllib.request.urlopen(f"{self._where.rstrip('/')}/health", timeout=10).close()
        except urllib.error.HTTPError:
            return  # it answers; a proxy may hide its health page
        except OSError as error:
            raise TrackingError(
                f"MLflow at {self._where} does not answer ({error}): start it, or unset "
                "MLFLOW_TRACKING_URI to record to a file beside the store"
            ) from error

    def _check_access(self) -> None:
        """Be refused now rather than after hours of work."""
        try:
            self.client.search_experiments(max_results=1)
        except Exception as error:  # SQLAlchemy's own come through as they are
            remedy = "name a database of MLflow's, or unset MLFLOW_TRACKING_URI"
            if self.is_server:
                names = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
                remedy = f"set {names} to an account that may write"
            raise TrackingError(
                f"MLflow at {self._where} refuses us ({outages.brief(error)}): {remedy}"
            ) from error


def found_by(search: Callable[..., PagedList[T]], *arguments: Any, **options: Any) -> Iterator[T]:
    """All that one of MLflow's searches finds, page by page."""
    token = None
    while True:
        page = search(*arguments, page_token=token, **options)
        yield from page
        token = page.token
        if not token:
            return


def place_of(output: StageOutput) -> Place:
    """Where an output lies."""
    return Place(output.path, Remote(output.url) if output.url else None)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
