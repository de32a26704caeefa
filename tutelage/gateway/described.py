"""A record as /openapi.json tells it where the framework does not read it itself: a schema that refers to nothing outside itself.

It refuses to know who reads the record.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def schema_of(kind: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a record that does not contain itself, with every part it refers to in its place."""
    schema = kind.model_json_schema()
    parts = schema.pop("$defs", {})

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(part) for part in value]
        if not isinstance(value, dict):
            return value
        rest = {name: whole(part) for name, part in value.items() if name != "$ref"}
        return {**whole(parts[value["$ref"].rpartition("/")[2]]), **rest} if "$ref" in value else rest

    described: dict[str, Any] = whole(schema)
    return described
