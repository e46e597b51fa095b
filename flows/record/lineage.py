"""What a run read and made, in MLflow's words: datasets by content digest, models by sha256.

Each input carries tags that lead to the run that made it, so the way back from an evaluation to
the lists of URLs needs MLflow's API alone. Weights stay in the store: a model is a record of where
they lie and what they hash to.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelInput,
    LoggedModelOutput,
    LoggedModelStatus,
    Run,
)
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

from flows.record import scrub
from flows.stage import Manifest
from flows.storage.place import Place
from flows.storage.store import Resolved

SNAPSHOT = "snapshot.safetensors"
"""The file of an output that is a model."""
LISTS = ("site/laion.parquet", "site/coyo.parquet")
"""Metadata lists that the embedded source makes itself; others are inputs from outside."""
DIGEST_LENGTH = 36
"""Longest digest that MLflow's dataset table takes."""
MODEL_PARAMS = ("kind", "total_images", "batch_size", "seed", "precision")
CONTEXT = "mlflow.data.context"


def uri(place: Place, file: str) -> str:
    """Address of a file of an output."""
    where = f"{place}/{file}"
    return where if "://" in where else Path(where).absolute().as_uri()


def sha256_of(manifest: Manifest, file: str) -> str | None:
    """What a manifest says of one of its files."""
    return next((entry.sha256 for entry in manifest.files if entry.path == file), None)


def dataset(name: str, digest: str, where: str, tags: Mapping[str, str]) -> DatasetInput:
    """A dataset that stays where it is; `tags` say what it is to the run."""
    scheme = where.partition("://")[0] if "://" in where else "file"
    kind = {"file": "local", "http": "http", "https": "http", "s3": "s3"}.get(scheme, "code")
    source = {"url" if kind == "http" else "uri": scrub.text(where)}
    entity = Dataset(name, digest[:DIGEST_LENGTH], kind, json.dumps(source))
    return DatasetInput(entity, [InputTag(key, value[:500]) for key, value in tags.items()])


def inputs(resolved: Resolved, config: Mapping[str, Any]) -> Iterator[DatasetInput]:
    """What a stage reads, but for models; what is not in the store is named by its setting."""
    for name, digest in resolved.contents.items():
        found = resolved.inputs.get(name)
        if found is None:
            yield from _external(name, digest, config)
        elif found.need.under != SNAPSHOT:
            where = f"{found.place}/{found.need.under}".rstrip("/")
            yield dataset(name, digest, where, {CONTEXT: f"input:{name}", **_maker(found.manifest)})


def made(manifest: Manifest, place: Place) -> Iterator[DatasetInput]:
    """An output as a dataset, and the lists of URLs that it made for itself."""
    own = {CONTEXT: "output", "stage": manifest.stage, "fingerprint": manifest.key[:16]}
    yield dataset(manifest.stage, manifest.content, str(place), own)
    for file in LISTS:
        if digest := sha256_of(manifest, file):
            yield dataset(f"metadata/{Path(file).name}", digest, f"{place}/{file}", _metadata())


def _external(name: str, digest: str, config: Mapping[str, Any]) -> Iterator[DatasetInput]:
    """`metadata` and `captions` are settings, `decontaminate:0` is the first file of one."""
    key, _, number = name.partition(":")
    setting = config.get(key) or name
    if number and setting != name:
        setting = setting[int(number)]
    places = [setting] if isinstance(setting, str) else [str(place) for place in setting]
    for place in places:
        suffix = f"/{posixpath.basename(place)}" if len(places) > 1 else ""
        tags = _metadata() if name == "metadata" else {CONTEXT: f"input:{name}"}
        yield dataset(scrub.text(name + suffix), digest, place, tags)


def _metadata() -> dict[str, str]:
    return {CONTEXT: "input:metadata"}


def _maker(manifest: Manifest) -> dict[str, str]:
    tags = {"stage": manifest.stage, "fingerprint": manifest.key[:16]}
    return tags | ({"run_id": manifest.mlflow_run_id} if manifest.mlflow_run_id else {})


class Models:
    """Logged models of one tracking server: found by stage, key and sha256, made when missing."""

    def __init__(self, client: MlflowClient):
        self.client = client

    def find_or_make(self, experiment: str, manifest: Manifest, place: Place) -> str:
        """Id of the model that is the snapshot of an output."""
        sha256 = sha256_of(manifest, SNAPSHOT) or ""
        identity = {"stage": manifest.stage, "fingerprint": manifest.key[:16], "sha256": sha256}
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
        found = self.client.search_logged_models([experiment], query, max_results=1)
        if found:
            return str(found[0].model_id)
        model = self.client.create_logged_model(
            experiment,
            name=f"{manifest.stage}-{manifest.key[:8]}",
            source_run_id=known(self.client, manifest.mlflow_run_id),
            tags={
                **identity,
                "uri": scrub.text(uri(place, SNAPSHOT)),
                MLFLOW_MODEL_IS_EXTERNAL: "true",
            },
            params={k: str(manifest.config[k]) for k in MODEL_PARAMS if k in manifest.config},
            model_type=manifest.stage,
        )
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return str(model.model_id)

    def is_made(self, run: Run, model: str, step: int) -> None:
        """Record a model as made by a run; said twice it is recorded once."""
        there = run.outputs.model_outputs if run.outputs else []
        if model not in {output.model_id for output in there}:
            self.client.log_outputs(run.info.run_id, [LoggedModelOutput(model, step)])

    def are_read(self, run: Run, models: Iterable[str]) -> None:
        """Record models as read by a run."""
        there = {given.model_id for given in run.inputs.model_inputs} if run.inputs else set()
        if new := [LoggedModelInput(model) for model in models if model not in there]:
            self.client.log_inputs(run.info.run_id, models=new)


def known(client: MlflowClient, run_id: str | None) -> str | None:
    """This run if the server has it: another one may have recorded it."""
    try:
        return str(client.get_run(run_id).info.run_id) if run_id else None
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
