"""From a schema as clients write it to one that a grammar enforces whole.

The result allows nothing that the schema forbids, and less than it allows in places: objects have no properties but
those named unless the schema says something of others, and a part without a type gets the one its keywords are about.
Definitions are gathered under `$defs`, where references point.
"""

from __future__ import annotations

import re
from typing import Any

from router.schema.arrays import enforceable_array
from router.schema.budget import MOST_PARTS, Budget
from router.schema.errors import SchemaError, UnsatisfiableError
from router.schema.exclusive import are_exclusive
from router.schema.merge import merged
from router.schema.numbers import enforceable_number
from router.schema.objects import Part, enforceable_object
from router.schema.older import of_today
from router.schema.references import References
from router.schema.strings import enforceable_string
from router.schema.values import listed
from router.schema.words import (
    ARRAY,
    OBJECT,
    OF_TYPE,
    UNENFORCEABLE,
    VALUES,
    Schema,
    asks_nothing,
    stripped,
    types_of,
    without,
)

_MOST_DEEP = 64
_COPIED = (*VALUES, "pattern", "required")
"""Keywords whose values have no parts, and any size."""
_TO_MERGE = 8
"""Characters that cost as much to copy as one schema to merge; and to compare as one to copy."""
_ANY_TYPE = ("object", "array", "string", "number")


def enforceable(schema: Any, *, strict: bool, max_parts: int = MOST_PARTS) -> Schema:
    """The schema for the grammar compiler; raises `SchemaError` for what cannot be enforced, or has too many parts.

    Where it is not `strict`, keywords that no grammar can enforce are left out instead.
    """
    try:
        return _Pass(schema, strict=strict, budget=Budget(max_parts)).result()
    except (TypeError, ValueError, AttributeError, KeyError, re.error) as error:
        if isinstance(error, SchemaError):
            raise
        raise SchemaError("", f"it is no valid JSON schema: {error}") from error
    except ArithmeticError as error:
        raise SchemaError("", f"it has a number with which one cannot reckon ({error}); change it") from error
    except RecursionError as error:
        raise SchemaError("", "it is too deep, or its references go round in a circle; make it flatter") from error


