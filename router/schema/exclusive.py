"""Whether what is made for one branch of `oneOf` can never match another: then it means the same as `anyOf`.

The branches are enforceable already, so an object has no property but those named unless its schema says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

from router.schema.words import Schema, is_of_type, keyed

Resolve = Callable[[Any, str], Any]


def are_exclusive(branches: Sequence[Any], resolve: Resolve) -> bool:
    """Whether no value that a grammar makes for one branch is valid for another."""
    return all(_excludes(resolve(one, ""), resolve(other, "")) for one, other in permutations(branches, 2))


def _excludes(one: Any, other: Any) -> bool:
    """Whether nothing made for `one` is valid for `other`."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is False or other is False
    values, others = one.get("enum"), other.get("enum")
    if values is not None and others is not None:
        return set(map(keyed, values)).isdisjoint(map(keyed, others))
    if values is not None and "type" in other:
        return not any(is_of_type(value, other["type"]) for value in values)
    if others is not None and "type" in one:
        return not any(is_of_type(value, one["type"]) for value in others)
    if "type" not in one or "type" not in other:
        return False
    if one["type"] != other["type"]:
        return {one["type"], other["type"]} != {"integer", "number"}
    return bool(one["type"] == "object" and _objects_exclude(one, other))


def _objects_exclude(one: Schema, other: Schema) -> bool:
    ours, theirs = one.get("properties", {}), other.get("properties", {})
    closed = ours and "patternProperties" not in one and one.get("additionalProperties", False) is False
    if closed and any(name not in ours for name in other.get("required", [])):
        return True
    for name in one.get("required", []):
        if name in ours and name in theirs and _excludes(ours[name], theirs[name]):
            return True
    return False
