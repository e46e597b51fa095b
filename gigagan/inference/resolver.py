"""`models:/NAME@champion` → the files of a registered pair, checked against their sha256.

A version of MLflow's registry says where its snapshots lie. Files of this machine are opened where
they are; any other address is fetched once, by its sha256, into a cache. MLflow is imported only
when such an address is given.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from gigagan.common.files import filled_aside, sha256_of
from gigagan.models.snapshot import SnapshotError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

SCHEME = "models:/"
CACHE_VARIABLE = "GIGAGAN_CACHE"
"""Environment variable: the folder of what is fetched; ~/.cache/gigagan without it."""
RUNS_VARIABLE = "GIGAGAN_RUNS"
"""Environment variable: where the pipeline's own record lies; runs/ without it."""
ROLES = ("base", "upsampler")
_ADDRESS = re.compile(r"models:/+(?P<name>[^/@\s]+)(?:@(?P<alias>[^/@\s]+)|/(?P<version>\d+))")


def is_registered(snapshot: str | Path | None) -> bool:
    """Whether this names a registered model rather than a file."""
    return isinstance(snapshot, str) and snapshot.startswith(SCHEME)


def resolve(address: str) -> tuple[Path, Path]:
    """The base's and the upsampler's snapshot of `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        SnapshotError: there is no such model or version, or its files are gone or changed.
    """
    version = _version(address)
    base, upsampler = (_file(address, version, role) for role in ROLES)
    return base, upsampler


def _version(address: str) -> ModelVersion:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise SnapshotError(
            f"{address}: write models:/NAME@ALIAS or models:/NAME/VERSION, as in "
            "models:/gigagan@champion"
        )
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ModuleNotFoundError as error:
        raise SnapshotError(
            f"{address} needs the package mlflow: install it, or give the file of a snapshot"
        ) from error
    uri = _tracking_uri(address)
    try:
        client = MlflowClient(uri)
        if match["alias"]:
            return client.get_model_version_by_alias(match["name"], match["alias"])
        return client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        where = re.sub(r"//[^@/]*@", "//", uri)  # no password in a message
        said = str(error).partition("\n")[0][:300]
        raise SnapshotError(
            f"{address} is not in the registry of {where} ({said}): `python -m flows champion` "
            "lists what is; MLFLOW_TRACKING_URI names another server"
        ) from error


def _tracking_uri(address: str) -> str:
    """The server of the environment, or of `mlflow.set_tracking_uri`, or the pipeline's file."""
    import mlflow

    if given := os.environ.get("MLFLOW_REGISTRY_URI") or os.environ.get("MLFLOW_TRACKING_URI"):
        _check_database(address, given)
        return given
    if mlflow.is_tracking_uri_set():
        return mlflow.get_tracking_uri()
    record = Path(os.environ.get(RUNS_VARIABLE) or "runs").expanduser() / "mlflow.db"
    if record.is_file():
        quoted = str(record.resolve()).replace("%", "%25").replace("?", "%3F")
        return f"sqlite+pysqlite:///{quoted}"  # without +pysqlite MLflow makes a folder of it
    raise SnapshotError(
        f"{address}: set MLFLOW_TRACKING_URI to the server that has it (or work where "
        f"{record} lies)"
    )


def _check_database(address: str, uri: str) -> None:
    """MLflow would make an empty database where there is none; SnapshotError instead."""
    if not re.match(r"sqlite(\+\w+)?:", uri):
        return
    from sqlalchemy.engine import make_url

    file = make_url(uri).database
    if file and file != ":memory:" and not file.startswith("file:") and not Path(file).is_file():
        raise SnapshotError(
            f"{address}: {Path(file).absolute()} is no file ({uri} names it; %25 stands for % and "
            "%3F for ?)"
        )


def _file(address: str, version: ModelVersion, role: str) -> Path:
    uri, sha256 = version.tags.get(f"{role}.uri"), version.tags.get(f"{role}.sha256")
    if not uri or not sha256 or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise SnapshotError(
            f"{address} (version {version.version}) does not say where its {role} snapshot is: "
            "it was not registered by the pipeline's evaluation"
        )
    place = urlparse(uri)
    path = Path(unquote(place.path)) if place.scheme == "file" else _fetched(address, uri, sha256)
    if not path.is_file():
        raise SnapshotError(
            f"{address}: {path} is gone (version {version.version}, {role}): restore the store, "
            "or choose another version with `python -m flows champion set VERSION`"
        )
    if (found := sha256_of(path)) != sha256:
        raise SnapshotError(
            f"{address}: {path} is not what was evaluated: its sha256 is {found}, registered is "
            f"{sha256}"
        )
    return path


def _fetched(address: str, uri: str, sha256: str) -> Path:
    """The cached copy of a remote file, downloaded when it is not there or damaged."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gigagan"
    folder = Path(os.environ.get(CACHE_VARIABLE) or user) / "snapshots"
    path = folder / f"{sha256}.safetensors"
    if path.is_file() and sha256_of(path) == sha256:
        return path
    import fsspec

    folder.mkdir(parents=True, exist_ok=True)
    try:
        files, remote = fsspec.core.url_to_fs(uri)
        with filled_aside(path, has_rivals=True) as partial:
            files.get_file(remote, str(partial))
    except Exception as error:  # each file system has errors of its own
        raise SnapshotError(
            f"{address}: {uri} cannot be read ({type(error).__name__}: {error}): check the "
            "credentials for it and that its file system's package is installed"
        ) from error
    return path
