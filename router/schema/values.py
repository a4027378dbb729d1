"""Schemas that list their values: the list is cut to what else the schema asks for."""

from __future__ import annotations

import math
from typing import Any

from router.schema.errors import SchemaError, UnsatisfiableError
from router.schema.patterns import can_be_tried, is_found
from router.schema.words import ARRAY, OBJECT, Schema, is_of_type, same, types_of


def listed(schema: Schema, where: str) -> list[Any]:
    """The values that `schema`, which has `enum` or `const`, allows; at least one."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if not isinstance(values, list):
        raise SchemaError(where, "enum is no list of values")
    if "const" in schema:
        values = [value for value in values if same(value, schema["const"])]
    names = types_of(schema)
    kept = [
        value
        for value in values
        if (names is None or any(is_of_type(value, name) for name in names)) and _fits(value, schema, where)
    ]
    if not kept:
        raise UnsatisfiableError(where, "none of its values is allowed by the rest of it")
    return kept


def _fits(value: Any, schema: Schema, where: str) -> bool:
    if isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf):
            return False
        pattern = schema.get("pattern")
        if pattern is not None and not can_be_tried(pattern):
            raise SchemaError(where, f"pattern {pattern!r} cannot be enforced beside enum or const; leave it out")
        return pattern is None or is_found(pattern, value)
    if is_of_type(value, "number"):
        if "multipleOf" in schema and value % schema["multipleOf"]:
            return False
        return bool(
            schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)
            and schema.get("exclusiveMinimum", -math.inf) < value < schema.get("exclusiveMaximum", math.inf)
        )
    among = next((key for key in (OBJECT if isinstance(value, dict) else ARRAY) if key in schema), None)
    if isinstance(value, dict | list) and among is not None:
        raise SchemaError(where, f"{among} cannot be enforced beside enum or const; leave it out")
    return True
