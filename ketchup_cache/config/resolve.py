"""Options of a command from a YAML file and flags, and what is said when they are wrong."""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ketchup_cache.config.base import Config
from ketchup_cache.config.commands import COMMANDS
from ketchup_cache.errors import ConfigError
from ketchup_cache.shipped import recipe, recipe_names

RECIPE_KEYS = {"extends", "about"}
"""Keys of a YAML file that are not options: the recipe it builds on, and what `ketchup-cache recipes` shows of it."""


NOT_OF_METHOD = {
    "llmr": ("k",),
    "seqkd": ("teacher", "scorer", "policy", "baseline"),
    "kl": ("teacher", "scorer", "policy", "baseline"),
    "reverse-kl": ("baseline",),
    "js": ("baseline",),
    "tvd": ("baseline",),
}
"""Options that a method of `learn` has no use for: refused as flags, but passed over in a file, which may serve several
methods and commands."""
EITHER = {"score": ("watch", "cache"), "learn": ("scorer", "teacher")}
"""Two ways of a command: a flag for one passes over the other in a file; so does the first one in a file."""


def resolve(command: str, file: Path | None, flags: dict[str, Any], recipe_name: str | None = None) -> Config:
    """Options of one command from a shipped recipe, a YAML file and flags; the later ones win.

    One file can serve a whole experiment: a top-level key that names a command holds that command's options,
    the other keys hold for every command that has such an option. `extends: NAME` builds on a shipped recipe.

    Raises ConfigError with every problem at once: unknown keys, missing and wrong values.
    """
    config_class = COMMANDS[command]
    values: dict[str, Any] = {}
    problems: list[str] = []
    for path in (find_recipe(recipe_name) if recipe_name else None, file):
        if path:
            found, wrong = _read_yaml(command, path)
            values |= found
            problems += wrong
    values |= {key: value for key, value in flags.items() if value is not None}
    for name in NOT_OF_METHOD.get(str(values.get("method")), ()):
        if flags.get(name) is None:
            values.pop(name, None)
    for one, other in (EITHER[command], EITHER[command][::-1]) if command in EITHER else ():
        if values.get(one) is not None and flags.get(other) is None:
            values.pop(other, None)
    config = None
    try:
        config = config_class.model_validate(values)
    except ValidationError as error:
        problems += [_explain(detail, config_class) for detail in error.errors()]
    if problems or config is None:
        raise ConfigError(problems)
    return config


def find_recipe(name: str) -> Path:
    """File of a shipped recipe. Raises ConfigError where there is none of that name."""
    if name not in recipe_names():
        hint = _did_you_mean(name, set(recipe_names())) or "; `ketchup-cache recipes` lists them"
        raise ConfigError([f"no recipe `{name}`{hint}"])
    return recipe(name)


def load_yaml(file: Path) -> dict[str, Any]:
    """A YAML file on top of the recipe that it extends, and so on; underscores in all keys.

    A section (a key that holds keys) is merged with the one below it, anything else replaces it.

    Raises ConfigError where the file is missing, unreadable or no mapping, or `extends` names no recipe or goes round.
    """
    return _load(file, ())


def _load(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"{file}: no such config file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: can't be read ({error})"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{file}: not valid YAML: {' '.join(str(error).split())}"]) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError([f"{file}: expected `option: value` lines, found a {type(loaded).__name__}"])
    own = _underscored(loaded)
    if "extends" not in own:
        return own
    below = find_recipe(str(own["extends"]))
    if below in (*above, file):
        raise ConfigError([f"{file}: `extends: {own['extends']}` goes round in a circle"])
    merged = _load(below, (*above, file))
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merged[key] | value if both else value
    return merged


def _underscored(values: dict[Any, Any]) -> dict[str, Any]:
    return {_key(key): _underscored(value) if isinstance(value, dict) else value for key, value in values.items()}


def _read_yaml(command: str, file: Path) -> tuple[dict[str, Any], list[str]]:
    """Options of one command, and what is wrong with the file."""
    loaded = load_yaml(file)
    problems: list[str] = []
    shared = {key: value for key, value in loaded.items() if key not in COMMANDS and key not in RECIPE_KEYS}
    known = {name for config_class in COMMANDS.values() for name in config_class.model_fields}
    problems += [f"{file}: unknown key `{key}`{_did_you_mean(key, known)}" for key in shared if key not in known]
    sections: dict[str, dict[str, Any]] = {}
    for name in COMMANDS:
        section = loaded.get(name) or {}
        if not isinstance(section, dict):
            problems.append(f"{file}: section `{name}` must hold `option: value` lines")
            continue
        fields = COMMANDS[name].model_fields
        sections[name] = section
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
        "value_error": lambda: str(context["error"]),
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
