"""JSON schemas made by a program: random ones of every keyword that can be enforced, nested, with references."""

from __future__ import annotations

import random
from typing import Any

_WORDS = (
    "name",
    "age",
    "city",
    "tags",
    "price",
    "id",
    "kind",
    "note",
    "date",
    "count",
    "items",
    "owner",
    "is_open",
    "ü",
)
_PATTERNS = ("^[a-z]{2,8}$", "^[A-Z]{3}-\\d{4}$", "^(yes|no|perhaps)$", "^#[0-9a-f]{6}$", "^\\w+@\\w+\\.(com|org)$")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4")


def made_schema(seed: int) -> dict[str, Any]:
    """The schema of a number: equal numbers make equal schemas."""
    return _Maker(random.Random(f"schema {seed}")).whole()


class _Maker:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._defs: dict[str, Any] = {}

    def whole(self) -> dict[str, Any]:
        schema = self._object(3)
        return {**schema, "$defs": self._defs} if self._defs else schema

    def _any(self, depth: int) -> dict[str, Any]:
        simple = [self._string, self._number, self._values, lambda: {"type": "boolean"}, self._nullable]
        if depth <= 0 or self._rng.random() < 0.5:
            return self._rng.choice(simple)()
        nested = [self._object, self._array, self._tuple, self._union, self._reference, self._all, self._mapping]
        return self._rng.choice(nested)(depth - 1)

    def _string(self) -> dict[str, Any]:
        kind = self._rng.randrange(4)
        if kind == 0:
            return {"type": "string", "pattern": self._rng.choice(_PATTERNS)}
        if kind == 1:
            return {"type": "string", "format": self._rng.choice(_FORMATS)}
        least = self._rng.randrange(4)
        return {"type": "string", "minLength": least, "maxLength": least + self._rng.randrange(1, 20)}

    def _number(self) -> dict[str, Any]:
        low = self._rng.randrange(-1000, 1000)
        high = low + self._rng.randrange(1, 5000)
        match self._rng.randrange(5):
            case 0:
                return {"type": "integer", "minimum": low, "maximum": high}
            case 1:
                return {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 1}
            case 2:
                return {"type": "number", "minimum": low / 4, "maximum": high / 4}
            case 3:
                return {"type": "integer", "multipleOf": self._rng.randrange(2, 30), "minimum": 0, "maximum": 300}
            case _:
                return {"type": "integer", "minimum": low}

    def _values(self) -> dict[str, Any]:
        values: list[Any] = ["red", "green", "blue", 1, 2.5, None, True, 'a "quoted" one', {"x": [1]}]
        if self._rng.random() < 0.3:
            return {"const": self._rng.choice(values)}
        return {"enum": self._rng.sample(values, self._rng.randrange(1, 5))}

    def _nullable(self) -> dict[str, Any]:
        return {"type": [self._rng.choice(("string", "integer")), "null"], "maxLength": 12}

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._rng.sample(_WORDS, self._rng.randrange(1, 5))
        schema: dict[str, Any] = {"type": "object", "properties": {name: self._any(depth - 1) for name in names}}
        schema["required"] = [name for name in names if self._rng.random() < 0.7]
        if self._rng.random() < 0.4:
            schema["additionalProperties"] = False
        return schema

    def _mapping(self, depth: int) -> dict[str, Any]:
        values = self._any(depth - 1)
        if self._rng.random() < 0.5:
            return {"type": "object", "patternProperties": {"^x-[a-z]{1,5}$": values}, "additionalProperties": False}
        return {"type": "object", "propertyNames": {"maxLength": 8}, "additionalProperties": values, "maxProperties": 3}

    def _array(self, depth: int) -> dict[str, Any]:
        least = self._rng.randrange(3)
        most = least + self._rng.randrange(1, 3)
        return {"type": "array", "items": self._any(depth - 1), "minItems": least, "maxItems": most}

    def _tuple(self, depth: int) -> dict[str, Any]:
        first = [self._any(depth - 1) for _ in range(self._rng.randrange(1, 4))]
        return {"type": "array", "prefixItems": first, "items": False, "minItems": len(first)}

    def _union(self, depth: int) -> dict[str, Any]:
        if self._rng.random() < 0.5:
            return {"anyOf": [self._any(depth - 1) for _ in range(2)]}
        kinds = self._rng.sample(("cat", "dog", "fish"), 2)
        return {
            "oneOf": [
                {"type": "object", "properties": {"kind": {"const": kind}, "of": self._any(0)}, "required": ["kind"]}
                for kind in kinds
            ]
        }

    def _reference(self, depth: int) -> dict[str, Any]:
        name = f"part{len(self._defs)}"
        self._defs[name] = {}
        self._defs[name] = self._object(depth)
        return {"$ref": f"#/$defs/{name}", "description": "what others name too"}

    def _all(self, depth: int) -> dict[str, Any]:
        one, other = self._object(depth), self._string()
        return {
            "allOf": [
                {key: value for key, value in one.items() if key != "additionalProperties"},
                {"properties": {"extra": other}, "required": ["extra"]},
            ]
        }
