"""Write the JSON Schemas in this folder from the models they describe: `python -m ketchup_cache.schemas.generate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from ketchup_cache.store.manifest import Manifest

DIALECT = "https://json-schema.org/draft/2020-12/schema"
FOLDER = Path(__file__).parent


class _EveryFieldRequired(GenerateJsonSchema):
    """Writers leave nothing out, whatever has a default in Python."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        return True


def manifest_schema() -> dict[str, Any]:
    return {"$schema": DIALECT} | Manifest.model_json_schema(schema_generator=_EveryFieldRequired)


SCHEMAS: dict[str, Callable[[], dict[str, Any]]] = {"manifest.schema.json": manifest_schema}
"""File name → function that makes the schema."""


def render(schema: dict[str, Any]) -> str:
    """The text of a schema file."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, make in SCHEMAS.items():
        (FOLDER / name).write_text(render(make()), encoding="utf-8")
        print(FOLDER / name)
