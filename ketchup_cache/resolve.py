"""Options of a command from a YAML file and flags, and what is said when they are wrong."""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ketchup_cache.config import COMMANDS, Config
from ketchup_cache.errors import ConfigError


def resolve(command: str, file: Path | None, flags: dict[str, Any]) -> Config:
    """Options of one command from a YAML file and flags; flags win.

    One file can serve a whole experiment: a top-level key that names a command holds that command's options,
    the other keys hold for every command that has such an option.

    Raises ConfigError with every problem at once: unknown keys, missing and wrong values.
    """
    config_class = COMMANDS[command]
    values, problems = _read_yaml(command, file) if file else ({}, [])
    values |= {key: value for key, value in flags.items() if value is not None}
    config = None
    try:
        config = config_class.model_validate(values)
    except ValidationError as error:
        problems += [_explain(detail, config_class) for detail in error.errors()]
    if problems or config is None:
        raise ConfigError(problems)
    return config


def _read_yaml(command: str, file: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"{file}: no such config file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: can't be read ({error})"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{file}: not valid YAML: {' '.join(str(error).split())}"]) from None
    if loaded is None:
        return {}, []
    if not isinstance(loaded, dict):
        raise ConfigError([f"{file}: expected `option: value` lines, found a {type(loaded).__name__}"])
    problems: list[str] = []
    shared = {_key(key): value for key, value in loaded.items() if key not in COMMANDS}
    known = {name for config_class in COMMANDS.values() for name in config_class.model_fields}
    problems += [f"{file}: unknown key `{key}`{_did_you_mean(key, known)}" for key in shared if key not in known]
    sections: dict[str, dict[str, Any]] = {}
    for name in COMMANDS:
        section = loaded.get(name) or {}
        if not isinstance(section, dict):
            problems.append(f"{file}: section `{name}` must hold `option: value` lines")
            continue
        fields = COMMANDS[name].model_fields
        sections[name] = {_key(key): value for key, value in section.items()}
        problems += [
            f"{file}: unknown key `{key}` in section `{name}`{_did_you_mean(key, set(fields))}"
            for key in sections[name]
            if key not in fields
        ]
    own = COMMANDS[command].model_fields
    values = shared | sections.get(command, {})
    return {key: value for key, value in values.items() if key in own}, problems


def _key(key: Any) -> str:
    return str(key).replace("-", "_")


def flag(name: str) -> str:
    """`batch_size` → `--batch-size`."""
    return "--" + name.replace("_", "-")


def _did_you_mean(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, sorted(known), n=1)
    return f": did you mean `{close[0]}`?" if close else ""


def _explain(detail: ErrorDetails, config_class: type[Config]) -> str:
    """One problem in one line, with its fix."""
    kind, context, given = detail["type"], detail.get("ctx", {}), detail["input"]
    if not detail["loc"]:  # a rule over several options
        return str(context.get("error", detail["msg"]))
    name = str(detail["loc"][0])
    if kind == "missing":
        text = (config_class.model_fields[name].description or "").split(". ")[0].rstrip(".")
        return f"{flag(name)} is missing: {text[:1].lower()}{text[1:]}"
    if kind == "extra_forbidden":
        return f"unknown option `{name}`{_did_you_mean(name, set(config_class.model_fields))}"
    wants = {
        "greater_than": lambda: f"must be greater than {context['gt']}",
        "greater_than_equal": lambda: f"must be {context['ge']} or more",
        "less_than": lambda: f"must be less than {context['lt']}",
        "less_than_equal": lambda: f"must be {context['le']} or less",
        "literal_error": lambda: f"must be one of {context['expected']}",
        "int_parsing": lambda: "must be a whole number",
        "int_from_float": lambda: "must be a whole number",
        "float_parsing": lambda: "must be a number",
        "bool_parsing": lambda: "must be true or false",
    }.get(kind, lambda: detail["msg"].lower())()
    return f"{flag(name)} {wants}, not {given!r}"


def choices(annotation: Any) -> tuple[str, ...]:
    """The words a Literal allows, also inside `| None` and tuples; empty for other types."""
    if typing.get_origin(annotation) is Literal:
        return tuple(str(a) for a in typing.get_args(annotation))
    for inner in typing.get_args(annotation):
        if found := choices(inner):
            return found
    return ()
