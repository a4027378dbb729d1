"""Objects as a grammar enforces them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from router.schema.budget import Budget
from router.schema.errors import SchemaError, UnsatisfiableError
from router.schema.patterns import can_be_tried, is_found
from router.schema.words import Schema

Part = Callable[[Any, str], Any]
"""The enforceable form of a part one level further down, and of its place: a schema, or false."""


def enforceable_object(schema: Schema, where: str, part: Part, *, strict: bool, budget: Budget) -> Schema:
    """`schema` has the keywords about objects alone; raises `SchemaError`.

    Properties that are allowed no value are left out.
    """
    made: Schema = {"type": "object"}
    others = schema.get("additionalProperties", schema.get("unevaluatedProperties"))
    required = list(dict.fromkeys(schema.get("required", [])))
    patterns = {
        pattern: part(each, f"{where}/patternProperties/{pattern}")
        for pattern, each in _patterns(schema, where, strict=strict).items()
    }
    named = {**schema.get("properties", {})}
    for name in required:
        budget.spend(where, parts=len(patterns))
        if name not in named and any(is_found(pattern, name) for pattern in patterns):
            raise SchemaError(where, f"required {name!r} is only in patternProperties; name it in properties")
        named.setdefault(name, True if others is None else others)
    properties = {}
    for name, each in named.items():
        budget.spend(where, parts=len(patterns), characters=len(name))
        if any(is_found(pattern, name) for pattern in patterns):
            raise SchemaError(where, f"property {name!r} matches patternProperties too, which cannot be enforced")
        whole = part(each, f"{where}/properties/{name}")
        if whole is not False:
            properties[name] = whole
        elif name in required:
            raise UnsatisfiableError(where, f"required {name!r} is allowed no value")
    if properties or "properties" in schema:
        made["properties"] = properties
    if required:
        made["required"] = required
    if patterns:
        made["patternProperties"] = patterns
    if others is not None:
        made["additionalProperties"] = part(others, f"{where}/additionalProperties")
    if "propertyNames" in schema:
        made |= _names_of(schema["propertyNames"], properties, where, part, strict=strict)
    return made | {key: schema[key] for key in ("minProperties", "maxProperties") if key in schema}


def _patterns(schema: Schema, where: str, *, strict: bool) -> Schema:
    """`patternProperties`, if it can be told which of the properties named are among them."""
    patterns: Schema = schema.get("patternProperties", {})
    untried = next((pattern for pattern in patterns if not can_be_tried(pattern)), None)
    if untried is None or not (schema.get("properties") or schema.get("required")):
        return patterns
    if strict:
        raise SchemaError(
            where,
            f"patternProperties {untried!r} cannot be enforced beside properties or required; leave it out, "
            "or make it a plain beginning, such as ^x-",
        )
    return {}


def _names_of(rule: Any, properties: Schema, where: str, part: Part, *, strict: bool) -> Schema:
    allowed = part({"type": "string"} if rule is True else rule, f"{where}/propertyNames")
    if properties:
        if strict:
            raise SchemaError(where, "propertyNames cannot be enforced beside properties; leave it out")
        return {}
    return {"propertyNames": allowed}
