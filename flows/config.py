"""The pipeline's configuration: one section a stage, presets, dotted overrides."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from data.config import DownloadConfig, FilterConfig, ScoreConfig
from flows.places import runs
from flows.resources import Resources as Resources  # part of this module's interface
from flows.resources import ResourcesConfig
from gigagan.common.settings import Frozen, SettingsError, dotted_keys, nearest, problems, unknown
from gigagan.config import AdaptConfig, EvaluateConfig, TrainBaseConfig, TrainUpsamplerConfig
from gigagan.config import presets as training_presets

PRESETS = Path(__file__).with_name("presets")
TRAINING = frozenset({"train_base", "train_upsampler"})
"""Sections that may start from one of the networks' own presets."""
FREE = frozenset({"env", "parameters", "node_selector", "env_from_secrets"})
"""Mappings in which an override may name a new key."""


class StageName(StrEnum):
    """The stages in their order."""

    DOWNLOAD = "download"
    SCORE = "score"
    FILTER = "filter"
    TRAIN_BASE = "train-base"
    TRAIN_UPSAMPLER = "train-upsampler"
    EVALUATE = "evaluate"
    ADAPT = "adapt"


OPTIONAL = frozenset({StageName.ADAPT})
"""Stages that run only where they are named."""
USUAL = tuple(stage for stage in StageName if stage not in OPTIONAL)
"""Those of a whole pipeline, in their order."""


class PipelineConfig(Frozen):
    """All settings of a pipeline run."""

    name: str = Field("gigagan", pattern=r"^[\w.-]+$")
    """Prefix of the MLflow experiments."""
    store: str = "runs/store"
    """Folder of all outputs, or an fsspec URL such as s3://bucket/prefix; a relative path starts at
    the project's folder, and what is below `runs` lies in GIGAGAN_RUNS where that is set."""
    save_every_s: float = Field(300.0, gt=0)
    """Seconds between two savings of unfinished work to a store behind a URL."""
    download: DownloadConfig = DownloadConfig()
    """Metadata to images."""
    score: ScoreConfig = ScoreConfig()
    """Images to scores."""
    filter: FilterConfig = FilterConfig()
    """Scores to training shards."""
    train_base: TrainBaseConfig = TrainBaseConfig()
    """Shards to a base generator."""
    train_upsampler: TrainUpsamplerConfig = TrainUpsamplerConfig()
    """Shards and a base generator to an upsampler."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Both networks to numbers and pictures."""
    adapt: AdaptConfig = AdaptConfig()
    """A base and a few pictures, or a thing to forget, to an adapter; only where it is named."""
    resources: ResourcesConfig = ResourcesConfig()
    """What each stage runs on."""

    @property
    def store_url(self) -> str | None:
        """The store's URL; None when it is a folder."""
        is_folder = "://" not in self.store or self.store.startswith("file://")
        return None if is_folder else self.store.rstrip("/")

    @property
    def store_path(self) -> Path:
        """The store's folder on this machine; a relative one is so to the current folder.

        Of a store behind a URL the mirror, below `GIGAGAN_STORE_CACHE` or `runs/mirror`.
        """
        if self.store_url is None:
            given = Path(self.store.removeprefix("file://")).expanduser()
            is_ours = given.parts[:1] == ("runs",)
            return runs().joinpath(*given.parts[1:]) if is_ours else given.absolute()
        mirrors = os.environ.get("GIGAGAN_STORE_CACHE") or runs() / "mirror"
        name = re.sub(r"[^A-Za-z0-9]+", "-", self.store_url).strip("-")
        short = hashlib.sha256(self.store_url.encode()).hexdigest()[:8]
        return Path(mirrors).absolute() / f"{name}-{short}"

    @classmethod
    def preset(cls, name: str) -> PipelineConfig:
        """One of the presets by name."""
        names = presets()
        if name not in names:
            raise SettingsError(
                f"unknown preset {name!r}{nearest(name, names)}: {', '.join(names)}"
            )
        return cls.parse(yaml.safe_load((PRESETS / f"{name}.yaml").read_text()) or {})

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> PipelineConfig:
        """Validate a tree; `SettingsError` names each key, its value and what is accepted.

        A training section may name a `preset` of gigagan.config.presets to start from.
        """
        try:
            return cls.model_validate(_expand_presets(tree))
        except ValidationError as error:
            raise SettingsError("\n".join(problems(error, cls))) from error

    def override(self, overrides: Mapping[str, Any]) -> PipelineConfig:
        """A copy with dotted keys replaced, as in `{"train_base.total_images": 20000}`.

        `train_base.preset` replaces its whole section first.
        """
        tree = self.model_dump(mode="json")
        for section in TRAINING & {key.removesuffix(".preset") for key in overrides}:
            tree[section] = {"preset": overrides[f"{section}.preset"]}
        tree = _expand_presets(tree)
        for key, value in overrides.items():
            if key.endswith(".preset") and key.removesuffix(".preset") in TRAINING:
                continue
            *sections, leaf = key.split(".")
            node: Any = tree
            for section in sections:
                node = node.get(section) if isinstance(node, dict) else None
            # A leaf that is not there yet is legal in a free mapping such as `env` only.
            is_free = sections[-1:] and sections[-1] in FREE
            if not isinstance(node, dict) or (leaf not in node and not is_free):
                raise SettingsError(unknown(key, dotted_keys(PipelineConfig)))
            node[leaf] = value
        return self.parse(tree)


def presets() -> list[str]:
    """Names of all presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _expand_presets(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Training sections that name a preset, written out; what else they say goes before it."""
    expanded = dict(tree)
    for section in TRAINING & tree.keys():
        given = tree[section]
        if isinstance(given, Mapping) and "preset" in given:
            rest = {key: value for key, value in given.items() if key != "preset"}
            expanded[section] = _merge(_training_preset(section, given["preset"]), rest)
    return expanded


def _training_preset(section: str, name: Any) -> dict[str, Any]:
    try:
        found = training_presets.preset(str(name))
    except ValueError as error:
        raise SettingsError(f"{section}.preset: {error}") from error
    if f"train_{found.kind}" != section:
        raise SettingsError(f"{section}.preset = {name}: that is one of train_{found.kind}")
    return found.model_dump(mode="json")


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged
