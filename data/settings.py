"""A section's settings from a file and from `key=value` on the command line, errors by name."""

from __future__ import annotations

import difflib
import importlib
import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from data.config import ScoreConfig

Model = TypeVar("Model", bound=BaseModel)


class SettingsError(ValueError):
    """A setting that cannot be: which, its value, and what would do."""


def load(
    model: type[Model],
    section: str,
    file: Path | None,
    assignments: list[str],
    usual: Mapping[str, Any] | None = None,
    **given: Any,
) -> Model:
    """The section's model from `usual`, a JSON or YAML file, `key=value` assignments, and `given`.

    Each goes before what stands left of it. The file holds the section itself, or a whole run's
    settings with the section under its name. Values are YAML; a dotted key reaches into a part
    (`embedded.seed=3`).

    Raises:
        SettingsError: naming every wrong setting, and for unknown ones the nearest that there is.
    """
    told = _from_file(file, section) if file else {}
    values = {**(usual or {}), **told}
    for assignment in assignments:
        _assign(values, assignment, section)
    try:
        return model.model_validate({**values, **given})
    except ValidationError as error:
        faults = "; ".join(_fault(e, model, section) for e in error.errors())
        is_of_file = any(e["loc"] and e["loc"][0] in told for e in error.errors())
        raise SettingsError(f"{file}: {faults}" if is_of_file else faults) from error


def described(model: type[BaseModel], section: str) -> str:
    """Every setting of a section with its default and what it means, for people."""
    lines = [f"settings of the section `{section}`, for --set and --config:"]
    for name, field in model.model_fields.items():
        is_part = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        default = "…" if is_part else json.dumps(field.get_default(), ensure_ascii=False)
        text = " ".join((field.description or "").split())
        lines += textwrap.wrap(
            f"{name}: {default}", 88, initial_indent="  ", subsequent_indent="    "
        ) + textwrap.wrap(text, 88, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _from_file(file: Path, section: str) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"{file} is not a settings file: {error}") from error
    if content is None:
        raise SettingsError(f"{file} holds nothing: write {{}} for the settings that are usual")
    if isinstance(content, dict) and isinstance(content.get(section), dict):
        content = content[section]
    if not isinstance(content, dict):
        raise SettingsError(f"{file} holds {type(content).__name__}, not settings by name")
    return dict(content)


def _assign(values: dict[str, Any], assignment: str, section: str) -> None:
    key, sign, text = assignment.partition("=")
    if not sign or not key:
        raise SettingsError(f"--set {assignment}: write key=value, for example --set seed=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise SettingsError(f"--set {assignment}: the value is not YAML ({why})") from error
    *parents, last = key.removeprefix(f"{section}.").split(".")
    for parent in parents:
        values[parent] = dict(values.get(parent) or {})
        values = values[parent]
    values[last] = value


def _fault(error: Any, model: type[BaseModel], section: str) -> str:
    """One pydantic error as a clause."""
    where = [str(part) for part in error["loc"]]
    name = ".".join([section, *where])
    if error["type"] != "extra_forbidden":
        return f"{name}: {error['msg'].removeprefix('Value error, ')} (given: {error['input']!r})"
    known = _fields(model, where[:-1])
    near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0)
    return f"{name} is not a setting; the nearest is {near[0]}" if near else f"{name} is unknown"


def _fields(model: type[BaseModel], parents: list[str]) -> list[str]:
    """Settings of the model, or of one of its parts."""
    for parent in parents:
        part = model.model_fields[parent].annotation
        if not isinstance(part, type) or not issubclass(part, BaseModel):
            return []
        model = part
    return list(model.model_fields)


class EncoderFactory:
    """`MODULE:FUNCTION` with a config: makes the encoders of a worker, also in another process."""

    def __init__(self, place: str, config: ScoreConfig) -> None:
        self.place, self.config = place, config

    def __call__(self, worker: int) -> Any:
        """The encoders of the worker with this number."""
        return self.function()(self.config, worker)

    def function(self) -> Callable[[ScoreConfig, int], Any]:
        """What `place` names.

        Raises:
            SettingsError: there is no such module or function.
        """
        module_name, sign, name = self.place.partition(":")
        if not sign or not module_name or not name:
            raise SettingsError(f"--encoders {self.place}: write MODULE:FUNCTION")
        try:
            found = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError) as error:
            raise SettingsError(
                f"--encoders {self.place} cannot be imported ({error}): name a function "
                "f(config: ScoreConfig, worker: int) that returns encoders, in a module on the "
                "Python path"
            ) from error
        if not callable(found):
            raise SettingsError(f"--encoders {self.place} is {found!r}, not a function")
        return found
