"""Reads a config file and its overrides into the schema, or reports every mistake at once.

Knows YAML, dotted paths and where each value came from. Does not know what a setting means.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from configs.errors import ConfigError
from configs.schema import ChatbotConfig, Environment, MachineConfig

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T", bound=BaseModel)
Dotted = tuple[str | int, ...]


@dataclass
class Source:
    """Values of one config, and for each dotted path the place that set it."""

    file: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Dotted, str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    def place(self, path: Dotted) -> str:
        """Return `file:line`, or the override, that set `path` or its nearest parent."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.file


def load_chatbot(file: str | Path, overrides: Sequence[str] = ()) -> ChatbotConfig:
    """Read one chatbot's config; `overrides` are `dotted.path=value`.

    Raises:
        ConfigError: All mistakes at once, each with file, line, path, what is allowed and the nearest valid name.
    """
    return _validate(ChatbotConfig, chatbot_source(file, overrides))


def chatbot_source(file: str | Path, overrides: Sequence[str] = ()) -> Source:
    """Read one chatbot's values without checking them: the file's, then the environment's, then the overrides'."""
    source = read_source(Path(file))
    base_model = Environment().base_model_name
    if base_model:
        _set(source, ("model", "name"), base_model, "BASE_MODEL_NAME in the environment")
    for override in overrides:
        _apply_override(source, override)
    return source


def mistakes_with(source: Source, path: str, value: Any, place: str) -> list[str]:
    """Return what would be wrong if one setting of a chatbot had this value, said at `place`."""
    changed = Source(source.file, deepcopy(source.values), dict(source.places))
    _set(changed, tuple(path.split(".")), value, place)
    return _check(ChatbotConfig, changed)[1]


def with_settings(config: ChatbotConfig, settings: Mapping[str, Any]) -> ChatbotConfig:
    """Return a chatbot's config with other values, by dotted path.

    Raises:
        ConfigError: They do not fit each other or the rest.
    """
    source = Source("settings", config.model_dump(exclude_unset=True))
    for path, value in settings.items():
        _set(source, tuple(path.split(".")), value, f"{path}={value}")
    return _validate(ChatbotConfig, source)


def with_overrides(config: ChatbotConfig, overrides: Sequence[str], named: str) -> ChatbotConfig:
    """Return a config that was read before, with overrides; `named` says in errors where it came from.

    Raises:
        ConfigError: As for `load_chatbot`.
    """
    if not overrides:
        return config
    source = Source(named, config.model_dump(mode="json"))
    for override in overrides:
        _apply_override(source, override)
    return _validate(ChatbotConfig, source)


def find_file(name: str) -> Path:
    """Return a file that a setting names: in the folder where the command runs, or else one that comes with Tandem."""
    file = Path(name).expanduser()
    return file if file.exists() or file.is_absolute() or not (ROOT / file).exists() else ROOT / file


def load_machine(name: str | Path = "auto", overrides: Sequence[str] = ()) -> MachineConfig:
    """Read a machine's config: a file, or the name of one in `configs/machines`.

    Raises:
        ConfigError: As for `load_chatbot`.
    """
    named = ROOT / "configs" / "machines" / f"{name}.yaml"
    if not Path(name).is_file() and named.is_file():
        name = named
    elif not Path(name).is_file():
        known = [path.stem for path in (ROOT / "configs" / "machines").glob("*.yaml")]
        raise ConfigError(f"no machine named {name!r}", f"known: {', '.join(sorted(known))}", nearest(str(name), known))
    source = read_source(Path(name))
    for override in overrides:
        _apply_override(source, override)
    return _validate(MachineConfig, source)


def read_source(file: Path) -> Source:
    """Parse a YAML file and remember the line of each value.

    Raises:
        ConfigError: The file is missing, or is no YAML mapping.
    """
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        presets = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.yaml"))
        raise ConfigError(f"no config file {file}", f"presets: {', '.join(presets)}", nearest(str(file), presets)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}", str(error), "a readable YAML file in UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{file} is not YAML", str(error).replace('"<unicode string>"', str(file)), "mend the line named above; indent with spaces"
        ) from None
    source = Source(str(file))
    if node is None:
        return source
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{file} is not a mapping of settings", "expected lines like `name: helpdesk`", "see configs/helpdesk.yaml")
    source.values = _build(node, (), source)
    return source


def _build(node: yaml.Node, path: Dotted, source: Source, within: tuple[yaml.Node, ...] = ()) -> Any:
    """Turn a YAML node into plain values; note each path's line, and keys that stand twice."""
    source.places[path] = f"{source.file}:{node.start_mark.line + 1}"
    if node in within:
        source.mistakes.append(f"{source.places[path]}: {_dotted(path)}: contains itself")
        return None
    within = (*within, node)
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in values:
                source.mistakes.append(f"{source.file}:{key_node.start_mark.line + 1}: {_dotted((*path, key))}: stands twice")
            values[key] = _build(value_node, (*path, key), source, within)
            source.places[(*path, key)] = f"{source.file}:{key_node.start_mark.line + 1}"
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, index), source, within) for index, item in enumerate(node.value)]
    try:
        return yaml.SafeLoader("").construct_object(node)
    except Exception as error:  # whatever YAML's own constructors raise: `!!python/object`, `!!bool maybe`, the date 2026-99-99
        source.mistakes.append(f"{source.places[path]}: {_dotted(path)}: cannot be read ({str(error).partition(chr(10))[0]})")
        return None


