"""Two schemas that must both hold as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from router.schema.errors import SchemaError, UnsatisfiableError
from router.schema.words import Schema, keyed, same, stripped, types_of

_GREATEST = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_LEAST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
Resolve = Callable[[Any, str], Any]


def merged(one: Any, other: Any, where: str, resolve: Resolve) -> Any:
    """What allows exactly what both allow; raises `SchemaError` where that cannot be written down.

    `resolve` replaces a reference by what it names.
    """
    one, other = resolve(one, where), resolve(other, where)
    if isinstance(one, bool):
        return other if one else False
    if isinstance(other, bool):
        return one if other else False
    one, other = stripped(one), stripped(other)
    result = {**one, **other}
    for key in one.keys() & other.keys():
        result[key] = _both(key, one[key], other[key], where, resolve)
    if "properties" in result or "additionalProperties" in result:
        _merge_properties(result, one, other, where, resolve)
    return result


def _both(key: str, one: Any, other: Any, where: str, resolve: Resolve) -> Any:
    if same(one, other):
        return one
    if key in _GREATEST:
        return max(one, other)
    if key in _LEAST:
        return min(one, other)
    match key:
        case "type":
            return _types(one, other, where)
        case "required":
            return list(dict.fromkeys([*one, *other]))
        case "enum":
            others = set(map(keyed, other))
            return [value for value in one if keyed(value) in others]
        case "items" | "propertyNames" | "additionalProperties":
            return merged(one, other, f"{where}/{key}", resolve)
        case "properties":
            return None  # by `_merge_properties`, which sees what may stand beside them
        case "allOf":
            return [*one, *other]
        case "format":
            return one
        case "uniqueItems":
            return one or other
        case _:
            raise SchemaError(
                where, f"{key} is there twice in allOf, or beside anyOf, with different values; merge them"
            )


def _types(one: Any, other: Any, where: str) -> list[str]:
    ours, theirs = types_of({"type": one}) or [], types_of({"type": other}) or []
    both = [name for name in ours if name in theirs or (name == "integer" and "number" in theirs)]
    both += [name for name in theirs if name == "integer" and "number" in ours and name not in both]
    if not both:
        raise UnsatisfiableError(where, f"no value is of the types {one} and {other} at once")
    return both


def _merge_properties(result: Schema, one: Schema, other: Schema, where: str, resolve: Resolve) -> None:
    """A property that only one of them names is what the other calls additional."""
    ours, theirs = one.get("properties", {}), other.get("properties", {})
    together: dict[str, Any] = {}
    for name in dict.fromkeys([*ours, *theirs]):
        place = f"{where}/properties/{name}"
        if name in ours and name in theirs:
            together[name] = merged(ours[name], theirs[name], place, resolve)
            continue
        schema, rest = (ours[name], other) if name in ours else (theirs[name], one)
        if "patternProperties" in rest:
            raise SchemaError(where, "properties cannot be merged with patternProperties in allOf; merge them")
        together[name] = merged(schema, rest.get("additionalProperties", True), place, resolve)
    if together:
        result["properties"] = together
