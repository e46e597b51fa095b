"""The pipeline's configuration: one section a stage, presets, dotted overrides."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.config import DownloadConfig, FilterConfig, ScoreConfig
from gigagan.config import EvaluateConfig, TrainBaseConfig, TrainUpsamplerConfig
from gigagan.config import presets as training_presets

ROOT = Path(__file__).resolve().parents[1]
PRESETS = Path(__file__).with_name("presets")
TRAINING = frozenset({"train_base", "train_upsampler"})
"""Sections that may start from one of the networks' own presets."""


class ConfigError(ValueError):
    """A preset, key or value that cannot be used; the message says what can."""


class Frozen(BaseModel):
    """A section of the configuration: immutable, unknown keys refused, attribute docs shown."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


class StageName(StrEnum):
    """The stages in their order."""

    DOWNLOAD = "download"
    SCORE = "score"
    FILTER = "filter"
    TRAIN_BASE = "train-base"
    TRAIN_UPSAMPLER = "train-upsampler"
    EVALUATE = "evaluate"


class Resources(Frozen):
    """What a stage runs on. Never part of its key: other hardware makes the same output."""

    backend: Literal["inline", "torchrun"] = "inline"
    """How child processes start: one plain process, or torchrun on this node."""
    processes: int = Field(1, ge=1)
    """Processes of the stage: ranks for torchrun, workers for data stages."""
    threads: int | None = Field(None, ge=1)
    """Threads of each process; null shares the cores out evenly."""
    max_restarts: int = Field(3, ge=0)
    """How often torchrun starts all ranks again, from the last checkpoint, after one died."""
    executor: Literal["processes", "ray"] = "processes"
    """Where data stages run their shards: processes of this machine, or a Ray cluster (the one of
    RAY_ADDRESS, or a local one)."""
    gpus: float = Field(0.0, ge=0)
    """Share of a CUDA device that Ray gives each worker; without it workers see none."""
    env: dict[str, str] = {}
    """Further environment variables for child processes."""


class ResourcesConfig(Frozen):
    """Resources of every stage."""

    download: Resources = Resources()
    """For the download."""
    score: Resources = Resources()
    """For scoring; a process per device."""
    filter: Resources = Resources()
    """For selection and sharding."""
    train_base: Resources = Resources()
    """For training the base generator."""
    train_upsampler: Resources = Resources()
    """For training the upsampler."""
    evaluate: Resources = Resources()
    """For the evaluation."""


class PipelineConfig(Frozen):
    """All settings of a pipeline run."""

    name: str = Field("gigagan", pattern=r"^[\w.-]+$")
    """Prefix of the MLflow experiments."""
    store: str = "runs/store"
    """Folder of all outputs; a relative path starts at the project's folder."""
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
    resources: ResourcesConfig = ResourcesConfig()
    """What each stage runs on."""

    @property
    def store_path(self) -> Path:
        """The store as a path that does not depend on the working directory."""
        return ROOT / Path(self.store).expanduser()

    @classmethod
    def preset(cls, name: str) -> PipelineConfig:
        """One of the presets by name."""
        path = PRESETS / f"{name}.yaml"
        if not path.is_file():
            names = presets()
            raise ConfigError(f"unknown preset {name!r}{_nearest(name, names)}: {', '.join(names)}")
        return cls.parse(yaml.safe_load(path.read_text()) or {})

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> PipelineConfig:
        """Validate a tree; `ConfigError` names each key, its value and what is accepted.

        A training section may name a `preset` of gigagan.config.presets to start from.
        """
        try:
            return cls.model_validate(_expand_presets(tree))
        except ValidationError as error:
            problems = [_problem(problem) for problem in error.errors()]
            raise ConfigError("\n".join(problems)) from error

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
            if not isinstance(node, dict) or (leaf not in node and sections[-1:] != ["env"]):
                raise ConfigError(_unknown(key))
            node[leaf] = value
        return self.parse(tree)


def presets() -> list[str]:
    """Names of all presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def parse_assignments(items: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", …]` as overrides; values are read as YAML."""
    overrides = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not sign:
            raise ConfigError(f"--set {item!r} has no '=': write it as section.key=value")
        overrides[key.strip()] = yaml.safe_load(value)
    return overrides


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
        raise ConfigError(f"{section}.preset: {error}") from error
    if f"train_{found.kind}" != section:
        raise ConfigError(f"{section}.preset = {name}: that is one of train_{found.kind}")
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


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key that an override may name."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):  # of `X | None` the X
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from dotted_keys(kind, f"{prefix}{name}.")


def _nearest(name: str, candidates: list[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.4)
    return f", did you mean {close[0]!r}?" if close else ""


def _unknown(key: str) -> str:
    keys = list(dotted_keys(PipelineConfig))
    last = key.rpartition(".")[2]
    # A right name in the wrong section is nearer than a similar spelling.
    elsewhere = [known for known in keys if known.rpartition(".")[2] == last]
    hint = _nearest(key, elsewhere) or _nearest(key, keys)
    return f"unknown setting {key!r}{hint}"


def _problem(problem: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _unknown(key)
    if not isinstance(problem["input"], dict):
        return f"{key} = {problem['input']!r}: {problem['msg']}"
    return f"{key}: {problem['msg']}"
