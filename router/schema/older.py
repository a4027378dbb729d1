"""Keywords of older drafts."""

from __future__ import annotations

from router.schema.words import Schema, without


def of_today(schema: Schema) -> Schema:
    """`schema` in the keywords of today's draft."""
    if isinstance(schema.get("items"), list):
        schema = {**schema, "prefixItems": schema["items"], "items": schema.get("additionalItems", True)}
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(schema.get(exclusive), bool):
            excluded = schema[exclusive]
            schema = without(schema, exclusive)
            if excluded and bound in schema:
                schema = {**without(schema, bound), exclusive: schema[bound]}
    return without(schema, "additionalItems")
