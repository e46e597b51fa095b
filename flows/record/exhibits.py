"""Pictures and reports of an output as artifacts: nothing secret, nothing from outside it."""

from __future__ import annotations

import logging
from pathlib import Path

from mlflow import MlflowClient

from flows.record import scrub
from flows.stage import MANIFEST

TEXTS = (".json", ".html", ".md", ".txt")
SHOWN = (".png", *TEXTS)
"""What lies at the top of an output with one of these endings is shown with its run."""
SHEETS = "sheets"
"""Folder of an output whose pictures are shown in a folder of their own."""

log = logging.getLogger("flows.record.tracking")


def publish(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Upload what a person would look at; done twice it replaces itself."""
    for path in sorted(folder.iterdir()):
        if path.suffix in SHOWN and path.name != MANIFEST and not path.name.startswith("."):
            _upload(client, run_id, folder, path)
    for path in sorted(folder.glob(f"{SHEETS}/*.png")):
        _upload(client, run_id, folder, path, SHEETS)


def _upload(
    client: MlflowClient, run_id: str, folder: Path, path: Path, under: str | None = None
) -> None:
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        log.warning("not shown in MLflow: %s is no file of %s", path, folder)
        return
    if path.suffix in TEXTS:
        content = path.read_text(errors="replace")
        if (clean := scrub.text(content)) != content:
            client.log_text(run_id, clean, path.name)
            return
    client.log_artifact(run_id, str(path), under)
