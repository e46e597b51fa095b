"""A base and a few pictures, or a thing to forget, to an adapter; runs only where it is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from flows import launch
from flows.conductor import stage_flow
from flows.config import PipelineConfig
from flows.stage import Context, Need, Stage
from flows.stages import download, train_base
from flows.storage.files import digest
from gigagan.common.files import sha256_of

PROCESS = launch.Process(("gigagan", "adapt"), out="--out")
PATHS = ("base", "pictures", "measure_pictures", "old_captions")
"""Settings that name files and folders of one's own, whose content counts."""


def run(context: Context) -> None:
    """The stage's body; a second attempt goes on from the last checkpoint."""
    launch.stage_process(context, PROCESS)
    report = json.loads((context.path / "report.json").read_text())
    for name, value in report.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        context.metrics |= {f"{name}_{part}".rstrip("_"): float(v) for part, v in parts}


def needs(config: PipelineConfig) -> Mapping[str, Need]:
    """The base, unless one's own is named, and captions of what must stay."""
    own = {} if config.adapt.base else {"base": Need(train_base.STAGE, "snapshot.safetensors")}
    return {**own, "heldout": Need(download.STAGE, "heldout", optional=True)}


def external(config: PipelineConfig) -> Mapping[str, str]:
    """Digests of what the settings name; the run itself complains where it is not there."""
    named = {name: getattr(config.adapt, name) for name in PATHS}
    return {name: _content(Path(path)) for name, path in named.items() if path}


def _content(path: Path) -> str:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    present = [file for file in files if file.is_file()]
    return digest([(str(file.relative_to(path)), sha256_of(file)) for file in present])


STAGE = Stage(
    "adapt",
    version=1,
    run=run,
    needs=needs,
    external=external,
    unkeyed=lambda config: external(config).keys(),
    scratch=("checkpoints", "features", launch.LOG),
    gpu=True,
)

adapt = stage_flow(
    STAGE,
    "the adapter",
    again="adapt",
    example='{"adapt.unlearn": "padlock"}',
    reads="train-base",
)
