"""Bounds and multiples of numbers. The compiler ignores multiples beside bounds, and of numbers with fractions."""

from __future__ import annotations

import math
from typing import Any

from router.schema.errors import SchemaError, UnsatisfiableError
from router.schema.words import Schema

_MOST_LISTED = 1000


def enforceable_number(name: str, schema: Schema, where: str) -> Schema:
    """A schema of the type `name` with `schema`'s bounds."""
    bounds: Schema = {
        key: schema[key] for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if key in schema
    }
    step = schema.get("multipleOf")
    if step is not None:
        if step <= 0 or step != int(step):
            raise SchemaError(
                where, f"multipleOf {step} is no whole number, which no grammar can enforce; leave it out"
            )
        if step == 1:
            name, step = "integer", None
    if step is not None or name == "integer":
        name = "integer"
        bounds = _whole(bounds)
    if bounds.get("minimum", -math.inf) > bounds.get("maximum", math.inf):
        raise UnsatisfiableError(where, "its bounds leave no number")
    if step is None:
        return {"type": name, **bounds}
    if not bounds:
        return {"type": name, "multipleOf": int(step)}
    if len(bounds) == 2 and (bounds["maximum"] - bounds["minimum"]) // int(step) <= _MOST_LISTED:
        first = -(-bounds["minimum"] // int(step)) * int(step)
        values = list(range(first, bounds["maximum"] + 1, int(step)))
        if not values:
            raise UnsatisfiableError(where, f"no multiple of {step} is within its bounds")
        return {"enum": values}
    raise SchemaError(where, "multipleOf cannot be enforced together with bounds so far apart; leave one out")


def _whole(bounds: dict[str, Any]) -> dict[str, int]:
    """Bounds of whole numbers, as `minimum` and `maximum`."""
    whole: dict[str, int] = {}
    least = [math.ceil(bounds["minimum"])] if "minimum" in bounds else []
    least += [math.floor(bounds["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in bounds else []
    most = [math.floor(bounds["maximum"])] if "maximum" in bounds else []
    most += [math.ceil(bounds["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in bounds else []
    if least:
        whole["minimum"] = max(least)
    if most:
        whole["maximum"] = min(most)
    return whole
