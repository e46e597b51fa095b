"""Settings as frozen models, read from files and from `key=value`; every fault is named."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Tag, ValidationError

Model = TypeVar("Model", bound=BaseModel)


class Frozen(BaseModel):
    """A section of the settings: immutable, unknown keys refused, attribute docs shown."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


class SettingsError(ValueError):
    """A setting that cannot be: which, its value, and what would do."""


def load(
    model: type[Model],
    section: str,
    file: Path | None,
    assignments: Sequence[str],
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
    told = _section(file, section) if file else {}
    values = {**(usual or {}), **told}
    for key, value in parse_assignments(assignments).items():
        _assign(values, key.removeprefix(f"{section}."), value)
    try:
        return model.model_validate({**values, **given})
    except ValidationError as error:
        faults = "; ".join(problems(error, model, f"{section}."))
        is_of_file = any(e["loc"] and e["loc"][0] in told for e in error.errors())
        raise SettingsError(f"{file}: {faults}" if is_of_file else faults) from error


def parse_assignments(items: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """`["a.b=1", …]` as values by dotted key; values are read as YAML.

    Raises:
        SettingsError: an item is not `key=value`.
    """
    found = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not sign or not key.strip():
            raise SettingsError(f"{option} {item}: write key=value, for example {option} seed=1")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            why = " ".join(str(error).split())  # of a parser's several lines one
            raise SettingsError(f"{option} {item}: the value is not YAML ({why})") from error
    return found


def described(model: type[BaseModel], section: str) -> str:
    """Every setting of a section with its default and what it means, for people."""
    lines = [f"settings of the section `{section}`, for --set and --config:"]
    for name, field in model.model_fields.items():
        is_part = isinstance(field.get_default(call_default_factory=True), BaseModel)
        default = "…" if is_part else json.dumps(field.get_default(), ensure_ascii=False)
        text = " ".join((field.description or "").split())
        lines += textwrap.wrap(
            f"{name}: {default}", 88, initial_indent="  ", subsequent_indent="    "
        ) + textwrap.wrap(text, 88, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _section(file: Path, section: str) -> dict[str, Any]:
    """The section's values in a file: its part of that name, or all of it."""
    content = read(file)
    part = content.get(section)
    return dict(part if isinstance(part, dict) else content)


def read(file: Path) -> dict[str, Any]:
    """A JSON or YAML file of settings by name.

    Raises:
        SettingsError: it cannot be read, or holds something else.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise SettingsError(f"{file} is not a settings file: {why}") from error
    if content is None:
        raise SettingsError(f"{file} holds nothing: write {{}} for the settings that are usual")
    if not isinstance(content, dict):
        raise SettingsError(f"{file} holds {type(content).__name__}, not settings by name")
    return content


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        part = values.get(parent)
        values[parent] = dict(part) if isinstance(part, Mapping) else {}
        values = values[parent]
    values[last] = value


# ---- what is wrong -----------------------------------------------------------------------------


def problems(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """Each fault that pydantic found in a model: key (after `prefix`), value, what is accepted."""
    return [_problem(fault, model, prefix) for fault in error.errors()]


def _problem(fault: Any, model: type[BaseModel], prefix: str) -> str:
    key = prefix + ".".join(_place(fault["loc"], model))
    if fault["type"] == "extra_forbidden":
        return unknown(key, dotted_keys(model, prefix))
    if fault["type"] == "union_tag_invalid":
        found, known = fault["ctx"]["tag"], fault["ctx"]["expected_tags"]
        return f"{key}.kind = {found!r}: choose one of {known}"
    # A validator of ours says what is wrong, and no more where the value may be a secret.
    if fault["type"] != "value_error" and not isinstance(fault["input"], dict):
        return f"{key} = {fault['input']!r}: {fault['msg']}"
    return f"{key}: {fault['msg'].removeprefix('Value error, ')}"


def _place(loc: Sequence[int | str], model: type[BaseModel]) -> list[str]:
    """Where in a model a fault is, without the tags by which pydantic tells a union's parts."""
    parts: list[str] = []
    annotations: list[Any] = []
    models: list[type[BaseModel]] = [model]
    for part in loc:
        if part in {tag for annotation in annotations for tag in _tags_in(annotation)}:
            continue
        parts.append(str(part))
        fields = [one.model_fields for one in models]
        annotations = [some[part].annotation for some in fields if part in some]
        models = [one for annotation in annotations for one in models_in(annotation)]
    return parts


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models of a field that is one, of `X | None` the X, of a union all."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def _tags_in(annotation: Any) -> list[str]:
    parts = get_args(annotation)
    own = [part.tag for part in parts if isinstance(part, Tag)]
    return own + [tag for part in parts for tag in _tags_in(part)]


def unknown(key: str, known: Iterable[str]) -> str:
    """The sentence on a dotted key that is none of those known, with the nearest."""
    known = list(known)
    last = key.rpartition(".")[2]
    # A right name in the wrong section is nearer than a similar spelling.
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    return f"unknown setting {key!r}{nearest(key, elsewhere) or nearest(key, known)}"


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`, did you mean 'X'?` with the candidate that is spelt most alike; or nothing."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.4)
    return f", did you mean {close[0]!r}?" if close else ""


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a model and of its parts, as in `a.b`."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in models_in(field.annotation):
            yield from dotted_keys(part, f"{prefix}{name}.")
