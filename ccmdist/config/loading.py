"""From YAML files and ``key=value`` overrides to one validated model; later wins, all problems are told at once."""

import difflib
import json
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from ccmdist.commit import digest_of
from ccmdist.config.settings import Settings, free_fields
from ccmdist.config.slurm import SlurmSettings
from ccmdist.errors import ConfigError

S = TypeVar("S", bound=Settings)
MAX_YAML_BYTES = 1 << 20
MESSAGES = {  # where pydantic speaks of Python's types, to somebody who wrote YAML
    "tuple_type": "should be a list, such as [a,b]",
    "too_short": "should have more items",
    "model_type": "should be a section of fields",
    "model_attributes_type": "should be a section of fields",
}


def parted(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The words of a command line as YAML files and overrides; a file whose path holds a "=" is one if it exists."""
    files = [a for a in arguments if "=" not in a or Path(a).is_file()]
    return [Path(a) for a in files], [a for a in arguments if a not in files]


def load(kind: type[S], files: Sequence[Path], overrides: Sequence[str] = ()) -> S:
    """The settings that the files and overrides describe, merged left to right.

    Args:
        kind: The settings model of the stage.
        files: YAML files; a mapping of sections each.
        overrides: ``section.field=value`` strings; the value is read as YAML.

    Raises:
        ConfigError: If a file cannot be read, or any field is unknown, missing, of the wrong type or out of range.
    """
    return validate(kind, _values(files, overrides), _source(files))


def load_for_slurm(kind: type[S], files: Sequence[Path], overrides: Sequence[str] = ()) -> tuple[S, SlurmSettings]:
    """The settings of a stage, and of the job that is to run it: the section `slurm` of the same files and overrides.

    Raises:
        ConfigError: As :func:`load`; the problems of both are told at once.
    """
    values = _values(files, overrides)
    section = values.pop("slurm", None)
    config, problems = _checked(kind, values)
    slurm, others = _checked(SlurmSettings, {} if section is None else section, "slurm")
    if config is None or slurm is None:
        raise _refusal(f"{kind.__name__} and its slurm section", _source(files), problems + others)
    return config, slurm


def _values(files: Sequence[Path], overrides: Sequence[str]) -> dict[str, Any]:
    merged = OmegaConf.create({})
    for file in files:
        merged = _merge(merged, _read(file), str(file))
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"'{override}' is neither a YAML file nor an override", "write overrides as key=value")
        try:
            addition = OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(f"override '{override}': {_first_line(error)}", "write overrides as key=value") from None
        merged = _merge(merged, addition, f"override '{override}'")
    _refuse_interpolation(OmegaConf.to_container(merged, resolve=False), "")
    values: Any = OmegaConf.to_container(merged, resolve=True)
    return values


def _source(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files)) or "the command line"


def validate(kind: type[S], values: Any, source: str) -> S:
    """Validate ``values`` as ``kind``; one ConfigError names every problem with its dotted path."""
    config, problems = _checked(kind, values)
    if config is None:
        raise _refusal(kind.__name__, source, problems)
    return config


def _checked(kind: type[S], values: Any, section: str = "") -> tuple[S | None, list[str]]:
    try:
        return kind.model_validate(values), []
    except ValidationError as error:
        return None, [_problem(kind, e, section) for e in error.errors()]


def _refusal(what: str, source: str, problems: Sequence[str]) -> ConfigError:
    return ConfigError(f"{what} from {source}:\n  " + "\n  ".join(problems))


def read_resolved(kind: type[S], path: Path) -> S:
    """The settings that an earlier process wrote to ``path`` with :func:`resolved_json`."""
    return validate(kind, json.loads(path.read_text()), source=str(path))


def resolved(config: Settings) -> dict[str, Any]:
    """All values of ``config``, defaults included, as JSON types."""
    return config.model_dump(mode="json")


def digest(config: Settings) -> str:
    """Digest of all fields that decide what is computed; free fields do not count."""
    free = free_fields(type(config))
    return digest_of({name: value for name, value in flat(resolved(config)).items() if name not in free})


def differences(before: dict[str, Any], now: dict[str, Any], kind: type[Settings]) -> dict[str, str]:
    """``{field: "old -> new"}`` for every field that differs and is not free."""
    old, new, free = flat(before), flat(now), free_fields(kind)
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name) and name not in free)
    return {name: f"{old.get(name, '(absent)')} -> {new.get(name, '(absent)')}" for name in names}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one dictionary with dotted keys."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result


def _read(file: Path) -> DictConfig:
    try:
        if file.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"{file}: {file.stat().st_size} bytes is too large for a config file")
        loaded = OmegaConf.load(file)
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}", "name an existing YAML file, or write overrides as key=value"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not text", "config files are YAML in UTF-8") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"{file}: {_first_line(error)}", "use plain YAML: mappings, lists, numbers and text, no tags"
        ) from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{file}: holds a list, expected a mapping of fields")
    return loaded


def _merge(merged: Any, addition: Any, source: str) -> Any:
    try:
        return OmegaConf.merge(merged, addition)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])


def _refuse_interpolation(values: Any, path: str) -> None:
    """A config says all there is to say: nothing is taken from the environment, from files or from code."""
    if isinstance(values, dict):
        for name, value in values.items():
            _refuse_interpolation(value, f"{path}.{name}" if path else str(name))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            _refuse_interpolation(value, f"{path}[{index}]")
    elif isinstance(values, str) and "${" in values:
        raise ConfigError(f"{path}: interpolation '{values}' is not allowed in a config", "write the value itself")


def _problem(kind: type[BaseModel], error: Any, section: str = "") -> str:
    where = ".".join(((section,) if section else ()) + _typed(kind, error["loc"]))
    if error["type"] == "extra_forbidden":
        *parents, name = error["loc"]
        known = sorted({field for model in _models_at(kind, parents) for field in model.model_fields})
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known fields: {', '.join(known)}"
        if kinds := _kinds_with(kind, parents, str(name)):
            tag = ".".join([*map(str, parents[:-1]), "kind"])
            hint = f"a field of kind {' and '.join(kinds)}; is a file missing that sets {tag}?"
        return f"{where}: no such field; {hint}"
    if error["type"] == "missing":
        return f"{where}: is required"
    if error["type"] == "path_type":
        return f"{where}: should be a path (got {error['input']!r})"
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
        return f"{where}: {text}" if where else text
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        got = f" (got {error['ctx']['tag']!r})" if "tag" in error["ctx"] else ""
        return f"{where}.kind: must be one of {error['ctx'].get('expected_tags', 'the known kinds')}{got}"
    message = MESSAGES.get(error["type"]) or error["msg"].removeprefix("Input ")
    return f"{where}: {message} (got {error['input']!r})"


def _typed(kind: type[BaseModel], path: Sequence[Any]) -> tuple[str, ...]:
    """``path`` as one writes it: without the tags of kinds that pydantic puts into it."""
    typed: list[str] = []
    for index, part in enumerate(path):
        models = _models_at(kind, path[:index])
        is_tag = any(_tag(model) == part for model in models) and not any(part in m.model_fields for m in models)
        typed += [] if is_tag else [str(part)]
    return tuple(typed)


def _kinds_with(kind: type[BaseModel], parents: Sequence[Any], name: str) -> list[str]:
    """The other kinds of a union that have a field; none if ``parents`` does not end with the tag of a kind."""
    siblings = _models_at(kind, parents[:-1]) if parents else []
    tags = {tag: model for model in siblings if (tag := _tag(model)) is not None}
    return [tag for tag, model in tags.items() if name in model.model_fields] if parents and parents[-1] in tags else []


def _models_at(kind: type[BaseModel], path: Sequence[Any]) -> list[type[BaseModel]]:
    """The models that may stand at ``path``; a union of kinds contributes each that fits the path's tag."""
    models: list[type[BaseModel]] = [kind]
    for part in path:
        children: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                children += _models_in(model.model_fields[part].annotation)
            elif _tag(model) == part:
                children.append(model)
        models = children or models
    return models


def _tag(model: type[BaseModel]) -> str | None:
    return str(model.model_fields["kind"].default) if "kind" in model.model_fields else None


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)
