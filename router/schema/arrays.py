"""Arrays as a grammar enforces them."""

from __future__ import annotations

from router.schema.errors import UnsatisfiableError
from router.schema.objects import Part
from router.schema.words import Schema


def enforceable_array(schema: Schema, where: str, part: Part) -> Schema:
    """`schema` has the keywords about arrays alone; raises `SchemaError`."""
    made: Schema = {"type": "array"}
    first = [part(item, f"{where}/prefixItems/{index}") for index, item in enumerate(schema.get("prefixItems", []))]
    if first:
        made["prefixItems"] = first
    default = not first or schema.get("minItems", 0) > len(first)
    made["items"] = part(schema.get("items", schema.get("unevaluatedItems", default)), f"{where}/items")
    made |= {key: schema[key] for key in ("minItems", "maxItems") if key in schema}
    if made.get("minItems", 0) > made.get("maxItems", made.get("minItems", 0)):
        raise UnsatisfiableError(where, "minItems is more than maxItems")
    return made
