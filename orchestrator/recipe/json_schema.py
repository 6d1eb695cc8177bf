"""The recipe language as JSON Schema, draft 2020-12, for editors; it and `load` agree on what is well-formed."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from orchestrator.recipe.study_schema import Recipe


class _Generator(GenerateJsonSchema):
    """Shows defaults as a recipe would write them, and none where nothing is stated."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        stated = schema.get("default") is not None
        return super().default_schema(schema) if stated else self.generate_inner(schema["schema"])

    def encode_default(self, dft: Any) -> Any:
        if isinstance(dft, dict):
            return {key: self.encode_default(value) for key, value in dft.items()}
        if isinstance(dft, BaseModel):
            return dft.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
        return super().encode_default(dft)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file."""
    schema = Recipe.model_json_schema(schema_generator=_Generator)
    return {"$schema": GenerateJsonSchema.schema_dialect, "title": "bigbatch recipe"} | {
        key: value for key, value in schema.items() if key != "title"
    }