class _Pass:
    """One walk over one schema."""

    def __init__(self, root: Any, *, strict: bool, budget: Budget) -> None:
        self._root = root
        self._strict = strict
        self._references = References(root)
        self._budget = budget
        self._names: dict[str, str] = {}
        """Name under `$defs` of each reference met."""
        self._definitions: dict[str, Any] = {}

    def result(self) -> Schema:
        root = self._part(self._root, "", 0)
        if root is False:
            raise UnsatisfiableError("", "it allows no value")
        whole: Schema = {} if root is True else dict(root)
        if self._definitions:
            whole["$defs"] = self._definitions
        return whole

    def _part(self, schema: Any, where: str, depth: int) -> Any:
        """The enforceable form of one part: a schema, or false."""
        if isinstance(schema, bool):
            return {} if schema else False
        if not isinstance(schema, dict):
            raise SchemaError(where, "it is no schema; give an object")
        if depth > _MOST_DEEP:
            raise SchemaError(where, f"it is more than {_MOST_DEEP} levels deep; make it flatter")
        schema = of_today(stripped(schema))
        self._budget.spend(where, parts=1, characters=sum(len(str(schema[key])) for key in _COPIED if key in schema))
        if "$ref" in schema:
            return self._reference(schema, where, depth)
        if "allOf" in schema:
            rest: Any = without(schema, "allOf")
            for index, branch in enumerate(schema["allOf"]):
                rest = merged(rest, branch, f"{where}/allOf/{index}", self._resolved)
            return self._part(rest, where, depth + 1)
        schema = self._enforced_only(schema, where)
        if "anyOf" in schema or "oneOf" in schema:
            return self._alternatives(schema, where, depth)
        if any(key in schema for key in VALUES):
            return {"enum": self._listed(schema, where)}
        return self._typed(schema, where, depth)

    def _reference(self, schema: Schema, where: str, depth: int) -> Any:
        beside = without(schema, "$ref")
        reference = schema["$ref"]
        target = self._references.target(reference, where)
        if beside:
            self._budget.spend(where, characters=self._references.size(reference, target) // _TO_MERGE)
            return self._part(merged(target, beside, where, self._resolved), where, depth + 1)
        if reference not in self._names:
            name = self._names[reference] = f"d{len(self._names)}"
            self._definitions[name] = {}
            part = self._part(target, reference.removeprefix("#"), depth + 1)
            if part is False:
                raise UnsatisfiableError(where, f"{reference} allows no value")
            self._definitions[name] = part
            self._made(part, where)
        return {"$ref": f"#/$defs/{self._names[reference]}"}

    def _resolved(self, schema: Any, where: str) -> Any:
        """A schema with its own reference replaced by what that names."""
        for _ in range(_MOST_DEEP):
            if not isinstance(schema, dict):
                return schema
            self._budget.spend(where, characters=_TO_MERGE + len(schema.get("required", ())))
            if "$ref" not in schema:
                return schema
            beside = stripped(without(schema, "$ref"))
            target = self._references.target(schema["$ref"], where)
            self._budget.spend(where, characters=self._references.size(schema["$ref"], target) // _TO_MERGE)
            schema = merged(target, beside, where, self._resolved) if beside else target
        raise SchemaError(where, "its references go round in a circle")

    def _made(self, schema: Any, where: str) -> Any:
        """As `_resolved`, for parts that are enforceable already."""
        seen = set()
        while isinstance(schema, dict) and "$ref" in schema:
            name = schema["$ref"].removeprefix("#/$defs/")
            if name in seen:
                raise SchemaError(where, "its references go round in a circle")
            seen.add(name)
            schema = self._definitions[name]
        return schema

    def _listed(self, schema: Schema, where: str) -> list[Any]:
        try:
            return listed(schema, where)
        except UnsatisfiableError:
            raise
        except SchemaError:
            if self._strict or "pattern" not in schema:
                raise
            return listed(without(schema, "pattern"), where)

    def _enforced_only(self, schema: Schema, where: str) -> Schema:
        for key in UNENFORCEABLE:
            if key not in schema or asks_nothing(key, schema):
                continue
            if self._strict:
                raise SchemaError(where, f"{key} cannot be enforced by a grammar; leave it out, or do without strict")
        return {key: value for key, value in schema.items() if key not in {*UNENFORCEABLE, "then", "else"}}

    def _alternatives(self, schema: Schema, where: str, depth: int) -> Any:
        if "anyOf" in schema and "oneOf" in schema:
            raise SchemaError(where, "anyOf and oneOf stand side by side; put one of them within the other")
        key = "anyOf" if "anyOf" in schema else "oneOf"
        beside = without(schema, key)
        parts = []
        why: SchemaError | None = None
        for index, branch in enumerate(schema[key]):
            place = f"{where}/{key}/{index}"
            try:
                whole = merged(beside, branch, place, self._resolved) if beside else branch
                part = self._part(whole, place, depth + 1)
            except UnsatisfiableError as error:
                why = error
                continue
            if part is not False:
                parts.append(part)
        if not parts:
            raise why or UnsatisfiableError(where, f"{key} allows no value")
        if key == "oneOf" and self._strict:
            compared = sum(1 + len(self._made(part, where).get("enum", ())) for part in parts)
            self._budget.spend(where, characters=len(parts) * compared)
            if not are_exclusive(parts, self._made):
                what = "oneOf has branches that may match at once, which no grammar can tell; use anyOf"
                raise SchemaError(where, what)
        return parts[0] if len(parts) == 1 else {"anyOf": parts}

    def _typed(self, schema: Schema, where: str, depth: int) -> Any:
        names = types_of(schema)
        if names is None:
            about = [name for name in _ANY_TYPE if any(key in schema for key in OF_TYPE[name])]
            if not about:
                return {}
            names = about
        if not names:
            raise SchemaError(where, "type names no type; give at least one, or leave it out")
        if len(names) > 1:
            apart = [self._of_type(name, schema, where, depth) for name in dict.fromkeys(names)]
            return {"anyOf": apart}
        return self._of_type(names[0], schema, where, depth)

    def _of_type(self, name: str, schema: Schema, where: str, depth: int) -> Schema:
        match name:
            case "string":
                return {"type": "string", **self._string(schema, where)}
            case "integer" | "number":
                try:
                    return enforceable_number(name, schema, where)
                except UnsatisfiableError:
                    raise
                except SchemaError:
                    if self._strict:
                        raise
                    return enforceable_number(name, without(schema, "multipleOf"), where)
            case "array":
                return enforceable_array(
                    {key: schema[key] for key in ARRAY if key in schema}, where, self._below(depth)
                )
            case "object":
                return enforceable_object(
                    {key: schema[key] for key in OBJECT if key in schema},
                    where,
                    self._below(depth),
                    strict=self._strict,
                    budget=self._budget,
                )
            case "boolean" | "null":
                return {"type": name}
            case _:
                raise SchemaError(where, f"type {name!r} is none of JSON's; those are {', '.join(OF_TYPE)}")

    def _below(self, depth: int) -> Part:
        return lambda schema, where: self._part(schema, where, depth + 1)

    def _string(self, schema: Schema, where: str) -> Schema:
        try:
            return enforceable_string(schema, where)
        except UnsatisfiableError:
            raise
        except SchemaError:
            if self._strict:
                raise
            return enforceable_string(without(schema, "pattern"), where)
