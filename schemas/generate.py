"""Write the JSON Schemas in this folder from the models they describe: `python -m ketchup_cache.schemas.generate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from ketchup_cache.cache.manifest import Manifest
from ketchup_cache.config.commands import COMMANDS

DIALECT = "https://json-schema.org/draft/2020-12/schema"
FOLDER = Path(__file__).parent


class _EveryFieldRequired(GenerateJsonSchema):
    """Writers leave nothing out, whatever has a default in Python."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        return True


def manifest_schema() -> dict[str, Any]:
    schema = {"$schema": DIALECT} | Manifest.model_json_schema(schema_generator=_EveryFieldRequired)
    may_lack = {
        "RolloutsInfo": ["finished", "engine"],
        "TeacherInfo": ["served"],
        "PromptForm": ["template_arg", "prefill"],
    }
    for record, key in [
        (schema, "author"),
        *((schema["$defs"][name], key) for name in may_lack for key in may_lack[name]),
    ]:
        record["required"].remove(key)
        del record["properties"][key]["default"]  # it stands for a key that is not there
    return schema


class _NothingRequired(GenerateJsonSchema):
    """A config file may leave out anything: flags and defaults supply the rest."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        return False


def metrics_schema() -> dict[str, Any]:
    from ketchup_cache.training.metrics import StepMetrics  # imports torch

    return {"$schema": DIALECT} | StepMetrics.model_json_schema(schema_generator=_EveryFieldRequired)


def dev_schema() -> dict[str, Any]:
    from ketchup_cache.training.dev import DevRecord  # imports torch

    return {"$schema": DIALECT} | DevRecord.model_json_schema(schema_generator=_EveryFieldRequired)


RECIPE_KEYS: dict[str, Any] = {
    "extends": {"type": "string", "description": "Name of the shipped recipe that this file builds on."},
    "about": {"type": "object", "description": "What `ketchup-cache recipes` says of a recipe."},
}


def config_schema() -> dict[str, Any]:
    """A YAML file for `--config`: a section for each command, and options that hold for every command that has them."""
    sections = {
        name: config.model_json_schema(schema_generator=_NothingRequired) | {"title": name}
        for name, config in COMMANDS.items()
    }
    shared: dict[str, list[dict[str, Any]]] = {}
    for section in sections.values():
        for name, option in section["properties"].items():
            option = {key: value for key, value in option.items() if key not in ("default", "description", "title")}
            if option not in shared.setdefault(name, []):
                shared[name].append(option)
    options = {name: forms[0] if len(forms) == 1 else {"anyOf": forms} for name, forms in shared.items()}
    return {
        "$schema": DIALECT,
        "title": "ketchup-cache config",
        "description": config_schema.__doc__,
        "type": "object",
        "properties": sections | options | RECIPE_KEYS,
        "additionalProperties": False,
    }


SCHEMAS: dict[str, Callable[[], dict[str, Any]]] = {
    "config.schema.json": config_schema,
    "dev.schema.json": dev_schema,
    "manifest.schema.json": manifest_schema,
    "metrics.schema.json": metrics_schema,
}
"""File name → function that makes the schema."""


def render(schema: dict[str, Any]) -> str:
    """The text of a schema file."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, make in SCHEMAS.items():
        (FOLDER / name).write_text(render(make()), encoding="utf-8")
        print(FOLDER / name)
