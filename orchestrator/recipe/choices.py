"""Building blocks of the recipe language: strict models, choices between variants, bounded numbers and names.

A choice between variants is written as a map with one key (`optimizer: {sgd: {momentum: 0.9}}`); a variant whose
options all have defaults may be written as its bare name (`optimizer: adamw`). Each choice is a model whose fields are
its variants, exactly one of them set, so that `choice.name` and `choice.options` say which.
"""

from __future__ import annotations

from typing import Annotated, Any, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def whole(value: Any) -> Any:
    """A float that is a whole number is an integer, as in JSON Schema: `batch: 1e3` is 1000."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(whole)
LARGEST = 10**12
Int = Annotated[int, Field(le=LARGEST), WHOLE]
Positive = Annotated[int, Field(gt=0, le=LARGEST), WHOLE]
Count = Annotated[int, Field(ge=0, le=LARGEST), WHOLE]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
ImportPath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$")]
Side = Annotated[int, Field(ge=1, le=4096), WHOLE]


class Model(BaseModel):
    model_config = STRICT

    @classmethod
    def alternatives(cls) -> list[str]:
        """Keys of which one stated in an arm, a grid or an override takes the place of another."""
        return []


class OneOf(Model):
    """Exactly one of the alternatives is stated."""

    @model_validator(mode="after")
    def exactly_one(self) -> Self:
        by_key = {f.alias or name: name for name, f in type(self).model_fields.items()}
        fields = [by_key[key] for key in self.alternatives()]
        stated = [name for name in fields if name in self.model_fields_set]
        if len(stated) != 1 or getattr(self, stated[0]) is None:
            names = ", ".join(self.alternatives())
            raise PydanticCustomError("one_of", "expected exactly one of {names}", {"names": names})
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core))
        for key in cls.alternatives():
            schema["properties"][key] = without_null(schema["properties"][key])
        schema["oneOf"] = [{"required": [key]} for key in cls.alternatives()]
        return schema


def without_null(schema: JsonSchemaValue) -> JsonSchemaValue:
    """The JSON Schema of `X | None = None` as that of X."""
    rest = {k: v for k, v in schema.items() if k not in ("anyOf", "default")}
    variants = [v for v in schema.get("anyOf", []) if v != {"type": "null"}]
    return rest | (variants[0] if len(variants) == 1 else {"anyOf": variants} if variants else {})


class Choice(OneOf):
    """Exactly one variant; a bare name stands for the variant with its defaults."""

    @model_validator(mode="before")
    @classmethod
    def bare_name(cls, value: Any) -> Any:
        if isinstance(value, dict | cls):
            return value
        if isinstance(value, str) and value in cls.bare_names():
            return {value: {}}
        names = cls.model_fields_by_key()
        problem = "needs_options" if isinstance(value, str) and value in names else "unknown_variant"
        raise PydanticCustomError(problem, "expected one of {names}", {"names": ", ".join(names)})

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = super().__get_pydantic_json_schema__(core, handler)
        about = {key: schema.pop(key) for key in ("title", "description") if key in schema}
        names = cls.bare_names()
        return about | {"anyOf": [{"enum": names}, schema]} if names else about | schema

    @classmethod
    def alternatives(cls) -> list[str]:
        return cls.model_fields_by_key()

    @classmethod
    def model_fields_by_key(cls) -> list[str]:
        return [f.alias or name for name, f in cls.model_fields.items()]

    @classmethod
    def bare_names(cls) -> list[str]:
        """Variants whose options all have defaults."""
        return [f.alias or name for name, f in cls.model_fields.items() if cls._has_defaults(f.annotation)]

    @staticmethod
    def _has_defaults(annotation: Any) -> bool:
        members = get_args(annotation) or [annotation]
        models = [member for member in members if isinstance(member, type) and issubclass(member, Model)]
        return bool(models) and not any(f.is_required() for f in models[0].model_fields.values())

    @property
    def field(self) -> str:
        return next(iter(self.model_fields_set))

    @property
    def name(self) -> str:
        """The variant's name as the recipe spells it."""
        return type(self).model_fields[self.field].alias or self.field

    @property
    def options(self) -> Any:
        """The variant's options: a model, or a plain value."""
        return getattr(self, self.field)


class Empty(Model):
    """No options."""
