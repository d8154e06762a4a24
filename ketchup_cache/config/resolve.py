"""Options of a command from a YAML file and flags, and what is said when they are wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ketchup_cache.config.commands import COMMANDS, OF_NEW_ROLLOUTS
from ketchup_cache.config.methods import METHODS
from ketchup_cache.config.names import did_you_mean
from ketchup_cache.config.values import Config
from ketchup_cache.errors import ConfigError
from ketchup_cache.files import read_small
from ketchup_cache.shipped import recipe, recipe_names

ABOUT = "about"
"""The key of a YAML file that is not an option: what `ketchup-cache recipes` shows of the file."""
MAX_BYTES = 2**17
"""Of a YAML file."""
WANTS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
    "literal_error": "must be one of {expected}",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "value_error": "{error}",
}
"""What is said for a kind of pydantic's errors."""


def resolve(command: str, file: Path | None, flags: dict[str, Any], recipe_name: str | None = None) -> Config:
    """Options of one command from a shipped recipe, a YAML file and flags; the later ones win.

    One file can serve a whole experiment: a top-level key that names a command holds that command's options,
    the other keys hold for every command that has such an option. `extends: NAME` builds on a shipped recipe.

    Raises ConfigError with every problem at once: unknown keys, missing and wrong values.
    """
    config_class = COMMANDS[command]
    values: dict[str, Any] = {}
    problems: list[str] = []
    for path in filter(None, (find_recipe(recipe_name) if recipe_name else None, file)):
        found, wrong = _read_yaml(command, path)
        values |= found
        problems += wrong
    values |= {key: value for key, value in flags.items() if value is not None}
    for name in _unused(values, flags) if command == "learn" else ():
        if flags.get(name) is None:
            values.pop(name, None)
    try:
        config = config_class.model_validate(values)
    except ValidationError as error:
        problems += [_explain(detail, config_class) for detail in error.errors()]
    if problems:
        raise ConfigError(problems)
    return config


def _unused(values: dict[str, Any], flags: dict[str, Any]) -> set[str]:
    """Options that do not apply. A file may hold them, since it may serve several methods and commands."""
    rule = METHODS.get(str(values.get("method")))
    both = values.get("scores_from") is not None and values.get("teacher") is not None
    other = "scores_from" if flags.get("teacher") is not None else "teacher"
    offline = not {name for name in ("scores_from", "teacher", "teacher_url") if values.get(name) is not None}
    fixed = dict(rule.fixed if rule else {})
    weights, _ = fixed.get("weights", (values.get("weights") or "comb", ""))
    lacks = {"comb": {"lam"}, "mean": {"k", "tail", "lam"}}.get(str(weights), {"k", "tail"})
    return fixed.keys() | lacks | ({other} if both else OF_NEW_ROLLOUTS if offline else set())


def find_recipe(name: str) -> Path:
    """File of a shipped recipe. Raises ConfigError where there is none of that name."""
    if name not in recipe_names():
        hint = did_you_mean(name, recipe_names()) or "; `ketchup-cache recipes` lists them"
        raise ConfigError([f"no recipe `{name}`{hint}"])
    return recipe(name)


class _Loader(yaml.SafeLoader):
    """A few aliases can stand for billions of values, so there are none."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name): write out what it stands for")
        return super().compose_node(parent, index)


def load_yaml(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file on top of the recipe that it extends, and so on; underscores in all keys. above: what extends it.

    A section (a key that holds keys) is merged with the one below it, anything else replaces it.

    Raises ConfigError where the file is missing, unreadable or no mapping, or `extends` names no recipe or goes round.
    """
    try:
        loaded = yaml.load(read_small(file, MAX_BYTES).decode(), _Loader)
    except FileNotFoundError:
        raise ConfigError([f"{file}: no such config file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: can't be read ({error})"]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of numbers and dates, of deep nesting
        raise ConfigError([f"{file}: not valid YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(loaded, dict | None):
        raise ConfigError([f"{file}: expected `option: value` lines, found a {type(loaded).__name__}"])
    own = _underscored(loaded or {})
    if (name := own.pop("extends", None)) is None:
        return own
    below = find_recipe(str(name))
    if below in (*above, file):
        raise ConfigError([f"{file}: `extends: {name}` goes round in a circle"])
    merged = load_yaml(below, (*above, file))
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merged[key] | value if both else value
    return merged


def _underscored(values: dict[Any, Any]) -> dict[str, Any]:
    return {str(k).replace("-", "_"): _underscored(v) if isinstance(v, dict) else v for k, v in values.items()}


def _read_yaml(command: str, file: Path) -> tuple[dict[str, Any], list[str]]:
    """Options of one command, and what is wrong with the file."""
    loaded = load_yaml(file)
    shared = {key: value for key, value in loaded.items() if key not in (*COMMANDS, ABOUT)}
    known = {name for config_class in COMMANDS.values() for name in config_class.model_fields}
    problems = [f"{file}: unknown key `{key}`{did_you_mean(key, known)}" for key in shared if key not in known]
    for name, config_class in COMMANDS.items():
        section, fields = loaded.get(name) or {}, config_class.model_fields
        if not isinstance(section, dict):
            problems.append(f"{file}: section `{name}` must hold `option: value` lines")
            continue
        unknown, where = [key for key in section if key not in fields], f"in section `{name}`"
        problems += [f"{file}: unknown key `{key}` {where}{did_you_mean(key, fields)}" for key in unknown]
        if name == command:
            shared |= section
    return {key: value for key, value in shared.items() if key in COMMANDS[command].model_fields}, problems


def flag(name: str) -> str:
    """`batch_size` → `--batch-size`."""
    return "--" + name.replace("_", "-")


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
        return f"unknown option `{name}`{did_you_mean(name, config_class.model_fields)}"
    wants = WANTS[kind].format(**context) if kind in WANTS else detail["msg"].lower()
    hint = did_you_mean(str(given), re.findall(r"'(.*?)'", wants)) if kind == "literal_error" else ""
    return f"{flag(name)} {wants}, not {given!r}{hint}"
