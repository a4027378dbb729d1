"""JSON Schema's keywords by what they speak of. Everything else in a schema is annotation."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

Schema = dict[str, Any]

STRING = ("minLength", "maxLength", "pattern", "format")
NUMBER = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
ARRAY = ("items", "prefixItems", "minItems", "maxItems", "unevaluatedItems")
OBJECT = (
    "properties",
    "required",
    "additionalProperties",
    "patternProperties",
    "propertyNames",
    "minProperties",
    "maxProperties",
    "unevaluatedProperties",
)
OF_TYPE: dict[str, tuple[str, ...]] = {
    "object": OBJECT,
    "array": ARRAY,
    "string": STRING,
    "integer": NUMBER,
    "number": NUMBER,
    "boolean": (),
    "null": (),
}
UNENFORCEABLE = (
    "not",
    "if",
    "contains",
    "minContains",
    "maxContains",
    "uniqueItems",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "$dynamicRef",
    "$recursiveRef",
)
VALUES = ("enum", "const")
COMBINED = ("allOf", "anyOf", "oneOf")
KNOWN = frozenset(
    {"type", "$ref", *VALUES, *COMBINED, *UNENFORCEABLE, "then", "else", "additionalItems"}.union(*OF_TYPE.values())
)


def stripped(schema: Schema) -> Schema:
    """Without annotations and definitions."""
    return {key: value for key, value in schema.items() if key in KNOWN}


def without(schema: Schema, key: str) -> Schema:
    """`schema` but for one keyword."""
    return {name: value for name, value in schema.items() if name != key}


def asks_nothing(key: str, schema: Schema) -> bool:
    """Whether a keyword that no grammar can enforce allows everything here."""
    match key:
        case "uniqueItems":
            return not schema[key] or schema.get("maxItems", 2) <= 1
        case "if":
            return "then" not in schema and "else" not in schema
        case "minContains" | "maxContains":
            return "contains" not in schema
        case _:
            return schema[key] in ({}, []) and key.startswith("depend")


def types_of(schema: Schema) -> list[str] | None:
    """The types named, or None."""
    named = schema.get("type")
    if named is None:
        return None
    return [named] if isinstance(named, str) else list(named)


def is_of_type(value: Any, name: str) -> bool:
    """Whether a JSON value has a type, as JSON Schema counts."""
    match name:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return not isinstance(value, bool) and (
                isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            )
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "string":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
        case _:
            return False


def same(one: Any, other: Any) -> bool:
    """Equal as JSON values: true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def keyed(value: Any) -> Hashable:
    """What is equal for two JSON values if they are the same, to look one up among many."""
    if isinstance(value, bool):
        return bool, value
    if isinstance(value, list):
        return list, tuple(map(keyed, value))
    if isinstance(value, dict):
        return dict, frozenset((name, keyed(each)) for name, each in value.items())
    scalar: Hashable = value
    return scalar
