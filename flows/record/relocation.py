"""A record in a file that was moved, or copied, with its store: its addresses move along.

MLflow writes down where artifacts lie as absolute addresses, and has no way to change them.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from flows.databases import sqlite_file
from flows.record.outages import TrackingError

ARTIFACTS = "mlartifacts"
OF_ARTIFACTS = {
    *(("experiments", "artifact_location"), ("runs", "artifact_uri")),
    *(("logged_models", "artifact_location"), ("model_versions", "source")),
    ("model_versions", "storage_location"),
}
"""Tables and columns of MLflow's database that hold addresses of artifacts."""
OF_OUTPUTS = {
    *(("tags", "value"), ("logged_model_tags", "tag_value"), ("model_version_tags", "value")),
}
"""Those that hold addresses of outputs of the store."""

log = logging.getLogger("flows.record.tracking")


def own_record(store: Path) -> Path:
    """The database of a store that names no other record."""
    return store.parent / "mlflow.db"


def artifacts(store: Path) -> Path:
    """Where a record in a file keeps its artifacts."""
    return store.parent / ARTIFACTS


def relocate(uri: str, store: Path) -> None:
    """Make a database file's addresses those of where the store is now.

    A record that stores in several folders share stays as it is while its artifacts are where it
    says; when they are gone, new ones have to go somewhere, but the outputs may be elsewhere.

    Raises:
        TrackingError: the file is no database, or cannot be read, or not written when it must be.
    """
    file, here = sqlite_file(uri), store.parent.absolute()
    if file is None or not file.is_file():
        return
    try:
        with closing(sqlite3.connect(file, timeout=60)) as database:
            for old in sorted(set(_homes(database))):
                if old.resolve() != here.resolve():
                    is_own = file.resolve() == own_record(store).resolve()
                    _follow(database, old, here, is_own=is_own)
    except sqlite3.DatabaseError as error:
        raise TrackingError(f"the record of runs {file} cannot be used: {error}") from error


def _follow(database: sqlite3.Connection, old: Path, here: Path, *, is_own: bool) -> None:
    is_here = _has_artifacts(database, old, here)
    if not is_here and (old / ARTIFACTS).is_dir():
        return
    columns = OF_ARTIFACTS | (OF_OUTPUTS if is_here or is_own else set())
    with database:
        for before, after in ((old.as_uri(), here.as_uri()), (str(old), str(here))):
            _replace(database, columns, f"{before}/", f"{after}/")
    log.warning("the record was moved: its artifacts are in %s, not in %s", here, old)


def _homes(database: sqlite3.Connection) -> Iterator[Path]:
    """Folders in which experiments of ours keep their artifacts."""
    if ("experiments", "artifact_location") not in _columns(database):
        return  # its tables are not made yet
    query = "SELECT name, artifact_location FROM experiments WHERE artifact_location LIKE 'file:%'"
    for name, location in database.execute(query):
        if location.endswith(end := f"/{ARTIFACTS}/{name}"):
            yield Path(url2pathname(urlsplit(location.removesuffix(end)).path))


def _has_artifacts(database: sqlite3.Connection, old: Path, here: Path) -> bool:
    """Whether artifacts lie here that the record has in another folder."""
    there = f"{old.as_uri()}/"
    found = database.execute("SELECT artifact_uri FROM runs").fetchall()
    below = [uri.removeprefix(there) for (uri,) in found if uri and uri.startswith(there)]
    return any((here / url2pathname(name)).is_dir() for name in below)


def _replace(
    database: sqlite3.Connection, columns: set[tuple[str, str]], before: str, after: str
) -> None:
    for table, column in columns & _columns(database):
        database.execute(
            f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
            f"WHERE substr({column}, 1, ?) = ?",
            (after, len(before) + 1, len(before), before),
        )


def _columns(database: sqlite3.Connection) -> set[tuple[str, str]]:
    query = "SELECT t.name, c.name FROM sqlite_master t JOIN pragma_table_info(t.name) c"
    return set(database.execute(query))