def _validate(model: type[T], source: Source) -> T:
    config, mistakes = _check(model, source)
    if mistakes or config is None:
        words = "schema" if model is ChatbotConfig else "schema --machine"
        raise mistakes_error(source.file, mistakes, f"`python -m configs {words}` lists every setting")
    return config


def _check(model: type[T], source: Source) -> tuple[T | None, list[str]]:
    """Return the config, or what is wrong with it; both where only YAML itself had something wrong."""
    bools = dict(_bools_for_numbers(model, source))
    mistakes = [*source.mistakes, *bools.values()]
    try:
        return model.model_validate(source.values), mistakes
    except ValidationError as error:
        details = [detail for detail in _deepest(error.errors()) if _path(detail) not in bools]
        return None, mistakes + [line for detail in details for line in _explain(model, source, detail)]


def mistakes_error(file: str, mistakes: Sequence[str], remedy: str) -> ConfigError:
    """Make one error of all mistakes in a file."""
    count = "one mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return ConfigError(f"{count} in {file}", "\n".join(f"  {mistake}" for mistake in mistakes), remedy)


def _apply_override(source: Source, override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path or path.startswith("-"):
        source.mistakes.append(f"command line: {override!r} is no setting; write dotted.path=value")
        return
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: the date 2026-99-99
        value = text
    _set(source, tuple(path.split(".")), value, f"command line: {override!r}")


def _set(source: Source, path: Dotted, value: Any, place: str) -> None:
    values: Any = source.values
    for depth, key in enumerate(path[:-1], 1):
        inner = values.get(key)
        if not isinstance(inner, dict):
            inner = values[key] = {}
            source.places[path[:depth]] = place
        values = inner
    values[path[-1]] = value
    source.places[path] = place


def _deepest(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Keep one mistake where pydantic names one for each kind that a setting may be of: the one that got furthest, and else the last."""
    paths = [_path(detail) for detail in details]
    return [
        detail
        for number, detail in enumerate(details)
        if not any(
            other[: len(paths[number])] == paths[number] and (len(other) > len(paths[number]) or later > number)
            for later, other in enumerate(paths)
            if later != number
        )
    ]


def _path(detail: ErrorDetails) -> Dotted:
    return tuple(part for part in detail["loc"] if not _is_union_tag(part))


def _explain(model: type[BaseModel], source: Source, detail: ErrorDetails) -> list[str]:
    """One line for each mistake: place, dotted path, what is wrong, what is allowed."""
    path = _path(detail)
    place, dotted = source.place(path), _dotted(path)
    if detail["type"] == "extra_forbidden":
        known = list(setting_paths(model))
        hint = nearest(dotted, known) or nearest(str(path[-1]), known, by_last=True)
        return [f"{place}: {dotted}: no such setting{f'; did you mean {hint}?' if hint else ''}"]
    if detail["type"] == "missing":
        setting = dict(setting_paths(model)).get(dotted)
        return [f"{place}: {dotted}: is missing{f' ({setting.description})' if setting and setting.description else ''}"]
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not path or detail["type"] == "value_error":
        lines = []
        for reason in message.splitlines():
            named = [tuple(name.split(".")) for name in re.findall(r"^[a-z_]+(?=[:=])|[a-z_]+(?:\.[a-z_]+)+", reason)]
            at = next((source.places[setting] for setting in named if setting in source.places), place)
            lines.append(f"{at}: {reason}")
        return lines
    setting = dict(setting_paths(model)).get(dotted)
    about = f". {setting.description}" if setting and setting.description else ""
    return [f"{place}: {dotted}: {message}, not {detail['input']!r}{about}"]


def _bools_for_numbers(model: type[BaseModel], source: Source) -> Iterator[tuple[Dotted, str]]:
    """Yield path and mistake of each `true` where a number belongs, which Python would take for 1."""
    for dotted, info in setting_paths(model):
        path: Dotted = tuple(dotted.split("."))
        value: Any = source.values
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        kinds = get_args(info.annotation) or (info.annotation,)
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            about = f". {info.description}" if info.description else ""
            yield path, f"{source.place(path)}: {dotted}: a number is wanted, not {value}{about}"


def _is_union_tag(part: str | int) -> bool:
    """Pydantic names the tried member of a union in the path; users never wrote it."""
    return isinstance(part, str) and (part.startswith(("literal[", "list[", "function-")) or part in {"int", "str", "float"})


def setting_paths(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every dotted path of a schema with its field, groups included."""
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}", info
        group = info.annotation
        if isinstance(group, type) and issubclass(group, BaseModel):
            yield from setting_paths(group, f"{prefix}{name}.")


def _dotted(path: Dotted) -> str:
    return ".".join(map(str, path))


def nearest(name: str, known: Sequence[Any], by_last: bool = False) -> str:
    """Return the known name most like `name`, or nothing where none is near."""
    names = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in known]
    if by_last:
        by_leaf = {full.rpartition(".")[2]: full for full in reversed(names)}
        found = difflib.get_close_matches(name, by_leaf, n=1, cutoff=0.7)
        return by_leaf[found[0]] if found else ""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return found[0] if found else ""
